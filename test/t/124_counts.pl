# How many messages are held and dead is kept, not counted by those who look: it is true
# after whatever may happen to them, and costs the same however many there are.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $rows = 300_000;

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $node = PgFanout::cluster('main', $proxy, conf => q(
max_prepared_transactions = 5
pg_fanout.retry_interval = 200ms
pg_fanout.inbox_retention = 4s
));

sub sql { return $node->safe_psql($_[1] // 'postgres', $_[0]); }

my $held = q((select string_agg(format('%s %s %s', t.topic, h.n, h.oldest), ', ' order by t.topic) from fanout.topic t
	join (select topic_id, count(*) as n, min(created_at) as oldest from fanout.held group by topic_id) h using (topic_id)));
my $dead = q((select string_agg(format('%s %s %s', topic, consumer_group, n), ', ' order by topic, coalesce(consumer_group, ''))
	from (select topic, consumer_group, count(*) as n from fanout.dead_letter group by topic, consumer_group) d));
my $kept_held = q((select string_agg(format('%s %s %s', t.topic, c.count, c.oldest), ', ' order by t.topic)
	from fanout.counts() c join fanout.topic t using (topic_id)));
my $kept_dead = q((select string_agg(format('%s %s %s', topic, consumer_group, count), ', ' order by topic, coalesce(consumer_group, ''))
	from fanout.counts() where topic_id = 0));

# What is kept, and what there is, in one snapshot; and that it is kept.
sub true_counts
{
	my ($name, $dbname) = @_;
	my $kept = sql("select exists (select from fanout.counted), $kept_dead, (select sum(count) from fanout.counts() where topic_id > 0)", $dbname);

	is($kept, sql("select true, $dead, (select nullif(count(*), 0) from fanout.held)", $dbname), $name);
	return;
}

sub waits_for_counting
{
	my ($name, $dbname) = @_;

	PgFanout::poll(sub { sql('select exists (select from fanout.counted)', $dbname) eq 't' }, 'the publisher to have counted');
	true_counts($name, $dbname);
	return;
}

sub add_held
{
	my ($topic, $first, $last) = @_;

	return qq(insert into fanout.held (id, xid, topic_id, message_id, payload, created_at)
		select i, pg_current_xact_id(), (select topic_id from fanout.topic where topic = '$topic'), gen_random_uuid(), '{}',
			'2026-01-01 00:00 UTC'::timestamptz + i * interval '1 s'
		from generate_series($first, $last) i;);
}

sub add_dead
{
	my ($topic, $group, $first, $last) = @_;
	my $value = defined $group ? "'$group'" : 'null';

	return qq(insert into fanout.dead_letter (id, xid, topic, consumer_group, message_id, payload, created_at, reason, attempts)
		select i, pg_current_xact_id(), '$topic', $value, gen_random_uuid(), '{}', clock_timestamp(), 'no', 1
		from generate_series($first, $last) i;);
}

sql( q(select fanout.declare_binding(t, 'g', 'classic') from unnest('{a,b,c}'::text[]) t;
	   select fanout.pause('a'), fanout.pause('b')));
PgFanout::flush($node);
waits_for_counting('the publisher counts soon after it has started');
my $is_quick = PgFanout::quick_view($node, 'fanout.stat_topics');	# with hardly any messages

# ---- transactions ----

sql(add_held('a', 1, 100) . add_held('b', 101, 110) . add_dead('a', undef, 1001, 1050) . add_dead('b', 'g', 1, 7));
true_counts('what was added in one transaction is counted');
is(sql(q(select string_agg(format('%s %s %s', topic, held, dead), ', ' order by topic) from fanout.stat_topics)),
	'a 100 50, b 10 0, c 0 0', 'the view shows them by topic');
is(sql("select $kept_held"), sql("select $held"), 'it is known when the oldest ones were made');
sql('begin; ' . add_held('a', 201, 210) . add_dead('a', undef, 1101, 1110) . 'rollback');
true_counts('what is rolled back is not');
sql('begin; ' . add_held('a', 301, 310) . 'savepoint s; ' . add_held('a', 311, 320) . 'rollback to s; ' . add_dead('c', undef, 1201, 1203) . 'commit');
true_counts('nor is a subtransaction that is');
sql('begin; ' . add_held('a', 401, 410) . "prepare transaction 'p'");
true_counts('nor what is prepared');
my $open = PgFanout::session($node);
PgFanout::run_in($open, 'begin; ' . add_held('b', 501, 520) . 'delete from fanout.dead_letter where dead_id in (select dead_id from fanout.dead_letter limit 5)');
sql('select fanout.add_tallies()');
true_counts('once all are added up, neither are transactions in progress');
sql("commit prepared 'p'");
true_counts('a prepared transaction is when it commits');
PgFanout::run_in($open, 'commit');
true_counts('and so is one that was in progress when all were added up');
# not those that may be of somebody in progress, as the publisher is from time to time
PgFanout::poll(sub { sql('select fanout.add_tallies()'); return sql('select count(*) from fanout.tally') == 0 }, 'all to be added up');
true_counts('these are added up, too, and nothing is left to be added');

my $snapshot = PgFanout::session($node);
PgFanout::run_in($snapshot, 'begin isolation level repeatable read; select count(*) from fanout.held');
my $before = sql('select count(*) from fanout.held');
sql('delete from fanout.held where id <= 50');
sql('select fanout.add_tallies()');
PgFanout::run_in($snapshot, qq(select 1 / (sum(count) = $before)::int from fanout.counts() where topic_id > 0));
ok(1, 'an old snapshot has the figures of its time');
true_counts('and a new one those of now');
is(sql("select $kept_held"), sql("select $held"), 'it is known when the oldest one left was made');

# ---- many, and one by one, while an old snapshot is open ----

sql(add_held('a', 1_000_001, 1_000_000 + $rows) . add_dead('a', undef, 2_000_001, 2_000_000 + $rows) . add_dead('c', 'g', 3_000_001, 3_000_000 + $rows));
true_counts('very many are counted');
$is_quick->("with $rows held, and dead for a topic and for a subscription");
sql(qq(do \$\$ begin
	for i in 1 .. 20000 loop
		delete from fanout.held where id = 1000000 + i;
		delete from fanout.dead_letter where id = 2000000 + i and consumer_group is null;
	end loop;
	end \$\$));
true_counts('also those that go one by one');
sql('select fanout.add_tallies()');
true_counts('added up, too');
$is_quick->('with an old snapshot that keeps 40,000 entries from being removed');
PgFanout::run_in($snapshot, 'commit');
sql('delete from fanout.held');
true_counts('when all are deleted by hand, none is left');
is(sql(q(select count(*) from fanout.stat_topics where held > 0 or oldest_pending_age is not null)), 0, 'and none is shown');

# ---- what a superuser does by hand ----

sql(q(set session_replication_role = replica; delete from fanout.dead_letter where topic = 'c' and id % 2 = 0;) . add_held('b', 1, 5));
true_counts('what is done with triggers for replicas is counted');
sql(q(update fanout.dead_letter set topic = 'b' where topic = 'a'));
waits_for_counting('what is given another topic is counted anew');
sql(q(truncate fanout.dead_letter));
waits_for_counting('and so it is after a TRUNCATE');
sql(add_dead('b', undef, 5_000_001, 5_000_010));
sql('truncate fanout.counted, fanout.total, fanout.tally');
waits_for_counting('and when somebody has emptied the tables of counts');
is(sql(q(select count(*) from fanout.check() where item like 'triggers of%' and not ok)), 0, 'check() says nothing of the triggers');
sql('alter table fanout.held disable trigger tally_insert');
is(sql(q(select count(*) from fanout.check() where item = 'triggers of fanout.held' and not ok)), 1, 'unless somebody disables one');
sql('alter table fanout.held enable always trigger tally_insert');

# ---- the publisher, redrive(), purge() ----

sql(q(select fanout.redrive('b')));
true_counts('what is redriven is held, and dead no more');
sql(q(select fanout.purge('b', held => true)));
true_counts('what is purged is gone');
sql(add_dead('b', undef, 5_000_001, 5_000_010) . add_held('a', 1, 3000));
sql(q(select fanout.redrive('b'), fanout.resume('a'), fanout.resume('b')));
PgFanout::flush($node);
true_counts('what the publisher has sent is held no more');
is(sql('select count(*) from fanout.held'), 0, 'it has sent all');
sql(q(select fanout.publish('a', to_jsonb(i), headers => jsonb_build_object('large', repeat('x', 3000000))) from generate_series(1, 3) i));
PgFanout::flush($node);
true_counts('what it gives up is dead');
is(sql(q(select dead from fanout.stat_topics where topic = 'a')), 3, 'all of it');

# ---- what leaves the outbox because its segment is emptied ----

sql(q(select fanout.pause('a'); select count(fanout.publish('a', to_jsonb(i))) from generate_series(1, 50) i;
	alter system set pg_fanout.retention = '2s'; select pg_reload_conf()));
PgFanout::poll(sub { sql(q(select fanout.publish('b', '0'); select count(*) from fanout.held)) =~ /50$/ }, 'the messages to be held');
sql(q(alter system reset pg_fanout.retention; select pg_reload_conf()));
true_counts('what moves there with the rotation of segments is held');
sql('select fanout.add_tallies()');
true_counts('and counts once when all are added up');
sql(q(select fanout.resume('a')));
PgFanout::flush($node);
true_counts('until it is sent');

# ---- a subscription ----

sql(q(create function fail(m fanout.message) returns void language plpgsql as $$ begin raise 'no'; end $$;
	select fanout.subscribe('c', 'g', 'fail(fanout.message)', max_attempts => 1);
	select count(fanout.publish('c', to_jsonb(i))) from generate_series(1, 20) i));
PgFanout::poll(sub { sql(q(select count(*) from fanout.dead_letter where consumer_group = 'g')) == 20 }, 'dead letters of the subscription');
true_counts('what a subscription gives up is counted');
like(sql(q(select string_agg(item || ': ' || detail, e'\n') from fanout.check() where not ok)),
	qr/^subscription of "g" to "c" has no dead letters: 20 in fanout.dead_letter$/m, 'check() tells of it');
is(sql(q(select dead from fanout.stat_topics where topic = 'c')), 0, 'the view of topics does not');
sql(q(select fanout.purge('c', consumer_group => 'g'); select fanout.unsubscribe('c', 'g')));
true_counts('until it is purged');

# ---- a topic that is dropped ----

sql(q(select fanout.declare_topic('d')) . ';' . add_dead('d', undef, 6_000_001, 6_000_004));
sql(q(select fanout.drop_topic('d')));
PgFanout::poll(sub { sql(q(select count(*) from fanout.topic where topic = 'd')) == 0 }, 'the topic to be dropped');
true_counts('dead letters of a topic that was dropped are counted');
like(sql(q(select string_agg(item || ': ' || detail, e'\n') from fanout.check() where not ok)),
	qr/^dropped topic "d" has no dead letters: 4 in fanout.dead_letter$/m, 'check() tells of them');

# ---- one that is committed for it only then, and read by another publisher ----

my $late = PgFanout::session($node);
sql(q(select fanout.declare_topic('late')));
PgFanout::run_in($late, q(begin; select fanout.publish('late', '"late"')));
sql(q(select fanout.drop_topic('late')));
PgFanout::poll(sub { sql(q(select count(*) from fanout.topic where topic = 'late')) == 0 }, 'the topic to be dropped');
my $pid = PgFanout::publisher_pid($node);
sql("select pg_terminate_backend($pid)");
PgFanout::poll(sub { sql('select coalesce(max(pid), 0) from fanout.stat_publisher where connected_to is not null') !~ /^($pid|0)$/ }, 'a new publisher');
PgFanout::run_in($late, 'commit');
PgFanout::poll(sub { sql(q(select count(*) from fanout.dead_letter where topic = 'late')) == 1 }, 'a dead letter');
true_counts('what is committed for a topic that was dropped is dead, and has its name');
sql(q(select fanout.declare_binding('late', 'g', 'classic'); select fanout.redrive('late')));
PgFanout::flush($node);
is_deeply([ map { $_->{body} } $broker->collect('late_g', expect => 1) ], ['late'], 'the topic declared again, it is redriven');

# ---- a crash, a copy, and a ledger that is lost ----

$proxy->command('cut');
PgFanout::wait_for_publisher($node, 'disconnected');
sql(add_held('a', 1, 50) . add_dead('c', undef, 7_000_001, 7_000_004));
sql('begin; ' . add_held('b', 101, 150) . "prepare transaction 'p'");
$node->stop('immediate');
$node->start;
true_counts('after a crash all is as it was');
sql("commit prepared 'p'");
true_counts('also a transaction that was prepared before it');

sql('alter database postgres allow_connections false; select pg_terminate_backend(pid) from pg_stat_activity where datname = $$postgres$$', 'template1');
sql('create database copy template postgres', 'template1');
sql('alter database postgres allow_connections true', 'template1');
true_counts('a copy of the database has the same', 'copy');
sql('select fanout.activate()', 'copy');
true_counts('activated, it has forgotten what was held', 'copy');
is(sql('select count(*) from fanout.held', 'copy'), 0, 'all of it');

my $dump = PostgreSQL::Test::Utils::tempdir() . '/dump';
$node->command_ok([ 'pg_dump', '-f', $dump, $node->connstr('postgres') ], 'pg_dump works');
sql('create database restored', 'template1');
$node->command_ok([ 'psql', '-X', '-q', '-o', '/dev/null', '-v', 'ON_ERROR_STOP=1', '-f', $dump, $node->connstr('restored') ], 'and what it made is restored');
is(sql('select count(*) from fanout.counts()', 'restored'), 0, 'it has no messages');

sql('truncate fanout.sent');
sql('select fanout.activate()');
waits_for_counting('when the ledger was lost, they are counted anew');

done_testing();
