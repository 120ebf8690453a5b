# What is told of messages that wait, are held or are dead is true again soon after a
# superuser has emptied a table by hand, in whatever isolation level and state.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $node = PgFanout::cluster('main', $proxy, conf => q(
pg_fanout.retry_interval = 200ms
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

# In a REPEATABLE READ transaction, whose snapshot all are to see.
sub counts
{
	my ($function) = @_;

	return "(select coalesce(string_agg(format('%s/%s/%s %s', topic_id, topic, consumer_group, n), ', ' order by topic_id, topic, consumer_group), 'none')
		from (select topic_id, topic, consumer_group, sum(count) as n from fanout.$function() group by topic_id, topic, consumer_group) c)";
}

sub true_counts
{
	my ($name) = @_;
	my $there = sql('select ' . counts('count_rows'));

	is(sql('select ' . counts('counts')), $there, $name);
	return;
}

# Once the publisher has looked, they are kept again.
sub kept
{
	my ($name) = @_;

	true_counts("$name, told at once");
	PgFanout::poll(
		sub { sql('select exists (select from fanout.counted) and not fanout.totals_void((select snapshot from fanout.counted))') eq 't' },
		'the publisher to have counted');
	true_counts($name);
	return;
}

sub add
{
	my ($n) = @_;

	sql(qq(
		insert into fanout.held (id, xid, topic_id, message_id, payload, created_at)
			select nextval('fanout.outbox_id_seq'), pg_current_xact_id(), (select topic_id from fanout.topic where topic = 'paused'), gen_random_uuid(), '{}', now()
			from generate_series(1, $n);
		insert into fanout.dead_letter (id, xid, topic, message_id, payload, created_at, reason, attempts)
			select i, pg_current_xact_id(), 'dead', gen_random_uuid(), '{}', now(), 'no', 1 from generate_series(1, $n) i));
	return;
}

sub write_messages
{
	my ($topic, $n) = @_;

	sql("select count(fanout.publish('$topic', to_jsonb(i))) from generate_series(1, $n) i");
	return;
}

sub waits
{
	my ($topic, $n, $name) = @_;
	my $told;

	PgFanout::poll(
		sub { ($told = sql("select pending + held from fanout.stat_topics where topic = '$topic'")) == $n },
		"$name ($n messages)");
	pass($name);
	return;
}

sql(q(select fanout.declare_binding(t, 'g', 'classic') from unnest('{paused,flows}'::text[]) t; select fanout.pause('paused')));
PgFanout::flush($node);
add(10);
kept('what was added');

# ---- TRUNCATE and UPDATE in transactions that began before the publisher counted ----

# A statement in a REPEATABLE READ transaction while somebody counts.
sub while_counted
{
	my ($name, $before, $statement) = @_;
	my $session = PgFanout::session($node);
	my $pid = PgFanout::publisher_pid($node);

	PgFanout::suspend($node, $pid);
	sql($before);
	PgFanout::run_in($session, 'begin isolation level repeatable read; select count(*) from fanout.topic');
	sql('select fanout.add_tallies()');
	PgFanout::run_in($session, "$statement; commit");
	true_counts("$name, told while the publisher has not looked");
	kill 'CONT', $pid;
	kept($name);
	$session->{harness}->kill_kill;
	return;
}

foreach my $table ('held', 'dead_letter')
{
	while_counted("TRUNCATE of fanout.$table when all is being counted anew", 'delete from fanout.counted', "truncate fanout.$table");
	add(7);
	while_counted("TRUNCATE of fanout.$table when the last ones are being added up", 'select', "truncate fanout.$table");
	add(5);
}
while_counted('an UPDATE of the topic', 'delete from fanout.counted', q(update fanout.dead_letter set topic = 'else'));
add(5);
while_counted('an UPDATE of the topic when the last ones are being added up', 'select', q(update fanout.dead_letter set topic = 'another'));
sql('begin; savepoint s; truncate fanout.held, fanout.dead_letter; rollback to s; commit');
kept('a TRUNCATE that is rolled back');
sql('begin; truncate fanout.held; ' . q(insert into fanout.held (id, xid, topic_id, message_id, payload, created_at)
	select 1, pg_current_xact_id(), topic_id, gen_random_uuid(), '{}', now() from fanout.topic where topic = 'paused'; commit));
kept('a row after a TRUNCATE, in one transaction');
sql('truncate fanout.held, fanout.dead_letter');
kept('all are gone');

# ---- TRUNCATE of the outbox ----

my $pid = PgFanout::publisher_pid($node);
write_messages('paused', 100);
waits('paused', 100, 'messages of a paused topic wait');
sql('truncate fanout.outbox');
waits('paused', 0, 'after a TRUNCATE of the outbox they do not');
PgFanout::flush($node);
pass('and nobody waits for them');
write_messages('paused', 3);
waits('paused', 3, 'only those that were written since do');
sql(q(delete from fanout.outbox where payload = '2'));
waits('paused', 2, 'nor does one that somebody deletes');
write_messages('paused', 1);
sql('vacuum full fanout.outbox');
write_messages('paused', 2);
waits('paused', 5, 'a segment that is written anew has them all');

$proxy->command('cut');
PgFanout::wait_for_publisher($node, 'disconnected');
write_messages($_, 50) foreach 'paused', 'flows';
waits('flows', 50, 'without a broker, all messages wait');
sql(q(delete from fanout.outbox where payload > '40'));
waits('paused', 55 - 15, 'rows that somebody deletes do not, of a paused topic');
sql('truncate fanout.outbox');
waits('paused', 0, 'after a TRUNCATE those of a paused topic do not');
write_messages('flows', 4);
$proxy->command('pass');
waits('flows', 0, 'those of others do not once there is a broker');
is(join(',', sort map { $_->{body} } $broker->collect('flows_g', expect => 4)), '1,2,3,4', 'which has what was written since');
is(PgFanout::publisher_pid($node), $pid, 'it is one publisher all the time');

$node->stop;
done_testing();
