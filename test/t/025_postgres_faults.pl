# What can happen to PostgreSQL and its processes, under load from several
# clients.  test/check --long: 50 immediate shutdowns instead of 5.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Experiment;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $shutdowns = $ENV{PG_FANOUT_LONG} ? 50 : 5;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster(
	'main', $broker,
	conf => "restart_after_crash = on\nwal_buffers = 16MB\n");
my $experiment = PgFanout::Experiment->new(
	node => $node, broker => $broker, file => __FILE__);

# One process ends

$experiment->run(
	'publisher killed with SIGTERM, twice',
	sub { end_publisher() foreach 1 .. 2 },
	repeats => 1);

$experiment->run(
	'publisher killed with SIGKILL: the server restarts itself',
	sub {
		my $pid = PgFanout::publisher_pid($node);

		kill 'KILL', $pid;
		wait_for_other_publisher($pid);
	},
	repeats => 1);

$experiment->run(
	'pg_cancel_backend of launcher and publisher, 5 times',
	sub {
		my $workers = workers();

		foreach (1 .. 5)
		{
			$node->safe_psql('postgres', 'select ' . join(', ', map { "pg_cancel_backend($_)" } split(/\n/, $workers)));
			$experiment->wait_for_commits(20);
		}
		is(workers(), $workers, 'pg_cancel_backend: the same workers as before');
	});

$experiment->run(
	'pg_terminate_backend of launcher and publisher',
	sub {
		my @pids = split(/\n/, workers());

		is(scalar(@pids), 2, 'there are a launcher and a publisher');
		$node->safe_psql('postgres', "select pg_terminate_backend($_)") foreach @pids;
		PgFanout::poll(sub { !grep { kill 0, $_ } @pids }, 'their end');
		PgFanout::poll(sub { split(/\n/, workers()) == 2 }, 'others');
	},
	repeats => 1);

# The server ends

$experiment->run(
	'fast restart, twice',
	sub {
		foreach (1 .. 2)
		{
			$node->restart;
			$experiment->wait_for_commits(50);
		}
	},
	repeats => 1);

$experiment->run(
	"immediate shutdown at a random moment, $shutdowns times",
	sub { crash() foreach 1 .. $shutdowns },
	repeats => 1);

# The message of a commit that a crash takes back must not have been published:
# the load does not wait for its commits to be on disk, and the WAL writer does
# not write them, so none is there but for the publisher.  At last a crash while
# the broker is away, so that some are lost, unless autovacuum has just written them.

$node->safe_psql('postgres', 'alter database postgres set synchronous_commit = off');
my $lost = 0;
$experiment->run(
	'crash with synchronous_commit = off, 4 times',
	sub {
		$lost += lose_commits() foreach 1 .. 3;
		$node->safe_psql('postgres', q(alter system set pg_fanout.uri = 'amqp://127.0.0.1:1/'));
		$node->reload;
		foreach (1 .. 5)
		{
			PgFanout::wait_for_publisher($node, 'disconnected');
			$lost += lose_commits();
			last if $lost > 0;
		}
		$node->safe_psql('postgres', 'alter system reset pg_fanout.uri');
		$node->reload;
	},
	repeats => 1);
cmp_ok($lost, '>', 0, "such a crash loses commits: $lost here");

unlike(slurp_file($node->logfile), qr/PANIC|TRAP|signal 11/, 'no process of the server failed by itself');

done_testing();

sub workers
{
	return $node->safe_psql('postgres',
		q(select pid from pg_stat_activity where backend_type ~ '^pg_fanout' order by 1));
}

sub end_publisher
{
	my $took = PgFanout::again_if_slow(2, sub {
		my $pid = PgFanout::publisher_pid($node);
		my $start = Time::HiRes::time();
		my $seconds;

		kill 'TERM', $pid;
		PgFanout::poll(sub { !kill 0, $pid }, 'end of the publisher', 30);
		$seconds = Time::HiRes::time() - $start;
		wait_for_other_publisher($pid);
		$experiment->wait_for_commits(20);
		return $seconds;
	});

	cmp_ok($took, '<', 2, 'the publisher ends within 2 s of SIGTERM');
	return;
}

# Also while the server does not answer.
sub wait_for_other_publisher
{
	my ($pid) = @_;

	PgFanout::poll(
		sub { $experiment->try_sql("select pid from fanout.stat_publisher where pid <> $pid") },
		'another publisher');
	return;
}

# At a random moment while messages flow.
sub crash
{
	PgFanout::poll(
		sub { $experiment->try_sql('select confirmed > 50 from fanout.stat_publisher') eq 't' },
		'a publisher at work');
	$experiment->wait_for_commits(20);
	Time::HiRes::sleep(rand(0.7));
	$node->stop('immediate');
	$node->start;
	return;
}

# A crash after a while in which nobody wrote WAL unasked.  Returns how many
# changes that had been committed are not there afterwards.
sub lose_commits
{
	my $pid = $node->safe_psql('postgres',
		q(select pid from pg_stat_activity where backend_type = 'walwriter'));
	my $committed;

	kill 'STOP', $pid;
	$experiment->wait_for_commits(100);
	Time::HiRes::sleep(rand(0.3));
	$committed = $experiment->committed;
	kill 'KILL', $pid;
	PgFanout::poll(
		sub { $experiment->try_sql("select exists (select from pg_stat_activity where backend_type = 'walwriter' and pid <> $pid)") eq 't' },
		'the server');
	return $committed - $node->safe_psql('postgres', "select least(count(*), $committed) from ledger");
}
