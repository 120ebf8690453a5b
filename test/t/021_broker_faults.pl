# What a broker can do to a publisher, under load from several clients.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Experiment;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster(
	'main', $broker,
	conf => q(
pg_fanout.connect_timeout = 1500ms
pg_fanout.heartbeat = 2s
pg_fanout.retry_interval = 200ms
));
my $experiment = PgFanout::Experiment->new(
	node => $node, broker => $broker, file => __FILE__);

$experiment->run('no fault', sub { });
$experiment->run('broker stopped and started',
	sub { $broker->stop; sleep 1; $broker->start }, repeats => 1);
$experiment->run('broker killed and started',
	sub { $broker->kill; sleep 1; $broker->start }, repeats => 1);

done_testing();
