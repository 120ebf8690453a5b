# What waits for the publisher for long: transactions whose outcome the server has
# forgotten, a backlog that another publisher begins with, and a batch that takes
# longer than segments are kept.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $node = PgFanout::cluster(
	'main', $proxy,
	conf => q(
autovacuum = off
synchronous_commit = off
vacuum_freeze_min_age = 0
pg_fanout.retry_interval = 1s
));

sub sql { return $node->safe_psql($_[1] || 'postgres', $_[0]); }

sub in_log
{
	my ($pattern, $offset) = @_;

	return slurp_file($node->logfile, $offset || 0) =~ $pattern;
}

# The publisher's memory for transactions that have not ended, in bytes.
sub pending_memory
{
	my $offset = -s $node->logfile;

	sql('select pg_log_backend_memory_contexts(pid) from fanout.stat_publisher');
	PgFanout::poll(sub { in_log(qr/pg_fanout pending transactions: \d+ total/, $offset) }, 'the list of contexts');
	my ($bytes) = slurp_file($node->logfile, $offset) =~ /pg_fanout pending transactions: (\d+) total/;
	return $bytes;
}

sql( q(select fanout.declare_binding('t', 'g', 'classic');
	   create table t (id bigserial primary key, v text);
	   select fanout.capture('t', 't', '{insert}')));
PgFanout::flush($node);

# ---- the commit log is cut off ----

my ($in, $out, $err) = ('', '', '');
my $open = IPC::Run::start(
	[ 'psql', '-XAtq', '-d', $node->connstr('postgres') ],
	'<', \$in, '>', \$out, '2>', \$err, IPC::Run::timeout(300));
$in .= "begin; insert into t (v) values ('seen while it was open'); select 'open';\n";
$open->pump until $out =~ /open/;
sql(q(insert into t (v) values ('other')));
PgFanout::flush($node);
$proxy->command('cut');
$in .= "commit; \\q\n";
$open->finish;
# as many transactions as make the first part of the log superfluous
sql( q(create procedure use_up(n integer) language plpgsql
	   as $$ begin for i in 1 .. n loop perform pg_current_xact_id(); commit; end loop; end $$;));
sql('call use_up(1150000)');
sql(q(update pg_database set datallowconn = true where datname = 'template0'));
sql('vacuum freeze', $_) foreach qw(template0 template1 postgres);
is(sql(q(select count(*) from pg_ls_dir('pg_xact') f where f = '0000')), 0, 'the outcome of old transactions is forgotten');
$proxy->command('pass');
PgFanout::flush($node, timeout => '60 s');
is($broker->count('t_g'), 2, 'a transaction whose outcome is forgotten arrives');
ok(!in_log(qr/could not access status/), 'without an error');

# ---- another publisher begins with a backlog ----

my $dir = PostgreSQL::Test::Utils::tempdir();
append_to_file("$dir/insert.sql", "insert into t (v) values ('one of many');\n");
$proxy->command('cut');
$node->command_ok(
	[ 'pgbench', '-n', '-f', "$dir/insert.sql", '-c', 4, '-t', 5000, '-M', 'prepared', 'postgres' ],
	'20000 transactions while the broker is away');
my $pid = PgFanout::publisher_pid($node);
sql("select pg_terminate_backend($pid)");
PgFanout::poll(sub { sql('select coalesce(max(pid), 0) from fanout.stat_publisher') !~ /^($pid|0)$/ }, 'a new publisher');
$proxy->command('pass');
PgFanout::flush($node, timeout => '60 s');
is($broker->count('t_g'), 20002, 'the backlog arrives');
cmp_ok(pending_memory(), '<', 100_000, 'and the publisher did not take its transactions for open ones');

# ---- a batch that takes longer than the retention ----

sub file { return sql("select pg_relation_filenode('fanout.outbox_0')"); }

sql(q(alter system set pg_fanout.retention = '4s'));
$node->reload;
PgFanout::poll(
	sub {
		sql(q(insert into t (v) values ('turns')));
		PgFanout::flush($node);
		return sql('select current from fanout.rotation') == 1;
	},
	'rotation');
my $file = file();
my $offset = -s $node->logfile;
my $before = $broker->count('t_g');
sql(q(alter system set pg_fanout.max_in_flight = 1));
$node->reload;
sql(q(insert into t (v) select repeat('y', 500) from generate_series(1, 40000) i));
PgFanout::poll(sub { file() ne $file }, 'a segment to be emptied in the midst of the batch');
cmp_ok(sql('select sum(pending) from fanout.stat_topics'), '>', 0, 'which is under way then');
sql(q(alter system reset pg_fanout.max_in_flight));
sql(q(alter system reset pg_fanout.retention));
$node->reload;
PgFanout::flush($node, timeout => '120 s');
is($broker->count('t_g') - $before, 40000, 'and arrives, each message once');
ok(!in_log(qr/was rewritten while it was read|exited with exit code 1/, $offset), 'without an end of the publisher');

$node->stop;
done_testing();
