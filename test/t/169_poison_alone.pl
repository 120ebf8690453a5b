# A message with which the connection ends whenever it is sent, while nothing else is
# published that would show that it is not the broker: it may not be refused then, but whoever
# has something to publish, or to declare, does not wait for it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker(private => 1);
my $proxy = $broker->proxy;
my $node = PgFanout::cluster('main', $proxy, conf => q(
pg_fanout.retry_interval = 200ms
pg_fanout.retry_limit = 3
pg_fanout.confirm_timeout = 10min
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

# Declared last of many queues, so that messages of other topics are published before.
sub declare_nasty
{
	my ($topic) = @_;

	sql(qq(select fanout.declare_binding('$topic', 'nasty', 'classic')));
	return;
}

sub nasty_is_found
{
	my ($topic, $name) = @_;

	ok( PgFanout::soon($node, qq((select last_error from fanout.bindings where queue = '${topic}_nasty')
			~ 'declare queue "${topic}_nasty": the connection was lost each time'), 90),
		"$name: a queue whose declaration ends the connection is an error of its binding")
	  or diag(PgFanout::status($node, 'postgres'));
	return;
}

sql("select fanout.declare_binding('$_', 'g', 'classic')") foreach qw(idle bad mute);
sql(qq(select fanout.declare_binding('$_', 'g' || i, 'classic') from generate_series(10, 29) i)) foreach qw(wide sick);
PgFanout::flush($node);

# ---- nothing is confirmed ----

$proxy->command('cut-at nasty');
sql(q(select fanout.publish('bad', '"nasty"')));
my $reconnects = sql('select reconnects from fanout.stat_publisher');
$node->poll_query_until('postgres', "select reconnects >= $reconnects + 5 from fanout.stat_publisher") or die;
my $took = PgFanout::again_if_slow(2, sub {
	$node->poll_query_until('postgres', 'select connected_to is null from fanout.stat_publisher') or die;
	my $lost = Time::HiRes::time();
	$node->poll_query_until('postgres', 'select connected_to is not null from fanout.stat_publisher') or die;
	return Time::HiRes::time() - $lost;
});
cmp_ok($took, '<', 2, 'a message that nobody else is seen to get past: the connection is soon made again');

declare_nasty('wide');
nasty_is_found('wide', 'a message that nobody else is seen to get past');
sql(q(select fanout.publish('idle', '1')));
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'idle'));
ok($node->poll_query_until('postgres', q(select reason ~ 'lost again and again' from fanout.stat_topics where topic = 'bad')),
	'it is refused once anything else was confirmed') or diag(PgFanout::status($node, 'postgres'));
$proxy->command('pass');
$node->poll_query_until('postgres', q(select state = 'declared' from fanout.bindings where queue = 'wide_nasty')) or die;
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'bad'));

# ---- a topic publishes all the time, and nothing of it is confirmed ----

my $script = PostgreSQL::Test::Utils::tempdir() . '/mute.sql';
append_to_file($script, q(select fanout.publish('mute', to_jsonb(repeat('x', 10000)));));
$broker->message_store('suspend');
my $load = IPC::Run::start([ 'pgbench', '-n', '-R', 5, '-T', 600, '-f', $script, $node->connstr('postgres') ],
	'>', \my $out, '2>', \my $err, IPC::Run::timeout(600));
$node->poll_query_until('postgres', q(select in_flight > 0 from fanout.stat_publisher)) or die;
$proxy->command('cut-at sick_nasty');
declare_nasty('sick');
nasty_is_found('sick', 'messages that come all the time and are not confirmed');
$load->signal('TERM');
$load->finish;
$proxy->command('pass');
$broker->message_store('resume');
PgFanout::wait_for_state($node, 'sent');
unlike(slurp_file($node->logfile), qr/topic "(mute|idle)" is stalled/, 'no other topic was blamed');

done_testing();
