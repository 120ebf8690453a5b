# Many topics: channels are bounded, idle topics cost the broker none, and each
# topic's messages arrive, more topics than channels or not.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $topics = 60;

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('main', $broker, conf => q(
pg_fanout.max_channels = 8
));

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub channels { my $n = () = $broker->ctl('-q', 'list_channels', 'pid') =~ /^</mg; return $n; }

sql("select count(fanout.declare_binding('t' || i, 'g', 'classic')) from generate_series(1, $topics) i");
PgFanout::flush($node);
PgFanout::poll(sub { channels() == 0 }, 'no channel');
ok(1, 'topics without messages cost no channel');

sql("select count(fanout.publish('t' || (i % $topics + 1), to_jsonb(i), 'k')) from generate_series(1, 6000) i");
my $most = 0;
for (1 .. 20)
{
	my $n = channels();
	$most = $n if $n > $most;
}
PgFanout::flush($node, timeout => '60 s');
cmp_ok($most, '<=', 8 + 8, "no more channels than pg_fanout.max_channels, besides those for requests ($most)");
my $wrong = 0;
foreach my $topic (1 .. $topics)
{
	my @bodies = map { $_->{body} } $broker->collect("t${topic}_g", expect => 6000 / $topics);
	$wrong++ if join(',', @bodies) ne join(',', sort { $a <=> $b } @bodies) || @bodies != 6000 / $topics;
}
is($wrong, 0, 'with more topics than channels, all messages of each arrive in order');

# One of them does not confirm: it does not keep a channel from the others.
my $vhost = $broker->vhost;
foreach my $topic (1 .. 10)
{
	$broker->ctl('eval', qq({ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"$vhost">>, queue, <<"t${topic}_g">>)), sys:suspend(amqqueue:get_pid(Q)).));
}
sql("select count(fanout.publish('t' || (i % $topics + 1), to_jsonb(i), 'k')) from generate_series(1, 600) i");
$node->poll_query_until('postgres',
	q(select count(*) = 0 from fanout.stat_topics where substr(topic, 2)::int > 10 and pending > 0))
  or die PgFanout::status($node, 'postgres');
ok(1, 'more topics whose queues do not confirm than channels: the others are sent');
foreach my $topic (1 .. 10)
{
	$broker->ctl('eval', qq({ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"$vhost">>, queue, <<"t${topic}_g">>)), sys:resume(amqqueue:get_pid(Q)).));
}
PgFanout::flush($node, timeout => '60 s');
my %seen;
foreach my $topic (1 .. $topics)
{
	$seen{ $_->{message_id} } = 1 foreach $broker->collect("t${topic}_g", expect => 10);
}
is(scalar(keys %seen), 600, 'and these too, once they do');
is(sql('select reconnects from fanout.stat_publisher'), 0, 'on one connection');

done_testing();
