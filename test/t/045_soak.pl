# Faults at random under load, and then everything is there, once, in order.
#
# A short run by default; PG_FANOUT_SOAK_MINUTES=20 makes a long one, which goes
# on until 50,000 messages a minute have passed.  PG_FANOUT_SOAK_SEED repeats a run's
# choice of faults.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Experiment;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $minutes = $ENV{PG_FANOUT_SOAK_MINUTES} || 0;
my $seed = $ENV{PG_FANOUT_SOAK_SEED} || int(rand(1_000_000));
my $seconds = $minutes ? $minutes * 60 : 25;
my $goal = $minutes * 50_000;
my $start = time;

srand($seed);
note("seed $seed");

my $broker = PgFanout::broker(private => 1);
my $proxy = $broker->proxy;
my $node = PgFanout::cluster(
	'main', $proxy,
	conf => q(
pg_fanout.connect_timeout = 1500ms
pg_fanout.heartbeat = 2s
pg_fanout.retry_interval = 200ms
pg_fanout.retention = 60s
max_prepared_transactions = 5
restart_after_crash = on
log_statement = none
shared_buffers = 256MB
max_wal_size = 4GB
));
my $experiment = PgFanout::Experiment->new(
	node => $node,
	broker => $broker,
	file => __FILE__,
	topics => 4,
	keys => $minutes ? 5000 : 200,
	clients => 6,
	rate => $minutes ? 900 : 300);

my %memory;    # by process id: anonymous memory in kB, [first, last, seconds]
my $faults = 0;
my %seen;

# name, what it does, what ends it; those that take the publisher's process
# away are for the first half, so that its memory can be watched in the second
my @faults = (
	[ 'broker stopped', sub { $broker->stop }, sub { $broker->start } ],
	[ 'broker killed', sub { $broker->kill }, sub { $broker->start } ],
	[ 'broker frozen', sub { $broker->freeze }, sub { $broker->thaw } ],
	[
		'memory alarm',
		sub { $broker->ctl('set_vm_memory_high_watermark', '0.00001') },
		sub { $broker->ctl('set_vm_memory_high_watermark', '0.4') }
	],
	[
		'connections closed by an operator',
		sub { $broker->ctl('close_all_connections', '-p', $broker->vhost, 'soak') },
		sub { }
	],
	[
		'rights on the broker withdrawn',
		sub { $broker->ctl('set_permissions', '-p', $broker->vhost, 'guest', '', '', '.*') },
		sub { $broker->ctl('set_permissions', '-p', $broker->vhost, 'guest', '.*', '.*', '.*') }
	],
	[ 'exchange deleted', sub { $broker->amqp('delete', '--exchange', 'load_1') }, sub { } ],
	[ 'connection reset', sub { $proxy->command('reset') }, sub { } ],
	[ 'connection refused', sub { $proxy->command('cut') }, sub { $proxy->command('pass') } ],
	[ 'black hole', sub { $proxy->command('freeze') }, sub { $proxy->command('pass') } ],
	[
		'cut within a frame',
		sub { $proxy->command('cut-after ' . (1 + int(rand(100_000)))) },
		sub { $proxy->command('pass') }
	],
	[
		'cut in the middle of a confirm',
		sub { $proxy->command('cut-in basic.ack') },
		sub { $proxy->command('pass') }
	],
	[
		'cut in the middle of a declare',
		sub { $proxy->command('cut-in queue.declare'); $proxy->command('reset') },
		sub { $proxy->command('pass') }
	],
	[
		'connection reset again and again',
		sub {
			foreach (1 .. 20)
			{
				$proxy->command('reset');
				Time::HiRes::sleep(0.1);
			}
		},
		sub { }
	],
	[ 'packets to the broker vanish', sub { $proxy->command('freeze-to-server') }, sub { $proxy->command('pass') } ],
	[ 'packets to the publisher vanish', sub { $proxy->command('freeze-to-client') }, sub { $proxy->command('pass') } ],
	[ 'packets arrive late', sub { $proxy->command('freeze-open') }, sub { $proxy->command('pass') } ],
	[ '100 ms of latency', sub { $proxy->command('delay 100') }, sub { $proxy->command('pass') } ],
	[ 'a trickle', sub { $proxy->command('throttle 5000') }, sub { $proxy->command('pass') } ],
	[ 'topic paused', sub { sql("select fanout.pause('load_2')") }, sub { sql("select fanout.resume('load_2')") } ],
	[
		'open transaction that wrote',
		sub { prepare_transaction() },
		sub { sql("commit prepared 'soak'") }
	],
	[
		'outbox rewritten',
		sub { sql('vacuum full fanout.outbox_' . int(rand(3))) },
		sub { sql('reindex table fanout.outbox_' . int(rand(3))) }
	],
	[ 'settings reloaded', sub { sql('alter system set pg_fanout.max_in_flight = ' . (1 + int(rand(5000)))); $node->reload }, sub { } ]);
my @restarts = (
	[ 'publisher terminated', sub { signal_publisher('TERM') }, sub { } ],
	[ 'publisher killed: the server restarts', sub { signal_publisher('KILL') }, sub { } ],
	[ 'immediate shutdown', sub { $node->stop('immediate') }, sub { $node->start } ]);

$experiment->start_load;
$experiment->wait_for_commits(200);
while (time - $start < $seconds || $experiment->committed < $goal)
{
	cause_fault();
	watch_memory();
}
PgFanout::publisher_pid($node);
$experiment->stop_load;
$experiment->verdict(
	sprintf('%d faults at random in %d s', $faults, time - $start),
	repeats => 1,
	timeout => '10min');
note(join ', ', map { "$_: $seen{$_}" } sort keys %seen);
watch_memory();
report_memory();
unlike(PostgreSQL::Test::Utils::slurp_file($node->logfile),
	qr/PANIC|TRAP|signal 11|signal 6|goes to fanout\.dead_letter/,
	'no crash but those caused, and no message given up');

done_testing();

sub sql
{
	my ($sql) = @_;

	# not while the server restarts; a statement may meet a lock, too
	local $ENV{PGOPTIONS} = '-c lock_timeout=5s';
	return $experiment->try_sql($sql);
}

sub cause_fault
{
	my $early = time - $start < $seconds / 2;
	my @choice = $early ? (@faults, @restarts) : @faults;
	my ($name, $begin, $end) = @{ $choice[ int(rand(@choice)) ] };

	note(sprintf('%d s, %d changes: %s', time - $start, $experiment->committed, $name));
	$faults++;
	$seen{$name}++;
	$begin->();
	Time::HiRes::sleep(rand($minutes ? 6 : 2));
	$end->();
	Time::HiRes::sleep($minutes ? 2 + rand(5) : 1);
	return;
}

sub prepare_transaction
{
	$experiment->try_sql(q(
begin;
with c as (update item_3 set token = gen_random_uuid() where id = 1 returning id, token)
insert into ledger (topic, key, op, token) select 3, id, 'u', token from c;
prepare transaction 'soak'));
	return;
}

sub signal_publisher
{
	my ($signal) = @_;
	my $pid = sql('select pid from fanout.stat_publisher');

	kill $signal, $pid if $pid =~ /^\d+$/;
	return;
}

# Memory of its own of each worker, in kB.
sub watch_memory
{
	foreach my $line (split /\n/,
		sql(q(select pid, backend_type from pg_stat_activity where backend_type like 'pg\_fanout%')))
	{
		my ($pid, $type) = split /\|/, $line;
		my $status = eval { PostgreSQL::Test::Utils::slurp_file("/proc/$pid/status") } || '';
		my ($anonymous) = $status =~ /^RssAnon:\s+(\d+)/m or next;
		my $worker = $memory{$pid} ||= { type => $type, since => time };

		# the first minute fills caches, plans and the first chunks
		$worker->{first} = $anonymous
		  if !$worker->{first} || time - $worker->{since} < ($minutes ? 60 : 5);
		$worker->{last} = $anonymous;
		$worker->{highest} = $anonymous
		  if $anonymous > ($worker->{highest} || 0);
		$worker->{until} = time;
	}
	return;
}

# Of the process that lived longest, of each type.
sub report_memory
{
	my %longest;

	foreach my $worker (values %memory)
	{
		my $other = $longest{ $worker->{type} };

		$longest{ $worker->{type} } = $worker
		  if !$other || $worker->{until} - $worker->{since} > $other->{until} - $other->{since};
	}
	foreach my $type (sort keys %longest)
	{
		my $worker = $longest{$type};

		note(
			sprintf('%s: %d s, %d kB after its first minute, %d kB at the end, %d kB at most',
				$type, $worker->{until} - $worker->{since}, @$worker{qw(first last highest)}));
		# two chunks are about 50 MB at most, whenever they are; 50 bytes lost
		# with each of a million messages would be as much again
		cmp_ok($worker->{highest}, '<', 80 * 1024,
			"$type: memory stays within what two chunks take");
	}
	return;
}
