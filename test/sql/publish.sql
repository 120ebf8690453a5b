-- publish(): messages made by hand
set client_min_messages = warning;
create extension if not exists pg_fanout;
reset client_min_messages;
\set SHOW_CONTEXT never
create schema publish;
set search_path = publish;
select fanout.declare_topic('publish');
select fanout.declare_topic('publish_cloudevents', 'cloudevents');
create view messages as
select o.id, o.key, o.type, o.headers, o.payload
from fanout.outbox o join fanout.topic t using (topic_id) where t.topic like 'publish%' order by o.id;

-- the message id is the one that everybody sees
select fanout.publish('publish', '{"a": 1}') as message_id \gset
select topic, state, sent_at, key, type from fanout.outbox_status where message_id = :'message_id';
select count(*) as messages from fanout.outbox where message_id = :'message_id';
-- of its own for each message
with p as materialized (select fanout.publish('publish', to_jsonb(g)) as m from generate_series(1, 1000) g)
select count(distinct m) as ids, bool_and(m::text ~ '^[0-9a-f]{8}-[0-9a-f]{4}-[1-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$') as valid from p;

-- all arguments, by name
select fanout.publish(topic => 'publish', payload => '{"event": "user.greeted"}', key => 'k 1', type => 'greeted',
                      headers => '{"tenant": 7, "trace": "x\"y", "f": 1.5, "big": 123456789012345678901234567890, "yes": true, "no": null, "": ""}');
select fanout.publish(topic => 'publish', payload => '{"event": "user.greeted"}', key => 'k 1', type => 'greeted',
                      headers => '{"tenant": 7, "trace": "x\"y", "f": 1.5, "big": 123456789012345678901234567890, "yes": true, "no": null}') is not null as published;
select key, type, headers, payload from messages order by id desc limit 1;

-- any JSON is a payload, and is written as jsonb writes it
select fanout.publish('publish', p::jsonb) is not null as published
from unnest(array['null', 'true', '1.50', '"text"', '[]', '{}', '[1, {"b": 2,   "a": 1}]', '"ünï 😀 \u20ac"']) p;
select payload from (select * from messages order by id desc limit 8) m order by id;
select fanout.publish('publish', 'not json');
-- a large one
select fanout.publish('publish', jsonb_build_object('x', repeat('x', 1000000))) is not null as published;
select length(payload) from messages order by id desc limit 1;

-- NULL and default
select fanout.publish('publish', '1', null, null, null) is not null as published;
select fanout.publish('publish', '1') is not null as published;
select fanout.publish('publish', '1', '', '') is not null as published;
select key, type, headers, payload from messages order by id desc limit 3;
select fanout.publish(null, '1');
select fanout.publish('publish', null);
select fanout.publish('publish_unknown', '1');
select fanout.publish('', '1');

-- headers
select fanout.publish('publish', '1', headers => '[]');
select fanout.publish('publish', '1', headers => '1');
select fanout.publish('publish', '1', headers => 'null');
select fanout.publish('publish', '1', headers => '{"a": {"b": 1}}');
select fanout.publish('publish', '1', headers => '{"a": []}');
select fanout.publish('publish', '1', headers => '{"good": 1, "z": {}}');
select fanout.publish('publish', '1', headers => jsonb_build_object(repeat('x', 129), 1));
select fanout.publish('publish', '1', headers => jsonb_build_object(repeat('x', 128), repeat('y', 1000))) is not null as published;
select fanout.publish('publish', '1', headers => '{"op": 1}');
create function sqlstate_of(command text) returns text language plpgsql as $$
begin
    execute command;
    return 'no error';
exception when others then
    return sqlstate;
end $$;
select name, sqlstate_of(format($$select fanout.publish('publish', '1', headers => jsonb_build_object(%L, 1))$$, name))
from unnest('{op,schema,table,key,old_key,sequence,xid,Op,xids}'::text[]) name;

-- type: as long as a short string of AMQP, in bytes of UTF-8
select fanout.publish('publish', '1', type => repeat('t', 255)) is not null as published;
select fanout.publish('publish', '1', type => repeat('t', 256));
select fanout.publish('publish', '1', type => repeat('€', 85)) is not null as published;
select fanout.publish('publish', '1', type => repeat('€', 86));
select sqlstate_of(c), c from unnest(array[
    $$select fanout.publish('publish_unknown', '1')$$,
    $$select fanout.publish('publish', null)$$,
    $$select fanout.publish('publish', '1', headers => '[]')$$,
    $$select fanout.publish('publish', '1', type => repeat('t', 256))$$]) c;

-- CloudEvents: the payload becomes the data
select fanout.publish('publish_cloudevents', '{"n": 1}', 'k "1"', 'my.event') as message_id \gset
select regexp_replace(replace(payload, :'message_id', '<message id>'), '"time":"[^"]*"', '"time":"<time>"') from messages order by id desc limit 1;
select fanout.publish('publish_cloudevents', '{"n": 1}') as message_id \gset
select regexp_replace(replace(payload, :'message_id', '<message id>'), '"time":"[^"]*"', '"time":"<time>"') from messages order by id desc limit 1;

-- it belongs to its transaction
select count(*) as n from messages \gset
begin;
select fanout.publish('publish', '1') is not null as published;
rollback;
begin;
savepoint s;
select fanout.publish('publish', '1') is not null as published;
rollback to s;
commit;
select count(*) - :n as more from messages;
begin read only;
select fanout.publish('publish', '1');
rollback;
begin;
select fanout.publish('publish', '1') is not null as published;
prepare transaction 'publish';
select count(*) - :n as more from messages;
commit prepared 'publish';
select count(*) - :n as more from messages;

-- in a trigger, in a function, in a query of many rows, in order
create table event (id int);
create function publish_event() returns trigger language plpgsql as $$
begin
    perform fanout.publish('publish', to_jsonb(new), key => new.id::text, type => tg_table_name);
    return null;
end $$;
create trigger publish_event after insert on event for each row execute function publish_event();
insert into event values (1), (2), (3);
select key, type, payload from (select * from messages order by id desc limit 3) m order by id;

-- values of all lengths at which the layout of a row changes, and none of them
create table given as
select i, case when i % 7 > 0 then repeat('k', (i * 5) % 401) end as key, case when i % 5 > 0 then repeat('t', i % 256) end as type,
       case when i % 3 > 0 then jsonb_build_object('h', repeat('h', (i * 3) % 301)) end as headers, to_jsonb(repeat('p', i % 200)) as payload
from generate_series(0, 4000) i;
alter table given add message_id uuid;
update given set message_id = fanout.publish('publish', payload, key => key, type => type, headers => headers);
select count(*) as given, count(o.id) as written, count(distinct o.id) as ids,
       bool_and(row(o.key, o.type, o.headers, o.payload) is not distinct from row(g.key, g.type, g.headers, g.payload::text)) as same,
       bool_and(o.queue is null and o.created_at <= clock_timestamp() and o.created_at > clock_timestamp() - interval '1 day') as own
from given g left join fanout.outbox o using (message_id);

set client_min_messages = warning;
drop schema publish cascade;
