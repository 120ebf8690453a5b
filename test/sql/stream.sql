-- Stream queues: what can be refused is refused when it is declared.
\set SHOW_CONTEXT never
set client_min_messages = warning;
set timezone = 'Europe/Vienna';
set datestyle = 'German';
create extension if not exists pg_fanout;
create schema stream;
create function stream.anything(m fanout.message) returns void language sql as '';

create function stream.error(command text) returns text language plpgsql as $$
declare
    message text;
    hint text;
begin
    execute command;
    return 'no error';
exception when others then
    get stacked diagnostics message = message_text, hint = pg_exception_hint;
    return concat_ws(' ', sqlstate, message, hint);
end
$$;

-- ---- arguments of a stream ----

select fanout.declare_binding('stream', 'kept', 'stream',
    '{"x-max-age": "7D", "x-max-length-bytes": 20000000000, "x-stream-max-segment-size-bytes": 3000000000, "x-initial-cluster-size": 3, "x-queue-leader-locator": "balanced", "mine": true, "x-overflow": null}');
select queue, queue_type, arguments from fanout.bindings where topic = 'stream';
select arguments, stream.error(format('select fanout.declare_binding(%L, %L, %L, %L)', 'stream', 'g', 'stream', arguments))
from unnest(array['{"x-overflow": "reject-publish"}', '{"x-dead-letter-exchange": ""}', '{"x-dead-letter-strategy": "at-least-once"}',
    '{"x-delivery-limit": 3}', '{"x-max-priority": 3}', '{"x-message-ttl": 1000}', '{"x-expires": 1000}', '{"x-max-length": 10}',
    '{"x-single-active-consumer": true}', '{"x-quorum-initial-group-size": 3}', '{"x-queue-mode": "lazy"}',
    '{"x-max-age": "7 days"}', '{"x-max-age": 7}', '{"x-max-age": "7d"}', '{"x-max-age": "-7D"}',
    '{"x-max-length-bytes": 0}', '{"x-max-length-bytes": 1.5}', '{"x-max-length-bytes": "1000"}', '{"x-max-length-bytes": 9223372036854775808}',
    '{"x-stream-max-segment-size-bytes": 3000000001}', '{"x-initial-cluster-size": 0}', '{"x-initial-cluster-size": true}',
    '{"x-queue-type": "stream"}']) arguments;
select type, arguments, stream.error(format('select fanout.declare_binding(%L, %L, %L, %L)', 'stream', 'g', type, arguments))
from unnest('{quorum,classic}'::text[]) type,
     unnest(array['{"x-max-age": "7D"}', '{"x-stream-max-segment-size-bytes": 1000}', '{"x-initial-cluster-size": 3}']) arguments;
select stream.error($$select fanout.declare_binding('stream', 'kept', 'stream', '{"x-max-age": "8D"}')$$);
select stream.error($$select fanout.declare_binding('stream', 'kept')$$);

-- ---- where to begin ----

select fanout.declare_binding('stream', 'quorum');
select start_at, stream.error(format('select fanout.subscribe(%L, %L, %L, start_at => %L)', 'stream', 'g', 'stream.anything(fanout.message)', start_at))
from unnest(array['', 'First', 'first ', 'end', '-1', '1.5', '9223372036854775808', '99999999999999999999999', 'infinity', '-infinity', '1969-12-31', '3000-01-01 00:00',
    '2026-02-30', '1 h', '2024-01-01 00:00 Nowhere/City', e'\n']) start_at;
select stream.error($$select fanout.subscribe('stream', 'kept', 'stream.anything(fanout.message)')$$);
select stream.error($$select fanout.subscribe('stream', 'quorum', 'stream.anything(fanout.message)', start_at => 'first')$$);
select stream.error($$select fanout.subscribe('stream', 'kept', 'stream.anything(fanout.message)', start_at => 'first', ordered => false, on_failure => 'requeue')$$);
select stream.error($$select fanout.sync_table('stream', 'quorum', 'stream.copy', start_at => 'first')$$)
from (select stream.error('create table stream.copy (id int primary key)')) x;
select stream.error($$select fanout.sync_table('stream', 'kept', 'stream.copy')$$);

begin;
select fanout.subscribe('stream', start_at, 'stream.anything(fanout.message)', start_at => start_at)
from unnest('{first,last,next,0,007,9223372036854775807,01.07.2024 12:00:00,2024-07-01 12:00:00.5+00,epoch}'::text[]) start_at;
select consumer_group, start_at, stream_offset, missed from fanout.subscriptions order by subscribed_at, consumer_group collate "C";
-- the same again is none; in another session's words, too
select fanout.subscribe('stream', '01.07.2024 12:00:00', 'stream.anything(fanout.message)', start_at => '2024-07-01 10:00Z');
select stream.error($$select fanout.subscribe('stream', 'first', 'stream.anything(fanout.message)', start_at => 'next')$$);
select stream.error($$select fanout.alter_subscription('stream', 'first', start_at => 'nowhere')$$);
select stream.error($$select fanout.alter_subscription('stream', 'first', ordered => false, on_failure => 'requeue')$$);
select d from fanout.declarations() d where d like '%subscribe%' order by d collate "C";
rollback;

-- a place is forgotten with its queue, or when the stream is read anew, and only then
begin;
select fanout.subscribe('foreign', 'g', 'stream.anything(fanout.message)', start_at => 'first');
insert into fanout.stream_offset (inbox_id, stream_offset, message_id) select inbox_id, 41, gen_random_uuid() from fanout.subscription where topic = 'foreign';
select start_at, stream_offset from fanout.subscriptions;
select fanout.alter_subscription('foreign', 'g', prefetch => 7);
select start_at, stream_offset from fanout.subscriptions;
select fanout.unsubscribe('foreign', 'g');
select fanout.subscribe('foreign', 'g', 'stream.anything(fanout.message)', start_at => 'next');
select start_at, stream_offset from fanout.subscriptions;
savepoint s;
select fanout.alter_subscription('foreign', 'g', start_at => 'next');
select start_at, stream_offset from fanout.subscriptions;
rollback to s;
select fanout.unsubscribe('foreign', 'g', drop_queue => true);
select fanout.subscribe('foreign', 'g', 'stream.anything(fanout.message)', start_at => 'next');
select start_at, stream_offset from fanout.subscriptions;
rollback;

-- nobody who has no rights sees or moves a place
create role fanout_nobody;
grant usage on schema fanout to fanout_nobody;
grant execute on function fanout.subscribe, fanout.alter_subscription to fanout_nobody;
select fanout.subscribe('stream', 'kept', 'stream.anything(fanout.message)', start_at => 'first');
set role fanout_nobody;
select * from fanout.stream_offset;
select fanout.alter_subscription('stream', 'kept', start_at => 'first');
reset role;
select fanout.unsubscribe('stream', 'kept');
drop owned by fanout_nobody;
drop role fanout_nobody;

drop schema stream cascade;
delete from fanout.subscription where topic = 'stream';
delete from fanout.binding where queue like 'stream%';
delete from fanout.topic where topic = 'stream';
