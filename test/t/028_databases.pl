# Databases and extensions that come and go, settings that change, and no room
# for a worker: under load from several clients, which must not notice.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Experiment;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker();

# Room for the launcher, a publisher, and one more while there is a neighbour.
my $node = PgFanout::cluster(
	'main', $broker,
	conf => q(
max_logical_replication_workers = 0
max_parallel_workers_per_gather = 0
max_worker_processes = 3
deadlock_timeout = 100ms
log_line_prefix = '%m [%p] %b: '
));
my $experiment = PgFanout::Experiment->new(
	node => $node, broker => $broker, file => __FILE__);

sub sql { return $node->safe_psql('postgres', $_[0]); }

# Databases

$experiment->run(
	'CREATE and DROP DATABASE of a neighbour with the extension, 3 times',
	sub {
		foreach my $time (1 .. 3)
		{
			sql('create database neighbour');
			prepare_neighbour($time);
			PgFanout::flush($node, dbname => 'neighbour') if $time % 2;
			sql('drop database neighbour');
		}
	});
cmp_ok(scalar($broker->collect('neighbour_g', idle => 1)), '>=', 200,
	'what was flushed in a neighbour arrived');
is(publishers(), 1, 'its publishers are gone');

sql('create database neighbour');
$experiment->run(
	'CREATE and DROP EXTENSION in a neighbour that is written to, 3 times',
	sub {
		my $writer;

		$node->safe_psql('neighbour', 'create table users (id bigserial primary key, name text)');
		$writer = start_writer();
		foreach my $time (1 .. 3)
		{
			prepare_neighbour($time, q(select fanout.capture('users', 'neighbour')));
			$experiment->wait_for_commits(50);
			$node->safe_psql('neighbour', 'drop extension pg_fanout cascade');
		}
		$experiment->end_program('writer');
	});
PgFanout::poll(sub { publishers() == 1 }, 'end of the publisher of a dropped extension');
$broker->amqp('purge', '--queue', 'neighbour_g');

# No room: a neighbour has taken the place of a publisher that ended.

sql('alter system set max_worker_processes = 2');
$node->restart;
PgFanout::flush($node);
my $offset = -s $node->logfile;
$experiment->run(
	'max_worker_processes exhausted, until a database is dropped',
	sub {
		prepare_neighbour(1);
		$node->wait_for_log(qr/out of background worker slots/, $offset);
		sql(q(select pg_terminate_backend(pid) from fanout.stat_publisher));
		PgFanout::poll(sub { value("state = 'idle'", 'neighbour') eq 't' },
			'a publisher of the neighbour');
		$experiment->wait_for_commits(200);
		is(publishers(), 1, 'there is no room for a second publisher');
		sql('drop database neighbour');
		PgFanout::poll(sub { publishers() == 1 }, 'a publisher');
	},
	repeats => 1);
my @complaints = slurp_file($node->logfile, $offset) =~ /out of background worker slots/g;
is(scalar(@complaints), 2, 'the log tells of it once for each of the two');

# Settings

my %strings = (
	uri => [ [ $broker->uri, $broker->uri . ',' . $broker->uri ], [ 'http://localhost/', 'amqp://:x' ] ]);
my $pid = PgFanout::publisher_pid($node);
my @accepted;
$experiment->run(
	'ALTER SYSTEM of every setting',
	sub {
		foreach my $setting ('uri', split(/\n/, settings()))
		{
			change($setting);
			$experiment->wait_for_commits(10);
		}
	},
	repeats => 1);
is_deeply(\@accepted, [], 'ALTER SYSTEM refuses bad values');
is(PgFanout::publisher_pid($node), $pid, 'and after all good ones it is the same publisher');

unlike(slurp_file($node->logfile), qr/deadlock detected|PANIC|TRAP|signal \d+/, 'no deadlock, no crash');
unlike(slurp_file($node->logfile), qr/ pg_fanout \w+: (WARNING|ERROR|PANIC)/, 'and no worker failed');

done_testing();

sub value
{
	my ($expression, $dbname) = @_;

	return $node->safe_psql($dbname || 'postgres', "select $expression from fanout.stat_publisher");
}

sub publishers
{
	return sql(q(select count(*) from pg_stat_activity where backend_type = 'pg_fanout publisher'));
}

# 100 messages in the neighbour.
sub prepare_neighbour
{
	my ($time, $sql) = @_;

	$node->safe_psql('neighbour', 'create extension pg_fanout');
	$node->safe_psql('neighbour', "select fanout.declare_binding('neighbour', 'g', 'classic')");
	$node->safe_psql('neighbour', $sql) if $sql;
	$node->safe_psql('neighbour',
		"select count(fanout.publish('neighbour', jsonb_build_object('time', $time))) from generate_series(1, 100)");
	return;
}

sub start_writer
{
	my $file = PostgreSQL::Test::Utils::tempdir() . '/writer.sql';
	my $log = "$PostgreSQL::Test::Utils::log_path/" . 'writer.log';

	append_to_file($file, "insert into users (name) values ('x');\n");
	$experiment->{writer} = $experiment->start_program(
		'load', $node->connstr('neighbour'), $file, $log, '-c', 2, '-R', 100);
	return;
}

# Name, type, least and greatest value of each but uri, which is not shown, and
# enabled, with which workers come and go.
sub settings
{
	return sql(q(select name || ' ' || vartype || ' ' || coalesce(min_val, '') || ' ' || coalesce(max_val, '')
		from pg_settings where name ~ '^pg_fanout\.' and name not in ('pg_fanout.uri', 'pg_fanout.enabled') order by name));
}

# Each value in turn, in force at once; bad ones are refused.  max_databases
# needs a restart: that is said, and it is set back.
sub change
{
	my ($line) = @_;
	my ($name, $type, $min, $max) = split(/ /, $line);
	my ($good, $bad) = values_of($name, $type, $min, $max);
	my $stderr;

	$name = "pg_fanout.$name" unless $name =~ /\./;
	foreach my $value (@$bad)
	{
		my $status = $node->psql('postgres', "alter system set $name = '$value'", stderr => \$stderr);

		push @accepted, "$name = $value: $stderr"
		  unless $status && $stderr =~ /ERROR:  (invalid value for|parameter ".*" requires|.* is outside the valid range)/;
	}
	foreach my $value (@$good)
	{
		sql("alter system set $name = '$value'");
		$node->reload;
		Time::HiRes::sleep(0.2);
	}
	sql("alter system reset $name");
	$node->reload;
	return;
}

sub values_of
{
	my ($name, $type, $min, $max) = @_;

	return @{ $strings{$name} } if $strings{$name};
	return ([ 'on', 'off' ], ['maybe']) if $type eq 'bool';
	return ([ $min, $max ], [ $min - 1, $max + 1, 'many' ]) if $type eq 'integer';
	return ([ '/nonexistent', '' ], []) if $type eq 'string';
	die "no values for $name of type $type";
}
