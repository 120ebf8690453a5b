# Wake-ups that nobody else gives: of a COMMIT PREPARED that logical replication
# applies; and those that come while a worker waits for a heavyweight lock, when
# the server resets its latch.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

# Without heartbeats nothing wakes the publisher but statistics, ten seconds
# after the last, and maintenance, once a minute.  The timer of a wait for a lock
# must fire before the lock is released: later, it would set the latch.
my $broker = PgFanout::broker();
my $node = PgFanout::cluster(
	'main', $broker,
	init => { allows_streaming => 'logical' },
	conf => q(
max_prepared_transactions = 5
pg_fanout.heartbeat = 0
deadlock_timeout = 10ms
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub sent
{
	my ($where, $dbname) = @_;

	return $node->safe_psql($dbname || 'postgres',
		"select count(*) from fanout.outbox_status where state = 'sent' and $where");
}

# Seconds until the condition holds, which is waited for for 30.
sub seconds_until
{
	my ($condition) = @_;
	my $start = time;

	until ($condition->())
	{
		return 30 if time - $start > 30;
		select(undef, undef, undef, 0.1);
	}
	return time - $start;
}

# Does it take less than 8 seconds, by what a try returns?
sub is_at_once
{
	my ($name, $try) = @_;

	cmp_ok(PgFanout::again_if_slow(8, $try), '<', 8, $name);
	return;
}

# ---- COMMIT PREPARED by a worker of logical replication ----

sub replicate_prepared
{
	my ($host, $port) = ($node->host, $node->port);

	$node->safe_psql('postgres', 'create database copy');
	$node->safe_psql('copy', q(
		create extension pg_fanout;
		create table t (id int primary key, v text);
		select fanout.declare_binding('copy', 'g', 'classic');
		select fanout.capture('t', 'copy')));
	my $trigger = $node->safe_psql('copy', q(select tgname from pg_trigger where tgrelid = 't'::regclass limit 1));
	$node->safe_psql('copy', qq(alter table t enable always trigger "$trigger"));
	sql(q(create table t (id int primary key, v text); create publication p for table t));
	sql(q(select pg_create_logical_replication_slot('s', 'pgoutput', false, true)));
	$node->safe_psql('copy', qq(
		create subscription s connection 'port=$port host=$host dbname=postgres' publication p
			with (create_slot = false, slot_name = 's', copy_data = false, two_phase = true)));
	sql(q(insert into t values (1)));
	$node->wait_for_catchup('s');
	PgFanout::wait_for_state($node, 'sent', dbname => 'copy', count => 1);
	return;
}

replicate_prepared();
is_at_once('what a worker of logical replication commits by COMMIT PREPARED is sent at once', sub
{
	my ($n) = @_;

	sql("begin; insert into t values (2 * $n), (2 * $n + 1); prepare transaction 'applied'");
	$node->wait_for_catchup('s');
	is($node->safe_psql('copy', 'select count(*) from pg_prepared_xacts where database = current_database()'),
		1, 'the subscriber has prepared the transaction');
	sleep 2;
	sql(q(commit prepared 'applied'));
	$node->wait_for_catchup('s');
	return seconds_until(sub { sent('true', 'copy') == 2 * $n + 1 });
});

# ---- a worker that waits for a heavyweight lock ----

my $holder = PgFanout::session($node);

sub run_in_holder { return PgFanout::run_in($holder, $_[0]); }

# Makes the publisher, which counts what it sent a second later, wait for a lock.
sub make_publisher_wait
{
	my $pid = PgFanout::publisher_pid($node);

	run_in_holder('begin; lock table fanout.topic_stat in exclusive mode');
	sql(q(select fanout.publish('t', '"counted"')));
	PgFanout::poll(sub { sql("select count(*) from pg_locks where not granted and pid = $pid") == 1 },
		'the publisher to wait for a lock');
	return;
}

sql(q(select fanout.declare_binding('t', 'g' || i, 'classic') from generate_series(1, 3) i));
PgFanout::flush($node);

my $sent = 0;
is_at_once('a commit that comes while the publisher waits for a lock wakes it', sub
{
	make_publisher_wait();
	sql(q(select fanout.publish('t', '"committed meanwhile"')));
	run_in_holder('commit');
	$sent += 2;
	return seconds_until(sub { sent(q(topic = 't')) == $sent });
});

is_at_once('so does verify()', sub
{
	make_publisher_wait();
	# statistics wake the publisher ten seconds after it began to wait, too late for this
	my ($verify_in, $verify_out) = (q(select 'verified ' || fanout.verify('8 s')), '');
	my $verify = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres') ],
		'<', \$verify_in, '>', \$verify_out, IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));
	sleep 1;
	run_in_holder('commit');
	$verify->finish;
	return $verify_out =~ /verified true/ ? 0 : 30;
});

is_at_once('and a change of settings', sub
{
	my $other = $broker->proxy;

	make_publisher_wait();
	sql("alter system set pg_fanout.uri = '@{[ $other->uri ]}'");
	$node->reload;
	sleep 1;
	run_in_holder('commit');
	return seconds_until(sub { sql('select connected_to from fanout.stat_publisher') =~ /:@{[ $other->port ]}\b/ });
});

sql(q(create function handle(m fanout.message) returns void language sql as ''));
is_at_once('and a subscription', sub
{
	my ($n) = @_;

	make_publisher_wait();
	sql("select fanout.subscribe('t', 'g$n', 'handle(fanout.message)')");
	run_in_holder('commit');
	return seconds_until(sub { sql(q(select count(*) from fanout.stat_subscriptions where connected_to is not null)) == $n });
});

$holder->{in} .= "\\q\n";
$holder->{harness}->finish;

done_testing();
