-- a change and its message share one fate
set client_min_messages = warning;
create extension if not exists pg_fanout;
reset client_min_messages;
\set SHOW_CONTEXT never
create schema capture_transaction;
set search_path = capture_transaction;

create table seen (id bigint);
create function messages(out type text, out key text, out before json, out after json)
returns setof record language sql volatile as $$
    with new as (
        select o.*, t.topic from fanout.outbox o join fanout.topic t using (topic_id)
        where t.topic = 'capture_transaction' and not exists (select from seen s where s.id = o.id)
    ), now_seen as (
        insert into seen select id from new
    )
    select type, key, payload::json -> 'before', payload::json -> 'after'
    from new order by id
$$;
select fanout.declare_topic('capture_transaction');

create table account (id int primary key, balance int check (balance >= 0));
create table owner (id int primary key, account int references account on delete cascade on update cascade deferrable initially immediate);
select fanout.capture('account', 'capture_transaction');
select fanout.capture('owner', 'capture_transaction');

-- rolled back; failed
begin;
insert into account values (1, 1);
rollback;
insert into account values (2, 1), (3, -1);
insert into account select g, 4 - g from generate_series(1, 9) g;
select * from messages();

-- savepoints: what was rolled back to them is not there
begin;
insert into account values (1, 1);
savepoint a;
update account set balance = 2;
savepoint b;
update account set balance = 3;
release b;
rollback to a;
update account set balance = 4;
savepoint c;
update account set balance = 5;
release c;
commit;
select * from messages();
-- all of it under one top-level transaction id
select count(distinct xid) as xids, count(distinct payload::json -> 'source' ->> 'txId') as tx_ids,
       bool_and(xid::text = payload::json -> 'source' ->> 'txId') as same
from fanout.outbox o join fanout.topic t using (topic_id) where topic = 'capture_transaction';

-- exceptions in PL/pgSQL are savepoints
do $$ begin
    insert into account values (2, 2);
    begin
        insert into account values (3, 3);
        insert into account values (4, -4);
    exception when check_violation then
        insert into account values (5, 5);
    end;
end $$;
select key from messages();

-- transactions within a procedure
create procedure two_transactions() language plpgsql as $$
begin
    insert into account values (6, 6);
    commit;
    insert into account values (7, 7);
    rollback;
    insert into account values (8, 8);
end $$;
call two_transactions();
select key from messages();

-- cascades of foreign keys
insert into owner values (1, 1), (2, 2), (3, 2);
update account set id = 20 where id = 2;
delete from account where id = 20;
select * from messages();

-- deferred constraints that are violated at commit leave nothing
begin;
set constraints all deferred;
insert into owner values (9, 99);
update account set balance = 0;
select count(*) > 0 as written from fanout.outbox where xid = pg_current_xact_id();
commit;
select count(*) as left_behind from messages();
-- and kept ones all of it
begin;
set constraints all deferred;
insert into owner values (9, 99);
insert into account values (99, 99);
commit;
select type, key from messages();

-- messages of a deferred constraint trigger, written while the transaction commits
create function late() returns trigger language plpgsql as $$
begin
    if new.balance = 1000 then
        insert into account values (1000 + new.id, 0);
    end if;
    return null;
end $$;
create constraint trigger late after insert on account deferrable initially deferred for each row execute function late();
begin;
insert into account values (50, 1000);
insert into account values (51, 0);
commit;
select key from messages();
drop trigger late on account;

-- a statement's rows are written together when it ends: in order, many, large ones among them
create table page (id int primary key, body text);
select fanout.capture('page', 'capture_transaction');
begin;
insert into page select g, repeat('x', case when g % 50 = 0 then 5000 else 5 end) from generate_series(1, 400) g;
select count(*) as rows, count(distinct id) as ids, bool_and(key::int = n) as in_order,
       bool_and(length(payload::json -> 'after' ->> 'body') = case when n % 50 = 0 then 5000 else 5 end) as whole
from (select *, row_number() over (order by id) as n from fanout.outbox where xid = pg_current_xact_id()) o;
-- by the index, which has to know of each of them
set local enable_seqscan = off;
select count(*) from fanout.outbox where xid = pg_current_xact_id();
rollback;
-- what COPY wrote is there for the next statement, too
begin;
copy page from stdin;
1	one
2	two
\.
select count(*) from fanout.outbox where xid = pg_current_xact_id();
rollback;

-- subtransactions of another trigger, in the middle of a statement: kept, failed, and what the statement itself wrote
create table audit (id int primary key);
select fanout.capture('audit', 'capture_transaction');
create function audit() returns trigger language plpgsql as $$
begin
    insert into audit values (new.id + 1000);
    if (new.id + 1000) % 3 = 0 then
        raise 'no';
    end if;
    return null;
exception when raise_exception then
    return null;
end $$;
create trigger zz_audit after insert on page for each row execute function audit();
begin;
insert into page select g from generate_series(1, 6) g;
select string_agg(key, ' ' order by id) from fanout.outbox where xid = pg_current_xact_id();
commit;
select key from messages();
-- the statement itself fails when some of it was written and some was not
do $$ begin
    insert into page select g from generate_series(1001, 1300) g;
    begin
        insert into page select g from generate_series(2001, 2300) g union all select 1001;
    exception when unique_violation then
        null;
    end;
    begin
        insert into page select g from generate_series(3001, 3300) g;
        raise 'no';
    exception when raise_exception then
        null;
    end;
end $$;
select type, count(*), min(key::int), max(key::int) from messages() group by type order by type;
drop table page, audit;

-- two-phase commit
begin;
insert into account values (60, 60);
prepare transaction 'capture_transaction_1';
select key from messages();
commit prepared 'capture_transaction_1';
select key from messages();
begin;
insert into account values (61, 61);
prepare transaction 'capture_transaction_2';
rollback prepared 'capture_transaction_2';
select key from messages();

-- every isolation level
begin isolation level repeatable read;
insert into account values (70, 70);
commit;
begin isolation level serializable;
insert into account values (71, 71);
commit;
select key from messages();

-- replicated changes are another node's messages, unless somebody asks for them
set session_replication_role = replica;
insert into account values (80, 80);
reset session_replication_role;
select key from messages();
alter table account enable always trigger pg_fanout_row_capture_transaction;
set session_replication_role = replica;
insert into account values (81, 81);
reset session_replication_role;
select key from messages();
-- and disabled is seen to be disabled
alter table account disable trigger pg_fanout_row_capture_transaction;
insert into account values (82, 82);
select key from messages();
select entity, enabled from fanout.captures where topic = 'capture_transaction' order by entity::text;
alter table account enable trigger pg_fanout_row_capture_transaction;

-- capturing is transactional, too
begin;
create table fresh (id int primary key);
select fanout.declare_topic('capture_transaction_fresh');
select fanout.capture('fresh', 'capture_transaction_fresh');
insert into fresh values (1);
select key, payload::json ->> 'after' as after from fanout.outbox where xid = pg_current_xact_id();
rollback;
begin;
select fanout.uncapture('owner');
insert into owner values (100, 1);
rollback;
insert into owner values (101, 1);
select type, key from messages();

-- a read-only transaction reads
begin read only;
select count(*) > 0 as readable from fanout.captures where topic = 'capture_transaction';
insert into account values (90, 90);
rollback;

-- values of the times: the statement's for the message, the transaction's for its source
begin;
insert into account values (91, 91);
select pg_sleep(0.01);
insert into account values (92, 92);
select count(distinct created_at) as created, count(distinct payload::json ->> 'ts_ms') as ts,
       count(distinct payload::json -> 'source' ->> 'ts_ms') as source_ts,
       bool_and((payload::json -> 'source' ->> 'ts_ms')::bigint = trunc(extract(epoch from now()) * 1000)) as is_now
from fanout.outbox where xid = pg_current_xact_id();
rollback;

set client_min_messages = warning;
drop schema capture_transaction cascade;
