-- what a superuser may add to the tables that pg_fanout writes without the executor: indexes of all kinds,
-- constraints, triggers; rows get there all the same, or the statement fails
set client_min_messages = warning;
create extension if not exists pg_fanout;
\set SHOW_CONTEXT never
create schema segments;
set search_path = segments;
select fanout.declare_topic('segments', 'row');
create table entity (id int primary key, a text, b text);
select fanout.capture('entity', 'segments', key => '{a}');
create view messages as
    select o.* from fanout.outbox o join fanout.topic t using (topic_id) where t.topic = 'segments';
create function current_segment() returns text language sql as $$ select 'fanout.outbox_' || current from fanout.rotation $$;
create function attempt(command text) returns text language plpgsql as $$
begin
    execute command;
    return 'done';
exception when others then
    return sqlstate;
end $$;
-- how many messages an index finds, among those that the heap has
create function found(condition text) returns text language plpgsql as $$
declare
    line text;
    by_heap bigint;
    by_index bigint;
    used boolean := false;
begin
    perform set_config('enable_seqscan', 'on', true), set_config('enable_indexscan', 'off', true), set_config('enable_bitmapscan', 'off', true);
    execute 'select count(*) from segments.messages where ' || condition into by_heap;
    perform set_config('enable_seqscan', 'off', true), set_config('enable_indexscan', 'on', true), set_config('enable_bitmapscan', 'on', true);
    execute 'select count(*) from segments.messages where ' || condition into by_index;
    for line in execute 'explain (costs off) select count(*) from segments.messages where ' || condition loop
        used := used or line ~ 'Index Scan' and line !~ 'xid';
    end loop;
    return format('%s of %s, %s', by_index, by_heap, case when used then 'by the index' else 'without it' end);
end $$;

-- indexes, on a segment with rows and one without; single rows, statements of many, toasted ones
insert into entity select i, 'K' || i from generate_series(1, 50) i;
create index pg_fanout_test_gin on fanout.outbox using gin (headers);
create index pg_fanout_test_expression on fanout.outbox (lower(key));
create index pg_fanout_test_partial on fanout.outbox (key) where topic_id < 0;
create index pg_fanout_test_brin on fanout.outbox using brin (created_at);
create index pg_fanout_test_hash on fanout.outbox using hash (key);
insert into entity values (51, 'K51');
insert into entity select i, 'K' || i from generate_series(52, 400) i;
insert into entity select 401, 'K401', string_agg(md5(i::text), '') from generate_series(1, 200) i;
begin;
insert into entity values (402, 'K402');
savepoint a;
insert into entity values (403, 'K403');
rollback to a;
insert into entity values (404, 'K404');
commit;
copy entity (id, a) from stdin;
405	K405
406	K406
\.
select count(*), count(distinct id) from messages;
select found('headers @> ''{"op": "c"}''');
select found('lower(key) = ''k51''');
select found('lower(key) in (''k400'', ''k402'', ''k403'', ''k404'', ''k406'')');
select found('created_at <= now()');
select found('key = ''K300''');
set enable_seqscan = off;
select count(*) from fanout.outbox where topic_id < 0 and key like 'K%';
reset enable_seqscan;
drop index fanout.pg_fanout_test_gin, fanout.pg_fanout_test_expression, fanout.pg_fanout_test_partial, fanout.pg_fanout_test_brin, fanout.pg_fanout_test_hash;

-- an index whose expression fails makes the write fail
select attempt(format('create index pg_fanout_test on %s ((case when key = ''K00502'' then 1 / (length(key) - 6) end))', current_segment()));
select attempt('insert into entity values (501, ''K501'')'), attempt('insert into entity values (502, ''K00502'')');
select attempt('insert into entity select i, ''K0'' || i from generate_series(503, 510) i');
drop index fanout.pg_fanout_test;

-- constraints: unique, deferred, exclusion, CHECK, NOT NULL
do $$ begin execute format('alter table %s add constraint pg_fanout_test exclude using hash (message_id with =)', current_segment()); end $$;
insert into entity select i, 'x' from generate_series(601, 610) i;
do $$ begin execute format('alter table %s drop constraint pg_fanout_test, add constraint pg_fanout_test exclude using btree (key with =) where (type = ''unique'')', current_segment()); end $$;
select attempt($$select fanout.publish('segments', '1', 'twice', 'unique')$$), attempt($$select fanout.publish('segments', '1', 'twice', 'unique')$$),
       attempt($$select fanout.publish('segments', '1', 'twice', 'other')$$);
do $$ begin execute format('alter table %s drop constraint pg_fanout_test, add constraint pg_fanout_test unique (id) deferrable initially deferred', current_segment()); end $$;
insert into entity values (611, 'x');
do $$ begin execute format('alter table %s drop constraint pg_fanout_test, add constraint pg_fanout_test check (key <> ''refused'') not valid', current_segment()); end $$;
select attempt('insert into entity values (612, ''refused'')'), attempt('insert into entity values (613, ''taken'')');
select attempt('insert into entity select i, case when i = 618 then ''refused'' end from generate_series(614, 618) i');
do $$ begin execute format('alter table %s drop constraint pg_fanout_test', current_segment()); end $$;
alter table fanout.outbox add constraint pg_fanout_test check (type is not null) not valid;
select attempt($$select fanout.publish('segments', '1')$$), attempt($$select fanout.publish('segments', '1', type => 'x')$$);
alter table fanout.outbox drop constraint pg_fanout_test;
do $$ begin execute format('delete from %s where key is null or type is null', current_segment()); end $$;
do $$ begin execute format('alter table %s alter key set not null', current_segment()); end $$;
select attempt($$select fanout.publish('segments', '1')$$), attempt($$select fanout.publish('segments', '1', 'key')$$);
do $$ begin execute format('alter table %s alter key drop not null', current_segment()); end $$;
select key, type from messages where id > (select max(id) from messages where key = 'K406') and key <> 'x' order by id;

-- triggers of users, before and after, for rows and statements; one that writes to a captured table; one that keeps rows away
create table log (n bigint generated always as identity, event text, key text);
create table noted (id int primary key generated always as identity, key text);
select fanout.capture('noted', 'segments');
create function note() returns trigger language plpgsql as $$
begin
    insert into segments.log (event, key) values (format('%s %s %s', tg_when, tg_level, tg_op), case when tg_level = 'ROW' then new.key end);
    if tg_level = 'ROW' and new.key = 'away' then
        return null;
    elsif tg_level = 'ROW' and tg_when = 'AFTER' and new.key like 'note%' then
        insert into segments.noted (key) values (new.key);
    end if;
    return new;
end $$;
do $$ begin
    execute format('create trigger row_before before insert on %s for each row execute function segments.note()', current_segment());
    execute format('create trigger row_after after insert on %s for each row execute function segments.note()', current_segment());
    execute format('create trigger statement_after after insert on %s for each statement execute function segments.note()', current_segment());
    execute format('create constraint trigger deferred after insert on %s deferrable initially deferred for each row execute function segments.note()', current_segment());
end $$;
insert into entity values (701, 'note 1'), (702, 'note 2'), (703, 'plain');
select attempt('insert into entity values (704, ''away'')');
select event, key, count(*) from log group by event, key order by min(n);
select key, count(*) from messages where key in ('note 1', 'note 2', 'plain', 'away') or payload like '%"note%' group by 1 order by 1;
do $$ begin
    execute format('drop trigger row_before on %1$s; drop trigger row_after on %1$s; drop trigger statement_after on %1$s; drop trigger deferred on %1$s', current_segment());
end $$;

-- the guard against what others write need not see what pg_fanout writes itself, whichever way it does that
begin;
do $$ begin
    execute format('create or replace trigger pg_fanout_guard before insert on %s for each row execute function segments.note()', current_segment());
end $$;
insert into entity values (705, 'away');
create index on fanout.outbox using gin (headers);
insert into entity values (706, 'away');
select count(*) from messages where key = 'away';
rollback;

-- row security and rules change nothing
do $$ begin execute format('alter table %s enable row level security', current_segment()); end $$;
create role fanout_segments;
grant usage on schema segments to fanout_segments;
grant insert on entity to fanout_segments;
set role fanout_segments;
insert into entity values (801, 'by a role');
reset role;
do $$ begin execute format('alter table %s disable row level security', current_segment()); end $$;
select count(*) from messages where key = 'by a role';

-- another column is no harm, another type is refused
alter table fanout.outbox add column note text default 'none';
insert into entity values (802, 'another column');
select note from fanout.outbox where key = 'another column';
alter table fanout.outbox drop column note;
begin;
alter table fanout.topology_change alter xid type text;
select fanout.declare_topic('segments 1');
rollback;
-- nor is another access method (one that is the heap under another name)
create access method pg_fanout_test type table handler heap_tableam_handler;
select attempt(format('alter table %s set access method pg_fanout_test', current_segment())) in ('done', '42601');
insert into entity values (803, 'another method');
insert into entity select i, 'another method' from generate_series(804, 810) i;
select count(*) from messages where key = 'another method';
select attempt(format('alter table %s set access method heap', current_segment())) in ('done', '42601');

-- topology, and all tables are heaps
create index pg_fanout_test on fanout.topology_change ((xid::text));
begin;
select fanout.declare_topic('segments 2');
select count(*) from fanout.topology_change where xid = pg_current_xact_id();
commit;
drop index fanout.pg_fanout_test;
begin;
drop extension pg_fanout cascade;
set local default_table_access_method = pg_fanout_test;
create extension pg_fanout;
select relname from pg_class where relnamespace = 'fanout'::regnamespace and relkind = 'r' and relam <> (select oid from pg_am where amname = 'heap');
rollback;
drop access method pg_fanout_test;

drop view messages;
drop table entity, noted;
revoke usage on schema segments from fanout_segments;
drop role fanout_segments;
set client_min_messages = error;
drop schema segments cascade;
select fanout.purge('segments', held => true) is not null;
