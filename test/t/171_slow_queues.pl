# Queues that confirm steadily, but later than all others, and less than is written: their
# topics lag, and no other does, with a channel for each and with few for all. No topic is
# refused for that, and nothing is sent twice.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Independence;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster(
	'main', $broker,
	conf => q(
pg_fanout.retry_interval = 1s
pg_fanout.confirm_timeout = 60s
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub set
{
	my ($setting) = @_;

	$node->append_conf('postgresql.conf', "pg_fanout.$setting");
	sql('select pg_terminate_backend(pid) from fanout.stat_publisher');
	$node->reload;
	return;
}

# While more is written to some topics than their queues take, which confirm once in so many
# milliseconds.
sub while_slow
{
	my ($name, $slow, $ms, $rows, %params) = @_;
	my $file = PostgreSQL::Test::Utils::tempdir() . "/slow$ms$slow.sql";
	my $published = sql('select published from fanout.stat_publisher');

	$broker->slow_queues($ms, map { "slow${_}_g" } 0 .. $slow - 1);
	append_to_file($file, "select fanout.publish('slow' || round(random() * ($slow - 1)), to_jsonb(n)) from generate_series(1, $rows) n;\n");
	my $bench = IPC::Run::start([ 'pgbench', '-n', '-c', 1, '-R', 33, '-T', 8, '-f', $file, $node->connstr('postgres') ],
		'>', \my $out, '2>', \my $err, IPC::Run::timeout(600));

	is_independent($name, count => 150, %params);
	$bench->finish or die $err;
	note(sql(q(select sum(pending) || ' pending, of one topic up to ' || max(pending) from fanout.stat_topics)), ' ', sql('select count(*) from fanout.topic_entry'), ' entries');
	$broker->slow_queues(0);
	is(sql(q(select count(*) from fanout.stat_topics where stalled_since is not null or attempts > 0)), 0, "$name: no topic is refused");
	PgFanout::wait_for_state($node, 'sent');
	my ($transactions) = $out =~ /processed: (\d+)/;
	my $again = sql('select published from fanout.stat_publisher') - $published - $rows * $transactions - 150;
	note("$transactions transactions, $again messages sent again");
	cmp_ok($again, '<', 100, "$name: nearly nothing is sent again");
	return;
}

sql("select fanout.declare_binding('slow' || n, 'g', 'classic') from generate_series(0, 59) n");
PgFanout::flush($node);
PgFanout::Independence::of($node, $broker);

# more than is kept in memory of all of them, most of it in flight, or most of it not: it may
# take a second or three until that is noticed
while_slow('60 slow queues', 60, 2500, 120, within => 3000, longest => 6000);
set('max_in_flight = 100');
while_slow('30 slow queues, little in flight', 30, 400, 100, within => 3000, longest => 6000);

# a turn, and what is in flight then
set('max_channels = 4');
while_slow('four channels for eight', 7, 400, 2, within => 3000, longest => 6000);
PgFanout::Independence::end();

done_testing();
