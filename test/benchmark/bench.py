"""bench - what the scenarios share

Server and Broker are the two servers under test; alternate() runs variants in
turn; Result is what a scenario returns.  A scenario is a function

    def run(env): return [Result, ...]

in a module whose dictionary SCENARIOS names it (LONG: only run by name).  What
it measures is up to it; what is measured against what must be done alike: same
bodies, same properties, an empty queue to begin with, a quiet server.
"""

import json
import os
import platform
import re
import select
import signal
import statistics
import subprocess
import time
from contextlib import contextmanager, suppress
from urllib.parse import urlparse

import pika
import psycopg2

import report

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
WINDOW = 2000  # messages in flight: pg_fanout.max_in_flight, and of all others


def say(text):
    print(text, flush=True)


class Environment:
    """Where a run happens, and how large it is."""

    def __init__(self, scratch, suite, quick, rounds, rows, names):
        self.scratch = scratch
        size = ['--rows', str(rows)] if rows else []
        self.command = ' '.join(['bash test/bench --suite', suite, '--rounds', str(rounds), *size, *names])
        self.suite = suite
        self.quick = quick
        self.rounds = 1 if quick else rounds
        self.rows = rows
        self.load = os.getloadavg()[0]  # what the machine did before we came
        config = os.environ['PG_CONFIG']
        self.bindir = output(config, '--bindir')
        self.broker = Broker(os.path.join(scratch, 'broker'))
        self.servers = {}

    def size(self, full, quick):
        return quick if self.quick else full

    def server(self, name='main', **settings):
        """A PostgreSQL server; the same one for the same name."""
        if name not in self.servers:
            self.servers[name] = Server(self, name, settings)
        return self.servers[name]

    def stop_server(self, name):
        self.servers.pop(name).stop()

    def stop(self):
        for server in self.servers.values():
            server.stop()

    def facts(self):
        """What a figure means nothing without."""
        return {
            'date': time.strftime('%Y-%m-%d'),
            'machine': f'{os.cpu_count()} x {processor()}, {memory_gib()} GiB',
            'system': f'Linux {platform.release()}',
            'PostgreSQL': output(os.environ['PG_CONFIG'], '--version').split()[1],
            'RabbitMQ': self.broker.version,
            'Erlang': self.broker.erlang,
            'rabbitmq-c': output('pkg-config', '--modversion', 'librabbitmq'),
            'load before': round(self.load, 1),
            'command': self.command,
        }


def output(*command, **options):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout.strip()


def processor():
    with open('/proc/cpuinfo') as f:
        found = re.search(r'^model name\s*: (.*)$', f.read(), re.M)
    return found[1] if found else platform.machine()


def memory_gib():
    return round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30)


class Server:
    """A PostgreSQL server of our own, with the library preloaded.

    Durable as by default: fsync and synchronous_commit are on.
    """

    SETTINGS = {
        'listen_addresses': '127.0.0.1',
        'shared_preload_libraries': 'pg_fanout',
        'shared_buffers': '512MB',
        'max_wal_size': '16GB',  # no checkpoint but those asked for
        'checkpoint_timeout': '1h',
        'autovacuum_naptime': '10s',
        'max_worker_processes': '80',
        'max_connections': '200',
    }

    def __init__(self, env, name, settings):
        self.env = env
        self.data = os.path.join(env.scratch, 'pg-' + name)
        self.port = free_port(env)
        output(env.bindir + '/initdb', '-D', self.data, '-U', 'postgres', '-A', 'trust', '-E', 'UTF8')
        settings = {
            **self.SETTINGS, 'port': self.port, 'unix_socket_directories': env.scratch,
            'pg_fanout.uri': env.broker.uri, 'pg_fanout.max_in_flight': WINDOW, **settings,
        }
        with open(self.data + '/postgresql.conf', 'a') as f:
            f.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        self.start()

    def pg_ctl(self, *arguments):
        subprocess.run([self.env.bindir + '/pg_ctl', '-w', '-s', '-D', self.data, *arguments],
                       check=True, stdin=subprocess.DEVNULL)

    def start(self):
        self.pg_ctl('-l', self.data + '/server.log', 'start')

    def stop(self):
        self.pg_ctl('-m', 'fast', 'stop')

    def restart(self):
        self.stop()
        self.start()

    def cpu_seconds(self):
        """What all its processes have used, those that have ended included."""
        with open(self.data + '/postmaster.pid') as f:
            pid = int(f.readline())
        with open(f'/proc/{pid}/stat') as f:
            ticks = f.read().rpartition(')')[2].split()[13:15]
        used = sum(map(int, ticks)) / os.sysconf('SC_CLK_TCK')
        for child in children(pid):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                used += cpu_seconds(child)
        return used

    def connect(self, database='postgres', autocommit=True):
        db = psycopg2.connect(host=self.env.scratch, port=self.port, user='postgres', dbname=database)
        db.autocommit = autocommit
        return db

    def database(self, name='bench', extension=True):
        """A new database, in place of an old one; returns a connection."""
        db = self.connect()
        execute(db, f'drop database if exists {name} with (force)')
        execute(db, f'create database {name}')
        db.close()
        db = self.connect(name)
        if extension:
            execute(db, 'create extension pg_fanout')
        return db

    def uri(self, database='bench'):
        """For clients in other languages."""
        return f'postgresql://postgres@127.0.0.1:{self.port}/{database}'

    def pgbench(self, database, script, *arguments):
        """Runs a script (text) in pgbench; returns transactions per second."""
        file = os.path.join(self.env.scratch, 'pgbench.sql')
        with open(file, 'w') as f:
            f.write(script)
        text = output(self.env.bindir + '/pgbench', '-n', '-f', file, '-h', self.env.scratch, '-p', str(self.port),
                      '-U', 'postgres', *map(str, arguments), database, stderr=subprocess.STDOUT,
                      cwd=self.env.scratch)
        return float(re.search(r'^tps = ([\d.]+) \(without initial', text, re.M)[1])


class Broker:
    """The RabbitMQ that test/lib/rabbit started."""

    def __init__(self, directory):
        self.directory = directory
        with open(directory + '/env') as f:
            env = dict(line.strip().split('=', 1) for line in f if '=' in line)
        self.port = int(env['RABBIT_PORT'])
        self.pid = int(env['RABBIT_PID'])
        self.uri = f'amqp://guest:guest@127.0.0.1:{self.port}/%2F'
        with self.channel() as channel:
            properties = channel.connection._impl.server_properties
        self.version = properties['version'].decode() if isinstance(properties['version'], bytes) else properties['version']
        self.erlang = str(properties['platform']).split()[-1].strip("'")

    @contextmanager
    def channel(self):
        connection = pika.BlockingConnection(pika.URLParameters(self.uri))
        try:
            yield connection.channel()
        finally:
            if connection.is_open:
                connection.close()

    def ctl(self, *arguments):
        return output(TOP + '/test/lib/rabbit', 'ctl', self.directory, *arguments)

    def declare(self, exchange, queues, queue_type='quorum'):
        """A fanout exchange with queues, as pg_fanout declares them."""
        arguments = {'x-queue-type': queue_type}
        if queue_type == 'quorum':
            arguments['x-delivery-limit'] = 2**31 - 1
        with self.channel() as channel:
            channel.exchange_declare(exchange, 'fanout', durable=True)
            for queue in queues:
                channel.queue_declare(queue, durable=True, arguments=arguments)
                channel.queue_bind(queue, exchange)

    def delete(self, exchange, queues):
        """A quorum queue with a long log may not be deleted in time (541): it is asked again."""
        for attempt in range(5):
            try:
                with self.channel() as channel:
                    for queue in queues:
                        channel.queue_delete(queue)
                    channel.exchange_delete(exchange)
                return
            except pika.exceptions.AMQPError:
                if attempt == 4:
                    raise
                time.sleep(2)

    def purge(self, queues):
        with self.channel() as channel:
            for queue in queues:
                channel.queue_purge(queue)

    def depth(self, queue):
        """Messages that are ready.  A quorum queue counts those it delivered
        until they are acked, and knows of new ones after a moment."""
        with self.channel() as channel:
            return channel.queue_declare(queue, passive=True).method.message_count

    def wait_for_depth(self, queue, count, timeout=60):
        wait_until(lambda: self.depth(queue) == count, f'{queue} does not have {count} messages', timeout)


def free_port(env):
    taken = {server.port for server in env.servers.values()}
    while True:
        port = int(output('bash', '-c', f'. {TOP}/test/lib/env.sh && free_ports 1'))
        if port not in taken:
            return port


def execute(db, sql, parameters=None):
    with db.cursor() as cursor:
        cursor.execute(sql, parameters)
        return cursor.fetchall() if cursor.description else None


def value(db, sql, parameters=None):
    """The single value that a query returns."""
    return execute(db, sql, parameters)[0][0]


def wait_until(condition, complaint, timeout=60, pause=0.05):
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(complaint)
        time.sleep(pause)


def publisher(db):
    """The process id of this database's publisher, once it is idle."""
    query = "select pid from fanout.stat_publisher where state = 'idle' and pid is not null"
    wait_until(lambda: execute(db, query), 'the publisher does not become idle')
    return value(db, query)


@contextmanager
def stopped(pid):
    """With the process stopped, as by a terminal's ^Z."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def cpu_seconds(pid):
    """What a process has used so far."""
    with open(f'/proc/{pid}/schedstat') as f:
        return int(f.read().split()[0]) / 1e9


def children(pid):
    with open(f'/proc/{pid}/task/{pid}/children') as f:
        return [int(child) for child in f.read().split()]


class Program:
    """A program that says "ready", begins at "go", and ends when it is done.

    run() returns the seconds in between, and stdout has the rest of what it said.
    """

    def __init__(self, *command, timeout=600):
        self.timeout = timeout
        self.process = subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, bufsize=1, cwd=HERE)
        self.expect('ready')

    def expect(self, word):
        if not select.select([self.process.stdout], [], [], self.timeout)[0]:
            self.process.kill()
            raise TimeoutError(f'{self.process.args} does not say "{word}"')
        line = self.process.stdout.readline().strip()
        if line != word:
            raise RuntimeError(f'{self.process.args} says "{line}", not "{word}"')

    def go(self):
        self.process.stdin.write('go\n')
        self.process.stdin.flush()

    def run(self):
        began = time.monotonic()
        self.go()
        self.expect('done')
        took = time.monotonic() - began
        self.end()
        return took

    def end(self):
        """Waits for its end, and keeps the rest of what it says."""
        self.process.stdin.close()
        self.stdout = self.process.stdout.read()
        if self.process.wait(60) != 0:
            raise RuntimeError(f'{self.process.args} failed')

    def kill(self):
        self.process.kill()
        self.process.wait()


def node(script, *arguments):
    return Program('node', os.path.join(HERE, script), *arguments)


def python(script, *arguments):
    return Program('/usr/bin/python3', os.path.join(HERE, script), *arguments)


def bare(*arguments):
    return Program(os.path.join(HERE, 'bare'), *arguments)


# JSON of about so many bytes, which does not compress to nothing, and which comes
# out of jsonb as it went in.
BODY = """
create function body(id bigint, size integer) returns text language sql immutable as $$
    select '{"id": ' || id || ', "filler": "' || left(
        (select string_agg(md5((id * 1000 + i)::text), '') from generate_series(0, size / 32) i),
        greatest(size - 18 - length(id::text), 0)) || '"}'
$$"""

# The outbox of the common relay.
OUTBOX = """
create table outbox (
    id bigint generated always as identity primary key, message_id uuid not null default gen_random_uuid(),
    key text, type text, payload json not null, created_at timestamptz not null default now(), sent_at timestamptz);
create index on outbox (id) where sent_at is null"""


class Backlog:
    """The same messages for everyone: in pg_fanout's outbox (database bench), in a
    common outbox table and in that of a package (database relay), in a file.

    Each fill_...() makes all of them anew; the queues are made once.
    """

    topic = 'backlog'

    def __init__(self, env, size, count, queue_type='quorum', nqueues=1):
        self.env, self.count, self.size = env, count, size
        self.queues = [f'{self.topic}_group{number}' for number in range(nqueues)]
        self.server = env.server()
        self.db = self.server.database('bench')
        self.relay_db = self.server.database('relay', extension=False)
        for db in self.db, self.relay_db:
            execute(db, BODY)
        for number in range(nqueues):
            execute(self.db, 'select fanout.declare_binding(%s, %s, %s)', (self.topic, f'group{number}', queue_type))
        assert value(self.db, 'select fanout.flush()')

    def end(self):
        self.db.close()
        self.relay_db.close()
        self.env.broker.delete(self.topic, self.queues)

    def bodies_file(self, count=None):
        count = count or self.count
        file = os.path.join(self.env.scratch, 'bodies')
        with open(file, 'w') as f, self.db.cursor() as cursor:
            cursor.copy_expert(f'copy (select body(i, {self.size}) from generate_series(1, {count}) i) to stdout '
                               "with (format csv, delimiter e'\\x01', quote e'\\x02')", f)
        return file

    def fill(self):
        execute(self.db, "select count(fanout.publish(%s, body(i, %s)::jsonb, key => i::text, type => 'benchmark')) "
                         'from generate_series(1, %s) i', (self.topic, self.size, self.count))

    def fill_outbox(self, count=None):
        execute(self.relay_db, 'drop table if exists outbox cascade')
        execute(self.relay_db, OUTBOX)
        execute(self.relay_db, 'insert into outbox (key, type, payload) '
                               "select i::text, 'benchmark', body(i, %s)::json from generate_series(1, %s) i",
                (self.size, self.count if count is None else count))
        execute(self.relay_db, 'vacuum analyze outbox')
        execute(self.relay_db, 'checkpoint')

    def fill_package(self, count=None):
        execute(self.relay_db, output('node', HERE + '/relay_outbox.mjs', 'setup'))
        execute(self.relay_db, 'insert into outbox (id, aggregate_type, aggregate_id, message_type, concurrency, payload) '
                               "select gen_random_uuid(), 'item', i::text, 'benchmark', 'parallel', body(i, %s)::jsonb "
                               'from generate_series(1, %s) i',
                (self.size, self.count if count is None else count))
        execute(self.relay_db, 'vacuum analyze outbox')
        execute(self.relay_db, 'checkpoint')


def alternate(variants, rounds):
    """Runs each of {name: function} once per round, the order rotated.

    Returns {name: [what the function returned, ...]}.  So what a machine does
    beside, and what wears off or warms up, meets all of them.
    """
    names = list(variants)
    values = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            values[name].append(variants[name]())
    return values


def percentile(values, p):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))]


class Result:
    """One variant in one setting.

    scenario    drain, latency, ...
    what        the setting: "300 bytes, 1 quorum queue"
    variant     who was measured: "pg_fanout"
    unit        of the values; higher says whether more is better
    values      one per round
    base        the variant of the same scenario, what and unit it is compared with
    target      of the ratio to the base (at least if higher, else at most), or of
                the difference if compare is "difference", or of the value itself
                if it is "value"
    """

    def __init__(self, scenario, what, variant, unit, values, base=None, target=None, higher=True, compare='ratio'):
        self.fields = {
            'scenario': scenario, 'what': what, 'variant': variant, 'unit': unit,
            'values': list(values), 'base': base, 'target': target, 'higher': higher, 'compare': compare,
        }


def results_of(scenario, what, unit, values, base, targets=None, higher=True, compare='ratio'):
    """Results of what alternate() returned; targets is {variant: target}."""
    results = [Result(scenario, what, variant, unit, measured, base, (targets or {}).get(variant), higher, compare)
               for variant, measured in values.items()]
    for result in results:
        fields = result.fields
        middle = statistics.median(fields['values'])
        number = report.against(fields['values'], values.get(base), 'ratio')
        ratio = f'{number:8.3f} of {base}' if number is not None else ''
        say(f"  {scenario:10} {what:32} {fields['variant']:26} {middle:12,.3f} {unit:12} {ratio}")
    return results


def write_results(env, file, results):
    by_scenario = {}
    for result in results:
        entry = by_scenario.setdefault(result.fields['scenario'], {'facts': env.facts(), 'results': []})
        entry['results'].append(result.fields)
    with open(file, 'w') as f:
        json.dump(by_scenario, f, indent=1)
        f.write('\n')
