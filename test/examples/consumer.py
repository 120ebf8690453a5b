#!/usr/bin/python3
"""consumer.py - keeps a copy of an entity's rows, with pika

    consumer.py URI QUEUE COPY.db [--idle SECONDS] [--fail-once]

An example to start from: manual acks, nack when processing failed, repeats
recognised by their message id, nothing older written over something newer.
What was seen and what came of it are written in one transaction, here to
SQLite, and acked after its commit.
"""

import argparse
import json
import sqlite3

import pika

PREFETCH = 100


def open_copy(path):
    db = sqlite3.connect(path)
    db.executescript('''
        create table if not exists inbox (message_id text primary key);
        create table if not exists entity (key text primary key, sequence integer, row text);''')
    return db


def process(db, properties, body):
    """One message, in one transaction.  Returns False if it was a repeat."""
    headers = properties.headers
    message = json.loads(body)
    with db:                            # commits, or rolls back and raises
        seen = db.execute('insert or ignore into inbox values (?)', (properties.message_id,))
        if seen.rowcount == 0:
            return False
        # of a deleted row the sequence stays, so that no late message revives it
        db.execute('''
            insert into entity values (:key, :sequence, :row)
            on conflict (key) do update set sequence = :sequence, row = :row
            where sequence < :sequence''',
                   {'key': headers['key'], 'sequence': headers['sequence'],
                    'row': json.dumps(message['after']) if message['after'] else None})
    return True


def consume(channel, queue, db, idle, fail_once):
    failed = set()
    counts = {'processed': 0, 'repeats': 0, 'failed': 0}
    for method, properties, body in channel.consume(queue, inactivity_timeout=idle):
        if method is None:
            return counts
        try:
            if fail_once and properties.message_id not in failed:
                failed.add(properties.message_id)
                raise RuntimeError('on purpose')
            counts['processed' if process(db, properties, body) else 'repeats'] += 1
            channel.basic_ack(method.delivery_tag)
        except (RuntimeError, sqlite3.Error):
            # a real service waits before it gives a message back
            counts['failed'] += 1
            channel.basic_nack(method.delivery_tag, requeue=True)
    return counts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('uri')
    parser.add_argument('queue')
    parser.add_argument('copy')
    parser.add_argument('--idle', type=float, help='end when nothing came for so many seconds')
    parser.add_argument('--fail-once', action='store_true', help='each message at its first delivery')
    args = parser.parse_args()

    connection = pika.BlockingConnection(pika.URLParameters(args.uri))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=PREFETCH)
    print(json.dumps(consume(channel, args.queue, open_copy(args.copy), args.idle, args.fail_once)))
    connection.close()


if __name__ == '__main__':
    main()
