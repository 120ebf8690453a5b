# Moments of a subscription that hardly ever come: it ends while its handler runs, a batch
# has no time left, somebody has locked a table of pg_fanout's, what kept a table gets
# another handler, the clock is set back, messages that sync_table() leaves out are looked at
# again because of one that fails, or a queue refuses changes in front of a comparison.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
restart_after_crash = on
));

sql(q(
create table log (n serial, topic text, key text, body jsonb, attempt int);
create function apply(m fanout.message) returns void language plpgsql as $$
begin
	if m.body ? 'sleep' then perform pg_sleep((m.body ->> 'sleep')::float8); end if;
	if m.body ->> 'do' = 'pause' then
		-- whatever changes the catalogs has the worker look whether its handler is still there
		create temporary table if not exists touched (x int);
		perform fanout.pause(m.topic, m.consumer_group);
	end if;
	if m.attempt <= (m.body ->> 'fail')::int then raise exception 'attempt %', m.attempt; end if;
	insert into log (topic, key, body, attempt) values (m.topic, m.key, m.body, m.attempt);
end $$));

# ---- a handler ends its subscription, and the next message fails ----

sql(q(select fanout.declare_binding('ends', 'g');
	select fanout.publish('ends', '{"do": "pause"}', key => 'a');
	select fanout.publish('ends', '{"fail": 1}', key => 'b')));
PgFanout::flush($node);
sql(q(select fanout.subscribe('ends', 'g', 'apply(fanout.message)', retry_delay => '50 ms')));
ok(soon(q((select count(*) = 1 from log where key = 'a'))), 'a handler pauses its subscription, and the message behind it fails: the first one is applied');
ok(soon(q((select paused from fanout.subscription where topic = 'ends') and not exists (select from fanout.stat_subscriptions where topic = 'ends' and pid is not null))),
	'and the subscription is paused');
sql(q(select fanout.resume('ends', 'g')));
ok(soon(q((select attempt = 2 from log where key = 'b'))), 'the second one has failed once, and is applied when it is not paused any more');
unlike(slurp_file($node->logfile), qr/terminated by signal/, 'nothing crashes');
end_of('ends');

# ---- the batch has no time left when a message fails ----

# Messages that have no sequence: their order is that in which they come.
$broker->amqp('declare', '--queue', 'late_g');
publish('late', '{"sleep": 0.6, "n": 1}', '{"sleep": 0.6, "n": 2, "fail": 1}', '{"n": 3}');
sql(q(set client_min_messages = warning; select fanout.subscribe('late', 'g', 'apply(fanout.message)', retry_delay => '50 ms')));
ok(soon(q((select count(*) = 3 from log where topic = 'late'))), 'the second of three messages of a key fails when the time of the batch is over: all are applied');
is(sql(q(select string_agg(body ->> 'n', ' ' order by n) from log where topic = 'late')), '1 2 3', 'in order');
end_of('late');

# ---- somebody locks the inbox ----

$broker->amqp('declare', '--queue', 'locked_g');
sql(q(set client_min_messages = warning; select fanout.subscribe('locked', 'g', 'apply(fanout.message)', retry_delay => '50 ms')));
publish('locked', '{"n": 1}');
ok(soon(q((select count(*) = 1 from log where topic = 'locked'))), 'a message is applied');

my $session = $node->background_psql('postgres');
my $waits = q(select extract(epoch from waitstart) from pg_locks where not granted and relation in ('fanout.inbox_0'::regclass, 'fanout.inbox_1'::regclass, 'fanout.inbox_2'::regclass));

$session->query_safe('begin; lock table fanout.inbox_0, fanout.inbox_1, fanout.inbox_2 in share mode');
publish('locked', '{"n": 1}');
ok(soon("(select ($waits) is not null)"), 'it comes again, and the worker waits for somebody who has locked the inbox');
my $since = sql($waits);
ok(soon("(select ($waits) > $since + 9)"), 'but not for longer than ten seconds');
$session->quit;
ok(soon(q((select skipped = 1 from fanout.stat_subscriptions where topic = 'locked'))), 'then it is found to have been applied');
is(sql(q(select count(*) from fanout.waiting)), 0, 'and does not wait to be tried again');
is(sql(q(select count(*) from log where topic = 'locked')), 1, 'nor is it applied twice');

end_of('locked');

# ---- a subscription of sync_table() gets another handler ----

sql(q(create table source (id int primary key, parent int);
	create table copy (id int primary key, parent int references copy);
	create function needs_parent(m fanout.message) returns void language plpgsql as $$
	begin
		if (m.body -> 'after' ->> 'parent')::int is not null and not exists (select from copy) then
			raise exception 'no parent' using errcode = 'foreign_key_violation';
		end if;
		insert into log (topic, key, body, attempt) values (m.topic, m.key, m.body, m.attempt);
	end $$));
foreach my $how ('unsubscribe() and subscribe()', 'alter_subscription()')
{
	my $topic = $how =~ /^alter/ ? 'altered' : 'anew';
	my $called = $how =~ /^alter/ ? "fanout.alter_subscription('$topic', 'g', handler => 'needs_parent(fanout.message)', retry_delay => '100 ms')" :
		"fanout.unsubscribe('$topic', 'g'), fanout.subscribe('$topic', 'g', 'needs_parent(fanout.message)', retry_delay => '100 ms')";

	sql(qq(truncate source, copy;
		select fanout.declare_binding('$topic', 'g'), fanout.capture('source', '$topic'), fanout.sync_table('$topic', 'g', 'copy');
		insert into source values (1)));
	ok(soon('(select count(*) = 1 from copy)'), 'a subscription keeps a table');
	sql('truncate copy');
	sql("select $called");
	sql('insert into source values (2, 1); update source set parent = 3 where id = 2');
	ok(soon('(select count(*) = 2 from fanout.waiting)'), "$how gives it another handler, for which two messages of a row wait");
	sql('insert into copy values (1)');
	ok(soon("(select count(*) = 2 from log where topic = '$topic')"), 'it gets both, though the second one says all that the first one does');
	is(sql(qq(select string_agg(body -> 'after' ->> 'parent', ' ' order by n) from log where topic = '$topic')), '1 3', 'with their bodies');
	is(sql(qq(select handler, target, key, unknown_columns from fanout.subscriptions where topic = '$topic')), 'public.needs_parent(fanout.message)|||', 'it keeps no table any more');
	like(sql('select fanout.declarations()'), qr/fanout.subscribe\('$topic', 'g', 'public.needs_parent\(fanout.message\)'/, 'and is declared as what it is');
	sql("select fanout.uncapture('source')");
	end_of($topic);
}

# ---- the clock is set back ----

# Times in the table that are a day ahead are what it leaves.
sql(q(select fanout.declare_binding('back', 'g'), fanout.subscribe('back', 'g', 'apply(fanout.message)', retry_delay => '1 h', max_retry_delay => '1 h');
	select fanout.publish('back', '{"fail": 1}', key => 'k'), fanout.publish('back', '{}', key => 'k')));
ok(soon('(select count(*) = 2 from fanout.waiting)'), 'a message has failed, and another one waits behind it');
sql(q(update fanout.waiting set next_try = next_try + interval '1 day', failed_at = failed_at + interval '1 day'));
sql(q(select pg_terminate_backend(pid) from fanout.stat_subscriptions where topic = 'back'));
ok(soon(q((select count(*) = 2 from log where topic = 'back'))), 'they are applied soon, though by a clock that was set back by a day the first one is not due');

end_of('back');

# ---- what sync_table() leaves out is counted once ----

sql(q(create table wide (id int primary key); create table narrow (id int primary key check (id < 10));
	select fanout.declare_binding('counted', 'g'), fanout.capture('wide', 'counted');
	select fanout.publish('counted', '{}') from generate_series(1, 20);
	insert into wide values (1), (10), (2);
	select fanout.publish('counted', '{}') from generate_series(1, 20)));
PgFanout::flush($node);
sql(q(select fanout.sync_table('counted', 'g', 'narrow', retry_delay => '1 h', max_retry_delay => '1 h')));
ok(soon(q((select ignored >= 40 and waiting = 1 from fanout.stat_subscriptions where topic = 'counted'))), 'one of many messages fails, most of which are no changes of a row');
is(sql(q(select applied, ignored from fanout.stat_subscriptions where topic = 'counted')), '42|40', 'each of these is counted once');

end_of('counted');

# ---- a queue refuses changes, and takes a comparison that has seen them ----

# Changes go to the exchange, and a comparison to the queue.
sql(q(create table compared (id int primary key, v int); create table compared_copy (id int primary key, v int);
	select fanout.declare_binding('compared', 'g', 'classic', '{"x-max-length": 1000, "x-overflow": "reject-publish"}'), fanout.capture('compared', 'compared');
	insert into compared select i, 0 from generate_series(1, 10) i;
	select fanout.sync_table('compared', 'g', 'compared_copy')));
ok(soon('(select count(*) = 10 from compared_copy)'), 'a table is copied by way of a queue that may refuse messages');
sql(q(select fanout.pause('compared')));
sql('update compared set v = 1');
sql(q(select fanout.compare('compared', 'compared', 'g')));
ok(soon(q((select rows_sent > 0 from fanout.backfills where kind = 'compare'))), 'while the topic is paused, rows are changed, and compared');
$broker->amqp('unbind', '--exchange', 'compared', '--queue', 'compared_g');
sql(q(select fanout.resume('compared')));
ok(soon(q((select bool_and(state <> 'running') from fanout.sync_comparisons))), 'the changes are returned by the broker');
is(sql(q(select state, different from fanout.sync_comparisons)), 'equal|0', 'and the comparison waits until they are sent again, and finds the copy equal');

done_testing();

sub sql { return $node->safe_psql('postgres', $_[0]); }

# Messages of one key, each with an id of its own that its place says.
sub publish
{
	my ($topic, @bodies) = @_;

	$broker->amqp('publish', '--routing-key', "${topic}_g", '--message-id', "$topic $_", '--headers', '{"key": "k"}', $bodies[$_]) foreach 0 .. $#bodies;
	return;
}

sub end_of
{
	my ($topic) = @_;

	sql(qq(select fanout.unsubscribe('$topic', 'g'); truncate log));
	return;
}

sub soon { return PgFanout::soon($node, $_[0], 60); }
