"""independent - topics that are hard on others, or on themselves

    hot      one row that is changed all the time, against as many different rows
    tpcb     pgbench's own tables, all four captured: is the publisher's lag bounded?
    resume   a backlog of a topic that was paused, against the same backlog unpaused

The queues keep the last 1,000 messages only, but for "resume".
"""

import time

from bench import alternate, execute, output, publisher, results_of, stopped, value
from drain import Drain
from stability import SHORT_QUEUE

CLIENTS = (1, 4, 16)


# A row that changes all the time

class Rows:
    """Updates of a table with a counter in each row."""

    def __init__(self, env):
        self.count = env.size(100000, 4000)
        self.db = env.server().database('hot')
        execute(self.db, 'create table counter (id int primary key, n int default 0) with (fillfactor = 50)')
        execute(self.db, 'insert into counter select i from generate_series(1, %s) i', (self.count,))
        execute(self.db, "select fanout.declare_binding('hot_row', 'g', arguments => %s)", (SHORT_QUEUE,))
        execute(self.db, "select fanout.capture('counter', 'hot_row')")
        assert value(self.db, "select fanout.flush('5 min')")

    def drained(self, target, transactions):
        """Messages per second of what was written while the publisher stood still."""
        loop = f'for i in 1 .. {self.count} loop update counter set n = n + 1 where id = {target};'
        with stopped(publisher(self.db)):
            execute(self.db, f"do $$ begin {loop} {'commit;' if transactions else ''} end loop; end $$")
            execute(self.db, 'checkpoint')
            began = time.monotonic()
        assert value(self.db, "select fanout.flush('30 min')")
        seconds = time.monotonic() - began
        execute(self.db, 'vacuum full counter')
        return self.count / seconds

    def end(self):
        self.db.close()


def hot(env):
    rows = Rows(env)
    results = []
    for transactions, what in (True, 'a transaction each'), (False, 'one transaction'):
        seen = alternate({
            'as many rows': lambda t=transactions: rows.drained('i', t),
            'one row': lambda t=transactions: rows.drained('1', t),
        }, env.rounds)
        results += results_of('hot row', f'{rows.count:,} updates, {what}', 'messages/s', seen, 'as many rows',
                              {'one row': 0.8})
    rows.end()
    return results


# TPC-B

class TpcB:
    """pgbench's tables, each with a topic and a quorum queue."""

    TABLES = 'pgbench_accounts', 'pgbench_branches', 'pgbench_tellers', 'pgbench_history'

    def __init__(self, env, scale):
        self.env, self.server = env, env.server()
        self.name = f'tpcb{scale}'
        self.seconds = env.size(60, 5)
        self.db = self.server.database(self.name)
        self.pgbench('-i', '-s', scale, '-q')
        for table in self.TABLES:
            execute(self.db, 'select fanout.declare_binding(%s, %s, arguments => %s)', (self.topic(table), 'g', SHORT_QUEUE))
        self.capture()
        assert value(self.db, "select fanout.flush('5 min')")

    def topic(self, table):
        return f'{self.name}_{table}'

    def capture(self):
        for table in self.TABLES:
            execute(self.db, 'select fanout.capture(%s, %s)', (table, self.topic(table)))

    def uncapture(self):
        for table in self.TABLES:
            execute(self.db, 'select fanout.uncapture(%s)', (table,))

    def pgbench(self, *arguments):
        return output(self.env.bindir + '/pgbench', *map(str, arguments), '-h', self.env.scratch,
                      '-p', str(self.server.port), '-U', 'postgres', self.name, cwd=self.env.scratch)

    def tps(self, clients):
        text = self.pgbench('-n', '-c', clients, '-j', min(clients, 2), '-T', self.seconds)
        return float(text.split('tps = ')[1].split()[0])

    def captured(self, clients):
        """Transactions per second, and how long after their end the last message is acknowledged."""
        tps = self.tps(clients)
        began = time.monotonic()
        assert value(self.db, "select fanout.flush('30 min')")
        return tps, time.monotonic() - began

    def bare(self, clients):
        self.uncapture()
        try:
            return self.tps(clients), 0
        finally:
            self.capture()

    def end(self):
        self.db.close()


def tpcb(env):
    results = []
    for scale in env.size((1, 10), (1,)):
        run = TpcB(env, scale)
        for clients in CLIENTS:
            seen = alternate({'not captured': lambda c=clients: run.bare(c), 'captured': lambda c=clients: run.captured(c)},
                             env.rounds)
            what = f"scale {scale}, {clients} client{'s' if clients > 1 else ''}"
            results += results_of('TPC-B', what, 'tps', {name: [tps for tps, _ in v] for name, v in seen.items()},
                                  'not captured')
            results += results_of('TPC-B', what + ', lag at the end', 's', {'captured': [lag for _, lag in seen['captured']]},
                                  None, {'captured': 1.0}, higher=False, compare='value')
        run.end()
    return results


# Pause and resume

class Resume(Drain):
    """The same backlog of a topic that was paused while it was written, and of one that was not."""

    def unpaused(self):
        return self.pg_fanout()

    def paused(self):
        execute(self.db, 'select fanout.pause(%s)', (self.topic,))
        self.fill()
        execute(self.db, 'checkpoint')
        began = time.monotonic()
        execute(self.db, 'select fanout.resume(%s)', (self.topic,))
        assert value(self.db, "select fanout.flush('10 min')")
        return self.rate(self.count, time.monotonic() - began)


def resume(env):
    run = Resume(env, 300, 200000, 'quorum', 1)
    seen = alternate({'not paused': run.unpaused, 'paused, then resumed': run.paused}, env.rounds)
    run.end()
    return results_of('resume', '300 B, 1 quorum queue', 'messages/s', seen, 'not paused', {'paused, then resumed': 0.95})


SCENARIOS = {'hot': hot, 'resume': resume}
LONG = {'tpcb': tpcb}
