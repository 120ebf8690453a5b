# Where a queue refuses although nothing that was declared says so, or is unbound for a
# moment in the middle of a full window, messages were accepted behind the refused one.
# What each queue has ends in order all the same, nothing is missing, and what is there
# again has the same message id.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $count = 3000;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
pg_fanout.retry_interval = 100ms
));
my $json = JSON::XS->new->utf8;

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub publish
{
	my ($topic) = @_;

	sql("select count(fanout.publish('$topic', to_jsonb(nextval('n')), 'k' || i % 40)) from generate_series(1, $count) i");
	return;
}

# Takes messages out of a queue as soon as they come.
sub start_consumer
{
	my ($queue) = @_;
	my $file = PostgreSQL::Test::Utils::tempdir() . "/$queue.jsonl";

	return {
		file => $file,
		harness => IPC::Run::start(
			[ "$PgFanout::lib/amqp", 'collect', '--uri', $broker->uri, '--queue', $queue, '--expect', $count, '--timeout', 600, '--idle', 2, '--ack' ],
			'<', \undef, '>', $file)
	};
}

sub received
{
	my ($consumer) = @_;

	$consumer->{harness}->finish;
	return map { $json->decode($_) } split /\n/, slurp_file($consumer->{file});
}

# Bodies tell messages apart.
sub right
{
	my ($name, $expected, @messages) = @_;
	my %id_of;
	my $renamed = 0;

	foreach (@messages)
	{
		$renamed++ if ($id_of{ $_->{body} } ||= $_->{message_id}) ne $_->{message_id};
	}
	note "$name: " . (@messages - keys %id_of) . ' messages again';
	is(scalar(keys %id_of), $expected, "$name: no message is missing");
	is($renamed, 0, "$name: what comes again has the same message id");
	is(PgFanout::overtaken(@messages), 0, "$name: what the queue has ends in order");
	return;
}

# ---- a queue that rejects by a policy, beside one that does not ----

sql(q(create sequence n; select fanout.declare_binding('full', 'g', 'classic'); select fanout.declare_binding('full', 'roomy', 'classic')));
PgFanout::flush($node);
$broker->ctl('set_policy', '-p', $broker->vhost, '--apply-to', 'queues', 'full', '^full_g$', '{"max-length": 30, "overflow": "reject-publish"}');
my @consumers = map { start_consumer($_) } 'full_g', 'full_roomy';
publish('full');
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'full'));
cmp_ok(sql('select nacked from fanout.stat_publisher'), '>', 0, 'a queue that is full by a policy has rejected messages');
right('a queue that is full', $count, received($consumers[0]));
right('another one of its topic', $count, received($consumers[1]));
$broker->ctl('clear_policy', '-p', $broker->vhost, 'full');

# ---- the last queue is unbound, and bound again, in the middle of a window ----

sql(q(select fanout.declare_binding('flapping', 'g', 'classic')));
PgFanout::flush($node);
my $returned = sql('select returned from fanout.stat_publisher');
my $flapping = IPC::Run::start(
	[ "$PgFanout::lib/amqp", 'flap', '--uri', $broker->uri, '--exchange', 'flapping', '--queue', 'flapping_g', '--interval', '0.002', '--count', 100000 ],
	'<', \undef, '>', \my $out, '2>', \my $err);
my $published = 0;
do
{
	publish('flapping');
	$published += $count;
	sleep 1;
} until ($published >= 3 * $count && sql('select returned from fanout.stat_publisher') > $returned) || $published >= 30 * $count;
$flapping->kill_kill;
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'flapping'));
cmp_ok(sql('select returned from fanout.stat_publisher'), '>', $returned, 'messages were returned');
right('a queue unbound and bound again', $published, $broker->collect('flapping_g', expect => $published));

# ---- how many messages of a key are in flight ----

# How many are in flight once all that may be published is, since a message of another
# topic, written later, is sent.
sub in_flight
{
	PgFanout::poll(sub { sql('select in_flight > 0 from fanout.stat_publisher') eq 't' }, 'messages in flight');
	my $last = sql(q(select fanout.publish('flapping', '1')));
	PgFanout::wait_for_state($node, 'sent', where => "message_id = '$last'");
	return sql('select in_flight from fanout.stat_publisher');
}

# While its queue does nothing, 200 messages of two keys are written.
sub in_flight_of
{
	my ($topic) = @_;

	$broker->suspend_queue("${topic}_g");
	sql("select count(fanout.publish('$topic', to_jsonb(i), 'k' || i % 2)) from generate_series(1, 200) i");
	my $n = in_flight();
	$broker->resume_queue("${topic}_g");
	PgFanout::flush($node);
	return $n;
}

sql( q(select fanout.declare_binding('plain', 'g', 'classic');
	   select fanout.declare_binding('rejects', 'g', 'classic', '{"x-max-length": 100000, "x-overflow": "reject-publish"}')));
PgFanout::flush($node);
cmp_ok(in_flight_of('plain'), '>', 10, 'messages of a key are published one after the other without waiting for confirms');
is(in_flight_of('rejects'), 2, 'one message of each key is in flight where a queue refuses by design');

# ---- a TRUNCATE among the changes of a row ----

# They go out one by one, and the TRUNCATE, which has no key, waits for all before it.
sql( q(create table rejects (id int primary key, n int);
	   select fanout.capture('rejects', 'rejects');
	   insert into rejects select i, 0 from generate_series(1, 3) i));
PgFanout::flush($node);
$broker->collect('rejects_g', expect => 203);
sql( q(begin;
	   update rejects set n = 1;
	   update rejects set n = 2;
	   truncate rejects;
	   insert into rejects values (1, 3), (2, 3);
	   update rejects set n = 4;
	   commit));
PgFanout::flush($node);
is(join('', map { $_->{headers}->{op} } $broker->collect('rejects_g', expect => 11)), 'uuuuuutccuu', 'a TRUNCATE goes out behind all changes before it, and before all behind it');

done_testing();
