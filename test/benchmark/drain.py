"""drain - how fast a backlog leaves, and what the limit is

A backlog is written while nobody publishes; then one publisher at a time is let
go, and the time is taken until everything is confirmed and recorded as sent.
Nobody consumes meanwhile, and the queues are empty before.
"""

import os
import time

from bench import WINDOW, alternate, bare, execute, publisher, results_of, stopped, value

TOPIC = 'backlog'
QUICK_COUNT = 5000

# The bodies of all: JSON of about so many bytes, which does not compress to
# nothing, and which comes out of jsonb as it went in.
BODIES = """
create function body(id bigint, size integer) returns text language sql immutable as $$
    select '{"id": ' || id || ', "filler": "' || left(
        (select string_agg(md5((id * 1000 + i)::text), '') from generate_series(0, size / 32) i),
        greatest(size - 18 - length(id::text), 0)) || '"}'
$$"""


def queues(count):
    return [f'{TOPIC}_group{number}' for number in range(count)]


class Backlog:
    """A database with pg_fanout, and the same bodies in a file."""

    def __init__(self, env, count, size, nqueues, queue_type):
        self.env, self.count, self.size = env, count, size
        self.queues = queues(nqueues)
        self.server = env.server()
        self.db = self.server.database()
        for number in range(nqueues):
            execute(self.db, 'select fanout.declare_binding(%s, %s, %s)', (TOPIC, f'group{number}', queue_type))
        assert value(self.db, 'select fanout.flush()')
        execute(self.db, BODIES)
        self.file = os.path.join(env.scratch, 'bodies')
        with open(self.file, 'w') as f, self.db.cursor() as cursor:
            cursor.copy_expert(f'copy (select body(i, {size}) from generate_series(1, {count}) i) to stdout '
                               "with (format csv, delimiter e'\\x01', quote e'\\x02')", f)

    def end(self):
        self.db.close()
        self.env.broker.delete(TOPIC, self.queues)

    def rate(self, seconds):
        """Messages per second; checks that they are there, and removes them."""
        for queue in self.queues:
            self.env.broker.wait_for_depth(queue, self.count)
        self.env.broker.purge(self.queues)
        return self.count / seconds

    def bare(self):
        return self.rate(bare('publish', self.env.broker.port, TOPIC, self.file, WINDOW).run())

    def pg_fanout(self):
        pid = publisher(self.db)
        with stopped(pid):
            execute(self.db, "select count(fanout.publish(%s, body(i, %s)::jsonb, key => i::text, type => 'benchmark')) "
                             'from generate_series(1, %s) i', (TOPIC, self.size, self.count))
            execute(self.db, 'checkpoint')
            began = time.monotonic()
        assert value(self.db, "select fanout.flush('10 min')")
        return self.rate(time.monotonic() - began)


def drain(env):
    results = []
    for size, count in ((300, 200000),):
        for queue_type in ('quorum', 'classic'):
            for nqueues in (1, 4):
                backlog = Backlog(env, env.size(count, QUICK_COUNT), size, nqueues, queue_type)
                values = alternate({'bare C': backlog.bare, 'pg_fanout': backlog.pg_fanout}, env.rounds)
                backlog.end()
                results += results_of('drain', f'{size} B, {nqueues} {queue_type}', 'messages/s', values, 'bare C',
                                      {'pg_fanout': 0.95 if env.broker.version.startswith('3.') else 0.85})
    return results


SCENARIOS = {'drain': drain}
