# A topic whose messages are confirmed late lets others pass, in the middle of a batch, and rides
# on with the main cursor: whatever ends then, nothing is missing, and each key's messages end in
# order.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => "log_statement = none\npg_fanout.max_in_flight = 200");
my @others = map { "t$_" } 1 .. 4;
my $messages = 60000;
my %came;

sub sql { return $node->safe_psql('postgres', $_[0]); }

sql("select fanout.declare_binding('$_', 'g', 'classic')") foreach 'late', @others;
PgFanout::flush($node);

# One transaction, of which the late topic has one message in 1000.
sub publish
{
	return sql("select count(fanout.publish(case when i % 1000 = 5 then 'late' else 't' || i % 4 + 1 end, to_jsonb(i), 'k' || i % 7)) from generate_series(1, $messages) i");
}

sub waits
{
	my ($topic) = @_;

	return sql("select pending + held from fanout.stat_topics where topic = '$topic'");
}

sub arrived
{
	my ($topic, $name) = @_;
	my @messages = $broker->collect("${topic}_g", idle => 0.2);

	$came{$_->{message_id}} = 1 foreach @messages;
	is(PgFanout::overtaken(@messages), 0, "$name: in order");
	is(sql("select count(*) from fanout.outbox_status where topic = '$topic' and state <> 'sent' or message_id <> all ('{" .
			join(',', keys %came) . "}') and topic = '$topic'"), 0, "$name: nothing is missing");
	return;
}

# What happens once the topic has let others pass.
sub passes
{
	my ($name, $event, $more) = @_;
	my $left;

	# again if the others have sent all of the batch before that is seen
	foreach (1 .. 5)
	{
		$broker->suspend_queue('late_g');
		publish();
		$node->poll_query_until('postgres', q(select count(*) = 1 from fanout.detached join fanout.topic using (topic_id) where topic = 'late')) or die;
		$left = sql(q(select count(*) from fanout.outbox_status where topic ~ 't\d' and state <> 'sent'));
		last if $left > 0;
		$broker->resume_queue('late_g');
		PgFanout::flush($node);
		$node->poll_query_until('postgres', 'select count(*) = 0 from fanout.detached') or die;
	}
	cmp_ok($left, '>', 0, "$name: in the middle of a batch");
	$event->();
	ok($node->poll_query_until('postgres', q(select count(*) = 0 from fanout.outbox_status where topic ~ 't\d' and state <> 'sent')), "$name: others do not wait for it");
	is(waits('late'), $messages / 1000 + ($more || 0), "$name: it is known how many messages wait");
	is(sql(q(select fanout.flush('200 ms'))), 'f', "$name: and flush() waits for them");
	$broker->resume_queue('late_g');
	sql(q(select fanout.resume('late')));
	PgFanout::flush($node);
	$node->poll_query_until('postgres', 'select count(*) = 0 from fanout.detached') or die;
	is(waits('late'), 0, "$name: until they are sent");
	arrived('late', $name);
	$broker->amqp('purge', map { ('--queue', "${_}_g") } @others);
	return;
}

passes('nothing else happens', sub { });
passes('the publisher ends', sub { sql('select pg_terminate_backend(pid) from fanout.stat_publisher') });
passes('the server crashes', sub { $node->stop('immediate'); $node->start });
passes('the topic is paused', sub { sql(q(select fanout.pause('late'))) });
passes('it has much more to send', sub { sql(q(select count(fanout.publish('late', to_jsonb(repeat('x', 1000)), 'k' || i % 7)) from generate_series(1, 1000) i)) }, 1000);

# ---- while it is written to all the time ----

# A queue that takes one message of a key at a time, and one that is slow all the time.
sql(q(select fanout.declare_binding('serial', 'g', 'classic', '{"x-max-length": 100000, "x-overflow": "reject-publish"}')));
PgFanout::flush($node);
my $script = PostgreSQL::Test::Utils::tempdir() . '/write.sql';
append_to_file($script, join('', map { "select fanout.publish('$_', '1', 'k' || :client_id);\n" } qw(late t1 t2 serial)));

sub load
{
	my ($rate) = @_;

	return IPC::Run::start([ 'pgbench', '-n', '-c', 2, '-R', $rate, '-T', 600, '-f', $script, $node->connstr('postgres') ],
		'>', \my $out, '2>', \my $err, IPC::Run::timeout(600));
}

my $load = load(50);
sql(q(select fanout.pause('serial')));
sleep 1;
sql(q(select fanout.resume('serial')));
ok($node->poll_query_until('postgres', 'select count(*) = 0 from fanout.detached'), 'a topic whose messages go one after the other rides again while it is written to');
$load->signal('TERM');
$load->finish;
$load = load(4);
foreach my $ms (1000, 300)
{
	$broker->slow_queues($ms, 'late_g', 't2_g');
	$node->poll_query_until('postgres', 'select count(*) > 0 from fanout.detached') or die if $ms == 1000;
	foreach my $i (1 .. 5)
	{
		my $waiting = sql(q(select string_agg(id::text, ',') from fanout.outbox_status where state <> 'sent'));

		# one that waits for a topic does as long as that is written to
		is(sql(q(select fanout.flush('60 s'))), 't', "flush() returns while others do not wait for a topic, confirms every $ms ms, $i");
		is($waiting && sql("select count(*) from fanout.outbox_status where id in ($waiting) and state <> 'sent'"), $waiting && 0, 'and what was there before is sent');
	}
	$broker->slow_queues(0);
}
$load->signal('TERM');
$load->finish;
PgFanout::flush($node);
arrived($_, $_) foreach qw(late serial);

done_testing();
