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
my $json = JSON::PP->new->utf8;

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
			[ "$PgFanout::lib/amqp", 'collect', '--uri', $broker->uri, '--queue', $queue, '--expect', $count, '--timeout', 150, '--idle', 2, '--ack' ],
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

done_testing();
