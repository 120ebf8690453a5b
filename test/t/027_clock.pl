# The wall clock is set back and forth, under load from several clients: what
# is due in a second is due in a second, and nobody gives up a broker that is
# there.  The server runs with libfaketime, which takes the offset from a file.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Experiment;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my ($faketime) = glob '/usr/lib/*/faketime/libfaketime.so.1';
my $offset = PostgreSQL::Test::Utils::tempdir() . '/offset';

die 'libfaketime is not installed' unless $faketime;
set_clock('+0');
$ENV{FAKETIME_TIMESTAMP_FILE} = $offset;
$ENV{FAKETIME_NO_CACHE} = 1;
$ENV{FAKETIME_DONT_FAKE_MONOTONIC} = 1;
$ENV{FAKETIME_DISABLE_SHM} = 1;
$ENV{NO_FAKE_STAT} = 1;

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $node = start_node();
my $experiment = PgFanout::Experiment->new(
	node => $node, broker => $broker, file => __FILE__);

# A topic that is refused whatever is tried
$node->safe_psql(
	'postgres', q(
select fanout.declare_binding('full', 'g', 'classic', '{"x-max-length": 0, "x-overflow": "reject-publish"}');
select fanout.publish('full', '{}')));
PgFanout::poll(sub { attempts() >= 2 }, 'a topic that is refused');

$experiment->run(
	'clock set back by an hour while publisher and broker are away',
	sub {
		my $pid = PgFanout::publisher_pid($node);
		my $flush = $node->background_psql('postgres');
		my $before;

		# everything that waits for a time waits now
		$proxy->command('cut');
		PgFanout::wait_for_publisher($node, 'disconnected');
		$before = attempts();
		$flush->query_until(qr/asked/, "\\echo asked\nselect 'flushed ' || fanout.flush('3 s');\n");
		Time::HiRes::sleep(1);
		set_clock('-3600');
		is(hours_off(), -1, 'the clock of the server is an hour behind');
		ok(soon(sub { $flush->{stdout} =~ /flushed false/ || pump($flush) }),
			'flush() returns at its timeout');
		$flush->quit;
		$proxy->command('pass');
		ok(soon(sub { value("connected_to is not null") eq 't' }),
			'the publisher connects again');
		ok(soon(sub { attempts() > $before }), 'a refused topic is tried again');
		$node->safe_psql('postgres', q(select fanout.purge('full', held => true)));

		$node->safe_psql('postgres', "select pg_terminate_backend($pid)");
		set_clock('-7200');
		ok(soon(sub { value("pid is not null and pid <> $pid") eq 't' }),
			'a publisher that was ended is started again');
	},
	repeats => 1);

$experiment->run(
	'clock set back by an hour, twice',
	sub {
		foreach my $hours (3 .. 4)
		{
			my $segment = segment();

			set_clock(-3600 * $hours);
			$experiment->wait_for_commits(100);
			ok(soon(sub { segment() != $segment }), 'rotation goes on');
		}
	});
is(busy_for(2), 0, 'neither launcher nor publisher is busy with nothing to do');

my $reconnects = value('reconnects');
$experiment->run(
	'clock set forward by an hour, twice',
	sub {
		foreach my $hours (-3, -2)
		{
			set_clock(3600 * $hours);
			$experiment->wait_for_commits(100);
		}
	});
is(value('reconnects'), $reconnects, 'no connection was given up');

done_testing();

# Only this server has that clock.
sub start_node
{
	local $ENV{LD_PRELOAD} = $faketime;

	return PgFanout::cluster(
		'main', $proxy,
		conf => q(
pg_fanout.retention = 2s
pg_fanout.retry_interval = 2s
));
}

# Seconds; of all processes of the server at once.
sub set_clock
{
	my ($seconds) = @_;

	open my $out, '>', "$offset.new" or die "$offset: $!";
	print $out "$seconds\n";
	close $out;
	rename "$offset.new", $offset or die "$offset: $!";
	return;
}

sub hours_off
{
	my $now = $node->safe_psql('postgres', 'select extract(epoch from clock_timestamp())');

	return sprintf('%.0f', ($now - Time::HiRes::time()) / 3600);
}

sub pump
{
	my ($session) = @_;

	$session->{run}->pump_nb;
	return 0;
}

# What waits for the wall clock would wait for an hour.  A topic that is refused is tried
# again after a minute, by then.
sub soon
{
	my ($condition) = @_;

	return eval { PgFanout::poll($condition, 'it', 120); 1 } ? 1 : 0;
}

sub value
{
	my ($expression) = @_;

	return $node->safe_psql('postgres', "select $expression from fanout.stat_publisher");
}

sub segment
{
	return $node->safe_psql('postgres', 'select current from fanout.rotation');
}

sub attempts
{
	return $node->safe_psql('postgres',
		q(select coalesce(max(attempts), 0) from fanout.stat_topics where topic = 'full'));
}

# How many of the workers took more than a tenth of so many seconds.
sub busy_for
{
	my ($seconds) = @_;
	my @pids = split(/\n/,
		$node->safe_psql('postgres', q(select pid from pg_stat_activity where backend_type ~ '^pg_fanout')));
	my %before = map { $_ => ticks($_) } @pids;

	sleep $seconds;
	return scalar(grep { ticks($_) - $before{$_} > 10 * $seconds } @pids);
}

# Hundredths of a second that a process has run for.
sub ticks
{
	my ($pid) = @_;
	my @fields = split(/ /, slurp_file("/proc/$pid/stat") =~ s/^.*\) //sr);

	return $fields[11] + $fields[12];
}
