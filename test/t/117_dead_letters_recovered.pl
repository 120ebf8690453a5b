# Dead letters are moved back whole whatever happens meanwhile: large ones, very many,
# a recovery that is stopped or whose queue is full or gone, and another consumer beside it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('a', $broker, conf => 'pg_fanout.retry_interval = 200ms');

sub sql { return $node->safe_psql('postgres', $_[0]); }

# A client that shares no code with pg_fanout.
#	publish QUEUE FIRST LAST BYTES		messages with the ids FIRST .. LAST and such bodies
#	reject, ack QUEUE NUMBER [SECONDS]	prints the ids, and the counts of x-death; ends when
#									nothing has come for so long
my $client = <<'PYTHON';
import sys, pika
uri, command, queue = sys.argv[1:4]
connection = pika.BlockingConnection(pika.URLParameters(uri))
channel = connection.channel()
if command == 'publish':
    first, last, size = map(int, sys.argv[4:])
    channel.confirm_delivery()
    body = b'{"x":"' + b'x' * size + b'"}'
    for i in range(first, last + 1):
        channel.basic_publish('', queue, body, pika.BasicProperties(message_id=str(i), delivery_mode=2))
    connection.close()
    sys.exit(0)
number = int(sys.argv[4])
idle = int(sys.argv[5]) if len(sys.argv) > 5 else 30
channel.basic_qos(prefetch_count=20)
for method, properties, body in channel.consume(queue, inactivity_timeout=idle):
    if method is None:
        break
    print(properties.message_id, len(body), *[death['count'] for death in (properties.headers or {}).get('x-death', [])])
    if command == 'reject':
        channel.basic_nack(method.delivery_tag, requeue=False)
    else:
        channel.basic_ack(method.delivery_tag)
    number -= 1
    if number == 0:
        break
channel.cancel()
connection.close()
PYTHON

sub client
{
	my (@arguments) = @_;

	open(my $output, '-|', '/usr/bin/python3', '-c', $client, $broker->uri, @arguments) or die;
	chomp(my @lines = <$output>);
	close($output) or die 'the client failed';
	return @lines;
}

sub count { return $broker->count($_[0]); }

# A quorum queue knows of new messages after a moment.
sub settled
{
	my ($before, $count) = (-1, count($_[0]));

	while ($count != $before)
	{
		sleep 1;
		($before, $count) = ($count, count($_[0]));
	}
	return $count;
}

# How many two queues have together.  What a worker had that has ended comes back a moment later.
sub together
{
	my ($expected, @queues) = @_;

	eval { PgFanout::poll(sub { count($queues[0]) + count($queues[1]) >= $expected }, 'what the worker had', 60) };
	return settled($queues[0]) + settled($queues[1]);
}

sub ids { my ($queue) = @_; my $n = settled($queue); return $n == 0 ? () : map { (split / /)[0] } client('ack', $queue, $n); }

sub distinct { my %seen = map { $_ => 1 } @_; return scalar(keys %seen); }

sub recovery { return sql("select fanout.recover_dead('$_[0]', 'g')"); }

sub state_of { return sql("select state || '|' || rows_done || '|' || coalesce(rows_estimated::text, '') || '|' || coalesce(error, '') from fanout.backfills where id = $_[0]"); }

sub wait_for_end
{
	my ($id) = @_;

	PgFanout::poll(sub { state_of($id) =~ /^(done|failed)/ }, "end of recovery $id");
	return state_of($id);
}

# It may be over just now.
sub try { $node->psql('postgres', $_[0], on_error_die => 0, stderr => \my $error); return; }

# Until some were moved, or all: whoever is quick may be done already.
sub wait_for_some
{
	my ($id) = @_;

	PgFanout::poll(sub { sql("select rows_done > 0 or state = 'done' from fanout.backfills where id = $id") eq 't' }, 'some dead letters');
	return;
}

sub declare
{
	my ($topic, $arguments) = @_;

	sql("select fanout.declare_binding('$topic', 'g', arguments => '" . ($arguments // '{}') . "', dead_letter => true)");
	PgFanout::flush($node);
	return;
}

# ---- again and again ----

declare('round');
sql(q(select fanout.publish('round', '{"n": 1}', key => 'k')));
PgFanout::flush($node);
foreach my $i (1 .. 3)
{
	client('reject', 'round_g', 1);
	PgFanout::poll(sub { count('round_g_dead') == 1 }, 'a dead letter');
	is(wait_for_end(recovery('round')), 'done|1|1|', "it is moved back, time $i");
}
my ($line) = client('ack', 'round_g', 1);
like($line, qr/^[0-9a-f-]{36} \d+ \d+$/, 'with its id, and one entry of x-death');
note "x-death after three times: $line";

# ---- large ones, as large as RabbitMQ 4 takes them ----

declare('large');
client('publish', 'large_g_dead', 1, 12, 15 * 1024 * 1024);
my $id = recovery('large');
my $memory = 0;
PgFanout::poll(
	sub {
		my $pid = sql(q(select pid from pg_stat_activity where backend_type = 'pg_fanout history'));
		my $status = $pid =~ /^\d+$/ ? eval { slurp_file("/proc/$pid/status") } // '' : '';

		$memory = $1 if $status =~ /VmHWM:\s+(\d+)/ && $1 > $memory;
		return state_of($id) =~ /^(done|failed)/;
	}, 'large dead letters');
is(state_of($id), 'done|12|12|', 'dead letters of 15 MB are moved');
cmp_ok($memory, '<', 200_000, 'the worker does not have all of them in memory');
is(join(',', client('ack', 'large_g', 12)), join(',', map { "$_ 15728648" } 1 .. 12), 'and they are whole');

# ---- stopped in the midst ----

declare('stopped');
client('publish', 'stopped_g_dead', 1, 600, 200_000);
$id = recovery('stopped');
foreach my $i (1 .. 3)
{
	wait_for_some($id);
	last if state_of($id) =~ /^done/;
	try("select fanout.pause_backfill($id)");
	PgFanout::poll(sub { sql(q(select count(*) from pg_stat_activity where backend_type = 'pg_fanout history')) == 0 }, 'the worker is gone');
	is(together(600, 'stopped_g', 'stopped_g_dead'), 600, "paused, time $i, none is in both queues or in none");
	is(sql("select rows_done from fanout.backfills where id = $id"), count('stopped_g'), 'and those that were moved are counted');
	try("select fanout.resume_backfill($id)");
}
try("select fanout.cancel_backfill($id)");
PgFanout::poll(sub { sql(q(select count(*) from pg_stat_activity where backend_type = 'pg_fanout history')) == 0 }, 'the worker is gone');
is(together(600, 'stopped_g', 'stopped_g_dead'), 600, 'nor when it is cancelled');
like(wait_for_end(recovery('stopped')), qr/^done/, 'another one moves the rest');
is(join(' ', ids('stopped_g')), join(' ', 1 .. 600), 'all are there, once each, in order');

# ---- somebody else consumes the dead letters ----

declare('shared');
client('publish', 'shared_g_dead', 1, 4000, 10);
my $taken = PostgreSQL::Test::Utils::tempdir . '/taken';
my $other = fork // die;
if ($other == 0)
{
	open(STDOUT, '>', $taken) or die;
	exec('/usr/bin/python3', '-c', $client, $broker->uri, 'ack', 'shared_g_dead', 1000, 5);
}
PgFanout::poll(sub { -s $taken || count('shared_g_dead') < 4000 }, 'the other consumer');
like(wait_for_end(recovery('shared')), qr/^done/, 'a recovery ends beside a consumer that takes a part of them');
waitpid($other, 0);
recovery('shared');
PgFanout::poll(sub { count('shared_g_dead') == 0 }, 'none is left');
my @taken = map { (split / /)[0] } split(/\n/, slurp_file($taken));
my @moved = ids('shared_g');
is(distinct(@taken, @moved), 4000, 'each was moved, or taken by the other');
is(scalar(@taken) + scalar(@moved), 4000, 'and none both');

# ---- the queue is full, or gone ----

declare('full', '{"x-max-length": 50}');
client('publish', 'full_g_dead', 1, 3000, 10);
$id = recovery('full');
like(wait_for_end($id), qr/^failed\|[1-9]\d*\|3000\|queue "full_g" refuses a message/, 'a queue that becomes full fails the recovery');
@moved = ();
foreach my $i (1 .. 100)
{
	push @moved, ids('full_g');
	last if state_of($id) =~ /^done/;
	sql("select fanout.resume_backfill($id)");
	wait_for_end($id);
}
push @moved, ids('full_g');
like(state_of($id), qr/^done/, 'resumed each time that there is room, it ends');
is(distinct(@moved, ids('full_g_dead')), 3000, 'and none is lost');
note scalar(@moved) . ' messages were moved, of 3000';

declare('gone');
client('publish', 'gone_g_dead', 1, 300, 200_000);
$id = recovery('gone');
wait_for_some($id);
$broker->amqp('delete', '--queue', 'gone_g');
my $end = wait_for_end($id);
SKIP:
{
	skip 'it was done already', 1 if $end =~ /^done/;
	like($end, qr/^failed\|\d+\|300\|a message for queue "gone_g" was returned: 312/, 'a queue that is deleted fails the recovery');
}
is(sql('select fanout.verify()'), 't', 'the queue is declared anew');
if ($end =~ /^failed/)
{
	my ($done) = $end =~ /^failed\|(\d+)/;
	eval { PgFanout::poll(sub { count('gone_g_dead') >= 300 - $done }, 'what the worker had', 60) };
	cmp_ok(count('gone_g_dead'), '>=', 300 - $done, 'and what was not moved is still there');
	sql("select fanout.resume_backfill($id)");
	like(wait_for_end($id), qr/^done/, 'the recovery goes on');
	is(settled('gone_g_dead'), 0, 'to its end');
}

# ---- the binding is dropped ----

declare('dropped');
client('publish', 'dropped_g_dead', 1, 300, 200_000);
$id = recovery('dropped');
sql(q(select fanout.drop_binding('dropped', 'g', if_unused => false, if_empty => false)));
PgFanout::poll(sub { sql(q(select count(*) from fanout.bindings where topic = 'dropped')) == 0 }, 'the binding is gone');
like(wait_for_end($id), qr/^(?:failed\|\d+\|\d*\|.|done)/, 'a binding that is dropped ends the recovery');
foreach my $queue ('dropped_g', 'dropped_g_dead')
{
	is(eval { count($queue) } // 'none', 'none', "$queue is gone");
}

# ---- a queue of dead letters for a queue that exists ----

sql(q(select fanout.declare_binding('later', 'g'), fanout.declare_binding('later', 'other')));
sql(q(select fanout.publish('later', jsonb_build_object('n', 1))));
PgFanout::flush($node);
my ($stdout, $stderr) = ('', '');
$node->psql('postgres', q(select fanout.declare_binding('later', 'g', dead_letter => true)), stdout => \$stdout, stderr => \$stderr, on_error_die => 0);
like($stderr, qr/ERROR:  binding of topic "later" to consumer group "g" already exists with a different declaration\nDETAIL:  dead_letter is 'false', not 'true'/, 'it is refused');
sql(q(select fanout.pause('later')));
sql(q(select fanout.publish('later', jsonb_build_object('n', n)) from generate_series(2, 100) n));
is(scalar(client('ack', 'later_g', 1)), 1, 'the consumers take what is there, while the topic is paused');
sql(q(select fanout.drop_binding('later', 'g')));
PgFanout::poll(sub { sql(q(select count(*) from fanout.bindings where queue = 'later_g')) == 0 }, 'the queue is dropped');
sql(q(select fanout.declare_binding('later', 'g', dead_letter => true), fanout.resume('later')));
PgFanout::flush($node);
is(settled('later_g'), 99, 'and the queue that is declared anew has what came meanwhile');
client('reject', 'later_g', 99);
PgFanout::poll(sub { count('later_g_dead') == 99 }, 'dead letters');
is(settled('later_other'), 100, 'and other queues have all');

done_testing();
