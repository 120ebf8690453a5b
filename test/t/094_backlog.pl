# What fanout.stat_topics says of messages that wait: it is true, and costs the same
# however many there are.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $rows = 300_000;

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $node = PgFanout::cluster('main', $proxy, conf => "pg_fanout.retry_interval = 200ms\n");

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub publish
{
	my ($topic, $count) = @_;

	sql("select count(fanout.publish('$topic', jsonb_build_object('n', i), 'k' || i % 100)) from generate_series(1, $count) i");
	return;
}

# What the publisher has counted, and what there is.
sub shows
{
	my ($topic, $column, $expected, $name) = @_;

	my $known = 'exists (select from fanout.publisher_backlog())';

	ok( $node->poll_query_until('postgres', "select $known and $column = $expected from fanout.stat_topics where topic = '$topic'"),
		$name)
	  or diag(sql(q(select topic, pending, held from fanout.stat_topics)));
	is( sql(qq(select count(*) from fanout.pending p join fanout.topic t using (topic_id) where topic = '$topic')),
		$expected, "$name: as many are there");
	return;
}

# Compares the ids of all messages of a topic that the outbox has with those in a queue.
sub same_messages
{
	my ($topic, $queue, $name) = @_;
	my $file = "$PostgreSQL::Test::Utils::tmp_check/arrived_$queue";
	my @there = split /\n/, sql(qq(select message_id from fanout.outbox join fanout.topic using (topic_id)
		where topic = '$topic' order by message_id));

	# what the collector has got and not acked when it ends is in the queue again
	while ($broker->count($queue) > 0)
	{
		my $collector = IPC::Run::start(
			[ "$PgFanout::lib/collector", '--uri', $broker->uri, '--out', $file, '--queue', $queue ],
			'<', \undef, '>', \my $out, '2>', \my $err);

		PgFanout::poll(sub { $broker->count($queue) == 0 }, "$queue to be empty", 600);
		$collector->signal('TERM');
		$collector->finish;
	}
	my %arrived = map { (split /\t/)[2] => 1 } split /^/, slurp_file($file);
	my $same = @there == keys(%arrived) && !grep { !$arrived{$_} } @there;
	ok($same, $name) or diag(scalar(@there) . ' were written, ' . keys(%arrived) . ' arrived');
	return;
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
PgFanout::run_in($open, q(begin; select count(fanout.publish('t', '{}')) from generate_series(1, 5)));
publish('t', 20);
shows('t', 'pending', 30, 'what is not committed is not');
PgFanout::run_in($open, 'commit');
shows('t', 'pending', 35, 'once it is, it is counted, too');
sql(q(begin; select count(fanout.publish('t', '{}')) from generate_series(1, 5); rollback));
my $is_quick = PgFanout::quick_view($node, 'fanout.stat_topics');
publish('t', $rows);
shows('t', 'pending', $rows + 35, 'so are very many, and nothing that was rolled back');
is(sql(q(select oldest_pending_age between '0' and '10 min' from fanout.stat_topics where topic = 't')), 't', 'the oldest one has an age');
is(sql(q(select oldest_pending_age is null from fanout.stat_topics where topic = 'idle')), 't', 'where nothing waits there is none');
$is_quick->("with $rows messages that wait");

PgFanout::new_publisher($node);
shows('t', 'pending', $rows + 35, 'another publisher finds them all again');
publish('t', 7);
shows('t', 'pending', $rows + 42, 'and what is added');

# ---- the broker comes back ----

$proxy->command('pass');
PgFanout::poll(sub { sql('select confirmed > 1000 from fanout.stat_publisher') eq 't' }, 'messages to be sent');
$proxy->command('cut');
PgFanout::wait_for_publisher($node, 'disconnected');
publish('t', 5);
# what was confirmed last is recorded a moment later, so that both may still change
my ($left, $told) = ($rows, '');
eval {
	PgFanout::poll(
		sub {
			$left = sql(q(select count(*) from fanout.pending));
			$told = sql(q(select pending from fanout.stat_topics where topic = 't'));
			return $left < $rows && $told eq $left;
		},
		'what was confirmed to be recorded');
};
cmp_ok($left, '<', $rows, 'some of them are sent');
is($told, $left, 'the rest is known when the broker goes away in the middle');
$proxy->command('pass');
PgFanout::flush($node, timeout => '600 s');
same_messages('t', 't_g', 'every message arrives');
shows('t', 'pending', 0, 'and nothing waits any more');
is(sql(q(select oldest_pending_age is null from fanout.stat_topics where topic = 't')), 't', 'of any age');

# ---- paused ----

sql(q(select fanout.pause('paused')));
publish('paused', 1000);
publish('t', 1);
shows('paused', 'held', 1000, 'what waits for a topic that is paused is counted');
PgFanout::new_publisher($node);
publish('paused', 10);
shows('paused', 'held', 1010, 'also by another publisher');
$proxy->command('cut');
PgFanout::wait_for_publisher($node, 'disconnected');
publish('paused', 10);
PgFanout::new_publisher($node);
shows('paused', 'held', 1020, 'and by one that has no broker');
sql(q(select fanout.purge('paused', held => true)));
ok($node->poll_query_until('postgres', q(select held = 0 from fanout.stat_topics where topic = 'paused')), 'what is purged waits no longer');
publish('paused', 3);
shows('paused', 'held', 3, 'what comes after that does');
$proxy->command('pass');
sql(q(select fanout.resume('paused')));
PgFanout::flush($node);
shows('paused', 'pending + held', 0, 'until it is sent');

# ---- purged just after it was written ----

sql(q(select fanout.pause('paused')));
foreach my $i (1 .. 10)
{
	publish('paused', 20);
	sql(q(select fanout.purge('paused', held => true)));
}
is(sql(q(select fanout.flush('60 s'))), 't', 'flush() does not wait for what was purged');
shows('paused', 'held', 0, 'nor is it counted');
my @ids = split /\n/, sql(q(select fanout.publish('paused', to_jsonb(i)) from generate_series(1, 3) i));
shows('paused', 'held', 3, 'what comes after it is');
sql("select fanout.purge('paused', held => true, message_id => '$ids[1]')");
ok($node->poll_query_until('postgres', q(select held = 2 from fanout.stat_topics where topic = 'paused')), 'a single one that is purged is not');
is(sql(q(select fanout.flush('1 s'))), 'f', 'flush() waits for the others');
PgFanout::new_publisher($node);
shows('paused', 'held', 2, 'another publisher does not count it either');
sql(q(select fanout.resume('paused')));
PgFanout::flush($node);
shows('paused', 'pending + held', 0, 'until they are sent');

# ---- many topics without the main cursor ----

my $expected = q(select topic, count(p.id) from fanout.topic left join fanout.pending p using (topic_id) group by topic order by topic);
my $shown = q(select topic, pending + held from fanout.stat_topics order by topic);

sub same_figures
{
	my ($name) = @_;

	PgFanout::poll(sub { sql('select exists (select from fanout.publisher_backlog())') eq 't' }, 'counting');
	PgFanout::poll(sub { sql($shown) eq sql($expected) }, $name);
	ok(1, $name);
	return;
}

sql(q(select fanout.declare_binding('many' || i, 'g', 'classic') from generate_series(1, 50) i));
PgFanout::flush($node);
sql(q(select fanout.pause('many' || i) from generate_series(1, 50) i));
sql(q(select count(fanout.publish('many' || i, to_jsonb(n))) from generate_series(1, 200) n, generate_series(1, 50) i where n <= i));
same_figures('the messages of many paused topics are counted');
PgFanout::new_publisher($node);
same_figures('also by another publisher');
$proxy->command('cut');
PgFanout::wait_for_publisher($node, 'disconnected');
sql(q(select fanout.resume('many' || i) from generate_series(1, 25) i));
sql(q(select count(fanout.publish('many' || i, to_jsonb(n))) from generate_series(1, 20) n, generate_series(1, 50) i));
PgFanout::new_publisher($node);
same_figures('and where some are resumed while the broker is away');
is(sql(q(select sum(pending) from fanout.stat_topics where topic like 'many%')), 25 * 26 / 2 + 25 * 20, 'which are pending then');
$proxy->command('pass');
PgFanout::poll(sub { sql(q(select coalesce(sum(pending), 0) from fanout.stat_topics)) eq '0' }, 'these to be sent');
same_figures('once they are sent, the others still wait');
sql(q(select fanout.resume('many' || i) from generate_series(1, 50) i));
PgFanout::flush($node);
ok($node->poll_query_until('postgres', 'select sum(pending + held) = 0 from fanout.stat_topics'), 'in the end nothing does');

# ---- refused ----

$broker->amqp('delete', '--queue', 'paused_g');
my $sent = sql(q(select sent from fanout.stat_topics where topic = 'paused'));
publish('paused', 300);
ok( $node->poll_query_until('postgres', "select pending + held = 300 or sent > $sent from fanout.stat_topics where topic = 'paused'"),
	'what is refused waits');
PgFanout::flush($node);
shows('paused', 'pending + held', 0, 'until it is accepted');

done_testing();
