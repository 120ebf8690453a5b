"""history - rows that exist already

    backfill     so many rows (--rows) to one queue, beside live messages of another
                 topic: rows per second, against COPY of the same rows as JSON; what
                 live messages wait; sizes of table and outbox

The queue keeps the last 1,000 messages only, so that it is not the broker's disk that
is measured.
"""

import time

from bench import execute, results_of, value
from latency import Latency
from stability import SHORT_QUEUE

PERCENTILES = (50, 95, 99)
BESIDE = 50     # ms that the p99 of live messages may be longer

TABLE = """
create table account (id bigint primary key, owner integer, name text, note text, created_at timestamptz)"""
FILL = """
insert into account select i, i %% 1000, md5(i::text), md5((-i)::text) || md5((i * 7)::text), now() - i * interval '1 s'
from generate_series(%s + 1, %s) i"""
OUTBOX = """
select coalesce(sum(pg_total_relation_size(relid)), 0)::bigint from pg_partition_tree('fanout.outbox') where isleaf"""


class Live(Latency):
    """Live messages of a topic of their own, with the percentiles that count here."""

    percentiles = PERCENTILES


def fill(db, count):
    execute(db, TABLE)
    for start in range(0, count, 1_000_000):
        execute(db, FILL, (start, min(count, start + 1_000_000)))
    execute(db, 'vacuum analyze account')
    execute(db, 'checkpoint')


def copied(db, count):
    """Rows per second that COPY writes as JSON, to nowhere."""
    began = time.monotonic()
    execute(db, "copy (select row_to_json(a) from account a) to '/dev/null'")
    return count / (time.monotonic() - began)


def megabytes(db, query):
    return float(value(db, query)) / 1e6


def sent(run, live):
    """Sends all rows, and returns rows per second.  live gets the latencies meanwhile."""
    db = run.db
    number = value(db, "select fanout.backfill('account', 'account', consumer_group => 'new')")
    state = f'select state from fanout.backfills where id = {number}'
    while value(db, state) in ('waiting', 'running'):
        live.append(run.pg_fanout())
    assert value(db, state) == 'done', execute(db, f'select state, error from fanout.backfills where id = {number}')
    if len(live) > 1:
        live.pop()      # it has ended before that
    return float(value(db, 'select rows_done / extract(epoch from finished_at - started_at) '
                           f'from fanout.backfills where id = {number}'))


def backfill(env):
    count = env.rows or env.size(10_000_000, 20_000)
    run = Live(env, 200)
    fill(run.db, count)
    execute(run.db, "select fanout.declare_topic('account'), fanout.capture('account', 'account'), "
                    "fanout.declare_binding('account', 'new', 'quorum', %s)", (SHORT_QUEUE,))
    assert value(run.db, 'select fanout.flush()')
    size = "select pg_total_relation_size('account')"
    sizes = {'table before': [megabytes(run.db, size)]}
    copies = [copied(run.db, count) for _ in range(env.rounds)]
    live = {'alone': [run.pg_fanout() for _ in range(env.rounds)], 'beside it': []}
    rate = sent(run, live['beside it'])
    sizes |= {'table after': [megabytes(run.db, size)], 'outbox after': [megabytes(run.db, OUTBOX)]}
    run.end()
    env.broker.delete('account', ['account_new'])
    what = f'backfill of {count:,}'
    return (results_of('history', f'{what} rows', 'rows/s', {'COPY as JSON': copies, 'pg_fanout': [rate]}, 'COPY as JSON') +
            [r for p in PERCENTILES for r in
             results_of('history', f'latency beside a {what}, p{p}', 'ms',
                        {name: [each[p] for each in v] for name, v in live.items()}, 'alone',
                        {'beside it': BESIDE} if p == 99 else None, higher=False, compare='difference')] +
            results_of('history', f'{what}, size', 'MB', sizes, 'table before', higher=False))


SCENARIOS = {}
LONG = {'backfill': backfill}
