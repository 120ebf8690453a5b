-- What fanout.compare() refuses, who may use it, what it declares; and a message of
-- a comparison that is handled by hand.
create extension pg_fanout;
-- so that numbers are the same each time
alter sequence fanout.backfill_backfill_id_seq restart;
select fanout.declare_binding('item', 'one'), fanout.declare_binding('item', 'two');
create table items (id int primary key, a int, t text);
select fanout.capture('items', 'item');

-- bad input
select fanout.compare(null, 'item', 'one');
select fanout.compare('items', null, 'one');
select fanout.compare('items', 'item', null);
select fanout.compare('items', 'item', 'one', null);
select fanout.compare('items', 'nosuch', 'one');
select fanout.compare('items', 'item', 'nosuch');
select fanout.publish('item', '1', headers => '{"compare": 1}');

-- tables
create table plain (id int primary key);
create table pages (id int);
select fanout.capture('pages', 'item');
create table nullable (id int unique);
select fanout.capture('nullable', 'item', key => '{id}');
create table other_key (id int primary key, name text not null);
select fanout.capture('other_key', 'item', key => '{name}');
select fanout.compare('plain', 'item', 'one');
select fanout.compare('pages', 'item', 'one');
select fanout.compare('nullable', 'item', 'one');
select fanout.compare('other_key', 'item', 'one');

-- who may
create role compare_user;
grant usage on schema fanout to compare_user;
set role compare_user;
select fanout.compare('items', 'item', 'one');
select * from fanout.sync_comparisons;
select * from fanout.sync_differences;
reset role;
grant execute on function fanout.compare(regclass, text, text, boolean) to compare_user;
set role compare_user;
select fanout.compare('items', 'item', 'one');
reset role;
alter table items owner to compare_user;
set role compare_user;
select fanout.compare('items', 'item', 'one') > 0 as compared;
reset role;

-- what is declared
select kind, entity, topic, consumer_group, state, last_key, error from fanout.backfills;
select fanout.compare('items', 'item', 'one', true);
select fanout.compare('items', 'item', 'two', true) > 0 as compared;
select fanout.cancel_backfill(id) from fanout.backfills order by id;
select state from fanout.backfills order by id;

-- a message
create table copy (id bigint primary key, a numeric(10,2), extra text default 'own');
select fanout.sync_table('item', 'two', 'copy', source => 'public.items');
insert into copy values (1, 1), (2, 3), (4, 4), (5, null), (9, 9);
create function pg_temp.compare(sequence bigint, body jsonb, run int default 1, table_name text default 'items') returns setof text
language sql as $$
    select fanout.sync_messages(array[
        row(gen_random_uuid(), 'item', 'two', null, null, sequence,
            jsonb_build_object('compare', run, 'schema', 'public', 'table', table_name, 'sequence', sequence, 'xid', 100),
            body, null, now(), false, 1, 'application/json')::fanout.message]);
    select format('%s: compared %s, left out %s, missing %s, different %s, extra %s, mended %s %s', state, compared, left_out, missing, different, extra, mended, error)
    from fanout.sync_comparisons where run = compare.run
$$;
\set key '"key": ["id"], "key_columns": ["id"], "order": ["integer"], "snapshot": "1000:1000:"'
select pg_temp.compare(10, ('{' || :'key' || ', "after": null, "upto": ["5"], "rows": [{"id": 1, "a": 1, "t": "x"}, {"id": 2, "a": 2}, {"id": 3, "a": 3}, {"id": 5, "a": null}]}')::jsonb);
select kind, key, columns, mended from fanout.sync_differences order by key;
select pg_temp.compare(11, ('{' || :'key' || ', "after": ["5"], "upto": null, "rows": []}')::jsonb);
select pg_temp.compare(12, '{"ranges": 2}');
select pg_temp.compare(13, '{"ranges": 3}', 2);
select pg_temp.compare(14, ('{' || :'key' || ', "after": null, "upto": null, "repair": true, "rows": [{"id": 1, "a": 1}, {"id": 2, "a": 2}, {"id": 3, "a": 3}, {"id": 5, "a": null}]}')::jsonb, 3);
select kind, key, columns, mended from fanout.sync_differences where run = 3 order by key;
select * from copy order by id;
select pg_temp.compare(15, '{"ranges": 1}', 3);
select pg_temp.compare(16, ('{' || :'key' || ', "after": null, "upto": null, "rows": [{"id": 1, "a": 1}, {"id": 2, "a": 2}, {"id": 3, "a": 3}, {"id": 5, "a": null}]}')::jsonb, 4);
select pg_temp.compare(17, '{"ranges": 1}', 4);
-- one that is of another table, one that is older than what was applied, and others
select pg_temp.compare(18, ('{' || :'key' || ', "after": null, "upto": null, "rows": []}')::jsonb, 5, 'others');
select pg_temp.compare(13, ('{' || :'key' || ', "after": ["1"], "upto": ["3"], "repair": true, "rows": []}')::jsonb, 6);
select pg_temp.compare(19, '{"key": ["id"], "key_columns": ["id"], "order": ["text collate C UTF8"], "snapshot": "1000:1000:", "after": null, "upto": null, "rows": []}', 7);
select pg_temp.compare(20, '{"key": ["a"], "key_columns": ["a"], "order": ["integer"], "snapshot": "1000:1000:", "after": null, "upto": null, "rows": []}', 8);
select pg_temp.compare(21, '{"key": ["id", "a"], "key_columns": ["id", "a"], "order": ["integer", "integer"], "snapshot": "1000:1000:", "after": null, "upto": null, "rows": []}', 9);
select pg_temp.compare(22, '{}', 10);
select pg_temp.compare(22, '[]', 10);
select pg_temp.compare(22, '{"ranges": "x"}', 10);
select pg_temp.compare(22, '{"key": ["id"], "key_columns": ["id"], "order": ["integer"], "snapshot": 7, "after": null, "upto": null, "rows": []}', 10);
select pg_temp.compare(22, '{"key": ["id"], "key_columns": ["id"], "order": ["integer"], "snapshot": "x", "after": null, "upto": null, "rows": []}', 10);
select pg_temp.compare(22, '{"key": ["id"], "key_columns": ["id"], "order": ["integer"], "snapshot": "1:1:", "after": [], "upto": null, "rows": []}', 10);
select pg_temp.compare(22, '{"key": ["id"], "key_columns": ["id"], "order": ["integer"], "snapshot": "1:1:", "after": null, "upto": ["x"], "rows": []}', 10);
select pg_temp.compare(22, '{"key": ["id"], "key_columns": ["id"], "order": ["integer"], "snapshot": "1:1:", "after": null, "upto": null, "rows": [7]}', 10);
select pg_temp.compare(22, '{"key": ["id"], "key_columns": ["id"], "order": ["integer"], "snapshot": "1:1:", "after": null, "upto": null}', 10);
-- what the snapshot did not see is left out: a row that was written, deleted, moved, and all after a TRUNCATE
create function pg_temp.change(sequence bigint, xid bigint, op text, id int, old_key text default null) returns void
language sql as $$
    select fanout.sync_messages(array[
        row(gen_random_uuid(), 'item', 'two', null, id::text, sequence,
            jsonb_build_object('op', op, 'schema', 'public', 'table', 'items', 'format', 'row', 'sequence', sequence, 'xid', xid)
            || case when old_key is null then '{}' else jsonb_build_object('old_key', old_key, 'key_columns', '["id"]') end,
            jsonb_build_object('id', id, 'a', sequence), null, now(), false, 1, 'application/json')::fanout.message])
$$;
select pg_temp.change(100 + i, 50, 'c', i) from generate_series(11, 18) i;
select pg_temp.change(121, 150, 'u', 11), pg_temp.change(122, 150, 'd', 12), pg_temp.change(123, 150, 'u', 23, '13'), pg_temp.change(124, 90, 'u', 14);
update copy set a = 0 where id in (11, 14, 15, 23);
delete from copy where id in (16, 17);
\set body '{"key": ["id"], "key_columns": ["id"], "order": ["integer"], "snapshot": "100:200:120", "after": ["10"], "upto": ["30"], "rows": [{"id": 11, "a": 111}, {"id": 12, "a": 112}, {"id": 13, "a": 113}, {"id": 14, "a": 124}, {"id": 15, "a": 115}, {"id": 16, "a": 116}, {"id": 18, "a": 118}]}'
select pg_temp.compare(130, replace(:'body', '200:120', '200:120,150')::jsonb, 20);
select kind, key, columns from fanout.sync_differences where run = 20 order by key;
select pg_temp.compare(131, :'body', 21);
select kind, key, columns from fanout.sync_differences where run = 21 order by key;
select pg_temp.compare(132, replace(:'body', '200:120"', '200:120,150", "repair": true')::jsonb, 22);
select * from copy where id > 10 order by id;
-- what a repair has written is as new as its message
select pg_temp.change(129, 160, 'u', 14), pg_temp.change(133, 160, 'u', 15);
select * from copy where id in (14, 15) order by id;
select pg_temp.change(140, 170, 't', 0);
select pg_temp.compare(141, replace(:'body', '200:120', '200:170')::jsonb, 23);
select pg_temp.compare(142, :'body', 24);
-- the ten latest are kept
select count(*) from generate_series(31, 50) i, pg_temp.compare(i + 200, '{"ranges": 0}', i);
select count(*), min(run) from fanout.sync_comparisons;
select count(*) from fanout.sync_differences;

drop extension pg_fanout cascade;
drop table items, plain, pages, nullable, other_key, copy;
drop role compare_user;
