-- A queue of dead letters: what can be refused is refused when it is declared.
\set SHOW_CONTEXT never
set client_min_messages = warning;
create extension if not exists pg_fanout;
create schema dead_letter;
create function dead_letter.error(command text) returns text language plpgsql as $$
declare
    message text;
    detail text;
    hint text;
begin
    execute command;
    return 'no error';
exception when others then
    get stacked diagnostics message = message_text, detail = pg_exception_detail, hint = pg_exception_hint;
    return concat_ws(' ', sqlstate, message, detail, hint);
end
$$;

-- ---- what is declared ----

select fanout.declare_binding('dead', 'g', dead_letter => true);
select fanout.declare_binding('dead', 'g', dead_letter => true);
select fanout.declare_binding('dead', 'seven', 'quorum', '{"x-delivery-limit": 7, "x-max-length": 5, "x-overflow": "reject-publish"}', true);
select fanout.declare_binding('dead', 'without', arguments => '{"x-delivery-limit": 7}');
select queue, queue_type, arguments, dead_letter, dead_letters from fanout.bindings where topic = 'dead' order by queue;
select queue, fanout.queue_arguments(b) from fanout.binding b where queue like 'dead%' order by queue;
select * from fanout.declarations() d where d like '%''dead''%';

-- ---- what is refused ----

select type, dead_letter.error(format('select fanout.declare_binding(%L, %L, %L, dead_letter => true)', 'dead', 'h', type))
from unnest('{classic,stream,lazy}'::text[]) type;
select arguments, dead_letter.error(format('select fanout.declare_binding(%L, %L, arguments => %L, dead_letter => true)', 'dead', 'h', arguments))
from unnest(array['{"x-dead-letter-exchange": "elsewhere"}', '{"x-dead-letter-exchange": null}', '{"x-dead-letter-routing-key": "dead_h"}',
    '{"x-dead-letter-strategy": "at-most-once"}', '{"x-overflow": "drop-head"}', '{"x-overflow": "reject-publish-dlx"}', '{"x-overflow": null}',
    '{"x-delivery-limit": -1}', '{"x-delivery-limit": null}', '{"x-delivery-limit": "5"}', '{"x-delivery-limit": 1.5}',
    '{"x-delivery-limit": true}', '{"x-delivery-limit": 2147483647}', '{"x-max-age": "7D"}', '[]']) arguments;
select dead_letter.error($$select fanout.declare_binding('dead', 'h', arguments => null, dead_letter => true)$$);
select dead_letter.error($$select fanout.declare_binding('dead', 'h', dead_letter => null)$$);
select dead_letter.error($$select fanout.declare_binding('dead', repeat('x', 250), dead_letter => true)$$);
select dead_letter.error($$select fanout.declare_binding('dead', 'g')$$);
select dead_letter.error($$select fanout.declare_binding('dead', 'without', arguments => '{"x-delivery-limit": 7}', dead_letter => true)$$);

-- ---- names that meet ----

select dead_letter.error($$select fanout.declare_binding('dead', 'g_dead')$$);
select dead_letter.error($$select fanout.declare_binding('dead', 'g_dead', dead_letter => true)$$);
select dead_letter.error($$select fanout.declare_binding('dead', 'other_dead')$$);
select dead_letter.error($$select fanout.declare_binding('dead', 'other', dead_letter => true)$$);
select dead_letter.error($$select fanout.declare_binding('dead', 'other')$$);

create function dead_letter.note(m fanout.message) returns void language sql as 'select';
select dead_letter.error($$select fanout.subscribe('dead', 'g_dead', 'dead_letter.note(fanout.message)')$$);
select dead_letter.error($$select fanout.subscribe('dead', 'later_dead', 'dead_letter.note(fanout.message)')$$);
select dead_letter.error($$select fanout.declare_binding('dead', 'later', dead_letter => true)$$);
select fanout.unsubscribe('dead', 'later_dead');

-- ---- recover_dead() ----

select arguments, dead_letter.error(format('select fanout.recover_dead(%s)', arguments))
from unnest(array['null, ''g''', '''dead'', null', '''none'', ''g''', '''dead'', ''none''', '''dead'', ''without''']) arguments;
select fanout.recover_dead('dead', 'g') > 0;
select dead_letter.error(format('select fanout.cancel_backfill(%s)', id)) from fanout.backfills where kind = 'recover_dead';
select kind, entity, topic, consumer_group, rows_done, state from fanout.backfills where kind = 'recover_dead';
begin read only;
select fanout.recover_dead('dead', 'g');
rollback;

create role regress_dead_letter;
grant usage on schema fanout to regress_dead_letter;
set role regress_dead_letter;
select fanout.recover_dead('dead', 'g');
select fanout.declare_binding('dead', 'h', dead_letter => true);
reset role;

select fanout.drop_binding('dead', 'g');
select queue, state from fanout.bindings where topic = 'dead' order by queue;
select item, ok, detail, hint from fanout.check_topology() where item like 'dead letters%' order by item collate "C";
drop owned by regress_dead_letter;
drop role regress_dead_letter;
drop schema dead_letter cascade;
delete from fanout.backfill where topic = 'dead';
delete from fanout.binding where queue like 'dead%';
delete from fanout.subscription where topic = 'dead';
delete from fanout.topic where topic = 'dead';
