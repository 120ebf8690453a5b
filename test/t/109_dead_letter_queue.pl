# A queue of dead letters on the broker: what consumers outside PostgreSQL reject, or
# give back too often, is kept there, is seen, and is moved back without a loss.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use Test::More;

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('a', $broker, conf => 'pg_fanout.retry_interval = 200ms');

sub sql { return $node->safe_psql('postgres', $_[0]); }

# A consumer that shares no code with pg_fanout; $how: "reject" without requeue, or "requeue".
my $consumer = <<'PYTHON';
import sys, pika
uri, queue, how, number = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
channel = pika.BlockingConnection(pika.URLParameters(uri)).channel()
channel.basic_qos(prefetch_count=20)
for method, _, _ in channel.consume(queue, inactivity_timeout=20):
    if method is None:
        sys.exit(1)
    # since RabbitMQ 4.3 a nack with requeue does not count
    channel.basic_reject(method.delivery_tag, requeue=(how == 'requeue'))
    number -= 1
    if number == 0:
        break
channel.cancel()
channel.connection.close()
PYTHON

sub consume
{
	my ($queue, $how, $number) = @_;

	return system('/usr/bin/python3', '-c', $consumer, $broker->uri, $queue, $how, $number) == 0;
}

sub depth { return sql("select dead_letters from fanout.bindings where queue = '$_[0]'"); }

sub look { sql('select fanout.check()'); return depth($_[0]); }

sub recover
{
	my ($topic, $group) = @_;
	my $id = sql("select fanout.recover_dead('$topic', '$group')");

	PgFanout::poll(sub { sql("select state in ('done', 'failed') from fanout.backfills where id = $id") eq 't' }, "end of recovery $id");
	return sql("select state, rows_done, rows_estimated, coalesce(error, '') from fanout.backfills where id = $id");
}

# ---- declared ----

sql(q(
select fanout.declare_binding('item', 'g', dead_letter => true), fanout.declare_binding('item', 'other');
select fanout.declare_binding('few', 'g', arguments => '{"x-delivery-limit": 2}', dead_letter => true);
));
PgFanout::flush($node);
is(sql(q(select string_agg(queue || ' ' || state || ' ' || dead_letters, ', ' order by queue) from fanout.bindings where dead_letter)),
	'few_g declared 0, item_g declared 0', 'the queues are declared, and no dead letter is there');
is($broker->count('item_g_dead'), 0, 'so is the queue of dead letters');

# ---- rejected ----

sql(q(select fanout.publish('item', jsonb_build_object('n', i), key => 'k' || i % 10, type => 't',
	headers => '{"mine": "deep", "number": 7}') from generate_series(1, 300) i));
PgFanout::flush($node);
my @original = $broker->collect('item_other', expect => 300);
ok(consume('item_g', 'reject', 300), 'a consumer rejects all messages');
PgFanout::poll(sub { $broker->count('item_g_dead') == 300 }, 'dead letters');
is($broker->count('item_g'), 0, 'they are dead letters');
# of a quorum queue that does not answer within a quarter of a second the broker says that it has none
PgFanout::poll(sub { look('item_g') == 300 }, sub { '300 dead letters in the view, not ' . depth('item_g') });
pass('the view shows how many');
my $told = '';
eval {
	PgFanout::poll(sub { ($told = sql(q(select ok, detail, hint ~ 'recover_dead' from fanout.check() where item = 'dead letters of queue "item_g"'))) eq 'f|300|t' },
		'check() to tell of them');
};
is($told, 'f|300|t', 'check() says so');

is(recover('item', 'g'), 'done|300|300|', 'they are moved back');
is($broker->count('item_g_dead'), 0, 'none is left');
my @again = $broker->collect('item_g', expect => 300);
is(join(' ', map { $_->{body}->{n} } @again), join(' ', 1 .. 300), 'all are there, once each, in order');
my @differences = grep {
	my ($x, $y) = ($original[$_], $again[$_]);
	my %y = %{ $y->{headers} };
	my $death = delete $y{'x-death'};

	delete $y{$_} foreach grep { /^x-(first|last)-death/ } keys %y;
	!$death || $x->{message_id} ne $y->{message_id} || $x->{raw} ne $y->{raw} || $x->{type} ne $y->{type} || $x->{timestamp} != $y->{timestamp}
	  || $y->{content_type} ne 'application/json' || $y->{delivery_mode} != 2
	  || JSON::XS->new->canonical->encode($x->{headers}) ne JSON::XS->new->canonical->encode(\%y)
} 0 .. 299;
is("@differences", '', 'with their ids, properties, headers and bodies, and x-death');
is(look('item_g'), 0, 'the view shows that they are gone');

# ---- given back too often ----

sql(q(select fanout.publish('few', '{"n": 1}')));
PgFanout::flush($node);
ok(consume('few_g', 'requeue', 3), 'a consumer gives a message back three times');
PgFanout::poll(sub { $broker->count('few_g_dead') == 1 }, 'the message is a dead letter');
is(recover('few', 'g'), 'done|1|1|', 'it is moved back');
is($broker->count('few_g'), 1, 'to its queue');
ok(consume('few_g', 'requeue', 3), 'where it may fail as often as before');
PgFanout::poll(sub { $broker->count('few_g_dead') == 1 }, 'the message is a dead letter again');
is(recover('few', 'g'), 'done|1|1|', 'and is moved back again');

is(recover('item', 'g'), 'done|0|0|', 'nothing to move is no error');

# ---- foreign properties, and none ----

$broker->amqp('publish', '--exchange', 'item', '--message-id', 'foreign', '--headers',
	'{"CC": ["item_other"], "when": {"!timestamp": 12}, "bytes": {"!bytes": "00ff"}}', 'not json');
$broker->amqp('publish', '--exchange', 'item', '--bare', 'bare');
$broker->collect('item_other', expect => 2);
ok(consume('item_g', 'reject', 2), 'foreign messages are rejected');
PgFanout::poll(sub { $broker->count('item_g_dead') == 2 }, 'foreign dead letters');
is(recover('item', 'g'), 'done|2|2|', 'they are moved back, too');
is($broker->count('item_other'), 0, 'and to no other queue');
is($broker->count('item_g'), 2, 'but to their own');

# ---- a consumer that rejects what comes back; two recoveries at a time ----

$broker->amqp('purge', '--queue', $_) foreach 'item_g', 'few_g';
$broker->amqp('publish', '--routing-key', 'item_g_dead', '--confirm', '--count', 500, '{}');
$broker->amqp('publish', '--routing-key', 'few_g_dead', '--confirm', '{}');
my $rejecting = fork // die;
exec('/usr/bin/python3', '-c', $consumer, $broker->uri, 'item_g', 'reject', 500) if $rejecting == 0;
my $beside = sql("select fanout.recover_dead('few', 'g')");
is(recover('item', 'g'), 'done|500|500|', 'what becomes a dead letter again is not moved in a circle');
waitpid($rejecting, 0);
PgFanout::poll(sub { $broker->count('item_g_dead') == 500 }, 'dead letters again');
PgFanout::poll(sub { sql("select state = 'done' from fanout.backfills where id = $beside") eq 't' }, 'the other recovery');
is($broker->count('few_g'), 1, 'and another one beside it ends, too');
$broker->amqp('purge', '--queue', $_) foreach 'item_g_dead', 'item_other';

# ---- how its topic flows ----

sql(q(
select fanout.declare_binding('free', 'g', dead_letter => true);
select fanout.declare_binding('bounded', 'g', arguments => '{"x-max-length-bytes": 100000}', dead_letter => true);
));
PgFanout::flush($node);
foreach my $case ([ 'bounded', 1 ], [ 'free', 50 ])
{
	my ($topic, $in_flight) = @$case;

	sql("select fanout.publish('$topic', '{}')");    # its channel is open then
	PgFanout::flush($node);
	$broker->freeze;
	sql("select fanout.publish('$topic', '{}', key => 'k') from generate_series(1, 50)");
	PgFanout::poll(sub { sql('select in_flight from fanout.stat_publisher') >= $in_flight }, "messages of $topic");
	sleep 1;
	is(sql('select in_flight from fanout.stat_publisher'), $in_flight,
		"of a queue that is $topic and has dead letters, $in_flight messages of a key are in flight");
	$broker->thaw;
	PgFanout::flush($node);
}

# ---- failures in the midst ----

sub reject_many
{
	my ($number) = @_;

	$broker->amqp('purge', '--queue', 'item_g');
	sql("select fanout.publish('item', jsonb_build_object('n', i, 'text', repeat('x', 2000))) from generate_series(1, $number) i");
	PgFanout::flush($node);
	consume('item_g', 'reject', $number) or die 'not rejected';
	PgFanout::poll(sub { $broker->count('item_g_dead') == $number }, "$number dead letters");
	return;
}

reject_many(3000);
my $id = sql("select fanout.recover_dead('item', 'g')");
foreach my $i (1 .. 3)
{
	my $pid;

	PgFanout::poll(sub { ($pid = sql(q(select pid from pg_stat_activity where backend_type = 'pg_fanout history'))) =~ /^\d+$/ || sql("select state = 'done' from fanout.backfills where id = $id") eq 't' }, 'the worker');
	kill 'TERM', $pid if $pid =~ /^\d+$/;
}
$broker->kill;
PgFanout::poll(sub { sql("select error is not null or state = 'done' from fanout.backfills where id = $id") eq 't' }, 'the error is shown');
like(sql("select state || ' ' || coalesce(error, '') from fanout.backfills where id = $id"), qr/^(waiting|running|done) /, 'a broker that is away fails no recovery');
$broker->start;
PgFanout::poll(sub { sql("select state = 'done' from fanout.backfills where id = $id") eq 't' }, 'the recovery goes on');
my %seen;
foreach my $queue ('item_g', 'item_g_dead')
{
	my $count = $broker->count($queue);

	$seen{ $_->{body}->{n} }++ foreach $count == 0 ? () : $broker->collect($queue, expect => $count);
}
is(scalar(keys %seen), 3000, 'no message is lost when worker and broker are killed');

# ---- a queue that refuses ----

sql(q(select fanout.declare_binding('full', 'g', arguments => '{"x-max-length": 2}', dead_letter => true)));
PgFanout::flush($node);
foreach my $i (1 .. 2)
{
	sql(q(select fanout.publish('full', '{"n": 1}')));
	PgFanout::flush($node);
	consume('full_g', 'reject', 1) or die 'not rejected' if $i == 1;
}
PgFanout::poll(sub { $broker->count('full_g_dead') == 1 }, 'a dead letter');
$broker->amqp('publish', '--routing-key', 'full_g', '--confirm', '{}') for 1 .. 2;
like(recover('full', 'g'), qr/^failed\|0\|1\|queue "full_g" refuses a message/, 'a queue that is full fails the recovery');
# it comes back when the worker's connection has ended
PgFanout::poll(sub { $broker->count('full_g_dead') == 1 }, 'the message to be in its queue again');
pass('whose message stays');
$broker->amqp('purge', '--queue', 'full_g');
sql(q(select fanout.resume_backfill(max(id)) from fanout.backfills));
PgFanout::poll(sub { $broker->count('full_g_dead') == 0 && $broker->count('full_g') == 1 }, 'the recovery resumed');
pass('once it has room, the recovery goes on');

# ---- dropped ----

sub dropped { return sql("select coalesce((select state || ': ' || coalesce(last_error, '') from fanout.bindings where queue = '$_[0]'), 'gone')"); }

sub wait_dropped
{
	my ($queue) = @_;

	PgFanout::poll(sub { dropped($queue) !~ /^dropping/ }, "$queue dropped");
	return dropped($queue);
}

$broker->amqp('purge', '--queue', 'full_g');
$broker->amqp('publish', '--routing-key', 'full_g_dead', '--confirm', '{}');
sql(q(select fanout.drop_binding('full', 'g')));
like(wait_dropped('full_g'), qr/not dropped: the queue of dead letters has 1 messages/, 'a queue with dead letters is not dropped');
is($broker->count('full_g'), 0, 'the queue is there');
sql(q(select fanout.drop_binding('full', 'g', if_empty => false)));
is(wait_dropped('full_g'), 'gone', 'it is if that is asked for');
foreach my $queue ('full_g', 'full_g_dead')
{
	is(eval { $broker->count($queue) } // 'none', 'none', "$queue is gone");
}
$broker->amqp('delete', '--queue', 'few_g_dead');
sql(q(select fanout.drop_binding('few', 'g', if_empty => false)));
is(wait_dropped('few_g'), 'gone', 'nor does it matter that the queue of dead letters is gone already');

# ---- a queue that is gone ----

# the publisher may declare it again just then, as it does by the clock
my $gone = 'done';
foreach my $i (1 .. 5)
{
	last if $gone !~ /^done/;
	$broker->amqp('publish', '--routing-key', 'item_g_dead', '--confirm', '{}');
	$broker->amqp('delete', '--queue', 'item_g');
	$gone = recover('item', 'g');
}
like($gone, qr/^failed\|0\|\d+\|a message for queue "item_g" was returned: 312/, 'a queue that is gone fails the recovery');
look('item_g');
is($broker->count('item_g'), 0, 'and is declared again');

done_testing();
