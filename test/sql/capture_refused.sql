-- what cannot be captured, and what the trigger function refuses
set client_min_messages = warning;
create extension if not exists pg_fanout;
reset client_min_messages;
\set SHOW_CONTEXT never
create schema capture_refused;
set search_path = capture_refused;
select fanout.declare_topic('capture_refused');
create table entity (id int primary key, a text);

-- not a table that triggers can watch, or not anybody's to watch
create view a_view as select * from entity;
create materialized view a_matview as select * from entity;
create sequence a_sequence;
create type a_type as (id int);
create foreign data wrapper capture_refused;
create server capture_refused foreign data wrapper capture_refused;
create foreign table a_foreign_table (id int) server capture_refused;
select fanout.capture('a_view', 'capture_refused');
select fanout.capture('a_matview', 'capture_refused');
select fanout.capture('a_sequence', 'capture_refused');
select fanout.capture('a_type', 'capture_refused');
select fanout.capture('entity_pkey', 'capture_refused');
select fanout.capture('a_foreign_table', 'capture_refused');
select fanout.capture('pg_catalog.pg_class', 'capture_refused');
select fanout.capture('information_schema.sql_features', 'capture_refused', "when" => 'true)');
select fanout.capture('fanout.topic', 'capture_refused');
select fanout.capture('fanout.outbox', 'capture_refused');
select fanout.capture('fanout.outbox_0', 'capture_refused');
select fanout.capture('fanout.captures', 'capture_refused');
select fanout.capture('no_such_table', 'capture_refused');
select fanout.capture(0::oid, 'capture_refused');
select fanout.capture(null, 'capture_refused');

-- topics that are not there
select fanout.capture('entity', 'capture_refused_unknown');
select fanout.capture('entity', null);
select fanout.capture('entity', '');
select fanout.capture('entity', 'amq.fanout');

-- operations
select fanout.capture('entity', 'capture_refused', null);
select fanout.capture('entity', 'capture_refused', '{}');
select fanout.capture('entity', 'capture_refused', '{insert,upsert}');
select fanout.capture('entity', 'capture_refused', '{INSERT}');
select fanout.capture('entity', 'capture_refused', '{insert,null}');

-- columns
select fanout.capture('entity', 'capture_refused', columns => '{id,b}');
select fanout.capture('entity', 'capture_refused', exclude => '{b}');
select fanout.capture('entity', 'capture_refused', key => '{b}');
select fanout.capture('entity', 'capture_refused', columns => '{}');
select fanout.capture('entity', 'capture_refused', exclude => '{}');
select fanout.capture('entity', 'capture_refused', key => '{}');
select fanout.capture('entity', 'capture_refused', key => '{id,null}');
select fanout.capture('entity', 'capture_refused', columns => '{ctid}');
select fanout.capture('entity', 'capture_refused', key => '{tableoid}');
select fanout.capture('entity', 'capture_refused', columns => '{ID}');
select fanout.capture('entity', 'capture_refused', columns => '{id}', exclude => '{a}');
select fanout.capture('entity', 'capture_refused', exclude => '{id}');
alter table entity add gone int;
alter table entity drop gone;
select fanout.capture('entity', 'capture_refused', columns => '{........pg.dropped.3........}');

-- nothing of all that has left a trace
select count(*) as captures from fanout.captures where topic like 'capture_refused%';
select count(*) as triggers from pg_trigger where tgrelid = 'entity'::regclass;
select fanout.uncapture('no_such_table');
select fanout.uncapture(null);
select fanout.uncapture('a_view');

-- SQLSTATEs are part of the interface
create function sqlstate_of(command text) returns text language plpgsql as $$
begin
    execute command;
    return 'no error';
exception when others then
    return sqlstate;
end $$;
select sqlstate_of(command), command from unnest(array[
    $$select fanout.capture('entity', 'capture_refused_unknown')$$,
    $$select fanout.capture('entity', 'capture_refused', columns => '{b}')$$,
    $$select fanout.capture('a_view', 'capture_refused')$$,
    $$select fanout.capture('fanout.topic', 'capture_refused')$$,
    $$select fanout.capture('entity', 'capture_refused', '{}')$$,
    $$select fanout.capture('entity', 'capture_refused', exclude => '{id}')$$,
    $$select fanout.capture('entity', 'capture_refused', "when" => '')$$,
    $$select fanout.capture(null, 'capture_refused')$$]) command;

-- the trigger function is for triggers that capture() makes
select fanout.capture_trigger();
create trigger t before insert on entity for each row execute function fanout.capture_trigger('capture_refused');
insert into entity values (1);
drop trigger t on entity;
create trigger t after insert on entity for each statement execute function fanout.capture_trigger('capture_refused');
insert into entity values (1);
drop trigger t on entity;
create trigger t after insert on entity for each row execute function fanout.capture_trigger();
-- a write declares what a trigger names, if whoever made it may do that
create trigger t after insert on entity for each row execute function fanout.capture_trigger('capture_refused_unknown', 'format', 'row');
begin;
insert into entity values (1);
select topic, format, on_exhausted from fanout.topics where topic = 'capture_refused_unknown';
rollback;
drop trigger t on entity;
create trigger t instead of insert on a_view for each row execute function fanout.capture_trigger('capture_refused');
insert into a_view values (1);
-- options that it does not know, or that make no sense
create trigger t after insert on entity for each row execute function fanout.capture_trigger('capture_refused', 'nothing', 'x', 'key');
insert into entity values (1);
select key, payload::json ->> 'after' as after from fanout.outbox o join fanout.topic t using (topic_id) where topic = 'capture_refused';
drop trigger t on entity;
create trigger t after insert on entity for each row execute function fanout.capture_trigger('capture_refused', 'key', '{oops');
create trigger t after insert on entity for each row execute function fanout.capture_trigger('capture_refused', 'exclude', '{id,nothing}');
-- names that are NULL, and a name that no topic can have
create trigger t after insert on entity for each row execute function fanout.capture_trigger('capture_refused', 'key', '{NULL}', 'columns', '{NULL,id}');
insert into entity values (3);
select key, payload::json ->> 'after' as after from fanout.outbox o join fanout.topic t using (topic_id) where topic = 'capture_refused' order by o.id desc limit 1;
drop trigger t on entity;
do $$ begin
    execute format('create trigger t after insert on entity for each row execute function fanout.capture_trigger(%L)', repeat('x', 5000));
exception when name_too_long then
    raise notice '%', sqlerrm;
end $$;
-- the other functions of triggers
select fanout.topology_changed();
select fanout.schema_changed();
create trigger t after insert on entity execute function fanout.schema_changed();
-- internal helpers given nonsense
select fanout.trigger_arguments(0), fanout.trigger_arguments(null);
\set VERBOSITY sqlstate
select fanout.set_trigger_arguments(0, '{x}');
select fanout.set_trigger_arguments(0, '{x,null}');
\set VERBOSITY default
select fanout.condition_for('insert', 0, 'old.a is null');
select fanout.condition_for('nothing', 'entity', 'old.a is null');

set client_min_messages = warning;
drop schema capture_refused cascade;
drop foreign data wrapper capture_refused cascade;
