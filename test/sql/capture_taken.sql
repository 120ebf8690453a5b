-- A key that is unique only in the end may have two rows for a while: the message of the
-- row that leaves it says so, and another one tells of the row that has it
set client_min_messages = warning;
create extension if not exists pg_fanout;
\set SHOW_CONTEXT never
create schema capture_taken;
set search_path = capture_taken;

create table seen (id bigint);
create function messages(out op text, out key text, out old_key text, out taken text, out "row" text, out type text)
returns setof record language sql volatile as $$
    with new as (
        select o.*, t.format from fanout.outbox o join fanout.topic t using (topic_id)
        where t.topic ~ '^taken' and not exists (select from seen s where s.id = o.id)
    ), now_seen as (
        insert into seen select id from new
    )
    select headers ->> 'op', key, headers ->> 'old_key', headers ->> 'taken',
           case format when 'row' then payload when 'cloudevents' then payload::json ->> 'data'
               else coalesce(payload::json ->> 'after', payload::json ->> 'before') end, type
    from new order by id
$$;
select count(fanout.declare_topic(topic, format))
from (values ('taken', 'row'), ('taken_debezium', 'debezium'), ('taken_cloudevents', 'cloudevents')) t (topic, format);

create table item (id int primary key deferrable initially deferred, x text);
select fanout.capture('item', 'taken');
insert into item values (1, 'one'), (2, 'two'), (5, 'old');
select * from messages();

-- a row comes to a key that another one leaves, by DELETE and by UPDATE
begin; insert into item values (5, 'new'); delete from item where x = 'old'; commit;
begin; insert into item values (5, 'newer'); update item set id = 6 where x = 'new'; commit;
select op, key, old_key, taken, "row" from messages();
-- the new one goes instead, and the row that was there before stays
begin; insert into item values (5, 'guest'); delete from item where x = 'guest'; commit;
begin; insert into item values (5, 'guest'); update item set id = 9 where x = 'guest'; commit;
select op, key, old_key, taken, "row" from messages();
-- keys that change places, and a chain, in one statement
update item set id = 3 - id where id < 3;
update item set id = id + 1;
select op, key, old_key, taken, "row" from messages();
-- the key is free: it is left before it is taken, or the other row has gone, too
begin; delete from item where id = 6; insert into item values (6, 'later'); commit;
begin; insert into item values (6, 'guest'); delete from item where id = 6; insert into item values (6, 'last'); commit;
update item set x = x || '!' where id = 6;
delete from item where id = 10;
select op, key, old_key, taken, "row" from messages();
-- three rows at one key
begin;
insert into item values (6, 'second'), (6, 'third');
delete from item where x = 'second';
update item set x = 'first' where x = 'last!';
update item set id = 11 where x = 'third';
commit;
select op, key, old_key, taken, "row" from messages();
-- what is rolled back leaves nothing
begin;
insert into item values (6, 'guest');
savepoint s;
delete from item where x = 'first';
rollback to s;
delete from item where x = 'guest';
commit;
begin; insert into item values (6, 'guest'); delete from item where x = 'first'; rollback;
select op, key, old_key, taken, "row" from messages();
-- a row moves away and back again
begin; insert into item values (6, 'guest'); update item set id = 60 where x = 'first'; update item set id = 6 where x = 'first'; delete from item where x = 'guest'; commit;
select op, key, old_key, taken, "row" from messages();
-- in one statement that does both
with gone as (delete from item where id = 6 returning id) insert into item select id, 'in its place' from gone;
select op, key, old_key, taken, "row" from messages();
-- nothing is captured
set session_replication_role = replica;
begin; insert into item values (6, 'guest'); delete from item where x = 'guest'; commit;
reset session_replication_role;
select count(*) from messages();

-- the other formats; operations that are not captured; columns
select fanout.capture('item', 'taken_debezium', '{delete}'), fanout.capture('item', 'taken_cloudevents', '{insert,update}', exclude => '{x}');
select fanout.uncapture('item', 'taken');
begin; insert into item values (6, 'guest'); delete from item where x = 'in its place'; commit;
update item set id = 8 - id where id in (2, 6);
select * from messages();
select distinct o.payload::jsonb - 'id' - 'time' from fanout.outbox o join fanout.topic using (topic_id)
where topic = 'taken_cloudevents' and o.type ~ 'read$' order by 1;
select fanout.uncapture('item');
-- by a role that can do nothing but write the table
create role taken_writer;
grant usage on schema capture_taken to taken_writer;
grant select, insert, update, delete on item to taken_writer;
alter table item enable row level security;
create policy readable on item to taken_writer using (x <> 'hidden') with check (true);
select fanout.capture('item', 'taken');
set role taken_writer;
begin; insert into item values (2, 'hidden'); delete from item where x = 'guest'; commit;
reset role;
select op, key, taken, "row" from messages();
drop table item;
drop owned by taken_writer;
drop role taken_writer;

-- "where": a row that it does not choose has no key for consumers
create table chosen (no int, id int not null unique deferrable, status text, price int);
select fanout.capture('chosen', 'taken', key => '{id}', columns => '{no,status}', "where" => 'status = ''on'' or price = 1');
insert into chosen values (1, 1, 'on'), (2, 2, 'on'), (3, 3, null);
update chosen set id = 3 - id where id < 3;
select op, key, old_key, taken, "row" from messages();
update chosen set id = case id when 1 then 3 when 2 then 1 else 2 end;
select op, key, old_key, taken, "row" from messages();
-- a row leaves the filter, and another one is at its key
begin;
set constraints all deferred;
insert into chosen values (4, 1, 'on');
update chosen set status = null where no = 1;
update chosen set id = 10 where no = 1;
commit;
select op, key, old_key, taken, "row" from messages();
begin;
set constraints all deferred;
insert into chosen values (5, 1, null, 2);
update chosen set status = null where no = 4;
delete from chosen where no = 4;
commit;
select op, key, old_key, taken, "row" from messages();
begin;
set constraints all deferred;
insert into chosen values (6, 1, 'off', 1);
delete from chosen where no = 5;
insert into chosen values (7, 1, 'off', 2);
update chosen set id = 20 where no = 6;
commit;
select op, key, old_key, taken, "row" from messages();
-- and a condition on the event
select fanout.capture('chosen', 'taken', key => '{id}', columns => '{no,status}', "where" => 'status = ''on'' or price = 1', "when" => '(old *= new) is not true', replace => true);
update chosen set price = 1, id = case id when 1 then 20 when 20 then 1 else id end;
select op, key, old_key, taken, "row" from messages();
alter table chosen rename price to cost;
begin; set constraints all deferred; insert into chosen values (8, 1, null, 2), (9, 10, null, 1); delete from chosen where no in (6, 1); delete from chosen where no = 8; commit;
select op, key, old_key, taken, "row" from messages();
drop table chosen;

-- a key of several columns that has NULLs, and is no longer than its index
create table pair (a int, b int, c text collate "C", x int, unique (a, c) deferrable);
select fanout.capture('pair', 'taken', key => '{c,b,a}');
insert into pair values (1, 1, 'a', 1), (1, 1, 'b', 2), (null, 1, 'a', 3), (null, 1, 'a', 4);
select count(*) from messages();
update pair set c = case c when 'a' then 'b' else 'a' end where a = 1;
update pair set c = case c when 'a' then 'b' else 'a' end, b = x where a = 1;
delete from pair where x = 3;
select op, key, old_key, taken, "row" from messages();
drop table pair;
-- keys that are equal and look different are two
create table number (n numeric primary key deferrable initially deferred, x int);
select fanout.capture('number', 'taken');
insert into number values (1.0, 1), (2, 2);
begin; insert into number values (1.00, 3); delete from number where x = 1; commit;
begin; insert into number values (1.00, 4); delete from number where x = 3; commit;
select op, key, old_key, taken, "row" from messages();
drop table number;
-- a key that is unique by an index that is not deferrable, too, or by none
create table twice (id int primary key deferrable, x int);
create unique index on twice (id);
create table never (id int, x int);
create table partly (id int, x int);
create unique index on partly (id) where x = 1;
select fanout.capture(t::regclass, 'taken', key => '{id}') from unnest('{twice,never,partly}'::text[]) t;
insert into twice values (1, 1), (2, 2);
insert into never values (1, 1), (1, 2);
insert into partly values (1, 1), (1, 2);
delete from never where x = 1;
delete from partly where x = 1;
update twice set id = id + 2 where id = 2;
select op, key, old_key, taken, "row" from messages();
-- it is one as soon as it is the only one
drop index twice_id_idx;
update twice set id = 5 - id;
select op, key, old_key, taken, "row" from messages();
drop table twice, never, partly;

-- partitions: a row that moves is deleted and inserted
create table parted (x int, id int, a int, primary key (a, id) deferrable initially deferred) partition by list (a);
create table parted_1 partition of parted for values in (1);
create table parted_2 (id int, gone int, a int, x int, constraint k primary key (id, a) deferrable initially deferred);
alter table parted_2 drop gone, alter id set not null;
alter table parted_2 drop constraint k;
alter table parted attach partition parted_2 for values in (2);
select fanout.capture('parted', 'taken', "where" => 'x > 0');
insert into parted values (1, 1, 1), (2, 2, 1), (3, 1, 2), (-4, 2, 2);
update parted set id = 3 - id;
select op, key, old_key, taken, "row" from messages();
update parted set a = 3 - a;
select op, key, old_key, taken, "row" from messages();
begin; insert into parted values (5, 2, 1); delete from parted where x = 3; insert into parted values (6, 9, 2); update parted set a = 1, id = 2 where x = 6; delete from parted where x = 5; commit;
select op, key, old_key, taken, "row" from messages();
drop table parted;

-- large rows
create table large (id int primary key deferrable, x text);
alter table large alter x set storage external;
select fanout.capture('large', 'taken');
insert into large select i, repeat(i::text, 200000) from generate_series(1, 2) i;
update large set id = 3 - id;
select op, key, old_key, taken, length("row") from messages();
drop table large;

-- the header is pg_fanout's own
select fanout.publish('taken', '{}', headers => '{"taken": true}');

-- whatever is done: of each key the message with the highest id is the row's last state
create sequence numbers;
create function random_key() returns int language sql as 'select 1 + floor(random() * 7)::int';
create table plain (a int default 1, id int primary key deferrable initially deferred, no int default nextval('numbers'), x int);
create table parts (id int, no int default nextval('numbers'), x int, a int default 1 + floor(random() * 2)::int, primary key (id, a) deferrable initially deferred) partition by list (a);
create table parts_1 partition of parts for values in (1);
create table parts_2 partition of parts for values in (2);
create table filtered (a int default 1, no int default nextval('numbers') primary key, id int not null unique deferrable, x int);
create table nested (a int default 1, id int primary key deferrable initially deferred, no int default nextval('numbers'), x int);
select count(fanout.declare_topic('last_' || name)) from unnest('{plain,parts,filtered,nested}'::text[]) name;
select fanout.capture('plain', 'last_plain'), fanout.capture('parts', 'last_parts', key => '{a,id}'), fanout.capture('nested', 'last_nested'),
    fanout.capture('filtered', 'last_filtered', key => '{id}', "where" => 'x % 3 <> 0', "when" => '(old *= new) is not true');
-- rows of the same table change before and after the outer statement's messages are written
create function change_another() returns trigger language plpgsql as $$
begin
    if pg_trigger_depth() < 3 and random() < 0.5 then
        case floor(random() * 3)::int
            when 0 then update nested set id = random_key() where no = (select no from nested order by random() limit 1);
            when 1 then insert into nested (id, x) values (coalesce(old.id, random_key()), 100);
            else delete from nested where id = coalesce(old.id, 0);
        end case;
    end if;
    return null;
end $$;
create trigger a_first after insert or update or delete on nested for each row execute function change_another();
create trigger z_last after insert or update or delete on nested for each row execute function change_another();
create trigger before_all before update on nested for each row when (new.x > 60) execute function suppress_redundant_updates_trigger();

create function change(name text) returns void language plpgsql as $$
declare
    some_row text := format('no = (select no from %I order by random() limit 1)', name);
begin
    execute case floor(random() * 12)::int
        when 0 then format('insert into %I (id, x) values (%s, %s)', name, random_key(), random_key())
        when 1 then format('insert into %I (id, x) select id, random_key() from generate_series(1, 7) id where random() < 0.3', name)
        when 2 then format('delete from %I where %s', name, some_row)
        when 3 then format('update %I set x = x + 1', name)
        when 4 then format('update %I set x = x + 1 where %s', name, some_row)
        when 5 then format('update %I set id = 8 - id', name)
        when 6 then format('update %I set id = id %% 7 + 1', name)
        when 7 then format('update %I set a = 3 - a, x = x + 1 where random() < 0.5', name)
        when 8 then format('with gone as (delete from %1$I where %2$s returning id, a) insert into %1$I (id, a, x) select id, a, 8 from gone', name, some_row)
        when 9 then format('delete from %I where random() < 0.3', name)
        else format('update %I set id = %s, x = %s where %s', name, random_key(), random_key(), some_row)
    end;
end $$;
create function changes(name text) returns void language plpgsql as $$
begin
    for i in 1 .. 1 + random() * 5 loop
        begin
            perform change(name) from generate_series(1, (random() * 2)::int);
            if random() < 0.2 then
                raise assert_failure;
            end if;
        exception when assert_failure then null;
        end;
    end loop;
    -- so that most of it can be committed
    if random() < 0.9 then
        execute format('delete from %1$I r using %1$I other where r.id = other.id and r.a = other.a and r.no <> other.no and r.x * 1000 + r.no < other.x * 1000 + other.no', name);
    end if;
    set constraints all immediate;
    set constraints all deferred;
exception when unique_violation then null;
end $$;
-- the rows that a consumer has
create function copied(name text, out key text, out x int, out no int) returns setof record language sql as $$
    with events as (
        select id, key, payload::jsonb -> 'after' as after from fanout.outbox join fanout.topic using (topic_id) where topic = 'last_' || name
        union all
        select id, headers ->> 'old_key', 'null' from fanout.outbox join fanout.topic using (topic_id) where topic = 'last_' || name and headers ? 'old_key'
    ), last as (
        select distinct on (key) key, after from events order by key, id desc, after = 'null'
    )
    select key, (after ->> 'x')::int, (after ->> 'no')::int from last where after <> 'null'
$$;
create function here(name text, out key text, out x int, out no int) returns setof record language plpgsql as $$
begin
    return query execute format('select case when %L = ''parts'' then jsonb_build_array(a, id)::text else id::text end, x, no from %I', name, name)
        || case when name = 'filtered' then ' where x % 3 <> 0' else '' end;
end $$;
create function differences(name text) returns setof text language sql as $$
    (select 'missing ' || key from (select replace(key, ' ', ''), x, no from here(name) except select * from copied(name)) m (key, x, no))
    union all
    (select 'extra ' || key from (select * from copied(name) except select replace(key, ' ', ''), x, no from here(name)) m)
$$;
select setseed(0.5);
begin;
set constraints all deferred;
do $$
begin
    for i in 1 .. 150 loop
        perform changes(name) from unnest('{plain,parts,filtered,nested}'::text[]) name;
        if i % 10 = 0 and exists (select differences(name) from unnest('{plain,parts,filtered,nested}'::text[]) name) then
            raise exception 'after % rounds: %', i, (select array_agg(name || ' ' || difference) from unnest('{plain,parts,filtered,nested}'::text[]) name, differences(name) difference);
        end if;
    end loop;
end $$;
commit;
select name, count(*) > 100 as many, count(*) filter (where headers ? 'taken') > 20 as taken, (select count(*) from differences(name)) as differences
from unnest('{plain,parts,filtered,nested}'::text[]) name join fanout.topic on topic = 'last_' || name join fanout.outbox using (topic_id)
group by name order by name;

set client_min_messages = warning;
drop schema capture_taken cascade;
