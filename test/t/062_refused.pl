# What would fail for every message is not the messages' fault: the subscription is
# refused, nothing counts as an attempt, messages go back to the group, and it goes
# on by itself once put right.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

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
create table log (n serial, topic text, key text, attempt int, sequence bigint);
create function note(m fanout.message) returns void language sql as $$ insert into log (topic, key, attempt, sequence) values (m.topic, m.key, m.attempt, m.sequence) $$;
));

# ---- the target of sync_table() ----

sql(q(
create table source (id int primary key, name text);
select fanout.declare_binding('source', 'g');
select fanout.capture('source', 'source');
create schema copy;
create table copy.target (id int primary key, name text);
select fanout.sync_table('source', 'g', 'copy.target', retry_delay => '100 ms', max_attempts => 2);
insert into source select i, 'n' || i from generate_series(1, 50) i));
wait_until(q((select count(*) = 50 from copy.target)));
sql(q(drop table copy.target; update source set name = name || '!'; update source set name = name || '!'; update source set name = name || '!';));
wait_until(q((select state = 'refused' from fanout.stat_subscriptions where topic = 'source')));
is(stat_of('source', 'last_error'), 'the table of this subscription does not exist any more', 'the target was dropped: refused, and last_error says why');
PgFanout::flush($node);
PgFanout::poll(sub { $broker->count('source_g') == 150 }, 'all of them in the queue');
sleep 0.5;
is(sql('select count(*) from fanout.dead_letter') . sql('select count(*) from fanout.waiting'), '00', 'no message is a dead letter, or waits');
is($broker->count('source_g'), 150, 'all of them are in the queue, for others of the group');
sql(q(create table copy.target (id int primary key, name text); select fanout.unsubscribe('source', 'g');
	select fanout.sync_table('source', 'g', 'copy.target')));
wait_until(q((select count(*) = 50 from copy.target where name ~ '!!!$')));
pass('with a new target it goes on');

sql(q(create role app login; grant usage on schema fanout, copy to app; grant execute on function fanout.sync_table, fanout.sync_messages to app; select fanout.grant_topic('source', 'app');
	alter table copy.target owner to app; select fanout.unsubscribe('source', 'g')));
$node->safe_psql('postgres', q(select fanout.sync_table('source', 'g', 'copy.target')), extra_params => [ '-U', 'app' ]);
wait_until(q((select state = 'idle' from fanout.stat_subscriptions where topic = 'source')));
sql(q(revoke update on copy.target from app; update source set name = 'x'));
wait_until(q((select state = 'refused' and last_error = 'the owner of table copy.target lacks UPDATE on it' from fanout.stat_subscriptions where topic = 'source')));
is(sql('select count(*) from fanout.dead_letter') . sql(q(select coalesce(max(attempts), 0) from fanout.waiting)), '00', 'rights on the target revoked: no attempt counts');
sql('grant update on copy.target to app');
wait_until(q((select count(*) = 50 from copy.target where name = 'x')));
pass('and it goes on when they are given');

# ---- broken for all: the circuit breaker ----

sql(q(
create table needed ();
create function need(m fanout.message) returns void language plpgsql as $$ begin perform from needed; perform note(m); end $$;
select fanout.declare_binding('all', 'g');
select fanout.publish('all', jsonb_build_object('n', i), key => (i % 100)::text) from generate_series(1, 1000) i));
PgFanout::flush($node);
# none is to be tried again before ten have failed
sql(q(drop table needed; select fanout.subscribe('all', 'g', 'need(fanout.message)', retry_delay => '2 s', max_retry_delay => '2 s', max_attempts => 10)));
wait_until(q((select state = 'refused' from fanout.stat_subscriptions where topic = 'all')));
like(stat_of('all', 'last_error'), qr/^messages of 10 keys failed with SQLSTATE 42P01 in a row, the last one: relation "needed" does not exist/,
	'messages of ten keys fail alike: refused, with the error');
sleep 3;
is(stat_of('all', 'state'), 'refused', 'it stays so while probes fail');
cmp_ok(sql(q(select max(attempts) from fanout.waiting)), '<=', 1, 'and those count as no attempts');
cmp_ok(sql(q(select count(*) from fanout.waiting)), '<', 200, 'few messages were taken from the queue');
like(sql(q(select detail from fanout.check() where item = 'subscription of "g" to "all"' and not ok)), qr/^refused: messages of 10 keys/, 'check() says so');
sql('create table needed ()');
wait_until(q((select count(*) = 1000 from log where topic = 'all')));
is(sql(q(select count(*) from (select sequence < lag(sequence) over (partition by key order by n) as wrong from log where topic = 'all') x where wrong)), 0,
	'once it is put right all are applied, in order');
wait_until(q((select state = 'idle' from fanout.stat_subscriptions where topic = 'all')));
is(sql('select count(*) from fanout.dead_letter'), 0, 'none was given up');
sql(q(select fanout.alter_subscription('all', 'g', retry_delay => '50 ms', max_retry_delay => '50 ms');
	drop table needed; select fanout.publish('all', '{}', key => i::text) from generate_series(1, 9) i));
# they may be given up by the time that this is looked at
wait_until(q((select count(*) = 9 from fanout.delivery_failure) or (select count(*) = 9 from fanout.dead_letter)));
isnt(stat_of('all', 'state'), 'refused', 'nine are not enough');
wait_until(q((select count(*) = 9 from fanout.dead_letter)));
pass('and are given up after their attempts, as any');
sql(q(select fanout.unsubscribe('all', 'g'); select fanout.purge()));

# ---- queues ----

$broker->amqp('declare', '--queue', 'stream_g', '--queue-type', 'stream');
sql(q(select fanout.subscribe('stream', 'g', 'note(fanout.message)')));
wait_until(q((select state = 'refused' and last_error ~ 'is a stream' from fanout.stat_subscriptions where topic = 'stream')));
pass('a stream is refused');
sql(q(select fanout.unsubscribe('stream', 'g')));

$broker->amqp('declare', '--queue', 'theirs_g', '--queue-type', 'classic');
sql(q(select fanout.subscribe('theirs', 'g', 'note(fanout.message)')));
wait_until(q((select state = 'idle' from fanout.stat_subscriptions where topic = 'theirs')));
$broker->amqp('delete', '--queue', 'theirs_g');
wait_until(q((select state = 'refused' and last_error ~ 'was declared by somebody else' from fanout.stat_subscriptions where topic = 'theirs')));
sleep 2;
unlike($broker->ctl('list_queues', '-p', $broker->vhost, 'name'), qr/^theirs_g$/m, 'a queue that its owner has deleted is not declared as something else');
$broker->amqp('declare', '--queue', 'theirs_g', '--queue-type', 'classic');
wait_until(q((select state = 'idle' from fanout.stat_subscriptions where topic = 'theirs')));
$broker->amqp('publish', '--routing-key', 'theirs_g', '{}');
wait_until(q((select count(*) = 1 from log where topic = 'theirs')));
pass('and is consumed when it is there again');

sql(q(select fanout.subscribe('ours', 'g', 'note(fanout.message)')));
wait_until(q((select state = 'idle' from fanout.stat_subscriptions where topic = 'ours')));
$broker->amqp('delete', '--queue', 'ours_g');
PgFanout::poll(sub { $broker->ctl('list_queues', '-p', $broker->vhost, 'name', 'consumers') =~ /^ours_g\t1$/m }, 'the queue is consumed again');
pass('a queue that the worker has declared is declared again');

# a delivery limit
$broker->amqp('declare', '--queue', 'limit_g', '--queue-type', 'quorum', '--arguments', '{"x-delivery-limit": 3}');
sql(q(
create function fail_often(m fanout.message) returns void language plpgsql as $$
begin
	if m.body ->> 'n' = '1' and m.attempt < 8 then raise exception 'attempt %', m.attempt; end if;
	perform note(m);
end $$;
select fanout.subscribe('limit', 'g', 'fail_often(fanout.message)', retry_delay => '50 ms', max_retry_delay => '100 ms')));
wait_until(q((select state = 'idle' from fanout.stat_subscriptions where topic = 'limit')));
$broker->amqp('publish', '--routing-key', 'limit_g', '--message-id', "m$_", qq({"n": $_})) foreach 1 .. 3;
wait_until(q((select count(*) = 3 from log where topic = 'limit')));
is(sql(q(select max(attempt) from log where topic = 'limit')), 8, 'a delivery limit below max_attempts loses no message');
sql(q(create or replace function fail_often(m fanout.message) returns void language plpgsql as $$ begin perform pg_sleep(2); perform note(m); end $$; truncate log));
$broker->amqp('publish', '--routing-key', 'limit_g', '--message-id', "again$_", '{}') foreach 1 .. 3;
foreach (1 .. 6)
{
	PgFanout::poll(sub { kill_busy() }, 'a handler that runs');
}
wait_until(q((select count(*) = 3 from log where topic = 'limit')));
pass('nor does a worker that is killed more often than that');

done_testing();

sub sql { return $node->safe_psql('postgres', $_[0]); }

# The worker of the topic "limit", if it is in its handler.  The server restarts.
sub kill_busy
{
	my $pid = try_sql(q(select pid from pg_stat_activity where backend_type = 'pg_fanout consumer' and wait_event = 'PgSleep'));

	return 0 if $pid !~ /^\d+$/;
	PgFanout::kill_process($node, $pid);
	return 1;
}

# Returns '' while the server does not answer; psql() would fail on a pipe that psql
# has closed without reading it.
sub try_sql
{
	my ($sql) = @_;
	my $stdout = '';

	IPC::Run::run([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', $sql ], '>', \$stdout, '2>', '/dev/null') or return '';
	chomp $stdout;
	return $stdout;
}

sub stat_of
{
	my ($topic, $column) = @_;

	return sql("select $column from fanout.stat_subscriptions where topic = '$topic'");
}

sub wait_until
{
	my ($condition) = @_;

	$node->poll_query_until('postgres', "select coalesce($condition, false)")
	  or die "not so: $condition\n" . sql('select * from fanout.stat_subscriptions; select * from fanout.delivery_failure limit 20; select count(*) from log');
	return;
}
