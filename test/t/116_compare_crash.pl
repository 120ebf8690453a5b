# fanout.compare() finds the same whatever fails meanwhile: what is planted at the copy
# and nothing else, each row once; and a repair mends it.
#
# PG_FANOUT_LONG=1: 200,000 rows and 4 comparisons in place of 10,000 and 2.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $long = $ENV{PG_FANOUT_LONG};
my $rows = $long ? 200_000 : 10_000;
my $runs = $long ? 4 : 2;
my $planted = 20;
my $patience = 600;

my $directory = PostgreSQL::Test::Utils::tempdir;
my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
restart_after_crash = on
max_worker_processes = 30
));
my ($load, $out, $err) = (undef, '', '');

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub copy { return $node->safe_psql('copy', $_[0]); }

# The same, where the server may be away: then there is no result.
sub ask { return PgFanout::ask($node, @_); }

# The load leaves keys alone that are divisible by 10.
append_to_file("$directory/load.sql", "\\set i random(1, $rows / 10 - 1)\n\\set j random(1, 9)\n\\set id :i * 10 + :j\n\\set kind random(1, 10)\n" . q(\if :kind <= 2
delete from accounts where id = :id;
\elif :kind <= 4
insert into accounts values (:id, -1) on conflict (id) do nothing;
\elif :kind = 5
update accounts set id = id + 10000000 where id = :id and not exists (select from accounts where id = :id + 10000000);
\else
update accounts set balance = balance + 1 where id between :id and :id + 2 and id % 10 <> 0;
\endif
));

sub start_load
{
	local $ENV{PGAPPNAME} = 'pgbench';

	$load = IPC::Run::start([ 'pgbench', '-n', '-c', '2', '-R', '100', '-T', 3600, '-f', "$directory/load.sql", $node->connstr('postgres') ],
		'<', \undef, '>', \$out, '2>', \$err);
	return;
}

sub strike
{
	my ($signal, $kind) = @_;
	my $pid = ask("select pid from pg_stat_activity where backend_type = 'pg_fanout $kind' limit 1");

	return if $pid !~ /^\d+$/;
	$signal eq 'KILL' ? PgFanout::kill_process($node, $pid) : kill($signal, $pid);
	return;
}

my @kinds = (
	[ 'the walker ended' => sub { strike('TERM', 'history') } ],
	[ 'the consumer killed' => sub { strike('KILL', 'consumer') } ],
	[ 'the broker killed' => sub { $broker->kill; $broker->start; } ],
	[ 'the consumer ended' => sub { strike('TERM', 'consumer') } ],
	[ 'the server stopped at once' => sub { $node->stop('immediate'); $node->start; } ],
	[ 'the walker killed' => sub { strike('KILL', 'history') } ],
	[ 'all connections closed' => sub { $broker->ctl('close_all_connections', '-p', $broker->vhost, 'on purpose') } ]);

# Compares while that fails, about halfway, and returns the run.
sub compared
{
	my ($repair, @faults) = @_;
	my $run = sql("select fanout.compare('accounts', 'account', 'copy', $repair)");

	foreach my $i (1 .. @faults)
	{
		PgFanout::poll(
			sub { ask("select state = 'done' or rows_done > $rows * $i / (1 + " . @faults . ") from fanout.backfills where id = $run") eq 't' },
			'progress', $patience);
		note $faults[ $i - 1 ]->[0] . ', ' . ask("select state || ' ' || rows_done from fanout.backfills where id = $run");
		$faults[ $i - 1 ]->[1]->();
		PgFanout::poll(
			sub {
				eval { $load->pump_nb; $load->pumpable } or do { eval { $load->finish }; start_load(); };
				return ask(q(select count(*) > 0 from pg_stat_activity where application_name = 'pgbench')) eq 't';
			},
			'server and load');
	}
	# when the last message has come, others may still wait to be tried again
	PgFanout::poll(sub { ask("select count(*) from fanout.sync_comparisons where run = $run and finished_at is not null and state <> 'incomplete'", 'copy') eq '1' },
		'the end of the comparison', $patience);
	return $run;
}

sub found
{
	my ($run) = @_;

	return copy("select concat_ws(' ', state, missing, different, extra, mended) from fanout.sync_comparisons where run = $run");
}

# ---- a copy with differences ----

sql(qq(
create database copy;
create table accounts (id int primary key, balance int, filler text default repeat('f', 100));
insert into accounts select i, 0 from generate_series(1, $rows) i;
select fanout.declare_binding('account', 'copy'), fanout.capture('accounts', 'account');
select fanout.backfill('accounts', 'account', 'copy');
));
$node->safe_psql('copy', q(
create extension pg_fanout;
create table accounts (id int primary key, balance int, filler text);
select fanout.sync_table('account', 'copy', 'accounts');
));
PgFanout::poll(sub { sql(q(select count(*) from fanout.backfills where state <> 'done')) == 0 }, 'the backfill', $patience);
PgFanout::flush($node, timeout => "$patience s");
PgFanout::poll(sub { $broker->left('account_copy') == 0 }, 'the queue is empty', $patience);
PgFanout::poll(sub { copy('select count(*) from accounts') == $rows }, 'the copy', $patience);
my $step = int($rows / $planted / 10) * 10;
copy(qq(
delete from accounts where id % $step = 0;
update accounts set balance = -1 where id % $step = 10;
insert into accounts select -i * 10, 7 from generate_series(1, $planted) i;
));
my $differences = join ' ', map { sql("select count(*) from accounts where id % $step = $_ and id <= $rows") } 0, 10;
$differences .= " $planted";

# ---- comparisons, while everything fails ----

start_load();
foreach my $i (1 .. $runs)
{
	my $run = compared('false', @kinds[ $i % 2 ? (0 .. 3) : (4 .. 6) ]);

	is(found($run), "different $differences 0", "what is planted is found, and nothing else, while everything fails ($i)");
	is(copy("select count(*), count(distinct key) from fanout.sync_differences where run = $run"), join('|', (eval join '+', split / /, $differences) x 2), 'each row once');
}
my $mended = eval join '+', split / /, $differences;
is(found(compared('true', @kinds[ 4, 1, 0 ])), "different $differences $mended", 'a repair mends it, while everything fails');
is(found(compared('false', $kinds[6])), 'equal 0 0 0 0', 'and the copy is equal then');

$load->signal('TERM');
eval { $load->finish };
PgFanout::poll(sub { ask(q(select count(*) from pg_stat_activity where application_name = 'pgbench')) eq '0' }, 'the end of the load');
PgFanout::flush($node, timeout => "$patience s");
my $sum = q(select count(*), sum(balance), md5(string_agg(a::text, ',' order by id)) from accounts a);
PgFanout::poll(sub { ask($sum, 'copy') eq ask($sum) }, 'an equal copy');
pass('after all of it, the copy equals the table');
is(copy('select count(*) from fanout.dead_letter'), '0', 'no message was given up');

done_testing();

END
{
	local ($?, $@);

	$load->kill_kill if $load;
}
