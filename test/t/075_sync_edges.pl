# The ends of what sync_table() promises: keys that are equal and not the same,
# partitions and inheritance at either end, triggers that leave rows out, wide and
# long rows, conditions of captures, and code of a table's owner that would like to
# run with the rights of the role that subscribed.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Copies;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, init => { extra => [ '--encoding', 'UTF8', '--locale', 'C' ] }, conf => q(
log_statement = none
max_worker_processes = 60
pg_fanout.max_subscriptions = 50
));
PgFanout::Copies::of($node, $broker);

sql(q(create extension citext; create collation ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false)));

# Keys whose equal values may look different

copied('exact', 'n numeric primary key, x int');
copied('fold', 'name citext primary key, x int');
copied('zero', 'f float8 primary key, x int');
copied('span', 'i interval primary key, x int');
sql('create domain amount as numeric(10, 2)');
copied('domain', 'n amount primary key, x int');
copied('padded', 'c char(5) primary key, x int');
copied('listed', 'c bpchar[] primary key, x int');
copied('ignoring', 'name text collate ci primary key, x int');
sql(q(
insert into exact values (1.0, 1); delete from exact where n = 1; insert into exact values (1.00, 2);
insert into fold values ('Ann', 1); delete from fold; insert into fold values ('ANN', 2);
insert into zero values (0, 1); update zero set f = '-0'; update zero set x = 2;
insert into domain values (1.5, 1), (2, 1); update domain set x = 2; delete from domain where n = 2;
insert into padded values ('ab', 1), ('abcde', 1); update padded set x = 2; delete from padded where c = 'ab';
insert into listed values ('{ab,c}', 1), ('{d}', 1); update listed set x = 2; delete from listed where c = '{d}';
insert into span values ('1 mon', 1); update span set i = '30 days', x = 2;
insert into ignoring values ('Ann', 1); update ignoring set name = 'ANN'; update ignoring set x = 5;
));
equal($_, 'keys that are equal and look different') for qw(exact fold zero span ignoring domain padded listed);

sql(q(
create table cased (name text primary key, x int);
create table cased_copy (name citext primary key, x int);
select fanout.declare_binding('cased', 'g'), fanout.capture('cased', 'cased'), fanout.sync_table('cased', 'g', 'cased_copy', max_attempts => 1);
insert into cased values ('Ann', 1), ('ANN', 2);
));
PgFanout::poll(sub { dead('cased') == 1 }, 'a dead letter of cased');
is(rows('cased_copy'), '(Ann,1)', 'two rows whose keys are one here do not overwrite each other');
like(sql(q(select reason from fanout.dead_letter where topic = 'cased')), qr/duplicate key/, 'and the second one says so');

# A late delete of what looks different now

copied('late', 'n numeric primary key, x int', 'debezium', '', 'max_attempts => 100, retry_delay => $$100 ms$$, max_retry_delay => $$100 ms$$');
sql(q(
create function hinder() returns trigger language plpgsql as $$ begin if exists (select from hindrance) then raise 'hindered'; end if; return old; end $$;
create table hindrance (x int);
insert into hindrance values (1);
create trigger hinder before delete on late_copy for each row execute function hinder();
insert into late values (1.0, 1);
));
equal('late', 'a row');
sql(q(delete from late; insert into late values (1.00, 2)));
PgFanout::poll(sub { sql(q(select count(*) from fanout.delivery_failure where topic = 'late')) >= 1 }, 'a failure of late');
sql('truncate hindrance');
equal('late', 'a late delete of an equal key does not take the row that came since');

# Partitions and inheritance

sql(q(
create table parted (id int, region text, x int, primary key (id, region)) partition by list (region);
create table parted_a partition of parted for values in ('a');
create table parted_b partition of parted for values in ('b');
create table parted_copy (id int, region text, x int, note text, primary key (id, region)) partition by list (region);
create table parted_copy_1 partition of parted_copy for values in ('b');
create table parted_copy_2 partition of parted_copy default;
select fanout.declare_binding('parted', 'g'), fanout.capture('parted', 'parted'), fanout.sync_table('parted', 'g', 'parted_copy');
insert into parted select i, case when i % 2 = 0 then 'a' else 'b' end, i from generate_series(1, 20) i;
));
equal('parted', 'partitions', 'id, region, x');
sql(q(update parted_copy set note = 'mine'; update parted set region = 'b' where id <= 10; update parted set x = x + 1; insert into parted_a values (100, 'a', 1); update parted_b set x = 7 where id = 2));
equal('parted', 'rows that move between partitions', 'id, region, x');
sql('truncate parted');
equal('parted', 'TRUNCATE of all', 'id, region, x');

sql(q(
create table base (id int primary key, x int);
create table base_copy (id int primary key, x int);
create table heir_copy () inherits (base_copy);
insert into heir_copy values (1, 100);
select fanout.declare_binding('base', 'g'), fanout.capture('base', 'base'), fanout.sync_table('base', 'g', 'base_copy');
insert into base values (1, 1), (2, 2); update base set x = 3; delete from base where id = 2;
));
settled('base', 'g');
is(rows('only base_copy'), '(1,3)', 'tables that inherit from the copy are not written');
is(rows('heir_copy'), '(1,100)', 'nor read');
sql('truncate base');
settled('base', 'g');
is(rows('only base_copy') . rows('heir_copy'), '(1,100)', 'nor truncated');

# One subscription keeps a partitioned table, and another one a partition of it

sql(q(
create table whole (id int, region text, x int, primary key (id, region));
create table part (id int, region text, x int, primary key (id, region));
create table tree (id int, region text, x int, primary key (id, region)) partition by list (region);
create table tree_a partition of tree for values in ('a');
create table tree_b partition of tree for values in ('b');
select fanout.declare_binding(t, 'g'), fanout.capture(t::regclass, t) from unnest('{whole,part}'::text[]) t;
select fanout.sync_table('whole', 'g', 'tree', max_attempts => 1), fanout.sync_table('part', 'g', 'tree_b');
insert into whole values (1, 'a', 1), (2, 'b', 1);
insert into part values (3, 'b', 1);
));
settled($_, 'g') for qw(whole part);
is(rows('tree'), '(1,a,1) (2,b,1) (3,b,1)', 'subscriptions of a table and of its partition');
sql('truncate whole');
settled('whole', 'g');
is(rows('tree'), '(3,b,1)', 'a TRUNCATE leaves the rows of the other one');

# Triggers of the copy that leave rows out

copied('kept', 'id int primary key, x int');
sql(q(
create function keep() returns trigger language plpgsql as $$ begin return null; end $$;
create trigger keep before delete on kept_copy for each row when (old.id = 2) execute function keep();
insert into kept values (1, 1), (2, 2);
delete from kept;
));
settled('kept', 'g');
is(rows('kept_copy'), '(2,2)', 'a trigger keeps a row that is deleted');
is(stat_of('kept', 'g', 'ignored'), 1, 'which is counted');

# Wide rows, long values

my @columns = map { "c$_ int" } 1 .. 1590;
copied('wide', 'id int primary key, ' . join(', ', @columns), 'row');
sql('insert into wide (id, c1, c1590) values (1, 1, 1); update wide set c700 = 7');
equal('wide', 'a row of 1,591 columns');
copied('big', 'id int primary key, t text, b bytea, j jsonb, x int');
sql(q(insert into big values (1, repeat('ä"', 10000000), decode(repeat('00ff', 5000000), 'hex'), jsonb_build_object('a', repeat('x', 1000000)), 1)));
sql('update big set x = 2');
equal('big', 'values of 30 MB', 'id, md5(t), md5(b), md5(j::text), x');

# Conditions of captures

copied('chosen', 'id int primary key, x int, secret text', 'debezium', q("where" => 'x > 10', exclude => '{secret}'));
sql(q(
insert into chosen values (1, 5), (2, 20), (3, 30), (4, 40);
update chosen set x = x - 15; update chosen set id = id + 100; update chosen set x = 50, id = 2 where id = 101; update chosen set x = 1, id = 999 where id = 104;
update chosen set x = 77 where id = 102;
));
settled('chosen', 'g');
is(rows('chosen_copy'), sql(q(select string_agg(format('(%s,%s,)', id, x), ' ' order by id) from chosen where x > 10)), 'rows that come and go by a condition');

# DDL at both ends, in the midst of messages

copied('ddl', 'id int primary key, a int, b text');
sql(q(
insert into ddl select i, i, 'b' || i from generate_series(1, 2000) i;
alter table ddl_copy alter a type bigint, alter b type varchar;
update ddl set a = a + 1;
alter table ddl add c int default 5;
alter table ddl_copy add c int;
update ddl set c = id;
alter table ddl alter a type text using a::text || '0';
alter table ddl_copy alter a type text;
update ddl set a = a || '1', b = null;
alter table ddl drop b;
update ddl set c = c + 1;
));
equal('ddl', 'tables that are altered', 'id, a, c');
sql(q(
alter table ddl add b int;
alter table ddl_copy drop b; alter table ddl_copy add b int;
update ddl set b = id;
));
equal('ddl', 'tables that are altered', 'id, a, b, c');

# Code of a table's owner gets none of the rights of the role that subscribed

sql(q(
create role eve;
create schema eves authorization eve;
set role eve;
create table eves.copy (id int primary key, x int);
create table eves.more (id int);
create function eves.rise() returns trigger language plpgsql as $$
begin
    alter role eve superuser; return null;
exception when insufficient_privilege then return null;
end $$;
create function eves.again() returns trigger language plpgsql as $$
begin
    set constraints all deferred;
    insert into eves.more values (1);
    return null;
end $$;
create constraint trigger again after insert on eves.copy deferrable initially deferred for each row execute function eves.again();
create constraint trigger rise after insert on eves.more deferrable initially deferred for each row execute function eves.rise();
create function eves.evil() returns int language plpgsql as $$
begin
    alter role eve superuser; return 1;
exception when insufficient_privilege then return 0;
end $$;
create table eves.held (id int primary key, x int);
create function eves.hold() returns trigger language plpgsql as $$
begin
    execute 'declare held cursor with hold for select eves.evil()';
    return new;
end $$;
create trigger hold before insert on eves.held for each row execute function eves.hold();
reset role;
create table rising (id int primary key, x int);
create table holding (id int primary key, x int);
select fanout.declare_binding(t, 'g'), fanout.capture(t::regclass, t) from unnest('{rising,holding}'::text[]) t;
select fanout.sync_table('rising', 'g', 'eves.copy', max_attempts => 1), fanout.sync_table('holding', 'g', 'eves.held', max_attempts => 1);
insert into rising values (1, 1);
insert into holding values (1, 1);
));
for my $topic (qw(rising holding))
{
	PgFanout::poll(sub { sql("select count(*) from fanout.inbox where inbox_id = (select inbox_id from fanout.subscription where topic = '$topic')") == 1 }, "an end of $topic");
	is(sql(q(select rolsuper from pg_roles where rolname = 'eve')), 'f', "nothing that a trigger leaves for the commit has other rights than the owner's: $topic");
}

done_testing();
