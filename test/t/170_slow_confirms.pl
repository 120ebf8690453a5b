# A broker that takes longer to confirm than a topic may have its channel for, while others
# wait for one: all arrives, nearly all of it once, and no topic is blamed.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $node = PgFanout::cluster('main', $proxy, conf => q(
pg_fanout.max_channels = 4
pg_fanout.heartbeat = 60s
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub published { return sql('select published from fanout.stat_publisher'); }

# topics that have left the main cursor
sub departures { return sql('select count(*) from fanout.topic_entry'); }

sub publish
{
	my ($topics, $each) = @_;

	sql("select count(fanout.publish('t' || i % $topics + 1, to_jsonb(i))) from generate_series(1, $topics * $each) i");
	# flush() waits for what is declared again, too
	PgFanout::wait_for_state($node, 'sent');
	return;
}

sql("select fanout.declare_binding('t' || i, 'g', 'classic') from generate_series(1, 100) i");
PgFanout::flush($node, timeout => '100 s');

# ---- longer than a turn ----

my $topics = 12;
$proxy->command('delay 2000');
my $before = published();
publish($topics, 4);
my $published = published() - $before;
cmp_ok($published, '<=', 2 * 4 * $topics, 'messages arrive whose confirms take longer than a turn');
note("$published published");
is(sql('select count(*) from fanout.stat_topics where stalled_since is not null or attempts > 0'), 0, 'and no topic is refused for that');

# ---- longer than a turn in which nothing of anybody is confirmed ----

# Beside a queue that hangs, which has a channel, too.
$broker->suspend_queue('t1_g');
$proxy->command('delay 4500');
$before = published();
sql("select count(fanout.publish('t' || i % $topics + 1, to_jsonb(i))) from generate_series(1, $topics) i");
PgFanout::wait_for_state($node, 'sent', where => q(topic <> 't1'));
$published = published() - $before;
cmp_ok($published, '<=', 8 * $topics, 'messages arrive whose confirms take longer than that');
note("$published published");
is(sql(q(select count(*) from fanout.stat_topics where topic <> 't1' and (stalled_since is not null or attempts > 0))), 0, 'and no topic is refused for that either');
$broker->resume_queue('t1_g');
PgFanout::wait_for_state($node, 'sent');

# ---- most topics wait for a channel ----

$proxy->command('delay 150');
$topics = 100;
$before = published();
my $departed = departures();
publish($topics, 20);
# a machine that stands still for seconds makes it some
my $again = published() - $before - 20 * $topics;
cmp_ok($again, '<', $topics, "while a hundred topics take turns, nearly nothing is sent again ($again)");
$departed = departures() - $departed;
cmp_ok($departed, '<', $topics / 3, "and few topics leave the main cursor for waiting ($departed)");

done_testing();
