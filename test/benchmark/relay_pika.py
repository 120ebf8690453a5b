#!/usr/bin/python3
"""relay_pika - the common relay that polls an outbox table, in Python

    relay_pika.py DSN PORT EXCHANGE SECONDS

Takes a thousand rows at a time with FOR UPDATE SKIP LOCKED, publishes them with
confirms, all in flight at once, updates sent_at, commits.  Says "done" and how
many when there are none left or SECONDS have passed; with 0 it goes on, and
polls every 100 ms.
"""

import sys
import time

import pika
import psycopg2
from pika.adapters.select_connection import SelectConnection

BATCH = 1000
POLL = 0.1

NEXT = """
select id, message_id::text, key, type, payload::text, extract(epoch from created_at)::bigint
from outbox where sent_at is null order by id limit %s for update skip locked"""
SENT = 'update outbox set sent_at = now() where id = any(%s)'


class Relay:
    def __init__(self, dsn, port, exchange, seconds):
        self.db = psycopg2.connect(dsn)
        self.cursor = self.db.cursor()
        self.exchange = exchange
        self.seconds = seconds
        self.tag = 0
        self.unconfirmed = set()
        self.ids = []
        self.count = 0
        parameters = pika.URLParameters(f'amqp://guest:guest@127.0.0.1:{port}/%2F')
        self.connection = SelectConnection(parameters, on_open_callback=self.on_open)

    def on_open(self, connection):
        connection.channel(on_open_callback=self.on_channel)

    def on_channel(self, channel):
        self.channel = channel
        channel.confirm_delivery(self.on_confirm)
        print('ready', flush=True)
        sys.stdin.readline()
        self.end = time.monotonic() + self.seconds if self.seconds else None
        self.next_batch()

    def next_batch(self):
        self.cursor.execute(NEXT, (BATCH,))
        rows = self.cursor.fetchall()
        if self.end and (not rows or time.monotonic() > self.end):
            self.connection.ioloop.stop()
        elif rows:
            self.publish(rows)
        else:
            self.db.commit()
            self.connection.ioloop.call_later(POLL, self.next_batch)

    def publish(self, rows):
        self.ids = [row[0] for row in rows]
        for sequence, message_id, key, kind, payload, created_at in rows:
            self.tag += 1
            self.unconfirmed.add(self.tag)
            self.channel.basic_publish(self.exchange, '', payload, pika.BasicProperties(
                content_type='application/json', delivery_mode=2, message_id=message_id, type=kind,
                timestamp=created_at, app_id='relay', headers={'sequence': sequence, 'key': key}), mandatory=True)

    def on_confirm(self, frame):
        tag = frame.method.delivery_tag
        if frame.method.multiple:
            self.unconfirmed = {other for other in self.unconfirmed if other > tag}
        else:
            self.unconfirmed.discard(tag)
        if not self.unconfirmed:
            self.cursor.execute(SENT, (self.ids,))
            self.db.commit()
            self.count += len(self.ids)
            self.next_batch()


def main():
    dsn, port, exchange, seconds = sys.argv[1:]
    relay = Relay(dsn, port, exchange, float(seconds))
    relay.connection.ioloop.start()
    print('done', flush=True)
    print(relay.count)


if __name__ == '__main__':
    main()
