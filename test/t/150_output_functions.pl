# While a row is rendered, output functions of types run, and those of extensions may run
# anything.  Whatever they run, the message of the row is the one that it is without them,
# the messages of what they write are theirs, and the row's own comes before them.
#
# The type is that of busy_type.c, whose output function runs a command.  No broker is
# needed: what is judged is the outbox.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $library = PostgreSQL::Test::Utils::tempdir() . '/busy_type.so';
my $pg_config = $ENV{PG_CONFIG} || 'pg_config';
my $headers = PgFanout::run_command_ok($pg_config, '--includedir-server') =~ s/\n//r;
PgFanout::run_command_ok('cc', '-Wall', '-shared', '-fPIC', "-I$headers", '-o', $library, "$PgFanout::lib/busy_type.c");

my $node = PgFanout::cluster('main');

sub sql { return $node->safe_psql('postgres', $_[0]); }

sql(qq(
create function busy_in(cstring) returns busy language c immutable strict as '$library';
create function busy_out(busy) returns cstring language c stable strict as '$library';
create type busy (input = busy_in, output = busy_out, like = text);
create function below(busy, busy) returns boolean language sql immutable return textin(busy_out(\$1)) < textin(busy_out(\$2));
) . q(
create type pair as (n int, b busy);
create domain checked as busy;
select fanout.declare_topic(t, f) from unnest('{outer,first,second,third}'::text[], '{debezium,row,cloudevents,debezium}'::text[]) x(t, f);
create schema s;
create table s.first (id int primary key, b busy);
create table second (id int primary key, at timestamptz, b text);
create table third (id int primary key, b busy[]);
select fanout.capture(t::regclass, split_part(t, '.', -1)) from unnest('{s.first,second,third}'::text[]) t;
));

# Where the value is: the columns that a table has beside "id int, v int", its key, and values.
my %places = (
	'a column' => [ 'b busy', 'id', q('x') ],
	'the key' => [ 'b busy', 'b', q('x') ],
	'a part of the key' => [ 'b busy', 'id,b', q('x') ],
	'an array' => [ 'b busy[]', 'id', q('{x,y}') ],
	'a composite, and a domain that is part of the key' => [ 'b pair, d checked', 'd,id', q('(1,x)', 'y') ],
	'an array of composites, and it is the key' => [ 'b pair[], d int', 'b', q('{"(1,x)"}', 1) ],
	'a partition' => [ 'b busy, x timestamptz', 'id,b', q('x', '2024-05-01 00:00+00') ]);

# What the output function runs.  {t}: the table.  All of it can be run by itself as well.
my %commands = (
	'captures of other tables are needed, and their schema is renamed' => q(
		alter schema s rename to s2; insert into second values (7, '2024-01-01 00:00+00', 'x'); insert into s2.first values (7, 'y');
		alter schema s2 rename to s; insert into third values (7, '{a,b}'), (8, '{c}')),
	'it writes to the same table' => q(insert into {t} (id, v) select i, 7 from generate_series(70, 75) i;
		update {t} set v = 8 where id = 71; delete from {t} where id = 72),
	'it writes to the same table, after its capture is out of date' => q(alter schema s rename to s2; alter schema s2 rename to s;
		insert into {t} (id, v) values (70, 7); insert into second values (7, '2024-01-01 00:00+00', 'x'); insert into third values (7, '{}');
		insert into {t} (id, v) values (71, 7); insert into s.first values (7, 'z')),
	'that fails, and is caught' => q(do $$
		begin
			alter schema s rename to s2;
			insert into second values (7, '2024-01-01 00:00+00', 'x');
			insert into s2.first values (7, 'x');
			insert into {t} (id, v) values (70, 7);
			perform 1 / 0;
		exception when division_by_zero then
			insert into third values (7, '{}');
			insert into {t} (id, v) values (71, 7);
		end $$),
	'topics are altered, and another is captured into' => q(
		select fanout.alter_topic('outer', 'row'); select fanout.alter_topic('second', 'debezium');
		select fanout.capture('second', 'outer'); insert into second values (7, '2024-01-01 00:00+00', 'x');
		select fanout.alter_topic('outer', 'debezium'); insert into third values (7, '{}')),
	'captures end and begin' => q(
		select fanout.uncapture('third'); select fanout.uncapture('second'); drop table s.first;
		create table s.first (v text, id int primary key); select fanout.capture('s.first', 'second');
		insert into s.first values ('x', 7); select fanout.capture('third', 'third', exclude => '{b}'); insert into third values (7, '{}');
		insert into second values (7, '2024-01-01 00:00+00', 'x')),
	'many other captures are made' => q(do $$
		begin
			for i in 1 .. 20 loop
				execute format('create table many_%s (id int primary key, v int)', i);
				perform fanout.capture(format('many_%s', i)::regclass, 'third');
				execute format('insert into many_%s values (7)', i);
			end loop;
		end $$));

my %statements = (
	insert => 'insert into {t} values (50, 0, {values}), (51, 0, {values})',
	update => 'update {t} set v = v + 1 where id in (2, 5)',
	'update of the key' => 'update {t} set id = id + 1 where id = 5',
	delete => 'delete from {t} where id in (2, 5)');

my $tables = 0;

# Makes a table with some rows; returns its name.
sub make_table
{
	my ($place) = @_;
	my ($columns, $key, $values) = @{ $places{$place} };
	my $table = 'place_' . ++$tables;
	my $by = $place eq 'a partition' ? 'partition by range (id)' : '';

	sql("create table $table (id int, v int, $columns) $by;
		select fanout.capture('$table', 'outer', key => '{$key}')");
	sql("create table ${table}_part (gone int, $columns, v int, id int); alter table ${table}_part drop gone;
		alter table $table attach partition ${table}_part for values from (0) to (1000)") if $by;
	sql("insert into $table values (2, 0, $values), (5, 0, $values)");
	return $table;
}

# The messages of a transaction, one to a line, without what differs from one transaction to the next.
my $messages = q(
select t.topic || ' ' || headers || ' ' || coalesce(key, '-') || ' ' || type || ' '
	|| ((payload::jsonb - array['ts_ms', 'time', case when payload::jsonb ? 'specversion' then 'id' end])
		#- '{source,txId}' #- '{source,ts_ms}')
from fanout.outbox o join fanout.topic t using (topic_id) where xid = pg_current_xact_id() order by o.id;
);

# Runs stories, each in a transaction that is rolled back: a statement and, or undef, the command that
# the output function runs meanwhile.  Returns the messages of each.
sub messages_of
{
	my (@stories) = @_;
	my $script = "set client_min_messages = warning; set timezone = 'Asia/Tokyo'; set datestyle = german;\n";

	foreach my $story (@stories)
	{
		my ($statement, $command) = @$story;

		$script .= "begin;\n";
		$script .= "select set_config('busy.command', \$busy\$$command\$busy\$, true) \\g /dev/null\n" if defined $command;
		$script .= "\\o /dev/null\n$statement;\n\\o\n\\echo story\n$messages\nrollback;\n";
	}
	my ($status, $stdout, $stderr) = $node->psql('postgres', $script);
	is("$status$stderr", '0', 'no statement fails');
	my (undef, @told) = split /^story\n/m, $stdout;
	return map { [ split /\n/, $_ ] } @told;
}

foreach my $place (sort keys %places)
{
	my $table = make_table($place);
	my (@stories, @names);

	foreach my $command (sort keys %commands)
	{
		foreach my $statement (sort keys %statements)
		{
			my ($outer, $inner) = map { s/\{t\}/$table/gr =~ s/\{values\}/$places{$place}->[2]/gr } $statements{$statement}, $commands{$command};

			push @names, "$place, $statement: $command";
			push @stories, [$outer], [ $outer, $inner ], [$inner];
		}
	}
	my @told = messages_of(@stories);
	foreach my $name (@names)
	{
		my ($alone, $both, $inner) = splice @told, 0, 3;

		is(join("\n", @{ $both || [] }), join("\n", @{ $alone || [] }, @{ $inner || [] }), $name);
		cmp_ok(scalar(@{ $alone || [] }), '>', 0, 'it makes messages');
	}
}

# A capture that is replaced while it is in use is the new one from then on.
my $table = make_table('a column');
my ($replaced) = messages_of(
	[
		"insert into $table values (50, 0, 'x'), (51, 0, 'x'); update $table set v = 1 where id = 50",
		"select fanout.capture('$table', 'outer', exclude => '{b}', key => '{id}', replace => true)"
	]);
like($replaced->[0], qr/"after": \{"b": "x", "v": 0, "id": 50\}/, 'the message of the row during which a capture is replaced is of the one before');
like($replaced->[1], qr/"after": \{"v": 0, "id": 51\}/, 'that of the next row is of the new capture');
like($replaced->[2], qr/"after": \{"v": 1, "id": 50\}/, 'and so is that of the next statement');

# A message has one name of its table.
sql(q(create schema p; create table p.renamed (id int primary key, v int, b busy); select fanout.capture('p.renamed', 'outer');
	insert into p.renamed values (1, 0, 'x')));
my ($renamed) = messages_of([ 'update p.renamed set id = 2', 'alter schema p rename to q' ]);
like($renamed->[0], qr/"schema": "p", "old_key": "1".* p\.renamed\.update .*"schema": "p"/, 'a message names its table in one way');

$node->stop;
done_testing();
