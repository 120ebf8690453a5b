"""consume - messages per second into handlers, and into a consumer in Python

A queue is filled by capturing a table, each time anew; then one consumer at a
time is let go.  All take a thousand deliveries in advance, remember the ids of
messages, and ack after the commit; the bare one just acks.  The worker's start
counts as its time; the queue is long enough for that not to matter.

consume_limit: handlers that do nothing, against the bare one, more often.
consume_failing: of the messages, one in a hundred fails at its first attempt.
consume_rows: each message updates one of the same 50 rows, by one subscription,
and by two at the same time, with a queue each.
"""

import time

from bench import alternate, bare, execute, python, results_of, value, wait_until

TOPIC, GROUP = 'items', 'bench'
QUEUE = f'{TOPIC}_{GROUP}'
OTHER_GROUP = 'other'
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
create function fails_once(m fanout.message) returns void language plpgsql as $$
begin
    if (m.body #>> '{after,id}')::integer % 100 = 0 and m.attempt = 1 then
        raise exception 'the first attempt';
    end if;
    perform one_insert(m);
end $$;
create function never_fails(m fanout.message) returns void language plpgsql as $$
begin
    if (m.body #>> '{after,id}')::integer % 100 = 100 and m.attempt = 1 then
        raise exception 'the first attempt';
    end if;
    perform one_insert(m);
end $$;
create table account (id integer primary key, n integer not null default 0);
insert into account select generate_series(0, 49);
create function one_update(m fanout.message) returns void language plpgsql as $$
begin
    update account set n = n + 1 where id = (m.body #>> '{after,id}')::integer % 50;
end $$;
create function one_insert(m fanout.message[]) returns void language plpgsql as $$
begin
    insert into applied
    select e.sequence, (e.body #>> '{after,id}')::integer, e.body #>> '{after,name}' from unnest(m) e;
end $$
"""


class Consume:
    """The consumers: each returns its messages per second."""

    def __init__(self, env, groups=(GROUP,)):
        self.env = env
        self.groups = groups
        self.count = env.size(500000, 2000)
        self.server = env.server()
        self.source = self.server.database('bench')
        execute(self.source, 'create table item (id integer primary key, name text, filler text)')
        for group in groups:
            execute(self.source, 'select fanout.declare_binding(%s, %s)', (TOPIC, group))
        execute(self.source, "select fanout.capture('item', %s, '{insert}')", (TOPIC,))

    def end(self):
        self.source.close()
        self.env.broker.delete(TOPIC, [f'{TOPIC}_{group}' for group in self.groups])

    def prepare(self):
        """Fills the queue, and makes an empty database that has the handlers."""
        execute(self.source, 'truncate item')
        execute(self.source, "insert into item select i, 'item ' || i, md5(i::text) || md5((-i)::text) "
                             'from generate_series(1, %s) i', (self.count,))
        assert value(self.source, "select fanout.flush('5 min')")
        for group in self.groups:
            self.env.broker.wait_for_depth(f'{TOPIC}_{group}', self.count)
        sink = self.server.database('sink')
        execute(sink, HANDLERS)
        execute(sink, 'checkpoint')
        return sink

    def bare(self):
        self.prepare().close()
        return self.count / bare('consume', self.env.broker.port, QUEUE, self.count, PREFETCH).run()

    def subscription(self, sql, arguments=(), groups=(GROUP,)):
        """From the commit of what subscribes to that of the last message."""
        sink = self.prepare()
        applied = 'select sum(applied) >= %s from fanout.stat_subscriptions'
        total = self.count * len(groups)
        began = time.monotonic()
        for group in groups:
            execute(sink, sql, (TOPIC, group, *arguments))
        wait_until(lambda: value(sink, applied, (total,)), 'not all is applied', 600, 0.02)
        took = time.monotonic() - began
        for group in groups:
            execute(sink, 'select fanout.unsubscribe(%s, %s)', (TOPIC, group))
        sink.close()
        self.env.broker.purge([f'{TOPIC}_{group}' for group in self.groups])
        return total / took

    def handler(self, signature, groups=(GROUP,)):
        return self.subscription("select fanout.subscribe(%s, %s, %s, prefetch => %s, retry_delay => '100 ms')",
                                 (signature, PREFETCH), groups)

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


def consume_limit(env):
    run = Consume(env)
    names = ('bare C, acks only', 'no-op, each message', 'no-op, batches')
    variants = {name: variant for name, variant in run.variants().items() if name in names}
    values = alternate(variants, 3 * env.rounds)
    run.end()
    return results_of('consume_limit', 'quorum queue', 'messages/s', values, names[0],
                      {name: 0.8 for name in names[1:]})


def consume_failing(env):
    run = Consume(env)
    variants = {'none fails': lambda: run.handler('never_fails(fanout.message)'),
                '1 % fails once': lambda: run.handler('fails_once(fanout.message)')}
    values = alternate(variants, env.rounds)
    run.end()
    return results_of('consume_failing', 'one insert', 'messages/s', values, 'none fails', {'1 % fails once': 0.8})


def consume_rows(env):
    run = Consume(env, (GROUP, OTHER_GROUP))
    variants = {'one subscription': lambda: run.handler('one_update(fanout.message)'),
                'two subscriptions': lambda: run.handler('one_update(fanout.message)', (GROUP, OTHER_GROUP))}
    values = alternate(variants, env.rounds)
    run.end()
    return results_of('consume_rows', 'the same 50 rows', 'messages/s', values, 'one subscription',
                      {'two subscriptions': 0.8})


SCENARIOS = {'consume': consume, 'consume_limit': consume_limit, 'consume_failing': consume_failing,
             'consume_rows': consume_rows}
