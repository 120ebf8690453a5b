# What a consumer promises at moments that hardly ever come: delivery limits of queues
# of others, connections that are lost again and again, handlers that disappear while
# they run, deliveries that come again in another order.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use IPC::Run qw(start finish);
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 24
restart_after_crash = on
));

sql(q(
create extension dblink;
create table log (n serial, topic text, key text, body jsonb, attempt int, sequence bigint, xid xid8);
create function note(m fanout.message) returns void language sql as $$
	insert into log (topic, key, body, attempt, sequence, xid) values (m.topic, m.key, m.body, m.attempt, m.sequence, pg_current_xact_id());
$$;
create table gate (n int);
create function apply(m fanout.message) returns void language plpgsql as $$
begin
	while (select count(*) from gate) < (m.body ->> 'gate')::int loop perform pg_sleep(0.05); end loop;
	if m.attempt <= (m.body ->> 'fail')::int then raise exception using errcode = coalesce(m.body ->> 'errcode', 'P0001'), message = 'attempt ' || m.attempt; end if;
	if m.body ? 'sleep' then perform pg_sleep((m.body ->> 'sleep')::float8); end if;
	perform note(m);
end $$;
-- runs in a session of its own, and is committed
create function elsewhere(command text) returns void language sql as $$
	select dblink_exec(format('dbname=%s host=%s port=%s', current_database(), split_part(current_setting('unix_socket_directories'), ',', 1), current_setting('port')), command);
$$));

# ---- delivery limits of queues that somebody else has declared ----

# Queues that somebody else has declared: their arguments, max_attempts, and what is to be.
my $other_arguments = '"x-max-length": 1000, "x-dead-letter-exchange": "no such", "x-single-active-consumer": true';
my %theirs = (
	low => [ 'quorum', '{"x-delivery-limit": 2}', 6, 'refused' ],
	zero => [ 'quorum', qq({"x-delivery-limit": 0, $other_arguments}), 2, 'refused' ],
	enough => [ 'quorum', '{"x-delivery-limit": 2}', 3, 'idle' ],
	unlimited => [ 'quorum', qq({"x-delivery-limit": 2147483647, $other_arguments}), 3, 'idle' ],
	default_limit => [ 'quorum', '{}', 3, 'idle' ],
	classic => [ 'classic', '{"x-max-priority": 3}', 3, 'idle' ],
);
foreach my $topic (sort keys %theirs)
{
	my ($type, $arguments, $attempts, $state) = @{ $theirs{$topic} };

	$broker->amqp('declare', '--queue', "${topic}_g", '--queue-type', $type, '--arguments', $arguments);
	$broker->amqp('publish', '--routing-key', "${topic}_g", '--message-id', $topic, '{"fail": 2}');
	sql(qq(set client_min_messages = warning; select fanout.subscribe('$topic', 'g', 'apply(fanout.message)', ordered => false, on_failure => 'requeue',
		max_attempts => $attempts, retry_delay => '50 ms', max_retry_delay => '50 ms')));
	ok(soon("(select state = '$state' from fanout.stat_subscriptions where topic = '$topic')"), "on_failure \"requeue\" with max_attempts $attempts and a $type queue with $arguments: $state");
	if ($state eq 'refused')
	{
		is($broker->count("${topic}_g"), 1, 'its message stays in it');
		like(sql(qq(select last_error from fanout.stat_subscriptions where topic = '$topic')), qr/queue "${topic}_g" has a delivery limit of \d, and drops what .* use on_failure "wait"/, 'and it is said why');
	}
	else
	{
		ok(soon("(select attempt = 3 from log where topic = '$topic')"), 'a message that fails is applied at last');
	}
	sql("select fanout.unsubscribe('$topic', 'g')");
}
# as a user who may not declare it
$broker->amqp('declare', '--queue', 'unknown_g', '--arguments', '{"x-delivery-limit": 2}');
$broker->add_user('consumes', 'secret');
$broker->permit('consumes', '^$', '.*', '.*');
use_uri($broker->uri(user => 'consumes:secret'));
sql(q(set client_min_messages = warning; select fanout.subscribe('unknown', 'g', 'apply(fanout.message)', ordered => false, on_failure => 'requeue')));
ok(soon(q((select state = 'refused' and last_error ~ '"unknown_g" may have a delivery limit' from fanout.stat_subscriptions where topic = 'unknown'))),
	'a queue whose delivery limit cannot be found out is refused, too');
sql(q(select fanout.alter_subscription('unknown', 'g', on_failure => 'wait')));
$broker->amqp('publish', '--routing-key', 'unknown_g', '--message-id', 'waits', '{"fail": 1}');
ok(soon(q((select count(*) = 1 from log where topic = 'unknown'))), 'and is consumed with on_failure "wait"');
sql(q(select fanout.unsubscribe('unknown', 'g')));
use_uri($broker->uri);

# What comes back too often because connections were lost.
$broker->amqp('declare', '--queue', "${_}_g", '--arguments', '{"x-delivery-limit": 2}') foreach qw(held lost);
sql(q(set client_min_messages = warning;
	select fanout.subscribe('held', 'g', 'apply(fanout.message)', ordered => false, on_failure => 'requeue', max_attempts => 3, retry_delay => '1 h', max_retry_delay => '1 h');
	select fanout.subscribe('lost', 'g', 'apply(fanout.message)')));
ok(soon(q((select count(*) = 2 from fanout.stat_subscriptions where state = 'idle' and topic in ('held', 'lost')))), 'two queues with a delivery limit of 2 are consumed');
$broker->amqp('publish', '--routing-key', 'held_g', '--message-id', 'held', '{"fail": 1}');
ok(soon(q((select attempts = 1 from fanout.delivery_failure))), 'in one a message has failed that will be given back in an hour');
$broker->amqp('publish', '--routing-key', 'lost_g', '--message-id', "lost $_", '--headers', qq({"key": "$_"}), sprintf('{"gate": %d}', $_ < 3 ? $_ : 3)) foreach 1 .. 8;
foreach my $times (1 .. 3)
{
	ok(soon(qq((select bool_and(reconnects >= $times - 1) and max(delivered) filter (where topic = 'held') >= least($times, 2)
		from fanout.stat_subscriptions where topic in ('held', 'lost'))
		and exists (select from pg_stat_activity where backend_type = 'pg_fanout consumer' and wait_event = 'PgSleep'))), "connections are lost, time $times");
	$broker->ctl('close_all_connections', '-p', $broker->vhost, 'test');
	# the time of the batch is over then, so that the next message is not called in it
	sleep 1;
	sql("insert into gate values ($times)");
}
ok(soon(q((select count(*) = 8 and count(distinct key) = 8 from log where topic = 'lost'))), 'a queue with a delivery limit drops none of the messages that a worker has not reached when its connection is lost, however often it is');
is(sql(q(select count(*), bool_or(requeued) from fanout.waiting)), '1|f', 'nor one that was to be given back to it');
is(sql(q(select attempts from fanout.delivery_failure)), 1, 'whose attempts are kept');
sql(q(select fanout.retry('held', 'g')));
ok(soon(q((select attempt = 2 from log where topic = 'held'))), 'and which is applied');
sql(q(select fanout.unsubscribe(t, 'g') from unnest('{held,lost}'::text[]) t; truncate log; select fanout.purge()));

# ---- a batch is bounded in time, with savepoints, too, and by the heartbeat ----

sql(q(select fanout.declare_binding(t, 'g') from unnest('{savepoints,beats}'::text[]) t;
	select fanout.publish('savepoints', jsonb_build_object('sleep', 0.1, 'fail', case when i = 1 then 1 end), key => i::text) from generate_series(1, 25) i;
	select fanout.publish('beats', jsonb_build_object('sleep', 0.1), key => i::text) from generate_series(1, 12) i));
PgFanout::flush($node);
sql(q(select fanout.subscribe('savepoints', 'g', 'apply(fanout.message)', retry_delay => '50 ms')));
ok(soon(q((select count(*) = 25 from log where topic = 'savepoints'))), 'messages of 0.1 s each, the first of which fails');
cmp_ok(sql(q(select max(n) from (select count(*) as n from log where topic = 'savepoints' group by xid) x)), '<=', 12, 'a transaction with savepoints takes a second at most, too');
sql('alter system set pg_fanout.heartbeat = 1');
sql('select pg_reload_conf()');
sql(q(select fanout.subscribe('beats', 'g', 'apply(fanout.message)')));
ok(soon(q((select count(*) = 12 from log where topic = 'beats'))), 'with a heartbeat of a second');
cmp_ok(sql(q(select max(n) from (select count(*) as n from log where topic = 'beats' group by xid) x)), '<=', 5, 'a transaction takes a third of that at most');
sql('alter system reset pg_fanout.heartbeat');
sql('select pg_reload_conf()');
end_of(qw(savepoints beats));

# ---- pauses between attempts ----

sql(q(select fanout.declare_binding('pauses', 'g');
	select fanout.publish('pauses', jsonb_build_object('fail', 1, 'errcode', 'X000' || i % 10), key => i::text) from generate_series(1, 50) i;
	select fanout.subscribe('pauses', 'g', 'apply(fanout.message)', retry_delay => '100 s', max_retry_delay => '100 s')));
ok(soon(q((select count(*) = 50 from fanout.delivery_failure))), 'fifty messages have failed once');
is(sql(q(select bool_and(next_try - failed_at between '90 s' and '125 s') from fanout.delivery_failure)), 't', 'each is tried again after retry_delay, and a quarter of it at most');
is(sql(q(select max(next_try - failed_at) - min(next_try - failed_at) > '10 s' from fanout.delivery_failure)), 't', 'and not all of them at once');
end_of('pauses');

# ---- a handler that disappears ----

my $handler = q(create function gone(m fanout.message) returns void language plpgsql as $$
begin
	if m.body ->> 'do' = 'drop' and m.attempt = 1 and not exists (select from again) then
		perform elsewhere('drop function gone(fanout.message); insert into again values (1)');
		raise exception 'gone';
	elsif m.body ->> 'do' = 'fail' and m.attempt = 1 then
		raise exception 'once';
	elsif m.body ->> 'do' = 'end' and nextval('ends') = 1 then
		perform pg_terminate_backend(pg_backend_pid()), pg_sleep(10);
	end if;
	perform note(m);
end $$);
sql('create table again (x int); create sequence ends');
sql($handler);
sql(q(select fanout.declare_binding('gone', 'g');
	select fanout.subscribe('gone', 'g', 'gone(fanout.message)', retry_delay => '1 h', max_retry_delay => '1 h');
	select fanout.publish('gone', '{"do": "drop"}', key => 'dropped')));
ok(soon(q((select state = 'refused' and last_error ~ 'gone' from fanout.stat_subscriptions where topic = 'gone'))), 'a handler is dropped while it runs, and raises an error: refused');
is(sql('select (select count(*) from fanout.waiting), (select count(*) from fanout.dead_letter)'), '0|0', 'which is no failure of the message');
PgFanout::poll(sub { $broker->count('gone_g') == 1 }, 'the message in the queue');
sql($handler);
ok(soon(q((select attempt = 1 from log where topic = 'gone'))), 'that is applied in its first attempt once the handler is there again');

sql(q(select fanout.publish('gone', '{"do": "fail"}', key => 'a')));
ok(soon(q((select attempts = 1 from fanout.delivery_failure))), 'a message has failed once');
sql(q(select fanout.publish('gone', '{"do": "end"}', key => 'b')));
ok(soon(q((select count(*) = 1 from log where key = 'b'))), 'and another one is applied after its handler had ended the process');
ok(soon(q((select state = 'idle' from fanout.stat_subscriptions where topic = 'gone'))), 'the worker is idle');
my $refusals = refusals();
sql(q(drop function gone(fanout.message); select fanout.retry('gone', 'g')));
PgFanout::poll(sub { refusals() > $refusals }, 'the handler is found missing when the first one is due');
is(sql('select attempts from fanout.delivery_failure'), 1, 'an attempt that could not be made is not recorded');
sql($handler);
ok(soon(q((select attempt = 2 from log where key = 'a'))), 'it is made once the handler is there again');
end_of('gone');

# ---- what is delivered again ----

# A client that shares no code with pg_fanout: takes so many messages, says so, and when it
# has read a line gives them back from the last to the first, or, as a consumer, just ends.
# of this test: others may use the same broker
my $connections = sprintf('length([1 || [{vhost, <<"%s">>}] <- rabbit_networking:connection_info_all([vhost])])', $broker->vhost);
my $taker = "$PostgreSQL::Test::Utils::tmp_check/taker.py";
append_to_file($taker, <<'END');
import sys
import pika

uri, queue, count, reject = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == 'reject'
channel = pika.BlockingConnection(pika.URLParameters(uri)).channel()
channel.basic_qos(prefetch_count=count)
deliveries = iter(lambda: channel.basic_get(queue), None) if reject else channel.consume(queue)
tags = [next(deliveries)[0].delivery_tag for _ in range(count)]
print('taken', flush=True)
sys.stdin.readline()
for tag in reversed(tags if reject else []):
    channel.basic_reject(tag, requeue=True)
channel.connection.close()
END

foreach my $case ([ 'reversed', 'quorum', 10, 'reject' ], [ 'predecessor', 'classic', 5, 'end' ])
{
	my ($topic, $type, $taken, $how) = @$case;
	my ($in, $out) = ('', '');

	$broker->amqp('declare', '--queue', "${topic}_g", '--queue-type', $type);
	subscribe($topic);
	ok(soon("(select state = 'idle' from fanout.stat_subscriptions where topic = '$topic')"), "$topic: subscribed");
	# after that nothing that is delivered again may have ended the process
	$broker->amqp('publish', '--routing-key', "${topic}_g", '--message-id', "$topic first", '--headers', '{"key": "k", "sequence": 0}', '{}');
	ok(soon("(select count(*) = 1 from log where topic = '$topic')"), 'a first message is applied');
	use_uri('amqp://guest:guest@127.0.0.1:1/%2F');
	PgFanout::poll(sub { $broker->evaluate($connections) == 0 }, 'the worker has no connection');
	# each is in the queue before the next one, and all before somebody takes them
	$broker->amqp('publish', '--routing-key', "${topic}_g", '--confirm', '--message-id', "$topic $_", '--headers', qq({"key": "k", "sequence": $_}), '{}') foreach 1 .. 10;
	my $harness = start [ 'python3', $taker, $broker->uri, "${topic}_g", $taken, $how ], '<', \$in, '>', \$out, IPC::Run::timeout(300);
	$harness->pump until $out =~ /taken/;
	if ($how eq 'end')
	{
		my $before = $broker->evaluate($connections);

		use_uri($broker->uri);
		PgFanout::poll(sub { $broker->evaluate($connections) > $before }, 'the worker has connected');
		sleep 0.5;
		is(sql("select count(*) from log where topic = '$topic'"), 1, 'a worker waits for one that consumed before it and may have messages');
	}
	$in .= "\n";
	$harness->pump while length $in;
	finish $harness;
	use_uri($broker->uri);
	ok(soon("(select count(*) = 11 from log where topic = '$topic')"), "$type queue: what another consumer had, and did not ack, is applied");
	is(sql("select string_agg(sequence::text, ' ' order by n) from log where topic = '$topic'"), join(' ', 0 .. 10), 'in order');
	end_of($topic);
}

done_testing();

sub sql { return $node->safe_psql('postgres', $_[0]); }

# How often the worker of topic "gone" has found that it cannot call its handler.
sub refusals { return scalar(() = slurp_file($node->logfile) =~ /consumer of gone_g does not consume/g); }

sub use_uri
{
	my ($uri) = @_;

	sql("alter system set pg_fanout.uri = '$uri'");
	sql('select pg_reload_conf()');
	return;
}

sub subscribe
{
	my ($topic) = @_;

	sql("set client_min_messages = warning; select fanout.subscribe('$topic', 'g', 'apply(fanout.message)')");
	return;
}

sub end_of
{
	my @topics = @_;

	sql(qq(select fanout.unsubscribe('$_', 'g'))) foreach @topics;
	sql('delete from fanout.waiting; truncate log; select fanout.purge()');
	return;
}

sub soon { return PgFanout::soon($node, $_[0]); }
