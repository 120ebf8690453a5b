# Stream queues: a subscription begins where it is told to, applies each message once,
# and keeps its place with its effects; what cannot be read on is refused.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

$ENV{PG_TEST_TIMEOUT_DEFAULT} //= 60;
my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 50
pg_fanout.max_subscriptions = 40
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub wait_until
{
	my ($condition, $database) = @_;

	$node->poll_query_until($database || 'postgres', "select $condition")
	  or die "not so: $condition\n"
	  . $node->safe_psql('postgres',
		'select * from fanout.stat_subscriptions; select * from fanout.subscriptions; select * from fanout.delivery_failure; select count(*) from log');
	return;
}

sub stat_of
{
	my ($topic, $column) = @_;
	my $view = $column =~ /^(?:stream_offset|missed|start_at)$/ ? 'subscriptions' : 'stat_subscriptions';

	return sql("select $column from fanout.$view where topic = '$topic'");
}

sub subscribe
{
	my ($topic, $start_at, $more) = @_;

	return sql("select fanout.subscribe('$topic', 'g', 'note(fanout.message)', start_at => '$start_at', retry_delay => '100 ms', max_retry_delay => '100 ms'"
		  . ($more ? ", $more" : '') . ')');
}

# Publishes messages n = first .. last, one at a time, so that their order is known.
sub publish
{
	my ($topic, $first, $last, $key) = @_;

	sql("select fanout.publish('$topic', jsonb_build_object('n', n), key => " . ($key ? "'$key'" : 'n::text') . ") from generate_series($first, $last) n");
	PgFanout::flush($node);
	return;
}

# The numbers that were applied, in order.
sub applied { return sql("select coalesce(string_agg(body ->> 'n', ' ' order by n), '') from log where topic = '$_[0]'"); }

sub applied_becomes
{
	my ($topic, $expected, $name) = @_;

	wait_until("exists (select from log where topic = '$topic' and body ->> 'n' = '" . (split / /, $expected)[-1] . "')") if $expected;
	sleep 0.5;
	is(applied($topic), $expected, $name)
	  or diag sql("select string_agg(concat_ws('/', stream_offset, body ->> 'n', attempt, at), ' ' order by n) from log where topic = '$topic'");
	return;
}

sub position_becomes
{
	wait_until("exists (select from fanout.subscriptions where topic = '$_[0]' and stream_offset = $_[1])");
	return;
}

sub state_becomes
{
	wait_until("exists (select from fanout.stat_subscriptions where topic = '$_[0]' and state = '$_[1]')");
	return;
}

# There is a place to come back to, even if nothing was read yet.
sub placed
{
	wait_until("exists (select from fanout.subscription s join fanout.stream_offset using (inbox_id) where s.topic = '$_[0]')");
	return;
}

sql(q(
create table log (n serial, topic text, message_id uuid, body jsonb, attempt int, stream_offset bigint,
	at timestamptz default clock_timestamp(), xid xid default pg_current_xact_id()::xid);
create function note(m fanout.message) returns void language plpgsql as $$
begin
	if m.body ? 'fails' and m.attempt <= (m.body ->> 'fails')::int then raise exception 'attempt %', m.attempt; end if;
	insert into log (topic, message_id, body, attempt, stream_offset)
	values (m.topic, m.message_id, m.body, m.attempt, (m.headers ->> 'x-stream-offset')::bigint);
end $$;
select fanout.declare_binding(t, 'g', 'stream') from unnest('{first,next,next_empty,last,last_empty,offset,time,fails,dies,twice,gone,back,both}'::text[]) t));

# ---- where to begin ----

like($broker->ctl('list_queues', '-p', $broker->vhost, 'name', 'type'), qr/^first_g\s+\S*stream\S*$/m, 'a stream is declared')
  if PgFanout::flush($node);
publish($_, 1, 5) foreach qw(first next last offset time);

subscribe('first', 'first');
applied_becomes('first', '1 2 3 4 5', 'from the first message on');
is(stat_of('first', 'stream_offset'), '4', 'the offset is stored');
is(sql(q(select o.xmin = (select xid from log where topic = 'first' and stream_offset = 4)
	from fanout.stream_offset o join fanout.subscription s using (inbox_id) where s.topic = 'first')), 't', 'in the very transaction of the effects');
is(sql(q(select string_agg(stream_offset::text, ' ' order by n) from log where topic = 'first')), '0 1 2 3 4', 'a handler gets it as a header');
is(stat_of('first', 'lag'), '', 'how many a stream keeps is not shown as a lag');
publish('first', 6, 8);
applied_becomes('first', '1 2 3 4 5 6 7 8', 'it goes on with what comes');

subscribe('next', 'next');
placed('next');
state_becomes('next', 'idle');
publish('next', 6, 8);
applied_becomes('next', '6 7 8', '"next" leaves out what was there');

foreach my $start (qw(next last))
{
	my $topic = "${start}_empty";

	subscribe($topic, $start);
	placed($topic);
	is(stat_of($topic, 'stream_offset'), '', "\"$start\" of an empty stream: nothing was read");
	sql("select fanout.pause('$topic', 'g')");
	publish($topic, 1, 3);
	sql("select fanout.resume('$topic', 'g')");
	applied_becomes($topic, '1 2 3', 'what comes before the first message was read, while nobody reads, is not lost');
}

publish('last', 6, 6);
subscribe('last', 'last');
applied_becomes('last', '6', '"last" begins with the last piece');

subscribe('offset', '3');
applied_becomes('offset', '4 5', 'from an offset on');
is(stat_of('offset', 'missed'), '0', 'and nothing counts as missed');

sleep 2;
my $time = sql('select clock_timestamp()');
sleep 2;
publish('time', 6, 7);
subscribe('time', $time);
applied_becomes('time', '6 7', 'from a time on');
like(stat_of('time', 'start_at'), qr/^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\+00$/, 'which is shown in UTC');

# ---- the place is kept ----

sql(q(select pg_terminate_backend(pid) from fanout.stat_subscriptions where topic = 'first'));
publish('first', 9, 9);
applied_becomes('first', '1 2 3 4 5 6 7 8 9', 'the next worker goes on behind it');
sql(q(select fanout.unsubscribe('first', 'g')));
publish('first', 10, 10);
subscribe('first', 'first');
applied_becomes('first', '1 2 3 4 5 6 7 8 9 10', 'so does the next subscription');
is(sql(q(select skipped from fanout.stat_subscriptions where topic = 'first')), '0', 'by the offset alone: nothing had to be recognised');
$broker->ctl('close_all_connections', '-p', $broker->vhost, 'test');
publish('first', 11, 12);
applied_becomes('first', '1 2 3 4 5 6 7 8 9 10 11 12', 'and so does the next connection');

# without the inbox, which forgets
sql(q(select fanout.pause('first', 'g')));
wait_until(q((select pid is null from fanout.stat_subscriptions where topic = 'first')));
sql(q(delete from fanout.inbox; select fanout.resume('first', 'g')));
publish('first', 13, 13);
applied_becomes('first', '1 2 3 4 5 6 7 8 9 10 11 12 13', 'even if the inbox has forgotten all');

# a repeat of the publisher's is another message of the stream
foreach my $n (1, 2)
{
	$broker->amqp('publish', '--exchange', 'twice', '--routing-key', '', '--message-id', 'd0d0d0d0-0000-4000-8000-000000000001', '{"n": 1}');
	$broker->amqp('publish', '--exchange', 'twice', '--routing-key', '', '--message-id', 'd0d0d0d0-0000-4000-8000-000000000002', '{"n": 2}');
}
subscribe('twice', 'first');
position_becomes('twice', 3);
is(applied('twice'), '1 2', 'a message that is in the stream twice is applied once');

# ---- going back ----

publish('back', 1, 4);
subscribe('back', 'first');
position_becomes('back', 3);
sql(q(select fanout.alter_subscription('back', 'g', prefetch => 7)));
publish('back', 5, 5);
applied_becomes('back', '1 2 3 4 5', 'other options are changed without reading again');
sql(q(select fanout.alter_subscription('back', 'g', start_at => '2')));
wait_until(q((select count(*) = 8 from log where topic = 'back')));
is(applied('back'), '1 2 3 4 5 3 4 5', 'with start_at it is read again from there, and applied again');
is(stat_of('back', 'start_at') . ' ' . stat_of('back', 'stream_offset'), '2 4', 'the views show it');
is(sql(q(select count(*) from fanout.stream_offset o where not exists (select from fanout.subscription s where s.inbox_id = o.inbox_id))), '0',
	'the old place is forgotten');

# ---- failures ----

sql(q(select fanout.publish('fails', '{"n": 1, "fails": 2}', key => 'a'), fanout.publish('fails', '{"n": 2}', key => 'a'), fanout.publish('fails', '{"n": 3}', key => 'b')));
PgFanout::flush($node);
subscribe('fails', 'first', 'max_attempts => 3');
position_becomes('fails', 2);
wait_until(q((select count(*) = 3 from log where topic = 'fails')));
is(applied('fails'), '3 1 2', 'a message that fails waits in the waiting room, later ones of its key behind it, and no others');
is(sql(q(select attempt from log where topic = 'fails' and body ->> 'n' = '1')), '3', 'until it succeeds');
sql(q(select fanout.publish('fails', '{"n": 4, "fails": 3}', key => 'a'), fanout.publish('fails', '{"n": 5}', key => 'a')));
wait_until(q((select count(*) = 1 from fanout.dead_letter where topic = 'fails')));
applied_becomes('fails', '3 1 2 5', 'after its attempts it is given up');
sql(q(create or replace function note(m fanout.message) returns void language plpgsql as $$
begin
	insert into log (topic, message_id, body, attempt, stream_offset)
	values (m.topic, m.message_id, m.body, m.attempt, (m.headers ->> 'x-stream-offset')::bigint);
end $$;
select fanout.redrive('fails', consumer_group => 'g')));
applied_becomes('fails', '3 1 2 5 4', 'and can be redriven');

# a handler that ends its process
sql(q(
create function die(m fanout.message) returns void language plpgsql as $$
begin
	if m.body ->> 'n' = '3' then perform pg_terminate_backend(pg_backend_pid()), pg_sleep(5); end if;
	perform note(m);
end $$));
publish('dies', 1, 5);
sql(q(select fanout.subscribe('dies', 'g', 'die(fanout.message)', start_at => 'first', max_attempts => 2, retry_delay => '100 ms', max_retry_delay => '100 ms')));
wait_until(q(exists (select from fanout.dead_letter where topic = 'dies')));
wait_until(q((select count(*) = 4 from log where topic = 'dies')));
is(sql(q(select string_agg(body ->> 'n', ' ' order by body ->> 'n') from log where topic = 'dies')), '1 2 4 5', 'a message whose handler ends the process is given up, and keeps no others');
position_becomes('dies', 4);

# ---- a copy of the table, and several databases ----

sql(q(
create table users (id int primary key, name text);
select fanout.declare_binding('user', 'copy', 'stream', '{"x-max-age": "7D", "x-max-length-bytes": 1000000000, "x-stream-max-segment-size-bytes": 1000000}');
select fanout.capture('users', 'user');
insert into users select i, 'name ' || i from generate_series(1, 500) i;
update users set name = 'renamed' where id % 3 = 0;
delete from users where id % 7 = 0));
PgFanout::flush($node);
foreach my $copy (qw(copy1 copy2))
{
	$node->safe_psql('postgres', "create database $copy");
	$node->safe_psql($copy, q(
create extension pg_fanout;
set client_min_messages = warning;
create table users (id int primary key, name text);
select fanout.sync_table('user', 'copy', 'users', start_at => 'first')));
}
my $hash = q(select md5(string_agg(u::text, ',' order by id)) from users u);
foreach my $copy (qw(copy1 copy2))
{
	wait_until(q((select count(*) = 429 from users)), $copy);
	$node->poll_query_until($copy, $hash, sql($hash)) or die 'differs';
	is($node->safe_psql($copy, $hash), sql($hash), 'a copy is made from a stream, by each database of the group');
}

# the offset and the effects are of one snapshot
my $dump = PostgreSQL::Test::Utils::tempdir . '/dump';
$node->command_ok([ 'pg_dump', '-Fc', '-f', $dump, $node->connstr('copy1') ], 'pg_dump');
sql(q(update users set name = 'later'; insert into users values (1000, 'new')));
PgFanout::flush($node);
$node->safe_psql('postgres', 'create database copy3');
$node->command_ok([ 'pg_restore', '-d', $node->connstr('copy3'), $dump ], 'pg_restore');
is($node->safe_psql('copy3', 'select stream_offset > 500 from fanout.subscriptions'), 't', 'a dump carries the offset');
$node->safe_psql('copy3', 'set client_min_messages = warning; select fanout.activate()');
$node->poll_query_until('copy3', $hash, sql($hash)) or die 'differs';
is($node->safe_psql('copy3', $hash), sql($hash), 'and a restored database reads on from where it was dumped');
cmp_ok($node->safe_psql('copy3', 'select delivered from fanout.stat_subscriptions'), '<', 600, 'not from the first message');
like($node->safe_psql('copy1', 'select string_agg(d, chr(10)) from fanout.declarations() d'), qr/sync_table\('user', 'copy', .*start_at => 'first'\)/, 'declarations() has start_at');

# ---- retention ----

sql(q(select fanout.declare_binding('short', 'g', 'stream', '{"x-max-length-bytes": 20000, "x-stream-max-segment-size-bytes": 10000}')));
publish('short', 1, 2);
subscribe('short', 'first');
position_becomes('short', 1);
sql(q(select fanout.pause('short', 'g')));
foreach my $i (1 .. 12)
{
	sql(q(select fanout.publish('short', jsonb_build_object('n', n, 'filler', repeat('x', 1000))) from generate_series(3, 12) n));
	PgFanout::flush($node);
}
sql(q(select fanout.resume('short', 'g')));
wait_until(q(exists (select from fanout.subscriptions where topic = 'short' and missed > 0)));
my $all_seen = q((select count(*) + (select missed from fanout.subscriptions where topic = 'short') from log where topic = 'short'));
wait_until("$all_seen >= 122");
sleep 1;
my $seen = sql("select $all_seen");
ok($seen >= 122 && $seen < 140, 'what retention removed before it was read is counted, with no more than the marks of the broker between');
like(sql(q(select detail from fanout.check() where item = 'subscription of "g" to "short" has missed nothing' and not ok)), qr/^up to \d+ messages had been removed/, 'check() says so');
like(slurp_file($node->logfile), qr/messages of the stream were removed before they were read/, 'and so does the log');

# ---- deleted, and declared anew ----

publish('gone', 1, 5);
subscribe('gone', 'first');
position_becomes('gone', 4);
$broker->amqp('delete', '--queue', 'gone_g');
is(sql('select fanout.verify()'), 't', 'the publisher declares a deleted stream anew');
publish('gone', 6, 7);
state_becomes('gone', 'refused');
wait_until(q((select last_error ~ 'delivers no message from offset 4 on' from fanout.stat_subscriptions where topic = 'gone')));
is(applied('gone'), '1 2 3 4 5', 'a stream that ends before the place is refused');
publish('gone', 8, 12);
wait_until(q((select last_error ~ 'another message at offset 4' from fanout.stat_subscriptions where topic = 'gone')));
is(applied('gone'), '1 2 3 4 5', 'and so is one that has another message there');
sql(q(select fanout.alter_subscription('gone', 'g', start_at => 'first')));
applied_becomes('gone', '1 2 3 4 5 6 7 8 9 10 11 12', 'it is read from where alter_subscription() says');

# ---- what is no stream, and a stream that none was asked for ----

foreach my $type (qw(quorum classic))
{
	$broker->amqp('declare', '--exchange', $type, '--type', 'fanout', '--queue', "${type}_g", '--queue-type', $type);
	$broker->amqp('publish', '--exchange', $type, '--routing-key', '', '{"n": 1}');
	sql("set client_min_messages = warning; select fanout.subscribe('$type', 'g', 'note(fanout.message)', start_at => 'first')");
	wait_until("(select state = 'refused' and last_error ~ 'is no stream' from fanout.stat_subscriptions where topic = '$type')");
	is(applied($type), '', "start_at with a $type queue is refused");
	sql("select fanout.unsubscribe('$type', 'g'); set client_min_messages = warning; select fanout.subscribe('$type', 'g', 'note(fanout.message)')");
	applied_becomes($type, '1', 'and nothing of it is lost');
}

$broker->amqp('declare', '--exchange', 'stranger', '--type', 'fanout', '--queue', 'stranger_g', '--queue-type', 'stream');
sql(q(set client_min_messages = warning; select fanout.subscribe('stranger', 'g', 'note(fanout.message)')));
wait_until(q((select state = 'refused' and last_error ~ 'is a stream' from fanout.stat_subscriptions where topic = 'stranger')));
is(applied('stranger'), '', 'a stream without start_at is refused at once');
$broker->amqp('publish', '--exchange', 'stranger', '--routing-key', '', '{"n": 1}');
sql(q(select fanout.alter_subscription('stranger', 'g', start_at => 'first')));
applied_becomes('stranger', '1', 'until start_at is given');

# a stream that nobody has declared
sql(q(set client_min_messages = warning; select fanout.subscribe('nobody', 'g', 'note(fanout.message)', start_at => 'next')));
placed('nobody');
like($broker->ctl('list_queues', '-p', $broker->vhost, 'name', 'type'), qr/^nobody_g\s+\S*stream\S*$/m, 'a queue that is missing is declared as a stream');

# ---- as ever ----

sql(q(select fanout.drop_binding('both', 'g', if_empty => false)));
wait_until(q(not exists (select from fanout.bindings where topic = 'both')));
pass('a stream is dropped');
ok(sql(q(select bool_and(ok) from fanout.check() where item like 'subscription%first%')), 'check() is content with a stream');

done_testing();
