# After a crash of the publisher or of the server nothing is lost, nothing is
# there that was not committed, and what repeats has the same message id.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use IPC::Run ();
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;

# The WAL writer shall not write what nobody asks for: else nothing that was
# committed asynchronously would be lost in a crash.
my $node = PgFanout::cluster(
	'main', $proxy,
	conf => q(
restart_after_crash = on
max_prepared_transactions = 5
wal_buffers = 16MB
wal_writer_delay = 10s
wal_writer_flush_after = 1GB
));

my %received;    # by topic and message id: the body, as it came first
my $repeats = 0;
my $changed = 0;    # repeats that are not what came first

# kill -9

declare('killed');
$proxy->command('throttle 200000');
write_messages('killed', 1, 8_000);
wait_until_busy(1000);
my $pid = PgFanout::publisher_pid($node);
kill 'KILL', $pid;
PgFanout::poll(
	sub {
		# not by poll_query_until, which takes a refused connection for a result
		my ($status, $other) = $node->psql('postgres',
			"select pid from fanout.stat_publisher where pid <> $pid");
		return $status == 0 && $other;
	},
	'another publisher');
$proxy->command('pass');
PgFanout::flush($node);
receive('killed');
is(missing('killed'), 0, 'kill -9 of the publisher: nothing is lost');
is(invented('killed'), 0, 'kill -9 of the publisher: nothing is invented');
is($changed, 0, 'what repeats is the same message with the same id');
note("$repeats repeated");

# Immediate shutdown, several times in one backlog

declare('backlog');
$proxy->command('throttle 700000');
write_messages('backlog', $_ * 10_000 + 1, ($_ + 1) * 10_000) foreach 0 .. 4;
foreach my $time (1 .. 3)
{
	wait_until_busy(3000);
	$node->stop('immediate');
	$node->start;
}
wait_until_busy(1);
pass('an immediate shutdown three times in the middle of a backlog');
$proxy->command('pass');
PgFanout::flush($node);
$repeats = 0;
receive_ids('backlog');
is(missing('backlog'), 0, 'immediate shutdown: nothing is lost');
is(invented('backlog'), 0, 'immediate shutdown: nothing is invented');
cmp_ok($repeats, '<', 50_000, 'it does not begin anew each time');
note("$repeats repeated");

# One transaction of very many messages, whose topic leaves the main cursor

$node->safe_psql('postgres', q(select fanout.declare_binding('large', 'c', 'classic')));
PgFanout::flush($node);
my $before = $node->safe_psql('postgres', 'select confirmed from fanout.stat_publisher');
$proxy->command('throttle 1200000');
write_messages('large', 1, 60_000);
wait_until_busy($before + 30_000);
is($node->safe_psql('postgres', q(select topic from fanout.detached join fanout.topic using (topic_id))), 'large', 'a large transaction is read by its topic alone');
$node->stop('immediate');
$proxy->command('pass');
$node->start;
PgFanout::publisher_pid($node);
PgFanout::flush($node);
$repeats = 0;
receive_ids('large');
is(missing('large'), 0, 'a crash in the middle of a large transaction: nothing is lost');
cmp_ok($repeats, '<', 15_000, 'the publisher goes on where it was');
note("$repeats repeated");

# synchronous_commit = off

declare('async');
$node->safe_psql('postgres', 'checkpoint');
my $committed = 0;
foreach my $time (1 .. 2)
{
	my $writer = start_writer();

	PgFanout::poll(
		sub {
			$node->safe_psql('postgres',
				'select confirmed > 200 from fanout.stat_publisher') eq 't';
		},
		'messages of the writer');
	Time::HiRes::sleep(0.5);
	$node->stop('immediate');
	$writer->{harness}->finish;
	$committed += $1 if $writer->{out} =~ /actually processed: (\d+)/;
	$node->start;
	PgFanout::publisher_pid($node);
}

# Of a busy server, the WAL writer writes all but the last page.  So a single
# message, and a crash as soon as it is published.  If nothing was taken back so far,
# then while the broker is away, so that the publisher has nothing written.
foreach my $time (1 .. 20)
{
	my $away = $time > 3;
	my $confirmed;

	last if $away && $committed > in_outbox('async');

	PgFanout::flush($node);
	if ($away)
	{
		$proxy->command('cut');
		PgFanout::wait_for_publisher($node, 'disconnected');
	}
	$confirmed = $node->safe_psql('postgres',
		'select confirmed from fanout.stat_publisher');
	$node->safe_psql('postgres',
		'set synchronous_commit = off; ' . select_publish('async', 1, 1));
	$committed++;
	PgFanout::poll(
		sub {
			$node->safe_psql('postgres',
				"select confirmed > $confirmed from fanout.stat_publisher") eq 't';
		},
		'the message') unless $away;
	$node->stop('immediate');
	$proxy->command('pass');
	$node->start;
	PgFanout::publisher_pid($node);
}
PgFanout::flush($node);
receive('async');
cmp_ok($committed, '>',
	in_outbox('async'),
	'synchronous_commit = off: the crash took transactions back');
is(invented('async'), 0, 'no message is published that a crash takes back');
is(missing('async'), 0, 'and all others are published');

# Prepared transactions

declare('prepared');
PgFanout::flush($node);
$node->safe_psql('postgres', "begin; $_; prepare transaction 'yes'")
  foreach select_publish('prepared', 1, 10);
$node->safe_psql('postgres', "begin; $_; prepare transaction 'no'")
  foreach select_publish('prepared', 11, 20);
write_messages('prepared', 21, 30);
PgFanout::flush($node);
is(states('prepared'), 'sent|10',
	'PREPARE TRANSACTION publishes nothing, and does not delay others');
$node->restart;
write_messages('prepared', 31, 40);
PgFanout::flush($node);
is(states('prepared'), 'sent|20', 'nor after a restart while prepared');
$node->stop('immediate');
$node->start;
PgFanout::publisher_pid($node);
PgFanout::flush($node);
Time::HiRes::sleep(2);    # past what it does a second after its start
is(states('prepared'), 'sent|20', 'nor after a crash');

$node->safe_psql('postgres', "rollback prepared 'no'");
$node->safe_psql('postgres', "commit prepared 'yes'");
my $start = Time::HiRes::time();
PgFanout::poll(sub { states('prepared') eq 'sent|30' },
	'messages of COMMIT PREPARED');
cmp_ok(Time::HiRes::time() - $start, '<', 5,
	'COMMIT PREPARED publishes at once');
receive('prepared');
is(invented('prepared'), 0, 'ROLLBACK PREPARED publishes nothing');
is(missing('prepared'), 0, 'nothing is lost of COMMIT PREPARED');
$node->stop('fast');

done_testing();

sub in_outbox
{
	my ($topic) = @_;

	return $node->safe_psql('postgres', "select count(*) from fanout.outbox join fanout.topic using (topic_id) where topic = '$topic'");
}

sub declare
{
	my ($topic) = @_;

	$node->safe_psql('postgres', "select fanout.declare_binding('$topic', 'c')");
	return;
}

sub select_publish
{
	my ($topic, $from, $to) = @_;

	return qq(select count(fanout.publish('$topic', jsonb_build_object('i', i, 'pad', repeat('x', 100))))
			  from generate_series($from, $to) i);
}

sub write_messages
{
	my (@args) = @_;

	$node->safe_psql('postgres', select_publish(@args));
	return;
}

# The publisher has had so many acks since it started, and there is more: the proxy must be so
# slow that all is not over before one has looked.
sub wait_until_busy
{
	my ($confirmed) = @_;

	PgFanout::poll(
		sub {
			my ($status, $busy) = $node->psql('postgres',
				"select confirmed >= $confirmed and in_flight > 0 from fanout.stat_publisher");
			return $status == 0 && $busy eq 't';
		},
		'a busy publisher');
	return;
}

# Commits as fast as it can, asynchronously, until the server goes away.
sub start_writer
{
	my $writer = { out => '', err => '' };
	my $file = PostgreSQL::Test::Utils::tempdir() . '/writer.sql';

	PostgreSQL::Test::Utils::append_to_file($file,
		select_publish('async', 1, 1) . ";\n");
	local $ENV{PGOPTIONS} = '-c synchronous_commit=off';
	$writer->{harness} = IPC::Run::start(
		[
			'pgbench', '-n', '-c', '4', '-T', '600', '-f', $file,
			$node->connstr('postgres')
		],
		'<', \undef, '>', \$writer->{out}, '2>', \$writer->{err});
	return $writer;
}

sub receive
{
	my ($topic) = @_;

	foreach my $message ($broker->collect("${topic}_c", idle => 0.5))
	{
		my $id = $message->{message_id};
		my $known = $received{$topic}->{$id};

		if (defined $known)
		{
			$repeats++;
			$changed++ if $known ne $message->{raw};
		}
		$received{$topic}->{$id} = $message->{raw};
	}
	return;
}

# For many: without decoding them.
sub receive_ids
{
	my ($topic) = @_;

	foreach my $id (
		split(/\n/,
			$broker->amqp('collect', '--queue', "${topic}_c", '--ids', '--ack')))
	{
		$repeats++ if $received{$topic}->{$id}++;
	}
	return;
}

sub outbox
{
	my ($topic) = @_;

	return split(
		/\n/,
		$node->safe_psql(
			'postgres', "select message_id from fanout.outbox
						 join fanout.topic using (topic_id) where topic = '$topic'"));
}

sub missing
{
	my ($topic) = @_;

	return scalar(grep { !$received{$topic}->{$_} } outbox($topic));
}

sub invented
{
	my ($topic) = @_;
	my %exists = map { $_ => 1 } outbox($topic);

	return scalar(grep { !$exists{$_} } keys %{ $received{$topic} });
}

sub states
{
	my ($topic) = @_;

	return $node->safe_psql('postgres',
		"select state, count(*) from fanout.outbox_status where topic = '$topic' group by 1");
}
