-- What sync_table() takes, and what it refuses.

create table users (
    id int primary key, name text, email text unique, mail text,
    lower_name text generated always as (lower(name)) stored,
    unique (name, email) deferrable);
create unique index users_mail on users (mail) where mail is not null;
create table no_key (id int);
create view a_view as select 1 as id;
create temp table temporary (id int primary key);
create role sync_user login;
create role sync_other login;
grant usage on schema fanout to sync_user, sync_other;
grant execute on function fanout.sync_table, fanout.sync_messages, fanout.unsubscribe to sync_user;
select fanout.grant_topic('t', 'sync_user');

select fanout.sync_table('users', 'b', 'users');
select fanout.sync_table('users', 'b', 'users');
select topic, consumer_group, queue, handler, prefetch, ordered from fanout.subscriptions;
select subscription_id > 0 as ok, target, key, columns, floor from fanout.sync_target;

-- declared differently
select fanout.sync_table('users', 'b', 'no_key');
select fanout.sync_table('users', 'b', 'users', key => '{email}');
select fanout.sync_table('users', 'b', 'users', columns => '{"full_name": "name"}');
select fanout.sync_table('users', 'b', 'users', prefetch => 7);
select fanout.subscribe('users', 'b', 'fanout.sync_messages(fanout.message[])');

-- the target
select fanout.sync_table('t', 'b', null);
select fanout.sync_table('t', 'b', 'no_key');
select fanout.sync_table('t', 'b', 'a_view');
select fanout.sync_table('t', 'b', 'temporary');

-- the key
select fanout.sync_table('t', 'b', 'users', key => '{name}');
select fanout.sync_table('t', 'b', 'users', key => '{mail}');
select fanout.sync_table('t', 'b', 'users', key => '{name,email}');
select fanout.sync_table('t', 'b', 'users', key => '{}');
select fanout.sync_table('t', 'b', 'users', key => '{nothing}');
begin;
select fanout.sync_table('t', 'b', 'users', key => '{email}');
rollback;

-- the columns
select fanout.sync_table('t', 'b', 'users', columns => '[]');
select fanout.sync_table('t', 'b', 'users', columns => '{"a": 1}');
select fanout.sync_table('t', 'b', 'users', columns => '{"a": "nothing"}');
select fanout.sync_table('t', 'b', 'users', columns => '{"a": "name", "b": "name"}');

-- what subscribe() refuses
select fanout.sync_table('', 'b', 'users');
select fanout.sync_table('t', 'b', 'users', prefetch => 0);
select fanout.sync_table('t', 'b', 'users', retry_delay => null);

-- rights
set role sync_other;
select fanout.sync_table('t', 'b', 'users');
set role sync_user;
select fanout.sync_table('t', 'b', 'users');
reset role;
grant select, insert, update on users to sync_user;
set role sync_user;
select fanout.sync_table('t', 'b', 'users');
reset role;
grant delete on users to sync_user;
set role sync_user;
select fanout.sync_table('t', 'b', 'users');
select fanout.sync_messages(array[row(null, 'users', 'b', null, '1', 1, '{}', '{"id": 1}', '', null, false, 1, null)]::fanout.message[]);
select fanout.sync_messages(array[row(null, 'nothing', 'b', null, '1', 1, '{}', '{"id": 1}', '', null, false, 1, null)]::fanout.message[]);
select fanout.sync_messages('{}');
select fanout.sync_messages(array[row(null, 't', 'b', null, '1', 1, '{}', '{"id": 1, "name": "Ann"}', '', null, false, 1, null)]::fanout.message[]);
select id, name from users;
select fanout.unsubscribe('t', 'b');
reset role;

-- begun again for another table, it does not remember the one before
select key, sequence from fanout.sync_row;
create table people (id int primary key, name text);
grant all on people to sync_user;
set role sync_user;
select fanout.sync_table('t', 'b', 'people');
reset role;
select key, sequence from fanout.sync_row;
select target, key from fanout.sync_target order by 1;

-- a table that is dropped
drop table people;
set role sync_user;
select fanout.sync_messages(array[row(null, 't', 'b', null, '1', 1, '{}', '{"id": 1}', '', null, false, 1, null)]::fanout.message[]);
select fanout.unsubscribe('t', 'b');
reset role;

select fanout.unsubscribe('users', 'b');
drop table users, no_key;
drop view a_view;
drop owned by sync_user, sync_other;
drop role sync_user, sync_other;
