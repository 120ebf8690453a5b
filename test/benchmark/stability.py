"""stability - what must not make it slower: much to do, old snapshots, many topics,
many databases

    topics       a backlog spread over 1, 100 and 2,000 topics
    idle         1 and 50 databases in which nothing happens
    backlog      10 million messages: the first tenth and the last
    snapshot     a snapshot that is held open for ten minutes under load

The queues that nobody consumes keep the last 1,000 messages only, so that it is
not the broker that slows down.
"""

import time

from bench import alternate, cpu_seconds, execute, publisher, results_of, stopped, value
from cost import MADE
from latency import PERCENTILES, Latency

# Of a worker, in a minute: heartbeats, 4 to the broker and 4 from it, and a poll.
WAKE_UPS = 9

SHORT_QUEUE = '{"x-max-length": 1000}'


def drained(db, fill, count):
    """Microseconds per message, of time and of the publisher's CPU, of what fill() writes."""
    pid = publisher(db)
    with stopped(pid):
        fill()
        execute(db, 'checkpoint')
        cpu, began = cpu_seconds(pid), time.monotonic()
    assert value(db, "select fanout.flush('30 min')")
    return (time.monotonic() - began) * 1e6 / count, (cpu_seconds(pid) - cpu) * 1e6 / count


# Topics

class Topics:
    """A database with so many topics, each with a queue."""

    def __init__(self, env, ntopics):
        self.env, self.ntopics = env, ntopics
        self.db = env.server().database(f'topics{ntopics}')
        execute(self.db, "select count(fanout.declare_binding(%s || i, 'g', 'classic', %s)) from generate_series(1, %s) i",
                (self.prefix(), SHORT_QUEUE, ntopics))
        assert value(self.db, "select fanout.flush('5 min')")

    def prefix(self):
        return f'of{self.ntopics}_'

    def fill(self, count):
        execute(self.db, """select count(fanout.publish(%s || 1 + i %% %s, jsonb_build_object('id', i, 'filler',
                            repeat('x', 270)), key => i::text)) from generate_series(1, %s) i""",
                (self.prefix(), self.ntopics, count))

    def drained(self, count):
        return drained(self.db, lambda: self.fill(count), count)

    def end(self):
        self.db.close()
        with self.env.broker.channel() as channel:
            for i in range(1, self.ntopics + 1):
                channel.queue_delete(f'{self.prefix()}{i}_g')
                channel.exchange_delete(f'{self.prefix()}{i}')


def topics(env):
    count = env.size(100000, 5000)
    cases = {n: Topics(env, n) for n in (1, 100, env.size(2000, 200))}
    seen = alternate({f"{n:,} topic{'s' if n > 1 else ''}": lambda c=case: c.drained(count) for n, case in cases.items()},
                     env.rounds)
    for case in cases.values():
        case.end()
    return (results_of('stability', 'backlog over topics, time', 'us/message',
                       {name: [t for t, _ in v] for name, v in seen.items()}, '1 topic', higher=False) +
            results_of('stability', "backlog over topics, publisher's CPU", 'us/message',
                       {name: [c for _, c in v] for name, v in seen.items()}, '1 topic', higher=False))


# Idle databases

def switches(pid):
    """How often a process has gone to sleep: each time something had woken it."""
    with open(f'/proc/{pid}/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('voluntary_ctxt_switches:'))


def workers(server):
    """Process ids of launcher and publishers."""
    db = server.connect()
    found = execute(db, "select pid from pg_stat_activity where backend_type like 'pg_fanout%'")
    db.close()
    return [pid for pid, in found]


def idle_server(env, ndatabases):
    server = env.server(f'idle{ndatabases}')
    for number in range(ndatabases):
        db = server.database(f'idle{number}')
        execute(db, "select fanout.declare_binding('idle', 'g', 'classic', %s), fanout.publish('idle', '1')", (SHORT_QUEUE,))
        assert value(db, "select fanout.flush('1 min')")
        db.close()
    return server


def idle(env):
    seconds = env.size(180, 30)
    servers = {n: idle_server(env, n) for n in (1, 50)}
    time.sleep(env.size(60, 5))         # what was begun comes to rest
    pids = {n: workers(server) for n, server in servers.items()}
    used = {n: [(cpu_seconds(pid), switches(pid)) for pid in pids[n]] for n in pids}
    time.sleep(seconds)
    results = []
    for n, before in used.items():
        what = f"{n} idle database{'s' if n > 1 else ''}"
        cpu = sum(cpu_seconds(pid) - b[0] for pid, b in zip(pids[n], before)) * 60 / seconds
        woken = sum(switches(pid) - b[1] for pid, b in zip(pids[n], before)) * 60 / seconds
        results += results_of('stability', what, 'ms of CPU/minute', {'pg_fanout': [cpu * 1000]}, None)
        results += results_of('stability', what + ', each worker', 'wake-ups/minute',
                              {'pg_fanout': [woken / len(pids[n])]}, None, {'pg_fanout': WAKE_UPS}, higher=False,
                              compare='value')
    for n in servers:
        env.stop_server(f'idle{n}')
    env.broker.delete('idle', ['idle_g'])
    return results


# A backlog of 10 million

def write_backlog(db, count):
    """In transactions of 10,000."""
    execute(db, f"""do $$ begin
        for start in 1..{count} by 10000 loop
            perform fanout.publish('backlog', jsonb_build_object('id', i), key => i::text)
            from generate_series(start, least(start + 9999, {count})) i;
            commit;
        end loop; end $$""")


def progress(db, pid, count):
    """(messages confirmed, seconds, CPU seconds) until all are."""
    confirmed = 'select confirmed from fanout.stat_publisher'
    first = value(db, confirmed)
    seen = [(0, time.monotonic(), cpu_seconds(pid))]
    while seen[-1][0] < count:
        time.sleep(0.05)
        seen.append((value(db, confirmed) - first, time.monotonic(), cpu_seconds(pid)))
    return seen


def cost_between(seen, start, end):
    """Microseconds per message, of time and of CPU, from one count to another."""
    a = next(s for s in seen if s[0] >= start)
    b = next(s for s in seen if s[0] >= end)
    return [(b[i] - a[i]) * 1e6 / (b[0] - a[0]) for i in (1, 2)]


def backlog(env):
    count = env.size(10_000_000, 100_000)
    db = env.server().database()
    execute(db, "select fanout.declare_binding('backlog', 'g', 'classic', %s)", (SHORT_QUEUE,))
    assert value(db, 'select fanout.flush()')
    pid = publisher(db)
    with stopped(pid):
        write_backlog(db, count)
        execute(db, 'checkpoint')
    # what waits for it at the start, a connection that was lost for one, is over at the first message
    seen = progress(db, pid, count)
    db.close()
    env.broker.delete('backlog', ['backlog_g'])
    tenths = {'first tenth': cost_between(seen, 1, count // 10), 'last tenth': cost_between(seen, count * 9 // 10, count)}
    return [r for i, unit in enumerate(('us/message', 'us of CPU/message')) for r in
            results_of('stability', f'backlog of {count:,}', unit, {name: [cost[i]] for name, cost in tenths.items()},
                       'first tenth', {'last tenth': 1.05}, higher=False)]


# A snapshot that stays open

LOAD = "select fanout.publish('load', jsonb_build_object('filler', repeat('x', 280)), key => random()::text);\n"


class Snapshot:
    """A database under load, in which somebody holds a snapshot."""

    def __init__(self, env):
        self.env, self.run = env, Latency(env, 200)
        self.db = self.run.db
        execute(self.db, "select fanout.declare_binding('load', 'g', 'classic', %s)", (SHORT_QUEUE,))
        assert value(self.db, 'select fanout.flush()')

    def fill(self, count):
        execute(self.db, "select count(fanout.publish('load', body(i, 300)::jsonb, key => i::text)) "
                         'from generate_series(1, %s) i', (count,))

    def measured(self):
        """(messages per second of a backlog, latencies), once per round"""
        count = self.env.size(200000, 5000)
        return [(1e6 / drained(self.db, lambda: self.fill(count), count)[0], self.run.pg_fanout())
                for _ in range(self.env.rounds)]

    def loaded(self):
        """Sustained load; returns the row versions that died, per message."""
        seconds = self.env.size(600, 10)
        before = value(self.db, MADE)
        count = self.run.server.pgbench('bench', LOAD, '-c', 4, '-R', 1000, '-T', seconds) * seconds
        assert value(self.db, "select fanout.flush('5 min')")
        time.sleep(2)       # until the publisher has reported its statistics
        return float(value(self.db, MADE) - before) / count

    def held(self):
        db = self.run.server.connect('bench', autocommit=False)
        execute(db, 'set transaction isolation level repeatable read')
        execute(db, 'select count(*) from pg_class')
        return db


def latencies(what, seen):
    return [r for p in PERCENTILES for r in
            results_of('stability', f'{what}, latency, p{p:g}', 'ms', {name: [each[p] for each in v] for name, v in seen.items()},
                       'before', higher=False, compare='difference')]


def snapshot(env):
    case = Snapshot(env)
    seen = {'before': case.measured()}
    held = case.held()
    dead = case.loaded()
    seen['with it'] = case.measured()
    held.close()
    case.run.end()
    env.broker.delete('load', ['load_g'])
    what = 'old snapshot'
    return (results_of('stability', what + ', drain', 'messages/s', {name: [rate for rate, _ in v] for name, v in seen.items()},
                       'before', {'with it': 0.97}) +
            latencies(what, {name: [waits for _, waits in v] for name, v in seen.items()}) +
            results_of('stability', what + ', dead tuples per message', 'tuples', {'with it': [dead]}, None,
                       {'with it': 0.001}, higher=False, compare='value'))


SCENARIOS = {'topics': topics, 'idle': idle}
LONG = {'backlog': backlog, 'snapshot': snapshot}
