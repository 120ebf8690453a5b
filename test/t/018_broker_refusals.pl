# A broker that refuses: a topic, a message, a user, a connection; under load
# from several clients.  What is concerned waits until that is put right, and
# nothing else does.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Experiment;
use PgFanout::Faults;
use PostgreSQL::Test::Utils;
use Test::More;

# its own: the largest message is a setting of the whole broker
my $broker = PgFanout::broker(private => 1);
my $proxy = $broker->proxy;
my $password_file = PostgreSQL::Test::Utils::tempdir() . '/password';
my $uri = PgFanout::Faults::own_user($broker, $proxy, $password_file);
my $node = PgFanout::cluster(
	'main', $proxy,
	conf => qq(
pg_fanout.uri = '$uri'
pg_fanout.password_file = '$password_file'
pg_fanout.heartbeat = 60s
pg_fanout.retry_interval = 200ms
));
my $experiment = PgFanout::Experiment->new(
	node => $node,
	broker => $broker,
	proxy => $proxy,
	password_file => $password_file,
	file => __FILE__);

sub suffer
{
	return PgFanout::Faults::suffer($experiment, @_);
}

suffer('queue deleted');
suffer('binding deleted');
suffer('exchange deleted', audit => 'after');
suffer('channel closed by the broker in the middle of a window',
	audit => 'after');
suffer('queue full (reject-publish), and emptied later');
suffer('exchange exists with another type (406), repaired later',
	audit => 'during');
suffer('queue exists with other arguments (406), repaired later');
suffer('permission to publish withdrawn (403), and given back');
suffer('permission to declare withdrawn (403), and given back');
suffer('5 messages over max_message_size among others');
suffer("user's password changed, and pg_fanout's later");
suffer('virtual host deleted, and created later', audit => 'after');
suffer("the publisher's connection closed by an operator");
suffer('all connections closed by an operator');

done_testing();
