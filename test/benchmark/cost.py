"""cost - what a message costs, apart from time: CPU, memory, WAL, dead tuples

CPU and memory are those of a publisher with a backlog, as "drain" makes it.  WAL
is that of the ten-column table of "capture", of whose rows each makes a message;
without capture it is written once more, and the difference is capture's.  A
message's own size is that of its row in the outbox, as it stands on the page.
"""

import resource
import threading
import time
from contextlib import contextmanager

from bench import alternate, cpu_seconds, execute, publisher, results_of, stopped, value
from capture import COLUMNS, VALUES
from drain import Drain

QUEUE = 'account_service'


# CPU and memory

class Peak:
    """The largest amount of memory of its own (KiB) that a process has meanwhile."""

    def __init__(self, pid):
        self.pid, self.kib, self.ended = pid, private_memory(pid), threading.Event()

    def watch(self):
        while not self.ended.wait(0.02):
            self.kib = max(self.kib, private_memory(self.pid))

    def __enter__(self):
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()


def private_memory(pid):
    with open(f'/proc/{pid}/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('RssAnon:'))


def children_cpu():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def drained_by_bare(run):
    cpu = children_cpu()
    run.bare()
    return children_cpu() - cpu


def drained_by_publisher(run):
    """CPU seconds, and KiB of memory: idle, and at most."""
    pid = publisher(run.db)
    idle, cpu = private_memory(pid), cpu_seconds(pid)
    with Peak(pid) as peak:
        run.pg_fanout()
    return cpu_seconds(pid) - cpu, idle, peak.kib


def cpu_and_memory(env):
    run = Drain(env, 300, 200000, 'classic', 1)
    seen = alternate({'bare C': lambda: (drained_by_bare(run), 0, 0),
                      'pg_fanout': lambda: drained_by_publisher(run)}, env.rounds)
    run.end()
    results = results_of('cost', 'CPU of a million messages', 's',
                         {name: [v[0] * 1e6 / run.count for v in values] for name, values in seen.items()},
                         'bare C', higher=False)
    for i, state in ((1, 'idle'), (2, 'most while draining')):
        results += results_of('cost', 'memory, ' + state, 'MiB', {'pg_fanout': [v[i] / 1024 for v in seen['pg_fanout']]},
                              None)
    return results


# WAL

class Table:
    """A database with the table, captured or not."""

    def __init__(self, server, name, captured):
        self.db = server.database(name)
        self.next = 1
        execute(self.db, f'create table account ({COLUMNS})')
        if captured:
            execute(self.db, "select fanout.declare_binding('account', 'service'), fanout.capture('account', 'account')")
            self.flush()

    def flush(self):
        assert value(self.db, "select fanout.flush('5 min')")

    def write(self, count, rows, pause=0):
        """So many rows, so many in each transaction."""
        execute(self.db, f"""do $$ begin
            for start in {self.next}..{self.next + count - 1} by {rows} loop
                insert into account select i, {VALUES} from generate_series(start, start + {rows} - 1) i;
                commit;
                perform pg_sleep({pause}) where {pause} > 0;
            end loop; end $$""")
        self.next += count


def wal(db, action):
    """Bytes of WAL that are written meanwhile."""
    execute(db, 'checkpoint')
    before = value(db, 'select pg_current_wal_insert_lsn()')
    action()
    return int(value(db, 'select pg_current_wal_insert_lsn() - %s', (before,)))


def message_size(db):
    return float(value(db, 'select avg(pg_column_size(o)) from fanout.outbox o'))


def wal_of_backlog(env, plain, captured, rows):
    """Bytes of WAL per message, as multiples of the message's own size."""
    count = env.size(20000, 2000)
    without = wal(plain.db, lambda: plain.write(count, rows))
    with stopped(publisher(captured.db)):
        written = wal(captured.db, lambda: captured.write(count, rows)) - without
        size = message_size(captured.db) * count
    sent = wal(captured.db, lambda: captured.flush())
    return {'capture': written / size, 'publishing': sent / size, 'both': (written + sent) / size}


def wal_of_trickle(env, plain, captured):
    """The same where each message is published at once."""
    count = env.size(2000, 400)

    def published():
        captured.write(count, 1, 1 / 200)
        captured.flush()

    without = wal(plain.db, lambda: plain.write(count, 1, 1 / 200))
    return {'both': (wal(captured.db, published) - without) / (message_size(captured.db) * count)}


def wal_cost(env, plain, captured):
    results = []
    for what, measure in (('a backlog of transactions of 1,000', lambda: wal_of_backlog(env, plain, captured, 1000)),
                          ('a backlog of single messages', lambda: wal_of_backlog(env, plain, captured, 1)),
                          ('single messages, 200/s', lambda: wal_of_trickle(env, plain, captured))):
        seen = [measure() for _ in range(env.rounds)]
        for part in seen[0]:
            results += results_of('cost', 'WAL to size, ' + what, 'bytes/byte', {part: [s[part] for s in seen]}, None,
                                  {'both': 1.5}, higher=False, compare='value')
    return results


# Dead tuples

# All that died, cleaned up already or not.
MADE = "select coalesce(sum(n_tup_upd + n_tup_del), 0) from pg_stat_all_tables where schemaname = 'fanout'"


def dead_tuples(env, captured, rate):
    """Row versions of pg_fanout's tables that died, per message."""
    count = int(rate * env.size(20, 5))
    before = value(captured.db, MADE)
    captured.write(count, 1, 1 / rate)
    captured.flush()
    time.sleep(2)       # until the publisher has reported its statistics
    return float(value(captured.db, MADE) - before) / count


@contextmanager
def short_retention(db):
    """Short enough that what is thrown away in the end is seen to be.  (What a
    rotation itself costs, which is rare otherwise, comes into it for that.)"""
    for command in ("alter system set pg_fanout.retention = '2s'", 'select pg_reload_conf()'):
        execute(db, command)
    try:
        yield
    finally:
        for command in ('alter system reset pg_fanout.retention', 'select pg_reload_conf()'):
            execute(db, command)


def dead_tuple_cost(env, captured):
    results = []
    with short_retention(captured.db):
        for rate in (200, 2000):
            made = [dead_tuples(env, captured, rate) for _ in range(env.rounds)]
            results += results_of('cost', f'dead tuples per message, {rate:,}/s', 'tuples', {'pg_fanout': made}, None,
                                  higher=False)
    return results


def cost(env):
    results = cpu_and_memory(env)
    server = env.server()
    plain, captured = Table(server, 'plain', False), Table(server, 'captured', True)
    results += wal_cost(env, plain, captured)
    results += dead_tuple_cost(env, captured)
    plain.db.close()
    captured.db.close()
    env.broker.delete('account', [QUEUE])
    return results


SCENARIOS = {'cost': cost}
