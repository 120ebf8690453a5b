-- the three formats of bodies, to the letter; what changes from run to run is masked
set client_min_messages = warning;
create extension if not exists pg_fanout;
reset client_min_messages;
\set SHOW_CONTEXT never
create schema body;
set search_path = body;
set timezone = 'UTC';

create table seen (id bigint);
-- ids of messages must be their own, times and transactions are anybody's
create function bodies() returns setof text language sql volatile as $$
    with new as (
        select o.*, t.topic from fanout.outbox o join fanout.topic t using (topic_id)
        where t.topic like 'body%' and not exists (select from seen s where s.id = o.id)
    ), now_seen as (
        insert into seen select id from new
    )
    select regexp_replace(regexp_replace(regexp_replace(regexp_replace(
               replace(replace(payload, message_id::text, '<message id>'), '"txId":' || xid, '"txId":<xid>'),
               '"ts_ms":\d{13}', '"ts_ms":<ms>', 'g'),
               '"time":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00"', '"time":"<time>"'),
               '"version":"\d+\.\d+(\.\d+)?[a-z0-9]*"', '"version":"<version>"'),
               '"db":"[^"]*"|(?<="source":")/[^/]*', '<db>')
    from new order by id
$$;
select fanout.declare_topic('body_debezium');
select fanout.declare_topic('body_row', 'row');
select fanout.declare_topic('body_cloudevents', 'cloudevents');

create table entity (id int primary key, "a ""quoted""" text, nothing int, twice int generated always as (id * 2) stored);
\set every '''{insert,update,delete,truncate}'''
-- one at a time, so that they are not mixed up
select fanout.capture('entity', 'body_debezium', :every);
insert into entity values (1, e'line\nbreak "quote" \\ ünï 😀 \u20ac');
update entity set nothing = 1;
update entity set id = 2;
delete from entity;
truncate entity;
select * from bodies();
select fanout.uncapture('entity');
select fanout.capture('entity', 'body_debezium', '{update}', old_row => true);
insert into entity values (1);
update entity set nothing = 1;
select * from bodies();
select fanout.uncapture('entity');
truncate entity;

select fanout.capture('entity', 'body_row', :every);
insert into entity values (1, e'line\nbreak "quote" \\ ünï 😀 \u20ac');
update entity set nothing = 1;
update entity set id = 2;
delete from entity;
truncate entity;
select * from bodies();
select fanout.uncapture('entity');

select fanout.capture('entity', 'body_cloudevents', :every);
insert into entity values (1, e'line\nbreak "quote" \\ ünï 😀 \u20ac');
update entity set nothing = 1;
update entity set id = 2;
delete from entity;
truncate entity;
select * from bodies();
select fanout.uncapture('entity');
-- the key is the subject; without one there is none
create table keyless (a int);
create table composite (a int, b text, primary key (b, a));
select fanout.capture('keyless', 'body_cloudevents');
select fanout.capture('composite', 'body_cloudevents');
insert into keyless values (1);
insert into composite values (1, '"x"');
select * from bodies();

-- all of it is JSON, and no object has a key twice
select bool_and((select count(*) = count(distinct k) from json_object_keys(case json_typeof(payload::json) when 'object' then payload::json else '{}' end) k)) as valid
from fanout.outbox o join fanout.topic t using (topic_id) where topic like 'body%';

-- NULL is null; what is left out is absent
select fanout.capture('entity', 'body_row', columns => '{id,nothing}');
insert into entity values (3);
select * from bodies();
select fanout.uncapture('entity');

-- a topic's format is that of the time of writing
begin;
select fanout.declare_topic('body_changed', 'row');
create table changed (id int primary key);
select fanout.capture('changed', 'body_changed');
insert into changed values (1);
update fanout.topic set format = 'debezium' where topic = 'body_changed';
insert into changed values (2);
select payload::json ->> 'id' as row, payload::json -> 'after' ->> 'id' as debezium
from fanout.outbox o join fanout.topic t using (topic_id) where topic = 'body_changed' order by o.id;
rollback;

-- type, headers, queue, segment of the row
insert into composite values (2, 'y');
select o.segment = (select current from fanout.rotation) as current_segment, o.type, o.key, o.headers, o.queue, o.message_id is not null as has_id
from fanout.outbox o join fanout.topic t using (topic_id) where topic like 'body%' order by o.id desc limit 1;

set client_min_messages = warning;
drop schema body cascade;
