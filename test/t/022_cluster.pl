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

# ---- a queue that loses its majority, while the member that we talk to lives ----

# That connection must not be lost because the machine is busy.
my $reconnects = $experiment->sql('select reconnects from fanout.stat_publisher');
$experiment->sql(q(alter system set pg_fanout.heartbeat = '30s'));
$node->reload;
PgFanout::poll(sub { $experiment->sql("select reconnects > $reconnects from fanout.stat_publisher") eq 't' }, 'a connection with other heartbeats');

# The defaults put the leader of a new queue on the node that its client talks to.
$experiment->sql(
	q(select fanout.declare_binding('lost', 'g'), fanout.declare_binding('fine', 'g', arguments => '{"x-quorum-initial-group-size": 1}')));
PgFanout::flush($node);
my ($here, @others) = sort { talks_to($b) <=> talks_to($a) } $cluster->members;
my $place = 'select connected_to, reconnects from fanout.stat_publisher';
my $connected = $experiment->sql($place);
ok(talks_to($here), "the publisher talks to $connected");
is_deeply([ map { $_->port } $cluster->replicas('fine_g') ], [ $here->port ], 'one queue has its only member there');
is(scalar($cluster->replicas('lost_g')), 3, 'the other one has members everywhere');
$_->kill foreach @others;
$experiment->sql(q(select fanout.publish('lost', '"lost"', 'k')));
foreach my $i (1 .. 20)
{
	$experiment->sql("select fanout.publish('fine', '$i', '$i')");
	PgFanout::wait_for_state($node, 'sent', where => "topic = 'fine' and key = '$i'");
}
is($experiment->sql(q(select state from fanout.outbox_status where topic = 'lost')), 'pending', 'a queue without a majority confirms nothing');
is($experiment->sql($place), $connected, 'and another queue confirms at once, on the same connection');
$experiment->sql(q(alter system set pg_fanout.confirm_timeout = '3s'));
$node->reload;
PgFanout::poll(sub { $experiment->sql(q(select coalesce(reason, '') from fanout.stat_topics where topic = 'lost')) =~ /did not confirm/ }, 'the reason');
my $trouble = $experiment->sql(q(select item, detail from fanout.check() where not ok));
like($trouble, qr/^topic "lost" flows\|.*did not confirm/m, 'check() says so');
unlike($trouble, qr/^topic "fine" flows/m, 'and has nothing against the other one');
$_->start foreach @others;
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'lost'));
ok(1, 'with a majority again, it flows again');

done_testing();

# Is it the member to which the publisher is connected?
sub talks_to
{
	my ($member) = @_;
	my $port = $member->port;

	return $experiment->sql('select connected_to from fanout.stat_publisher') =~ /:$port\b/ ? 1 : 0;
}

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
