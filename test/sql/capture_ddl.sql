-- captures go on while their tables change
set client_min_messages = warning;
create extension if not exists pg_fanout;
reset client_min_messages;
\set SHOW_CONTEXT never
create schema capture_ddl;
set search_path = capture_ddl;

create table seen (id bigint);
create function messages(out type text, out key text, out before json, out after json)
returns setof record language sql volatile as $$
    with new as (
        select o.*, t.topic from fanout.outbox o join fanout.topic t using (topic_id)
        where t.topic = 'capture_ddl' and not exists (select from seen s where s.id = o.id)
    ), now_seen as (
        insert into seen select id from new
    )
    select type, key, payload::json -> 'before', payload::json -> 'after'
    from new order by id
$$;
select fanout.declare_topic('capture_ddl');

create table users (id int primary key, tenant int, name text, secret text);
select fanout.capture('users', 'capture_ddl', exclude => '{secret}', key => '{tenant,id}');
insert into users values (1, 10, 'ann', 'secret');

-- a new column is in the next message
alter table users add column email text default 'n@example.org';
insert into users values (2, 10, 'bob', 'secret');
alter table users drop column email;
insert into users values (3, 10, 'eve', 'secret');
-- of another type, of another name
alter table users alter column name type varchar(10), alter column tenant type text;
alter table users rename column name to full_name;
insert into users values (4, 'ten', 'dan', 'secret');
select * from messages();

-- what is excluded stays excluded, what is the key stays the key, whatever the name
alter table users rename secret to "hostile ""'\ {},";
alter table users rename tenant to "tenant, ""T""";
select exclude, key from fanout.captures where entity = 'users'::regclass;
insert into users values (5, 'ten', 'ute', 'secret');
select * from messages();
alter table users rename "hostile ""'\ {}," to secret;
alter table users rename "tenant, ""T""" to tenant;
insert into users values (6, 'ten', 'zoe', 'secret');
select * from messages();
-- two names swapped
alter table users rename secret to tmp;
alter table users rename full_name to secret;
alter table users rename tmp to full_name;
insert into users values (7, 'ten', 'visible', 'hidden');
select exclude, key from fanout.captures where entity = 'users'::regclass;
select * from messages();
-- rolled back
begin;
alter table users rename full_name to nickname;
insert into users values (8, 'ten', 'visible', 'hidden');
rollback;
insert into users values (9, 'ten', 'visible', 'hidden');
select exclude from fanout.captures where entity = 'users'::regclass;
select * from messages();
-- also while ordinary triggers do not fire
set session_replication_role = replica;
alter table users rename full_name to nickname;
reset session_replication_role;
insert into users values (10, 'ten', 'visible', 'hidden');
select exclude from fanout.captures where entity = 'users'::regclass;
select * from messages();
-- an excluded column that was dropped and comes again is still excluded
alter table users drop column nickname;
insert into users values (11, 'ten', 'visible');
alter table users add column nickname text default 'hidden';
insert into users values (12, 'ten', 'visible');
select * from messages();

-- a column of an explicit key is not dropped by mistake
alter table users drop column tenant;
alter table users drop column if exists nothing, drop column tenant cascade, add column x int;
insert into users values (13, 'ten', 'visible');
select * from messages();
-- exchanged for another of the same name, it still is the key
alter table users drop column tenant, add column tenant int default 5;
insert into users (id, secret) values (14, 'visible');
select * from messages();
-- any other is free to go, and so is this one without the capture
alter table users drop column secret;
select fanout.uncapture('users');
alter table users drop column tenant;

-- a name in "columns" follows, too; in "when" the server takes care of it
create table item (id int primary key, name text, price int);
select fanout.capture('item', 'capture_ddl', columns => '{price,id}', "when" => 'new.price > 0');
alter table item rename price to cost;
insert into item values (1, 'x', 1), (2, 'y', -1);
select columns, "when" from fanout.captures where entity = 'item'::regclass;
select * from messages();

-- options that look like names of columns are left alone
create table odd ("key" int primary key, "columns" text, "exclude" text, "when" text, old_row text);
select fanout.capture('odd', 'capture_ddl', columns => '{columns,key,old_row}', key => '{key,columns}', old_row => true);
alter table odd rename "columns" to "key_";
alter table odd rename "key" to "columns";
alter table odd rename "key_" to "key";
alter table odd rename "old_row" to "when_";
select columns, key, old_row from fanout.captures where entity = 'odd'::regclass;
insert into odd values (1, 'a', 'b', 'c', 'd');
select * from messages();

-- a primary key that goes, comes, is another
create table keyed (a int not null, b int not null, constraint keyed_pkey primary key (a));
select fanout.capture('keyed', 'capture_ddl');
insert into keyed values (1, 10);
alter table keyed drop constraint keyed_pkey;
insert into keyed values (2, 20);
alter table keyed add primary key (b);
insert into keyed values (3, 30);
alter table keyed rename b to c;
insert into keyed values (4, 40);
select * from messages();

-- the table's own name, and its schema's
alter table keyed rename to "locked ""'";
insert into "locked ""'" values (5, 50);
create schema capture_ddl_2;
alter table "locked ""'" set schema capture_ddl_2;
insert into capture_ddl_2."locked ""'" values (6, 60);
alter schema capture_ddl_2 rename to "capture_ddl.3";
insert into "capture_ddl.3"."locked ""'" values (7, 70);
select type, key from messages();
select headers ->> 'schema' as schema, headers ->> 'table' as "table", payload::json -> 'source' ->> 'schema' as source_schema,
       payload::json -> 'source' ->> 'table' as source_table
from fanout.outbox o join fanout.topic t using (topic_id) where topic = 'capture_ddl' and key = '70';
select fanout.uncapture('"capture_ddl.3"."locked ""''"');
set client_min_messages = warning;
drop schema "capture_ddl.3" cascade;
reset client_min_messages;

-- within one transaction, statement after statement
begin;
create table young (id int primary key, a text);
select fanout.capture('young', 'capture_ddl');
insert into young values (1, 'x');
alter table young rename a to b;
insert into young values (2, 'y');
alter table young rename to old;
insert into old values (3, 'z');
alter table old add c int default 7;
update old set b = 'u' where id = 3;
commit;
select * from messages();

-- dropped, the table takes its captures along
create table gone (id int primary key);
select fanout.capture('gone', 'capture_ddl');
drop table gone;
select count(*) as captures from fanout.captures where entity::text like '%gone%';
create table gone (id int primary key);
insert into gone values (1);
select * from messages();

-- rewritten by VACUUM FULL, CLUSTER, SET LOGGED, and by CREATE TABLE LIKE not inherited
vacuum full old;
cluster old using young_pkey;
alter table old set unlogged;
insert into old values (4, 'w');
create table alike (like old including all);
insert into alike values (1);
select type, key from messages();

-- a plan that was prepared before
prepare put(int) as insert into gone values ($1);
execute put(2);
select fanout.capture('gone', 'capture_ddl');
execute put(3);
select fanout.uncapture('gone');
execute put(4);
select key from messages();

-- RENAME and DROP of what is no column of a captured table goes its own way
create view v as select id from old;
alter table v rename column id to number;
alter view v rename column number to n;
create type pair as (a int, b int);
alter type pair rename attribute a to c;
alter table old add constraint positive check (id > 0);
alter table old rename constraint positive to is_positive;
alter table old drop constraint is_positive;
alter table if exists no_such_table rename column a to b;
alter table if exists no_such_table drop column a;

set client_min_messages = warning;
drop schema capture_ddl cascade;
