# Whatever happens to broker, connection, queue, server and worker while
# messages flow: none is lost on the way to the handler, and none is applied
# twice.  The ledger is written in the transactions that publish, in another
# database; the witness is a handler that counts.
#
# PG_FANOUT_LONG=1: workers of two databases on one queue are terminated 20
# times in place of 5.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use IPC::Run ();
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('main', $broker, extension => 0, conf => q(
log_statement = none
max_worker_processes = 24
pg_fanout.heartbeat = 2
pg_fanout.connect_timeout = 1s
pg_fanout.retry_interval = 200ms
));
my $proxy = $broker->proxy;
my $rows = "$PostgreSQL::Test::Utils::tmp_check/experiments";
my $load;
my %before = (ledger => 0);
my $long = $ENV{PG_FANOUT_LONG};
my $at_work = q((select state in ('idle', 'consuming') from fanout.stat_subscriptions where topic = 't'));

$node->safe_psql('postgres', "create database $_") foreach qw(a b c);
$node->safe_psql($_, 'create extension pg_fanout') foreach qw(a b c);
$node->safe_psql('postgres', "alter database b set pg_fanout.uri = '" . $proxy->uri . "'");
sql('a', q(
create table ledger (message_id uuid);
select fanout.declare_binding('t', 'g')));
foreach my $database (qw(b c))
{
	sql($database, q(
create table applied (message_id uuid primary key, times int not null default 1);
create table counter (n bigint);
insert into counter values (0);
create function count_it(m fanout.message) returns void language plpgsql as $$
begin
	insert into applied values (m.message_id) on conflict (message_id) do update set times = applied.times + 1;
	update counter set n = n + 1;
	if m.attempt = 1 and hashtext(m.message_id::text) % 50 = 0 then
		raise exception 'one in 50 fails at first';
	end if;
end $$));
}
my $subscribe = q(select fanout.subscribe('t', 'g', 'count_it(fanout.message)', retry_delay => '100 ms', max_attempts => 100, prefetch => %d));
sql('b', sprintf($subscribe, 100));
wait_until('b', q((select connected_to is not null from fanout.stat_subscriptions)));
is(sql('b', 'select count(*) from fanout.topics'), 0, 'a database need not know the topic that it consumes');

# ---- broker and connection ----

experiment('broker stopped and started', sub { $broker->restart });
experiment('broker killed and started', sub { $broker->kill; $broker->start });
experiment('broker frozen past the heartbeat', sub { $broker->freeze; sleep 5; $broker->thaw });
experiment('consumer\'s connection frozen past the heartbeat', sub { $proxy->command('freeze'); sleep 5; $proxy->command('pass') });
experiment('connection cut in a delivery, of 3 frames of it, 9 times', sub {
	foreach my $frame (('basic.deliver', 'content-header', 'body') x 3)
	{
		connected();
		$proxy->command("cut-in $frame");
		PgFanout::poll(sub { $proxy->command('mode') eq 'pass' }, "a cut in $frame");
	}
});
experiment('connection reset every 100 ms, 20 times', sub {
	foreach (1 .. 20) { sleep 0.1; $proxy->command('reset'); }
});

# ---- prefetch, consumer_timeout ----

experiment('prefetch changed 6 times', sub {
	foreach my $prefetch (1, 1000, 7, 65535, 2, 100)
	{
		sql('b', "begin; select fanout.unsubscribe('t', 'g'); " . sprintf($subscribe, $prefetch) . '; commit');
		sleep 0.4;
	}
});

$broker->evaluate("application:set_env(rabbit, $_)") foreach 'consumer_timeout, 1000', 'channel_tick_interval, 300';
sql('b', q(create function slow(m fanout.message) returns void language plpgsql as $$
	begin
		if m.body ? 'slow' then perform pg_sleep(2.5); end if;
		insert into applied values (m.message_id) on conflict (message_id) do update set times = applied.times + 1;
		update counter set n = n + 1;
		if m.body ? 'fail' and m.attempt <= 2 then raise exception 'fails'; end if;
	end $$));
sql('a', q(select fanout.declare_binding('late', 'g')));
sql('b', q(select fanout.subscribe('late', 'g', 'slow(fanout.message)', retry_delay => '2 s', max_retry_delay => '2 s')));
wait_until('b', q((select connected_to is not null from fanout.stat_subscriptions where topic = 'late')));
sql('a', q(insert into ledger select fanout.publish('late', case i when 20 then '{"slow": 1}' when 40 then '{"fail": 1}' else '{}' end::jsonb, key => i::text)
	from generate_series(1, 100) i));
verdict('consumer_timeout of the broker, exceeded by a handler', 'one transaction');
cmp_ok(sql('b', q(select reconnects from fanout.stat_subscriptions where topic = 'late')), '>', 0, 'the broker has closed the channel, and it was opened again');
# up to 4.2 it closes the channel, since then it cancels the consumer
like(sql('b', q(select last_error from fanout.stat_subscriptions where topic = 'late')), qr{406 .*timeout|its consumer_timeout is over}i, 'last_error says why');
sql('b', q(select fanout.unsubscribe('late', 'g')));
$broker->evaluate("application:set_env(rabbit, $_)") foreach 'consumer_timeout, 1800000', 'channel_tick_interval, 60000';

# ---- two databases on one queue, and workers that are terminated ----

foreach my $ordered ('true', 'false')
{
	my $times = $long ? 20 : 5;

	sql($_, 'select fanout.unsubscribe(topic, consumer_group) from fanout.subscriptions; ' . sprintf($subscribe =~ s/prefetch/ordered => $ordered, prefetch/r, 100))
	  foreach qw(b c);
	wait_until($_, $at_work) foreach qw(b c);
	experiment("two databases compete for one queue, ordered = $ordered, workers terminated $times times", sub {
		foreach (1 .. $times)
		{
			my $database = (qw(b c))[ int(rand(2)) ];

			wait_until($database, $at_work);
			sleep rand(0.5);
			sql($database, q(select pg_terminate_backend(pid) from fanout.stat_subscriptions));
		}
	});
}
cmp_ok(sql('c', 'select count(*) from applied'), '>', 0, 'both of them have applied some');
sql($_, q(select fanout.unsubscribe('t', 'g'))) foreach qw(b c);
sql('b', sprintf($subscribe, 100));
connected();

# ---- the queue ----

start_load();
foreach (1 .. 3)
{
	sleep 0.5;
	my $began = sql('b', 'select clock_timestamp()');
	$broker->amqp('delete', '--queue', 't_g');
	wait_until('b', qq((select last_error_at > '$began' and connected_at > last_error_at and state in ('idle', 'consuming') from fanout.stat_subscriptions)));
}
stop_load();
PgFanout::flush($node, dbname => 'a');
wait_until('b', q((select waiting = 0 from fanout.stat_subscriptions)));
PgFanout::poll(sub { $broker->count('t_g') == 0 }, 'an empty queue');
sleep 0.5;
wait_until('b', q((select state = 'idle' and waiting = 0 from fanout.stat_subscriptions)));
is(applied_twice(), 0, 'queue deleted under load, 3 times: declared and consumed again, nothing is applied twice');
# what was in the queue is gone with it
sql('a', 'truncate ledger');
sql($_, 'truncate applied; update counter set n = 0') foreach qw(b c);
%before = (ledger => 0);
experiment('queue declared again, after it was deleted', sub { });

sql('b', q(create function log_it(m fanout.message) returns void language sql as 'select';));
$broker->amqp('declare', '--queue', 'lazy_g', '--queue-type', 'classic', '--arguments', '{"x-max-priority": 3, "x-message-ttl": 60000}');
sql('b', q(select fanout.subscribe('lazy', 'g', 'log_it(fanout.message)')));
$broker->amqp('publish', '--routing-key', 'lazy_g', '{}');
wait_until('b', q((select applied = 1 from fanout.stat_subscriptions where topic = 'lazy')));
pass('a queue that somebody else has declared, with other arguments, is consumed as it is');

$broker->amqp('declare', '--exchange', 'direct', '--type', 'direct');
sql('b', q(select fanout.subscribe('direct', 'g', 'log_it(fanout.message)')));
wait_until('b', q((select state = 'refused' and last_error ~ '406 .*direct' from fanout.stat_subscriptions where topic = 'direct')));
like(sql('b', q(select detail from fanout.check() where item = 'subscription of "g" to "direct"' and not ok)), qr/^refused: 406 /,
	'an exchange of another type: state, last_error and check() say so');
$broker->amqp('delete', '--exchange', 'direct');
wait_until('b', q((select state = 'idle' from fanout.stat_subscriptions where topic = 'direct')));
pass('and it consumes when that is gone');

$broker->ctl('set_permissions', '-p', $broker->vhost, 'guest', '.*', '.*', '^(?!lazy_g)');
$proxy->command('reset');
wait_until('b', q((select state = 'refused' and last_error ~ '403 ACCESS_REFUSED' from fanout.stat_subscriptions where topic = 'lazy')));
wait_until('b', q((select state = 'idle' from fanout.stat_subscriptions where topic = 'direct')));
pass('no permission to read the queue: state and last_error say so, other subscriptions go on');
$broker->ctl('set_permissions', '-p', $broker->vhost, 'guest', '.*', '.*', '.*');
$broker->amqp('publish', '--routing-key', 'lazy_g', '{"n": 2}');
wait_until('b', q((select applied = 2 from fanout.stat_subscriptions where topic = 'lazy')));
pass('and it consumes when that is given');
sql('b', q(select fanout.unsubscribe('direct', 'g'), fanout.unsubscribe('lazy', 'g')));

# ---- a chain ----

sql('b', q(
select fanout.declare_binding('next', 'g'), fanout.declare_binding('captured', 'g');
create table copy (id uuid primary key);
select fanout.capture('copy', 'captured');
create table arrived (topic text, source text, times int not null default 1, primary key (topic, source));
create function forward(m fanout.message) returns void language plpgsql as $$
begin
	perform fanout.publish('next', to_jsonb(m.message_id));
	insert into copy values (m.message_id);
	if m.attempt = 1 and (m.body ->> 'n')::int % 100 = 0 then raise exception 'fails'; end if;
end $$;
create function arrive(m fanout.message) returns void language sql as $$
	insert into arrived values (m.topic, coalesce(m.body #>> '{after,id}', m.body #>> '{}')) on conflict (topic, source) do update set times = arrived.times + 1;
$$;
select fanout.subscribe('next', 'g', 'arrive(fanout.message)'), fanout.subscribe('captured', 'g', 'arrive(fanout.message)')));
sql('a', q(select fanout.declare_binding('first', 'g'); create table sources as
	select fanout.publish('first', jsonb_build_object('n', i), key => (i % 10)::text) as id from generate_series(1, 1000) i));
sql('b', q(select fanout.subscribe('first', 'g', 'forward(fanout.message)', retry_delay => '50 ms')));
foreach (1 .. 4)
{
	sleep 0.2;
	sql('b', q(select pg_terminate_backend(pid) from fanout.stat_subscriptions where topic = 'first'));
}
wait_until('b', q((select count(*) >= 2000 from arrived)));
wait_until('b', q((select sum(waiting) = 0 from fanout.stat_subscriptions) and (select count(*) = 0 from fanout.pending)));
is(sql('b', q(select count(*), max(times), count(distinct source) from arrived group by topic order by topic)), "1000|1|1000\n1000|1|1000",
	'what a handler publishes, and captures, commits with it: each arrives once');
is(sql('a', q(select string_agg(id::text, ',' order by id) from sources)), sql('b', q(select string_agg(source, ',' order by source::uuid) from arrived where topic = 'next')),
	'and it is the very messages');
record('a handler publishes and captures, its worker terminated 4 times', 'one transaction', 1000, 0, 0);
sql('b', q(select fanout.unsubscribe(topic, 'g') from fanout.subscriptions where topic <> 't'));

# ---- producers that are not pg_fanout ----

sql('b', q(
create table kept (like fanout.message);
create function keep(m fanout.message) returns void language sql as 'insert into kept select m.*';
select fanout.subscribe('other', 'g', 'keep(fanout.message)', prefetch => 3)));
wait_until('b', q((select state = 'idle' from fanout.stat_subscriptions where topic = 'other')));
my $consumer = sql('b', q(select pid from fanout.stat_subscriptions where topic = 'other'));
my %bodies = (
	'not utf8' => "\"\xff\xfe\"",
	'5 MB' => '"' . 'x' x 5_000_000 . '"',
	'nul' => '{"a": "x\u0000y"}',
	'deep' => '[' x 200_000 . ']' x 200_000,
	'surrogate' => '"\ud800"',
	'number beyond numeric' => '{"n": 1e200000}',
	'huge number' => '{"n": 1e1000}',
	'one byte of zero' => "\0",
	'two values' => '{} {}');
foreach my $name (sort keys %bodies)
{
	my $file = PostgreSQL::Test::Utils::tempdir() . '/body';

	append_to_file($file, $bodies{$name});
	$broker->amqp('publish', '--exchange', 'other', '--bare', '--message-id', $name, '--body-file', $file);
}
$broker->amqp('publish', '--exchange', 'other', '--message-id', 'odd headers', '--headers', '{"t": {"!timestamp": 1700000000}, "d": {"!decimal": "1.50"},
	"b": {"!bytes": "c3a4"}, "z": {"!bytes": "00ff"}, "n": null, "a": [1, {"x": [true, {"!timestamp": 5}]}, []], "e": {}, "key": ["no text"],
	"sequence": 9223372036854775807, "op": 1, "old_key": "a\u0000b"}', '{}');
$broker->amqp('publish', '--exchange', 'other', '--bare', '--count', 2, 'the same, without an id');
$broker->amqp('publish', '--exchange', 'other', '--message-id', 'i' x 255, '--count', 2, '{}');
wait_until('b', q((select applied = 12 and skipped >= 2 from fanout.stat_subscriptions where topic = 'other')));
is(sql('b', q(select count(*) filter (where body is null), count(*) filter (where raw is null), count(*) from kept)), '8|0|12',
	'other producers: a body that is no JSON in UTF-8 is NULL, its bytes are there');
is(sql('b', q(select length(raw), jsonb_typeof(body) from kept where length(raw) > 1000000)), '5000002|string', '5 MB');
is(sql('b', q(select encode(raw, 'hex') from kept where body is null and get_byte(raw, 0) = 34 and length(raw) = 4)), '22fffe22', 'not UTF-8');
is(sql('b', q(select length((body ->> 'n')) from kept where raw = '{"n": 1e1000}')), '1001', 'a number no double holds');
is(sql('b', q(select headers - 'z', key is null, sequence from kept where headers ? 't')),
	'{"a": [1, {"x": [true, 5]}, []], "b": "ä", "d": null, "e": {}, "n": null, "t": 1700000000, "op": 1, "key": ["no text"], "old_key": null, "sequence": 9223372036854775807}|t|9223372036854775807',
	'headers of every type: what has no form in JSON is NULL');
is(sql('b', q(select pid, failed from fanout.stat_subscriptions where topic = 'other')), "$consumer|0", 'none is an error, and the worker is the same');
record('producers that are not pg_fanout: bodies, headers, ids', '1 client', 12, 0, 0);
sql('b', q(select fanout.unsubscribe('other', 'g')));

# ---- the life of a worker ----

sql('b', q(
create table locked ();
create function busy(m fanout.message) returns void language plpgsql as $$
begin
	insert into applied values (m.message_id) on conflict (message_id) do update set times = applied.times + 1;
	update counter set n = n + 1;
	if m.redelivered or m.attempt > 1 then return; end if;
	if m.body ->> 'do' = 'sleep' then perform pg_sleep(600); end if;
	if m.body ->> 'do' = 'loop' then perform count(*) from generate_series(1, 1e12::bigint); end if;
	if m.body ->> 'do' = 'lock' then lock table locked; end if;
end $$));
sql('a', q(select fanout.declare_binding('busy', 'g')));
my $busy = q(select fanout.subscribe('busy', 'g', 'busy(fanout.message)', retry_delay => '100 ms', handler_timeout => '60 s'));
sql('b', $busy);
my $locker = $node->background_psql('b');
$locker->query_safe('begin; lock table locked');
foreach my $do ('sleep', 'loop', 'lock')
{
	is(gone(sub { make_busy('b', $do) }), 't', "pg_terminate_backend: gone in 2 s, while its handler is in a $do");
}
$locker->quit;
my $silent = sub {
	$proxy->command('pass');
	wait_until('b', q((select state = 'idle' from fanout.stat_subscriptions where topic = 'busy')));
	$proxy->command('freeze');
	sleep 0.3;
};
is(gone($silent), 't', 'and while the broker is silent');
$proxy->command('pass');
wait_until('b', q((select state = 'idle' from fanout.stat_subscriptions where topic = 'busy')));
my $pid = sql('b', q(select pid from fanout.stat_subscriptions where topic = 'busy'));
sql('b', "select pg_cancel_backend($pid)");
verdict('workers terminated in a handler, 3 times, and cancelled', '1 client');
is(sql('b', q(select pid from fanout.stat_subscriptions where topic = 'busy')), $pid, 'pg_cancel_backend of an idle worker is harmless');

my $took = PgFanout::again_if_slow(5, sub {
	make_busy('b', 'sleep');
	my $start = time;
	$node->stop('fast');
	my $seconds = time - $start;
	$node->start;
	return $seconds;
});
cmp_ok($took, '<', 5, 'a fast shutdown does not wait for a handler');
verdict('fast shutdown in a handler', '1 client');

sql('postgres', 'create database d template c');
sql('d', q(create function busy(m fanout.message) returns void language sql as 'select pg_sleep(600)'));
sql('d', $busy);
sql('b', q(select fanout.unsubscribe('busy', 'g')));
make_busy('d', 'sleep', 1);
is(timed(sub { sql('postgres', 'create database e template d') }), 'soon', 'CREATE DATABASE TEMPLATE does not wait for a handler');
is(timed(sub { sql('postgres', 'drop database e') }), 'soon', 'nor does DROP DATABASE of the copy');
wait_until('d', q((select pid is not null from fanout.stat_subscriptions where topic = 'busy')));
is(timed(sub { sql('postgres', 'drop database d') }), 'soon', 'nor that of the original');
is(sql('postgres', q(select count(*) from pg_stat_activity where datname in ('d', 'e'))), '0', 'no worker is left behind');

sql('c', q(create function busy(m fanout.message) returns void language sql as 'select pg_sleep(600)'));
sql('c', $busy =~ s/60 s/1 s/r);
make_busy('c', 'sleep', 1);
is(timed(sub { sql('c', q(set client_min_messages = error; drop extension pg_fanout cascade)) }), 'soon', 'DROP EXTENSION waits for a handler for its timeout at most');
PgFanout::poll(sub { sql('postgres', q(select count(*) from pg_stat_activity where datname = 'c' and backend_type ~ 'pg_fanout')) == 0 }, 'no worker');
pass('and leaves no worker behind');

# ---- not enough room: three subscriptions in b, the only database with the extension ----

sql('a', 'set client_min_messages = error; drop extension pg_fanout cascade');

foreach my $case (
	[ 'pg_fanout.max_subscriptions = 2', qr/cannot start a consumer for 1 of the subscriptions of database "b".*?\n[^\n]*HINT:  Increase pg_fanout.max_subscriptions/s ],
	[ "pg_fanout.max_subscriptions = 32\nmax_worker_processes = 5", qr/cannot start a worker: out of background worker slots.*?HINT:  Increase max_worker_processes/s ])
{
	my ($setting, $message) = @$case;
	my ($name) = $setting =~ /(\S+) = \d+$/;
	my $offset = -s $node->logfile;

	sql('b', q(select fanout.subscribe('one', 'g', 'log_it(fanout.message)'), fanout.subscribe('two', 'g', 'log_it(fanout.message)')));
	$node->append_conf('postgresql.conf', $setting);
	$node->restart;
	$node->wait_for_log($message, $offset);
	wait_until('b', q((select count(pid) = 2 and count(*) = 3 from fanout.stat_subscriptions)));
	is(sql('b', q(select count(*) from fanout.check() where item ~ '^subscription of' and not ok and detail ~ '^stopped' and hint ~ 'max_subscriptions')), '1',
		"$name exhausted: others run, and check() says which does not");
	# probes of other databases come and go among the workers
	is(scalar(() = slurp_file($node->logfile, $offset) =~ /$message/g), 1, 'one line in the log, with a hint') if $name =~ /max_subscriptions/;
	sql('b', q(select fanout.unsubscribe(topic, 'g') from fanout.stat_subscriptions where pid is not null limit 1));
	wait_until('b', q((select count(pid) = 2 and count(*) = 2 from fanout.stat_subscriptions)));
	pass('it starts when there is room');
	sql('b', q(select fanout.unsubscribe(topic, 'g') from fanout.subscriptions where topic <> 't'));
	sql('b', sprintf($subscribe, 100)) if sql('b', 'select count(*) from fanout.subscriptions') == 0;
}

done_testing();

END
{
	local ($?, $@);

	$load->kill_kill if $load;
}

sub sql { return $node->safe_psql($_[0], $_[1]); }

sub wait_until
{
	my ($database, $condition) = @_;

	$node->poll_query_until($database, "select coalesce($condition, false)")
	  or die "not so in $database: $condition\n"
	  . $node->safe_psql($database, 'select * from fanout.stat_subscriptions; select * from fanout.delivery_failure; select * from fanout.dead_letter');
	return;
}

sub connected
{
	wait_until('b', $at_work);
	return;
}

# Gives the consumer of the topic busy something to do, and waits until it is at it.
sub make_busy
{
	my ($database, $do, $uncounted) = @_;
	my $into = $uncounted ? '' : 'insert into ledger';

	wait_until($database, q((select state = 'idle' from fanout.stat_subscriptions where topic = 'busy')));
	sql('a', qq($into select fanout.publish('busy', '{"do": "$do"}')));
	PgFanout::poll(sub {
		sql('postgres', "select count(*) from pg_stat_activity where datname = '$database' and backend_type = 'pg_fanout consumer'
			and state = 'active' and xact_start < clock_timestamp() - interval '300 ms'") > 0;
	}, "a handler in a $do");
	return;
}

# Is the worker gone in 2 s?  $enter: what brings it where it is to be ended.  Once, a machine that
# stands still may be what takes so long; each time it is not.
sub gone
{
	my ($enter) = @_;
	my $gone;

	foreach (1 .. 3)
	{
		$enter->();
		$gone = sql('b', q(select pg_terminate_backend(pid, 2000) from fanout.stat_subscriptions where topic = 'busy'));
		last if $gone eq 't';
	}
	return $gone;
}

# The handler that it may have to wait for sleeps for ten minutes, and has one.
sub timed
{
	my ($command) = @_;
	my $start = time;

	$command->();
	return time - $start < 20 ? 'soon' : sprintf('%.1f s', time - $start);
}

sub start_load
{
	my $script = PostgreSQL::Test::Utils::tempdir() . '/load.sql';
	my $log = "$PostgreSQL::Test::Utils::log_path/032_consume_faults_pgbench.log";

	append_to_file($script, q(insert into ledger select fanout.publish('t', '{"n": 1}', key => (random() * 50)::int::text);) . "\n");
	$load = IPC::Run::start([ 'env', 'PGAPPNAME=pgbench', 'pgbench', '-n', '-c', '2', '-R', '150', '-T', '600', '-f', $script, $node->connstr('a') ],
		'<', '/dev/null', '>>', $log, '2>>', $log);
	return;
}

sub stop_load
{
	my $running = $load;

	$load = undef;
	$running->signal('TERM');
	$running->finish;
	PgFanout::poll(sub { sql('postgres', q(select count(*) from pg_stat_activity where application_name = 'pgbench')) == 0 }, 'end of the load');
	return;
}

sub experiment
{
	my ($name, $fault) = @_;

	start_load();
	sleep 0.7;
	$fault->();
	sleep 0.7;
	stop_load();
	verdict($name, '2 clients, 150/s');
	return;
}

sub applied
{
	my %times;

	foreach my $database (qw(b c))
	{
		foreach (split(/\n/, sql($database, 'select message_id, times from applied')))
		{
			my ($id, $times) = split(/\|/);

			$times{$id} += $times;
		}
	}
	return \%times;
}

sub applied_twice { return scalar(grep { $_ != 1 } values %{ applied() }); }

# Of all since the ledger was empty.
sub verdict
{
	my ($name, $by) = @_;
	my @ledger;
	my $applied;
	my ($missing, $twice, $invented, $counted);

	PgFanout::flush($node, dbname => 'a');
	@ledger = split(/\n/, sql('a', 'select message_id from ledger'));
	eval {
		PgFanout::poll(sub { sql('b', 'select count(*) from applied') + sql('c', 'select count(*) from applied') >= @ledger }, 'all messages');
		wait_until($_, q((select coalesce(sum(waiting), 0) = 0 from fanout.stat_subscriptions))) foreach qw(b c);
		1;
	} or diag($@);
	sleep 0.3;
	$applied = applied();
	$missing = grep { !$applied->{$_} } @ledger;
	$twice = grep { $_ != 1 } values %$applied;
	$counted = sql('b', 'select n from counter') + sql('c', 'select n from counter');
	delete @{$applied}{@ledger};
	$invented = keys %$applied;
	is("$missing|$twice|$invented|$counted", '0|0|0|' . @ledger, "$name: nothing missing, applied twice, or invented; the counter is right");
	record($name, $by, @ledger - $before{ledger}, $missing, $twice);
	$before{ledger} = @ledger;
	return;
}

sub record
{
	my ($name, $by, $messages, $missing, $repeated) = @_;

	note("$name: $messages messages, " . sql('b', q(select coalesce(sum(skipped), 0) || ' skipped in all' from fanout.stat_subscriptions)));
	append_to_file($rows, "| $name | 032_consume_faults | $by | $messages | $missing | $repeated |\n");
	return;
}
