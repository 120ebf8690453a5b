# A service that comes late gets every row of a table that is written all the time,
# while workers, consumers, server and broker fail: declare_binding() and backfill()
# are all it takes.  The copy of sync_table() is equal, compare() agrees, also while the
# copy refuses a row now and then, and the consumers of the README, in Python, Node and
# Go, reach the same.
#
# PG_FANOUT_LONG=1: a million rows and 30 faults in place of 5,000 and 9; they are sent
# to the topic once, in place of each queue.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use File::Compare ();
use File::Temp ();
use POSIX ();

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $long = $ENV{PG_FANOUT_LONG};
my $rows = $long ? 1_000_000 : 5_000;
my $faults = $long ? 30 : 9;
my $rate = $long ? 'null' : 250;    # so that the short form is not done before the first fault
my $patience = $long ? 3600 : 300;
my @languages = qw(python node go);

my $examples = "$FindBin::RealBin/../examples";
my $directory = PostgreSQL::Test::Utils::tempdir;
# in memory, if that can be: SQLite syncs each of its commits
my $memory = File::Temp::tempdir('pg_fanout.XXXXXX', DIR => -w '/dev/shm' ? '/dev/shm' : $directory, CLEANUP => 1);
my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
restart_after_crash = on
max_worker_processes = 30
));

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub copy { return $node->safe_psql('copy', $_[0]); }

# The same, where the server may be away: then there is no result.
sub ask { return PgFanout::ask($node, @_); }

# ---- what runs beside the test ----

my $program = "$directory/consumer_go";
{
	local %ENV = (%ENV, GO111MODULE => 'off', GOPATH => '/usr/share/gocode', GOCACHE => "$directory/go.cache", GOFLAGS => '-p=1');

	PgFanout::run_command_ok('go', 'build', '-o', $program, "$examples/consumer.go");
}
my %commands = (
	python => sub { return ("$examples/consumer.py", @_, "$memory/python.db") },
	node => sub { return ('node', "$examples/consumer.mjs", @_) },
	go => sub { return ($program, @_) });
my %running;

# Output and errors go to files, so that nobody has to read them meanwhile.
sub run_beside
{
	my ($name, @command) = @_;
	my $pid = fork;

	die "could not fork: $!" unless defined $pid;
	return $running{$name} = $pid if $pid;
	open STDIN, '<', '/dev/null' or POSIX::_exit(1);
	open STDOUT, '>', "$directory/$name.out" or POSIX::_exit(1);
	open STDERR, '>>', "$directory/$name.err" or POSIX::_exit(1);
	exec @command or POSIX::_exit(1);
}

sub is_running { return $running{ $_[0] } && waitpid($running{ $_[0] }, POSIX::WNOHANG) == 0; }

sub end_beside
{
	my ($name) = @_;
	my $pid = delete $running{$name};

	kill 'TERM', $pid;
	waitpid $pid, 0;
	return;
}

sub start_consumer
{
	my ($language) = @_;

	run_beside($language, $commands{$language}->($broker->uri, "account_$language"));
	return;
}

append_to_file("$directory/load.sql", "\\set id random(1, $rows)\n\\set kind random(1, 10)\n" . q(\if :kind = 1
delete from accounts where id = :id;
\elif :kind <= 3
insert into accounts values (:id, -1, 'new') on conflict (id) do update set note = 'again';
\elif :kind = 4
update accounts set id = id + 10000000000000000 where id = :id and not exists (select from accounts where id = :id + 10000000000000000);
\else
update accounts set balance = balance + 1 where id between :id and :id + 2;
\endif
));

sub start_load
{
	local $ENV{PGAPPNAME} = 'pgbench';

	run_beside('load', 'pgbench', '-n', '-c', '2', '-R', '100', '-T', $patience, '-f', "$directory/load.sql", $node->connstr('postgres'));
	return;
}

# ---- a table with changes, and then services that want its rows ----

sql(qq(
create table accounts (id bigint primary key, balance int, note text);
insert into accounts select i, 0, 'of the beginning' from generate_series(1, $rows) i;
analyze accounts;
select fanout.declare_binding('account', 'old'), fanout.capture('accounts', 'account');
create database copy;
));
$node->safe_psql('copy', q(
create extension pg_fanout;
create table accounts (id bigint primary key, balance int, note text);
));
start_load();
my @groups = $long ? ('null') : map { "'$_'" } @languages, 'copy';

sql("select fanout.declare_binding('account', '$_')") foreach @languages, 'copy';
sql("select fanout.backfill('accounts', 'account', consumer_group => $_, rate => $rate)") foreach @groups;
start_consumer($_) foreach @languages;
copy(q(select fanout.sync_table('account', 'copy', 'accounts', retry_delay => '300 ms')));

# ---- faults ----

# A worker of the server's.  SIGKILL of one restarts the server.
sub strike
{
	my ($signal, $condition, $database) = @_;
	my $pid = ask("select pid from pg_stat_activity where $condition limit 1", $database);

	return if $pid !~ /^\d+$/;
	$signal eq 'KILL' ? PgFanout::kill_process($node, $pid) : kill($signal, $pid);
	return;
}

my $history = q(backend_type = 'pg_fanout history');
my @kinds = (
	[ 'the worker of backfills ended' => sub { strike('TERM', $history) } ],
	[ 'a consumer in Python killed' => sub { kill 'KILL', $running{python} } ],
	[ 'the server stopped at once' => sub { $node->stop('immediate'); $node->start; } ],
	[ 'the publisher ended' => sub { strike('TERM', q(backend_type = 'pg_fanout publisher' and datname = 'postgres')) } ],
	[ 'the broker killed' => sub { $broker->kill; $broker->start; } ],
	[ 'a consuming worker ended' => sub { strike('TERM', q(backend_type = 'pg_fanout consumer')) } ],
	[ 'all connections closed' => sub { $broker->ctl('close_all_connections', '-p', $broker->vhost, 'on purpose') } ],
	[ 'the worker of backfills killed' => sub { strike('KILL', $history) } ],
	[ 'a consuming worker killed' => sub { strike('KILL', q(backend_type = 'pg_fanout consumer')) } ]);

sub progress
{
	my $done = ask(q(select sum(rows_done), count(*) filter (where state not in ('done', 'failed', 'cancelled')) from fanout.backfills));

	return $done =~ /^(\d+)\|(\d+)$/ ? ($1, $2) : (0, 1);
}

# What a fault has ended is started again, as whoever runs it would.
sub revive
{
	foreach my $name (grep { !is_running($_) } @languages, 'load')
	{
		$name eq 'load' ? start_load() : start_consumer($name);
	}
	return;
}

my ($before, $struck) = (0, 0);

foreach my $i (1 .. $faults)
{
	my ($name, $strike) = @{ $kinds[ $i <= @kinds ? $i - 1 : int(rand(@kinds)) ] };

	PgFanout::poll(
		sub {
			my ($done, $running) = progress();

			revive();
			return $running == 0 || $done >= $before + @groups * $rows / $faults / 2;
		},
		"progress before $name", $patience);
	$struck++ if (progress())[1] > 0;
	note $name;
	$strike->();
	($before) = progress();
}
cmp_ok($struck, '>', $faults / 2, 'most faults came while rows were sent');
PgFanout::poll(sub { revive(); (progress())[1] == 0 }, 'the end of the backfills', $patience);
is(ask(q(select string_agg(distinct state, ' '), count(*) from fanout.backfills)), 'done|' . @groups, 'all backfills are done');

# ---- do they have the same? ----

sub compared
{
	my $run = sql(q(select fanout.compare('accounts', 'account', 'copy')));

	PgFanout::poll(sub { ask("select count(*) from fanout.sync_comparisons where run = $run and finished_at is not null and state <> 'incomplete'", 'copy') eq '1' },
		'the comparison', $patience);
	note(copy("select * from fanout.sync_differences where run = $run limit 20"));
	return copy("select state, compared, left_out, missing + different + extra from fanout.sync_comparisons where run = $run");
}

like(compared(), qr/^equal\|\d+\|\d+\|0$/, 'compare() finds no difference while all of them are written');
copy(q(
create function refuse() returns trigger language plpgsql as $$
begin
	if random() < 0.2 then
		raise 'not now';
	end if;
	return coalesce(new, old);
end $$;
create trigger refuse before insert or update or delete on accounts for each row execute function refuse();
));
like(compared(), qr/^equal\|\d+\|\d+\|0$/, "nor while one of five is refused at first, $_") foreach 1 .. ($long ? 2 : 10);
copy('drop trigger refuse on accounts');
end_beside('load');
PgFanout::poll(sub { ask(q(select count(*) from pg_stat_activity where application_name = 'pgbench')) eq '0' }, 'the end of the load');
PgFanout::flush($node, timeout => "$patience s");
foreach my $group (@languages, 'copy')
{
	PgFanout::poll(sub { $broker->left("account_$group") == 0 }, "an empty queue of $group", $patience);
}
PgFanout::poll(sub { ask(q(select bool_and(waiting = 0 and state = 'idle') from fanout.stat_subscriptions), 'copy') eq 't' }, 'an idle copy', $patience);
my $count = sql('select count(*) from accounts');
is(compared(), "equal|$count|0|0", 'compare() finds no difference when nothing is written any more');
my $sum = q(select count(*), sum(balance), md5(string_agg(a::text, ',' order by id)) from accounts a);
is(copy($sum), sql($sum), 'the copy of sync_table() is equal to the table');
is(sql('select count(*) from fanout.dead_letter') . copy('select count(*) from fanout.dead_letter'), '00', 'no message was given up');

# The copy of a consumer, as COPY writes the table.
my $rows_of = q(
import json, sqlite3, sys
if sys.argv[1] == 'python':
    rows = [json.loads(row) for row, in sqlite3.connect(sys.argv[2]).execute('select row from entity where row is not null')]
else:
    rows = [row for row in json.load(open(sys.argv[2]))['rows'].values() if row is not None]
rows.sort(key=lambda row: int(row['id']))
with open(sys.argv[3], 'w') as copy:
    for row in rows:
        print(row['id'], row['balance'], row['note'], sep='\t', file=copy));

my $table = "$directory/table.copy";
PgFanout::run_command_ok('psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', "\\copy (select id, balance, note from accounts order by id) to '$table'");
foreach my $language (@languages)
{
	end_beside($language);
	PgFanout::run_command_ok('python3', '-c', $rows_of, $language,
		$language eq 'python' ? "$memory/python.db" : "$directory/$language.out", "$directory/$language.copy");
	is(File::Compare::compare($table, "$directory/$language.copy"), 0, "the consumer in $language has the same");
	is(slurp_file("$directory/$language.out") =~ /"bad": ?(\d+)/ ? $1 : 'nothing', '0', 'and has put nothing aside');
}
note sql(q(select consumer_group, rows_done, finished_at - started_at from fanout.backfills where kind = 'backfill' order by 1));

done_testing();

END
{
	my $status = $?;
	local ($?, $@);

	foreach my $name (keys %running)
	{
		end_beside($name);
		note "$name: " . substr(slurp_file("$directory/$name.err"), -1000) if $status;
	}
}
