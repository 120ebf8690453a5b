-- Triggers and functions that change captured tables inside a statement: of each
-- key, the message with the highest id is the row's last state
set client_min_messages = warning;
create extension if not exists pg_fanout;
\set SHOW_CONTEXT never
create schema nested_order;
set search_path = nested_order;
select fanout.declare_topic('nested_order');

create table node (id int primary key, a text);
select fanout.capture('node', 'nested_order', old_row => true);

-- What happened to each key, in order of the ids; a key that changes is left by
-- one row and taken by another.
create function history(topic text) returns table (id bigint, key text, before jsonb, after jsonb, previous jsonb,
                                                    last boolean, truncated boolean)
language sql as $$
    with messages as (
        select o.id, o.key, o.headers ->> 'op' as op, o.headers ->> 'old_key' as old_key,
               nullif(o.payload::jsonb -> 'before', 'null') as before, nullif(o.payload::jsonb -> 'after', 'null') as after
        from fanout.outbox o join fanout.topic t using (topic_id) where t.topic = history.topic
    ), keys as (
        select distinct key from messages where key is not null
    ), events as (
        select id, key, case when old_key is null then before end as before, after, false as truncated
        from messages where op <> 't'
        union all
        select id, old_key, before, null, false from messages where old_key is not null
        union all
        select m.id, k.key, null, null, true from messages m, keys k where m.op = 't'
    )
    select id, key, before, after, lag(after) over (partition by key order by id),
           row_number() over (partition by key order by id desc) = 1, truncated
    from events
$$;
-- keys whose last message is not the row, and messages that do not follow from the one before
create function wrong(topic text, entity regclass, out last_states bigint, out gaps bigint) language plpgsql as $$
begin
    execute format('select count(*) filter (where (h.key is null or h.last) and h.after is distinct from to_jsonb(r)),
                           count(*) filter (where not truncated and previous is distinct from before)
                    from history(%L) h full join %s r on r.%I::text = h.key',
                   topic, entity, (select key[1] from fanout.captures c where c.entity = wrong.entity)) into last_states, gaps;
end $$;
create function story(out story text) returns setof text language sql as $$
    select concat_ws(' ', key, coalesce(before ->> 'a', '-'), '->', coalesce(after ->> 'a', '-'))
    from history('nested_order') order by id, after is not null
$$;

-- the trigger of a row changes the row itself, before and after ours in order of names
create function change_again() returns trigger language plpgsql as $$
begin
    if pg_trigger_depth() < 3 then
        update node set a = a || tg_argv[0] where id = new.id;
    end if;
    return null;
end $$;
create trigger a_first after insert or update on node for each row execute function change_again('a');
insert into node values (1, 'x');
update node set a = 'y' where id = 1;
select story();
create trigger z_last after insert or update on node for each row execute function change_again('z');
insert into node values (2, 'x');
update node set a = 'w';
select wrong('nested_order', 'node');
drop trigger a_first on node;
drop trigger z_last on node;

-- one default of many: another row of the statement
create function only_one() returns trigger language plpgsql as $$
begin
    if new.a = 'default' then
        update node set a = 'other' where id <> new.id and a = 'default';
    end if;
    return null;
end $$;
create trigger zz_only_one after insert or update on node for each row execute function only_one();
insert into node values (11, 'default'), (12, 'default');
update node set a = 'default';
select wrong('nested_order', 'node');
drop trigger zz_only_one on node;

-- away with a key and back with it, in both orders
create function come_back() returns trigger language plpgsql as $$
begin
    if pg_trigger_depth() = 1 then
        insert into node values (old.id, 'back');
    end if;
    return null;
end $$;
create trigger a_back after delete on node for each row execute function come_back();
delete from node where id = 11;
drop trigger a_back on node;
create function make_room() returns trigger language plpgsql as $$
begin
    delete from node where id = new.id;
    return new;
end $$;
create trigger a_room before insert on node for each row execute function make_room();
insert into node values (11, 'in its place'), (12, 'in its place');
drop trigger a_room on node;
create function swap_back() returns trigger language plpgsql as $$
begin
    if pg_trigger_depth() = 1 and old.id <> new.id then
        insert into node values (old.id, 'new in old place');
        update node set id = id + 100 where id = new.id;
    end if;
    return null;
end $$;
create trigger a_swap after update on node for each row execute function swap_back();
update node set id = 13 where id = 11;
drop trigger a_swap on node;
select wrong('nested_order', 'node');

-- functions in expressions, CTEs, COPY, TRUNCATE, MERGE, ON CONFLICT
create function touch(k int) returns int language plpgsql as $$
begin
    update node set a = a || '!' where id = k;
    return k;
end $$;
update node set a = 'touched' where id in (1, 2, 12) and (id = 1 or touch(case id when 2 then 1 else 2 end) is not null);
with d as (delete from node where id = 12 returning *) insert into node select 14, a from d where touch(1) = 1;
insert into node values (1, 'conflict'), (15, 'new') on conflict (id) do update set a = excluded.a || touch(2);
alter table node add column b int default touch(2);
copy node (id, a) from stdin;
21	copied
22	copied
\.
alter table node drop column b;
create function refill() returns trigger language plpgsql as $$
begin
    insert into node values (1, 'refilled'), (31, 'refilled');
    return null;
end $$;
create trigger a_refill after truncate on node for each statement execute function refill();
truncate node;
select * from node order by id;
select last_states from wrong('nested_order', 'node');
drop trigger a_refill on node;

-- subtransactions that are rolled back leave tuple ids for others
create function tries() returns trigger language plpgsql as $$
begin
    if pg_trigger_depth() > 1 then
        return null;
    end if;
    for i in 1 .. 3 loop
        begin
            update node set a = a || 't' where id = new.id;
            insert into node values (40 + i, 'rolled back');
            raise exception 'no' using errcode = 'P0002';
        exception when no_data_found then null;
        end;
    end loop;
    update node set a = a || 'T' where id = new.id;
    return null;
end $$;
create trigger a_tries after insert or update on node for each row execute function tries();
insert into node select i, 'x' from generate_series(50, 60) i;
update node set a = 'y';
select last_states from wrong('nested_order', 'node');
drop trigger a_tries on node;

-- foreign key actions within one table
create table tree (id int primary key, up int references tree on delete set null on update cascade, a text);
select fanout.declare_topic('nested_order_tree');
select fanout.capture('tree', 'nested_order_tree', old_row => true);
create function renew() returns trigger language plpgsql as $$
begin
    if pg_trigger_depth() < 4 then
        update tree set a = coalesce(a, '') || tg_argv[0] where up is null and id <> coalesce(new.id, old.id);
    end if;
    return null;
end $$;
create trigger "A" after update or delete on tree for each row execute function renew('A');
create trigger z after update or delete on tree for each row execute function renew('z');
insert into tree values (1, null), (2, 1), (3, 1), (4, 3);
update tree set id = 10 where id = 1;
delete from tree where id = 10;
delete from tree where id = 3;
select wrong('nested_order_tree', 'tree');

-- a key that is not the primary key
create table email (id int primary key, email text unique, n int);
select fanout.declare_topic('nested_order_email');
select fanout.capture('email', 'nested_order_email', key => '{email}', old_row => true);
create function hand_over() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' then
        insert into email values (old.id + 100, old.email, 0);
    elsif pg_trigger_depth() < 3 then
        update email set n = n + 1 where id = new.id;
    end if;
    return null;
end $$;
create trigger a after update or delete on email for each row execute function hand_over();
insert into email values (1, 'a@b', 0), (2, 'c@d', 0);
delete from email where id = 1;
update email set n = 10;
select wrong('nested_order_email', 'email');

-- Statements that fail in the middle, and are caught by the function that ran
-- them.  Rows from 100 on are those that functions change; outer statements
-- must leave them alone.
create table form (id int primary key, a text);
select fanout.declare_topic('nested_order_form');
select fanout.capture('form', 'nested_order_form', old_row => true);
create function half(k int, depth int) returns int language plpgsql as $$
begin
    begin
        update form set a = left(a, 9) || 'h' where id >= 100 + k and 1 / (id - k - 102) is not null;
    exception when division_by_zero then
        if depth > 0 then
            perform half(k + 1, depth - 1);
        end if;
        update form set a = left(a, 9) || 'c' where id between 100 + k and 101 + k;
    end;
    return k;
end $$;
create function half_again() returns trigger language plpgsql as $$
begin
    if pg_trigger_depth() = 1 then
        begin
            perform half(1, 1);
            update form set a = left(a, 9) || 'n' where id = 1;
            perform 1 / 0;
        exception when division_by_zero then
            perform half(2, 1);
            update form set a = left(a, 9) || 'a' where id = 2;
        end;
    end if;
    return null;
end $$;
insert into form select i, '' from generate_series(1, 9) i union all select i, '' from generate_series(100, 109) i;
update form set a = 'u' where id < 100 and half(id, 2) > 2;
create trigger "A" after update on form for each row execute function half_again();
create trigger z before insert or delete on form for each statement execute function half_again();
update form set a = 'v' where id < 100 and half(id, 1) > 4;
insert into form select i, 'i' from generate_series(10, 12) i;
do $$
begin
    for k in 1 .. 5 loop
        begin
            update form set a = 'w' where id < 100 and half(k, 1) / (id - k - 2) is not null;
        exception when division_by_zero then null;
        end;
        delete from form where id = k + 2 and half(k, 1) = k;
    end loop;
end $$;
select wrong('nested_order_form', 'form');
drop trigger "A" on form;
drop trigger z on form;

-- one that fails leaves nothing for the next one, also if that is so like it that
-- it has the same place in memory
create trigger a_room before insert on node for each row execute function make_room();
do $$
begin
    for i in 1 .. 3 loop
        begin
            insert into node select k, 'fails' from generate_series(70, 72) k where 1 / (72 - k) is not null;
        exception when division_by_zero then null;
        end;
        insert into node select k, 'is in its place' from generate_series(70, 72) k where 1 / (73 - k) is not null;
    end loop;
end $$;
insert into node select k, 'fails' from generate_series(70, 72) k where 1 / (72 - k) is not null;
insert into node select k, 'is in its place' from generate_series(70, 72) k where 1 / (73 - k) is not null;
begin;
savepoint a;
insert into node select k, 'fails' from generate_series(70, 72) k where 1 / (72 - k) is not null;
rollback to a;
insert into node select k, 'is in its place' from generate_series(70, 72) k where 1 / (73 - k) is not null;
commit;
select last_states from wrong('nested_order', 'node');
drop trigger a_room on node;

-- statements of all forms, run in parts and in the middle of others
create function grow(k int) returns int language plpgsql as $$
begin
    update form set a = left(a, 9) || '+' where id >= 100 + k;
    return k;
end $$;
create function grow_all() returns setof int language sql as $$
    update form set a = left(a, 9) || 's' where id < 100 and grow(id) = id;
    select grow(id) from form where id < 100 order by id;
$$;
create function grow_and_return() returns setof int language sql as $$
    update form set a = left(a, 9) || 'r' where id between 9 and 99 returning grow(id - 8)
$$;
begin;
declare c cursor for select id, grow(id) from form where id < 100 order by id;
fetch 2 from c;
savepoint a;
update form set a = 'in between' where id < 100 and grow(id) = 7;
fetch 1 from c;
rollback to a;
update form set a = 'after all' where id < 100 and grow(id) = 8;
fetch all from c;
declare d cursor for select * from form where id < 100 for update;
fetch 1 from d;
update form set a = 'current ' || grow(id - 5) where current of d;
commit;
select count(*) from grow_all();
select grow_all() limit 2;
select count(*) from generate_series(1, 2), grow_and_return();
do $$
declare r record;
begin
    for r in update form set a = 'loop' where id between 9 and 99 returning id, grow(id - 8) loop
        update form set a = left(a, 9) || 'l' where id = r.id;
    end loop;
    execute 'explain (analyze, costs off, timing off, summary off) update form set a = ''x'' where id < 100 and grow(id) > 7';
    execute 'explain update form set a = ''not this'' where grow(id) > 7';
end $$;
prepare p (int) as with u as (update form set a = left(a, 9) || 'p' where id between $1 and 99 and grow(id) > 0 returning id) select count(*) from u;
execute p(7);
execute p(10);
create table grown as select grow(id) from form where id < 100;
select wrong('nested_order_form', 'form');

-- TRUNCATE by triggers of another table
create table other (id int primary key, a text);
select fanout.declare_topic('nested_order_other');
select fanout.capture('other', 'nested_order_other', old_row => true);
create function start_again() returns trigger language plpgsql as $$
begin
    if new.id % 4 = 0 then
        truncate other;
    end if;
    insert into other values (new.id, tg_when) on conflict (id) do update set a = other.a || '!';
    return new;
end $$;
create trigger b before update on form for each row when (new.id < 100) execute function start_again();
create trigger y after update on form for each row when (new.id < 100) execute function start_again();
insert into other values (1, ''), (9, '');
update form set a = 'y' where id < 100;
truncate other;
update form set a = 'z' where id between 9 and 99;
select * from other order by id;
select wrong('nested_order_other', 'other');
select wrong('nested_order_form', 'form');

-- rows that move to another partition, where a trigger deletes what has the same id
create table place (part int primary key);
insert into place values (0), (2);
create table moving (id int, part int references place on update cascade, a text) partition by list (part);
create table moving_0 partition of moving for values in (0);
create table moving_1 partition of moving for values in (1);
create table moving_2 partition of moving for values in (2);
create function make_place() returns trigger language plpgsql as $$
begin
    delete from moving where id = new.id;
    return new;
end $$;
create trigger b before insert on moving_1 for each row execute function make_place();
select fanout.declare_topic('nested_order_moving');
select fanout.capture('moving', 'nested_order_moving', key => '{id}');
insert into moving select i, 0, 'moved' from generate_series(1, 9) i union all select i, 2, 'deleted' from generate_series(6, 9) i;
update place set part = 1 where part = 0;
select count(*) from moving;
select last_states from wrong('nested_order_moving', 'moving');
-- with a condition, and moved by the statement itself
select fanout.capture('moving', 'nested_order_moving', key => '{id}', "when" => 'new.a is distinct from ''''', replace => true);
insert into moving select i, 2, 'deleted' from generate_series(6, 9) i;
insert into place values (0);
update moving set part = 0 where part = 1;
update moving set part = 1 where part = 0;
select count(*) from moving;
select last_states from wrong('nested_order_moving', 'moving');

-- whoever may write to a table needs no other right but the one that all have
create role fanout_nested_order;
grant usage on schema nested_order to fanout_nested_order;
grant all on form, other to fanout_nested_order;
set role fanout_nested_order;
update form set a = grow(id) where id between 11 and 99;
reset role;
select wrong('nested_order_form', 'form');
revoke execute on function fanout.count_change() from public;
set role fanout_nested_order;
delete from other;
reset role;
select ok, detail, hint from fanout.check_captures() where item ~ 'nested_order.other';
grant execute on function fanout.count_change() to public;
select ok, detail from fanout.check_captures() where item ~ 'nested_order.other';
drop owned by fanout_nested_order;
drop role fanout_nested_order;

-- no id is drawn that no message takes where nothing is nested
create table calm (id int primary key, a int);
select fanout.declare_topic('nested_order_calm');
select fanout.capture('calm', 'nested_order_calm');
begin;
insert into calm select i, 0 from generate_series(1, 100) i;
update calm set a = 1;
update calm set a = 2;
create function many() returns void language plpgsql as $$
begin
    for i in 1 .. 100 loop update calm set a = a + 1 where id = 1; end loop;
end $$;
select many();
commit;
select count(*), max(o.id) - min(o.id) + 1 as ids from fanout.outbox o join fanout.topic t using (topic_id) where t.topic = 'nested_order_calm';
-- nor where something is
create function calm_again() returns trigger language plpgsql as $$
begin
    update calm set a = a + 1 where id between new.id and new.id + 1 and pg_trigger_depth() < 3;
    return null;
end $$;
create trigger z after update on calm for each row execute function calm_again();
update calm set a = 3 where id < 20;
select count(*) > 100 as many, max(o.id) - min(o.id) + 1 - count(*) as unused from fanout.outbox o join fanout.topic t using (topic_id) where t.topic = 'nested_order_calm';

-- nothing counts but what captures queue
select fanout.count_change();
update calm set a = 4 where fanout.count_change();
create function wrapped() returns boolean language sql as $$ select fanout.count_change() $$;
create trigger a after update on calm for each row when (wrapped()) execute function calm_again();
update calm set a = 4;
drop trigger a on calm;
create trigger a after update on calm for each row when (new.a < 0 or not fanout.count_change()) execute function calm_again();
create schema nested_order_2 create table t (id int) create trigger a after insert on t for each row when (fanout.count_change()) execute function calm_again();
create trigger by_hand after insert on calm for each row when (fanout.count_change() and new.a > 0) execute function fanout.capture_trigger('nested_order_calm');
create trigger by_hand after insert on calm for each row when (new.a < 0 or fanout.count_change()) execute function fanout.capture_trigger('nested_order_calm');
create trigger by_hand after insert on calm for each row when (new.a < 0 and fanout.count_change()) execute function fanout.capture_trigger('nested_order_calm');
drop trigger by_hand on calm;
