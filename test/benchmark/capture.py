"""capture - what capture costs the transactions that are captured

A table of ten columns stands in one database for each variant, so that nothing
of one is in the way of another:

    no trigger
    pg_fanout   fanout.capture(), everything at its default
    logutriga   PgQ's trigger that writes the row URL-encoded
    jsontriga   PgQ's trigger that writes the row as JSON
    plpgsql     as applications have it: to_jsonb(new) into an outbox that has an
                index on the unsent rows
    floor       a trigger in C that writes a row as large as pg_fanout's, and does
                nothing else (floor.c): the limit

Only writing is measured: nobody reads what was written.  PgQ has no ticker, the
outbox no relay; pg_fanout's publisher runs, but has no broker.  Autovacuum is off, since it would come
into some of the measurements and not into others; before each, the table is
vacuumed, what was captured is thrown away, and a checkpoint is made.

Beside times stand CPU times of the server's processes, which say the same on a
machine that does something else, too.
"""

import time

from bench import HERE, alternate, cpu_seconds, execute, publisher, results_of, value

TABLE_ROWS = 100000
BULK_ROWS = 20000
PAYLOAD = 632  # what makes the floor's rows as large as pg_fanout's

COLUMNS = """
    id         integer primary key,
    name       text not null,
    email      text not null,
    city       text,
    balance    numeric(12,2) not null,
    visits     integer not null,
    active     boolean not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    note       text
"""

# Values of rows by an integer i.
VALUES = """
    'Customer ' || i, 'customer' || i || '@example.org', 'City ' || i % 100, i % 10000 / 100.0,
    0, i % 7 <> 0, timestamptz '2024-01-01' + i * interval '1 s', now(), repeat('note ', i % 20)
"""

PLPGSQL = """
create table outbox (
    id         bigint generated always as identity primary key,
    topic      text not null,
    key        text not null,
    op         text not null,
    payload    jsonb not null,
    created_at timestamptz not null default now(),
    sent_at    timestamptz);
create index on outbox (id) where sent_at is null;
create function to_outbox() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' then
        insert into outbox (topic, key, op, payload) values ('account', old.id, tg_op, to_jsonb(old));
    else
        insert into outbox (topic, key, op, payload) values ('account', new.id, tg_op, to_jsonb(new));
    end if;
    return null;
end $$;
"""

# How each variant is set up, and how what it captured is thrown away.
PGQ_RESET = 'truncate pgq.event_1, pgq.event_1_0, pgq.event_1_1, pgq.event_1_2'


def pgq(trigger):
    return (f"""create extension pgq;
        select pgq.create_queue('account');
        create trigger capture after insert or update or delete on account
            for each row execute function pgq.{trigger}('account')""", PGQ_RESET)


VARIANTS = {
    'no trigger': ('select 1', 'select 1'),
    'pg_fanout': ("""create extension pg_fanout;
        select fanout.declare_topic('account');
        select fanout.capture('account', 'account')""", 'truncate fanout.outbox'),
    'logutriga': pgq('logutriga'),
    'jsontriga': pgq('jsontriga'),
    'plpgsql': (PLPGSQL + """create trigger capture after insert or update or delete on account
            for each row execute function to_outbox()""", 'truncate outbox'),
    'floor': (f"""create table message (id bigint not null, payload text not null);
        create function floor_row() returns trigger language c as '{HERE}/floor';
        create function floor_statement() returns trigger language c as '{HERE}/floor';
        create trigger capture_row after insert or update or delete on account
            for each row execute function floor_row({PAYLOAD});
        create trigger capture_statement after insert or update or delete on account
            for each statement execute function floor_statement()""", 'truncate message'),
}


def table(db):
    execute(db, f'create table account ({COLUMNS}) with (fillfactor = 50)')
    execute(db, f'insert into account select i, {VALUES} from generate_series(1, {TABLE_ROWS}) i')


class Variant:
    """The table, captured in one way."""

    def __init__(self, server, name):
        setup, self.reset = VARIANTS[name]
        self.server = server
        self.database = name.replace(' ', '_')
        self.db = server.database(self.database, extension=False)
        table(self.db)
        execute(self.db, setup)

    def quiet(self):
        """The same beginning for each measurement."""
        for statement in (self.reset, 'vacuum account', 'checkpoint'):
            execute(self.db, statement)


# Single-row updates

UPDATE = f"""
\\set id random(1, {TABLE_ROWS})
update account set visits = visits + 1, updated_at = now() where id = :id;
"""


def pgbench(server, database, clients, seconds):
    """Transactions per second, and the server's CPU microseconds for each."""
    cpu = server.cpu_seconds()
    tps = server.pgbench(database, UPDATE, '-M', 'prepared', '-c', clients, '-j', min(clients, 2), '-T', seconds)
    return tps, (server.cpu_seconds() - cpu) * 1e6 / (tps * seconds)


# Short and often: what others do on the machine, and on its disk, lasts longer.
def single_rows(env, variants, clients):
    def measure(variant):
        variant.quiet()
        return pgbench(variant.server, variant.database, clients, 1)

    seen = alternate({name: lambda v=v: measure(v) for name, v in variants.items()}, 4 * env.rounds)
    what = f'single-row updates, {clients} client' + ('s' if clients > 1 else '')
    return (results_of('capture', what, 'tps', {name: [tps for tps, _ in v] for name, v in seen.items()},
                       'no trigger', {'pg_fanout': 0.93}) +
            results_of('capture', what, 'us of CPU', {name: [cpu for _, cpu in v] for name, v in seen.items()},
                       'no trigger', higher=False))


# Statements of many rows

BULK = {
    'insert': f'insert into account select i, {VALUES} '
              f'from generate_series({TABLE_ROWS + 1}, {TABLE_ROWS + BULK_ROWS}) i',
    'update': f'update account set visits = visits + 1, updated_at = now() where id <= {BULK_ROWS}',
}


def timed(db, statement):
    """Microseconds of a statement, and of its backend's CPU."""
    pid = db.get_backend_pid()
    cpu, began = cpu_seconds(pid), time.monotonic()
    execute(db, statement)
    return (time.monotonic() - began) * 1e6, (cpu_seconds(pid) - cpu) * 1e6


def bulk_times(variant):
    """{(operation, clock): microseconds per row}"""
    variant.quiet()
    times = {}
    for operation, statement in BULK.items():
        both = timed(variant.db, statement)
        times[operation, 'us/row'], times[operation, 'us of CPU/row'] = (t / BULK_ROWS for t in both)
    execute(variant.db, f'delete from account where id > {TABLE_ROWS}')
    return times


def added(seen, key):
    """What each variant adds to no trigger, of the same round."""
    base = [times[key] for times in seen['no trigger']]
    return {name: [times[key] - b for times, b in zip(values, base)]
            for name, values in seen.items() if name != 'no trigger'}


def bulk(env, variants):
    measures = {name: lambda v=v: bulk_times(v) for name, v in variants.items()}
    alternate(measures, 1)              # caches, plans, the first pages of each table
    seen = alternate(measures, 2 * env.rounds)
    results = []
    for operation, unit in seen['no trigger'][0]:
        what = f'{operation} of {BULK_ROWS:,} rows'
        costs = added(seen, (operation, unit))
        results += results_of('capture', what, unit,
                              {'no trigger': [times[operation, unit] for times in seen['no trigger']]}, None)
        results += results_of('capture', what + ', capture alone', unit, costs, 'jsontriga', {'pg_fanout': 0.4}, higher=False)
        results += results_of('capture', what + ', against plpgsql', unit,
                              {name: costs[name] for name in ('plpgsql', 'pg_fanout', 'floor')}, 'plpgsql',
                              {'pg_fanout': 0.25}, higher=False)
    return results


def capture(env):
    server = env.server('capture', autovacuum='off', **{'pg_fanout.uri': 'amqp://guest:guest@127.0.0.1:1/%2F'})
    variants = {name: Variant(server, name) for name in VARIANTS}
    results = bulk(env, variants)
    for clients in (1, 4, 16):
        results += single_rows(env, variants, clients)
    for variant in variants.values():
        variant.db.close()
    return results


# While what is captured is published

def capturing(env):
    """Transactions per second while the publisher publishes what they write."""
    server = env.server()
    plain = server.database('plain', extension=False)
    table(plain)
    db = server.database()
    table(db)
    execute(db, "select fanout.declare_binding('account', 'service'), fanout.capture('account', 'account')")
    assert value(db, 'select fanout.flush()')

    def measure(connection, database):
        execute(connection, 'vacuum account')
        execute(connection, 'checkpoint')
        return pgbench(server, database, 4, env.size(10, 2))[0]

    def published():
        env.broker.purge(['account_service'])
        sent = "select coalesce(sum(count), 0) from fanout.sent"
        before, tps = value(db, sent), measure(db, 'bench')
        ahead = value(db, sent) - before
        assert value(db, "select fanout.flush('5 min')")
        return tps, 100 * ahead / (value(db, sent) - before)

    seen = alternate({'no trigger': lambda: (measure(plain, 'plain'), None), 'pg_fanout': published}, env.rounds)
    plain.close()
    db.close()
    env.broker.delete('account', ['account_service'])
    what = 'the same while they are published, 4 clients'
    return (results_of('capture', what, 'tps', {name: [tps for tps, _ in v] for name, v in seen.items()}, 'no trigger') +
            results_of('capture', what + ', sent by the end', '%',
                       {'pg_fanout': [share for _, share in seen['pg_fanout']]}, None))


SCENARIOS = {'capture': capture, 'capture-live': capturing}
