# Tests that a capture stays true while its table is changed: a live capture that
# is replaced loses and repeats no change, and whatever command renames, drops or
# retypes columns, an excluded one never gets into a message and the key stays the
# key.
#
# No broker is needed: what is judged is the outbox.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";
use PgFanout;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $seed = $ENV{PG_FANOUT_TEST_SEED} || int(rand(1_000_000));
my $rounds = $ENV{PG_FANOUT_LONG} ? 3000 : 150;
note "seed $seed, $rounds rounds";
srand($seed);

my $node = PgFanout::Node->new('main');
$node->init;
$node->append_conf('postgresql.conf', <<'END');
shared_preload_libraries = 'pg_fanout'
pg_fanout.uri = 'amqp://guest:guest@127.0.0.1:1/'
fsync = off
client_min_messages = warning
END
$node->start;
sub sql { return $node->safe_psql('postgres', $_[0]); }

# A live capture is replaced

sql(q(
create extension pg_fanout;
select fanout.declare_topic('live');
create table live (id int primary key, n int not null, secret text default 'TOP SECRET');
insert into live select i, 0 from generate_series(1, 20) i;
select fanout.capture('live', 'live', exclude => '{secret}')));
my @captures = (
	q(exclude => '{secret}'),
	q(columns => '{id,n}', "where" => 'n >= 0'),
	q(columns => '{n,id}', old_row => true),
	q(exclude => '{secret}', "when" => 'old *<> new'),
	q(columns => '{n,id}', key => '{id}', "where" => 'id > 0 and secret is not null', "when" => 'true'));
my $script = $node->basedir . '/update.sql';
append_to_file($script, "\\set id random(1, 20)\nupdate live set n = n + 1 where id = :id;\n");
my $load = IPC::Run::start(
	[ 'pgbench', '--no-vacuum', '--client=4', '--time=6', "--file=$script", $node->connstr('postgres') ],
	'>', \my $output, '2>', \my $error);
for my $i (1 .. 40)
{
	my $options = $captures[ $i % @captures ];

	sql("select fanout.capture('live', 'live', $options, replace => true)");
	select(undef, undef, undef, 0.1);
}
# a capture that is replaced does not wait for readers
my $reader = $node->background_psql('postgres');
$reader->query_until(qr/reads/, "begin; select count(*) from live;\n\\echo reads\n");
is(sql(q(set lock_timeout = '3s'; select count(*) from (select fanout.capture('live', 'live', exclude => '{secret}', replace => true)) x)),
	1, 'a reader does not keep a capture from being replaced');
$reader->quit;
IPC::Run::finish($load);
my ($updates) = $output =~ /actually processed: (\d+)/;
cmp_ok($updates, '>', 100, 'a table is updated while its capture is replaced');
is(sql('select sum(n) from live'), $updates, 'no update fails for that');
is(sql('select count(*) from fanout.outbox'), $updates, 'each update makes a message');
is(sql(q(select count(*) from (select (payload::json -> 'after' ->> 'n')::int - lag((payload::json -> 'after' ->> 'n')::int, 1, 0)
	over (partition by key order by id) as step from fanout.outbox) s where step <> 1)),
	0, 'none is missing or there twice');
is(sql(q(select count(*) from fanout.outbox where payload ~ 'SECRET')), 0, 'none has an excluded column');

# Rows whose message is larger than the server can store

sql(q(create table large (id int primary key, a bytea);
select fanout.capture('large', 'live');
alter table large alter a set storage external;
insert into large values (1, convert_to(repeat('x', 550000000), 'UTF8'));
update large set a = null;
delete from large));
is(sql(q(select string_agg(concat_ws(' ', headers ->> 'op', key, length(payload) > 0), ', ' order by id)
	from fanout.outbox where headers ->> 'table' = 'large')),
	'c f, u 1 t, d 1 t', 'a row that is too large to be rendered is written');
sql('drop table large; truncate fanout.outbox');

# of 1 MB, all null, with long names
sql(q(do $$ begin execute (select 'create type nulls as (' || string_agg(format('%I int', lpad(i::text, 3) || repeat(e'\x01', 60)), ', ') || ')'
	from generate_series(1, 100) i); end $$;
create function nulls(count int) returns nulls[] language sql as 'select array_fill(null::nulls, array[0]) || array_agg(jsonb_populate_record(null::nulls, $${"x": 1}$$)) from generate_series(1, count)';
create table small (id int primary key, a nulls[], b nulls[]);
alter table small alter a set storage external;
insert into small values (1, nulls(30000)), (2, nulls(15000)), (3, nulls(7500));
select fanout.capture('small', 'live', '{update}', old_row => true);
update small set id = 4 where id = 1;
select fanout.capture('small', 'live', '{update}', columns => '{id}', key => '{a}', replace => true);
update small set a = null where id = 3;
select fanout.alter_topic('live', 'row');
select fanout.capture('small', 'live', '{update}', columns => '{a}', key => '{a}', replace => true);
update small set id = 5 where id = 2;
select fanout.alter_topic('live', 'debezium');
));
is(sql(q(select string_agg(concat_ws(' ', headers ->> 'op', key, length(payload) > 0, headers ? 'old_key'), ', ' order by id)
	from fanout.outbox where headers ->> 'table' = 'small')),
	'u f f, u f f, u f f', 'a row is written whose body, whose old key, or whose key and body together are too large');
sql('drop table small; truncate fanout.outbox');

# Whatever happens to columns.  Columns are known here by their numbers, and hold
# values that tell what they are: S excluded, K the key, and others.

# Types of two columns, what their captures name besides, and what takes both away.
my $has_citext = sql(q(select count(*) from pg_available_extensions where name = 'citext'));
sql('create role fanout_swept');

my $names = 0;
my $table;

sub column_name { my ($attnum) = @_;
	return sql("select attname from pg_attribute where attrelid = '$table'::regclass and attnum = $attnum and not attisdropped"); }

sub columns { my ($condition) = @_;
	return split /\n/, sql("select attnum from pg_attribute where attrelid = '$table'::regclass and attnum > 0 and not attisdropped and $condition"); }

sub chance { return rand() < 0.5; }

sub pick { return $_[ int(rand(@_)) ]; }

# Renames a column by any command that can.
sub rename_column
{
	my ($attnum, $new) = @_;
	my $old = column_name($attnum);
	my $type = sql("select reloftype::regtype from pg_class where oid = '$table'::regclass and reloftype <> 0");

	if ($type ne '')
	{
		return sql("alter type $type rename attribute $old to $new cascade");
	}
	return sql('alter ' . pick('table', 'view', 'materialized view', 'foreign table') . " $table rename column $old to $new");
}

my $leaks = 0;
my $wrong_keys = 0;
my $columns_by_name = 0;
my $not_dropped = 0;
my ($excluded, $key, $id);

sub new_table
{
	$table = 'swept_' . ++$names;
	my @columns = ('id int not null', 'k text', 's text default \'TOP SECRET\'', 'v int', 'w text');
	if (rand() < 0.3)
	{
		my @attributes = map { s/ (not null|default .*)//r } @columns;
		sql("create type ${table}_t as (" . join(', ', @attributes) . "); create table $table of ${table}_t (primary key (id));"
			. " alter table $table alter s set default 'TOP SECRET'");
	}
	else
	{
		@columns = sort { rand() <=> 0.5 } @columns;
		my $partitioned = rand() < 0.3;
		sql("create table $table (" . join(', ', @columns) . ', primary key (id))' . ($partitioned ? ' partition by hash (id)' : ''));
		sql("create table ${table}_p (gone int, " . join(', ', reverse @columns) . "); alter table ${table}_p drop gone;"
			. " alter table $table attach partition ${table}_p for values with (modulus 1, remainder 0)") if $partitioned;
	}
	($id) = columns("attname = 'id'");
	($excluded) = columns("attname = 's'");
	($key) = columns("attname = 'k'");
	sql("select fanout.capture('$table', 'live', exclude => '{s}', key => '{k,id}')");
	return;
}

# One change of the table; some commands are refused, which is all right.
sub change_table
{
	my $new = 'c' . ++$names;
	my @others = columns("attnum not in ($id, $excluded, $key)");
	my $other = @others ? column_name(pick(@others)) : undef;
	my $typed = sql("select reloftype <> 0 from pg_class where oid = '$table'::regclass") eq 't';
	my $secret = column_name($excluded);

	my $what = int(rand(11));
	if ($what == 0) { rename_column($excluded, $new); }
	elsif ($what == 1) { rename_column($key, $new); }
	elsif ($what == 2 && $other) { my $attnum = pick(@others); rename_column($attnum, $new); }
	elsif ($what == 3 && @others)
	{
		# names change places
		my $attnum = pick(@others);
		my $name = column_name($attnum);
		rename_column($attnum, $new);
		rename_column($excluded, $name);
		rename_column($attnum, $secret);
	}
	elsif ($what == 4 && !$typed) { sql("alter table $table alter $secret type " . pick('text', 'varchar(40)') ); }
	elsif ($what == 5 && !$typed)
	{
		# dropped, and a column of that name again
		sql("alter table $table drop column $secret; alter table $table add column $secret text default 'TOP SECRET'");
		($excluded) = columns("attname = '$secret'");
	}
	elsif ($what == 6 && !$typed && $other) { sql("alter table $table drop column $other, add column $new text"); }
	elsif ($what == 7)
	{
		my $column = column_name($key);
		my $drop = $typed ? "alter type ${table}_t drop attribute $column cascade" : "alter table $table drop column $column cascade";
		my ($status) = $node->psql('postgres', $drop);
		$columns_by_name++ if $status == 0;
	}
	elsif ($what == 8) { sql("alter table $table rename to ${table}x"); $table = "${table}x"; }
	elsif ($what >= 9 && !$typed) { drop_type_of($what == 9 && chance() ? $key : $excluded); }
	return;
}

# Gives a column the type of a role or of an extension, and drops that with all it takes along.  What takes
# the key along is refused.
sub drop_type_of
{
	my ($attnum) = @_;
	my $column = column_name($attnum);
	my $extension = $has_citext && chance();
	my $type = $extension ? 'citext' : 'swept_type';

	sql($extension ? 'create extension citext' : 'create domain swept_type as text; alter domain swept_type owner to fanout_swept');
	sql("alter table $table alter $column drop default, alter $column type $type using $column\::text");
	my ($status) = $node->psql('postgres', $extension ? 'drop extension citext cascade' : 'drop owned by fanout_swept cascade');
	if ($attnum == $key)
	{
		$columns_by_name++ if $status == 0;
		sql("alter table $table alter $column type text using $column\::text");
		sql($extension ? 'drop extension citext' : 'drop owned by fanout_swept');
		return;
	}
	$not_dropped++ if $status != 0;
	sql("alter table $table add column $column text default 'TOP SECRET'");
	($excluded) = columns("attname = '$column'");
	return;
}

new_table();
for my $round (1 .. $rounds)
{
	new_table() if rand() < 0.05;
	change_table();
	my ($key_name, $id_name, $secret) = (column_name($key), column_name($id), column_name($excluded));

	sql("insert into $table ($id_name, $key_name, $secret) values ($round, 'key $round', 'TOP SECRET $round');"
		. "update $table set $secret = 'TOP SECRET again' where $id_name = $round");
	my $judged = sql(qq(select count(*) filter (where payload ~ 'TOP SECRET' or key ~ 'TOP SECRET' or headers::text ~ 'TOP SECRET'),
		count(*) filter (where key is distinct from '["key $round",$round]'), count(*)
		from fanout.outbox where id in (select id from fanout.outbox order by id desc limit 2)));
	my ($leaked, $wrong, $count) = split /\|/, $judged;
	$leaks += $leaked;
	$wrong_keys += $wrong;
	if ($leaked || $wrong)
	{
		diag "round $round: ", sql("select key, payload from fanout.outbox order by id desc limit 2"), "\n", sql("select * from fanout.captures");
		last;
	}
	sql('truncate fanout.outbox') if $round % 50 == 0;
}
is($leaks, 0, 'an excluded column is in no message, whatever command renamed, dropped or retyped columns');
is($wrong_keys, 0, 'and the key is the same columns');
is($columns_by_name, 0, 'of which none can be dropped');
is($not_dropped, 0, 'what takes an excluded column along can be dropped');
is(sql(q(select count(*) from fanout.check_captures() where not ok)), 0, 'check() has nothing against it');

$node->stop;
done_testing();
