-- subscriptions: who may, what is refused, and what is remembered
set client_min_messages = warning;
create extension if not exists pg_fanout;
drop role if exists fanout_app, fanout_other, fanout_group;
\set SHOW_CONTEXT never
create role fanout_app login;
create role fanout_other login;
create role fanout_group;
grant usage on schema fanout to fanout_app, fanout_other, fanout_group;
create schema subscribe authorization fanout_app;
grant usage on schema subscribe to fanout_other, fanout_group;

set role fanout_app;
set search_path = subscribe;
create function handler(m fanout.message) returns void language sql as '';
create function "Odd ""name"(m fanout.message[]) returns int language sql as 'select 1';
create function of_two(m fanout.message, i int) returns void language sql as '';
create function of_text(m text) returns void language sql as '';
create function returns_set(m fanout.message) returns setof int language sql as 'select 1';
create procedure a_procedure(m fanout.message) language sql as '';
create function private(m fanout.message) returns void language sql as '';
revoke all on function private from public;

-- nobody may who was not told so
select fanout.subscribe('t', 'g', 'handler(fanout.message)');
select fanout.unsubscribe('t', 'g');
reset role;
grant execute on function fanout.subscribe, fanout.unsubscribe to fanout_app, fanout_other, fanout_group;
set role fanout_app;
-- nor any queue
select fanout.subscribe('t', 'g', 'subscribe.handler(fanout.message)');
select fanout.grant_topic('t', 'fanout_app');
reset role;
select fanout.grant_topic('t', 'fanout_app', '{declare,drop}');
select fanout.grant_topic('t', null);
select fanout.grant_topic('t', 'fanout_app', consumer_group => 'g');
select fanout.grant_topic('t', 'fanout_app', consumer_group => 'g');
set role fanout_app;
begin;
select fanout.subscribe('t', 'g', 'subscribe.handler(fanout.message)');
rollback;
select fanout.subscribe('t', 'other', 'subscribe.handler(fanout.message)');
reset role;
select fanout.revoke_topic('t', 'fanout_app', consumer_group => 'g');
set role fanout_app;
select fanout.subscribe('t', 'g', 'subscribe.handler(fanout.message)');
reset role;
select fanout.grant_topic('t', 'fanout_app'), fanout.grant_topic(null, 'fanout_other'), fanout.grant_topic(null, 'fanout_group');
set role fanout_app;

-- names, numbers, intervals
select fanout.subscribe(null, 'g', 'handler(fanout.message)');
select fanout.subscribe('t', '', 'handler(fanout.message)');
select fanout.subscribe('t', 'g', null);
set role fanout_other;
select fanout.subscribe('amq.t', 'g', 'handler(fanout.message)');
select fanout.subscribe(repeat('t', 200), repeat('g', 200), 'handler(fanout.message)');
set role fanout_app;
select fanout.subscribe('t', 'g', 'handler(fanout.message)', prefetch => 0);
select fanout.subscribe('t', 'g', 'handler(fanout.message)', prefetch => 65536);
select fanout.subscribe('t', 'g', 'handler(fanout.message)', prefetch => null);
select fanout.subscribe('t', 'g', 'handler(fanout.message)', max_attempts => 0);
select fanout.subscribe('t', 'g', 'handler(fanout.message)', retry_delay => '-1 s');
select fanout.subscribe('t', 'g', 'handler(fanout.message)', retry_delay => null);
select fanout.subscribe('t', 'g', 'handler(fanout.message)', retry_delay => '10 min', max_retry_delay => '5 min');
select fanout.subscribe('t', 'g', 'handler(fanout.message)', handler_timeout => '2 days');
select fanout.subscribe('t', 'g', 'handler(fanout.message)', ordered => null);

-- what can be a handler
select fanout.subscribe('t', 'g', 'nowhere(fanout.message)');
select fanout.subscribe('t', 'g', 4294967290::oid::regprocedure);
select fanout.subscribe('t', 'g', 'of_two(fanout.message, int)');
select fanout.subscribe('t', 'g', 'of_text(text)');
select fanout.subscribe('t', 'g', 'returns_set(fanout.message)');
select fanout.subscribe('t', 'g', 'a_procedure(fanout.message)');
select fanout.subscribe('t', 'g', 'pg_catalog.now()');

-- as whom it runs: the role that calls, which needs the rights itself
set role fanout_other;
set search_path = subscribe;
select fanout.subscribe('t', 'g', 'private(fanout.message)');
set role fanout_group;
select fanout.subscribe('t', 'g', 'handler(fanout.message)');
reset role;
revoke connect on database :DBNAME from public;
set role fanout_app;
\set VERBOSITY terse
do $$ begin
    perform fanout.subscribe('t', 'g', 'subscribe.handler(fanout.message)');
exception when insufficient_privilege then
    raise warning '%', replace(sqlerrm, quote_ident(current_database()), '<database>');
end $$;
\set VERBOSITY default
reset role;
grant connect on database :DBNAME to public;
-- also where somebody else's function calls it
create function subscribe.for_somebody() returns void language sql security definer set search_path = fanout
as $$ select subscribe('t', 'definer', 'subscribe.handler(fanout.message)') $$;
alter function subscribe.for_somebody() owner to fanout_other;
set role fanout_app;
select subscribe.for_somebody();
select consumer_group, role from fanout.subscriptions;
reset role;
select consumer_group, role from fanout.subscriptions;

-- declaring
set role fanout_app;
set search_path = subscribe;
select fanout.subscribe('t', 'g', 'handler(fanout.message)');
select fanout.subscribe('t', 'g', 'handler(fanout.message)');
select fanout.subscribe('t', 'batches', '"Odd ""name"(fanout.message[])', 7, 3, '2 s', '1 min', false, '1 h');
select fanout.subscribe('t', 'g', '"Odd ""name"(fanout.message[])', 7, 3, '2 s', '1 min', false, '1 h');
set role fanout_other;
select fanout.subscribe('t', 'g', 'subscribe.handler(fanout.message)');
reset role;
reset search_path;
select topic, consumer_group, queue, handler, role, prefetch, max_attempts, retry_delay, max_retry_delay, ordered, handler_timeout
from fanout.subscriptions order by consumer_group \x\g\x

-- ending: only the role that subscribed, and members of it
set role fanout_other;
select fanout.unsubscribe('t', 'g');
select fanout.unsubscribe('t', 'nobody');
set role fanout_app;
select fanout.unsubscribe('t', 'g');
select fanout.unsubscribe('t', 'g');
reset role;
select consumer_group from fanout.subscriptions order by 1;
-- beginning again, it is the same one still, to the inbox
begin;
set local role fanout_app;
select fanout.subscribe('t', 'g', 'subscribe.handler(fanout.message)', max_attempts => 5);
reset role;
select s.consumer_group, s.subscription_id = min(s.subscription_id) over () as same, s.version, s.max_attempts
from fanout.subscription s where consumer_group = 'g';
rollback;

-- what a dead letter of a subscription is for redrive() and purge(); rolled back, so that no worker sees it
begin;
insert into fanout.dead_letter (topic, consumer_group, message_id, payload, reason, attempts)
values ('t', 'g', gen_random_uuid(), '{}', 'r', 3), ('t', 'batches', gen_random_uuid(), '{}', 'r', 3);
select fanout.redrive('t');
select fanout.redrive('t');
select consumer_group, redriven_at is not null as redriven from fanout.dead_letter order by 1;
select fanout.purge('t', consumer_group => 'g');
select fanout.purge('t');
rollback;
select fanout.redrive('unknown');

-- what stands in the way is seen
set role fanout_app;
alter function subscribe."Odd ""name"(fanout.message[]) rename to even_name;
reset role;
select consumer_group, state, last_error from fanout.stat_subscriptions where state = 'refused' order by 1;
alter function subscribe.even_name(fanout.message[]) rename to "Odd ""name";
alter function subscribe."Odd ""name"(fanout.message[]) owner to fanout_other;
select consumer_group, state, last_error from fanout.stat_subscriptions where state = 'refused' order by 1;
alter function subscribe."Odd ""name"(fanout.message[]) owner to fanout_app;
alter role fanout_app nologin;
select consumer_group, state, last_error from fanout.stat_subscriptions where state = 'refused' order by 1;
alter role fanout_app login;

-- two subscriptions of one queue
create function subscribe.anything(m fanout.message) returns void language sql as '';
select fanout.subscribe('q20', 'b_c', 'subscribe.anything(fanout.message)');
select fanout.subscribe('q20_b', 'c', 'subscribe.anything(fanout.message)');
select fanout.unsubscribe('q20', 'b_c');
select fanout.subscribe('q20_b', 'c', 'subscribe.anything(fanout.message)');
select fanout.unsubscribe('q20_b', 'c');

-- options of failures
select fanout.subscribe('q20', 'c', 'subscribe.anything(fanout.message)', on_failure => 'forget');
select fanout.subscribe('q20', 'c', 'subscribe.anything(fanout.message)', on_failure => 'requeue');
select fanout.subscribe('q20', 'c', 'subscribe.anything(fanout.message)', wait_for => '{foreign_key_violation}');
select fanout.subscribe('q20', 'c', 'subscribe.anything(fanout.message)', max_wait => '-1 s');

-- a name that may be a typing error
set client_min_messages = notice;
begin;
select fanout.subscribe('exchange_usr', 'c', 'subscribe.anything(fanout.message)');
select fanout.unsubscribe('exchange_usr', 'c');
rollback;
begin;
select fanout.declare_topic('exchange_user');
select fanout.subscribe('exchange_user', 'c', 'subscribe.anything(fanout.message)');
rollback;
set client_min_messages = warning;
drop function subscribe.anything;

-- a read-only transaction
begin read only;
select fanout.unsubscribe('t', 'batches');
rollback;

drop owned by fanout_app, fanout_other, fanout_group cascade;
drop role fanout_app, fanout_other, fanout_group;
select consumer_group, state, last_error from fanout.stat_subscriptions order by 1;
-- then anybody may who may at all
select fanout.unsubscribe('t', 'batches');
select fanout.unsubscribe('t', 'definer');
select count(*) from fanout.subscriptions;
