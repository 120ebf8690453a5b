-- captures that nobody would make: wide and empty tables, triggers made by hand, options without sense
set client_min_messages = warning;
create extension if not exists pg_fanout;
\set SHOW_CONTEXT never
create schema hostile_capture;
set search_path = hostile_capture;
select fanout.declare_topic('hostile_capture', 'row');
create view messages as
    select o.id, key, headers ->> 'op' as op, headers ->> 'table' as "table", payload from fanout.outbox o join fanout.topic t using (topic_id) where topic = 'hostile_capture';

-- a column named many times: refused, and harmless in a trigger made by hand
create table repeated (id int primary key, a text);
select fanout.capture('repeated', 'hostile_capture', key => array_fill('id'::text, array[10000]));
select fanout.capture('repeated', 'hostile_capture', columns => '{id,a,id}');
select fanout.capture('repeated', 'hostile_capture', exclude => '{{a},{a}}');
do $$ begin
    execute format('create trigger t after insert on repeated for each row execute function fanout.capture_trigger(''hostile_capture'', ''key'', %L, ''columns'', %1$L)',
                   array_fill('id'::text, array[100000]));
end $$;
insert into repeated values (1, 'x');
select key, payload from messages order by id desc limit 1;
drop table repeated;

-- malformed triggers break neither the view, nor what is built on it, nor DDL
create table by_hand (id int primary key, a text);
create trigger t0 after insert on by_hand for each row when (new.id < 0) execute function fanout.capture_trigger();
create trigger t1 after insert on by_hand for each row when (new.id < 0) execute function fanout.capture_trigger('hand 1', 'key', '{oops', 'columns', '}', 'exclude');
create trigger t2 after insert on by_hand for each row when (new.id < 0) execute function fanout.capture_trigger('hand 2', 'key', 'id', 'old_row', 'perhaps', 'nothing', 'x');
create trigger t3 after insert on by_hand for each row when (new.id < 0) execute function fanout.capture_trigger('hand 3', 'key', '{NULL,"a"}', 'when', '; drop table by_hand');
create trigger t4 after insert on by_hand for each row execute function fanout.capture_trigger('hostile_capture', 'columns', '{{id,a},{id,a}}', 'columns', '{id}', 'old_row', '');
create trigger t5 before insert on by_hand for each statement when (false) execute function fanout.capture_trigger('hand 5', 'x');
select topic, operations, columns, exclude, key, "when", old_row from fanout.captures where entity = 'by_hand'::regclass order by topic;
select item, ok, detail from fanout.check_captures() where item ~ 'by_hand' order by 1, 2;
alter table by_hand rename id to number;
alter table by_hand add b int;
alter table by_hand drop b;
alter table by_hand drop a;
insert into by_hand values (1);
insert into by_hand values (-1);
select fanout.capture('by_hand', 'hostile_capture');
select fanout.drop_topic('hostile_capture');
set role pg_monitor;
select count(*) > 0 as readable from fanout.captures;
reset role;
select fanout.uncapture('by_hand');
select count(*) as triggers from pg_trigger where tgrelid = 'by_hand'::regclass;

-- a table with no columns, one with only dropped ones, one with as many as there can be
create table empty ();
select fanout.capture('empty', 'hostile_capture');
insert into empty default values;
create table emptied (a int primary key, b text);
select fanout.capture('emptied', 'hostile_capture', '{insert,update,delete}');
alter table emptied drop a, drop b;
insert into emptied default values;
delete from emptied;
select "table", op, key, payload from messages where "table" ~ '^empt' order by id;
do $$ begin
    execute (select format('create table wide (%s)', string_agg(format('%I bool', 'column number ' || i), ', ')) from generate_series(1, 1600) i);
    perform fanout.capture('wide', 'hostile_capture', columns => (select array_agg(attname::text order by attnum desc) from pg_attribute where attrelid = 'wide'::regclass and attnum > 0),
                           key => (select array_agg(attname::text order by attnum) from pg_attribute where attrelid = 'wide'::regclass and attnum > 1500));
end $$;
insert into wide ("column number 1", "column number 1600") values (true, false);
select (select count(*) from json_object_keys(payload::json)) as columns, payload::json ->> 'column number 1600' as last, json_array_length(key::json) as key
from messages where "table" = 'wide';
-- and the lists, of 1600 names each, are not kept in the session's memory
select sum(total_bytes) < 2000000 as small from pg_backend_memory_contexts where name ~ 'pg_fanout';
-- nor what belongs to captures of tables that are gone
do $$ begin
for i in 1..300 loop
    create temp table gone (id int primary key);
    perform fanout.capture('gone', 'hostile_capture');
    insert into gone values (i);
    drop table gone;
end loop;
end $$;
select count(*) < 30 as few from pg_backend_memory_contexts where name ~ 'pg_fanout';

-- kinds of tables: what is stored is captured, and nothing else
create temp table temporary (id int primary key);
select fanout.capture('temporary', 'hostile_capture');
insert into temporary values (1);
create unlogged table unlogged (id int primary key);
select fanout.capture('unlogged', 'hostile_capture');
insert into unlogged values (1);
create table parent (id int primary key);
create table child (more text) inherits (parent);
select fanout.capture('parent', 'hostile_capture');
insert into parent values (1);
insert into child values (2);
update parent set id = id + 10;
create table rerouted (id int primary key);
create rule r as on insert to rerouted do instead insert into unlogged values (new.id + 100);
select fanout.capture('rerouted', 'hostile_capture');
insert into rerouted values (1);
create table tree (id int, region text) partition by list (region);
create table tree_a partition of tree for values in ('a') partition by range (id);
create table tree_a_1 partition of tree_a for values from (0) to (10);
create table tree_rest (region text, junk int, id int);
alter table tree_rest drop junk;
alter table tree attach partition tree_rest default;
select fanout.capture('tree', 'hostile_capture', key => '{region,id}');
insert into tree values (1, 'a'), (2, 'b');
update tree set region = 'c' where id = 1;
select replace("table", 'pg_temp', '') as "table", op, key, payload from messages where "table" in ('temporary', 'unlogged', 'parent', 'child', 'rerouted', 'tree', 'tree_a', 'tree_a_1', 'tree_rest') order by id;

-- a type like hstore's, made in SQL: the output function decides; generated columns, identities, domains over composites
create domain shouted as text check (value = upper(value));
create type pair as (a shouted, b int4range[]);
create domain pairs as pair[] check (cardinality(value) < 3);
create table typed (id int generated always as identity primary key, p pairs, r tstzmultirange, b bytea, g text generated always as ('g' || b::text) stored);
select fanout.capture('typed', 'hostile_capture', key => '{g,id}');
insert into typed (p, r, b) values (array[row('X', '{"[1,2]",empty}')]::pair[], '{}', '\x0022ff');
select key, payload from messages where "table" = 'typed';

-- row-level security and column privileges are those of the table: messages have it all
create role fanout_blind;
create table secret (id int primary key, seen text, unseen text);
alter table secret enable row level security, force row level security;
create policy p on secret using (false) with check (true);
grant usage on schema hostile_capture to fanout_blind;
grant insert (id, seen) on secret to fanout_blind;
alter table secret alter unseen set default 'default';
select fanout.capture('secret', 'hostile_capture');
set role fanout_blind;
insert into secret (id, seen) values (1, 'x');
select * from secret;
reset role;
select payload from messages where "table" = 'secret';

drop schema hostile_capture cascade;
drop table temporary;
drop role fanout_blind;
