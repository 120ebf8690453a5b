# A backlog costs the same per message from its first to its last, also with a
# snapshot open that is 100,000 transactions old: buffers touched by the
# statements that read it are counted by the server itself.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $messages = 100000;

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;

# Autovacuum's reading of a segment would count, too.
my $node = PgFanout::cluster('main', $proxy, conf => 'autovacuum = off');

sub sql { return $node->safe_psql('postgres', $_[0]); }

# Buffers of the outbox's segments that were touched so far, by whomever.  A worker
# reports its figures at most once a second, when a transaction of it ends: so there
# has to be one more.
my $one_more = 1_000_000_001;

sub touched
{
	for (1 .. 2)
	{
		sleep 2;
		sql('insert into t values (' . $one_more++ . ', 0)');
		PgFanout::flush($node);
	}
	return sql(q(select sum(heap_blks_hit + heap_blks_read) from pg_statio_user_tables where relname ~ '^outbox_'));
}

sql( q(select fanout.declare_binding('t', 'g', 'classic');
	   create table t (id int primary key, v int);
	   select fanout.capture('t', 't')));
PgFanout::flush($node);

# A snapshot that stays open, and 100,000 transactions after it, most of which
# write messages.
my ($in, $out, $err) = ('', '', '');
my $holder = IPC::Run::start(
	[ 'psql', '-XAtq', '-d', $node->connstr('postgres') ],
	'<', \$in, '>', \$out, '2>', \$err, IPC::Run::timeout(1800));
$in .= "begin isolation level repeatable read; select 'open', count(*) from t;\n";
$holder->pump until $out =~ /open/;

$proxy->command('cut');
my $script = "$PostgreSQL::Test::Utils::tmp_check/insert.sql";
append_to_file($script, "\\set i random(1, 1000000000)\ninsert into t values (:i, 1) on conflict (id) do update set v = t.v + 1;\n");
sql('alter system set synchronous_commit = off');
$node->reload;
$node->command_ok(
	[ 'pgbench', '-n', '-f', $script, '-c', 4, '-j', 2, '-t', $messages / 4, '-M', 'prepared', 'postgres' ],
	"$messages transactions while the broker is away");
ok( $node->poll_query_until('postgres', "select pending = $messages from fanout.stat_topics where topic = 't'"),
	'they are pending');

sql('alter system reset synchronous_commit');
$node->reload;
my $before = sql(q(select sum(heap_blks_hit + heap_blks_read) from pg_statio_user_tables where relname ~ '^outbox_'));
$proxy->command('pass');
PgFanout::flush($node, timeout => '120 s');
is($broker->count('t_g'), $messages, 'and arrive');
my $buffers = (touched() - $before) / $messages;
cmp_ok($buffers, '<', 1.5, sprintf('%.2f buffers per message for the backlog', $buffers));

# Batches that come one by one, as the snapshot grows older and the outbox
# fuller.
sub single_batches
{
	my ($first) = @_;

	for (1 .. 50)
	{
		sql("insert into t select $first + " . $_ * 10 . ' + i, 0 from generate_series(0, 9) i');
		PgFanout::flush($node);
	}
	return;
}

$before = touched();
single_batches(2_000_000_000);
my $first = touched() - $before;
sql('update t set v = v + 1');
PgFanout::flush($node, timeout => '120 s');
$before = touched();
single_batches(2_100_000_000);
my $last = touched() - $before;
cmp_ok($last, '<=', $first * 1.2,
	sprintf('per message, no more buffers are touched when twice as much was sent (%.2f, before %.2f)', $last / 500, $first / 500));

# the second look of a session: the first one fills its caches
my ($touched) = sql('select count(*) from fanout.stat_topics; explain (analyze, buffers, costs off, timing off) select * from fanout.stat_topics') =~ /Buffers: shared hit=(\d+)/;
cmp_ok($touched, '<', 500, "stat_topics touches no more buffers for what was sent: $touched");

$in .= "select count(*) from t; commit; \\q\n";
$holder->finish;
like($out, qr/^0$/m, 'the old snapshot was open all the time');
is(sql(q(select coalesce(sum(n_dead_tup), 0) from pg_stat_user_tables where relname ~ '^outbox_')),
	0, 'and no dead tuple is in the outbox');

done_testing();
