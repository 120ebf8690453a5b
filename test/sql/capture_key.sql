-- the key of a message: which columns, in which form, and what happens when it changes
set client_min_messages = warning;
create extension if not exists pg_fanout;
reset client_min_messages;
\set SHOW_CONTEXT never
create schema capture_key;
set search_path = capture_key;

create table seen (id bigint);
create function messages(out op text, out key text, out old_key text, out before json, out after json)
returns setof record language sql volatile as $$
    with new as (
        select o.*, t.topic from fanout.outbox o join fanout.topic t using (topic_id)
        where t.topic = 'capture_key' and not exists (select from seen s where s.id = o.id)
    ), now_seen as (
        insert into seen select id from new
    )
    select headers ->> 'op', key, headers ->> 'old_key', payload::json -> 'before', payload::json -> 'after'
    from new order by id
$$;
select fanout.declare_topic('capture_key');

-- none: no key, and before is null
create table keyless (a int, b text);
select fanout.capture('keyless', 'capture_key');
insert into keyless values (1, 'x');
update keyless set a = 2;
delete from keyless;
select * from messages();

-- the replica identity's index, in its order
create table identified (a int not null, b int not null, c int);
create unique index identified_idx on identified (b, a) include (c);
alter table identified replica identity using index identified_idx;
select fanout.capture('identified', 'capture_key');
insert into identified values (1, 2, 3);
update identified set c = 4;
select * from messages();
-- the primary key goes first
alter table identified add primary key (a);
update identified set c = 5;
select * from messages();
alter table identified drop constraint identified_pkey;
update identified set c = 6;
select * from messages();
alter table identified replica identity full;
update identified set c = 7;
select * from messages();

-- a composite primary key: a JSON array, in the key's order, of JSON values
create table composite (a int, b text, c numeric, d timestamptz, e boolean, x int, primary key (b, a, c, d, e) include (x));
set timezone = 'UTC';
select fanout.capture('composite', 'capture_key');
insert into composite values (1, e'quoted "\\ \n', 1.50, '2024-01-01 12:00+00', true);
select key, key::json ->> 0 as first from messages();
update composite set x = 1;
select key, old_key, before is null or before::text = 'null' as no_before from messages();
-- any column of it counts as a change
update composite set c = 1.5;
select key, old_key, before ->> 'c' as before, after ->> 'c' as after from messages();

-- a single column: the bare value
create table single (k text primary key, x int);
select fanout.capture('single', 'capture_key');
insert into single values (''), ('quoted "x"'), ('{"a": 1}'), ('ünï😀');
update single set k = 'new' where k = '';
select op, key, old_key from messages();
create table single_uuid (k uuid primary key);
create table single_time (k timestamptz primary key);
create table single_json (k jsonb primary key);
create table single_array (k int[] primary key);
create table single_bytea (k bytea primary key);
create table single_float (k float8 primary key);
select fanout.capture(t, 'capture_key') from unnest('{single_uuid,single_time,single_json,single_array,single_bytea,single_float}'::regclass[]) t;
insert into single_uuid values ('A0EEBC999C0B4EF8BB6D6BB9BD380A11');
insert into single_time values ('2024-01-01 12:00+00'), ('infinity');
insert into single_json values ('"a"'), ('{"b": [1, null]}');
insert into single_array values ('{1,2,NULL}');
insert into single_bytea values ('\xdeadbeef');
insert into single_float values ('NaN'), ('-Infinity'), (0.1);
select key from messages();
reset timezone;

-- an explicit key, in the order given
create table chosen (id int primary key, tenant int, name text);
select fanout.capture('chosen', 'capture_key', key => '{tenant,id}');
insert into chosen values (1, 10, 'x');
update chosen set name = 'y';
update chosen set tenant = 11;
select * from messages();
select fanout.uncapture('chosen');
-- a key that is NULL is none; a part that is NULL is null
select fanout.capture('chosen', 'capture_key', key => '{name}');
insert into chosen values (2, 10, null);
update chosen set name = 'named' where id = 2;
update chosen set name = null where id = 2;
select * from messages();
select fanout.uncapture('chosen');
select fanout.capture('chosen', 'capture_key', key => '{name,tenant}');
insert into chosen values (3, 10, null), (4, null, null);
select * from messages();
select fanout.uncapture('chosen');

-- a changed key with columns that leave it out; the old row stays hidden where it did not change
select fanout.capture('chosen', 'capture_key', columns => '{name}');
update chosen set id = 30, name = 'moved' where id = 3;
update chosen set name = 'stayed' where id = 30;
select * from messages();
select fanout.uncapture('chosen');

-- a deferrable primary key is one, too: keys swapped in one statement
create table swapped (id int primary key deferrable initially deferred, x text);
select fanout.capture('swapped', 'capture_key');
insert into swapped values (1, 'one'), (2, 'two');
update swapped set id = 3 - id;
select * from messages();

-- key and exclude exclude each other
select fanout.capture('chosen', 'capture_key', exclude => '{id}');
select fanout.capture('chosen', 'capture_key', key => '{name}', exclude => '{tenant,name}');
select fanout.capture('chosen', 'capture_key', key => '{name}', exclude => '{id}');
update chosen set tenant = 1 where id = 30;
select * from messages();

-- a key is the same text from every session, whatever its settings
create table moments (at timestamptz, what bytea, primary key (at, what));
select fanout.capture('moments', 'keys_of_moments') from fanout.declare_topic('keys_of_moments');
set timezone = 'UTC';
insert into moments values ('2024-01-01 00:00+00', '\x01ff');
set timezone = 'Asia/Tokyo'; set bytea_output = 'escape'; set datestyle = 'German';
update moments set at = at;
select distinct key from fanout.outbox_status where topic = 'keys_of_moments';
show timezone;
show bytea_output;
reset timezone; reset bytea_output; reset datestyle;

-- so is one of any other type that settings have a say in, alone and as a part
create domain place as regtype;
create table pg_class (id int);
create table told (c regclass, t place, i interval, at timestamptz, b bytea, r tstzrange, f float8, d daterange[], p regprocedure, x int);
select fanout.declare_topic('keys told'), fanout.capture('told', 'keys told', '{update}', key => '{c,t,i,at,b,r,f,d,p}');
select count(fanout.capture('told', topic, '{update}', key => array[k]))
from unnest('{c,t,i,at,b,r,f,d,p}'::text[]) k, lateral (select 'key told ' || k) n(topic), fanout.declare_topic(topic);
insert into told values ('capture_key.pg_class', 'capture_key.pg_class', '-1 day -2:00', '2024-01-01 00:00+00', '\x01ff',
    '[2024-05-01 00:00+00,2024-06-01 00:00+00)', 0.1::float8 + 0.2::float8, '{"[2024-05-01,2024-12-01)"}', 'capture_key.messages()');
update told set x = 1;
set search_path = ''; set quote_all_identifiers = on;
update capture_key.told set x = 2;
set search_path = pg_catalog; set intervalstyle = sql_standard; set datestyle = 'SQL, DMY'; set timezone = 'Asia/Tokyo';
update capture_key.told set x = 3;
set search_path = capture_key, pg_catalog; set intervalstyle = iso_8601; set datestyle = German; set bytea_output = escape; set extra_float_digits = -15;
update capture_key.told set x = 4;
reset quote_all_identifiers; reset intervalstyle; reset datestyle; reset timezone; reset bytea_output; reset extra_float_digits;
set search_path = capture_key;
select topic, key, count(*) from fanout.outbox_status where topic ~ '^keys? told' group by 1, 2 order by 1, 2;

set client_min_messages = warning;
drop schema capture_key cascade;
