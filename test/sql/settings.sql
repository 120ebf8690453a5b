-- settings are validated when they are set, and keep their secrets
set client_min_messages = warning;
create extension if not exists pg_fanout;
drop role if exists fanout_user;
reset client_min_messages;
\set SHOW_CONTEXT never

select name, vartype, unit, min_val, max_val, boot_val, context from pg_settings where name like 'pg\_fanout.%' order by name collate "C";
-- pg_settings leaves the URI out, and SHOW masks the password in it, also from superusers
set pg_fanout.uri = 'amqp://user:secret@one:1/a, amqps://only_user@two, amqp://three/b';
show pg_fanout.uri;
reset pg_fanout.uri;
select count(*) as without_description from pg_settings where name like 'pg\_fanout.%' and (short_desc is null or short_desc !~ '\.$');

-- ranges: 22023; the words differ between versions
\set VERBOSITY sqlstate
set pg_fanout.heartbeat = -1;
set pg_fanout.heartbeat = 3601;
set pg_fanout.heartbeat = '1 min';
show pg_fanout.heartbeat;
set pg_fanout.confirm_timeout = 999;
set pg_fanout.confirm_timeout = '2 h';
set pg_fanout.connect_timeout = 0;
set pg_fanout.max_in_flight = 0;
set pg_fanout.max_in_flight = 65536;
set pg_fanout.max_in_flight = 65535;
set pg_fanout.retry_interval = 0;
set pg_fanout.retry_limit = 0;
set pg_fanout.retention = 0;
set pg_fanout.retention = '7 d';
show pg_fanout.retention;
set pg_fanout.retention = 'forever';
set pg_fanout.tls_verify = perhaps;
set pg_fanout.max_databases = 5;
set pg_fanout.max_subscriptions = 5;
set pg_fanout.inbox_retention = 0;
set pg_fanout.consumer_memory = 1;
\set VERBOSITY default
reset all;
-- a typing error is one, from PostgreSQL 15 on
create function sqlstate_of(command text) returns text language plpgsql as $$
begin
    execute command;
    return 'no error';
exception when others then
    return sqlstate;
end $$;
select sqlstate_of($$set pg_fanout.urri = 'amqp://localhost'$$) =
       case when current_setting('server_version_num')::int < 150000 then 'no error' else '42602' end as as_expected;
drop function sqlstate_of;

-- URIs that are good
set pg_fanout.uri = 'amqp://localhost';
set pg_fanout.uri = 'amqps://user:secret@broker.example.org:5671/vhost';
set pg_fanout.uri = 'amqp://a, amqp://b:5673/%2F,amqps://[::1]:5671/x';
-- and bad ones, whose error shows nothing of them
set pg_fanout.uri = '';
set pg_fanout.uri = 'http://user:secret@localhost';
set pg_fanout.uri = 'localhost:5672';
set pg_fanout.uri = 'amqp://user:secret@localhost:99999';
set pg_fanout.uri = 'amqp://user:sec:ret@localhost:x';
set pg_fanout.uri = 'amqp://user:secret@localhost/a/b';
set pg_fanout.uri = 'amqp://user:sec%zzret@localhost';
set pg_fanout.uri = 'amqp://user:secret@localhost,,amqp://b';
set pg_fanout.uri = 'amqp://user:secret@a,ftp://user:secret@b';
select set_config('pg_fanout.uri', 'secret', true);
alter system set pg_fanout.uri = 'amqp://user:secret@localhost:x';
-- the one that was set before is still in force
show pg_fanout.uri;
reset pg_fanout.uri;

-- what everybody can read has no password in it
select current_database() as db \gset
create role fanout_user;
alter database :"db" set pg_fanout.uri = 'amqp://user:secret@localhost';
alter database :"db" set pg_fanout.uri = 'amqp://localhost,amqp://user:secret@localhost';
alter role fanout_user set pg_fanout.uri = 'amqp://user:secret@localhost';
alter role fanout_user in database :"db" set pg_fanout.uri = 'amqp://user:secret@localhost';
alter role all set pg_fanout.uri = 'amqp://user:secret@localhost';
create function secret() returns void language sql set pg_fanout.uri = 'amqp://user:secret@localhost' as '';
select count(*) as stored from pg_db_role_setting where setconfig::text ~ 'secret';
alter database :"db" set pg_fanout.uri = 'amqp://user@localhost:1';
alter database :"db" set pg_fanout.uri = 'amqp://guest:guest@localhost:1';
alter database :"db" set pg_fanout.max_in_flight = 100;
alter database :"db" set pg_fanout.max_in_flight = 0;
alter database :"db" set pg_fanout.max_databases = 5;
select c from pg_db_role_setting s join pg_database d on d.oid = setdatabase, unnest(setconfig) c
where datname = current_database() and setrole = 0 and c ~ 'fanout';
alter database :"db" reset pg_fanout.uri;
alter database :"db" reset pg_fanout.max_in_flight;

-- others than superusers neither see the secret ones nor set any; the server's words differ between its versions
\set VERBOSITY sqlstate
set role fanout_user;
show pg_fanout.uri;
select current_setting('pg_fanout.uri');
select current_setting('pg_fanout.uri', true);
show pg_fanout.password_file;
show pg_fanout.tls_key_file;
select name from pg_settings where name like 'pg\_fanout.%' and name in ('pg_fanout.uri', 'pg_fanout.password_file', 'pg_fanout.tls_key_file', 'pg_fanout.tls_cert_file', 'pg_fanout.tls_ca_file');
show pg_fanout.heartbeat;
set pg_fanout.uri = 'amqp://localhost';
set pg_fanout.heartbeat = 10;
set pg_fanout.tls_verify = off;
set pg_fanout.retention = 1;
alter role fanout_user set pg_fanout.max_in_flight = 1;
reset role;
drop role fanout_user;
