#!/usr/bin/python3
"""consumer_pika - a consumer with an inbox, in Python

    consumer_pika.py DSN PORT QUEUE COUNT SECONDS BATCH

Inserts message id and effect in one transaction, and acks after its commit: for
each message (BATCH 1), or for as many as are at hand, BATCH at most, with one
statement each and one ack.  Says "done" and how many after COUNT, or SECONDS.
"""

import json
import sys
import time

import pika
import psycopg2
from psycopg2.extras import execute_values

PREFETCH = 1000

NEW = 'insert into inbox (message_id) values %s on conflict do nothing returning message_id::text'
EFFECT = 'insert into applied (sequence, id, name) values %s'


def apply(db, messages):
    with db, db.cursor() as cursor:
        ids = [(properties.message_id,) for _, properties, _ in messages]
        new = {row[0] for row in execute_values(cursor, NEW, ids, page_size=len(ids), fetch=True)}
        rows = []
        for _, properties, body in messages:
            if properties.message_id in new:
                after = json.loads(body)['after']
                rows.append((properties.headers['sequence'], after['id'], after['name']))
        if rows:
            execute_values(cursor, EFFECT, rows, page_size=len(rows))


def apply_one(db, message):
    _, properties, body = message
    with db, db.cursor() as cursor:
        cursor.execute('insert into inbox (message_id) values (%s) on conflict do nothing', (properties.message_id,))
        if cursor.rowcount == 1:
            after = json.loads(body)['after']
            cursor.execute('insert into applied (sequence, id, name) values (%s, %s, %s)',
                           (properties.headers['sequence'], after['id'], after['name']))


def consume(db, channel, queue, count, seconds, size):
    end = time.monotonic() + seconds
    applied = 0
    messages = []
    for message in channel.consume(queue):
        messages.append(message)
        if len(messages) < min(size, count - applied) and channel.get_waiting_message_count() > 0:
            continue
        if size == 1:
            apply_one(db, message)
        else:
            apply(db, messages)
        channel.basic_ack(message[0].delivery_tag, multiple=True)
        applied += len(messages)
        messages = []
        if applied == count or time.monotonic() > end:
            return applied


def main():
    dsn, port, queue, count, seconds, size = sys.argv[1:]
    db = psycopg2.connect(dsn)
    connection = pika.BlockingConnection(pika.URLParameters(f'amqp://guest:guest@127.0.0.1:{port}/%2F'))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=PREFETCH)
    print('ready', flush=True)
    sys.stdin.readline()
    applied = consume(db, channel, queue, int(count), float(seconds), int(size))
    print('done', flush=True)
    print(applied)
    connection.close()


if __name__ == '__main__':
    main()
