# Many topics: channels are bounded, idle topics cost the broker none, and each
# topic's messages arrive, more topics than channels or not.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $topics = 60;

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('main', $broker, conf => q(
pg_fanout.max_channels = 8
));

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub channels { return $broker->evaluate('length(rabbit_channel:list())'); }
# of the node's life
sub opened { return $broker->evaluate('[{_, _, _, N, _, _, _, _}] = ets:lookup(connection_churn_metrics, node()), N'); }

sql("select count(fanout.declare_binding('t' || i, 'g', 'classic')) from generate_series(1, $topics) i");
PgFanout::flush($node);
PgFanout::poll(sub { channels() == 0 }, 'no channel');
ok(1, 'topics without messages cost no channel');

my $opened = opened();
sql("select count(fanout.publish('t' || (i % $topics + 1), to_jsonb(i), 'k')) from generate_series(1, 6000) i");
my $most = 0;
for (1 .. 20)
{
	my $n = channels();
	$most = $n if $n > $most;
}
PgFanout::flush($node);
# a slow broker lists those as well that are being closed, while the next ones are opened
cmp_ok($most, '<=', 4 * 8, "no more channels than pg_fanout.max_channels, besides those for requests ($most)");
$opened = opened() - $opened;
cmp_ok($opened, '<', $topics / 2, "topics hand them over to each other: $opened were opened");
my @queues = map { "t${_}_g" } 1 .. $topics;
my %bodies;
push @{ $bodies{ $_->{exchange} } }, $_->{body} foreach $broker->collect(\@queues, expect => 6000);
my $wrong = 0;
foreach my $topic (1 .. $topics)
{
	my @arrived = @{ $bodies{"t$topic"} || [] };
	$wrong++ if join(',', @arrived) ne join(',', sort { $a <=> $b } @arrived) || @arrived != 6000 / $topics;
}
is($wrong, 0, 'with more topics than channels, all messages of each arrive in order');

# One of them does not confirm: it does not keep a channel from the others.
$broker->suspend_queue("t${_}_g") foreach 1 .. 10;
sql("select count(fanout.publish('t' || (i % $topics + 1), to_jsonb(i), 'k')) from generate_series(1, 600) i");
$node->poll_query_until('postgres',
	q(select count(*) = 0 from fanout.stat_topics where substr(topic, 2)::int > 10 and pending > 0))
  or die PgFanout::status($node, 'postgres');
ok(1, 'more topics whose queues do not confirm than channels: the others are sent');
$broker->resume_queue("t${_}_g") foreach 1 .. 10;
PgFanout::flush($node);
my %seen = map { $_->{message_id} => 1 } $broker->collect(\@queues, expect => 600);
is(scalar(keys %seen), 600, 'and these too, once they do');
is(sql('select reconnects from fanout.stat_publisher'), 0, 'on one connection');

# ---- other limits ----

# The channels of one turn are kept for a minute: without more of them, that is how long others wait.
sub all_sent_soon
{
	my ($name) = @_;

	sql("select count(fanout.publish('t' || i, to_jsonb(i))) from generate_series(1, $topics) i");
	ok(sql(q(select fanout.flush('30 s'))) eq 't', $name) or diag(PgFanout::status($node, 'postgres'));
	$broker->amqp('purge', map { ('--queue', $_) } @queues);
	return;
}

$node->append_conf('postgresql.conf', 'pg_fanout.max_channels = 256');
$node->reload;
all_sent_soon('a higher limit holds as soon as it is set');
cmp_ok(channels(), '>=', $topics, 'and each topic has a channel');
$broker->evaluate('application:set_env(rabbit, channel_max, 70)');
PgFanout::new_publisher($node);
all_sent_soon('a broker that allows fewer channels than the setting: topics take turns with these');
$broker->evaluate('application:set_env(rabbit, channel_max, 2047)');

$broker->evaluate('application:set_env(rabbit, channel_max, 65)');
PgFanout::new_publisher($node);
all_sent_soon('and with one that allows few');
cmp_ok(channels(), '<=', 65, 'with no more than that');
# what is declared on them is not answered: a channel that is given up then stays open
$broker->suspend_queue("t${_}_g") foreach 1 .. 10;
PgFanout::new_publisher($node);
sql("select count(fanout.publish('t' || i, to_jsonb(i))) from generate_series(1, $topics) i");
ok($node->poll_query_until('postgres', q(select count(*) = 50 from fanout.stat_topics where substr(topic, 2)::int > 10 and pending = 0 and sent > 0 and stalled_since is null))
	&& $node->poll_query_until('postgres', q(select count(*) = 0 from fanout.outbox_status where substr(topic, 2)::int > 10 and state <> 'sent')),
	'with few channels, topics are declared and sent whatever queues hang') or diag(PgFanout::status($node, 'postgres'));
$broker->resume_queue("t${_}_g") foreach 1 .. 10;
sql("select fanout.resume('t' || i) from generate_series(1, 10) i");
PgFanout::wait_for_state($node, 'sent');
$broker->amqp('purge', map { ('--queue', $_) } @queues);
$broker->evaluate('application:set_env(rabbit, channel_max, 64)');
PgFanout::new_publisher($node);
PgFanout::poll(sub { sql(q(select last_error ~ 'allows only 64 channels per connection, 65 are needed' from fanout.stat_publisher)) eq 't' },
	sub { PgFanout::status($node, 'postgres') });
ok(1, 'one that allows fewer than are needed is an error that says so');
$broker->evaluate('application:set_env(rabbit, channel_max, 2047)');
PgFanout::flush($node);

# ---- more queues do not confirm than there are channels, and nobody else's messages are ----

$node->append_conf('postgresql.conf', "pg_fanout.max_channels = 4\npg_fanout.confirm_timeout = 60s");
$node->reload;
PgFanout::new_publisher($node);
PgFanout::flush($node);
# a second after its start the publisher declares them once more, which a queue that hangs does not answer
sleep 2;
PgFanout::flush($node);
$broker->suspend_queue("t${_}_g") foreach 1 .. 16;
sql("select count(fanout.publish('t' || i, to_jsonb(i))) from generate_series(1, 16) i");
$node->poll_query_until('postgres', 'select in_flight > 0 from fanout.stat_publisher') or die;
my @took;
foreach my $n (1 .. 4)
{
	my $start = time;

	sql(q(select fanout.publish('t60', '1')));
	$node->poll_query_until('postgres', q(select state = 'sent' from fanout.outbox_status where topic = 't60' order by id desc limit 1)) or die PgFanout::status($node, 'postgres');
	push @took, time - $start;
	sleep 3;
}
# one of them keeps its channel, the others have one for 3 s before it is found out that they hang
cmp_ok($took[0], '<', 40, sprintf('another topic waits until it is known that they hang, %.1f s', $took[0]));
my ($longest) = sort { $b <=> $a } @took[ 1 .. 3 ];
cmp_ok($longest, '<', 3, sprintf('and then not for their turns, %.1f s at most', $longest));
$broker->resume_queue("t${_}_g") foreach 1 .. 16;
PgFanout::flush($node);
is(sql('select count(*) from fanout.stat_topics where attempts > 0'), 0, 'none of them was refused');
$broker->amqp('purge', map { ('--queue', $_) } @queues);
PgFanout::poll(sub { channels() <= 4 }, 'channels');

# ---- a channel that is not used for a while ----

# The server's clocks go forward by a minute, so that nobody waits for it.
my ($faketime) = glob '/usr/lib/*/faketime/libfaketime.so.1';
my $offset = PostgreSQL::Test::Utils::tempdir() . '/offset';

die 'libfaketime is not installed' unless $faketime;
append_to_file($offset, "+0\n");
$node->append_conf('postgresql.conf', 'pg_fanout.heartbeat = 0');
$node->stop;
{
	local %ENV = (%ENV, LD_PRELOAD => $faketime, FAKETIME_TIMESTAMP_FILE => $offset, FAKETIME_NO_CACHE => 1,
		FAKETIME_DISABLE_SHM => 1, NO_FAKE_STAT => 1);
	$node->start;
}
sql(q(select fanout.publish('t1', '1')));
PgFanout::flush($node);
cmp_ok(channels(), '>', 0, 'a topic that has had messages keeps its channel for the next ones');
append_to_file("$offset.new", "+61\n");
rename "$offset.new", $offset or die "$offset: $!";
# what is told asks nothing of the channels themselves, which may be stuck
my $left = '{[{C, erlang:process_info(C, [current_stacktrace, message_queue_len])} || C <- rabbit_channel:list()], ets:tab2list(channel_created)}';
PgFanout::poll(sub { channels() == 0 }, sub { 'the channel to be closed: ' . $broker->evaluate($left) . PgFanout::status($node, 'postgres') });
is(sql('select connected_to is not null, reconnects from fanout.stat_publisher'), 't|0', 'after a minute without any it is closed, and the connection is not');
sql(q(select fanout.publish('t1', '2')));
PgFanout::flush($node);
is_deeply([ map { $_->{body} } $broker->collect('t1_g', expect => 2) ], [ 1, 2 ], 'the next message gets a new one');

done_testing();
