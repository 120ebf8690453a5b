-- ids of messages: one by one in the order of the changes, and nothing of them is seen by who writes
set client_min_messages = warning;
create extension if not exists pg_fanout;
\set VERBOSITY terse
drop role if exists fanout_ids;
create role fanout_ids;
create schema ids;
set search_path = ids;
select fanout.declare_topic('ids');
create table entity (id serial primary key, a int);
select fanout.capture('entity', 'ids');
grant usage on schema ids to fanout_ids;
grant all on entity, entity_id_seq to fanout_ids;
create view messages as
    select o.id, o.key from fanout.outbox o join fanout.topic t using (topic_id) where t.topic = 'ids' order by o.id;

-- lastval() is the number that the writer drew, as without capture
set role fanout_ids;
insert into entity (a) values (1);
select lastval(), currval('entity_id_seq');
insert into entity (a) select i from generate_series(2, 1000) i;
select lastval(), currval('entity_id_seq');
update entity set a = a + 1;
select lastval();
reset role;
select lastval();

-- ids of a statement's rows follow one another in their order
select count(*), max(id) - min(id) + 1 as ids, bool_and(step = 1) as in_order
from (select id, key::int - lag(key::int) over (order by id) as step from messages limit 1000) m;
truncate fanout.outbox;

-- also where some have been drawn by then for others, and after a statement that failed
create function inner_change() returns trigger language plpgsql as $$
begin
    if new.id % 300 = 0 and pg_trigger_depth() = 1 then
        update entity set a = -1 where id = 1;
    end if;
    return null;
end $$;
create trigger a_first after update on entity for each row execute function inner_change();
update entity set a = 0;
update entity set a = 1 / (id - 500);
select key, count(*) from messages group by key having count(*) <> 1;
select id - first_id as of_first_row, last_id - first_id + 1 as ids
from messages, (select min(id) as first_id, max(id) as last_id from messages) i where key = '1';
select a from entity where id = 1;
drop trigger a_first on entity;
truncate fanout.outbox;

-- another trigger's condition is called, whatever its function is called
create function count_change() returns boolean language plpgsql as $$
begin
    raise warning 'a condition that is false';
    return false;
end $$;
create function told() returns trigger language plpgsql as $$ begin raise 'fired'; end $$;
create trigger a_first after insert or update on entity for each row when (count_change()) execute function told();
insert into entity (a) values (1);
update entity set a = 1 where id = 1;
drop trigger a_first on entity;
truncate fanout.outbox;

-- numbers that others draw, and a sequence that is no more than made
select nextval('fanout.outbox_id_seq') as drawn \gset
insert into entity (a) values (1);
select id - :drawn as behind from messages;
select nextval('fanout.outbox_id_seq') - id as behind from messages;
truncate fanout.outbox;
select setval('fanout.outbox_id_seq', :drawn + 1000, false) - :drawn as set;
insert into entity (a) values (1), (2);
select id - :drawn as behind from messages;
select last_value - :drawn as last, log_cnt from fanout.outbox_id_seq;
truncate fanout.outbox;

-- what gives no numbers
select setval('fanout.outbox_id_seq', 9223372036854775807) as last;
insert into entity (a) values (1);
select setval('fanout.outbox_id_seq', :drawn + 2000) - :drawn as set;
begin;
alter sequence fanout.outbox_id_seq rename to other;
create table fanout.outbox_id_seq (last_value bigint, log_cnt bigint, is_called boolean);
insert into entity (a) values (1);
rollback;
begin read only;
select fanout.publish('ids', '1');
rollback;
insert into entity (a) values (1);
select id - :drawn as behind from messages;

set client_min_messages = warning;
drop schema ids cascade;
drop role fanout_ids;
truncate fanout.outbox;
