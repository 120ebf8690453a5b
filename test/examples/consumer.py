#!/usr/bin/python3
"""consumer.py - keeps a copy of an entity's rows, with pika

    consumer.py URI QUEUE COPY.db [--idle SECONDS] [--fail-once]

An example to start from: manual acks, nack when processing failed, repeats
recognised by their message id, nothing older written over something newer, keys
that change, TRUNCATE, and messages that can never be processed.  What was seen
and what came of it are written in one transaction, here to SQLite, and acked
after its commit.
"""

import argparse
import json
import sqlite3

import pika

PREFETCH = 100


class BadMessage(Exception):
    """A message that fails in the same way whenever it comes."""


def open_copy(path):
    db = sqlite3.connect(path)
    db.executescript('''
        create table if not exists inbox (message_id text primary key);
        create table if not exists entity (key text primary key, sequence integer, row text);
        create table if not exists truncated (sequence integer);
        create table if not exists bad (message_id text, reason text, body blob);''')
    return db


def write(db, key, sequence, row):
    """Of a deleted row the sequence stays, so that no late message revives it."""
    db.execute('''
        insert into entity select :key, :sequence, :row
        where :sequence > (select coalesce(max(sequence), 0) from truncated)
        on conflict (key) do update set sequence = :sequence, row = :row where sequence < :sequence''',
               {'key': key, 'sequence': sequence, 'row': row})


def truncate(db, sequence):
    db.execute('insert into truncated values (?)', (sequence,))
    db.execute('delete from entity where sequence < ?', (sequence,))


def apply(db, headers, body):
    """One change.  What has no op is no change of a row, but somebody's publish()."""
    op, key, sequence = headers.get('op'), headers.get('key'), headers.get('sequence')
    if op is None:
        return
    if op == 't':
        return truncate(db, sequence)
    if key is None or sequence is None:
        raise BadMessage('a change without key or sequence')
    if 'old_key' in headers:            # the row has left that key
        write(db, headers['old_key'], sequence, None)
    # SQLite takes the row out of the body as it stands there: no number is rounded
    row = db.execute("select json_extract(?, '$.after')", (body,)).fetchone()[0]
    write(db, key, sequence, row)


def process(db, properties, body):
    """One message, in one transaction.  Returns what it was."""
    with db:                            # commits, or rolls back and raises
        seen = db.execute('insert or ignore into inbox values (?)', (properties.message_id,))
        if seen.rowcount == 0:
            return 'repeats'
        apply(db, properties.headers or {}, body.decode())
    return 'processed'


def put_aside(db, properties, body, error):
    """Nothing else waits for it; somebody has to look at it."""
    with db:
        db.execute('insert into bad values (?, ?, ?)', (properties.message_id, repr(error), body))


def handle(channel, db, method, properties, body):
    try:
        try:
            result = process(db, properties, body)
        except (BadMessage, UnicodeDecodeError, sqlite3.OperationalError) as error:
            if isinstance(error, sqlite3.OperationalError) and 'malformed JSON' not in str(error):
                raise
            put_aside(db, properties, body, error)
            result = 'bad'
        channel.basic_ack(method.delivery_tag)
    except sqlite3.Error:
        # a real service waits before it gives a message back
        channel.basic_nack(method.delivery_tag, requeue=True)
        result = 'failed'
    return result


def consume(channel, queue, db, idle, fail_once):
    failed = set()
    counts = {'processed': 0, 'repeats': 0, 'failed': 0, 'bad': 0}
    for method, properties, body in channel.consume(queue, inactivity_timeout=idle):
        if method is None:
            return counts
        if fail_once and properties.message_id not in failed:
            failed.add(properties.message_id)
            channel.basic_nack(method.delivery_tag, requeue=True)
            counts['failed'] += 1
        else:
            counts[handle(channel, db, method, properties, body)] += 1
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
