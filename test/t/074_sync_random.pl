# Random tables, changes, DDL at both ends, faults and restores of either database: at
# every pause the copies are equal to their sources, and compare() says so.  And a copy
# that is begun late gets the rows that were there before, by the README's recipe, while
# they are written to.
#
# A source that is restored from its last dump, and one that has lost what came after
# its dump, are restored in its place; so is the copies' database.  What was lost is
# mended by the README's way, compare() with repair.
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
my $pairs = 3;
my $dir = PostgreSQL::Test::Utils::tempdir();

note("PGF_SYNC_SEED=$seed");
srand($seed);

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, extension => 0, conf => q(
log_statement = none
max_worker_processes = 60
pg_fanout.max_subscriptions = 40
pg_fanout.retry_interval = 1s
));
my %at = (a => 'source', b => 'copies');

$node->safe_psql('postgres', "create database $_") foreach values %at;
sql('a', 'create extension pg_fanout');
sql('b', 'create extension pg_fanout', 'create schema s0');

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
my @families = map { make_family($_) } 1 .. $pairs;
my @restores = qw(moved_source old_source moved_copy old_copy);
my $end = time + $seconds;
my ($rounds, $statements, %did) = (0, 0);

while (Test::More->builder->is_passing && (time < $end || $rounds < 3))
{
	changes();
	fault() if rand() < 0.4;
	changes();
	ddl($made[ rand @made ]) if rand() < 0.8;
	changes();
	restore($restores[ rand @restores ]) if rand() < 0.15;
	all_equal();
	$rounds++;
}
foreach my $kind (grep { !$did{$_} } @restores)
{
	last if !Test::More->builder->is_passing;
	restore($kind);
	changes();
	all_equal();
}
ok(Test::More->builder->is_passing, "copies equal at each of $rounds pauses, after $statements statements")
  or diag("PGF_SYNC_SEED=$seed");
note(join ', ', map { "$_: $did{$_}" } sort keys %did);
foreach my $t (@made, map { @$_ } @families)
{
	my ($state) = compared($t);

	is($state, 'equal', "compare() says that $t->{name} and its copy are equal");
}
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
	[ 'psql', '-XqAt', '-d', $node->connstr($at{a}), '-c', q(
do $$
declare
    any_id int[];
begin
    for i in 1 .. 3000 loop
        any_id = array(select 1 + (random() * 20000)::int from generate_series(1, 3));
        update old set x = x + 1 where id = any_id[1];
        commit;
        delete from old where id = any_id[2];
        commit;
        insert into old values (20000 + i, i);
        commit;
        update old set id = 100000 + i where id = any_id[3];
        commit;
    end loop;
end $$;
) ], '<', \undef, '>', \my $out, '2>', \my $err);
sql('a', "update old set id = id where id between $_ * 1000 and $_ * 1000 + 999") for 0 .. 20;
$writer->finish or die $err;
PgFanout::poll(sub { sql('a', 'select fanout.flush()') eq 't' && list('a', 'old', '*') eq list('b', 'old', '*') }, 'the copy of old rows', 120);
pass('rows that were there before come to the copy while they are written to');

done_testing();

# Each statement is a transaction.  One at the copies may be the victim of a deadlock
# with a consumer, as with any session that writes several of its tables: it is made
# again.  At the source pg_fanout must not be the cause of any error.
sub sql
{
	my ($where, @statements) = @_;
	my ($out, $err, $result);

	foreach my $statement (@statements)
	{
		foreach my $attempt (1 .. 10)
		{
			($out, $err) = ('', '');
			$result = $node->psql($at{$where}, $statement, stdout => \$out, stderr => \$err, on_error_stop => 1);
			last if $result == 0 || $where eq 'a' || $err !~ /deadlock detected/;
			$did{deadlock}++;
		}
		die "psql ended with $result in database $at{$where}: $err\nafter: $statement\nPGF_SYNC_SEED=$seed" if $result != 0;
	}
	return $out;
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
	my $identity = rand() < 0.5;
	my $source_identity = $identity ? ', ident int generated ' . ('always', 'by default')[ rand 2 ] . ' as identity' : '';
	my $copy_identity = $identity ? ', ident int' . ('', ' generated by default as identity')[ rand 2 ] : '';

	$t->{fixed} = [ ($made ? 'made' : ()), ($identity ? 'ident' : ()) ];
	sql('a', "create table t$n ($columns$made$source_identity, primary key (" . join(', ', @names) . "))");
	sql('b', split /;\n/, qq(
create table s0.t$n (note text default 'local', serial_no serial, $columns$made, local_made int generated always as (c0 % 10) stored$copy_identity, primary key (@{[join ', ', @reversed]}));
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

# Two tables, one of which refers to the other, and their copies, which do so, too.  A
# key that was deleted does not come again.
sub make_family
{
	my ($n) = @_;
	my $action = ('cascade', 'set null', 'no action')[ ($n - 1) % 3 ];
	my ($parent, $child) = map { { name => "$_$n", copy => "s0.$_$n", key => [ [ 'id', 'int' ] ], columns => [], fixed => $_ eq 'p' ? ['x'] : [ 'parent', 'x' ] } } 'p', 'c';

	foreach my $where ('a', 'b')
	{
		my $schema = $where eq 'a' ? '' : 's0.';

		sql($where, "create table ${schema}p$n (id int primary key" . ($where eq 'a' ? ' generated by default as identity' : '') . ', x int)',
			"create table ${schema}c$n (id int primary key" . ($where eq 'a' ? ' generated always as identity' : '') .
			  ", parent int references ${schema}p$n on update cascade on delete $action, x int)");
	}
	sql('a', map { ("select fanout.declare_binding('$_', 'g')", "select fanout.capture('$_', '$_')") } "p$n", "c$n");
	sql('b', map { "select fanout.sync_table('$_', 'g', 's0.$_', prefetch => " . (1, 7, 100)[ rand 3 ] . ", retry_delay => '50 ms', max_retry_delay => '500 ms')" } "c$n", "p$n");
	return [ $parent, $child ];
}

# A transaction of a few statements on two such tables.
sub change_family
{
	my ($family) = @_;
	my ($p, $c) = map { $_->{name} } @$family;
	my $some_parent = "(select id from $p order by random() limit 1)";
	my $some_child = "(select id from $c order by random() limit 1)";
	my @sql = ('begin');

	foreach (1 .. 1 + rand(6))
	{
		my $kind = rand();

		push @sql,
			$kind < 0.25 ? "insert into $p (x) values (@{[int(rand(100))]})"
		  : $kind < 0.6 ? "insert into $c (parent, x) values ($some_parent, @{[int(rand(100))]})"
		  : $kind < 0.7 ? "update $c set parent = $some_parent where id = $some_child"
		  : $kind < 0.75 ? "update $p set x = x + 1 where id = $some_parent"
		  : $kind < 0.83 ? "update $p set id = nextval('${p}_id_seq') where id = $some_parent"
		  : $kind < 0.9 ? "delete from $c where id = $some_child"
		  : $kind < 0.99 ? ("create temp table gone on commit drop as select $some_parent as id", "delete from $c where parent = (select id from gone)", "delete from $p where id = (select id from gone)", 'drop table gone')
		  :                "truncate $p, $c";
	}
	$statements += @sql;
	sql('a', join(';', @sql, rand() < 0.1 ? 'rollback' : 'commit'));
	return;
}

sub changes
{
	change($_) foreach map { $made[ rand @made ] } 1 .. 5 + rand(20);
	change_family($_) foreach map { $families[ rand @families ] } 1 .. rand(6);
	return;
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
		my $name = "r$t->{n}_$serial";

		sql('b', "alter table $t->{copy} rename to $name", "create table $t->{copy} (like $schema.$name including all)");
		$t->{copy} = "$schema.$name";
	}
	elsif ($kind eq 'move_copy')
	{
		my ($name) = $t->{copy} =~ /(\w+)$/;

		sql('b', "create schema m$t->{n}_$serial", "alter table $t->{copy} set schema m$t->{n}_$serial");
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

# Restores one of the databases in its place.  "old": from a dump that does not have
# what was written, or came, since; and it is mended as the README says.
sub restore
{
	my ($kind) = @_;
	my $where = $kind =~ /source/ ? 'a' : 'b';

	$did{$kind}++;
	PgFanout::flush($node, dbname => $at{a}) if $kind eq 'moved_source';
	all_equal() if $kind eq 'moved_copy';
	$node->command_ok([ 'pg_dump', '-f', "$dir/dump.sql", $node->connstr($at{$where}) ], "$kind: a dump");
	if ($kind =~ /old/)
	{
		changes();
		sql('a', 'select fanout.flush()') if rand() < 0.5;
	}
	$node->safe_psql('postgres', "drop database $at{$where} with (force)");
	$node->safe_psql('postgres', "create database $at{$where}");
	$node->command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-f', "$dir/dump.sql", $node->connstr($at{$where}) ], "$kind: it is restored");
	changes() if rand() < 0.5;
	sql($where, 'select fanout.activate()');
	changes() if rand() < 0.5;
	if ($kind =~ /old/)
	{
		# rows that refer to each other wait for each other
		my @mended = map { [ $_, begin_comparison($_, 1) ] } @made, map { @$_ } @families;

		found(@$_) foreach @mended;
	}
	return;
}

sub begin_comparison
{
	my ($t, $repair) = @_;

	return sql('a', "select fanout.compare('$t->{name}', '$t->{name}', 'g'" . ($repair ? ', true)' : ')'));
}

# What a comparison finds, once it is at its end.
sub found
{
	my ($t, $run) = @_;
	my $state = '';

	PgFanout::poll(
		sub {
			$state = sql('b', "select state from fanout.sync_comparisons where run = $run and topic = '$t->{name}' and finished_at is not null");
			return $state ne '';
		},
		sub { "comparison $run of $t->{name} " . sql('a', "select * from fanout.backfills where id = $run") . sql('b', 'select * from fanout.sync_comparisons') . told() }, 180);
	$did{compared}++;
	return $state;
}

sub compared { return found($_[0], begin_comparison($_[0])); }

sub told
{
	return join "\n", '', map { sql(@$_) } [ 'b', 'select * from fanout.stat_subscriptions' ], [ 'b', 'select topic, error from fanout.delivery_failure limit 3' ],
	  [ 'b', 'select topic, reason from fanout.dead_letter limit 3' ], [ 'a', 'select * from fanout.stat_publisher' ], [ 'a', 'select * from fanout.stat_topics where held > 0 or pending > 0' ];
}

sub list
{
	my ($where, $table, $columns) = @_;

	return sql($where, qq(select string_agg(x, E'\\n' order by x) from (select row($columns)::text as x from $table) t)) if $columns ne '*';
	return sql($where, qq(select md5(string_agg(t::text, E'\\n' order by t::text)) from $table t));
}

sub all_equal
{
	foreach my $t (@made, map { @$_ } @families)
	{
		equal($t) or return;
	}
	return;
}

# Waits until the copy is equal to the table, in the columns that both have.
sub equal
{
	my ($t, $without) = @_;
	my @columns = grep { !defined $without || $_ != $without } @{ $t->{columns} };
	my $keys = join ', ', (map { $_->[0] } @{ $t->{key} }), @{ $t->{fixed} };
	my $there_columns = join ', ', $keys, map { $_->{name} } @columns;
	my $here_columns = join ', ', $keys, map { $_->{here} } @columns;
	my ($there, $here) = (list('a', $t->{name}, $there_columns), '');

	my $give_up = time + 180;

	while (time < $give_up)
	{
		$here = list('b', $t->{copy}, $here_columns);
		return 1 if $here eq $there;
		select(undef, undef, undef, 0.1);
	}
	fail("$t->{name} and $t->{copy} are equal");
	diag("there:\n", substr($there, 0, 2000), "\nhere:\n", substr($here, 0, 2000), told(), "\nPGF_SYNC_SEED=$seed");
	return 0;
}
