-- who may do what: nobody anything, until an administrator grants it
set client_min_messages = warning;
create extension if not exists pg_fanout;
drop role if exists fanout_owner, fanout_writer, fanout_monitor, fanout_nobody, fanout_group;
reset client_min_messages;
\set SHOW_CONTEXT never
create role fanout_owner;
create role fanout_writer;
create role fanout_monitor in role pg_monitor;
create role fanout_nobody;
create role fanout_group;
create schema privileges;
grant create, usage on schema privileges to public;
set search_path = privileges;
select fanout.declare_binding('privileges', 'g');

-- the catalogs: what everybody has been granted
select 'schema' as kind, nspname::text as name from pg_namespace, aclexplode(nspacl) a where nspname = 'fanout' and a.grantee = 0
union all
select 'function', p.oid::regprocedure::text from pg_proc p, aclexplode(coalesce(proacl, acldefault('f', proowner))) a
where pronamespace = 'fanout'::regnamespace and a.grantee = 0
union all
select 'relation', c.oid::regclass::text from pg_class c, aclexplode(coalesce(relacl, acldefault('r', relowner))) a
where relnamespace = 'fanout'::regnamespace and a.grantee = 0
union all
select 'default', defaclobjtype::text from pg_default_acl where defaclnamespace = 'fanout'::regnamespace;

-- what others than the owner have been granted: pg_monitor, and everybody what capture triggers call
select a.grantee::regrole, p.oid::regprocedure::text as object, a.privilege_type
from pg_proc p, aclexplode(p.proacl) a where pronamespace = 'fanout'::regnamespace and a.grantee <> p.proowner
union all
select a.grantee::regrole, c.oid::regclass::text, a.privilege_type
from pg_class c, aclexplode(c.relacl) a where relnamespace = 'fanout'::regnamespace and a.grantee <> c.relowner
order by 1, 2;

-- a function in SQL or PL/pgSQL, and any that runs as its owner, has a search path of its own
select p.oid::regprocedure as unsafe
from pg_proc p join pg_language l on l.oid = prolang
where pronamespace = 'fanout'::regnamespace
  and (l.lanname <> 'c' or prosecdef)
  and not coalesce('search_path=pg_catalog, pg_temp' = any (proconfig), false);
select count(*) filter (where l.lanname <> 'c') > 20 as many, count(*) filter (where prosecdef) > 10 as many_as_owner
from pg_proc p join pg_language l on l.oid = prolang where pronamespace = 'fanout'::regnamespace;
-- all that the extension has made is described
select pg_describe_object(d.classid, d.objid, d.objsubid) as without_comment
from pg_depend d
where d.deptype = 'e' and d.refclassid = 'pg_extension'::regclass
  and d.refobjid = (select oid from pg_extension where extname = 'pg_fanout')
  and obj_description(d.objid, d.classid::regclass::name) is null
  and d.classid <> 'pg_type'::regclass
  and not (d.classid = 'pg_class'::regclass and (select relkind in ('i', 'I') from pg_class where oid = d.objid))
order by 1;
select attrelid::regclass as view, attname as column_without_comment
from pg_attribute join pg_class c on c.oid = attrelid
where relnamespace = 'fanout'::regnamespace and relkind = 'v' and attnum > 0
  and obj_description(attrelid, 'pg_class') not like 'internal:%' and col_description(attrelid, attnum) is null
order by 1, attnum;

-- a role that may write the table makes messages, and may do nothing else
set role fanout_owner;
create table entity (id int primary key, a text);
grant insert, update, delete, select, truncate on entity to fanout_writer;
reset role;
select fanout.capture('entity', 'privileges', '{insert,update,delete,truncate}', "when" => 'new.a is null or new.a <> ''unseen''');
set role fanout_writer;
insert into entity values (1, 'x'), (2, 'unseen');
update entity set a = 'y';
delete from entity;
truncate entity;
copy entity from stdin;
3	copied
\.
select current_user, has_schema_privilege('fanout', 'usage') as usage;
select * from fanout.outbox;
insert into fanout.outbox_0 select 0;
select fanout.publish('privileges', '1');
reset role;
select key, headers ->> 'op' as op from fanout.outbox o join fanout.topic t using (topic_id) where topic = 'privileges' order by o.id;

-- not even with the schema open
grant usage on schema fanout to fanout_writer, fanout_owner, fanout_nobody;
set role fanout_writer;
insert into entity values (4, 'z');
create function attempt(command text) returns text language plpgsql as $$
begin
    execute command;
    return 'allowed';
exception when insufficient_privilege then
    return sqlerrm;
when others then
    return 'allowed, but: ' || sqlerrm;
end $$;
reset role;
set role fanout_nobody;
select attempt(c) from unnest(array[
    'select * from fanout.outbox', 'select * from fanout.outbox_0', 'select * from fanout.outbox_status',
    'insert into fanout.outbox values (0, 1, 1, ''3'', 1, gen_random_uuid(), null, null, null, ''1'', null, now())',
    'insert into fanout.outbox_0 values (0, 1, 1, ''3'', 1, gen_random_uuid(), null, null, null, ''1'', null, now())',
    'delete from fanout.outbox', 'truncate fanout.outbox_1', 'lock table fanout.outbox in access exclusive mode',
    'update fanout.sent set last_id = 0', 'select nextval(''fanout.outbox_id_seq'')', 'select setval(''fanout.outbox_id_seq'', 1)',
    'select * from fanout.outbox_id_seq', 'select * from fanout.held', 'select * from fanout.dead_letter',
    'select * from fanout.topic', 'select * from fanout.topics', 'select * from fanout.bindings', 'select * from fanout.captures',
    'select * from fanout.pending', 'select * from fanout.stat_publisher', 'select * from fanout.stat_topics',
    'update fanout.rotation set current = 1', 'create table fanout.mine ()', 'create view mine as select * from fanout.topic',
    'create table mine_too (i int references fanout.topic)', 'alter table fanout.topic add x int', 'drop view fanout.captures',
    'alter event trigger pg_fanout_schema_changed disable'
]) c;
select * from mine;
-- no function but those of the conditions of capture triggers, and of their creation
select p.oid::regprocedure as may_execute from pg_proc p where pronamespace = 'fanout'::regnamespace and has_function_privilege(p.oid, 'execute');
select c.oid::regclass as may_use from pg_class c where relnamespace = 'fanout'::regnamespace and relkind in ('r', 'p', 'v')
and has_table_privilege(c.oid, 'select, insert, update, delete, truncate, references, trigger');
select attempt(c) from unnest(array[
    $$select fanout.declare_topic('mine')$$, $$select fanout.declare_binding('mine', 'g')$$, $$select fanout.declare_bindings('{}')$$,
    $$select fanout.drop_topic('privileges')$$, $$select fanout.drop_binding('privileges', 'g')$$,
    $$select fanout.capture('entity', 'privileges')$$, $$select fanout.uncapture('entity')$$, $$select fanout.publish('privileges', '1')$$,
    $$select fanout.pause('privileges')$$, $$select fanout.resume('privileges')$$, $$select fanout.redrive()$$, $$select fanout.purge()$$,
    $$select fanout.flush('0')$$, $$select fanout.verify('0')$$, $$select fanout.check()$$, $$select fanout.publisher_status()$$,
    $$select fanout.set_trigger_arguments(0, '{}')$$, $$select fanout.trigger_arguments(0)$$]) c;
reset role;

-- the owner of a table may not capture it without being told so, nor by hand
set role fanout_owner;
select fanout.capture('entity', 'privileges');
select fanout.uncapture('entity');
create table by_hand (id int);
create trigger t after insert on by_hand for each row execute function fanout.capture_trigger('privileges');
-- he owns the table, though, and so the trigger that was made on it
drop trigger pg_fanout_truncate_privileges on entity;
alter table entity disable trigger pg_fanout_insert_privileges;
alter table entity enable trigger pg_fanout_insert_privileges;
alter table entity rename a to b;
alter table entity drop column b cascade;
alter table entity add column a text;
reset role;
select operations from fanout.captures where entity = 'entity'::regclass;

-- pg_monitor sees how it goes, and no message
set role fanout_monitor;
select count(*) from fanout.topics where topic = 'privileges';
select queue, state from fanout.bindings where topic = 'privileges';
select topic, held, dead from fanout.stat_topics where topic = 'privileges';
select count(*) from fanout.stat_publisher;
select count(*) >= 0 as readable from fanout.captures;
select has_function_privilege('fanout.check()', 'execute') as may_check;
select attempt(c) from unnest(array[
    'select * from fanout.outbox', 'select * from fanout.outbox_status', 'select * from fanout.held', 'select * from fanout.dead_letter',
    'select * from fanout.pending', 'select fanout.publish(''privileges'', ''1'')', 'select fanout.pause(''privileges'')', 'select fanout.purge()']) c;
reset role;

-- what an administrator grants for capturing: the functions, what they look up, and the one of the triggers
grant execute on function fanout.capture, fanout.capture_trigger,
    fanout.uncapture
to fanout_owner;
create table not_his (id int primary key);
grant select, insert on not_his to fanout_owner;
-- and the topic: neither capture() nor a trigger made by hand does without
set role fanout_owner;
select fanout.capture('entity', 'privileges', "when" => 'true', replace => true);
create trigger by_hand after insert on entity for each row execute function fanout.capture_trigger('privileges');
reset role;
select fanout.grant_topic('privileges', 'fanout_owner', '{capture}');
set role fanout_owner;
select fanout.capture('entity', 'privileges', "when" => 'true', replace => true);
select fanout.capture('entity', 'privileges', "when" => 'true');
select fanout.capture('entity', 'privileges');
insert into entity values (5);
select fanout.capture('not_his', 'privileges');
select fanout.capture('fanout.topic', 'privileges');
select fanout.capture('entity', 'not declared');
select fanout.declare_topic('not granted');
select * from fanout.outbox;
select fanout.uncapture('entity');
select fanout.uncapture('entity');
select fanout.capture('entity', 'privileges', '{insert}');
reset role;
-- the right to create triggers on it is enough
grant trigger on not_his to fanout_owner;
set role fanout_owner;
select fanout.capture('not_his', 'privileges', '{insert}');
insert into not_his values (6);
select fanout.uncapture('not_his');
reset role;
select key, headers ->> 'table' as "table" from fanout.outbox o join fanout.topic t using (topic_id) where topic = 'privileges' and key in ('5', '6') order by o.id;
-- granted with everything else, the one that writes catalogs still asks for a superuser
grant execute on all functions in schema fanout to fanout_owner;
set role fanout_owner;
select fanout.set_trigger_arguments((select oid from pg_trigger where tgrelid = 'entity'::regclass), '{x}');
select fanout.publish('privileges', '1', 'by the owner') is not null as published;
reset role;
select fanout.grant_topic('privileges', 'fanout_owner', '{publish}');
set role fanout_owner;
select fanout.publish('privileges', '1', 'by the owner') is not null as published;
-- declaring, by topic or by queue
select fanout.declare_topic('granted');
select fanout.declare_binding('privileges', 'g');
select fanout.declare_bindings('{"privileges": ["g"]}');
select fanout.drop_topic('privileges');
reset role;
select fanout.grant_topic('privileges', 'fanout_owner', '{publish}', 'g');
select fanout.grant_topic('privileges', 'fanout_owner', '{declare}', 'g'), fanout.grant_topic('granted', 'fanout_owner', '{declare}', 'g');
set role fanout_owner;
select fanout.declare_binding('privileges', 'g');
select fanout.declare_binding('privileges', 'h');
select fanout.declare_binding('granted', 'g');
select fanout.drop_binding('privileges', 'g');
reset role;
select fanout.revoke_topic('granted', 'fanout_owner', '{declare}', 'g'), fanout.grant_topic('granted', 'fanout_group', '{declare}');
grant fanout_group to fanout_owner;
grant usage on schema fanout to fanout_group;
grant execute on function fanout.drop_binding to fanout_group;
set role fanout_owner;
select fanout.declare_bindings('{"granted": ["g"]}');
reset role;
revoke fanout_group from fanout_owner;
alter role fanout_owner noinherit;
grant fanout_group to fanout_owner;
set role fanout_owner;
select fanout.drop_binding('granted', 'g');
set role fanout_group;
select fanout.drop_binding('granted', 'g');
set role fanout_owner;
-- a renamed column is followed on behalf of the owner, who may not do it himself
select fanout.uncapture('entity');
select fanout.capture('entity', 'privileges', '{insert}', columns => '{id}');
reset role;
revoke execute on all functions in schema fanout from fanout_owner;
set role fanout_owner;
alter table entity rename id to number;
insert into entity values (7);
select fanout.publish('privileges', '1');
reset role;
select key, payload::json ->> 'after' as after from fanout.outbox o join fanout.topic t using (topic_id) where topic = 'privileges' order by o.id desc limit 2;

-- row-level security is that of the table, not of the messages
alter table entity enable row level security;
grant insert on entity to fanout_writer;
create policy p on entity for insert with check (number <> 8);
set role fanout_writer;
insert into entity values (8);
insert into entity values (9);
reset role;
select key from fanout.outbox o join fanout.topic t using (topic_id) where topic = 'privileges' order by o.id desc limit 1;

set client_min_messages = warning;
drop schema privileges cascade;
drop owned by fanout_owner, fanout_writer, fanout_monitor, fanout_nobody, fanout_group;
drop role fanout_owner, fanout_writer, fanout_monitor, fanout_nobody, fanout_group;
