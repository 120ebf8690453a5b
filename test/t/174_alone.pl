# A topic that was alone for a while, and could fill its window, writes much to a queue that
# hangs, or begins to hang while it does: others are sent all the same.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('main', $broker);

sub sql { return $node->safe_psql('postgres', $_[0]); }

# Tests that a message of another topic is sent; returns how many seconds that takes.
sub other_is_sent
{
	my ($name) = @_;
	my $start = time;

	sql(q(select fanout.publish('other', '1')));
	ok($node->poll_query_until('postgres', q(select state = 'sent' from fanout.outbox_status where topic = 'other' order by id desc limit 1)), $name);
	return time - $start;
}

sql(q(select fanout.declare_binding(t, 'g', 'classic') from unnest('{alone,other}'::text[]) t));
PgFanout::flush($node);
foreach my $round (1 .. 2)
{
	# in which nobody else publishes
	sleep 12;
	$broker->suspend_queue('alone_g');
	sql(q(select count(fanout.publish('alone', to_jsonb(i))) from generate_series(1, 3000) i));
	sleep 1;
	other_is_sent("another topic's message is sent while the queue hangs, $round");
	is(sql(q(select count(*) from fanout.outbox_status where topic = 'alone' and state = 'sent')), 3000 * ($round - 1), 'before the queue goes on');
	is(sql('select reconnects from fanout.stat_publisher'), 0, 'on the same connection');
	$broker->resume_queue('alone_g');
	PgFanout::flush($node);
}
is($broker->count('alone_g'), 6000, 'all is sent once it does');

# ---- it begins to hang while the window is full ----

# The broker reads nothing more from the connection then, unless most of it was with the queue.
my ($flight, $took);
my $rounds = 0;

do
{
	my $published = sql('select published from fanout.stat_publisher');

	$rounds++;
	sleep 12;
	sql(q(select count(fanout.publish('alone', to_jsonb(i))) from generate_series(1, 100000) i));
	$node->poll_query_until('postgres', "select published > $published + 10000 from fanout.stat_publisher") or die;
	$broker->suspend_queue('alone_g');
	sleep 1;
	$flight = sql('select in_flight from fanout.stat_publisher');
	cmp_ok($flight, '>', 800, "a topic that is alone has more in flight than the broker takes for a queue: $flight");
	$took = other_is_sent('its queue begins to hang: another topic is sent');
	# confirm_timeout is a minute
	cmp_ok($took, '<', 25, sprintf('after some seconds (%.1f s)', $took));
	my $reconnects = sql('select reconnects from fanout.stat_publisher');
	cmp_ok(other_is_sent('and the next one'), '<', 3, 'at once');
	is(sql('select reconnects from fanout.stat_publisher'), $reconnects, 'on the same one');
	$broker->resume_queue('alone_g');
	PgFanout::flush($node, timeout => '120 s');
} while ($took <= 1 && $rounds < 10);
is(sql('select reconnects from fanout.stat_publisher'), 1, 'on another connection, where the broker was stuck');
my $all = 6000 + 100000 * $rounds;
# the broker may still have some from the connection before when they come again
my %seen;
my @got = grep { !$seen{ $_->{message_id} }++ } $broker->collect('alone_g', expect => $all);
is(scalar(@got), $all, 'all of it arrives once it goes on');
my $newest = 0;
is(scalar(grep { my $late = $_->{headers}->{sequence} < $newest; $newest = $_->{headers}->{sequence}; $late } @got), 0, 'in order');

# ---- the same with bodies that fill the socket ----

# again, if the queue began to hang at a moment at which little was in flight
foreach my $try (1 .. 10)
{
	sleep 12;
	my $before = sql('select published from fanout.stat_publisher');

	sql(q(select count(fanout.publish('alone', to_jsonb(repeat('x', 8000)))) from generate_series(1, 20000) i));
	$node->poll_query_until('postgres', "select published > $before + 500 from fanout.stat_publisher") or die;
	$broker->suspend_queue('alone_g');
	sleep 1;
	$flight = sql('select in_flight from fanout.stat_publisher');
	last if $flight > 500;
	$broker->resume_queue('alone_g');
	PgFanout::flush($node, timeout => '120 s');
}
cmp_ok($flight, '>', 500, "large bodies: $flight in flight");
$took = other_is_sent('large bodies, and the queue begins to hang: another topic is sent');
cmp_ok($took, '<', 25, sprintf('after some seconds (%.1f s)', $took));
is(sql(q(select count(*) from fanout.stat_topics where stalled_since is not null)), 0, 'no topic is refused for that');
$broker->resume_queue('alone_g');
PgFanout::flush($node, timeout => '120 s');

done_testing();
