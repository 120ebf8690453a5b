-- columns that a capture names are numbers: whatever renames, drops or retypes them
set client_min_messages = warning;
create extension if not exists pg_fanout;
reset client_min_messages;
\set SHOW_CONTEXT never
create schema capture_columns;
set search_path = capture_columns;
select fanout.declare_topic('capture_columns');

create table seen (id bigint);
create function messages(out type text, out key text, out body json, out old_key text)
returns setof record language sql volatile as $$
    with new as (
        select o.*, t.topic from fanout.outbox o join fanout.topic t using (topic_id)
        where t.topic ~ '^capture_columns' and not exists (select from seen s where s.id = o.id)
    ), now_seen as (
        insert into seen select id from new
    )
    select type, key, coalesce(nullif(payload::json ->> 'after', ''), payload::json ->> 'before')::json, headers ->> 'old_key'
    from new order by id
$$;
create view captures as select entity, topic, columns, exclude, key, enabled from fanout.captures where topic ~ '^capture_columns' order by 1, 2;

-- every way in which a column of a table can be renamed
create type user_t as (id int, name text, secret text);
create table typed of user_t (primary key (id));
create table plain (id int primary key, secret text, name text);
create table by_view (like plain including all);
create table by_matview (like plain including all);
create table by_foreign (like plain including all);
create table parent (id int primary key, secret text) partition by range (id);
create table part (secret text, gone int, id int not null);
alter table part drop gone;
alter table parent attach partition part for values from (0) to (100);
select count(fanout.capture(t, 'capture_columns', exclude => '{secret}'))
from unnest('{typed,plain,by_view,by_matview,by_foreign,parent}'::regclass[]) t;
alter type user_t rename attribute secret to password cascade;
alter table plain rename column secret to password;
alter view by_view rename column secret to password;
alter materialized view by_matview rename column secret to password;
alter foreign table by_foreign rename column secret to password;
alter table parent rename secret to password;
insert into typed values (1, 'ann', 'TOP SECRET');
insert into plain values (1, 'TOP SECRET');
insert into by_view values (1, 'TOP SECRET');
insert into by_matview values (1, 'TOP SECRET');
insert into by_foreign values (1, 'TOP SECRET');
insert into parent values (1, 'TOP SECRET');
select * from messages();
select entity, exclude from captures;

-- names that change places, and one that another column takes
begin;
alter table plain rename name to other;
alter table plain rename password to name;
alter table plain rename other to password;
commit;
insert into plain (id, name, password) values (2, 'TOP SECRET', 'no secret');
select * from messages();
-- another type, and back
alter table plain alter name type varchar(100);
alter table plain alter column name type bytea using convert_to(name, 'UTF8');
alter table plain alter name set default 'TOP SECRET';
insert into plain (id) values (3);
select * from messages();
-- dropped, and the same name again
alter table plain drop column name;
insert into plain values (4);
alter table plain add column name text default 'TOP SECRET';
insert into plain values (5);
select * from messages();
select exclude from captures where entity = 'plain'::regclass;
select pg_get_triggerdef(oid) from pg_trigger where tgrelid = 'plain'::regclass order by tgname;

-- with everything that drops a type, or what a role owns
create type kind as enum ('a', 'b');
create domain short as text check (length(value) < 10);
create table things (id int primary key, kind kind, short short, secret text);
select fanout.capture('things', 'capture_columns', exclude => '{secret,kind}');
drop type kind cascade;
insert into things values (1, 's', 'TOP SECRET');
select * from messages();
select exclude from captures where entity = 'things'::regclass;
select fanout.capture('things', 'capture_columns', columns => '{id,short}', replace => true);
drop domain short cascade;
insert into things values (2, 'TOP SECRET');
select * from messages();
select columns from captures where entity = 'things'::regclass;

create role fanout_owner_of_types;
create domain long as text check (length(value) > 1);
create domain tag as text;
create function tagged(text) returns boolean language sql immutable as $$ select $1 <> '' $$;
alter domain long owner to fanout_owner_of_types;
alter domain tag owner to fanout_owner_of_types;
alter function tagged(text) owner to fanout_owner_of_types;
create table owned (id int primary key, long long, tag tag, secret text);
create table by_function (id int primary key, tag text);
create table by_column (id int primary key, tag tag);
select fanout.capture('owned', 'capture_columns', exclude => '{long,secret}');
select fanout.capture('by_function', 'capture_columns', exclude => '{id}', key => '{tag}', "where" => 'tagged(tag)');
select fanout.capture('by_column', 'capture_columns', columns => '{id,tag}', "when" => 'new.tag is not null');
set client_min_messages = warning;
drop owned by fanout_owner_of_types cascade;
reset client_min_messages;
insert into owned values (1, 'TOP SECRET');
alter table owned add column long text default 'TOP SECRET';
insert into owned (id) values (2);
insert into by_function values (1, 'a');
insert into by_column values (1);
delete from by_column;
select * from messages();
select entity, columns, exclude, key, enabled from captures where entity in ('owned'::regclass, 'by_function'::regclass, 'by_column'::regclass);
select item, ok, detail from fanout.check_captures() where item ~ 'by_(function|column)' and not ok order by 1, 2;
select fanout.uncapture('by_function'), fanout.uncapture('by_column');

-- a key's column cannot go by any of them
create type part_of_key as enum ('x', 'y');
create domain tenant as int;
create table keyed (id int primary key, part part_of_key, tenant tenant);
select fanout.capture('keyed', 'capture_columns', key => '{tenant,part}');
drop type part_of_key cascade;
drop domain tenant cascade;
alter domain tenant owner to fanout_owner_of_types;
drop owned by fanout_owner_of_types cascade;
alter table keyed drop column part cascade;
alter type part_of_key rename value 'x' to 'z';
alter table keyed rename part to piece;
insert into keyed values (1, 'z', 7);
update keyed set tenant = 8;
select * from messages();
-- but that of a capture that has ended can
select fanout.uncapture('keyed');
alter table keyed drop column piece;
drop table keyed;
drop owned by fanout_owner_of_types;
drop role fanout_owner_of_types;

-- it can while event triggers are off, and that is told
create table unseen (id int primary key, part int, other int);
select fanout.capture('unseen', 'capture_columns', key => '{part,other}');
select item, detail, hint from fanout.check_captures() where item ~ 'unseen';
alter event trigger pg_fanout_schema_changed disable;
alter event trigger pg_fanout_objects_dropped disable;
alter table unseen drop column part;
alter event trigger pg_fanout_schema_changed enable always;
alter event trigger pg_fanout_objects_dropped enable always;
select item, ok, detail, hint from fanout.check_captures() where item ~ 'unseen';
drop table unseen;

-- an excluded value does not get out by way of a primary key
create table people (id int, email text not null, name text);
select fanout.capture('people', 'capture_columns', exclude => '{email}', key => '{id}');
select fanout.capture('people', 'capture_columns', exclude => '{email}', replace => true);
alter table people add primary key (email);
insert into people values (1, 'TOP SECRET', 'Ann');
update people set email = 'SECRET TOO';
select * from messages();
select detail from fanout.check_captures() where item ~ 'people';
create unique index people_id on people (id);
alter table people alter id set not null, replica identity using index people_id;
delete from people;
select * from messages();
select key from captures where entity = 'people'::regclass;
-- "columns" has no such rule: the key names the row
select fanout.capture('people', 'capture_columns', columns => '{name}', key => '{email}', replace => true);
insert into people values (1, 'a@b', 'Ann');
select * from messages();

-- a restored trigger that names a column which is not there is refused
create trigger by_hand after insert on people for each row
    execute function fanout.capture_trigger('capture_columns_2', 'exclude', '{gone}');
create trigger by_hand after insert on people for each row
    execute function fanout.capture_trigger('capture_columns_2', 'columns', '{oops');

-- Numbers that were not recorded: names count.  An excluded name that is not
-- there leaves nothing of the row.
select fanout.declare_topic('capture_columns_2');
select fanout.capture('people', 'capture_columns_2', exclude => '{email}', key => '{id}');
delete from fanout.captured_column where trigger ~ 'capture_columns_2$';
select item, ok, detail from fanout.check_captures() where item ~ 'people.*_2';
insert into people values (2, 'TOP SECRET', 'Bob');
select * from messages() where body::text !~ 'a@b';
alter table people rename email to mail;
insert into people values (3, 'TOP SECRET 3', 'Cid');
select type, key, body from messages() where body::text !~ '@';
select fanout.capture('people', 'capture_columns_2', exclude => '{mail}', key => '{id}', replace => true);
select count(*) from fanout.check_captures() where item ~ 'people.*_2' and not ok;

-- what is dropped leaves nothing behind
drop table typed, plain, by_view, by_matview, by_foreign, parent, things, people, owned;
drop type user_t;
select count(*) from fanout.capture where topic ~ '^capture_columns';
select count(*) from fanout.captured_column where trigger ~ 'capture_columns';
