-- a role that may only insert into a captured table tries to read, forge, delay, redirect and block messages
set client_min_messages = warning;
create extension if not exists pg_fanout;
\set SHOW_CONTEXT never
drop role if exists fanout_victim, fanout_hostile;
create role fanout_victim;
create role fanout_hostile;
create schema hostile_writer;
grant usage, create on schema hostile_writer to fanout_hostile;
set search_path = hostile_writer;
select fanout.declare_topic('hostile_writer', 'row'), fanout.declare_topic('hostile_writer 2');
create table entity (id int primary key, a text);
select fanout.capture('entity', 'hostile_writer');
grant insert on entity to fanout_hostile;
create view messages as
    select o.id, key, headers ->> 'op' as op, headers ->> 'table' as "table", payload from fanout.outbox o join fanout.topic t using (topic_id) where topic ~ '^hostile_writer';

set role fanout_hostile;
insert into entity values (1, 'x');
-- what the server says differs between its versions, SQLSTATEs do not
create function attempt(command text) returns text language plpgsql as $$
begin
    execute command;
    return 'allowed';
exception when others then
    return sqlstate;
end $$;
-- settings: none of pg_fanout's, and none that would leave a change without a message
select name, a.answer
from (select name from pg_settings where name like 'pg\_fanout.%' union select 'pg_fanout.uri' union select 'session_replication_role') s(name),
     lateral attempt(format('set %s = ''1''', name)) a(answer) order by 1;
select attempt(c) from unnest(array[
    'alter role fanout_hostile set pg_fanout.uri = ''amqp://other/''', format('alter database %I set pg_fanout.uri = ''amqp://other/''', current_database()),
    format('alter database %I reset all', current_database()), 'select set_config(''pg_fanout.uri'', ''amqp://other/'', false)']) c;
-- the table and its triggers
select attempt(c) from unnest(array[
    'alter table entity disable trigger all', 'alter table entity disable trigger user', 'drop trigger pg_fanout_row_hostile_writer on entity', 'alter trigger pg_fanout_row_hostile_writer on entity rename to t',
    'create trigger t before insert on entity for each row execute function fanout.capture_trigger()', 'create rule r as on insert to entity do instead nothing',
    'create event trigger e on ddl_command_end execute function fanout.schema_changed()', 'create index on entity (id)', 'alter table entity rename a to b',
    'lock table entity in access exclusive mode', 'lock table entity in share mode', 'truncate entity', 'delete from entity', 'select * from entity',
    'create table heir () inherits (entity)', 'create publication p for table entity', 'comment on table entity is ''x''']) c;
-- pg_fanout's own objects, to read and to write and to lock; see also privileges.sql
select attempt(c) from unnest(array[
    'lock table fanout.topic in access share mode', 'lock table fanout.outbox_0 in row exclusive mode', 'lock table fanout.rotation in access exclusive mode',
    'select fanout.capture_trigger()', 'select fanout.lock_capture(''entity'')', 'create function fanout.f() returns int language sql as ''select 1''',
    'create operator fanout.= (leftarg = text, rightarg = text, procedure = texteq)', 'alter function fanout.publish(text, jsonb, text, text, jsonb) owner to fanout_hostile',
    'create table capture_trigger_owner (); create trigger t after insert on capture_trigger_owner for each row execute function fanout.capture_trigger(''hostile_writer'')',
    'alter extension pg_fanout update', 'drop extension pg_fanout cascade', 'alter extension pg_fanout drop table fanout.outbox', 'drop schema fanout cascade',
    'load ''pg_fanout''', 'create function f() returns trigger language c as ''$libdir/pg_fanout'', ''pgf_capture_trigger''']) c;
-- the publisher's process
reset role;
select pid as publisher from fanout.stat_publisher \gset
set role fanout_hostile;
select attempt('select pg_terminate_backend(' || :publisher || ')') as terminate, attempt('select pg_cancel_backend(' || :publisher || ')') as cancel;
reset role;
select count(*) filter (where op = 'c') as messages, count(*) from messages;

-- what is left to him: his own transaction.  It is one message for each row, as he committed it
set role fanout_hostile;
begin;
insert into entity values (2, 'x');
savepoint s;
insert into entity values (3, 'rolled back');
rollback to s;
insert into entity values (4, '{"forged": "}, {\"op\": \"d\"}') on conflict do nothing;
insert into entity values (4, 'conflict') on conflict do nothing;
set local timezone = 'Asia/Tokyo';
prepare transaction 'hostile';
reset role;
-- prepared, it holds no lock that keeps anybody from writing, declaring or capturing
begin;
set local lock_timeout = '5s';
insert into entity values (5, 'meanwhile');
select fanout.declare_topic('hostile_writer 3');
create table meanwhile (id int primary key);
select fanout.capture('meanwhile', 'hostile_writer');
commit;
select key from messages order by id;
commit prepared 'hostile';
select key, payload from messages order by id;
-- an advisory lock keeps nobody from capturing
create table another (id int primary key);
begin;
select pg_advisory_xact_lock(2620, 'another'::regclass::oid::int), pg_advisory_xact_lock(2620::bigint << 32 | 'another'::regclass::oid::bigint);
select fanout.capture('another', 'hostile_writer');
select classid, objid::regclass, objsubid from pg_locks where locktype = 'advisory' and pid = pg_backend_pid() order by 3;
commit;
-- NOTIFY is anybody's: an alert may be forged, so it is a reason to look and nothing more
set role fanout_hostile;
select attempt('notify pg_fanout_alert, ''{"topic": "hostile_writer"}''');
reset role;

-- code of his own: a cast to json is never run
set role fanout_hostile;
create type mood as enum ('good', 'bad');
create type feeling as (m mood, n int);
create function trap(mood) returns json language plpgsql as $$
begin
    raise warning 'cast run by %', current_user;
    return json_build_object('mood', $1::text, 'by', current_user);
end $$;
create function trap(feeling) returns json language plpgsql as $$ begin raise exception 'no'; end $$;
create cast (mood as json) with function trap(mood);
create cast (feeling as json) with function trap(feeling);
create domain checked as int check (attempt('select 1') = 'allowed');
reset role;
grant usage on schema hostile_writer to fanout_victim;
create table victim (id int primary key, m mood, d checked, ms mood[], f feeling, fs feeling[]);
grant insert on victim to fanout_victim;
select fanout.capture('victim', 'hostile_writer');
set role fanout_victim;
insert into victim values (1, 'good', 1, '{good,bad}', '(bad,1)', '{"(good,)"}');
reset role;
select payload from messages order by id desc limit 1;
-- nor one that makes the row's key
alter table victim drop constraint victim_pkey, add primary key (m);
set role fanout_victim;
insert into victim values (2, 'bad');
reset role;
select key, payload from messages order by id desc limit 1;

-- Rights are to functions, and so to all topics.  Without them the owner of a table cannot capture, nor make such a trigger by hand:
set role fanout_hostile;
create table his (id int primary key, a text);
select attempt('select fanout.capture(''his'', ''hostile_writer'')'), attempt('create trigger t after insert on his for each row execute function fanout.capture_trigger(''hostile_writer'')');
reset role;
-- a capture that an administrator made for him stays in its topic
select fanout.capture('his', 'hostile_writer 2');
set role fanout_hostile;
select attempt(c) from unnest(array[
    'create trigger t after insert on his for each row execute function fanout.capture_trigger(''hostile_writer'')',
    'create or replace trigger "pg_fanout_row_hostile_writer 2" after insert on his for each row execute function fanout.capture_trigger(''hostile_writer'')',
    'update pg_trigger set tgargs = ''\x00'' where tgrelid = ''his''::regclass',
    'alter trigger "pg_fanout_row_hostile_writer 2" on his rename to pg_fanout_row_hostile_writer']) c;
insert into his values (1);
reset role;
select topic, headers ->> 'table' as "table" from fanout.outbox o join fanout.topic t using (topic_id) where topic ~ '^hostile_writer' order by o.id desc limit 1;
-- with them, and a topic, what arrives says truly which table it comes from
grant usage on schema fanout to fanout_hostile;
grant execute on function fanout.capture, fanout.capture_trigger, fanout.publish to fanout_hostile;
set role fanout_hostile;
select attempt('create trigger t after insert on his for each row execute function fanout.capture_trigger(''hostile_writer'')'),
       attempt('create schema fanout_hostile_schema create table t (id int) create trigger t after insert on t for each row execute function fanout.capture_trigger(''hostile_writer'')'),
       attempt('select fanout.publish(''hostile_writer'', ''1'')');
reset role;
select fanout.grant_topic('hostile_writer', 'fanout_hostile', '{capture,publish}');
set role fanout_hostile;
select attempt('select fanout.capture(''his'', ''hostile_writer'')');
insert into his values (2);
select attempt('alter table his rename to entity');
select attempt('create trigger t after insert on his for each row execute function fanout.capture_trigger(''hostile_writer'', ''table'', ''entity'', ''schema'', ''x'')');
insert into his values (3);
select attempt('select fanout.publish(''hostile_writer'', ''1'', headers => ''{"table": "entity"}'')'),
       attempt('select fanout.publish(''hostile_writer'', ''1'', headers => ''{"op": "d"}'')');
select attempt('select fanout.capture(''entity'', ''hostile_writer 2'')');
reset role;
select topic, key, headers ->> 'table' as "table" from fanout.outbox o join fanout.topic t using (topic_id) where topic ~ '^hostile_writer' order by o.id desc limit 3;
revoke execute on all functions in schema fanout from fanout_hostile;
-- a function of the administrator's that names a topic needs neither
create function publish_to_2(payload jsonb) returns uuid language sql security definer set search_path = pg_catalog, pg_temp
    as $$ select fanout.publish('hostile_writer 2', payload) $$;
revoke execute on function publish_to_2 from public;
grant execute on function publish_to_2 to fanout_hostile;
set role fanout_hostile;
select publish_to_2('{"by": "function"}') is not null as published;
select attempt('select fanout.publish(''hostile_writer 2'', ''1'')');
reset role;
select topic, payload from fanout.outbox o join fanout.topic t using (topic_id) where topic ~ '^hostile_writer' order by o.id desc limit 1;

drop schema hostile_writer cascade;
select fanout.revoke_topic('hostile_writer', 'fanout_hostile', '{capture,publish}');
drop owned by fanout_victim, fanout_hostile;
drop role fanout_victim, fanout_hostile;
