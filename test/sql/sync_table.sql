-- What sync_table() takes, and what it refuses.
\set SHOW_CONTEXT never

create table users (
    id int primary key, name text, email text not null unique, mail text not null, code text not null, nullable text unique,
    lower_name text generated always as (lower(name)) stored, made text not null generated always as ('x') stored unique);
create unique index users_mail on users (mail) where mail is not null;
create unique index users_code on users (code collate "C");
create table no_key (id int);
create view a_view as select 1 as id;
create temp table temporary (id int primary key);
create unlogged table unlogged (id int primary key);
create table deferrable_key (id int primary key deferrable, n int not null unique);
create table deferrable_unique (id int primary key, n int unique deferrable);
create table excluded (id int primary key, r int4range, exclude using gist (r with &&) deferrable);
-- before PostgreSQL 18 no key can be so, and the table has none
select 'create table temporal (id int4range, valid daterange'
    || case when current_setting('server_version_num')::int >= 180000 then ', primary key (id, valid without overlaps)' else '' end || ')' as temporal \gset
:temporal;
create table with_rule (id int primary key);
create rule nothing as on insert to with_rule do instead nothing;
create table parted (id int primary key) partition by range (id);
create unlogged table parted_1 partition of parted default;
create role sync_user login;
create role sync_other login;
grant usage on schema fanout to sync_user, sync_other;
grant execute on function fanout.sync_table, fanout.sync_messages, fanout.unsubscribe to sync_user;
select fanout.grant_topic('t', 'sync_user');

select fanout.sync_table('users', 'b', 'users');
select fanout.sync_table('users', 'b', 'users');
select topic, consumer_group, queue, handler, prefetch, ordered from fanout.subscriptions;
select target, key, columns, source, unknown_columns, ignored_columns, missing_columns from fanout.subscriptions;

-- monitoring may look
set role pg_monitor;
select target, key, missing_columns from fanout.subscriptions;
select count(*) from fanout.stat_subscriptions where topic = 'users';
reset role;

-- declared differently
select fanout.sync_table('users', 'b', 'no_key');
select fanout.sync_table('users', 'b', 'deferrable_key', key => '{n}');
select fanout.sync_table('users', 'b', 'users', key => '{email}');
select fanout.sync_table('users', 'b', 'users', columns => '{"full_name": "name"}');
select fanout.sync_table('users', 'b', 'users', source => 'public.users');
select fanout.sync_table('users', 'b', 'users', unknown_columns => 'error');
select fanout.sync_table('users', 'b', 'users', prefetch => 7);
select fanout.subscribe('users', 'b', 'fanout.sync_messages(fanout.message[])');
select fanout.sync_table('t', 'b', 'users', key => '{email}');

-- the target
select fanout.sync_table('t', 'b', null);
select fanout.sync_table('t', 'b', 'no_key');
select fanout.sync_table('t', 'b', 'a_view');
select fanout.sync_table('t', 'b', 'temporary');
select fanout.sync_table('t', 'b', 'unlogged');
select fanout.sync_table('t', 'b', 'parted');
select fanout.sync_table('t', 'b', 'with_rule');
select fanout.sync_table('t', 'b', 'deferrable_key');
select fanout.sync_table('t', 'b', 'deferrable_unique');
select fanout.sync_table('t', 'b', 'excluded');
select fanout.sync_table('t', 'b', 'temporal');

-- the key
select fanout.sync_table('t', 'b', 'users', key => '{name}');
select fanout.sync_table('t', 'b', 'users', key => '{mail}');
select fanout.sync_table('t', 'b', 'users', key => '{code}');
select fanout.sync_table('t', 'b', 'users', key => '{nullable}');
select fanout.sync_table('t', 'b', 'users', key => '{made}');
select fanout.sync_table('t', 'b', 'users', key => '{}');
select fanout.sync_table('t', 'b', 'users', key => '{nothing}');
begin;
select fanout.unsubscribe('users', 'b');
select fanout.sync_table('t', 'b', 'users', key => '{email}');
rollback;

-- the columns, and the source
select fanout.sync_table('t', 'b', 'users', columns => '[]');
select fanout.sync_table('t', 'b', 'users', columns => '{"a": 1}');
select fanout.sync_table('t', 'b', 'users', columns => '{"a": "nothing"}');
select fanout.sync_table('t', 'b', 'users', columns => '{"a": "name", "b": "name"}');
select fanout.sync_table('t', 'b', 'users', columns => '{"a": "lower_name"}');
select fanout.sync_table('t', 'b', 'users', source => 'users');
select fanout.sync_table('t', 'b', 'users', source => 'a.b.c');
select fanout.sync_table('t', 'b', 'users', source => 'a.');
select fanout.sync_table('t', 'b', 'users', unknown_columns => 'maybe');
begin;
select fanout.sync_table('t', 'b', 'users', source => '"Odd ""schema".users', columns => '{"a": "name"}', unknown_columns => 'error');
select key, columns, source, unknown_columns from fanout.subscriptions where topic = 't';
select fanout.sync_table('t', 'b', 'users', source => '"Odd ""schema".users', columns => '{"a": "name"}', unknown_columns => 'error');
alter table users rename name to renamed;
alter table users rename id to number;
select key, columns from fanout.subscriptions where topic = 't';
select fanout.sync_table('t', 'b', 'users', source => '"Odd ""schema".users', columns => '{"a": "renamed"}', unknown_columns => 'error');
rollback;

-- what subscribe() refuses
select fanout.sync_table('', 'b', 'users');
select fanout.sync_table('t', 'b', 'users', prefetch => 0);
select fanout.sync_table('t', 'b', 'users', retry_delay => null);

create function message(topic text, sequence bigint, body text, headers jsonb default '{}') returns fanout.message language sql as $$
    select row(null, topic, 'b', null, '1', sequence, '{"op": "c", "schema": "s", "table": "t", "format": "row"}' || headers, null,
               convert_to(body, 'UTF8'), null, false, 1, null)::fanout.message
$$;

-- rights: those of the table's owner
set role sync_other;
select fanout.sync_table('t', 'b', 'users');
set role sync_user;
select fanout.sync_table('t', 'b', 'users');
reset role;
grant all on users to sync_user;
set role sync_user;
select fanout.sync_table('t', 'b', 'users');
reset role;
alter table users owner to sync_other;
grant sync_other to sync_user;
alter table users force row level security;
alter table users enable row level security;
set role sync_user;
select fanout.sync_table('t', 'b', 'users');
reset role;
alter table users no force row level security;
revoke delete on users from sync_other;
set role sync_user;
select fanout.sync_table('t', 'b', 'users');
reset role;
grant delete on users to sync_other;
revoke create, usage on schema public from public, sync_other;
set role sync_user;
select fanout.sync_table('t', 'b', 'public.users');
reset role;
grant usage on schema public to public;
grant create on schema public to sync_user, sync_other;
set role sync_user;
select fanout.sync_table('t', 'b', 'users');

select fanout.sync_messages(array[message('users', 1, '{"id": 1}')]);
select fanout.sync_messages(array[message('nothing', 1, '{"id": 1}')]);
select fanout.sync_messages('{}');
select fanout.sync_messages(array[message('t', 1, '{"id":1,"name":"Ann","email":"e","mail":"m","code":"c"}')]);
select id, name from users;
select fanout.unsubscribe('t', 'b');
reset role;
select source_schema, source_table from fanout.sync_target order by 1;

-- begun again for another table, it does not remember the one before
select sequence from fanout.sync_row;
create table people (id int primary key, name text);
alter table people owner to sync_user;
set role sync_user;
select fanout.sync_table('t', 'b', 'people');
reset role;
select sequence from fanout.sync_row;
select target, key from fanout.subscriptions order by 1;

-- what takes a table's place, and what is taken from it, keeps it from being written
create function problem() returns text language sql return (select fanout.sync_problem(subscription_id) from fanout.subscription where topic = 't' and consumer_group = 'b');
set role sync_user;
select fanout.sync_messages(array[message('t', 1, '{"id": 1}')]);
alter table people drop constraint people_pkey;
reset role;
select problem();
set role sync_user;
select fanout.sync_messages(array[message('t', 2, '{"id": 1, "name": "x"}')]);
alter table people add unique (id);
select fanout.sync_messages(array[message('t', 2, '{"id": 1, "name": "x"}')]);
alter table people add unique (name) deferrable;
reset role;
select problem();
alter table people drop constraint people_name_key;
alter table people set unlogged;
select problem();
alter table people set logged;
alter table people owner to sync_other;
select problem();
revoke sync_other from sync_user;
select problem();
set role sync_user;
select fanout.sync_messages(array[message('t', 3, '{"id": 1, "name": "y"}')]);
reset role;
table people;
drop table people;
select problem();
set role sync_user;
select fanout.sync_messages(array[message('t', 1, '{"id": 1}')]);
select fanout.unsubscribe('t', 'b');
reset role;

select fanout.unsubscribe('users', 'b');

-- nothing of a subscription stays when it is deleted by hand
create temp view of_subscriptions as
select 'subscription_bound' as relation, subscription_id from fanout.subscription_bound
union all select 'sync_target', subscription_id from fanout.sync_target
union all select 'sync_column', subscription_id from fanout.sync_column
union all select 'sync_row', subscription_id from fanout.sync_row;
select relation from of_subscriptions join fanout.subscription using (subscription_id) where topic in ('t', 'users') group by 1 order by 1;
delete from fanout.subscription where topic in ('t', 'users');
select relation from of_subscriptions where not exists (select from fanout.subscription s where s.subscription_id = of_subscriptions.subscription_id);
begin;
truncate fanout.subscription;
select relation from of_subscriptions;
rollback;

drop function message, problem;
drop table users, no_key, unlogged, deferrable_key, deferrable_unique, excluded, temporal, with_rule, parted;
drop view a_view;
drop owned by sync_user, sync_other;
drop role sync_user, sync_other;
