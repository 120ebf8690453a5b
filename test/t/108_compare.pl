# fanout.compare() finds each row in which a copy differs from its source, and no
# other one, while both are written; and mends them.
#
# PG_FANOUT_LONG=1: a million rows and 20 runs under load in place of 20,000 and 3.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $long = $ENV{PG_FANOUT_LONG};
my $rows = $long ? 1_000_000 : 20_000;
my $runs = $long ? 20 : 3;
my $planted = 50;

$PostgreSQL::Test::Utils::timeout_default = 1800 if $long;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster_with_copy($broker);

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub copy { return $node->safe_psql('copy', $_[0]); }

# Compares, and returns what the copy says in the end.
sub compared
{
	my ($arguments, $what) = @_;
	my $run = sql("select fanout.compare($arguments)");
	my ($group) = $arguments =~ /'(\w+)'(, true)?$/;

	$node->poll_query_until('copy',
		"select count(*) = 1 from fanout.sync_comparisons where run = $run and consumer_group = '$group' and finished_at is not null")
	  or die "run $run does not end";
	return ($run, copy("select $what from fanout.sync_comparisons where run = $run and consumer_group = '$group'"));
}

sub settled
{
	my ($topic, $group) = @_;

	PgFanout::flush($node, timeout => '600 s');
	PgFanout::poll(sub { $broker->left("${topic}_$group") == 0 }, 'the queue is empty');
	$node->poll_query_until('copy',
		"select waiting = 0 and state = 'idle' from fanout.stat_subscriptions where topic = '$topic' and consumer_group = '$group'") or die 'not idle';
	return;
}

my $counts = q(state || ' ' || missing || ' ' || different || ' ' || extra || ' ' || mended);

# ---- planted differences, under load ----

sql(qq(
create table accounts (id int primary key, balance int, filler text, noted timestamptz default now());
insert into accounts (id, balance, filler) select 2 * i, 0, repeat('f', 50) from generate_series(1, $rows) i;
select fanout.declare_binding('account', 'copy'), fanout.capture('accounts', 'account');
select fanout.backfill('accounts', 'account', 'copy');
));
copy(q(
create table accounts (id int primary key, balance int, filler text, noted timestamptz);
select fanout.sync_table('account', 'copy', 'accounts');
));
PgFanout::poll(sub { sql(q(select count(*) from fanout.backfills where state <> 'done')) == 0 }, 'the backfill');
settled('account', 'copy');

my ($run, $result) = compared(q('accounts', 'account', 'copy'), "$counts || ' ' || compared || ' ' || left_out");
is($result, "equal 0 0 0 0 $rows 0", 'a copy that nobody writes is equal, row by row');

# the load leaves keys alone that are divisible by 20
copy(qq(
delete from accounts where id % 20 = 0 and id <= 20 * $planted;
update accounts set balance = -1 where id % 20 = 0 and id > 20 * $planted and id <= 40 * $planted;
insert into accounts select 40 * $planted + 20 * i + 1, 7 from generate_series(1, $planted - 2) i;
insert into accounts values (-5, 1), (2147483647, 1);
));
my $directory = PostgreSQL::Test::Utils::tempdir;
append_to_file("$directory/load.sql", "\\set i random(1, $rows / 10)\n\\set j random(1, 9)\n\\set id :i * 20 + :j * 2\n\\set kind random(1, 10)\n" . q(\if :kind <= 2
delete from accounts where id = :id;
\elif :kind <= 4
insert into accounts values (:id, -1) on conflict (id) do nothing;
\elif :kind = 5
update accounts set id = id + 100000000 where id = :id and not exists (select from accounts where id = :id + 100000000);
\else
update accounts set balance = balance + 1 where id between :id and :id + 2 and id % 20 <> 0;
\endif
));
my ($out, $err) = ('', '');
my $load = IPC::Run::start([ 'env', 'PGAPPNAME=pgbench', 'pgbench', '-n', '-c', '2', '-R', '200', '-T', '7200', '-f', "$directory/load.sql", $node->connstr('postgres') ],
	'<', \undef, '>', \$out, '2>', \$err);

foreach my $i (1 .. $runs)
{
	($run, $result) = compared(q('accounts', 'account', 'copy'), $counts);
	is($result, "different $planted $planted $planted 0", "under load, the planted differences are found, and no others ($i)");
	is(copy(qq(select string_agg(kind || ' ' || n, ', ' order by kind) from (select kind, count(*) n from fanout.sync_differences
			where run = $run and ((key ->> 'id')::int % 20 in (0, 1) or (key ->> 'id')::int in (-5, 2147483647)) group by kind) x)),
		"different $planted, extra $planted, missing $planted", 'they are listed by their keys');
}
is(copy("select distinct columns from fanout.sync_differences where run = $run and kind = 'different'"), '{balance}', 'with the columns that have other values');
cmp_ok(copy("select left_out from fanout.sync_comparisons where run = $run"), '<', $rows, 'rows that were changed meanwhile are counted');

# ---- repair, under load ----

($run, $result) = compared(q('accounts', 'account', 'copy', true), $counts);
is($result, sprintf("different %d %d %d %d", ($planted) x 3, 3 * $planted), 'a repair finds the same');
($run, $result) = compared(q('accounts', 'account', 'copy'), $counts);
is($result, 'equal 0 0 0 0', 'and has mended it');
$load->signal('TERM');
eval { $load->finish };
PgFanout::poll(sub { sql(q(select count(*) from pg_stat_activity where application_name = 'pgbench')) eq '0' }, 'end of the load');
settled('account', 'copy');
my $sum = q(select count(*), sum(balance), md5(string_agg(a::text, ',' order by id)) from accounts a);
is(copy($sum), sql($sum), 'after all of it, the copy equals the table');
is(copy('select count(*) from fanout.dead_letter'), '0', 'no message was given up');

# ---- kinds of tables ----

sql(q(
create table parts (k text, n numeric(12,3), secret text, doc jsonb, list int[], f float8, primary key (n, k)) partition by range (n);
create table parts_1 partition of parts for values from (minvalue) to (100);
create table parts_2 partition of parts for values from (100) to (maxvalue);
insert into parts select 'k "' || i, i / 7.0, 's', jsonb_build_object('i', i), array[i, null], i / 3.0 from generate_series(1, 1000) i;
create table filtered (id bigint primary key, kept bool, t timestamptz, b bytea);
insert into filtered select i, i % 3 <> 0, 'epoch'::timestamptz + i * interval '1.1 h', int4send(i) from generate_series(1, 999) i;
create table nothing (id uuid primary key);
create type letter as enum ('a', 'B');
create table other (name letter primary key);
insert into other values ('a'), ('B');
select fanout.declare_topic('part', 'cloudevents'), fanout.declare_topic('filter', 'row');
select fanout.declare_binding(t, 'k') from unnest('{part,filter,nothing,other}'::text[]) t;
select fanout.declare_binding('part', 'another');
select fanout.capture('parts', 'part', exclude => '{secret}'), fanout.capture('filtered', 'filter', "where" => 'kept'),
       fanout.capture('nothing', 'nothing'), fanout.capture('other', 'other');
select fanout.backfill(e, t, 'k') from (values ('parts'::regclass, 'part'), ('filtered', 'filter'), ('nothing', 'nothing'), ('other', 'other')) x(e, t);
));
copy(q(
alter database copy set timezone = 'Asia/Tokyo';
alter database copy set datestyle = 'German';
create table parts (own serial, amount numeric(12,3), f text, name varchar(40), doc json, unique (name, amount));
alter table parts alter name set not null, alter amount set not null;
create table filtered (id int primary key, t timestamptz, b bytea);
create table nothing (id uuid primary key);
create type letter as enum ('B', 'a');
create table other (name letter primary key);
select fanout.sync_table('part', 'k', 'parts', key => '{name,amount}', columns => '{"k": "name", "n": "amount"}');
select fanout.sync_table(topic, 'k', target) from (values ('filter', 'filtered'::regclass), ('nothing', 'nothing'), ('other', 'other')) x(topic, target);
));
PgFanout::poll(sub { sql(q(select count(*) from fanout.backfills where state <> 'done')) == 0 }, 'the backfills');
settled($_, 'k') foreach qw(part filter nothing other);
my $all = q(state || ' ' || compared || ' ' || missing + different + extra);
is((compared(q('parts', 'part', 'k'), $all))[1], 'equal 1000 0', 'a copy with other names, types and columns is equal');
is((compared(q('filtered', 'filter', 'k'), $all))[1], 'equal 666 0', 'so is one of some of the rows');
is((compared(q('nothing', 'nothing', 'k'), $all))[1], 'equal 0 0', 'and an empty one');
like((compared(q('other', 'other', 'k'), q(state || ': ' || error)))[1],
	qr/^refused: column "name" of the key sorts in another way than at the source/, 'one whose key sorts in another way is refused');
copy(q(
update parts set doc = '{"i": 500}' where doc ->> 'i' = '5';
update parts set f = '0.1', own = 5000 where doc ->> 'i' = '6';
update parts set own = 6000 where doc ->> 'i' = '7';
update parts set amount = 1000 where doc ->> 'i' = '8';
update filtered set t = t + interval '1 us' where id = 1;
insert into filtered values (3, null, null);
insert into nothing values ('00000000-0000-0000-0000-000000000000');
));
($run) = compared(q('parts', 'part', 'k', true), $all);
is(copy("select string_agg(kind || ' ' || key || ' ' || columns::text, ', ' order by kind, key) from fanout.sync_differences where run = $run"),
	'different {"name": "k \"5", "amount": 0.714} {doc}, different {"name": "k \"6", "amount": 0.857} {f}, ' .
	'extra {"name": "k \"8", "amount": 1000.000} {}, missing {"name": "k \"8", "amount": 1.143} {}', 'each difference is found, by the names of the copy');
is((compared(q('parts', 'part', 'k'), $all))[1], 'equal 1000 0', 'and mended');
is(copy(q(select string_agg(own::text, ' ' order by doc ->> 'i') from parts where doc ->> 'i' in ('6', '7'))), '5000 6000', 'columns that the copy alone has stay as they are');
PgFanout::flush($node);
is($broker->count('part_another'), 0, 'another group gets nothing of a comparison');
is((compared(q('filtered', 'filter', 'k', true), $counts))[1], 'different 0 1 1 2', 'a row that the condition leaves out is one too many');
is((compared(q('filtered', 'filter', 'k'), $all))[1], 'equal 666 0', 'and is taken away');
is((compared(q('nothing', 'nothing', 'k', true), $counts))[1], 'different 0 0 1 1', 'rows too many are found without a row at the source');
is(copy('select count(*) from nothing'), '0', 'and taken away');

# ---- changes that were not applied ----

copy(q(
alter table filtered add check (id <> 1001);
));
sql(q(insert into filtered values (1001, true, null, null), (1002, true, null, null)));
$node->poll_query_until('copy', q(select waiting = 1 from fanout.stat_subscriptions where topic = 'filter')) or die 'nothing waits';
is((compared(q('filtered', 'filter', 'k'), q(state || ' ' || compared || ' ' || left_out)))[1], 'equal 667 1', 'a row whose message waits is left out');
copy(q(alter table filtered drop constraint filtered_id_check; select fanout.retry('filter', 'k')));
sql(q(truncate filtered));
is((compared(q('filtered', 'filter', 'k'), q(state || ' ' || compared || ' ' || left_out)))[1], 'equal 0 0', 'after a TRUNCATE nothing is left');

done_testing();

END
{
	local ($?, $@);

	$load->kill_kill if $load;
}
