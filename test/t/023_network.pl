# What a network can do between the publisher and the broker, under load from
# several clients.  What the broker itself does is in 021, what a state of it
# means for SIGTERM and DROP DATABASE in 013.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Experiment;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;

# The collector reads from the broker itself: none of this is in its way.
my $node = PgFanout::cluster(
	'main', $proxy,
	conf => q(
log_statement = none
pg_fanout.connect_timeout = 1500ms
pg_fanout.heartbeat = 1s
pg_fanout.retry_limit = 1
pg_fanout.retry_interval = 200ms
));
my $experiment = PgFanout::Experiment->new(
	node => $node, broker => $broker, file => __FILE__);
my $written = 0;    # rows by write_rows

# Cuts.  After each one the publisher must come back by itself; and it has
# confirmed something before the next, so that the pauses do not grow.

my @frames = qw(protocol connection.start-ok connection.tune connection.open-ok
  confirm.select exchange.declare queue.declare queue.declare-ok queue.bind
  basic.publish content-header body);
my $reconnects = value('reconnects');
network('connection cut in the middle of a frame, of ' . @frames . ' kinds',
	sub { cut_in($_) foreach @frames });
cmp_ok(value('reconnects') - $reconnects, '>=', scalar @frames,
	'each of the cuts was one');

my @positions = (1, 100, 400, 500, 600, 700, 1000, 3000, 9000);
network('connection cut after a number of bytes, ' . @positions . ' times',
	sub { cut_after($_) foreach @positions });

network(
	'confirms cut in the middle, 6 times',
	sub {
		cut_in('basic.ack', 'of a connection in use') foreach 1 .. 6;
		$experiment->audit($proxy, 'confirms cut in the middle');
	});

network(
	'connection cut every 100 ms, 20 times',
	sub {
		foreach (1 .. 20)
		{
			$proxy->command('reset');
			Time::HiRes::sleep(0.1);
		}
	});

# Silence

network(
	'packets vanish, both ways',
	sub {
		$proxy->command('freeze');
		wait_for_error('no heartbeat from');
		$proxy->command('pass');
	});
network(
	'new connections accepted, then silence',
	sub {
		$proxy->command('freeze');
		$proxy->command('reset');
		wait_for_error('no reply from');
		$proxy->command('pass');
	});
network(
	'packets to the publisher vanish',
	sub {
		$proxy->command('freeze-to-client');
		wait_for_error('no heartbeat from');
		$proxy->command('pass');
	});
network(
	'packets to the broker vanish',
	sub {
		$proxy->command('freeze-to-server');
		wait_until(q(state in ('disconnected', 'connecting')));
		$proxy->command('pass');
	});

# What was written to a connection that was given up arrives behind all that was
# sent since on another one.
network(
	'packets of a connection given up arrive later',
	sub {
		$proxy->command('freeze-open');
		wait_for_error('no heartbeat from');
		wait_for_confirms();
		$proxy->command('pass');
	});

# Longer than a busy broker takes to confirm something: none may be refused for that.
set_conf("pg_fanout.heartbeat = 0\npg_fanout.confirm_timeout = 5s");
network(
	'packets vanish, both ways, heartbeats off',
	sub {
		$proxy->command('freeze');
		wait_for_error('did not confirm a message within');
		$proxy->command('pass');
	});
set_conf("pg_fanout.heartbeat = 10s\npg_fanout.confirm_timeout = 60s");

# Far away.  Were each message, or every few, to wait for an answer, 2,000 of
# them would take hundreds of round trips.  Nothing is repeated, if the connection
# lasts: it must not be lost because the machine is busy.

network(
	'200 ms latency, each way',
	sub {
		my $enough = $experiment->committed + 500;
		my $in_flight;

		$proxy->command('delay 200');
		$in_flight = most_in_flight(sub { $experiment->committed > $enough });
		note("$in_flight messages in flight under the load");
	},
	repeats => 0,
	after => sub {
		my $all;
		my $start;
		my $took;
		my $in_flight;

		PgFanout::flush($node);
		$all = value('confirmed') + 2000;
		$start = Time::HiRes::time();
		write_rows(2000, 20);
		$in_flight = most_in_flight(sub { value('confirmed') >= $all });
		$took = Time::HiRes::time() - $start;
		cmp_ok($in_flight, '>', 500, "$in_flight of 2,000 messages in flight");
		cmp_ok($took / 0.4, '<', 50,
			sprintf('2,000 messages take %.1f s, or %.0f round trips', $took, $took / 0.4));
		$proxy->command('pass');
	});

# Slow.  Twice the heartbeat is 2 s.

set_conf('pg_fanout.heartbeat = 1s');
$reconnects = value('reconnects');
$proxy->command('throttle 4000');
$proxy->command('reset');
wait_until("reconnects > $reconnects and state = 'idle'");
$reconnects = value('reconnects');
write_rows(30, 20);
$experiment->verdict('30 messages through a trickle of 4 kB/s');
is(value('reconnects'), $reconnects, 'no heartbeat is missed in a trickle');

network(
	'a trickle of 4 kB/s, publisher ended in a send',
	sub {
		my $pid = PgFanout::publisher_pid($node);

		$node->safe_psql('postgres', 'create database another');
		write_rows(300, 20_000);
		wait_until('in_flight > 0');
		Time::HiRes::sleep(0.5);
		under(3, 'DROP DATABASE of another database in a trickle',
			sub { $node->safe_psql('postgres', 'drop database another') });
		under(2, 'pg_terminate_backend in a trickle',
			sub {
				$node->safe_psql('postgres', "select pg_terminate_backend($pid)");
				PgFanout::poll(sub { !kill 0, $pid }, 'end of the publisher', 60);
			});
		$proxy->command('pass');
	});

# One attempt only was allowed.
is( $node->safe_psql(
		'postgres', q(
		select count(*) from fanout.stat_topics
		where stalled_since is not null or attempts is not null or dead > 0 or held > 0)
	),
	0,
	'no attempt was used up by any of this');
ok( PostgreSQL::Test::Utils::slurp_file($node->logfile) !~
	  /is stalled|goes to fanout.dead_letter|PANIC|terminated by signal/,
	'the log tells of no stall and no crash in all this');

done_testing();

# Mostly the publisher cannot know what arrived.
sub network
{
	my ($name, $what, %params) = @_;

	return $experiment->run($name, $what, changes => 100, repeats => 1, %params);
}

sub value
{
	my ($expression) = @_;

	return $node->safe_psql('postgres',
		"select $expression from fanout.stat_publisher");
}

sub wait_until
{
	my ($condition) = @_;

	PgFanout::poll(sub { value("coalesce($condition, false)") eq 't' }, $condition);
	return;
}

sub set_conf
{
	my ($lines) = @_;

	$node->append_conf('postgresql.conf', $lines);
	$node->reload;
	wait_until(q(connected_to is not null));
	return;
}

# An error that came after this call.
sub wait_for_error
{
	my ($pattern) = @_;
	my $before = value('now()');

	wait_until("last_error ~ '$pattern' and last_error_at > '$before'");
	return;
}

sub wait_for_confirms
{
	my $confirmed = value('confirmed');

	# one that is lost before anything else is confirmed may be the fault of what was sent
	wait_until("confirmed > $confirmed + 50");
	return;
}

sub cut_in
{
	my ($frame, $in_use) = @_;

	$proxy->command("cut-in $frame");
	$proxy->command('reset') unless $in_use;
	PgFanout::poll(sub { $proxy->command('mode') eq 'pass' }, "a cut in $frame");
	wait_for_confirms();
	return;
}

# Counted from the beginning of a connection.
sub cut_after
{
	my ($bytes) = @_;

	$proxy->command("cut-after $bytes");
	$proxy->command('reset');
	PgFanout::poll(sub { $proxy->command('mode') eq 'pass' }, "a cut after $bytes bytes");
	wait_for_confirms();
	return;
}

# The most seen until the condition.
sub most_in_flight
{
	my ($condition) = @_;
	my $most = 0;

	PgFanout::poll(
		sub {
			my $now = value('in_flight');

			$most = $now if $now > $most;
			return $condition->();
		},
		'messages far away',
		60);
	return $most;
}

# New rows, in one transaction.
sub write_rows
{
	my ($count, $size) = @_;
	my $first = 5_000_000 + $written;

	$written += $count;
	$experiment->sql(qq(
		with c as (insert into item_1 (id, pad)
			select i, repeat('x', $size) from generate_series($first, $first + $count - 1) i
			returning id, token)
		insert into ledger (topic, key, op, token) select 1, id, 'c', token from c));
	return;
}

sub under
{
	my ($limit, $what, $do) = @_;
	my $start = Time::HiRes::time();

	$do->();
	cmp_ok(Time::HiRes::time() - $start, '<', $limit, "$what takes less than $limit s");
	return;
}
