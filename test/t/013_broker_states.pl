# Whatever state the broker is in, nobody waits for the publisher; and whatever
# happened to the broker, everything arrives in the end.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use IPC::Run ();
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker(private => 1);
my $proxy = $broker->proxy;

# A long timeout, so that connecting is still going on when it is to end.  A
# single attempt, so that one that is counted wrongly is seen.
my $node = PgFanout::cluster(
	'main', $broker,
	conf => q(
pg_fanout.connect_timeout = 30s
pg_fanout.retry_limit = 1
pg_fanout.retry_interval = 100ms
));
my %received;

$node->safe_psql(
	'postgres', q(
select fanout.declare_topic('exchange_user', on_exhausted => 'dead_letter');
select fanout.declare_binding('exchange_user', 'c');
create table users (id bigserial primary key, name text);
select fanout.capture('users', 'exchange_user')));
PgFanout::flush($node);

my $nothing = sub { };
my @states = (
	[ 'up, idle', $nothing, $nothing ],
	[
		'up, in the middle of a backlog',
		sub {
			$proxy->command('throttle 500000');
			set_uri($proxy->uri);
			PgFanout::poll(
				sub { status("connected_to ~ ':@{[ $proxy->port ]}/'") },
				'a connection through the proxy');
			write_backlog();
		},
		sub {
			$proxy->command('pass');
			set_uri($broker->uri);
		}
	],
	[
		'frozen, idle',
		sub { $broker->freeze },
		sub { $broker->thaw }
	],
	[
		'frozen, in the middle of a backlog',
		sub { write_backlog(sub { $broker->freeze }) },
		sub { $broker->thaw }
	],
	[
		'out of memory, in the middle of a backlog',
		sub {
			write_backlog(
				sub { $broker->ctl('set_vm_memory_high_watermark', '0.00001') }
			);
			PgFanout::wait_for_publisher($node, 'blocked');
		},
		sub { $broker->ctl('set_vm_memory_high_watermark', '0.4') }
	],
	[
		'silent when connected to',
		sub {
			$proxy->command('freeze');
			set_uri($proxy->uri);
			PgFanout::wait_for_publisher($node, 'connecting');
		},
		sub {
			$proxy->command('pass');
			set_uri($broker->uri);
		}
	],
	# the last one: the broker is started again only once
	[
		'down',
		sub {
			set_uri($broker->uri(port => 1));
			PgFanout::wait_for_publisher($node, 'disconnected');
			write_messages(10, 100);
		},
		sub { set_uri($broker->uri) }
	]);
foreach my $state (@states)
{
	my ($name, $enter, $leave) = @$state;
	my ($dropped, $ended, $stopped);

	# Once, a machine that stands still may be what takes so long; each time it is not.
	foreach (1 .. 3)
	{
		$node->safe_psql('postgres', 'create database another');
		$enter->();
		$dropped = seconds(sub { $node->safe_psql('postgres', 'drop database another') }, 3);
		$ended = seconds(\&terminate, 2);
		$leave->();
		PgFanout::flush($node);
		last if $dropped eq '' && $ended eq '';
	}
	is($dropped, '', "broker $name: DROP DATABASE of another database takes under 3 s");
	is($ended, '', "broker $name: pg_terminate_backend ends the publisher in under 2 s");

	foreach (1 .. 3)
	{
		$enter->();
		$stopped = seconds(sub { $node->stop('fast') }, 5);
		$leave->();
		$node->start;
		PgFanout::publisher_pid($node);
		PgFanout::flush($node);
		last if $stopped eq '';
	}
	is($stopped, '', "broker $name: a fast shutdown takes under 5 s");
}
receive();
is(missing(), 0, 'nothing was lost in any of these states');

# Things that happen to a broker while there are writes

set_conf("pg_fanout.connect_timeout = 1500ms\npg_fanout.heartbeat = 2s");
my $writer = start_writer();
my @events = (
	[ 'stopped and started', sub { $broker->stop }, sub { $broker->start } ],
	[
		'killed and started', sub { $broker->kill; Time::HiRes::sleep(0.5) },
		sub { $broker->start }
	],
	[
		'told to close all connections',
		sub {
			$broker->ctl('close_all_connections', '-p', $broker->vhost,
				'maintenance');
		},
		$nothing
	],
	[
		'frozen for longer than a heartbeat and thawed',
		sub { $broker->freeze; sleep 6 },
		sub { $broker->thaw }
	]);
foreach my $event (@events)
{
	my ($name, $begin, $end) = @$event;
	my $reconnects = value('reconnects');

	$begin->();
	$end->();
	PgFanout::poll(sub { value('reconnects') > $reconnects },
		"a new connection to a broker that was $name", 60);
	PgFanout::flush($node);
	is(stalls(), 0, "broker $name: it goes on, and no attempt is used up");
}
stop_writer($writer);
PgFanout::flush($node);
receive();
is(missing(), 0, 'nothing was lost in any of these events');

# Wiped

$broker->stop;
write_messages(100, 100);
is(stalls(), 0, 'no attempt is used up while the broker is away');
$broker->wipe;
PgFanout::flush($node, timeout => '90 s');
receive();
is(missing(), 0,
	'a wiped broker: exchange and queue come back, and pending messages arrive');
is(stalls(), 0, 'no attempt was used up by that');
unlike(PostgreSQL::Test::Utils::slurp_file($node->logfile),
	qr/is stalled|goes to fanout.dead_letter|PANIC/, 'the log tells of no stall in all this');
is(seconds(sub { $node->stop('fast') }, 5), '', 'the server ends promptly');

done_testing();

# A test that dies leaves no pgbench behind.
END
{
	local ($?, $@);

	$writer->{harness}->kill_kill if $writer && $writer->{harness};
}

# '' if it took less than so many seconds.
sub seconds
{
	my ($what, $limit) = @_;
	my $start = Time::HiRes::time();
	my $took;

	$what->();
	$took = Time::HiRes::time() - $start;
	note(sprintf('%.2f s', $took));
	return $took < $limit ? '' : sprintf('%.1f s', $took);
}

sub terminate
{
	my $pid = PgFanout::publisher_pid($node);

	$node->safe_psql('postgres', "select pg_terminate_backend($pid)");
	PgFanout::poll(sub { !kill 0, $pid }, 'end of the publisher', 60);
	return;
}

sub set_conf
{
	my ($lines) = @_;

	$node->append_conf('postgresql.conf', $lines);
	$node->reload if -e $node->data_dir . "/postmaster.pid";
	return;
}

sub set_uri
{
	my ($uri) = @_;

	set_conf("pg_fanout.uri = '$uri'");
	return;
}

sub value
{
	my ($expression) = @_;

	return $node->safe_psql('postgres',
		"select $expression from fanout.stat_publisher");
}

sub status
{
	my ($condition) = @_;

	return value("coalesce($condition, false)") eq 't';
}

# How often a topic was given up for a while, or a message for good.
sub stalls
{
	return $node->safe_psql('postgres', q(
		select count(*) from fanout.stat_topics
		where stalled_since is not null or attempts is not null or dead > 0 or held > 0)
	);
}

sub write_messages
{
	my ($count, $size) = @_;

	$node->safe_psql('postgres',
		"insert into users (name) select repeat('x', $size) from generate_series(1, $count)"
	);
	return;
}

# More than the buffers of a connection take, so that the publisher is in the
# middle of writing.  $before: what to do first, once it is connected.
sub write_backlog
{
	my ($before) = @_;

	if ($before)
	{
		# the topic has no channel before its first message
		write_messages(1, 100);
		PgFanout::flush($node);

		# it declares topology once more after its first second, and should not
		# wait for an answer to that when the broker is made to say nothing
		PgFanout::poll(
			sub {
				status(
					q(state = 'idle' and connected_at < clock_timestamp() - interval '4 s')
				);
			},
			'an idle publisher',
			60);
		$before->();
	}
	write_messages(800, 20_000);
	PgFanout::poll(sub { status('in_flight > 0') },
		'messages in flight');
	Time::HiRes::sleep(0.3);
	return;
}

# A few rows a second.
sub start_writer
{
	my $writer = { out => '', err => '' };
	my $file = PostgreSQL::Test::Utils::tempdir() . '/writer.sql';

	PostgreSQL::Test::Utils::append_to_file($file,
		"insert into users (name) values ('x');\n");
	$writer->{harness} = IPC::Run::start(
		[
			'pgbench', '-n', '-c', '2', '-R', '100', '-T', '600', '-f', $file,
			$node->connstr('postgres')
		],
		'<', \undef, '>', \$writer->{out}, '2>', \$writer->{err});
	return $writer;
}

sub stop_writer
{
	my ($writer) = @_;
	my $harness = delete $writer->{harness};

	# SIGINT is ignored by what a shell started in the background
	$harness->signal('TERM');
	$harness->finish;
	return;
}

sub receive
{
	$received{$_}++
	  foreach split(
		/\n/,
		$broker->amqp(
			'collect', '--queue', 'exchange_user_c', '--ids', '--ack'));
	return;
}

sub missing
{
	return scalar(
		grep { !$received{$_} }
		  split(/\n/,
			$node->safe_psql('postgres', 'select message_id from fanout.outbox')));
}
