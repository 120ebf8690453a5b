# sync_table() writes the row that a message is about, and no other one: tables
# that share a topic, bodies that look like envelopes, keys of all sorts, keys that
# change; and what the copy has of its own stays.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Copies;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 60
pg_fanout.max_subscriptions = 40
));
PgFanout::Copies::of($node, $broker);

sql('create extension citext');

# Which rows

sql(q(
create table customer (id int primary key, name text);
create table product (id int primary key, name text);
select fanout.declare_binding('shared', g) from unnest('{first,named}'::text[]) g;
select fanout.capture(c, 'shared', '{insert,update,delete,truncate}') from unnest('{customer,product}'::regclass[]) c;
create table first_copy (like customer including all);
create table named_copy (like customer including all);
select fanout.sync_table('shared', 'first', 'first_copy');
select fanout.sync_table('shared', 'named', 'named_copy', source => 'public.product');
));
sql(q(insert into customer values (1, 'Ann'); insert into product values (1, 'Chair'), (2, 'Table')));
sql(q(select fanout.publish('shared', '{"id": 1, "name": "forged"}', key => '1')));
settled('shared', 'first');
is(rows('first_copy'), '(1,Ann)', 'rows of another table of the topic are not written');
settled('shared', 'named');
is(rows('named_copy'), '(1,Chair) (2,Table)', 'a source that is named is the only one');
sql('delete from product where id = 1; truncate product');
settled('shared', 'first');
is(rows('first_copy'), '(1,Ann)', 'neither deletes nor TRUNCATE of another table remove rows');
is(stat_of('shared', 'first', 'ignored'), 5, 'what was left out is counted');
is(sql(q(select string_agg(source, ' ' order by source) from fanout.subscriptions where topic = 'shared')),
	'public.customer public.product', 'the view shows the sources');
for my $name (qw(op schema table format old_key key_columns via))
{
	my ($result, undef, $error) =
	  $node->psql('postgres', qq(select fanout.publish('shared', '1', headers => '{"$name": "c"}')));

	like($error, qr/is set by pg_fanout itself/, "publish() cannot forge the header $name");
}

# Bodies that look like envelopes

copied('log', 'id int primary key, op text, source text, before jsonb, after jsonb', 'row');
copied('event', 'id int primary key, specversion text, data jsonb', 'row');
copied('texts', 'id int primary key, op text, source text, before text, after text', 'row');
sql(q(
insert into log values (1, 'U', 'app', '{"id": 5, "op": "x"}', '{"id": 9, "op": "y"}');
insert into event values (1, '1.0', '{"id": 77, "specversion": "x"}');
insert into texts values (1, 'U', 'app', 'a', 'b');
));
equal($_, "a table with the columns of an envelope: $_") for qw(log event texts);

# Keys

copied('grouped', 'id int primary key, tenant int, x int', 'debezium', "key => '{tenant}'", 'max_attempts => 1');
sql('insert into grouped select i, i % 3 + 100, i from generate_series(1, 20) i');
PgFanout::poll(sub { dead('grouped') == 20 }, 'dead letters of grouped');
is(rows('grouped_copy'), '', 'a message whose key is not made of the key\'s columns is refused, row by row');
like(sql(q(select min(reason) from fanout.dead_letter where topic = 'grouped')), qr/its key is not made of the columns of the table's key/, 'and says why');

foreach my $format (qw(debezium row cloudevents))
{
	sql(qq(
create table o_$format (tenant int, id int, x int, primary key (tenant, id));
create table o_${format}_copy (tenant int, id int, x int, primary key (id, tenant));
select fanout.declare_topic('o_$format', '$format'); select fanout.declare_binding('o_$format', 'g');
select fanout.capture('o_$format', 'o_$format');
select fanout.sync_table('o_$format', 'g', 'o_${format}_copy');
insert into o_$format values (1, 2, 0), (2, 1, 0), (5, 5, 0);
));
	sql(qq(update o_$format set id = 9 where tenant = 1 and id = 2));
	sql(qq(update o_$format set id = 1, tenant = 1 where id = 5));
	sql(qq(delete from o_$format where tenant = 2));
	equal("o_$format", "a key whose columns have another order at the copy, format $format");
}

copied('exact', 'n numeric primary key, x int');
sql(q(create table ci (name citext primary key, x int);
create table ci_copy (name citext primary key, x int, note text);
select fanout.declare_binding('ci', 'g');
select fanout.capture('ci', 'ci');
select fanout.sync_table('ci', 'g', 'ci_copy');
));
sql(q(insert into ci values ('Ann', 1), ('Bob', 1); insert into exact values (1.0, 1), (2, 1)));
equal('ci', 'citext', 'name, x');
sql(q(update ci_copy set note = 'mine'));
sql(q(update ci set name = 'ANN', x = 2 where name = 'ann'; update ci set x = 3 where name = 'ann'; update exact set n = 1.00, x = 2 where n = 1));
equal('ci', 'a key that changes to one that its type takes for equal', 'name::text, x');
equal('exact', 'the same of numeric', 'n::text, x');
is(sql('select count(*) from ci_copy where note is not null'), 2, 'is the same row');
sql(q(delete from ci where name = 'aNN'));
equal('ci', 'and is deleted as such', 'name::text, x');

copied('long', 'k bytea primary key, x int');
sql(q(insert into long select string_agg(decode(md5(i::text), 'hex'), ''), 1 from generate_series(1, 150) i; update long set x = 2));
equal('long', 'a key of 2,400 bytes');

# Keys that change: the row stays the row

foreach my $action ('cascade', 'restrict')
{
	sql(qq(
create table p_$action (id int primary key, x int);
create table p_${action}_copy (id int primary key, x int, note text, no smallserial);
create table child_$action (id int primary key, parent int references p_${action}_copy on update cascade on delete $action);
select fanout.declare_topic('p_$action', '@{[$action eq 'cascade' ? 'debezium' : 'row']}'); select fanout.declare_binding('p_$action', 'g');
select fanout.capture('p_$action', 'p_$action');
select fanout.sync_table('p_$action', 'g', 'p_${action}_copy', max_attempts => 2, retry_delay => '100 ms');
insert into p_$action values (1, 1);
));
	equal("p_$action", 'a row', 'id, x');
	sql(qq(update p_${action}_copy set note = 'mine'; insert into child_$action values (10, 1)));
	sql(qq(update p_$action set id = 2, x = 2));
	equal("p_$action", 'a changed key', 'id, x');
	is(rows("p_${action}_copy"), '(2,2,mine,1)', 'the copy\'s own columns stay');
	is(rows("child_$action"), '(10,2)', "rows that refer to it follow, on delete $action");
	sql(qq(do \$\$ begin for i in 1 .. 30 loop update p_$action set x = i + 100; commit; end loop; end \$\$));
	equal("p_$action", 'many updates', 'id, x');
	is(sql(qq(select last_value from p_${action}_copy_no_seq)), 1, 'updates take no numbers of a sequence here');
}

# Identity columns

sql(q(
create table ident (code text primary key, id int generated always as identity, x int);
create table ident_copy (like ident including all);
create table ident_key (id int generated always as identity primary key, x int);
create table ident_key_copy (like ident_key including all);
select fanout.declare_binding(t, 'g'), fanout.capture(t::regclass, t), fanout.sync_table(t, 'g', (t || '_copy')::regclass, max_attempts => 1) from unnest('{ident,ident_key}'::text[]) t;
alter sequence ident_id_seq restart 100;
insert into ident (code, x) values ('a', 1), ('b', 1);
update ident set x = 2;
update ident set code = 'c' where code = 'a';
insert into ident_key (x) values (1), (2);
update ident_key set x = x + 1;
));
equal('ident', 'an identity column that is GENERATED ALWAYS and not the key');
equal('ident_key', 'one that is the key');
sql(q(update ident set id = default where code = 'b'));
PgFanout::poll(sub { dead('ident') == 1 }, 'a dead letter of ident');
like(sql(q(select reason from fanout.dead_letter where topic = 'ident')), qr/identity column of table .* cannot follow/, 'one that changes is refused: no UPDATE can set it');
sql('alter table ident_copy alter id set generated by default; select fanout.redrive()');
equal('ident', 'until it is GENERATED BY DEFAULT');

# Keys that move and change places in one transaction, as those that are deferrable can

sql(q(
create table moving (id int primary key deferrable, v text);
create table moving_copy (id int primary key, v text);
select fanout.declare_binding('moving', 'g');
select fanout.capture('moving', 'moving');
select fanout.sync_table('moving', 'g', 'moving_copy', prefetch => 3);
insert into moving select i, 'v' || i from generate_series(1, 50) i;
));
equal('moving', 'rows');
sql('update moving set id = id + 1');
equal('moving', 'all keys move up by one, in batches of any size');
sql('update moving set id = id - 1');
equal('moving', 'and down');
sql('update moving set id = 51 - id');
equal('moving', 'they are turned round');
sql(q(begin; set constraints all deferred; insert into moving values (7, 'new'); delete from moving where id = 7 and v <> 'new'; update moving set id = 7 where id = 8; delete from moving where v = 'new'; commit));
equal('moving', 'rows take the places of others');
sql(q(begin; update moving set id = 1000 where id = 1; update moving set id = 1001 where id = 1000; update moving set id = 1 where id = 1001; commit));
equal('moving', 'a key that changes several times, and back');
is(stat_of('moving', 'g', 'failed'), 0, 'nothing failed meanwhile');

# Unique values that change places in one transaction, as those that are deferrable can

sql(q(
create table places (id int primary key, place int unique deferrable initially deferred);
create table places_copy (id int primary key, place int unique);
select fanout.declare_binding('places', 'g');
select fanout.capture('places', 'places');
select fanout.sync_table('places', 'g', 'places_copy', max_attempts => 1);
insert into places select i, i from generate_series(1, 4) i;
));
equal('places', 'rows with unique values');
sql('update places set place = 3 - place where place < 3');
PgFanout::poll(sub { dead('places') == 2 }, 'dead letters');
is(sql(q(select string_agg(distinct sqlstate, ' ') from fanout.dead_letter where topic = 'places')), '23505', 'unique values that change places are refused');
is(rows('places_copy'), '(1,1) (2,2) (3,3) (4,4)', 'and the rows stay as they were');
sql(q(alter table places_copy drop constraint places_copy_place_key; create index on places_copy (place); select fanout.redrive('places')));
equal('places', 'with an index that is not unique, they follow');
sql('update places set place = 5 - place');
equal('places', 'and all later ones');

# A batch is its messages one by one

sql(q(
create table seen (id int primary key, parent int, x int);
create table seen_copy (id int primary key, parent int, x int, born timestamptz default clock_timestamp());
create table story (no serial, what text);
create function tell() returns trigger language plpgsql as $$
begin
    insert into story (what) values (tg_op || ' ' || coalesce(old.id::text, '') || ':' || coalesce(old.x::text, '') || ' ' || coalesce(new.id::text, '') || ':' || coalesce(new.x::text, ''));
    return null;
end $$;
create trigger tell after insert or update or delete on seen_copy for each row execute function tell();
create trigger tell after insert or update or delete on seen for each row execute function tell();
select fanout.declare_binding('seen', 'g');
select fanout.capture('seen', 'seen');
));
my $changes = q(
insert into seen values (1, null, 1);
update seen set x = 2;
update seen set id = 2;
insert into seen values (1, null, 5), (3, 2, 6);
delete from seen where id = 1;
insert into seen values (1, null, 7);
delete from seen where id = 3;
update seen set x = x + 1;
);
sql("begin; $changes commit; create table there as table story; truncate story restart identity");
sql(q(select fanout.sync_table('seen', 'g', 'seen_copy')));
equal('seen', 'many changes of one row in one batch', 'id, parent, x');
is(sql(q(select string_agg(what, ', ' order by what) from story)),
	sql(q(select string_agg(what, ', ' order by what) from there)),
	'the copy\'s triggers see what those of the source saw');

# Rights: those of the table's owner, and no more

sql(q(
create role bob;
create schema bobs authorization bob;
set role bob;
create table bobs.copy (id int primary key, x int, who text);
create function bobs.rise() returns trigger language plpgsql as $$
begin
    begin
        alter role bob superuser;
    exception when insufficient_privilege then
        new.who := current_user || ' may not';
    end;
    return new;
end $$;
create function bobs.late() returns trigger language plpgsql as $$
begin
    alter role bob superuser;
    return null;
exception when insufficient_privilege then
    return null;
end $$;
create trigger rise before insert or update on bobs.copy for each row execute function bobs.rise();
create constraint trigger late after insert on bobs.copy deferrable initially deferred for each row execute function bobs.late();
reset role;
create table rising (id int primary key, x int);
select fanout.declare_binding('rising', 'g');
select fanout.capture('rising', 'rising');
select fanout.sync_table('rising', 'g', 'bobs.copy');
insert into rising values (1, 1);
));
settled('rising', 'g');
is(rows('bobs.copy'), '(1,1,"bob may not")', 'triggers of the table run as its owner, not as the role that subscribed');
is(sql(q(select rolsuper from pg_roles where rolname = 'bob')), 'f', 'those that are deferred, too');

# Several subscriptions into one table

sql(q(
create table east (id int primary key, x int);
create table west (id int primary key, x int);
create table merged (id int primary key, x int);
select fanout.declare_binding(t, 'g'), fanout.capture(t::regclass, t, '{insert,update,delete,truncate}'), fanout.sync_table(t, 'g', 'merged', max_attempts => 1) from unnest('{east,west}'::text[]) t;
insert into east values (1, 1), (2, 1);
insert into west values (11, 1), (12, 1);
));
settled($_, 'g') for qw(east west);
is(rows('merged'), '(1,1) (2,1) (11,1) (12,1)', 'two subscriptions write into one table');
sql('truncate east');
settled('east', 'g');
is(rows('merged'), '(11,1) (12,1)', 'a TRUNCATE of one source leaves the other\'s rows');
sql('insert into east values (11, 5); delete from east');
PgFanout::poll(sub { dead('east') == 1 }, 'a dead letter of east');
settled('east', 'g');
is(rows('merged'), '(11,1) (12,1)', 'neither can take or delete the other\'s row');
like(sql(q(select reason from fanout.dead_letter where topic = 'east')), qr/another subscription has a row of this key/, 'and says so');

done_testing();
