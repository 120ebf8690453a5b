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
sql(q(begin; insert into t values (2), (3); prepare transaction 'applied'));
$node->wait_for_catchup('s');
is($node->safe_psql('copy', 'select count(*) from pg_prepared_xacts where database = current_database()'),
	1, 'the subscriber has prepared the transaction');
sleep 2;
sql(q(commit prepared 'applied'));
$node->wait_for_catchup('s');
cmp_ok(seconds_until(sub { sent('true', 'copy') == 3 }),
	'<', 8, 'what a worker of logical replication commits by COMMIT PREPARED is sent at once');

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

sql(q(select fanout.declare_binding('t', 'g', 'classic')));
PgFanout::flush($node);

make_publisher_wait();
sql(q(select fanout.publish('t', '"committed meanwhile"')));
run_in_holder('commit');
cmp_ok(seconds_until(sub { sent(q(topic = 't')) == 2 }),
	'<', 8, 'a commit that comes while the publisher waits for a lock wakes it');

make_publisher_wait();
my ($verify_in, $verify_out) = (q(select 'verified ' || fanout.verify('5 s')), '');
my $verify = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres') ],
	'<', \$verify_in, '>', \$verify_out, IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));
sleep 1;
run_in_holder('commit');
$verify->finish;
like($verify_out, qr/verified true/, 'so does verify()');

make_publisher_wait();
my $other = $broker->proxy;
sql("alter system set pg_fanout.uri = '@{[ $other->uri ]}'");
$node->reload;
sleep 1;
run_in_holder('commit');
cmp_ok(seconds_until(sub { sql('select connected_to from fanout.stat_publisher') =~ /:@{[ $other->port ]}\b/ }),
	'<', 8, 'and a change of settings');

sql(q(create function handle(m fanout.message) returns void language sql as ''));
make_publisher_wait();
sql(q(select fanout.subscribe('t', 'g', 'handle(fanout.message)')));
run_in_holder('commit');
cmp_ok(seconds_until(sub { sql(q(select count(*) from fanout.stat_subscriptions where connected_to is not null)) == 1 }),
	'<', 8, 'and a subscription');

$holder->{in} .= "\\q\n";
$holder->{harness}->finish;

done_testing();
