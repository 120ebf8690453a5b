-- pause, resume, redrive, purge, flush, and the views; the broker is away
set client_min_messages = warning;
create extension if not exists pg_fanout;
reset client_min_messages;
\set SHOW_CONTEXT never
create schema control;
set search_path = control;
select fanout.declare_binding('control', 'g');
select fanout.declare_topic('control_2', on_exhausted => 'dead_letter');

-- states as the publisher would have made them; negative ids collide with none
create function uuid(n int) returns uuid language sql immutable as $$
    select format('00000000-0000-0000-0000-%s', lpad(n::text, 12, '0'))::uuid
$$;
create function put_dead(n int, topic text) returns void language sql as $$
    insert into fanout.dead_letter (id, topic, message_id, type, key, headers, payload, xid, created_at, reason, attempts)
    values (-n, topic, control.uuid(n), 'type', 'key ' || n, '{"h": 1}', '{"n": 1}', '3', '2024-01-01 00:00+00', 'NO_ROUTE', 10)
$$;
create function put_held(n int, topic text) returns void language sql as $$
    insert into fanout.held (id, xid, topic_id, message_id, type, key, headers, payload, created_at)
    select -n, '3', t.topic_id, control.uuid(n), 'type', 'key ' || n, '{}', '{}', '2024-01-01 00:00+00' from fanout.topic t where t.topic = put_held.topic
$$;
create view state as
select case when id < 0 then id end as id, topic, key, state, sent_at from fanout.outbox_status s where topic like 'control%' order by s.id;

-- the publisher counts what waits, soon
create procedure wait_for_waiting(topic text, messages bigint) language plpgsql as $$
begin
    for i in 1 .. 200 loop
        exit when (select s.pending + s.held from fanout.stat_topics s where s.topic = wait_for_waiting.topic) = messages;
        perform pg_sleep(0.05);
    end loop;
end
$$;

-- pending: written, committed, not acknowledged
select fanout.publish('control', '1', 'pending') is not null as published;
select topic, key, state, sent_at from state;
call wait_for_waiting('control', 1);
select topic, pending, held, sent, rate, dead, stalled_since, reason, attempts, retry_at, oldest_pending_age between '0' and '1 hour' as young
from fanout.stat_topics where topic like 'control%' order by topic;
begin;
select fanout.publish('control', '1', 'own transaction') is not null as published;
select key, state from state;
rollback;

-- flush cannot be had without a broker, and says so within the time given
select fanout.flush('0');
select fanout.flush('50 ms');
select fanout.verify('50 ms');
select fanout.flush('-1 s');
select fanout.flush('-1 month');
select fanout.flush(null);
select fanout.verify(null);
begin;
set local statement_timeout = '100 ms';
select fanout.flush();
rollback;
begin isolation level serializable read only;
select fanout.flush('1 ms');
commit;

-- pause and resume
select fanout.pause('control');
select fanout.pause('control');
select topic, paused from fanout.topics where topic like 'control%' order by topic;
select topic, paused from fanout.stat_topics where topic like 'control%' order by topic;
select fanout.publish('control', '1', 'paused') is not null as published;
call wait_for_waiting('control', 2);
select item, ok, detail, hint from fanout.check_flow() where item like '%"control"%';
select fanout.resume('control');
select fanout.resume('control');
select topic, paused from fanout.topics where topic like 'control%' order by topic;
select fanout.pause('control_unknown');
select fanout.resume('control_unknown');
select fanout.pause(null);
begin;
select fanout.pause('control');
rollback;
select paused from fanout.topics where topic = 'control';

-- resuming a stalled topic makes it due at once
insert into fanout.stall select topic_id, '2024-01-01 00:00+00', 7, now() + interval '1 hour', '312 NO_ROUTE' from fanout.topic where topic = 'control';
select stalled_since = '2024-01-01 00:00+00' as since, reason, attempts, retry_at > now() + interval '50 min' as later from fanout.stat_topics where topic = 'control';
select item, ok, detail ~ 'NO_ROUTE' as says_why, hint ~ 'resume' as says_how from fanout.check_flow() where item like '%"control" flows%';
select fanout.resume('control');
select attempts, retry_at <= clock_timestamp() as due from fanout.stat_topics where topic = 'control';
delete from fanout.stall;

-- dead letters and held messages are seen
select put_dead(n, 'control') from generate_series(1, 3) n;
select put_dead(4, 'control_2');
select put_held(5, 'control');
select put_held(6, 'control_2');
select * from state;
select topic, held, dead, oldest_pending_age > '1 year' as old from fanout.stat_topics where topic like 'control%' order by topic;
select item, ok, detail, hint from fanout.check_flow() where item like '%"control%' order by 1;

-- redrive: one, then those of a topic, then all
select fanout.redrive(message_id => uuid(99));
select fanout.redrive('control_2', uuid(1));
select fanout.redrive(message_id => uuid(1));
select * from state;
select fanout.redrive('control');
select fanout.redrive();
select fanout.redrive();
select fanout.redrive('control_unknown');
select * from state;
-- under their own ids, with everything that belongs to them
select id, message_id, type, key, headers, payload, xid, created_at at time zone 'UTC' as created_at from fanout.held where id = -1;
-- of a topic that is gone nothing can be tried again
select put_dead(7, 'control_gone');
select fanout.redrive(message_id => uuid(7));
select fanout.redrive('control_gone');
select put_dead(8, 'control_gone');
select fanout.redrive();
select item, ok, detail, hint from fanout.check_flow() where item like '%"control_gone%';
-- nor does it keep others
select fanout.redrive('control');
select fanout.purge('control_gone', uuid(8));

-- purge: dead letters, or held ones
select put_dead(n, 'control') from generate_series(11, 13) n;
select fanout.purge('control', uuid(7));
select fanout.purge(message_id => uuid(7));
select fanout.purge('control', uuid(11));
select fanout.purge('control_2');
select fanout.purge('control');
select fanout.purge();
select count(*) as dead from state where state = 'dead';
select fanout.purge('control', held => true, message_id => uuid(5));
select fanout.purge('control', held => true);
select fanout.purge('control_unknown', held => true);
select fanout.purge(held => true);
select key, state from state;
begin;
select put_dead(21, 'control');
select fanout.purge('control');
rollback;

-- all of it is undone by a rollback
select put_dead(31, 'control');
begin;
select fanout.redrive('control');
select state from state where id = -31;
rollback;
select state from state where id = -31;
select fanout.purge('control');

-- the columns of the views are part of the interface
select c.relname as view, string_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod), ', ' order by a.attnum) as columns
from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
where c.relnamespace = 'fanout'::regnamespace and c.relkind = 'v' and obj_description(c.oid, 'pg_class') not like 'internal:%' or c.oid = 'fanout.dead_letter'::regclass
group by c.relname order by c.relname \x\g\x
-- and so are the functions that have no "internal" in their comments
select p.oid::regprocedure as function, pg_get_function_arguments(p.oid) as arguments, pg_get_function_result(p.oid) as result
from pg_proc p
where pronamespace = 'fanout'::regnamespace and obj_description(p.oid, 'pg_proc') not like 'internal:%'
order by p.proname \x\g\x

-- the publisher has been started, and says what it waits for
create function eventually(condition text) returns boolean language plpgsql as $$
declare result boolean;
begin
    for i in 1..300 loop
        execute 'select ' || condition into result;
        exit when result;
        perform pg_sleep(0.02);
    end loop;
    return result;
end $$;
select eventually($$exists (select from fanout.stat_publisher where last_error is not null)$$);
select pid is not null as running, state in ('connecting', 'disconnected') as away, since is not null as since, connected_to, connected_at,
       in_flight, published, confirmed, returned, nacked, dead, reconnects, last_error ~ '127.0.0.1' as error, last_error ~ 'guest' as secret,
       last_error_at is not null as error_at
from fanout.stat_publisher;
select backend_type, datname = current_database() as here from pg_stat_activity where pid = (select pid from fanout.stat_publisher);

-- check(): what is wrong and what to do, for somebody who may only look
create role fanout_looker in role pg_monitor;
create table captured (id int primary key);
create table keyless (id int);
create table orphan (id int primary key);
select fanout.capture('captured', 'control');
select fanout.capture('keyless', 'control');
create trigger orphan after insert on orphan for each row execute function fanout.capture_trigger('control_gone');
alter table captured disable trigger pg_fanout_row_control;
set role fanout_looker;
select regexp_replace(item, ' role .*', ' role <role>') as item, ok,
       case when item = 'publisher running' then regexp_replace(detail, '\d+', '<pid>')
            when item = 'broker connected' then detail ~ '127.0.0.1' || ''
            when item = 'broker accepts messages' then detail ~ 'publisher is (connecting|disconnected)' || ''
            when item = 'versions match' then regexp_replace(detail, '\d+\.\d+(\.\d+)?\w*', '<version>', 'g')
            else detail end as detail, hint
from fanout.check()
where item !~ '"' or item ~ '"control'
order by item collate "C";
reset role;
drop role fanout_looker;

set client_min_messages = warning;
drop schema control cascade;
