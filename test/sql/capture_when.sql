-- "when": any condition over OLD and NEW, for all operations of a capture alike
set client_min_messages = warning;
create extension if not exists pg_fanout;
\set SHOW_CONTEXT never
create schema capture_when;
set search_path = capture_when;

create table seen (id bigint);
create function messages(out op text, out before json, out after json)
returns setof record language sql volatile as $$
    with new as (
        select o.*, t.topic from fanout.outbox o join fanout.topic t using (topic_id)
        where t.topic = 'capture_when' and not exists (select from seen s where s.id = o.id)
    ), now_seen as (
        insert into seen select id from new
    )
    select headers ->> 'op', payload::json -> 'before', payload::json -> 'after'
    from new order by id
$$;
-- what a condition makes of three changes of a row: its price rises, falls, it goes
create function try(condition text) returns setof text language plpgsql as $$
begin
    perform fanout.uncapture('item');
    truncate item;
    perform fanout.capture('item', 'capture_when', "when" => condition, old_row => true);
    insert into item values (1, 10, null);
    update item set price = 20;
    update item set price = 5, note = 'sale';
    delete from item;
    return query select concat_ws(' ', op, before ->> 'price', '->', after ->> 'price') from messages();
end $$;
select fanout.declare_topic('capture_when');
create table item (id int primary key, price int, note text);

select try('true');
select try('false');
select try('null');
-- a row that the operation does not have is all NULL
select try('new.price > 8');
select try('old.price > 8');
select try('new.price > old.price');
select try('new.price is distinct from old.price');
select try('old.price is null');
select try('new.id is null');
select try('coalesce(new.price, old.price) = 5');
-- whole rows
select try('old is distinct from new');
select try('old.* is distinct from new.*');
select try('old is null');
select try('new is not distinct from null');
-- written in other ways
select try('OLD.price < 8 or New . price < 8');
select try('"old"."price" < 8 or "new" . "price" < 8');
select try(e'new.price > 8 -- comment: old.price');
select try(e'new.price /* old.x */ > /* new.* */ 8\n');
select try('''old.price'' = ''new.price'' or new.price = 20');
select try('(new).price = 20 or (old).price = 20');
select try('new . * is distinct from old . *');
-- references in an order that is not the one in which they are evaluated
select try('position(old.note in old.note) > 0 or position(new.note in new.note) > 0');
select try('case when new.price = 20 then old.price = 10 when old.price = 20 then new.note = ''sale'' else new is null end');
select try('new.price between old.price and old.price + 10');
select try('old.price in (new.price - 10, new.price * 4)');
-- a column called old or new is not a row
alter table item add old int, add new int;
select try('new.old is null and new.new is null and new.price = 20');
select fanout.uncapture('item');
alter table item drop old, drop new;

-- functions are found where they are said to be
create function cheap(item) returns boolean language sql immutable as 'select $1.price < 8';
select try('cheap(new)');
select try('capture_when.cheap(new)');
select try('capture_when.cheap(old)');

-- with truncate: the condition cannot apply there, and does not
select fanout.uncapture('item');
select fanout.capture('item', 'capture_when', '{update,truncate}', "when" => 'new.price > 0');
insert into item values (1, 1, null);
update item set price = -1;
update item set price = 2;
truncate item;
select op, after ->> 'price' as price from messages();
select operations, "when" from fanout.captures where entity = 'item'::regclass;
-- declared again
select fanout.capture('item', 'capture_when', '{update,truncate}', "when" => 'new.price > 0');
select fanout.capture('item', 'capture_when', '{update,truncate}', "when" => 'new.price > 1');
select fanout.uncapture('item');

-- what is not one condition is refused, and nothing of it is executed
create function trap() returns trigger language plpgsql as $$
begin raise exception 'trapped'; end $$;
create function trap(int) returns boolean language plpgsql immutable as $$
begin raise exception 'trapped at once'; end $$;
create function refused(condition text) returns text language plpgsql as $$
begin
    perform fanout.capture('item', 'capture_when', "when" => condition);
    return 'captured';
exception when others then
    return sqlstate || ': ' || sqlerrm;
end $$;
select condition, refused(condition) from unnest(array[
    '', ' ', '--', '(', ')', 'true)', '(true', 'true; select 1', 'true;', '/*', '''', '"',
    'true) execute function capture_when.trap() --',
    'true) execute function capture_when.trap(); --',
    'true); drop table capture_when.item; --',
    e'true)\n execute function capture_when.trap(/*',
    'true), (true', 'true) as x --', 'true) or (true', 'true, false',
    'true) from capture_when.item where (true', 'true) where (true', 'true) union select (true',
    'true) order by (1', 'true) limit (1', 'true) into (x', 'true) for update --', 'true) group by (1',
    'true) having (true', 'true) except all select (false', 'select true',
    'exists (select from capture_when.item)', '(select true)', 'price > 1', 'item.price > 1', 'new.nothing = 1', 'old.nothing = 1',
    'new.price', '1', '''x''', 'new.ctid is null', 'new.tableoid = 1', 'old.xmin is null',
    'count(*) > 1', 'row_number() over () = 1', 'generate_series(1, 2) = 1', '$1', 'default', 'new.*', 'old',
    'U&"\006fld".price > 1', 'position(U&"\006fld".note in new.note) > 0', 'U&"ne\0077".price > 1 and ''"'' <> ''''', 'NEW.price > 1 and $$ $$ = $x$ x'
]) condition;
select count(*) as captures from fanout.captures where entity = 'item'::regclass;
-- 1000 references are enough for anybody
select refused((select string_agg('old.price > 0', ' and ') from generate_series(1, 1000)));
select fanout.uncapture('item');
select refused((select string_agg('old.price > 0', ' and ') from generate_series(1, 1001)));

-- a condition that fails fails the statement, nothing is half done
select fanout.capture('item', 'capture_when', "when" => '10 / new.price > 0');
insert into item values (1, 1, null);
update item set price = 0;
delete from item;
select op, before, after from messages();

-- the condition's own columns: rename follows, drop is refused by the server
alter table item rename price to cost;
insert into item values (2, 2, null);
select op, after from messages();
alter table item drop column cost;
select "when" from fanout.captures where entity = 'item'::regclass;

set client_min_messages = warning;
drop schema capture_when cascade;
