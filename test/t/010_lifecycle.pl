# Every database that has the extension has a publisher, whatever happens to
# the database, the extension, the publisher and the settings; and no command
# that needs a database for itself is kept waiting by one.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use IPC::Run ();
use PgFanout;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my %received;    # by message id
my $node = PgFanout::cluster(
	'main', $proxy,
	extension => 0,
	conf => "max_worker_processes = 20\nmax_prepared_transactions = 2\n");

# CREATE EXTENSION

$node->safe_psql('postgres', 'begin; create extension pg_fanout; rollback');
$node->safe_psql('postgres',
	'begin; savepoint s; create extension pg_fanout; rollback to s; commit');
no_publisher('postgres', 'an aborted CREATE EXTENSION');

$node->safe_psql('postgres',
	"begin; create extension pg_fanout; prepare transaction 'p'");
no_publisher('postgres', 'a prepared CREATE EXTENSION');
$node->safe_psql('postgres', "commit prepared 'p'");
ok(eventually(sub { publishers('postgres') == 1 }),
	'COMMIT PREPARED of a CREATE EXTENSION starts a publisher');
$node->safe_psql('postgres', 'drop extension pg_fanout');
no_publisher('postgres', 'DROP EXTENSION');

$node->safe_psql('postgres', 'create extension pg_fanout');
ok(eventually(sub { publishers('postgres') == 1 }),
	'CREATE EXTENSION starts a publisher by itself');

# DROP EXTENSION

make_busy('postgres');
$node->safe_psql(
	'postgres', q(
create table users (id bigserial primary key, name text);
select fanout.capture('users', 't_postgres')));
my $position = log_position();
my $writer = start_writer('postgres', q(insert into users (name) values ('x')));
is(timed('postgres', 'drop extension pg_fanout cascade', 5),
	'', 'DROP EXTENSION while the publisher is busy and a writer is active');
my $rows = $node->safe_psql('postgres', 'select count(*) from users');
ok( eventually(
		sub {
			$node->safe_psql('postgres', 'select count(*) from users') > $rows;
		}),
	'the writer goes on');
# a worker that is told to end in a query says so
is(log_lines(qr/ (ERROR|FATAL):(?!  terminating background worker|  canceling autovacuum task)/, $position),
	'', 'the writer saw no error');
stop_writer($writer);
no_publisher('postgres', 'DROP EXTENSION of a busy publisher');

$proxy->command('pass');
$broker->amqp('purge', '--queue', 't_postgres_c');
$node->safe_psql('postgres', 'create extension pg_fanout');
write_messages('postgres', 10);
all_arrive('postgres', 'after DROP EXTENSION and CREATE EXTENSION');

my $pid = PgFanout::publisher_pid($node);
$node->safe_psql('postgres',
	'begin; drop extension pg_fanout; create extension pg_fanout; commit');
ok(eventually(sub { publisher_is_other('postgres', $pid) }),
	'DROP and CREATE EXTENSION in one transaction: another publisher');
write_messages('postgres', 10);
all_arrive('postgres', 'after DROP and CREATE EXTENSION in one transaction');

# A publisher that has nothing to read, because the broker is away
$proxy->command('cut');
PgFanout::wait_for_publisher($node, 'disconnected');
$node->safe_psql('postgres', 'drop extension pg_fanout');
no_publisher('postgres', 'DROP EXTENSION while the broker is away');
$proxy->command('pass');
$node->safe_psql('postgres', 'create extension pg_fanout');

# Commands that need a database for themselves

# Once, a machine that stands still may be what takes so long; each time it is not.
my $result;
foreach (1 .. 3)
{
	create_database('doomed');
	make_busy('doomed');
	$result = timed('postgres', 'drop database doomed', 3);
	last unless $result =~ /^took/;
}
is($result, '', 'DROP DATABASE with a busy publisher succeeds in under 3 s');

create_database('old');
foreach my $try (1 .. 3)
{
	make_busy('old');
	$result = timed('postgres', 'alter database old rename to new', 3);
	last if $result !~ /^took/ || $try == 3;
	$proxy->command('pass');
	$node->safe_psql('postgres', 'alter database new rename to old');
}
is($result, '', 'ALTER DATABASE RENAME with a busy publisher');
ok(eventually(sub { publishers('new') == 1 }),
	'the publisher comes back under the new name');

is(timed('postgres', 'create database copy template new', 10),
	'', 'CREATE DATABASE TEMPLATE of a database with a busy publisher');
ok(eventually(sub { publishers('new') == 1 && publishers('copy') == 1 }),
	'original and copy have a publisher each');

my $place = PostgreSQL::Test::Utils::tempdir_short();
$node->safe_psql('postgres', "create tablespace place location '$place'");
is(timed('postgres', 'alter database new set tablespace place', 10),
	'', 'ALTER DATABASE SET TABLESPACE with a busy publisher');
ok(eventually(sub { publishers('new') == 1 }),
	'the publisher comes back in the new tablespace');

$proxy->command('pass');
PgFanout::flush($node, dbname => 'new');
$node->safe_psql('copy', 'select fanout.activate(publish_copied => true)');
PgFanout::flush($node, dbname => 'copy');
my %times;
$times{$_}++ foreach receive($broker, 't_old_c');
my $ids = $node->safe_psql('new', 'select message_id from fanout.outbox order by 1');
is(join("\n", sort keys %times), $ids,
	'nothing is lost by RENAME, TEMPLATE and SET TABLESPACE, and no other id comes'
);
is($node->safe_psql('copy', 'select message_id from fanout.outbox order by 1'),
	$ids, 'the copy has the same message ids');
cmp_ok(scalar(grep { $_ >= 2 } values %times), '>', 1000,
	'what was pending in the copy is published by both, with the same message ids, if that is asked for'
);

# Commands that fail

$node->safe_psql(
	'postgres', q(
create role plain login;
create role creator login createdb;
create role owner login;
grant all on database new to plain, creator;
alter database new owner to owner));
make_busy('new', 't_old');
$pid = PgFanout::publisher_pid($node, dbname => 'new');
foreach my $case (
	[ 'plain', 'drop database new' ],
	[ 'plain', 'alter database new rename to other' ],
	[ 'plain', 'alter database new set tablespace pg_default' ],
	[ 'plain', 'create database other template new' ],
	[ 'plain', q(alter database new set pg_fanout.heartbeat = 5) ],
	[ 'plain', 'alter database new reset all' ],
	[ 'plain', 'alter role all reset all' ],
	[ 'plain', 'drop extension pg_fanout', 'new' ],
	[ 'plain', "select pg_terminate_backend($pid)" ],
	[ 'creator', 'create database other template new' ],
	[ 'creator', 'alter database new rename to other' ],
	[ 'owner', 'alter database new rename to other' ],
	[ 'owner', 'create database other template new' ])
{
	my ($role, $command, $database) = @$case;

	like(run_as($role, $command, $database || 'postgres'),
		qr/permission denied|must be (a )?(superuser|owner)|is a member of the role/i,
		"role $role may not: $command");
}
run_as('plain', 'alter role plain reset all');
run_as('plain', q(alter role plain set work_mem = '5MB'));
run_as('plain', q(begin; savepoint s; alter database new set pg_fanout.heartbeat = 5;
	rollback to s; commit), 'postgres', on_error_stop => 0);
run_as('plain', q(do $$ begin execute 'alter database new reset all';
	exception when others then null; end $$));
Time::HiRes::sleep(0.5);
is(PgFanout::publisher_pid($node, dbname => 'new'),
	$pid, 'a role without rights cannot stop the publisher');

my $session = $node->background_psql('new');
$session->query_safe('select 1');
# the server itself waits 5 s for the session to go away
like(timed('postgres', 'drop database new', 15),
	qr/being accessed by other users/,
	'DROP DATABASE fails beside another session');
ok(eventually(sub { publisher_is_other('new', $pid) }),
	'and the publisher comes back after it');
$session->quit;
$proxy->command('pass');
all_arrive('new', 'after commands that failed', 't_old');

# Signals

$pid = PgFanout::publisher_pid($node);
$node->safe_psql('postgres', "select pg_cancel_backend($pid)");
write_messages('postgres', 10);
PgFanout::flush($node);
is(PgFanout::publisher_pid($node), $pid, 'pg_cancel_backend is harmless');
$node->safe_psql('postgres', "select pg_terminate_backend($pid)");
ok(eventually(sub { publisher_is_other('postgres', $pid) }),
	'after pg_terminate_backend there is another publisher');
write_messages('postgres', 10);
all_arrive('postgres', 'after pg_cancel_backend and pg_terminate_backend');

# Settings

my $elsewhere = bless {%$broker}, ref $broker;
$elsewhere->{vhost} = $broker->vhost . '_elsewhere';
$elsewhere->create_vhost;
my $uri = $proxy->uri;
my $uri_elsewhere = $elsewhere->uri(port => $proxy->port);

$node->safe_psql('postgres',
	"alter database postgres set pg_fanout.uri = '$uri_elsewhere'");
ok(eventually(sub { connected_to('postgres', $elsewhere) }),
	'ALTER DATABASE SET pg_fanout.uri takes effect');
$node->safe_psql('postgres', 'alter database postgres reset pg_fanout.uri');
ok(eventually(sub { connected_to('postgres', $broker) }),
	'ALTER DATABASE RESET, too');
make_busy('postgres');
$pid = PgFanout::publisher_pid($node);
$node->append_conf('postgresql.conf', "pg_fanout.uri = '$uri_elsewhere'");
$node->reload;
ok(eventually(sub { connected_to('postgres', $elsewhere) }),
	'a reload moves a busy publisher to another virtual host');
$proxy->command('pass');
PgFanout::flush($node);
is(PgFanout::publisher_pid($node), $pid, 'without a restart');
cmp_ok(scalar(receive($elsewhere, 't_postgres_c')), '>', 0, 'messages arrive there');
all_arrive('postgres', 'on the way');
$node->append_conf('postgresql.conf', "pg_fanout.uri = '$uri'");
$node->reload;
$node->safe_psql('postgres', 'drop extension pg_fanout');
$node->safe_psql('postgres', "drop database $_") foreach 'new', 'copy';

# template1, and many databases

$node->safe_psql('template1', 'create extension pg_fanout');
write_messages('template1', 1, 't_many');
$node->safe_psql('postgres', "create database many$_") foreach 1 .. 10;
ok( eventually(
		sub {
			return 10 == grep { publishers("many$_") == 1 } 1 .. 10;
		},
		40),
	'10 databases made from a template1 with the extension: each has a publisher'
);
is(publishers('template1'), 0, 'template1 itself has none');
$node->safe_psql("many$_", 'select fanout.activate(publish_copied => true)') foreach 1 .. 10;
PgFanout::flush($node, dbname => "many$_") foreach 1 .. 10;
is(scalar($broker->collect('t_many_c', expect => 10, idle => 0.5)),
	10, 'each of them publishes once it is activated');
$node->safe_psql('postgres', "drop database many$_") foreach 4 .. 10;
$node->safe_psql('template1', 'drop extension pg_fanout');

# Not enough room: three databases have the extension, two can have a
# publisher.

$position = log_position();
$node->append_conf('postgresql.conf', 'max_worker_processes = 4');
$node->restart;
ok(eventually(sub { running() == 2 }),
	'max_worker_processes exhausted: others run');
$node->wait_for_log(qr/out of background worker slots/, $position);
Time::HiRes::sleep(11);    # REGISTER_RETRY
is(log_count(qr/cannot start a worker: out of background worker slots.*?\n[^\n]*DETAIL[^\n]*\n[^\n]*HINT:  Increase max_worker_processes/s, $position),
	1, 'one line in the log, with a hint');
is(log_count(qr/out of background worker slots/, $position),
	1, 'and no more of them with each attempt');
my ($running, $waiting) = running_and_waiting();
$node->safe_psql('postgres', "drop database $running");
ok(eventually(sub { publishers($waiting) == 1 }, 30),
	'the other starts when there is room');

$node->safe_psql('postgres', "create database $running template $waiting");
$node->append_conf('postgresql.conf',
	"max_worker_processes = 20\npg_fanout.max_databases = 2");
$position = log_position();
$node->restart;
ok(eventually(sub { running() == 2 }),
	'pg_fanout.max_databases exceeded: others run');
$node->wait_for_log(qr/cannot start more than 2 publishers/, $position);
($running, $waiting) = running_and_waiting();
$node->safe_psql('postgres', "select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'pg_fanout publisher'");
Time::HiRes::sleep(2);
is(log_count(qr/cannot start more than 2 publishers.*?\n[^\n]*DETAIL[^\n]*\n[^\n]*HINT:  Increase pg_fanout.max_databases/s, $position),
	1, 'one line in the log, with a hint');
is(log_count(qr/cannot start more than 2 publishers/, $position),
	1, 'and no more of them');
$node->safe_psql('postgres', "drop database $running");
ok(eventually(sub { publishers($waiting) == 1 }),
	'the other starts when there is a slot');
$node->stop('fast');

# A server that does not preload the library

my $late = PgFanout::cluster(
	'late', $broker,
	extension => 0,
	conf => "shared_preload_libraries = ''\n");
my ($stdout, $stderr) = ('', '');
$late->psql('postgres', 'create extension pg_fanout', stderr => \$stderr);
like($stderr,
	qr/WARNING:  pg_fanout is not in shared_preload_libraries.*HINT:  Add it to shared_preload_libraries and restart/s,
	'without the preload: CREATE EXTENSION warns');
is( $late->psql(
		'postgres', q(
create table users (id integer primary key);
select fanout.declare_binding('t_late', 'c');
select fanout.capture('users', 't_late');
insert into users select generate_series(1, 100);
update users set id = -id where id <= 50;
select fanout.publish('t_late', '{}')),
		on_error_stop => 1),
	0,
	'without the preload: writing works');
is($late->safe_psql('postgres', q(select state, count(*) from fanout.outbox_status group by 1)),
	'pending|151', 'and is kept');
$late->append_conf('postgresql.conf', "shared_preload_libraries = 'pg_fanout'");
$late->restart;
PgFanout::flush($late);
is( join("\n", sort map { $_->{message_id} } $broker->collect('t_late_c', expect => 151, idle => 0.5)),
	$late->safe_psql('postgres', 'select message_id from fanout.outbox order by 1'),
	'after a restart with the preload everything is published');
$late->stop('fast');

done_testing();

# A test that dies leaves no pgbench behind.
END
{
	local ($?, $@);

	$writer->{harness}->kill_kill if $writer && $writer->{harness};
}

# By itself the launcher looks at databases once a minute: what takes as long was
# missed by whoever should have told it.
sub eventually
{
	my ($condition, $seconds) = @_;

	return eval { PgFanout::poll($condition, 'it', $seconds || 20); 1 } ? 1 : 0;
}

# How many publishers a database has.
sub publishers
{
	my ($database) = @_;

	return $node->safe_psql('postgres',
		"select count(*) from pg_stat_activity
		 where backend_type = 'pg_fanout publisher' and datname = '$database'");
}

sub running
{
	return $node->safe_psql('postgres',
		q(select count(*) from pg_stat_activity
		  where backend_type = 'pg_fanout publisher' and datname like 'many%')
	);
}

# Of the databases many*: one with a publisher, and the one without.
sub running_and_waiting
{
	my @with = grep { publishers($_) } 'many1', 'many2', 'many3';
	my @without = grep { !publishers($_) } 'many1', 'many2', 'many3';

	return ($with[0], $without[0]);
}

# One that looks for the extension may be seen for a moment, and late.
sub no_publisher
{
	my ($database, $after) = @_;
	my $gone = sub { publishers($database) == 0 };
	my $ended = eventually($gone);

	Time::HiRes::sleep(1);
	ok($ended && eventually($gone), "$after leaves no publisher behind");
	return;
}

sub publisher_is_other
{
	my ($database, $pid) = @_;

	return $node->safe_psql($database,
		"select exists (select from fanout.stat_publisher where pid <> $pid and state <> 'starting')"
	) eq 't';
}

sub connected_to
{
	my ($database, $where) = @_;
	my $to = $node->safe_psql($database,
		"select coalesce(connected_to, '') from fanout.stat_publisher");

	return $to =~ m{/\Q$where->{vhost}\E$};
}

sub create_database
{
	my ($database) = @_;

	$node->safe_psql('postgres', "create database $database");
	$node->safe_psql($database, 'create extension pg_fanout');
	PgFanout::publisher_pid($node, dbname => $database);
	return;
}

sub write_messages
{
	my ($database, $count, $topic) = @_;

	$topic ||= "t_$database";
	$node->safe_psql(
		$database, qq(
select fanout.declare_binding('$topic', 'c');
select count(fanout.publish('$topic', jsonb_build_object('i', i, 'pad', repeat('x', 500))))
from generate_series(1, $count) i));
	return;
}

# Gives the publisher work for half a minute, and returns once it is at it.
sub make_busy
{
	my ($database, $topic) = @_;

	write_messages($database, 1, $topic);
	PgFanout::flush($node, dbname => $database);
	$proxy->command('throttle 100000');
	write_messages($database, 4000, $topic);
	PgFanout::wait_for_publisher($node, 'publishing', dbname => $database);
	return;
}

# What is in the outbox has been in the queue.
sub all_arrive
{
	my ($database, $when, $topic) = @_;
	my @expected;

	$topic ||= "t_$database";
	PgFanout::flush($node, dbname => $database);
	@expected = split(/\n/,
		$node->safe_psql($database, 'select message_id from fanout.outbox'));
	receive($broker, "${topic}_c");
	is(scalar(grep { !$received{$_} } @expected), 0, "nothing is lost $when");
	return;
}

# The message ids of what is in a queue.
sub receive
{
	my ($from, $queue) = @_;
	my @ids = split(/\n/,
		$from->amqp('collect', '--queue', $queue, '--idle', 0.5, '--ids', '--ack'));

	$received{$_} = 1 foreach @ids;
	return @ids;
}

# Runs a command; returns its error, or that it took too long.
sub timed
{
	my ($database, $command, $seconds) = @_;
	my $start = Time::HiRes::time();
	my $stderr = '';
	my $took;

	local $ENV{PGOPTIONS} = '-c client_min_messages=warning';

	$node->psql($database, $command, stderr => \$stderr);
	$took = Time::HiRes::time() - $start;
	note(sprintf('%.2f s: %s', $took, $command));
	$stderr .= sprintf('took %.1f s', $took) if $took >= $seconds;
	return $stderr;
}

sub run_as
{
	my ($role, $command, $database, %params) = @_;
	my $stderr = '';

	$node->psql(
		$database || 'postgres', $command,
		extra_params => [ '-U', $role ],
		stderr => \$stderr,
		%params);
	return $stderr;
}

sub start_writer
{
	my ($database, $sql) = @_;
	my $writer = { out => '', err => '' };
	my $file = PostgreSQL::Test::Utils::tempdir() . '/writer.sql';

	PostgreSQL::Test::Utils::append_to_file($file, "$sql;\n");
	$writer->{harness} = IPC::Run::start(
		[
			'pgbench', '-n', '-c', '2', '-T', '600', '-f', $file,
			$node->connstr($database)
		],
		'<', \undef, '>', \$writer->{out}, '2>', \$writer->{err});
	PgFanout::poll(
		sub { $node->safe_psql($database, 'select count(*) from users') > 20 },
		'a writer that writes');
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

sub log_position
{
	return -s $node->logfile;
}

sub log_lines
{
	my ($pattern, $position) = @_;
	my $log = PostgreSQL::Test::Utils::slurp_file($node->logfile, $position);

	return join("\n", grep { /$pattern/ } split(/\n/, $log));
}

sub log_count
{
	my ($pattern, $position) = @_;
	my $log = PostgreSQL::Test::Utils::slurp_file($node->logfile, $position);
	my $count = () = $log =~ /$pattern/g;

	return $count;
}
