# A topic that was alone for a while, and could fill its window, writes much to a queue that
# hangs: others are sent all the same.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('main', $broker);

sub sql { return $node->safe_psql('postgres', $_[0]); }

sql(q(select fanout.declare_binding(t, 'g', 'classic') from unnest('{alone,other}'::text[]) t));
PgFanout::flush($node);
foreach my $round (1 .. 2)
{
	# in which nobody else publishes
	sleep 12;
	$broker->suspend_queue('alone_g');
	sql(q(select count(fanout.publish('alone', to_jsonb(i))) from generate_series(1, 3000) i));
	sleep 1;
	sql(q(select fanout.publish('other', '1')));
	ok($node->poll_query_until('postgres', q(select state = 'sent' from fanout.outbox_status where topic = 'other' order by id desc limit 1)),
		"another topic's message is sent while the queue hangs, $round");
	is(sql(q(select count(*) from fanout.outbox_status where topic = 'alone' and state = 'sent')), 3000 * ($round - 1), 'before the queue goes on');
	is(sql('select reconnects from fanout.stat_publisher'), 0, 'on the same connection');
	$broker->resume_queue('alone_g');
	PgFanout::flush($node);
}
is($broker->count('alone_g'), 6000, 'all is sent once it does');

done_testing();
