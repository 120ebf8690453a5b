-- MERGE (PostgreSQL 15): each row by what became of it
select current_setting('server_version_num')::int < 150000 as skip \gset
\if :skip
\quit
\endif
set client_min_messages = warning;
create extension if not exists pg_fanout;
reset client_min_messages;
\set SHOW_CONTEXT never
create schema capture_merge;
set search_path = capture_merge;

create table seen (id bigint);
create function messages(out type text, out key text, out before json, out after json)
returns setof record language sql volatile as $$
    with new as (
        select o.*, t.topic from fanout.outbox o join fanout.topic t using (topic_id)
        where t.topic = 'capture_merge' and not exists (select from seen s where s.id = o.id)
    ), now_seen as (
        insert into seen select id from new
    )
    select type, key, payload::json -> 'before', payload::json -> 'after'
    from new order by id
$$;
select fanout.declare_topic('capture_merge');

create table stock (item text primary key, n int);
create table delivery (item text, n int);
select fanout.capture('stock', 'capture_merge', old_row => true);
insert into stock values ('nut', 1), ('bolt', 5), ('washer', 0);
select key from messages();
insert into delivery values ('nut', 10), ('bolt', -5), ('screw', 3), ('washer', 0);
merge into stock s using delivery d on s.item = d.item
when matched and d.n = 0 then do nothing
when matched and s.n + d.n <= 0 then delete
when matched then update set n = s.n + d.n
when not matched then insert values (d.item, d.n);
select * from messages() order by key;

-- also where the row moves to another partition
create table part (id int, p int) partition by list (p);
create table part_1 partition of part for values in (1);
create table part_2 partition of part for values in (2);
select fanout.capture('part', 'capture_merge', key => '{id}');
insert into part values (1, 1), (2, 2);
merge into part using (values (1, 2), (2, 2), (3, 1)) v(id, p) on part.id = v.id
when matched then update set p = v.p
when not matched then insert values (v.id, v.p);
select * from messages() order by key, type;

set client_min_messages = warning;
drop schema capture_merge cascade;
