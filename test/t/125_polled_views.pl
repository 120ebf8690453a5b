# What a monitoring system asks again and again costs the same however many messages
# there are.  See also 094_backlog.pl and 124_counts.pl.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $node = PgFanout::cluster('main', $proxy);

sub sql { return $node->safe_psql('postgres', $_[0]); }

# How many blocks a look reads, in whatever functions it calls: that does not depend on
# how busy the machine is.
sub blocks
{
	my ($what) = @_;
	my $look = "explain (analyze, buffers, timing off, summary off, format json) select * from $what";
	# the first look of a session fills its caches
	my (undef, $plan) = split /\n\[/, sql("$look; $look");
	my ($hit, $read) = map { $plan =~ /"Shared $_ Blocks": (\d+)/ } qw(Hit Read);

	return $hit + $read;
}

sub all_cheap
{
	my ($name) = @_;

	foreach my $what (qw(stat_topics stat_publisher stat_subscriptions topics bindings subscriptions backfills sync_comparisons sync_differences
		check_flow() check_topology() check_subscriptions()))
	{
		my $blocks = blocks("fanout.$what");

		# they read up to 130; the waiting room alone has 1,900, and an index of it some 400
		cmp_ok($blocks, '<', 300, "$name: $what reads $blocks blocks");
	}
	return;
}

sql( q(create function fail(m fanout.message) returns void language plpgsql as $$ begin raise 'no'; end $$;
	   select fanout.declare_binding('t', 'g', 'classic');
	   select fanout.declare_binding('s', 'g', 'classic');
	   select fanout.subscribe('s', 'g', 'fail(fanout.message)')));
PgFanout::flush($node);
PgFanout::poll(sub { sql(q(select state from fanout.stat_subscriptions)) eq 'idle' }, 'the subscription to be consumed');
sql(q(select fanout.pause('s', 'g')));
$proxy->command('cut');
PgFanout::wait_for_publisher($node, 'disconnected');
sql(q(select count(fanout.publish('t', jsonb_build_object('n', i), 'k' || i % 100)) from generate_series(1, 300000) i));

# all wait behind a few that failed
sql(q(insert into fanout.waiting (subscription_id, message_id, place, key1, barrier, headers, payload, redelivered, attempts, postponed, error, next_try)
	select subscription_id, gen_random_uuid(), i, i % 100, false, '{}', '{}', false, 1, 0,
		case when i <= 100 then 'no' end, case when i <= 100 then now() end
	from fanout.subscription, generate_series(1, 100000) i));
PgFanout::poll(sub { sql('select exists (select from fanout.publisher_backlog()) and exists (select from fanout.counted)') eq 't' }, 'counting');
all_cheap('300,000 pending, 100,000 in the waiting room');
is(sql(q(select detail from fanout.check_subscriptions() where item like '%succeeds')), '100 messages failed and will be tried again',
	'those that failed are counted');

sql(q(update fanout.waiting set error = 'no', next_try = now()));
all_cheap('all 100,000 failed');
is(sql(q(select detail from fanout.check_subscriptions() where item like '%succeeds')), 'more than 1000 messages failed and will be tried again',
	'up to a thousand');

sql(q(update fanout.subscription set on_failure = 'requeue', ordered = false));
sql(q(update fanout.waiting set requeued = true));
is(sql(q(select detail from fanout.check_subscriptions() where item like '%succeeds')), 'more than 1000 messages failed and will be tried again',
	'so are those that wait in their queue');

done_testing();
