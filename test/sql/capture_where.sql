-- "where": a filter on the row; replacing captures; what capture() tells
set client_min_messages = warning;
create extension if not exists pg_fanout;
reset client_min_messages;
\set SHOW_CONTEXT never
create schema capture_where;
set search_path = capture_where;
select fanout.declare_topic('capture_where');

create table seen (id bigint);
create function messages(out op text, out key text, out old_key text, out before json, out after json)
returns setof record language sql volatile as $$
    with new as (
        select o.*, t.topic from fanout.outbox o join fanout.topic t using (topic_id)
        where t.topic = 'capture_where' and not exists (select from seen s where s.id = o.id)
    ), now_seen as (
        insert into seen select id from new
    )
    select headers ->> 'op', key, headers ->> 'old_key', payload::json -> 'before', payload::json -> 'after'
    from new order by id
$$;

create table item (id int primary key, status text, price numeric);
select fanout.capture('item', 'capture_where', "where" => 'status = ''active''');
select operations, "where", condition, enabled from fanout.captures where entity = 'item'::regclass;
insert into item values (1, 'draft', 1), (2, 'active', 2), (3, null, 3);
-- in, within, out, outside; a key that changes on the way
update item set price = price + 1;
update item set status = 'active' where id in (1, 3);
update item set status = 'closed', id = 20 where id = 2;
update item set status = null where id = 3;
update item set id = 10 where id = 1;
update item set status = 'active', id = 21 where id = 20;
delete from item where id in (3, 10);
truncate item;
select * from messages();
-- follows renames, and means the columns
alter table item rename status to state;
insert into item values (4, 'active', 4), (5, 'draft', 5);
select op, key from messages();
select condition from fanout.captures where entity = 'item'::regclass;
select fanout.uncapture('item');

-- a copy made of these messages is the filtered table, whatever happens to it
select fanout.capture('item', 'capture_where', "where" => 'price between 3 and 6 or item.state = ''x''', old_row => true);
truncate item;
select setseed(0.25);
do $$
begin
    for i in 1 .. 600 loop
        case (random() * 4)::int
            when 0 then insert into item values ((random() * 20)::int, case when random() < 0.2 then 'x' end, (random() * 9)::int) on conflict do nothing;
            when 1 then delete from item where id = (random() * 20)::int;
            when 2 then update item set price = nullif((random() * 9)::int, 0), state = nullif(state, 'x') where id = (random() * 20)::int;
            else
                begin
                    update item set id = (random() * 20)::int, price = (random() * 9)::int where id = (random() * 20)::int;
                exception when unique_violation then null;
                end;
        end case;
    end loop;
end $$;
create table copy (like item including all);
do $$
declare m record;
begin
    for m in select * from messages() loop
        delete from copy where id::text in (m.key, m.old_key) or m.op = 't';
        insert into copy select * from json_populate_record(null::copy, m.after) where m.after::text <> 'null';
    end loop;
end $$;
select count(*) > 0 as some, count(*) filter (where copy is distinct from item) as different
from copy full join (select * from item where price between 3 and 6 or state = 'x') item using (id);
select fanout.uncapture('item');

-- with "when", both must hold; only some operations; partitions with other column numbers
select fanout.capture('item', 'capture_where', '{update}', "where" => 'price > 5', "when" => 'old *<> new');
truncate item;
insert into item values (1, 'a', 1);
update item set price = 6;
update item set price = 6;
update item set price = 7;
update item set price = 5;
select op, key, before, after from messages();
create table part_1 (price numeric, gone int, id int not null, state text);
alter table part_1 drop gone;
create table parts (id int primary key, state text, price numeric) partition by range (id);
alter table parts attach partition part_1 for values from (0) to (10);
create table part_2 partition of parts for values from (10) to (20);
select fanout.capture('parts', 'capture_where', "where" => '"parts" . price > 5');
insert into parts values (1, 'a', 6), (2, 'a', 1), (11, 'b', 7);
update parts set price = 10 - price, id = id + 10 where id < 10;
select op, key, before, after from messages();
select fanout.uncapture('parts'), fanout.uncapture('item');

-- bad conditions
create table d (id int primary key, x int, j json);
create function refusal(command text, out refusal text) language plpgsql as $$
begin
    execute command;
    perform fanout.uncapture(t, 'capture_where') from unnest('{item,d}'::regclass[]) t;
    refusal := 'accepted';
exception when others then
    refusal := sqlstate || ': ' || sqlerrm;
end $$;
select c, refusal(format('select fanout.capture(''item'', ''capture_where'', "where" => %L)', c))
from unnest(array['', 'price', 'new.price > 1', 'nothing > 1', 'other.price > 1', 'price > 1)', 'price > 1; drop table item',
                    'exists (select from item)', 'count(*) > 1', 'price > $1', 'price > random()', 'current_user = ''x''', 'price > 1 -- a comment', '"item"."price" > 1']) c;

-- a condition that fails for some rows is refused, and so is what would make it fail
create table p (id int primary key, x int);
create table nested (id int primary key, p p);
create type pair as (a int, b int);
create table pairs (id int primary key, pair pair, pairs pair[]);
select fanout.capture('d', 'capture_where', "when" => 'old is distinct from new');
select count(*) from fanout.captures where entity = 'd'::regclass;
select c, refusal(format('select fanout.capture(''d'', ''capture_where'', "when" => %L)', c))
from unnest(array['old = new', 'row(old, 1) = row(new, 1)', 'greatest(old, new) = new', 'old in (new)', 'old < new',
                  'array[old] = array[new]', 'old.j::text is distinct from new.j::text', 'old::text is distinct from new::text',
                  'old *<> new', 'old.x is distinct from new.x']) c;
select fanout.capture('p', 'capture_where', "when" => 'old is distinct from new');
select fanout.capture('nested', 'capture_where', "when" => 'old is distinct from new');
select fanout.capture('pairs', 'capture_where', "when" => 'old.pairs <> new.pairs or old.pair <> new.pair');
alter table p add column pt point;
alter table p alter x type json using to_json(x);
alter type pair add attribute c xml;
alter table p add column t text;
insert into p values (1, 1, 't');
update p set t = 't';
update p set t = 'u';
select op, key from messages();
select fanout.uncapture('p'), fanout.uncapture('nested'), fanout.uncapture('pairs');
alter table p add column pt point;

-- Conditions mean what they mean to the caller.  A part of the rows is none of
-- theirs: nobody reads "when" as a filter.
create schema types;
create function types.same(text, text) returns boolean language sql immutable as 'select lower($1) = lower($2)';
create operator types.=== (leftarg = text, rightarg = text, procedure = types.same);
create table names (id int primary key, name text);
select fanout.capture('names', 'capture_where', "when" => 'not old.name === new.name');
set search_path = capture_where, types;
select fanout.capture('names', 'capture_where', "when" => 'not old.name === new.name');
insert into names values (1, 'ann');
update names set name = 'ANN';
update names set name = 'bob';
select op, key, after from messages();
reset search_path;
set search_path = capture_where;

-- a live capture is changed in place
select fanout.capture('names', 'capture_where', exclude => '{name}');
select fanout.capture('names', 'capture_where', exclude => '{name}', replace => true);
select fanout.capture('names', 'capture_where', exclude => '{name}', replace => true);
update names set name = 'cid';
truncate names;
insert into names values (2, 'dot');
select op, key, after from messages();
select tgname, pg_get_triggerdef(oid) ~ 'WHEN \(false\)' as idle from pg_trigger where tgrelid = 'names'::regclass order by 1;
alter table names enable always trigger pg_fanout_row_capture_where, enable always trigger pg_fanout_truncate_capture_where,
    enable always trigger pg_fanout_insert_capture_where, enable always trigger pg_fanout_update_capture_where,
    enable always trigger pg_fanout_delete_capture_where;
select fanout.capture('names', 'capture_where', '{insert,update}', "where" => 'id < 5', replace => true);
update names set id = 7;
update names set id = 1;
truncate names;
select op, key, after from messages();
select operations, exclude, "where", enabled from fanout.captures where entity = 'names'::regclass;
select count(*) from pg_trigger where tgrelid = 'names'::regclass and tgenabled <> 'A';
select fanout.capture('names', 'capture_where', key => '{name}', replace => true);
select operations, key, "where", "when", enabled from fanout.captures where entity = 'names'::regclass;
insert into names values (3, 'eve');
select op, key from messages();
select fanout.uncapture('names'), fanout.uncapture('names');
select count(*) from pg_trigger where tgrelid = 'names'::regclass;

-- names of triggers do not meet
create table o (id int primary key);
select fanout.declare_topic(t) from unnest('{orders,orders_insert,insert_orders,row_orders,x,x_truncate}'::text[]) t;
select fanout.capture('o', 'orders', "when" => 'old *<> new'), fanout.capture('o', 'orders_insert'),
       fanout.capture('o', 'insert_orders'), fanout.capture('o', 'row_orders'),
       fanout.capture('o', 'x', '{insert,truncate}'), fanout.capture('o', 'x_truncate');
select topic, operations from fanout.captures where entity = 'o'::regclass order by 1;
create trigger pg_fanout_row_capture_where after insert on o for each row execute function fanout.capture_trigger('orders');
select fanout.capture('o', 'capture_where');

-- a capture that is only partly there
create table partly (id int primary key, a int, b int);
select fanout.capture('partly', 'capture_where', "when" => 'new.b > 0 or new.b is null');
alter table partly drop column b cascade;
select operations, enabled from fanout.captures where entity = 'partly'::regclass;
select item, ok, detail from fanout.check_captures() where item ~ 'partly';
select fanout.capture('parts', 'capture_where');
select enabled from fanout.captures where entity = 'parts'::regclass;
alter table part_2 disable trigger all;
select enabled from fanout.captures where entity = 'parts'::regclass;
alter table part_2 enable trigger all;
select enabled from fanout.captures where entity = 'parts'::regclass;
alter table part_2 enable replica trigger pg_fanout_row_capture_where;
select enabled from fanout.captures where entity = 'parts'::regclass;
select item, ok, detail from fanout.check_captures() where item ~ 'parts';

-- a table that was exchanged for another one of its name
create table swapped (id int primary key);
select fanout.capture('swapped', 'capture_where');
create table swapped_new (id int primary key);
alter table swapped rename to swapped_old;
select ok from fanout.check_captures() where item ~ 'swapped';
alter table swapped_new rename to swapped;
select item, ok, detail from fanout.check_captures() where item ~ 'swapped';
drop table swapped_old;
select item, ok, detail from fanout.check_captures() where item ~ 'swapped';
begin;
select fanout.uncapture('swapped');
select count(*) from fanout.check_captures() where item ~ 'swapped';
rollback;
select fanout.capture('swapped', 'capture_where');
select ok from fanout.check_captures() where item ~ 'swapped';
-- one that was dropped and nothing else is forgotten
drop table swapped;
create table swapped ();
select count(*) from fanout.check_captures() where item ~ 'swapped';
