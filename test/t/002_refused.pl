# What the broker refuses is not marked sent, is not lost, keeps its order, and
# hurts nobody else: returns, nacks, 404, 406, messages that are too large.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use IPC::Run ();
use JSON::XS ();
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

# its own: the largest message is a setting of the whole broker
my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster(
	'main', $broker,
	conf => q(
pg_fanout.retry_interval = 200ms
pg_fanout.retry_limit = 3
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub stalled
{
	my ($topic, $reason) = @_;

	$node->poll_query_until('postgres',
		"select reason ~ '$reason' from fanout.stat_topics where topic = '$topic'")
	  or die PgFanout::status($node, 'postgres');
	return;
}

# Sequence headers of a queue's messages, in the order of their arrival.
sub sequences
{
	return map { $_->{headers}->{sequence} } @_;
}

# Within each key, later messages must have higher sequences, once repeats of
# a message id are taken out.
sub out_of_order
{
	my (%last, %seen, $wrong);

	foreach my $message (@_)
	{
		next if $seen{ $message->{message_id} }++;
		my $key = $message->{headers}->{key};
		$wrong++ if ($last{$key} || 0) > $message->{headers}->{sequence};
		$last{$key} = $message->{headers}->{sequence};
	}
	return $wrong || 0;
}

sql(q(select fanout.declare_binding('healthy', 'g', 'classic')));

# ---- unroutable ----

sql( q(select fanout.declare_topic('lonely');
	   select fanout.publish('lonely', to_jsonb(i), 'k' || i % 3) from generate_series(1, 20) i;));
stalled('lonely', 'NO_ROUTE');
is( sql(q(select state, count(*), count(sent_at) from fanout.outbox_status where topic = 'lonely' group by 1)),
	'held|20|0',
	'a message returned as unroutable is not marked sent');
is(sql(q(select fanout.publish('healthy', '1') is not null)), 't', 'publish');
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'healthy'));
pass('another topic flows meanwhile');

sql(q(select fanout.declare_binding('lonely', 'g', 'classic')));
PgFanout::flush($node);
my @messages = $broker->collect('lonely_g', expect => 20);
is_deeply([ map { $_->{body} } @messages ],
	[ 1 .. 20 ], 'once a queue is bound, all of them arrive in order');
is( sql(q(select state, count(*), count(sent_at) from fanout.outbox_status where topic = 'lonely' group by 1)),
	'sent|20|20',
	'and are marked sent');

# ---- exhausted: hold ----

sql(q(select fanout.declare_topic('hold'); select fanout.publish('hold', '1')));
$node->poll_query_until('postgres',
	q(select attempts >= 3 from fanout.stat_topics where topic = 'hold'));
like(
	slurp_file($node->logfile),
	qr/WARNING:  topic "hold" was refused by the broker 3 times/,
	'past the retry limit the log says so');
is(sql(q(select state from fanout.outbox_status where topic = 'hold')),
	'held', 'and with on_exhausted = hold the message goes on waiting');

# ---- exhausted: dead_letter ----

sql( q(select fanout.declare_topic('bury', on_exhausted => 'dead_letter');
	   select fanout.publish('bury', to_jsonb(i), 'k') from generate_series(1, 2) i;));
$node->poll_query_until('postgres',
	q(select count(*) = 2 from fanout.dead_letter where topic = 'bury'))
  or die PgFanout::status($node, 'postgres');
is( sql(q(select payload, attempts, reason ~ 'NO_ROUTE' from fanout.dead_letter order by id)),
	"1|3|t\n2|3|t",
	'with on_exhausted = dead_letter each message gets its attempts, then goes to fanout.dead_letter');
is( sql(q(select state, count(*) from fanout.outbox_status where topic = 'bury' group by 1)),
	'dead|2',
	'and is shown as dead');
sql(q(select fanout.declare_binding('bury', 'g', 'classic')));
is(sql(q(select fanout.redrive('bury'))), 2, 'redrive takes them back');
$node->poll_query_until('postgres',
	q(select count(*) = 2 from fanout.outbox_status where topic = 'bury' and state = 'sent'))
  or die PgFanout::status($node, 'postgres');
is_deeply([ map { $_->{body} } $broker->collect('bury_g', expect => 2) ],
	[ 1, 2 ], 'and they arrive in order');

# ---- dead letters of a topic that is dropped ----

sql( q(select fanout.declare_topic('dropped', on_exhausted => 'dead_letter');
	   select fanout.publish('dropped', to_jsonb(i), 'k') from generate_series(1, 2) i;));
$node->poll_query_until('postgres',
	q(select count(*) = 2 from fanout.dead_letter where topic = 'dropped'))
  or die PgFanout::status($node, 'postgres');
sql(q(select fanout.pause('dropped')));
$node->poll_query_until('postgres', q(select exists (select from fanout.detached join fanout.topic using (topic_id) where topic = 'dropped')))
  or die PgFanout::status($node, 'postgres');
sql(q(select fanout.drop_topic('dropped')));
$node->poll_query_until('postgres', q(select not exists (select from fanout.topics where topic = 'dropped')))
  or die PgFanout::status($node, 'postgres');
is(sql(q(select count(*) from fanout.dead_letter where topic = 'dropped')), 2, 'dead letters outlive their topic, paused or not');
my ($redriven, $notice);
$node->psql('postgres', 'select fanout.redrive()', stdout => \$redriven, stderr => \$notice);
is($redriven, 0, 'redrive leaves them');
like($notice, qr/NOTICE:  dead letters of topics that were dropped stay: 2.*"dropped"/s, 'and says so');
sql(q(select fanout.declare_binding('dropped', 'g', 'classic')));
is(sql(q(select fanout.redrive('dropped'))), 2, 'once the topic is declared again, redrive takes them back');
is_deeply([ map { $_->{body} } $broker->collect('dropped_g', expect => 2) ], [ 1, 2 ], 'and they arrive');
is(sql(q(select fanout.purge('hold', held => true))), 1, 'purge gives held messages up');
PgFanout::flush($node);

# ---- nacked: a full queue that rejects ----

sql( q(select fanout.declare_binding('full', 'g', 'classic', '{"x-max-length": 10, "x-overflow": "reject-publish"}');
	   select fanout.publish('full', to_jsonb(i), 'k' || i % 7) from generate_series(1, 60) i;));
stalled('full', 'nacked');
my @arrived;
for (1 .. 60)
{
	push @arrived, $broker->collect('full_g', idle => 0.2);
	last if sql(q(select count(*) from fanout.outbox_status where topic = 'full' and state <> 'sent')) == 0;
	sql(q(select fanout.resume('full')));
}
push @arrived, $broker->collect('full_g', idle => 1);
my %ids = map { $_->{message_id} => 1 } @arrived;
is(scalar(keys %ids), 60, 'a full queue that is emptied by and by gets every message');
is(scalar(@arrived), 60, 'none of them twice');
is(out_of_order(@arrived), 0, 'and no retry lets a later message of the same key overtake');
cmp_ok(sql('select nacked from fanout.stat_publisher'), '>', 0, 'although messages were nacked');

# The same with a consumer that is always there: acks and nacks of one window
# are mixed, and what is refused must hold back what comes after it.
sql( q(select fanout.declare_binding('busy', 'g', 'classic', '{"x-max-length": 20, "x-overflow": "reject-publish"}');
	   select fanout.flush('5 s')));
my $lines = "$PostgreSQL::Test::Utils::tmp_check/busy.jsonl";
my $consumer = IPC::Run::start(
	[
		"$PgFanout::lib/amqp", 'collect', '--uri', $broker->uri, '--queue', 'busy_g',
		'--expect', 3000, '--timeout', 300, '--idle', 3, '--ack'
	],
	'<', \undef, '>', $lines);
sql(q(select fanout.publish('busy', to_jsonb(i), 'k' || i % 40) from generate_series(1, 3000) i));
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'busy'));
$consumer->finish;
my $json = JSON::XS->new->utf8;
@arrived = map { $json->decode($_) } split(/\n/, slurp_file($lines));
%ids = map { $_->{message_id} => 1 } @arrived;
is(scalar(keys %ids), 3000, 'a queue that is full time and again gets every message');
# what it took behind one that it had refused came again, behind that one
is(PgFanout::overtaken(@arrived), 0, 'in order per key');

# ---- 404: the exchange is deleted under load ----

sql(q(select fanout.declare_binding('gone', 'g', 'classic')));
PgFanout::flush($node);
$broker->amqp('delete', '--exchange', 'gone');
sql(q(select fanout.publish(case when i % 2 = 0 then 'gone' else 'healthy' end, to_jsonb(i), 'k' || i % 7)
	  from generate_series(1, 2000) i));
PgFanout::flush($node);
@messages = $broker->collect('gone_g', expect => 1000);
%ids = map { $_->{message_id} => 1 } @messages;
is(scalar(keys %ids), 1000, 'an exchange deleted by somebody comes back, and nothing is lost');
is(out_of_order(@messages), 0, 'in order per key');
$broker->amqp('delete', '--queue', 'gone_g');
sql(q(select fanout.publish('gone', to_jsonb(i), 'k') from generate_series(1, 10) i));
PgFanout::flush($node);
is_deeply([ map { $_->{body} } $broker->collect('gone_g', expect => 10) ],
	[ 1 .. 10 ], 'so does a deleted queue');

# one of two queues is deleted: nothing is returned, for the other takes all
sql( q(alter system set pg_fanout.retention = '8s'));	# maintenance every 2 s
sql('select pg_reload_conf()');
sql(q(select fanout.declare_binding('gone', 'second', 'classic')));
PgFanout::flush($node);
$broker->amqp('delete', '--queue', 'gone_g');
PgFanout::poll(sub { $broker->ctl('-q', 'list_queues', '-p', $broker->vhost, 'name') =~ /^gone_g$/m },
	'the deleted queue', 90);
pass('a queue deleted from among several comes back by and by');
sql('alter system reset pg_fanout.retention');
sql('select pg_reload_conf()');

# ---- 406: a queue exists with other arguments ----

$broker->amqp('declare', '--queue', 'other_g', '--arguments', '{"x-max-length": 5}');
sql( q(select fanout.declare_binding('other', 'g', 'classic');
	   select fanout.declare_binding('other', 'fine', 'classic');
	   select fanout.publish('other', to_jsonb(i), 'k') from generate_series(1, 10) i;));
stalled('other', 'PRECONDITION_FAILED');
# the answers about queues are recorded after the stall
$node->poll_query_until('postgres',
	q(select bool_and(state <> 'pending') from fanout.bindings where topic = 'other'))
  or die PgFanout::status($node, 'postgres');
like( sql(q(select last_error from fanout.bindings where queue = 'other_g')),
	qr/^406 PRECONDITION_FAILED - inequivalent arg 'x-max-length'/,
	'a queue declared otherwise is an error of its binding, in the words of the broker');
is(sql(q(select state from fanout.bindings where queue = 'other_fine')),
	'declared', 'the other queue of the topic is declared');
is(sql(q(select count(*) from fanout.outbox_status where topic = 'other' and state = 'held')),
	10, 'the topic waits: published now, its messages would miss a queue');
like(sql(q(select detail from fanout.check() where item = 'queue "other_g"' and not ok)),
	qr/inequivalent/, 'check() names it');
$broker->amqp('delete', '--queue', 'other_g');
PgFanout::flush($node);
is($broker->count('other_g'), 10, 'repaired on the broker, it flows by itself');
is($broker->count('other_fine'), 10, 'to all its queues');

# ---- a message that the broker never takes ----

sql(q(select fanout.declare_binding('large', 'g', 'classic')));
PgFanout::flush($node);
sql( q(select fanout.publish('large', to_jsonb(i), 'k' || i) from generate_series(1, 50) i;
	   select fanout.publish('large', '1', 'headers', headers => jsonb_build_object('big', repeat('x', 100000)));
	   select fanout.publish('large', to_jsonb(i), 'k' || i) from generate_series(51, 100) i;));
$node->poll_query_until('postgres',
	q(select count(*) = 100 from fanout.outbox_status where topic = 'large' and state = 'sent'))
  or die PgFanout::status($node, 'postgres');
is( sql(q(select key, attempts, reason <> '' from fanout.dead_letter where topic = 'large')),
	'headers|0|t',
	'headers that fit no frame: that message is dead at once, its neighbours are sent');
sql(q(select fanout.purge('large')));
$broker->collect('large_g', expect => 100);

# the broker looks at its limit when a channel is opened
sub limit_messages
{
	my ($bytes) = @_;

	$broker->evaluate("application:set_env(rabbit, max_message_size, $bytes)");
	my $pid = PgFanout::publisher_pid($node);
	sql("select pg_terminate_backend($pid)");
	$node->poll_query_until('postgres',
		"select exists (select from fanout.stat_publisher where pid <> $pid and connected_to is not null)");
	return;
}

limit_messages(100000);
sql( q(select fanout.publish('large', to_jsonb(i), 'k' || i) from generate_series(1, 50) i;
	   select fanout.publish('large', to_jsonb(repeat('x', 200000)), 'body');
	   select fanout.publish('large', to_jsonb(i), 'k' || i) from generate_series(51, 100) i;
	   select fanout.publish('large', to_jsonb(repeat('y', 200000)), 'body');
	   select fanout.publish('healthy', '2');));
$node->poll_query_until('postgres',
	q(select count(*) = 0 from fanout.outbox_status where state not in ('sent', 'dead')))
  or die PgFanout::status($node, 'postgres');
is( sql(q(select key, attempts, reason ~ '406.*larger' from fanout.dead_letter where topic = 'large')),
	"body|0|t\nbody|0|t",
	'bodies over max_message_size are found exactly and are dead at once');
@messages = $broker->collect('large_g', expect => 100);
%ids = map { $_->{message_id} => 1 } @messages;
is(scalar(keys %ids), 100, 'their neighbours in flight all arrive');
limit_messages(134217728);
is(sql(q(select fanout.redrive('large'))), 2, 'redriven');
PgFanout::flush($node);
is(scalar($broker->collect('large_g', expect => 2)), 2, 'once the limit is raised, they arrive');

# ---- paused ----

sql( q(select fanout.pause('healthy');
	   select fanout.publish('healthy', to_jsonb(i), 'k') from generate_series(101, 110) i;));
PgFanout::wait_for_state($node, 'held', count => 10);
$broker->amqp('purge', '--queue', 'healthy_g');
sql( q(begin;
	   select fanout.resume('healthy');
	   select fanout.publish('healthy', to_jsonb(i), 'k') from generate_series(111, 120) i;
	   commit;));
PgFanout::flush($node);
is_deeply([ map { $_->{body} } $broker->collect('healthy_g', expect => 20) ],
	[ 101 .. 120 ], 'a paused topic that is resumed sends what was held first');

# ---- dropping ----

sql(q(select fanout.publish('healthy', '1'); select fanout.drop_binding('healthy', 'g')));
PgFanout::flush($node);
like(sql(q(select last_error from fanout.bindings where queue = 'healthy_g')),
	qr/not dropped: the queue has 1 messages/, 'a queue that is not empty is not dropped');
sql(q(select fanout.drop_binding('healthy', 'g', if_empty => false)));
PgFanout::flush($node);
$node->poll_query_until('postgres', q(select not exists (select from fanout.bindings where topic = 'healthy')));
sql(q(select fanout.drop_topic('healthy')));
$node->poll_query_until('postgres', q(select not exists (select from fanout.topics where topic = 'healthy')));
my $exchanges = $broker->ctl('-q', 'list_exchanges', '-p', $broker->vhost, 'name');
unlike($exchanges, qr/^healthy$/m, 'a topic that is dropped takes its exchange along');
unlike($broker->ctl('-q', 'list_queues', '-p', $broker->vhost, 'name'), qr/^healthy_g$/m, 'and its queues are gone');

is(sql('select count(*) from fanout.held'), 0, 'nothing is left behind');
is(sql('select reconnects from fanout.stat_publisher'), 0, 'and the connection was never lost');

done_testing();
