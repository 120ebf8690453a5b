# A cluster of three brokers with quorum queues, the leader of which is killed
# again and again under load from several clients.  pg_fanout.uri names all three.
#
# PG_FANOUT_TEST_MINUTES makes it as long.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Experiment;
use PgFanout::Faults;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $kills = 3;
my $minutes = $ENV{PG_FANOUT_TEST_MINUTES};

my $cluster = PgFanout::broker_cluster(3);
my $node = PgFanout::cluster(
	'main', $cluster,
	conf => q(
pg_fanout.connect_timeout = 1500ms
pg_fanout.heartbeat = 2s
pg_fanout.retry_interval = 200ms
));
my $experiment = PgFanout::Experiment->new(
	node => $node,
	broker => $cluster,
	uris => [ $cluster->uris ],
	rate => 100,
	file => __FILE__);
my $fault = PgFanout::Faults::named('leader killed and started');

is(scalar($cluster->replicas('load_1_a')),
	3, 'a queue declared by pg_fanout has a replica on each node');

# A channel that first publishes while a queue has no leader may get nacks
# (RabbitMQ 3.10), so a topic may be stalled for a moment; it must flow again
# while the node is still down.
my $end = time + 60 * ($minutes || 0);
my @pauses;
$experiment->run(
	'cluster of three, the leader killed -9 every few seconds',
	sub {
		push @pauses, kill_leader()
		  while $minutes ? time < $end : @pauses < $kills;
	},
	repeats => 1,
	timeout => '120 s');
cmp_ok(scalar(@pauses), '>=', $kills,
	'the two that were left went on, ' . @pauses . ' times');
note('after ' . join(', ', map { sprintf('%.1f s', $_) } @pauses));
is( $experiment->sql(
		'select count(*) from fanout.stat_topics where attempts is not null or held > 0 or dead > 0'),
	0,
	'no topic is stalled, and nothing was given up');

done_testing();

# Returns after how many seconds messages were confirmed again.
sub kill_leader
{
	my $start;
	my $pause;

	$fault->{begin}->($experiment);
	$start = Time::HiRes::time();
	$experiment->wait_for_confirms(100);
	$pause = Time::HiRes::time() - $start;
	$fault->{end}->($experiment);
	return $pause;
}
