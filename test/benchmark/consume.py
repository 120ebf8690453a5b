"""consume - messages per second into handlers, and into a consumer in Python

A queue is filled by capturing a table, each time anew; then one consumer at a
time is let go.  All take a thousand deliveries in advance, remember the ids of
messages, and ack after the commit; the bare one just acks.  The worker's start
counts as its time; the queue is long enough for that not to matter.
"""

import time

from bench import alternate, bare, execute, python, results_of, value, wait_until

TOPIC, GROUP = 'items', 'bench'
QUEUE = f'{TOPIC}_{GROUP}'
PREFETCH = 1000
SECONDS = 15  # for those that are slow

HANDLERS = """
create table applied (sequence bigint primary key, id integer not null, name text not null);
create table inbox (message_id uuid primary key);
create table item (id integer primary key, name text, filler text);

create function no_op(m fanout.message) returns void language plpgsql as $$
begin
end $$;
create function no_op(m fanout.message[]) returns void language plpgsql as $$
begin
end $$;
create function one_insert(m fanout.message) returns void language plpgsql as $$
begin
    insert into applied values (m.sequence, (m.body #>> '{after,id}')::integer, m.body #>> '{after,name}');
end $$;
create function one_insert(m fanout.message[]) returns void language plpgsql as $$
begin
    insert into applied
    select e.sequence, (e.body #>> '{after,id}')::integer, e.body #>> '{after,name}' from unnest(m) e;
end $$
"""


class Consume:
    """The consumers: each returns its messages per second."""

    def __init__(self, env):
        self.env = env
        self.count = env.size(500000, 2000)
        self.server = env.server()
        self.source = self.server.database('bench')
        execute(self.source, 'create table item (id integer primary key, name text, filler text)')
        execute(self.source, 'select fanout.declare_binding(%s, %s)', (TOPIC, GROUP))
        execute(self.source, "select fanout.capture('item', %s)", (TOPIC,))

    def end(self):
        self.source.close()
        self.env.broker.delete(TOPIC, [QUEUE])

    def prepare(self):
        """Fills the queue, and makes an empty database that has the handlers."""
        execute(self.source, 'truncate item')
        execute(self.source, "insert into item select i, 'item ' || i, md5(i::text) || md5((-i)::text) "
                             'from generate_series(1, %s) i', (self.count,))
        assert value(self.source, "select fanout.flush('5 min')")
        self.env.broker.wait_for_depth(QUEUE, self.count)
        sink = self.server.database('sink')
        execute(sink, HANDLERS)
        execute(sink, 'checkpoint')
        return sink

    def bare(self):
        self.prepare().close()
        return self.count / bare('consume', self.env.broker.port, QUEUE, self.count, PREFETCH).run()

    def subscription(self, sql, arguments=()):
        """From the commit of what subscribes to that of the last message."""
        sink = self.prepare()
        applied = 'select applied >= %s from fanout.stat_subscriptions'
        began = time.monotonic()
        execute(sink, sql, (TOPIC, GROUP, *arguments))
        wait_until(lambda: value(sink, applied, (self.count,)), 'not all is applied', 600, 0.02)
        took = time.monotonic() - began
        execute(sink, 'select fanout.unsubscribe(%s, %s)', (TOPIC, GROUP))
        sink.close()
        return self.count / took

    def handler(self, signature):
        return self.subscription('select fanout.subscribe(%s, %s, %s, prefetch => %s)', (signature, PREFETCH))

    def python(self, batch):
        self.prepare().close()
        consumer = python('consumer_pika.py', self.server.uri('sink'), self.env.broker.port, QUEUE, self.count,
                          SECONDS, batch)
        took = consumer.run()
        time.sleep(1)  # what it had in advance goes back
        self.env.broker.purge([QUEUE])
        return int(consumer.stdout) / took

    def variants(self):
        return {
            'bare C, acks only': self.bare,
            'no-op, each message': lambda: self.handler('no_op(fanout.message)'),
            'no-op, batches': lambda: self.handler('no_op(fanout.message[])'),
            'one insert, each message': lambda: self.handler('one_insert(fanout.message)'),
            'one insert, batches': lambda: self.handler('one_insert(fanout.message[])'),
            'sync_table': lambda: self.subscription("select fanout.sync_table(%s, %s, 'item')"),
            'Python, each message': lambda: self.python(1),
            'Python, batches': lambda: self.python(500),
        }


def consume(env):
    run = Consume(env)
    values = alternate(run.variants(), env.rounds)
    run.end()
    return results_of('consume', 'quorum queue', 'messages/s', values, 'Python, batches', {'one insert, batches': 3})


SCENARIOS = {'consume': consume}
