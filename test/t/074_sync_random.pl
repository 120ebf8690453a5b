# Random tables, changes, DDL at both ends and faults: at every pause the copies are
# equal to their sources.  And a copy that is begun late gets the rows that were
# there before, by the README's recipe, while they are written to.
#
# PGF_SYNC_SECONDS: how long (20); PGF_SYNC_SEED: repeats a run, as far as faults
# come at the same moments.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $seconds = $ENV{PGF_SYNC_SECONDS} || 20;
my $seed = $ENV{PGF_SYNC_SEED} || time;
my $tables = 5;
my $last_value = 0;

note("PGF_SYNC_SEED=$seed");
srand($seed);

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 60
pg_fanout.max_subscriptions = 40
pg_fanout.retry_interval = 1s
));
my %at = (a => 'postgres', b => 'copies');

sql('a', q(create database copies));
sql('b', q(create extension pg_fanout; create schema s0));

my %keys = (
	id => [ [ 'id', 'int', sub { int(rand(40)) } ] ],
	text => [ [ 'code', 'text', sub { join '', map { ('a', 'B', '"', '\\', 'ü', ' ')[ rand 6 ] } 0 .. int(rand(3)) } ] ],
	pair => [ [ 'tenant', 'int', sub { int(rand(4)) } ], [ 'no', 'numeric', sub { int(rand(12)) . ('', '.0', '.50')[ rand 3 ] } ] ],
	uuid => [ [ 'u', 'uuid', sub { sprintf('%032x', int(rand(40))) } ] ],
	day => [ [ 'day', 'date', sub { '2024-02-' . sprintf('%02d', 1 + rand(29)) } ], [ 'kind', 'varchar(9)', sub { ('x', 'X', 'y')[ rand 3 ] } ] ],
);
my %types = (
	int => sub { int(rand(1e9)) - 5e8 },
	text => sub { join '', map { chr(32 + rand(90)) } 0 .. rand(200) },
	numeric => sub { (int(rand(1e6)) / 1000) . ('', '0', '00')[ rand 3 ] },
	'text[]' => sub { ('{}', '{a,NULL,"b\\"c"}', '[0:1]={1,2}', '{{1,2},{3,4}}')[ rand 4 ] },
	json => sub { ('{"b": 1,  "a":2, "a":3}', '"\u0000"', '[1.10]', '7 ')[ rand 4 ] },
	jsonb => sub { ('{"b": 1.10}', '[]', '"x"')[ rand 3 ] },
	timestamptz => sub { '2024-01-01 00:00:00+00'; },
	bytea => sub { '\\x' . unpack('H*', pack('N', rand(2**32))) },
	interval => sub { ('1 mon -2 days', '-01:00', '0')[ rand 3 ] },
);
my @made = map { make_table($_) } 1 .. $tables;
my $end = time + $seconds;
my ($rounds, $statements, %did) = (0, 0);

while (time < $end || $rounds < 3)
{
	my $statements_before = $statements;

	change($_) for map { $made[ rand @made ] } 1 .. 5 + rand(20);
	fault() if rand() < 0.4;
	change($_) for map { $made[ rand @made ] } 1 .. 5 + rand(20);
	ddl($made[ rand @made ]) if rand() < 0.8;
	change($_) for map { $made[ rand @made ] } 1 .. 5 + rand(20);
	equal($_) or last for @made;
	last if !Test::More->builder->is_passing;
	$rounds++;
}
ok(Test::More->builder->is_passing, "copies equal at each of $rounds pauses, after $statements statements")
  or diag("PGF_SYNC_SEED=$seed");
note(join ', ', map { "$_: $did{$_}" } sort keys %did);
is(sql('b', q(select count(*) from fanout.dead_letter)), 0, 'no message was given up');
my $missing = '';
foreach (1 .. 100)
{
	touch($_) for @made;
	$missing = sql('b', q(select topic, target, ignored_columns, missing_columns from fanout.subscriptions where ignored_columns <> '{}' or missing_columns <> '{}'));
	last if $missing eq '';
	select(undef, undef, undef, 0.1);
}
is($missing, '', 'no column is missing');
is(sql('b', q(select count(*) from pg_sequences where sequencename ~ 'serial_no' and last_value > 20000)), 0, 'updates used up no numbers');

# Rows that are there already

sql('a', q(
create table old (id int primary key, x int);
insert into old select i, 0 from generate_series(1, 20000) i;
select fanout.declare_binding('old', 'g');
select fanout.capture('old', 'old');
));
sql('b', q(create table old (id int primary key, x int); select fanout.sync_table('old', 'g', 'old')));
my $writer = IPC::Run::start(
	[ 'psql', '-XqAt', '-d', $node->connstr('postgres'), '-c', q(
do $$
begin
    for i in 1 .. 3000 loop
        update old set x = x + 1 where id = 1 + random() * 20000;
        delete from old where id = 1 + random() * 20000;
        insert into old values (20000 + i, i);
        update old set id = 100000 + i where id = 1 + random() * 20000;
        commit;
    end loop;
end $$;
) ], '<', \undef, '>', \my $out, '2>', \my $err);
sql('a', "update old set id = id where id between $_ * 1000 and $_ * 1000 + 999") for 0 .. 20;
$writer->finish or die $err;
PgFanout::poll(sub { sql('a', 'select fanout.flush()') eq 't' && list('a', 'old', '*') eq list('b', 'old', '*') }, 'the copy of old rows', 120);
pass('rows that were there before come to the copy while they are written to');

done_testing();

sub sql
{
	my ($where, $sql) = @_;

	return $node->safe_psql($at{$where}, $sql);
}

sub quote
{
	my ($value) = @_;

	return 'null' if !defined $value;
	$value =~ s/'/''/g;
	return "'$value'";
}

# A table, and its copy, which has columns and triggers of its own.
sub make_table
{
	my ($n) = @_;
	my @kinds = sort keys %keys;
	my $key = $keys{ $kinds[ ($n - 1) % @kinds ] };
	my $t = { n => $n, name => "t$n", copy => "s0.t${n}", key => $key, columns => [], serial => 0 };
	my @names = map { $_->[0] } @$key;
	my $columns = join ', ', map { "$_->[0] $_->[1] not null" } @$key;
	my $made = rand() < 0.5 ? ', made text generated always as (c0::text) stored' : '';
	my @reversed = rand() < 0.5 ? reverse @names : @names;

	add_column($t, 'int');
	add_column($t, (sort keys %types)[ rand keys %types ]) for 1 .. 1 + rand(4);
	$columns .= join '', map { ", $_->{name} $_->{type}" } @{ $t->{columns} };
	sql('a', "create table t$n ($columns$made, primary key (" . join(', ', @names) . "))");
	sql('b', qq(
create table s0.t$n (note text default 'local', serial_no serial, $columns$made, primary key (@{[join ', ', @reversed]}));
create table s0.child$n (@{[join ', ', map { "$_->[0] $_->[1]" } @$key]}, foreign key (@{[join ', ', @names]}) references s0.t$n (@{[join q(, ), @names]}) on update cascade on delete cascade);
create table s0.log$n (what text);
create function s0.log$n() returns trigger language plpgsql as \$\$ begin insert into s0.log$n values (tg_op); return new; end \$\$;
create trigger log after insert or update on s0.t$n for each row execute function s0.log$n();
));
	sql('a', qq(
select fanout.declare_topic('t$n', '@{[(qw(debezium row cloudevents))[ rand 3 ]]}');
select fanout.declare_binding('t$n', 'g');
select fanout.capture('t$n', 't$n');
));
	sql('b', "select fanout.sync_table('t$n', 'g', 's0.t$n', prefetch => " . (1, 7, 100, 1000)[ rand 4 ] . ')');
	return $t;
}

sub add_column
{
	my ($t, $type) = @_;
	my $name = 'c' . $t->{serial}++;

	push @{ $t->{columns} }, { name => $name, here => $name, type => $type };
	return $t->{columns}->[-1];
}

sub value_of
{
	my ($column) = @_;

	return rand() < 0.1 ? 'null' : quote($types{ $column->{type} }->());
}

sub some_key
{
	my ($t) = @_;

	return [ map { quote($_->[2]->()) } @{ $t->{key} } ];
}

sub where
{
	my ($t, $key) = @_;

	return join ' and ', map { "$t->{key}->[$_]->[0] = $key->[$_]" } 0 .. $#$key;
}

# A transaction of a few statements on one table.
sub change
{
	my ($t) = @_;
	my $names = join ', ', (map { $_->[0] } @{ $t->{key} }), map { $_->{name} } @{ $t->{columns} };
	my $keys = join ', ', map { $_->[0] } @{ $t->{key} };
	my @sql = ('begin');

	foreach (1 .. 1 + rand(6))
	{
		my $key = some_key($t);
		my $kind = rand();
		my $column = $t->{columns}->[ rand @{ $t->{columns} } ];

		if ($kind < 0.45)
		{
			push @sql, "insert into $t->{name} ($names) values (" . join(', ', @$key, map { value_of($_) } @{ $t->{columns} }) . ") on conflict ($keys) do update set $column->{name} = excluded.$column->{name}";
		}
		elsif ($kind < 0.65)
		{
			push @sql, "update $t->{name} set $column->{name} = " . value_of($column) . ' where ' . (rand() < 0.1 ? 'true' : where($t, $key));
		}
		elsif ($kind < 0.8)
		{
			my $new = some_key($t);

			push @sql, "update $t->{name} set ($keys) = row(" . join(', ', @$new) . ') where ' . where($t, $key)
			  . " and not exists (select from $t->{name} where " . where($t, $new) . ')';
		}
		elsif ($kind < 0.97)
		{
			push @sql, "delete from $t->{name} where " . where($t, $key);
		}
		elsif ($kind < 0.98)
		{
			push @sql, "truncate $t->{name}";
		}
		else
		{
			push @sql, 'savepoint x', "delete from $t->{name}", 'rollback to x';
		}
	}
	$statements += @sql;
	sql('a', join(';', @sql, rand() < 0.1 ? 'rollback' : 'commit'));
	return;
}

# Something in the schema of one end or the other.
sub ddl
{
	my ($t) = @_;
	my $column = $t->{columns}->[ rand @{ $t->{columns} } ];
	my $kind = (qw(rename_copy move_copy rename_column add_column drop_column rename_both))[ rand 6 ];
	my $serial = $t->{serial}++;

	$did{$kind}++;
	if ($kind eq 'rename_copy')
	{
		my ($schema) = $t->{copy} =~ /^(\w+)/;

		sql('b', "alter table $t->{copy} rename to r$serial; create table $t->{copy} (like $schema.r$serial including all)");
		$t->{copy} = "$schema.r$serial";
	}
	elsif ($kind eq 'move_copy')
	{
		my ($name) = $t->{copy} =~ /(\w+)$/;

		sql('b', "create schema m$t->{n}_$serial; alter table $t->{copy} set schema m$t->{n}_$serial");
		$t->{copy} = "m$t->{n}_$serial.$name";
	}
	elsif ($kind eq 'rename_column' && $column->{name} ne 'c0')
	{
		sql('b', "alter table $t->{copy} rename $column->{here} to h$serial");
		$column->{here} = "h$serial";
	}
	elsif ($kind eq 'rename_both' && $column->{name} ne 'c0')
	{
		# what was sent before must be applied under the old name
		equal($t);
		sql('a', "alter table $t->{name} rename $column->{name} to b$serial; update $t->{name} set c0 = c0 where false");
		sql('b', "alter table $t->{copy} rename $column->{here} to b$serial");
		$column->{name} = $column->{here} = "b$serial";
		touch($t);
	}
	elsif ($kind eq 'add_column')
	{
		my $new = add_column($t, (sort keys %types)[ rand keys %types ]);

		sql($_, "alter table " . ($_ eq 'b' ? $t->{copy} : $t->{name}) . " add $new->{name} $new->{type}") for 'b', 'a';
	}
	elsif ($kind eq 'drop_column' && $column->{name} ne 'c0' && @{ $t->{columns} } > 2)
	{
		sql('a', "alter table $t->{name} drop $column->{name}");
		equal($t, $column);
		sql('b', "alter table $t->{copy} drop $column->{here}");
		$t->{columns} = [ grep { $_ != $column } @{ $t->{columns} } ];
		touch($t);
	}
	return;
}

# One more message, which tells the copy of the columns that there are.
sub touch
{
	my ($t) = @_;
	my $key = some_key($t);
	my $names = join ', ', map { $_->[0] } @{ $t->{key} };

	sql('a', "insert into $t->{name} ($names) values (" . join(', ', @$key) . ") on conflict ($names) do update set c0 = 1");
	return;
}

# What may happen to workers and servers.
sub fault
{
	my $kind = (qw(consumer publisher consumer publisher server))[ rand 5 ];

	$did{$kind}++;
	if ($kind eq 'server')
	{
		$node->stop('immediate');
		$node->start;
	}
	else
	{
		sql('a', "select count(pg_terminate_backend(pid)) from pg_stat_activity where backend_type ~ '^pg_fanout $kind'");
	}
	return;
}

sub list
{
	my ($where, $table, $columns) = @_;

	return sql($where, qq(select string_agg(x, E'\\n' order by x) from (select row($columns)::text as x from $table) t)) if $columns ne '*';
	return sql($where, qq(select md5(string_agg(t::text, E'\\n' order by t::text)) from $table t));
}

# Waits until the copy is equal to the table, in the columns that both have.
sub equal
{
	my ($t, $without) = @_;
	my @columns = grep { !defined $without || $_ != $without } @{ $t->{columns} };
	my $keys = join ', ', map { $_->[0] } @{ $t->{key} };
	my $there_columns = join ', ', $keys, map { $_->{name} } @columns;
	my $here_columns = join ', ', $keys, map { $_->{here} } @columns;
	my ($there, $here) = (list('a', $t->{name}, $there_columns), '');

	foreach (1 .. 600)
	{
		$here = list('b', $t->{copy}, $here_columns);
		return 1 if $here eq $there;
		select(undef, undef, undef, 0.1);
	}
	fail("$t->{name} and $t->{copy} are equal");
	diag("there:\n", substr($there, 0, 2000), "\nhere:\n", substr($here, 0, 2000), "\n",
		sql('b', 'select * from fanout.stat_subscriptions'), "\n",
		sql('b', 'select topic, error from fanout.delivery_failure limit 3'), "\n",
		sql('b', 'select topic, reason from fanout.dead_letter limit 3'));
	return 0;
}
