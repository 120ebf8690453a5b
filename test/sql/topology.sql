-- topics and bindings: declared twice is declared once, differently is an error
set client_min_messages = warning;
create extension if not exists pg_fanout;
reset client_min_messages;
\set SHOW_CONTEXT never

create view topology as
select topic, format, on_exhausted, consumer_group, queue, queue_type, arguments,
       coalesce(b.state, t.state) as state
from fanout.topics t left join fanout.bindings b using (topic)
where topic like 'topology%'
order by topic collate "C", consumer_group collate "C";

-- a topic has defaults, and declaring it again is a no-op
select fanout.declare_topic('topology');
select fanout.declare_topic('topology');
select fanout.declare_topic('topology', 'debezium', 'hold');
select fanout.declare_topic(topic => 'topology_row', format => 'row', on_exhausted => 'dead_letter');
select fanout.declare_topic(topic => 'topology_row', on_exhausted => 'dead_letter', format => 'row');
select * from topology;

-- a different declaration says what differs
select fanout.declare_topic('topology', 'row');
select fanout.declare_topic('topology', on_exhausted => 'dead_letter');
select fanout.declare_topic('topology_row');

-- unknown choices
select fanout.declare_topic('topology_x', 'avro');
select fanout.declare_topic('topology_x', null);
select fanout.declare_topic('topology_x', on_exhausted => 'give up');
select fanout.declare_topic('topology_x', on_exhausted => null);
select fanout.declare_binding('topology_x', 'g', 'streams');
select fanout.declare_binding('topology_x', 'g', null);

-- a binding declares its topic too, and leaves a topic that exists as it is
select fanout.declare_binding('topology_new', 'g');
select fanout.declare_binding('topology_row', 'g', 'classic', '{"x-max-length": 1000, "x-overflow": "reject-publish"}');
select fanout.declare_binding('topology_row', 'g', 'classic', '{"x-overflow": "reject-publish", "x-max-length": 1000}');
select fanout.declare_binding('topology_new', 'g');
select * from topology;

select fanout.declare_binding('topology_row', 'g');
select fanout.declare_binding('topology_row', 'g', 'classic', '{"x-max-length": 1001, "x-overflow": "reject-publish"}');
select fanout.declare_binding('topology_new', 'g', 'classic');

-- arguments are an object of plain values
select fanout.declare_binding('topology_args', 'g', arguments => '{"n": 1, "s": "x", "b": true, "z": null, "f": 1.5}');
select fanout.declare_binding('topology_args', 'h', arguments => null);
select fanout.declare_binding('topology_args', 'h', arguments => '[1]');
select fanout.declare_binding('topology_args', 'h', arguments => '"x-max-length"');
select fanout.declare_binding('topology_args', 'h', arguments => '{"x": {"y": 1}}');
select fanout.declare_binding('topology_args', 'h', arguments => '{"x": [1]}');
select fanout.declare_binding('topology_args', 'h', arguments => '{"": 1}');
select fanout.declare_binding('topology_args', 'h', arguments => jsonb_build_object(repeat('x', 129), 1));
select fanout.declare_binding('topology_args', 'h', arguments => '{"x-queue-type": "quorum"}');

-- two pairs may not share a queue
select fanout.declare_binding('topology_a', 'b_c');
select fanout.declare_binding('topology_a_b', 'c');
select count(*) as of_the_failed_one from fanout.topics where topic = 'topology_a_b';

-- many at once: arrays, and the comma-separated string with blanks and empty items
select fanout.declare_bindings('{"topology_many": ["g1", "g2"], "topology_list": " g1 ,, g 2,g1 , ",
                                 "topology_none": "", "topology_nobody": [], "topology_blank": " , ,"}');
select fanout.declare_bindings('{"topology_many": "g2,g1,g3", "topology_none": []}');
select topic, consumer_group, queue from topology
where topic in ('topology_many', 'topology_list', 'topology_none', 'topology_nobody', 'topology_blank');
select fanout.declare_bindings('{}');
select fanout.declare_bindings(null);
select fanout.declare_bindings('["topology"]');
select fanout.declare_bindings('"topology"');
select fanout.declare_bindings('{"topology": 1}');
select fanout.declare_bindings('{"topology": null}');
select fanout.declare_bindings('{"topology": {"g": "quorum"}}');
select fanout.declare_bindings('{"topology": ["g", 1]}');
select fanout.declare_bindings('{"topology": ["g", ["h"]]}');
select fanout.declare_bindings('{"topology": [""]}');
-- all or nothing
select fanout.declare_bindings('{"topology_atomic": ["g"], "topology_atomic2": ["amq"], "topology_atomic3": [null]}');
select count(*) as left_behind from fanout.topics where topic like 'topology_atomic%';

-- names
select fanout.declare_topic(null);
select fanout.declare_topic('');
select fanout.declare_topic('amq.topology');
select fanout.declare_topic(e'topology\nx');
select fanout.declare_topic(e'topology\x7f');
select fanout.declare_binding('topology', null);
select fanout.declare_binding(null, 'g');
select fanout.declare_binding('topology', '');
select fanout.declare_binding('topology', 'amq.g');
select fanout.declare_binding('topology', e'g\tx');
-- what AMQP allows: amq without the dot, a group after it, blanks, quotes, dots, anything
select fanout.declare_topic('amq');
select fanout.drop_topic('amq');
select fanout.declare_binding('topology ''"; drop table x; -- $1 %s \', 'g "x"');
select fanout.declare_binding('topology.ünï.€.😀', '日本');
select topic, queue from topology where topic ~ '[^a-z_]';

-- 255 bytes in UTF-8, not characters
select fanout.declare_topic('topology' || repeat('x', 247));
select fanout.declare_topic('topology' || repeat('x', 248));
select fanout.declare_topic('topology' || repeat('€', 82) || 'x');
select fanout.declare_topic('topology' || repeat('€', 82) || 'xx');
select max(octet_length(topic)), count(*) from topology where length(topic) > 80;
-- and so is the queue's name, topic and group taken together
select fanout.declare_binding('topology_long', repeat('g', 241));
select fanout.declare_binding('topology_long', repeat('g', 242));
select fanout.declare_binding('topology_long', repeat('g', 256));
select max(octet_length(queue)) from topology;

-- a failed or rolled-back declaration leaves nothing
begin;
select fanout.declare_binding('topology_rolled_back', 'g');
select queue from fanout.bindings where topic = 'topology_rolled_back';
rollback;
begin;
savepoint s;
select fanout.declare_binding('topology_rolled_back', 'g');
rollback to s;
select fanout.publish('topology_rolled_back', '1');
rollback;
select count(*) as left_behind from fanout.topics where topic = 'topology_rolled_back';

-- a topic that was rolled back and declared anew is not mixed up with the old one
begin;
savepoint s;
select fanout.declare_topic('topology_again');
select fanout.publish('topology_again', '1') is not null as published;
rollback to s;
select fanout.declare_topic('topology_again', 'cloudevents');
select fanout.publish('topology_again', '2') is not null as published;
select t.topic, o.payload::json ->> 'data' as data
from fanout.outbox o join fanout.topic t using (topic_id) where t.topic = 'topology_again';
rollback;

-- dropping: what does not exist
select fanout.drop_topic('topology_unknown');
select fanout.drop_topic(null);
select fanout.drop_binding('topology_unknown', 'g');
select fanout.drop_binding('topology', 'unknown');
select fanout.drop_binding('topology', null);

-- a topic in use is not dropped, and the error lists the reasons
create table topology_entity (id int primary key);
select fanout.declare_binding('topology_used', 'g1');
select fanout.declare_binding('topology_used', 'g2');
select fanout.capture('topology_entity', 'topology_used');
insert into fanout.held (id, xid, topic_id, message_id, payload, created_at)
select -1, '3', topic_id, '00000000-0000-0000-0000-000000000001', '1', now() from fanout.topic where topic = 'topology_used';
select fanout.drop_topic('topology_used');
select fanout.uncapture('topology_entity', 'topology_used');
select fanout.purge('topology_used', held => true);
select fanout.drop_topic('topology_used');

-- a dropped binding is only marked, the publisher deletes the queue
select fanout.drop_binding('topology_used', 'g1');
select fanout.drop_binding('topology_used', 'g2', if_unused => false, if_empty => false);
select consumer_group, state from topology where topic = 'topology_used';
-- its topic waits for that
select fanout.drop_topic('topology_used');
-- declared again, it stays; declared differently, it is still the same queue
select fanout.declare_binding('topology_used', 'g1');
select fanout.declare_binding('topology_used', 'g2', 'classic');
select consumer_group, queue_type, state from topology where topic = 'topology_used';

-- a dropped topic is gone for everybody but the publisher
select fanout.declare_topic('topology_dropped');
select fanout.pause('topology_dropped');
select fanout.drop_topic('topology_dropped');
select topic, state from topology where topic = 'topology_dropped';
select fanout.drop_topic('topology_dropped');
select fanout.publish('topology_dropped', '1');
select fanout.pause('topology_dropped');
select fanout.resume('topology_dropped');
select fanout.capture('topology_entity', 'topology_dropped');
select fanout.drop_binding('topology_dropped', 'g');
-- and may come back as something else, afresh
select fanout.declare_topic('topology_dropped', 'row', 'dead_letter');
select topic, format, on_exhausted, paused, state from fanout.topics where topic = 'topology_dropped';
select fanout.publish('topology_dropped', '1') is not null as published;
-- also by way of a binding
select fanout.drop_topic('topology_dropped');
select fanout.declare_binding('topology_dropped', 'g');
select topic, format, on_exhausted, consumer_group, state from topology where topic = 'topology_dropped';

-- A topic is changed in place, with the captures into it, so that a dump of the schema
-- alone says so, too; what was captured before stays as it was
create table topology_altered (id int primary key, name text);
select fanout.declare_topic('topology_altered');
select fanout.capture('topology_altered', 'topology_altered', "where" => 'id > 0', old_row => true);
begin;
insert into topology_altered values (1, 'a');
select fanout.alter_topic('topology_altered', format => 'row');
insert into topology_altered values (2, 'b');
select payload::jsonb ? 'source' as debezium, headers ->> 'format' as format
from fanout.outbox where type like '%topology_altered%' or headers ->> 'table' = 'topology_altered' order by id;
rollback;
select fanout.alter_topic('topology_altered', format => 'cloudevents', on_exhausted => 'dead_letter');
select format, on_exhausted from fanout.topics where topic = 'topology_altered';
select name, args from fanout.capture_trigger_list where topic = 'topology_altered' order by name;
-- declaring both again is a no-op
select fanout.declare_topic('topology_altered', 'cloudevents', 'dead_letter');
select fanout.capture('topology_altered', 'topology_altered', "where" => 'id > 0', old_row => true);
select fanout.alter_topic('topology_altered', on_exhausted => 'hold', format => 'debezium');
select name, args from fanout.capture_trigger_list where topic = 'topology_altered' order by name;
select fanout.capture('topology_altered', 'topology_altered', "where" => 'id > 0', old_row => true);
drop table topology_altered;

-- SQLSTATEs are part of the interface
create function sqlstate_of(command text) returns text language plpgsql as $$
begin
    execute command;
    return 'no error';
exception when others then
    return sqlstate;
end $$;
select sqlstate_of(command), command from unnest(array[
    $$select fanout.declare_topic(null)$$,
    $$select fanout.declare_topic('')$$,
    $$select fanout.declare_topic(e'a\nb')$$,
    $$select fanout.declare_topic(repeat('x', 256))$$,
    $$select fanout.declare_topic('amq.x')$$,
    $$select fanout.declare_topic('topology', 'avro')$$,
    $$select fanout.declare_topic('topology', 'row')$$,
    $$select fanout.alter_topic('topology_unknown', 'row')$$,
    $$select fanout.alter_topic('topology', 'avro')$$,
    $$select fanout.alter_topic('topology', on_exhausted => 'never')$$,
    $$select fanout.declare_binding('topology', 'g', 'lazy')$$,
    $$select fanout.declare_binding('topology_new', 'g', 'classic')$$,
    $$select fanout.declare_binding('topology_a_b', 'c')$$,
    $$select fanout.declare_bindings('[]')$$,
    $$select fanout.drop_topic('topology_unknown')$$,
    $$select fanout.drop_topic('topology_used')$$,
    $$select fanout.drop_binding('topology', 'unknown')$$]) command;

drop table topology_entity;
drop view topology;
drop function sqlstate_of;
