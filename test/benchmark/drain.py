"""drain - how fast a backlog leaves, and what the limit is

A backlog is written while nobody publishes; then one publisher at a time is let
go, and the time is taken until everything is confirmed and recorded as sent.
Nobody consumes meanwhile, and the queues are empty before.

    drain        one topic
    channels     eight topics, against a publisher with a channel for each, and
                 against eight publishers at once

Relays that are slow are stopped after a while; what counts is what they sent.
"""

import os
import time

from bench import WINDOW, Backlog, alternate, bare, execute, node, publisher, python, results_of, stopped, value

RELAY_SECONDS = 5

SETTINGS = [  # bytes, messages, type and number of queues
    (300, 200000, 'quorum', 1),
    (300, 200000, 'quorum', 4),
    (300, 200000, 'classic', 1),
    (300, 200000, 'classic', 4),
    (30, 200000, 'quorum', 1),
    (3000, 50000, 'quorum', 1),
]


class Drain(Backlog):
    """The publishers: each returns its messages per second."""

    def __init__(self, env, size, count, queue_type, nqueues):
        super().__init__(env, size, env.size(count, count // 40), queue_type, nqueues)

    def rate(self, count, seconds):
        """Checks that the messages are there, and removes them."""
        for queue in self.queues:
            self.env.broker.wait_for_depth(queue, count)
        self.env.broker.purge(self.queues)
        return count / seconds

    def bare(self):
        return self.rate(self.count, bare('publish', self.env.broker.port, self.topic, self.bodies_file(), WINDOW).run())

    def pg_fanout(self):
        with stopped(publisher(self.db)):
            self.fill()
            execute(self.db, 'checkpoint')
            began = time.monotonic()
        assert value(self.db, "select fanout.flush('10 min')")
        return self.rate(self.count, time.monotonic() - began)

    def relay(self, start, script, *arguments, fill):
        fill()
        program = start(script, self.server.uri('relay'), self.env.broker.port, self.topic, RELAY_SECONDS, *arguments)
        seconds = program.run()
        count = int(program.stdout)
        if script == 'relay_outbox.mjs':  # what it had in flight comes still
            time.sleep(1)
            self.env.broker.purge(self.queues)
            return count / seconds
        return self.rate(count, seconds)

    def variants(self):
        return {
            'bare C': self.bare,
            'pg_fanout': self.pg_fanout,
            'relay, Python and pika': lambda: self.relay(python, 'relay_pika.py', fill=self.fill_outbox),
            'relay, Node and amqplib': lambda: self.relay(node, 'relay_amqplib.mjs', fill=self.fill_outbox),
            'pg-transactional-outbox': lambda: self.relay(node, 'relay_outbox.mjs', self.count,
                                                          fill=self.fill_package),
        }


def target(env):
    return 0.95 if env.broker.version.startswith('3.') else 0.85


def drain(env, settings=None):
    results = []
    for size, count, queue_type, nqueues in settings or SETTINGS:
        run = Drain(env, size, count, queue_type, nqueues)
        values = alternate(run.variants(), env.rounds)
        run.end()
        what = f"{size} B, {nqueues} {queue_type} queue{'s' if nqueues > 1 else ''}"
        results += results_of('drain', what, 'messages/s', values, 'bare C', {'pg_fanout': target(env)})
    return results


# Several topics

TOPICS = 8
SHARE = WINDOW // TOPICS    # of the window: pg_fanout's topics have a part each when several publish, too


class Channels(Backlog):
    """Topics with a queue each."""

    def __init__(self, env, size, count):
        super().__init__(env, size, env.size(count, count // 40), nqueues=0)
        self.topics = [f'channel{number}' for number in range(TOPICS)]
        self.queues = [f'{topic}_g' for topic in self.topics]
        for topic in self.topics:
            execute(self.db, "select fanout.declare_binding(%s, 'g')", (topic,))
        assert value(self.db, 'select fanout.flush()')

    def end(self):
        self.db.close()
        self.relay_db.close()
        for topic, queue in zip(self.topics, self.queues):
            self.env.broker.delete(topic, [queue])

    def rate(self, seconds):
        """Checks that the messages are there, and removes them."""
        for queue in self.queues:
            self.env.broker.wait_for_depth(queue, self.count // TOPICS)
        self.env.broker.purge(self.queues)
        return self.count / seconds

    def one(self):
        return self.rate(bare('publish', self.env.broker.port, ','.join(self.topics), self.bodies_file(), SHARE).run())

    def several(self):
        """As many publishers at once, until the last is done."""
        file = self.bodies_file(self.count // TOPICS)
        publishers = [bare('publish', self.env.broker.port, topic, file, SHARE) for topic in self.topics]
        began = time.monotonic()
        for each in publishers:
            each.go()
        for each in publishers:
            each.expect('done')
        seconds = time.monotonic() - began
        for each in publishers:
            each.end()
        return self.rate(seconds)

    def pg_fanout(self, block):
        """The topics take turns with so many messages."""
        with stopped(publisher(self.db)):
            execute(self.db, "select count(fanout.publish((%s::text[])[1 + (i - 1) / %s %% %s], body(i, %s)::jsonb, "
                             "key => i::text, type => 'benchmark')) from generate_series(1, %s) i",
                    (self.topics, block, TOPICS, self.size, self.count))
            execute(self.db, 'checkpoint')
            began = time.monotonic()
        assert value(self.db, "select fanout.flush('10 min')")
        return self.rate(time.monotonic() - began)

    def variants(self):
        block = self.count // TOPICS // 25
        return {
            'bare C, 8 channels': self.one,
            'bare C, 8 publishers': self.several,
            'pg_fanout': lambda: self.pg_fanout(1),
            f'pg_fanout, blocks of {block:,}': lambda: self.pg_fanout(block),
        }


def channels(env):
    run = Channels(env, 300, 200000)
    values = alternate(run.variants(), env.rounds)
    run.end()
    return results_of('channels', f'300 B, {TOPICS} topics, 1 quorum queue each', 'messages/s', values,
                      'bare C, 8 channels', {name: target(env) for name in values if name.startswith('pg_fanout')})


SCENARIOS = {'drain': drain, 'channels': channels}
LONG = {  # the first setting alone, and the last
    'drain1': lambda env: drain(env, SETTINGS[:1]),
    'drain-large': lambda env: drain(env, SETTINGS[-1:]),
}
