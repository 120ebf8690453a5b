-- every operation on a captured table makes a message; what each option changes
set client_min_messages = warning;
create extension if not exists pg_fanout;
reset client_min_messages;
\set SHOW_CONTEXT never
create schema capture;
set search_path = capture;

-- the messages made since the last call, in order of id
create table seen (id bigint);
create function messages(out topic text, out type text, out key text, out op text, out before json, out after json)
returns setof record language sql volatile as $$
    with new as (
        select o.*, t.topic from fanout.outbox o join fanout.topic t using (topic_id)
        where t.topic like 'capture%' and not exists (select from seen s where s.id = o.id)
    ), now_seen as (
        insert into seen select id from new
    )
    select topic, type, key, headers ->> 'op', payload::json -> 'before', payload::json -> 'after'
    from new order by id
$$;

select fanout.declare_topic('capture');
create table users (id int primary key, name text, secret text);
select fanout.capture('users', 'capture');
select * from fanout.captures where entity = 'users'::regclass;

-- insert, update, delete
insert into users values (1, 'ann', 'x'), (2, 'bob', null);
update users set name = 'anne' where id = 1;
delete from users where id = 2;
select * from messages();

-- nothing changed, nothing said; a change to the same values is a change
update users set name = 'nobody' where id = 99;
delete from users where id = 99;
update users set name = name;
select * from messages();

-- TRUNCATE is captured without being asked for
truncate users;
select * from messages();

-- COPY
copy users (id, name) from stdin;
3	copied
4	\N
\.
select * from messages();

-- ON CONFLICT
insert into users values (3, 'again', 'y') on conflict do nothing;
insert into users values (3, 'upserted', 'y'), (5, 'new', 'z')
on conflict (id) do update set name = excluded.name;
select * from messages();

-- writable CTEs and UPDATE ... FROM
with gone as (delete from users where id = 4 returning *)
insert into users select id + 100, name, secret from gone;
update users u set secret = v.s from (values (5, 'joined')) v(i, s) where u.id = v.i;
select * from messages();

-- a key that changes: the message carries the new key, and the row as it was
update users set id = 6 where id = 5;
select o.headers - 'schema' as headers from fanout.outbox o order by id desc limit 1;
select * from messages();

-- BEFORE triggers have their say first
create function shout() returns trigger language plpgsql as $$
begin
    if new.name = 'skip' then return null; end if;
    new.name := upper(new.name);
    return new;
end $$;
create trigger shout before insert on users for each row execute function shout();
insert into users values (7, 'loud', null), (8, 'skip', null);
select * from messages();
drop trigger shout on users;

-- a table that a trigger of a captured table writes to
create table audit (n int generated always as identity, who int);
create function audit() returns trigger language plpgsql as $$
begin insert into audit (who) values (new.id); return null; end $$;
create trigger a_audit after insert on users for each row execute function audit();
select fanout.capture('audit', 'capture');
insert into users values (9, 'audited', null);
select type, key, after from messages();
drop table audit cascade;
drop trigger a_audit on users;

-- the same capture again is a no-op, another one is an error that says what differs
select fanout.capture('users', 'capture');
select fanout.capture('users', 'capture', operations => '{delete,update,insert,insert}');
select fanout.capture('users', 'capture', operations => '{insert}');
select fanout.capture('users', 'capture', columns => '{id,name}', key => '{name}', "when" => 'true', old_row => true);
select fanout.capture('users', 'capture', exclude => '{secret}');

-- two topics at once, each with options of its own
select fanout.declare_topic('capture_2');
select fanout.capture('users', 'capture_2', '{delete,truncate}', exclude => '{secret}');
delete from users where id = 9;
truncate users;
select * from messages();

-- uncapture: one, all, none
select fanout.uncapture('users', 'capture_2');
select fanout.uncapture('users', 'capture_2');
select topic, operations from fanout.captures where entity = 'users'::regclass;
select fanout.capture('users', 'capture_2');
select fanout.uncapture('users');
select fanout.uncapture('users');
select fanout.uncapture('users', 'no such topic');
insert into users values (1, 'unseen', null);
select * from messages();
select count(*) as triggers_left from pg_trigger where tgrelid = 'users'::regclass;
-- and captured again, otherwise
select fanout.capture('users', 'capture', '{truncate}');
truncate users;
insert into users values (1, 'unseen', null);
select * from messages();
select fanout.uncapture('users');

-- columns: only these, in the order of the table
create table wide (id int primary key, a text, b text, c text);
select fanout.capture('wide', 'capture', columns => '{c,id}');
insert into wide values (1, 'a', 'b', 'c');
update wide set a = 'not in it' where id = 1;
delete from wide;
select * from messages();
select fanout.uncapture('wide');
-- the key need not be among them
select fanout.capture('wide', 'capture', columns => '{a}');
insert into wide values (1, 'a', 'b', 'c');
delete from wide;
select * from messages();
select fanout.uncapture('wide');
-- exclude: all but these
select fanout.capture('wide', 'capture', exclude => '{a,c}');
insert into wide values (1, 'a', 'b', 'c');
delete from wide;
select * from messages();
select fanout.uncapture('wide');
-- old_row: before is always there
select fanout.capture('wide', 'capture', old_row => true);
insert into wide values (1, 'a', 'b', 'c');
update wide set a = 'A';
delete from wide;
select * from messages();
select fanout.uncapture('wide');

-- rows too large for a page, compressed or not, unchanged or changed
alter table wide alter column a set storage external;
select fanout.capture('wide', 'capture', old_row => true);
insert into wide values (1, repeat('abcdefgh', 10000), repeat('x', 30000), 'c');
update wide set c = 'd';
update wide set a = 'short';
select op, length(before ->> 'a') as before_a, length(before ->> 'b') as before_b,
       length(after ->> 'a') as after_a, length(after ->> 'b') as after_b from messages();
drop table wide;

-- tables and columns with hostile names
create schema "hostile ""'schema";
create table "hostile ""'schema"."t'; -- ""x"" %I $1 \" ("k ""'\" int primary key, "a,b{}" text, "ünï""" text, "{null}" int);
select fanout.capture('"hostile ""''schema"."t''; -- ""x"" %I $1 \"', 'capture', columns => array['k "''\', 'a,b{}', '{null}'],
                      key => array['a,b{}', 'k "''\', '{null}']);
select columns, key from fanout.captures where topic = 'capture' and entity::text like '%hostile%';
insert into "hostile ""'schema"."t'; -- ""x"" %I $1 \" values (1, e'a"b\\c\n', 'unseen', null);
select o.headers from fanout.outbox o order by id desc limit 1;
select type, key, after from messages();
select fanout.capture('"hostile ""''schema"."t''; -- ""x"" %I $1 \"', 'capture', columns => array['k "''\', 'a,b{}', '{null}'],
                      key => array['a,b{}', 'k "''\', '{null}']);
select fanout.uncapture('"hostile ""''schema"."t''; -- ""x"" %I $1 \"');
set client_min_messages = warning;
drop schema "hostile ""'schema" cascade;
reset client_min_messages;

-- hostile topics: the trigger's name is theirs, cut where it has to be
select fanout.declare_topic(n) from unnest(array['capture "x" ''; drop table users; --', 'capture' || repeat('€', 80), 'capture' || repeat('€', 79)]) n;
select fanout.capture('users', n, "when" => 'true')
from unnest(array['capture "x" ''; drop table users; --', 'capture' || repeat('€', 80), 'capture' || repeat('€', 79)]) n;
insert into users values (77, 'x', null);
select left(topic, 40) as topic, key from messages();
select fanout.uncapture('users');

-- no columns at all
create table nothing ();
select fanout.capture('nothing', 'capture', '{insert,delete,truncate}');
insert into nothing default values;
delete from nothing;
truncate nothing;
select * from messages();

-- as many as a table can have
do $$ begin
    execute 'create table most (' || (select string_agg('c' || i || ' int', ', ') from generate_series(1, 1600) i) || ')';
end $$;
select fanout.capture('most', 'capture');
insert into most (c1, c1600) values (1, 1600);
select after::text = (select row_to_json(m)::text from most m) as same, after ->> 'c1600' as last from messages();
drop table most;

-- unlogged and temporary tables
create unlogged table unlogged (id int primary key);
create temp table temporary (id int primary key, x int);
select fanout.capture('unlogged', 'capture');
select fanout.capture('temporary', 'capture', "when" => 'new.x > 0');
insert into unlogged values (1);
insert into temporary values (1, 1), (2, 0);
select key, after from messages();
drop table temporary, unlogged;

set client_min_messages = warning;
drop schema capture cascade;
