# TRUNCATE of a table whose rows refer to each other: the copy has the same foreign key,
# and loses all rows, too, by TRUNCATE or by deletes, whichever of them was there first.
# And rows that only their statement could write in the order in which they come.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster_with_copy($broker);
# whoever looks at a table keeps it from being truncated
$node->append_conf('postgresql.conf', 'autovacuum = off');
$node->reload;
copy(q(
create table deleted (name text);
create function note() returns trigger language plpgsql as $$ begin insert into deleted values (tg_table_name); return null; end $$));

sub source { return $node->safe_psql('postgres', $_[0]); }
sub copy { return $node->safe_psql('copy', $_[0]); }

sub same
{
	my ($table, $what) = @_;
	my $rows = "select coalesce(string_agg(t::text, ' ' order by id), '') from $table t";
	my $there = source($rows);

	# so does this test
	PgFanout::flush($node);
	PgFanout::poll(sub { $broker->left("${table}_g") == 0 }, "$what: an empty queue");
	PgFanout::poll(sub { copy($rows) eq $there },
		sub { "$what: " . copy('select topic, error from fanout.delivery_failure') . copy('select topic, waiting from fanout.stat_subscriptions') });
	ok(1, $what);
	return;
}

my %kinds = (
	'plain' => '',
	'restricted' => 'on delete restrict',
	'cascading' => 'on delete cascade',
	'deferred' => 'deferrable initially deferred',
	'partitioned' => '',
);

# ways: nothing in the way of a TRUNCATE; a trigger looks at deleted rows; somebody reads
foreach my $kind (sort keys %kinds)
{
	foreach my $way ('free', 'triggered', 'read')
	{
		my $t = "${kind}_$way";
		my $node_before;
		my $reader;

		foreach my $create (\&source, \&copy)
		{
			$create->("create table $t (id int primary key, parent int, x int) " . ($kind eq 'partitioned' ? 'partition by range (id)' : ''));
			$create->("create table ${t}_1 partition of $t for values from (minvalue) to (500); create table ${t}_2 partition of $t default") if $kind eq 'partitioned';
			$create->("alter table $t add foreign key (parent) references $t $kinds{$kind}");
		}
		source("select fanout.declare_binding('$t', 'g'), fanout.capture('$t', '$t')");
		copy("select fanout.sync_table('$t', 'g', '$t', retry_delay => '100 ms', max_retry_delay => '200 ms')");
		copy("create trigger note after delete on $t for each row execute function note()") if $way eq 'triggered';

		# chains up and down the keys, and a ring; the updates scatter them over the pages
		source("insert into $t select i, nullif(i - 1, 0), 0 from generate_series(1, 600) i;
			insert into $t select i, nullif(i + 1, 1201), 0 from generate_series(1200, 601, -1) i;
			update $t set parent = 300 where id = 1; update $t set x = 1 where id % 7 = 0");
		same($t, "$kind, $way: rows");
		if ($way eq 'read')
		{
			my $rows = '';

			$reader = IPC::Run::start([ 'psql', '-XqAt', '-d', $node->connstr('copy'), '-c', "begin; select count(*) from $t; select pg_sleep(600)" ], '<', \undef, '>', \$rows, '2>', \my $err);
			$node->poll_query_until('copy', "select exists (select from pg_locks where relation = '$t'::regclass and granted and pid in (select pid from pg_stat_activity where query ~ 'pg_sleep'))") or die;
		}
		$node_before = copy("select pg_relation_filenode('" . ($kind eq 'partitioned' ? "${t}_1" : $t) . "')");
		source("truncate $t; insert into $t values (1, null, 5), (2, 1, 5)");
		same($t, "$kind, $way: a TRUNCATE");
		is(copy("select pg_relation_filenode('" . ($kind eq 'partitioned' ? "${t}_1" : $t) . "')") ne $node_before ? 'truncated' : 'deleted',
			$way eq 'free' ? 'truncated' : 'deleted', "$kind, $way: done as it has to be");
		if ($reader)
		{
			copy(q(select pg_terminate_backend(pid) from pg_stat_activity where query ~ 'pg_sleep' and pid <> pg_backend_pid()));
			$reader->finish;
		}
	}
}
is(copy('select count(distinct name), count(*) from deleted'), '6|6000', "triggers of the copy have seen each row that was deleted");

# Rows that a single statement wrote, in an order in which they cannot be written singly,
# do not come and go one at a time, each after a longer pause.

source('create table chain (id int primary key, parent int references chain, x int); select fanout.declare_binding($$chain$$, $$g$$), fanout.capture($$chain$$, $$chain$$)');
copy(q(
create table chain (id int primary key, parent int references chain, x int);
select fanout.sync_table('chain', 'g', 'chain', retry_delay => '2 s', prefetch => 1000)));
source('insert into chain select i, nullif(i + 1, 301), 0 from generate_series(1, 300) i');
same('chain', 'rows that come before those that they refer to');
source('delete from chain');
same('chain', 'rows that go');
source('insert into chain select i, nullif(i - 1, 99), 0 from generate_series(100, 400) i; delete from chain where id >= 100');
same('chain', 'rows that go before those that refer to them');
is(copy(q(select count(*) from fanout.dead_letter)), '0', 'no message was given up');

# A handler of one's own is called again as well, and what comes behind keeps its order.

source('select fanout.declare_binding($$nodes$$, $$g$$)');
copy(q(
create table node (id int primary key, parent int references node, x int);
create function node(m fanout.message) returns void language sql as $$
	insert into node values (m.key::int, (m.body->>'parent')::int, (m.body->>'x')::int) on conflict (id) do update set x = excluded.x $$;
select fanout.subscribe('nodes', 'g', 'node(fanout.message)', retry_delay => '2 s', prefetch => 1000)));
source(q(select fanout.publish('nodes', jsonb_build_object('parent', nullif(i + 1, 201), 'x', n), i::text) from generate_series(1, 200) i, generate_series(1, 3) n order by i, n));
PgFanout::poll(sub { copy('select count(*), min(x) from node') eq '200|3' }, sub { 'nodes: ' . copy('select count(*), min(x) from node') });
ok(1, 'messages whose handler waits for a later message');
is(copy(q(select count(*) from fanout.dead_letter)), '0', 'none was given up');

# Nor do they come one at a time where a batch has no time for all of them, so that they are
# tried in several, and what makes one of them due has done so a moment ago.

source('select fanout.declare_binding($$slow$$, $$g$$)');
copy(q(
create table slow (id int primary key, parent int references slow);
create function slow(m fanout.message) returns void language plpgsql as $$ begin
	perform pg_sleep(0.03);
	insert into slow values (m.key::int, (m.body->>'parent')::int);
end $$;
select fanout.subscribe('slow', 'g', 'slow(fanout.message)', retry_delay => '1 s', prefetch => 1000)));
source(q(select fanout.publish('slow', jsonb_build_object('parent', nullif(i + 1, 81)), i::text) from generate_series(1, 80) i));
PgFanout::poll(sub { copy('select count(*) from slow') == 80 },
	sub { 'slow: ' . copy('select count(*) from slow') . ' ' . copy('select count(*), min(next_try), max(postponed) from fanout.waiting') });
ok(1, 'messages whose handler waits for a later message, and takes its time');

# Rows that others refer to still wait for these.

source(q(
create table p (id int primary key, parent int references p);
create table c (id int primary key, p int references p);
select fanout.declare_binding(t, 'g'), fanout.capture(t::regclass, t) from unnest('{p,c}'::text[]) t));
copy(q(
create table p (id int primary key, parent int references p);
create table c (id int primary key, p int references p);
select fanout.sync_table(t, 'g', t::regclass, retry_delay => '100 ms', max_retry_delay => '200 ms', max_attempts => 1) from unnest('{p,c}'::text[]) t));
source('insert into p values (1, null), (2, 1), (3, 2); insert into c values (1, 3)');
same($_, "$_: rows") foreach 'p', 'c';
copy(q(select fanout.pause('c', 'g')));
source('truncate p, c');
$node->poll_query_until('copy', q(select count(*) = 1 from fanout.delivery_failure where topic = 'p' and attempts = 0)) or die 'nothing waits';
is(copy('select count(*) from p'), '3', 'rows that others refer to stay together');
copy(q(select fanout.resume('c', 'g')));
same($_, "$_: a TRUNCATE of both") foreach 'p', 'c';

done_testing();
