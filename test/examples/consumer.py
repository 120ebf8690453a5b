#!/usr/bin/python3
"""consumer.py - keeps a copy of an entity's rows, with pika

    consumer.py URI QUEUE COPY.db [--idle SECONDS] [--fail-once]

An example to start from: manual acks, nack when processing failed, repeats
recognised by their message id, nothing older written over something newer, keys
that change, TRUNCATE, messages that can never be processed, and a connection that
is lost.  What was seen and what came of it are written in one transaction, here to
SQLite, and acked after its commit.  SIGTERM ends it.
"""

import argparse
import json
import signal
import sqlite3
import sys
import time

import pika

PREFETCH = 100
RECONNECT = 1   # seconds


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


class Consumer:
    def __init__(self, args):
        self.args = args
        self.db = open_copy(args.copy)
        self.failed = set()
        self.counts = {'processed': 0, 'repeats': 0, 'failed': 0, 'bad': 0}
        self.ended = False

    def end(self, *_):
        self.ended = True

    def deliver(self, channel, method, properties, body):
        if self.args.fail_once and properties.message_id not in self.failed:
            self.failed.add(properties.message_id)
            channel.basic_nack(method.delivery_tag, requeue=True)
            self.counts['failed'] += 1
        else:
            self.counts[handle(channel, self.db, method, properties, body)] += 1

    def consume(self, channel):
        """Until it is to end."""
        idle_since = time.monotonic()
        channel.basic_qos(prefetch_count=PREFETCH)
        for method, properties, body in channel.consume(self.args.queue, inactivity_timeout=0.5):
            if method is not None:
                self.deliver(channel, method, properties, body)
                idle_since = time.monotonic()
            elif self.args.idle is not None and time.monotonic() - idle_since > self.args.idle:
                self.end()
            if self.ended:
                return

    def run(self):
        """What was not acked when a connection was lost comes again."""
        while not self.ended:
            try:
                connection = pika.BlockingConnection(pika.URLParameters(self.args.uri))
                self.consume(connection.channel())
                connection.close()
            except pika.exceptions.AMQPError as error:
                print(repr(error), file=sys.stderr)
                time.sleep(RECONNECT)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('uri')
    parser.add_argument('queue')
    parser.add_argument('copy')
    parser.add_argument('--idle', type=float, help='end when nothing came for so many seconds')
    parser.add_argument('--fail-once', action='store_true', help='each message at its first delivery')
    consumer = Consumer(parser.parse_args())

    signal.signal(signal.SIGTERM, consumer.end)
    consumer.run()
    print(json.dumps(consumer.counts))


if __name__ == '__main__':
    main()
