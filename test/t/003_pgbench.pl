# pgbench's own tables are captured while four clients write them, with
# rollbacks.  What an independent client then takes out of the queues is put
# beside the tables, row by row.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $clients = 4;
my $transactions = 5000;    # each

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker);

sub sql { return $node->safe_psql('postgres', $_[0]); }

# One in ten transactions is rolled back, one in ten in a subtransaction.
my $script = "$PostgreSQL::Test::Utils::tmp_check/with_rollbacks.sql";
append_to_file(
	$script, q(
\set aid random(1, 100000 * :scale)
\set bid random(1, 1 * :scale)
\set tid random(1, 10 * :scale)
\set delta random(-5000, 5000)
\set fate random(1, 10)
begin;
update pgbench_accounts set abalance = abalance + :delta where aid = :aid;
\if :fate = 2
savepoint s;
update pgbench_accounts set abalance = -999999 where aid = :aid;
insert into pgbench_history (tid, bid, aid, delta, mtime) values (:tid, :bid, :aid, -999999, now());
rollback to savepoint s;
\endif
update pgbench_tellers set tbalance = tbalance + :delta where tid = :tid;
update pgbench_branches set bbalance = bbalance + :delta where bid = :bid;
insert into pgbench_history (tid, bid, aid, delta, mtime) values (:tid, :bid, :aid, :delta, now());
\if :fate = 1
rollback;
\else
commit;
\endif
));

$node->command_ok([ 'pgbench', '-i', '-q', '-s', '10', 'postgres' ], 'pgbench -i');
foreach my $table (qw(accounts tellers branches history))
{
	sql( qq(select fanout.declare_binding('bench_$table', 'check');
			select fanout.capture('pgbench_$table', 'bench_$table', old_row => true)));
}
sql( q(create table start_accounts as table pgbench_accounts;
	   create table start_tellers as table pgbench_tellers;
	   create table start_branches as table pgbench_branches));
$node->command_ok(
	[
		'pgbench', '-n', '-f', $script, '-c', $clients, '-j', 2,
		'-t', $transactions, '-M', 'prepared', 'postgres'
	],
	"$clients clients, $transactions transactions each, one in ten rolled back");
PgFanout::flush($node, timeout => '180 s');

# What arrived goes into a table, in the order of its arrival.
sql('create table received (n bigserial, what text, message jsonb)');
foreach my $table (qw(accounts tellers branches history))
{
	my $expected = sql(qq(select count(*) from fanout.outbox_status where topic = 'bench_$table'));
	my $file = "$PostgreSQL::Test::Utils::tmp_check/$table.jsonl";

	append_to_file($file,
		$broker->amqp('collect', '--queue', "bench_${table}_check", '--expect', $expected, '--ack'));
	sql( qq(copy received (message) from '$file' with (format csv, quote e'\\x01', delimiter e'\\x02');
			update received set what = '$table' where what is null));
}
sql( q(create table change as
	   select n, what, message ->> 'message_id' as message_id, message -> 'headers' ->> 'key' as key,
			  (message -> 'headers' ->> 'sequence')::bigint as sequence,
			  (message ->> 'body')::jsonb -> 'before' as before,
			  (message ->> 'body')::jsonb -> 'after' as after
	   from received));

my $committed = sql('select count(*) from pgbench_history');
cmp_ok($committed, '>', $clients * $transactions * 0.8, "$committed transactions committed");
cmp_ok($committed, '<', $clients * $transactions, 'and some did not');
is( sql('select what, count(*), count(distinct message_id) from change group by 1 order by 1'),
	join("\n", map { "$_|$committed|$committed" } qw(accounts branches history tellers)),
	'0 missing, 0 invented, 0 twice: one change of each table for each committed transaction');

is( sql( q(select count(*) from (
		   select sequence < lag(sequence) over (partition by what, key order by n) as wrong
		   from change where key is not null) c where wrong)),
	0,
	'0 out of order per key, by the sequence header');
is( sql( q(select count(*) from (
		   select before <> lag(after) over (partition by what, key order by n) as wrong
		   from change where key is not null) c where wrong)),
	0,
	'each row before is the row after of the message before, without a gap');

foreach my $t ([ 'accounts', 'aid' ], [ 'tellers', 'tid' ], [ 'branches', 'bid' ])
{
	my ($table, $key) = @$t;

	is( sql( qq(select count(*) from
				(select distinct on (key) (after ->> '$key')::int as $key, after
				 from change where what = '$table' order by key, n desc) last
				full join pgbench_$table t using ($key)
				left join start_$table s using ($key)
				where coalesce(last.after, to_jsonb(s)) is distinct from to_jsonb(t))),
		0,
		"$table: per key the last image in the queue is the row in the table, and other rows did not change");
}
is( sql( q(select count(*) from
		   (select jsonb_strip_nulls(after) as j, count(*) from change where what = 'history' group by 1) a
		   full join (select jsonb_strip_nulls(to_jsonb(h)) as j, count(*) from pgbench_history h group by 1) b
		   using (j, count) where a.j is null or b.j is null)),
	0,
	'history: the same rows, as often');
is(sql(q(select count(*) from change where after ->> 'delta' = '-999999' or after ->> 'abalance' = '-999999')),
	0, 'nothing of a rolled-back subtransaction');
is(sql(q(select n_tup_upd + n_tup_del from pg_stat_user_tables where relid = 'fanout.outbox_0'::regclass)),
	0, 'the outbox was only inserted into');

done_testing();
