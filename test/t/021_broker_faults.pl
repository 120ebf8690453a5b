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

# Returns once the publisher has a connection with it.
sub set_heartbeat
{
	my ($heartbeat) = @_;
	my $reconnects = $experiment->sql('select reconnects from fanout.stat_publisher');

	$experiment->sql("alter system set pg_fanout.heartbeat = '$heartbeat'");
	$node->reload;
	PgFanout::poll(sub { $experiment->sql("select reconnects > $reconnects and connected_to is not null from fanout.stat_publisher") eq 't' },
		"a connection with a heartbeat of $heartbeat");
	return;
}

$experiment->run('no fault', sub { });
suffer('broker stopped and started', audit => 'after');
suffer('broker killed and started', audit => 'after');
# for this one alone: others must not lose their connection because the machine is busy
set_heartbeat('2s');
suffer('broker frozen for longer than the heartbeat, and resumed',
	audit => 'after');
set_heartbeat('30s');
suffer('memory alarm set and cleared');
suffer('disk alarm set and cleared', audit => 'during');
suffer('broker wiped and started empty', audit => 'after');

done_testing();
