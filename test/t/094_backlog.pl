# What fanout.stat_topics says of messages that wait: it is true, and costs the same
# however many there are.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $rows = 300_000;

my $broker = PgFanout::broker(private => 1);
my $proxy = $broker->proxy;
my $node = PgFanout::cluster('main', $proxy, conf => "pg_fanout.retry_interval = 200ms\n");

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub publish
{
	my ($topic, $count) = @_;

	sql("select count(fanout.publish('$topic', to_jsonb(i), 'k' || i % 100)) from generate_series(1, $count) i");
	return;
}

# What the publisher has counted, and what there is.
sub shows
{
	my ($topic, $column, $expected, $name) = @_;

	my $known = 'exists (select from fanout.backlog())';

	ok( $node->poll_query_until('postgres', "select $known and $column = $expected from fanout.stat_topics where topic = '$topic'"),
		$name)
	  or diag(sql(q(select topic, pending, held from fanout.stat_topics)));
	is( sql(qq(select count(*) from fanout.pending p join fanout.topic t using (topic_id) where topic = '$topic')),
		$expected, "$name: as many are there");
	return;
}

sub new_publisher
{
	my $pid = PgFanout::publisher_pid($node);

	sql("select pg_terminate_backend($pid)");
	PgFanout::poll(sub { sql('select coalesce(max(pid), 0) from fanout.stat_publisher') !~ /^($pid|0)$/ }, 'a new publisher');
	return;
}

# The median of a few, in ms.
sub time_of_view
{
	my @times = sort { $a <=> $b }
	  map { /Execution Time: ([\d.]+)/ } map { sql('explain (analyze, timing off) select * from fanout.stat_topics') } 1 .. 9;

	return $times[4];
}

sql( q(select fanout.declare_binding('t', 'g', 'classic');
	   select fanout.declare_binding('paused', 'g', 'classic');
	   select fanout.declare_binding('idle', 'g', 'classic')));
PgFanout::flush($node);

# ---- without a broker ----

$proxy->command('cut');
PgFanout::wait_for_publisher($node, 'disconnected');
publish('t', 10);
shows('t', 'pending', 10, 'what waits while the broker is away is counted');
my $open = PgFanout::session($node);
PgFanout::run_in($open, q(begin; select count(fanout.publish('t', '1')) from generate_series(1, 5)));
publish('t', 20);
shows('t', 'pending', 30, 'what is not committed is not');
PgFanout::run_in($open, 'commit');
shows('t', 'pending', 35, 'once it is, it is counted, too');
sql(q(begin; select count(fanout.publish('t', '1')) from generate_series(1, 5); rollback));
publish('t', $rows);
shows('t', 'pending', $rows + 35, 'so are very many, and nothing that was rolled back');
is(sql(q(select oldest_pending_age between '0' and '10 min' from fanout.stat_topics where topic = 't')), 't', 'the oldest one has an age');
is(sql(q(select oldest_pending_age is null from fanout.stat_topics where topic = 'idle')), 't', 'where nothing waits there is none');
my $time = time_of_view();
cmp_ok($time, '<', 5, "with $rows messages that wait, looking takes $time ms");

new_publisher();
shows('t', 'pending', $rows + 35, 'another publisher finds them all again');
publish('t', 7);
shows('t', 'pending', $rows + 42, 'and what is added');

# ---- the broker comes back ----

$proxy->command('pass');
PgFanout::poll(sub { sql('select confirmed > 1000 from fanout.stat_publisher') eq 't' }, 'messages to be sent');
$proxy->command('cut');
PgFanout::wait_for_publisher($node, 'disconnected');
publish('t', 5);
my $left = sql(q(select count(*) from fanout.pending));
cmp_ok($left, '<', $rows, 'some of them are sent');
shows('t', 'pending', $left, 'the rest is known when the broker goes away in the middle');
$proxy->command('pass');
PgFanout::flush($node, timeout => '120 s');
# what was in flight goes again
cmp_ok($broker->count('t_g'), '>=', $rows + 47, 'all of it arrives');
shows('t', 'pending', 0, 'and nothing waits any more');
is(sql(q(select oldest_pending_age is null from fanout.stat_topics where topic = 't')), 't', 'of any age');

# ---- paused ----

sql(q(select fanout.pause('paused')));
publish('paused', 1000);
publish('t', 1);
shows('paused', 'held', 1000, 'what waits for a topic that is paused is counted');
new_publisher();
publish('paused', 10);
shows('paused', 'held', 1010, 'also by another publisher');
$proxy->command('cut');
PgFanout::wait_for_publisher($node, 'disconnected');
publish('paused', 10);
new_publisher();
shows('paused', 'held', 1020, 'and by one that has no broker');
sql(q(select fanout.purge('paused', held => true)));
ok($node->poll_query_until('postgres', q(select held = 0 from fanout.stat_topics where topic = 'paused')), 'what is purged waits no longer');
publish('paused', 3);
shows('paused', 'held', 3, 'what comes after that does');
$proxy->command('pass');
sql(q(select fanout.resume('paused')));
PgFanout::flush($node);
shows('paused', 'pending + held', 0, 'until it is sent');

# ---- refused ----

$broker->amqp('delete', '--queue', 'paused_g');
publish('paused', 300);
ok($node->poll_query_until('postgres', q(select pending + held = 300 from fanout.stat_topics where topic = 'paused') .
			q( or exists (select from fanout.stat_topics where topic = 'paused' and sent >= 1003))),
	'what is refused waits');
PgFanout::flush($node);
shows('paused', 'pending + held', 0, 'until it is accepted');

done_testing();
