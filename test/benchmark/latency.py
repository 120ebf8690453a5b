"""latency - from commit to delivery

Clients of pgbench commit single-row inserts, so many per second, and note when
each commit came back; a consumer in C that waits notes when each message comes.
The base is a bare publisher at the same rate, beside the same clients writing
into a table that nobody captures: what the broker takes is the same for all.
Relays that poll do so every 100 ms.
"""

import glob
import os
import time

from bench import WINDOW, Backlog, alternate, bare, execute, node, percentile, python, results_of

CLIENTS = 8
SECONDS = 20
PERCENTILES = (50, 99, 99.9)

# A key tells client and number; pgbench's log has both beside the time.
WRITE = "\\set n :n + 1\ninsert into {table} {columns} select (:client_id * 1000000 + :n)::text, {body}\n"


class Latency(Backlog):
    """The variants: each returns {percentile: milliseconds}."""

    topic = 'latency'
    percentiles = PERCENTILES

    def __init__(self, env, rate):
        self.rate = rate
        self.transactions = rate * env.size(SECONDS, 4) // CLIENTS
        super().__init__(env, 300, self.transactions * CLIENTS)
        execute(self.db, 'create table plain (key text primary key, payload json)')
        execute(self.db, 'create table captured (key text primary key, payload json)')
        execute(self.db, "select fanout.capture('captured', %s, '{insert}')", (self.topic,))

    def consumer(self):
        consumer = bare('consume', self.env.broker.port, self.queues[0], self.count, 1000)
        consumer.go()
        time.sleep(0.5)
        return consumer

    def write(self, database, table, columns, body="body(:n, 300)::json"):
        """Returns {key: when its commit came back, in microseconds}."""
        log = os.path.join(self.env.scratch, 'latency')
        script = WRITE.format(table=table, columns=columns, body=body)
        self.server.pgbench(database, script, '-c', CLIENTS, '-t', self.transactions, '-R', self.rate,
                            '-D', 'n=0', '-l', f'--log-prefix={log}')
        return committed(log)

    def received(self, consumer):
        """Returns {key: when it came}."""
        consumer.expect('done')
        consumer.end()
        return times(consumer.stdout)

    def bare(self):
        execute(self.db, 'truncate plain')
        execute(self.db, 'checkpoint')
        consumer = self.consumer()
        publisher = bare('publish', self.env.broker.port, self.topic, self.bodies_file(), WINDOW, self.rate)
        publisher.go()
        self.write('bench', 'plain', '(key, payload)')
        publisher.expect('done')
        publisher.end()
        return self.summary(times(publisher.stdout), self.received(consumer))

    def pg_fanout(self):
        execute(self.db, 'truncate captured')
        execute(self.db, 'checkpoint')
        consumer = self.consumer()
        sent = self.write('bench', 'captured', '(key, payload)')
        return self.summary(sent, self.received(consumer))

    def relay(self, start, script, fill, columns, body="'benchmark', body(:n, 300)::json"):
        fill(0)
        consumer = self.consumer()
        program = start(script, self.server.uri('relay'), self.env.broker.port, self.topic, 0)
        program.go()
        sent = self.write('relay', 'outbox', columns, body)
        received = self.received(consumer)
        program.kill()
        return self.summary(sent, received)

    def summary(self, sent, received):
        self.env.broker.purge(self.queues)
        assert sent.keys() <= received.keys()
        waits = [(received[key] - sent[key]) / 1000 for key in sent]
        return {p: percentile(waits, p) for p in self.percentiles}

    def variants(self):
        common = '(key, type, payload)'
        return {
            'bare C': self.bare,
            'pg_fanout': self.pg_fanout,
            'relay, Python and pika': lambda: self.relay(python, 'relay_pika.py', self.fill_outbox, common),
            'relay, Node and amqplib': lambda: self.relay(node, 'relay_amqplib.mjs', self.fill_outbox, common),
        }


def times(text):
    return {key: int(time) for key, time in (line.split() for line in text.splitlines())}


def committed(log):
    """From the logs of pgbench's threads: the clients' transactions in order."""
    found = {}
    numbers = {}
    for file in glob.glob(log + '.*'):
        with open(file) as f:
            for line in f:
                client, _, _, _, seconds, micros = line.split()[:6]
                numbers[client] = numbers.get(client, 0) + 1
                found[str(int(client) * 1000000 + numbers[client])] = int(seconds) * 1000000 + int(micros)
        os.remove(file)
    return found


def latency(env):
    results = []
    for rate in (200, 2000):
        run = Latency(env, rate)
        values = alternate(run.variants(), env.rounds)
        run.end()
        for p in PERCENTILES:
            targets = {50: {'pg_fanout': 1}, 99: {'pg_fanout': 5}} if rate == 200 else {}
            measured = {variant: [each[p] for each in rounds] for variant, rounds in values.items()}
            results += results_of('latency', f'{rate} per second, p{p:g}', 'ms', measured, 'bare C',
                                  targets.get(p), higher=False, compare='difference')
    return results


SCENARIOS = {'latency': latency}
