-- the extension comes and goes; this test has a database of its own
\set SHOW_CONTEXT never
\c postgres
set client_min_messages = warning;
drop database if exists fanout_extension;
create database fanout_extension template template0 encoding 'UTF8';
\c fanout_extension
\set SHOW_CONTEXT never

-- a schema of its name that exists is not taken over
create schema fanout;
create extension pg_fanout;
drop schema fanout;
-- nor can it be put elsewhere, or be created without rights
create extension pg_fanout schema public;
create role fanout_owner;
set role fanout_owner;
\set VERBOSITY sqlstate
create extension pg_fanout;
\set VERBOSITY default
reset role;
drop role fanout_owner;

create extension pg_fanout;
create extension pg_fanout;
create extension if not exists pg_fanout;
select extname, extrelocatable, extversion = fanout.library_version() as same_version from pg_extension where extname = 'pg_fanout';
select fanout.preloaded();
alter extension pg_fanout set schema public;

-- definitions travel with pg_dump, messages and the rest do not
select c::regclass as dumped, condition
from pg_extension, unnest(extconfig, extcondition) as u(c, condition) where extname = 'pg_fanout' order by c::regclass::text;
-- so no other table may be needed to read them
select conrelid::regclass as "table", confrelid::regclass as "references" from pg_constraint
where conrelid in (select unnest(extconfig) from pg_extension where extname = 'pg_fanout') and contype = 'f';

-- its parts are not dropped one by one
drop table fanout.outbox;
drop function fanout.capture_trigger();
drop event trigger pg_fanout_schema_changed;
drop schema fanout cascade;

create table entity (id int primary key, a text);
select fanout.declare_topic('t1');
select fanout.declare_topic('t2', 'row');
select fanout.capture('entity', 't2');
prepare write(int) as insert into entity values ($1);
prepare publish(jsonb) as select fanout.publish('t2', $1) is not null as published;
execute write(1);
execute publish('1');

-- captures depend on it
drop extension pg_fanout;
set client_min_messages = warning;
drop extension pg_fanout cascade;
reset client_min_messages;
select count(*) as triggers from pg_trigger where tgrelid = 'entity'::regclass;
select count(*) as left_behind from pg_namespace where nspname = 'fanout';
execute write(2);
execute publish('2');
alter table entity rename a to b;

-- created again in the same session, nothing of the old one is remembered
create extension pg_fanout;
execute publish('3');
select fanout.declare_topic('t2', 'cloudevents');
select fanout.capture('entity', 't2');
execute write(3);
execute publish('3');
select o.id - (select min(id) from fanout.outbox) + 1 as id, o.segment, t.topic_id, key, payload::json ->> 'data' as data from fanout.outbox o join fanout.topic t using (topic_id) order by o.id;

-- also where that is rolled back
begin;
drop extension pg_fanout cascade;
execute write(4);
create extension pg_fanout;
select fanout.declare_topic('t2');
select fanout.capture('entity', 't2');
execute write(5);
execute publish('5');
select o.id - (select min(id) from fanout.outbox) + 1 as id, t.topic_id, key, payload::json -> 'after' as after from fanout.outbox o join fanout.topic t using (topic_id) order by o.id;
rollback;
execute write(6);
execute publish('6');
select o.id - (select min(id) from fanout.outbox) + 1 as id, t.topic_id, key, payload::json ->> 'data' as data from fanout.outbox o join fanout.topic t using (topic_id) order by o.id;

-- or to a savepoint
begin;
savepoint s;
drop extension pg_fanout cascade;
rollback to s;
execute write(7);
commit;
select count(*) from fanout.outbox;

-- TRUNCATE of our tables, reindexing, rewriting: caches follow
execute write(8);
truncate fanout.outbox;
execute write(10);
reindex table fanout.topic;
vacuum full fanout.topic;
vacuum full fanout.outbox;
execute write(11);
select key from fanout.outbox where key in ('10', '11') order by id;

\c postgres
drop database fanout_extension;
