"""beside - what one topic's messages wait while another topic is hard on the publisher

    transaction   a transaction of very many captured rows: from before its commit until
                  the last is confirmed
    hot row       a captured row that is changed as fast as one session can
    mute queue    a queue that does not confirm, into which messages are published

What is measured is latency's captured inserts; those count that were committed within
that time.  All but the measured queue keep the last 1,000 messages only.
"""

import time
from concurrent.futures import ThreadPoolExecutor

from bench import alternate, execute, results_of, value
from latency import CLIENTS, Latency
from stability import SHORT_QUEUE

RATE = 200
NAMES = {50: 'p50', 99: 'p99', 100: 'max'}
SLOWEST = 10000     # messages per second that a large transaction is sent at, at least

PREPARE = """
create table large (id bigint primary key, name text, filler text);
create table counter (id int primary key, n bigint) with (fillfactor = 50);
insert into counter values (1, 0);
select fanout.declare_binding(topic, 'g', type, %s) from (values ('large', 'quorum'), ('counter', 'quorum'),
    ('mute', 'classic')) t (topic, type);
select fanout.capture('large', 'large', '{insert}'), fanout.capture('counter', 'counter', '{update}')"""
LARGE = "insert into large select i, 'item ' || i, repeat(md5(i::text), 6) from generate_series(1, %s) i"
LOOP = """
do $$ declare ends timestamptz := clock_timestamp() + interval '%s s'; begin
    while clock_timestamp() < ends loop %s; commit; end loop; end $$"""


class Beside(Latency):
    """Each variant returns {percentile: milliseconds}."""

    percentiles = tuple(NAMES)

    def __init__(self, env):
        super().__init__(env, RATE)
        self.rows, self.seconds = env.size(600000, 20000), env.size(20, 4)
        execute(self.db, PREPARE, (SHORT_QUEUE,))
        self.other = self.server.connect('bench')
        assert value(self.db, 'select fanout.flush()')

    def during(self, seconds, what):
        """Latencies while what() runs, for at most so many seconds."""
        self.what = what
        self.transactions = int(self.rate * (seconds + 2)) // CLIENTS
        self.count = self.transactions * CLIENTS
        return self.pg_fanout()

    def write(self, *arguments):
        """What was committed while it ran: {key: when}."""
        with ThreadPoolExecutor(1) as pool:
            interval = pool.submit(self.timed)
            sent = super().write(*arguments)
            began, ended = interval.result()
        return {key: at for key, at in sent.items() if began <= at <= ended}

    def timed(self):
        time.sleep(1)
        began = time.time() * 1e6
        self.what()
        return began, time.time() * 1e6

    def send_large(self):
        execute(self.other, LARGE, (self.rows,))
        assert value(self.other, "select fanout.flush('10 min')")

    def transaction(self):
        execute(self.db, 'truncate large')
        return self.during(self.rows / SLOWEST + 10, self.send_large)

    def hot_row(self):
        return self.during(self.seconds, lambda: self.loop('update counter set n = n + 1'))

    def mute_queue(self):
        self.mute('suspend')
        try:
            return self.during(self.seconds, lambda: self.loop("perform fanout.publish('mute', '1'), pg_sleep(0.01)"))
        finally:
            self.mute('resume')
            assert value(self.db, "select fanout.flush('5 min')")

    def alone(self):
        return self.during(self.seconds, lambda: time.sleep(self.seconds))

    def loop(self, statement):
        execute(self.other, LOOP % (self.seconds, statement))

    def mute(self, function):
        self.env.broker.ctl('eval', '{ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"mute_g">>)), '
                                    f'sys:{function}(amqqueue:get_pid(Q)).')

    def end(self):
        super().end()
        self.other.close()
        for topic in 'large', 'counter', 'mute':
            self.env.broker.delete(topic, [topic + '_g'])


def beside(env):
    run = Beside(env)
    seen = alternate({'alone': run.alone, 'transaction': run.transaction, 'hot row': run.hot_row,
                      'mute queue': run.mute_queue}, env.rounds)
    run.end()
    settings = {  # what is called how, and how many milliseconds its p99 may be longer
        'transaction': (f'a transaction of {run.rows:,} rows', 50),
        'hot row': ('a row that changes all the time', 20),
        'mute queue': ('a queue that does not confirm', 20),
    }
    return [r for name, (what, target) in settings.items() for p, called in NAMES.items() for r in
            results_of('beside', f'{what}, {called}', 'ms',
                       {'alone': [each[p] for each in seen['alone']], 'beside it': [each[p] for each in seen[name]]},
                       'alone', {'beside it': target} if p == 99 else None, higher=False, compare='difference')]


SCENARIOS = {}
LONG = {'beside': beside}
