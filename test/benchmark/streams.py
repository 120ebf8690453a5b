"""streams - a stream beside a quorum queue: messages per second into it, and out of it

A backlog is written while nobody publishes; then the publisher is let go, and after it
a subscription that inserts a row for each message, in batches.  The topic and its queue
are made for each round, because a stream keeps what was in it.
"""

import time

from bench import alternate, execute, publisher, results_of, stopped, value, wait_until
from consume import GROUP, HANDLERS, PREFETCH, QUEUE, TOPIC


class Streams:
    def __init__(self, env):
        self.env = env
        self.count = env.size(200000, 2000)
        self.server = env.server()
        self.source = self.server.database('bench')
        execute(self.source, 'create table item (id integer primary key, name text, filler text)')

    def end(self):
        self.source.close()

    def publish(self, queue_type):
        execute(self.source, 'select fanout.declare_binding(%s, %s, %s)', (TOPIC, GROUP, queue_type))
        execute(self.source, "select fanout.capture('item', %s, '{insert}')", (TOPIC,))
        assert value(self.source, 'select fanout.flush()')
        with stopped(publisher(self.source)):
            execute(self.source, "insert into item select i, 'item ' || i, md5(i::text) || md5((-i)::text) "
                                 'from generate_series(1, %s) i', (self.count,))
            execute(self.source, 'checkpoint')
            began = time.monotonic()
        assert value(self.source, "select fanout.flush('5 min')")
        return self.count / (time.monotonic() - began)

    def consume(self, start_at):
        sink = self.server.database('sink')
        execute(sink, HANDLERS)
        execute(sink, 'checkpoint')
        began = time.monotonic()
        execute(sink, "select fanout.subscribe(%s, %s, 'one_insert(fanout.message[])', prefetch => %s, start_at => %s)",
                (TOPIC, GROUP, PREFETCH, start_at))
        wait_until(lambda: value(sink, 'select sum(applied) >= %s from fanout.stat_subscriptions', (self.count,)),
                   'not all is applied', 600, 0.02)
        took = time.monotonic() - began
        execute(sink, 'select fanout.unsubscribe(%s, %s)', (TOPIC, GROUP))
        sink.close()
        return self.count / took

    def remove(self):
        execute(self.source, "select fanout.uncapture('item', %s)", (TOPIC,))
        execute(self.source, 'truncate item')
        execute(self.source, 'select fanout.drop_binding(%s, %s, if_empty => false, if_unused => false)', (TOPIC, GROUP))
        wait_until(lambda: value(self.source, 'select count(*) = 0 from fanout.bindings'), f'{QUEUE} is not dropped')

    def both(self, queue_type, start_at):
        rates = (self.publish(queue_type), self.consume(start_at))
        self.remove()
        return rates


def streams(env):
    run = Streams(env)
    values = alternate({'quorum queue': lambda: run.both('quorum', None),
                        'stream': lambda: run.both('stream', 'first')}, env.rounds)
    run.end()
    results = []
    for number, what in enumerate(('publishing', 'consuming, one insert')):
        rates = {name: [both[number] for both in measured] for name, measured in values.items()}
        results += results_of('streams', what, 'messages/s', rates, 'quorum queue', {'stream': 0.8})
    return results


SCENARIOS = {'streams': streams}
