# A broker that is away, under load from several clients: messages wait, and no
# attempt is used up.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Experiment;
use PgFanout::Faults;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker(private => 1);
my $proxy = $broker->proxy;
my $node = PgFanout::cluster(
	'main', $proxy,
	conf => q(
pg_fanout.connect_timeout = 1500ms
pg_fanout.heartbeat = 2s
pg_fanout.retry_interval = 200ms
));
my $experiment = PgFanout::Experiment->new(
	node => $node,
	broker => $broker,
	proxy => $proxy,
	file => __FILE__);

sub suffer
{
	return PgFanout::Faults::suffer($experiment, @_);
}

$experiment->run('no fault', sub { });
suffer('broker stopped and started', audit => 'after');
suffer('broker killed and started', audit => 'after');
suffer('broker frozen for longer than the heartbeat, and resumed',
	audit => 'after');
suffer('memory alarm set and cleared');
suffer('disk alarm set and cleared', audit => 'during');
suffer('broker wiped and started empty', audit => 'after');

done_testing();
