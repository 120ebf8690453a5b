# A key of the source that is unique only in the end (DEFERRABLE) may have two rows for
# a while.  Whatever has become of messages that came before, a copy ends with the row
# that is there: also where it had rows before any message, refuses some, or has them
# wait for others.
#
# PGF_TAKEN_SECONDS: how long random changes are made (10); PGF_TAKEN_SEED: repeats them.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $seconds = $ENV{PGF_TAKEN_SECONDS} || 10;
my $seed = $ENV{PGF_TAKEN_SEED} || time;
my $broker = PgFanout::broker();
my $node = PgFanout::cluster_with_copy($broker);
my $options = "retry_delay => '50 ms', max_retry_delay => '200 ms'";

note("PGF_TAKEN_SEED=$seed");

# ---- rows that were there before any message, and rows that refer to them ----

source(q(
create table there (id int primary key deferrable initially deferred, x text);
insert into there select i, 'row ' || i from generate_series(1, 9) i;
select fanout.declare_binding('there', 'g'), fanout.capture('there', 'there')));
copy(qq(
create table there (id int primary key, x text, note text default 'local');
insert into there select i, 'row ' || i from generate_series(1, 9) i;
create table refers (id int references there);
insert into refers select id from there where id <> 9;
select fanout.sync_table('there', 'g', 'there', max_attempts => 1, $options)));
source('update there set id = 3 - id where id < 3');
equal('there', 'rows that were there before change places');
source(q(begin; insert into there values (3, 'new'); delete from there where x = 'row 3'; commit));
equal('there', 'a row takes the place of one that goes');
source(q(begin; insert into there values (4, 'guest'); update there set id = 14 where x = 'guest'; commit;
begin; insert into there values (5, 'guest'); delete from there where id = 5 and x = 'guest'; commit));
equal('there', 'a row goes that was at the place of another one');
source(q(begin; insert into there values (6, 'second'), (6, 'third'); delete from there where x in ('row 6', 'second'); commit));
equal('there', 'three rows were at a place');
source('update there set id = id % 8 + 1 where id < 9; update there set id = 10 where id = 9');
equal('there', 'all places are changed');
is(copy(q(select concat_ws(' ', failed, stale, dead) from fanout.stat_subscriptions where topic = 'there')), '0 0 0', 'nothing failed: no row that others refer to was deleted');
is(copy(q(select count(*) from there where note = 'local')), 10, 'the copy has the columns of its own');

# ---- a key that is kept unique by a constraint of exclusion ----

source(q(
create table excluded (id int not null, x text, exclude using btree (id with =) deferrable initially deferred);
select fanout.declare_binding('excluded', 'g'), fanout.capture('excluded', 'excluded', key => '{id}');
insert into excluded values (1, 'a'), (2, 'b'), (3, 'c')));
copy(qq(
create table excluded (id int primary key, x text);
select fanout.sync_table('excluded', 'g', 'excluded', $options)));
source(q(begin; insert into excluded values (3, 'new'); delete from excluded where x = 'c'; commit;
update excluded set id = 3 - id where id < 3));
equal('excluded', 'rows of a constraint of exclusion change places');

# ---- a row of which the copy knows nothing, since its message was given up ----

source(q(
create table refused (id int primary key deferrable initially deferred, x text);
select fanout.declare_binding('refused', 'g'), fanout.capture('refused', 'refused')));
copy(qq(
create table refused (id int primary key, x text check (x <> 'refused'));
select fanout.sync_table('refused', 'g', 'refused', max_attempts => 1, $options)));
source(q(insert into refused values (1, 'refused'), (2, 'fine')));
PgFanout::poll(sub { copy(q(select count(*) from fanout.dead_letter where topic = 'refused')) == 1 }, 'a dead letter');
source(q(begin; insert into refused values (1, 'new'); delete from refused where x = 'refused'; insert into refused values (2, 'new'); delete from refused where x = 'fine'; commit));
equal('refused', 'a row takes the place of one whose message was given up');
copy('select fanout.redrive()');
equal('refused', 'and stays when that comes again');

# ---- a row that waits for another one ----

source(q(
create table parent (id int primary key);
create table child (id int primary key deferrable initially deferred, parent int references parent, x text);
select fanout.declare_binding(t, 'g'), fanout.capture(t::regclass, t) from unnest('{parent,child}'::text[]) t;
insert into parent values (0);
insert into child select i, 0, 'old' from generate_series(1, 9) i));
copy(qq(
create table parent (id int primary key);
create table child (id int primary key, parent int references parent, x text);
select fanout.sync_table(t, 'g', t::regclass, max_attempts => 1, $options) from unnest('{parent,child}'::text[]) t));
equal('child', 'first rows');
foreach my $late (0, 1)
{
	my $i = 1 + $late;

	copy(q(select fanout.pause('parent', 'g'))) if $late;
	source(qq(
insert into parent values ($i);
begin; insert into child values ($i, $i, 'new'); delete from child where id = $i and x = 'old'; commit;
begin; insert into child values ($i + 2, $i, 'new'); update child set id = $i + 20 where id = $i + 2 and x = 'old'; commit;
insert into child values ($i + 30, $i, 'waits');
begin; update child set id = $i + 30 where id = $i + 4; update child set id = $i + 40 where id = $i + 30 and x = 'waits'; commit;
begin; insert into child values ($i + 6, $i, 'guest'); delete from child where id = $i + 6 and x = 'guest'; commit));
	if ($late)
	{
		PgFanout::poll(sub { copy(q(select count(*) from fanout.waiting where postponed > 1)) > 0 }, 'messages that wait', 60);
		copy(q(select fanout.resume('parent', 'g')));
	}
	equal('child', 'rows change places whose parent is ' . ($late ? 'late' : 'there'));
}

# ---- any changes, of copies that refuse some of them ----

my %filter = (plain => 'true', parts => 'true', chosen => 'x % 3 <> 0');
my @names = sort keys %filter;

source(q(
create sequence numbers;
create function random_key() returns int language sql as 'select 1 + floor(random() * 7)::int';
create function random_parent() returns int language plpgsql as $$
begin
    if random() < 0.2 then
        insert into parent values (nextval('numbers'));
    end if;
    return (select id from parent where random() < 0.9 order by random() limit 1);
end $$;
create table plain (a int default 1, id int primary key deferrable initially deferred, no int default nextval('numbers'), x int, parent int default random_parent() references parent);
create table parts (id int, no int default nextval('numbers'), x int, a int default 1 + floor(random() * 2)::int, parent int default random_parent() references parent,
    primary key (id, a) deferrable initially deferred) partition by list (a);
create table parts_1 partition of parts for values in (1);
create table parts_2 partition of parts for values in (2);
create table chosen (a int default 1, no int default nextval('numbers') primary key, id int not null unique deferrable, x int, parent int default random_parent() references parent);
create function change(name text) returns void language plpgsql as $$
declare
    some_row text := format('no = (select no from %I order by random() limit 1)', name);
begin
    execute case floor(random() * 12)::int
        when 0 then format('insert into %I (id, x) values (%s, %s)', name, random_key(), random_key())
        when 1 then format('insert into %I (id, x) select id, random_key() from generate_series(1, 7) id where random() < 0.3', name)
        when 2 then format('delete from %I where %s', name, some_row)
        when 3 then format('update %I set x = x + 1', name)
        when 4 then format('update %I set x = x + 1, parent = random_parent() where %s', name, some_row)
        when 5 then format('update %I set id = 8 - id', name)
        when 6 then format('update %I set id = id %% 7 + 1', name)
        when 7 then format('update %I set a = 3 - a, x = x + 1 where random() < 0.5', name)
        when 8 then format('with gone as (delete from %1$I where %2$s returning id, a) insert into %1$I (id, a, x) select id, a, 8 from gone', name, some_row)
        when 9 then format('delete from %I where random() < 0.3', name)
        else format('update %I set id = %s, x = %s where %s', name, random_key(), random_key(), some_row)
    end;
end $$;
create function changes(name text) returns void language plpgsql as $$
begin
    set constraints all deferred;
    for i in 1 .. 1 + random() * 5 loop
        begin
            perform change(name) from generate_series(1, (random() * 2)::int);
            if random() < 0.2 then
                raise assert_failure;
            end if;
        exception when assert_failure then null;
        end;
    end loop;
    -- so that most of it can be committed
    if random() < 0.9 then
        execute format('delete from %1$I r using %1$I other where r.id = other.id and r.a = other.a and r.no <> other.no and r.x * 1000 + r.no < other.x * 1000 + other.no', name);
    end if;
    set constraints all immediate;
exception when unique_violation then null;
end $$));
source(qq(
select fanout.declare_binding('$_', 'g'), fanout.capture('$_', '$_', key => @{[$_ eq 'parts' ? q('{a,id}') : q('{id}')]}, "where" => '$filter{$_}'))) foreach @names;
copy(q(
create function refuse() returns trigger language plpgsql as $$
begin
    if random() < 0.05 then
        raise exception 'refused for once';
    end if;
    return coalesce(new, old);
end $$));
copy(qq(
create table $_ (a int, id int, no int, x int, parent int references parent, primary key (@{[$_ eq 'parts' ? 'a, id' : 'id']}));
create trigger refuse before insert or update or delete on $_ for each row execute function refuse();
select fanout.sync_table('$_', 'g', '$_', prefetch => @{[(1, 5, 100)[ rand 3 ]]}, max_attempts => 1000, $options))) foreach @names;
my ($end, $rounds) = (time + $seconds, 0);
while (Test::More->builder->is_passing && (time < $end || $rounds < 3))
{
	$rounds++;
	copy(q(select fanout.pause('parent', 'g'))) if $rounds % 2;
	source("select setseed($seed % 1000 / 1000.0 * (-1) ^ $rounds / $rounds);\n"
		  . join(";\n", map { "select changes('$_')" } map { @names } 1 .. 30));
	copy(q(select fanout.resume('parent', 'g'))) if $rounds % 2;
	foreach my $name (@names)
	{
		settled($name);
		is(rows(\&copy, $name), rows(\&source, $name), "$name after round $rounds") or diag("PGF_TAKEN_SEED=$seed", told());
	}
}
cmp_ok(source(q(select count(*) from fanout.outbox where headers ? 'taken')), '>', 100, 'keys were taken');
cmp_ok(copy(q(select sum(failed) from fanout.stat_subscriptions)), '>', 50, 'attempts failed');
copy("drop trigger refuse on $_") foreach @names;
foreach my $name (@names)
{
	my $run = source(qq(select fanout.compare('$name', '$name', 'g')));

	PgFanout::poll(sub { copy("select count(*) from fanout.sync_comparisons where run = $run and finished_at is not null") == 1 }, "the comparison of $name");
	is(copy("select state from fanout.sync_comparisons where run = $run"), 'equal', "compare() says that $name and its copy are equal");
}

done_testing();

sub source { return $node->safe_psql('postgres', $_[0]); }
sub copy { return $node->safe_psql('copy', $_[0]); }

sub rows
{
	my ($where, $name) = @_;
	my $columns =
	  { there => 'id, x', excluded => 'id, x', refused => 'id, x', child => 'id, parent, x' }->{$name} || 'id, a, no, x, parent';
	my $filter = $filter{$name} || 'true';

	return $where->("select string_agg(row($columns)::text, ' ' order by row($columns)::text) from $name where $filter");
}

sub told
{
	return join "\n", '', copy('select topic, state, waiting, failed, stale, dead from fanout.stat_subscriptions'),
	  copy(q(select topic, key, headers ->> 'op', headers ->> 'taken', sequence, attempts, error from fanout.waiting join fanout.subscription using (subscription_id)));
}

# Waits until nothing is on its way to a copy, and nothing waits there.
sub settled
{
	my ($name) = @_;

	PgFanout::flush($node);
	PgFanout::poll(sub { $broker->left("${name}_g") == 0 }, "the queue of $name is empty");
	PgFanout::poll(sub { copy("select waiting = 0 and state = 'idle' from fanout.stat_subscriptions where topic = '$name'") eq 't' },
		sub { "all of $name are applied" . told() });
	return;
}

sub equal
{
	my ($name, $what) = @_;

	settled('parent') if $name eq 'child';
	settled($name);
	is(rows(\&copy, $name), rows(\&source, $name), $what) or diag(told());
	return;
}
