-- a capture of a partitioned table, or of one with heirs, covers what belongs to it
set client_min_messages = warning;
create extension if not exists pg_fanout;
reset client_min_messages;
\set SHOW_CONTEXT never
create schema capture_partition;
set search_path = capture_partition;

create table seen (id bigint);
create function messages(out type text, out key text, out before json, out after json)
returns setof record language sql volatile as $$
    with new as (
        select o.*, t.topic from fanout.outbox o join fanout.topic t using (topic_id)
        where t.topic = 'capture_partition' and not exists (select from seen s where s.id = o.id)
    ), now_seen as (
        insert into seen select id from new
    )
    select type, key, payload::json -> 'before', payload::json -> 'after'
    from new order by id
$$;
select fanout.declare_topic('capture_partition');

create table event (id int, day date, note text, primary key (id, day)) partition by range (day);
create table event_2023 partition of event for values from ('2023-01-01') to ('2024-01-01');
create table event_2024 (note text, dropped int, day date not null, id int not null);
alter table event_2024 drop dropped;
alter table event attach partition event_2024 for values from ('2024-01-01') to ('2025-01-01');
select fanout.capture('event', 'capture_partition', '{insert,update,delete,truncate}');
-- one capture, not one for each partition
select entity, topic from fanout.captures where topic = 'capture_partition';

-- through the parent or not, messages look the same: its name, its key
insert into event values (1, '2023-05-01', 'a'), (2, '2024-05-01', 'b');
insert into event_2024 (id, day, note) values (3, '2024-06-01', 'c');
update event set note = 'B' where id = 2;
select * from messages();
select distinct headers - 'op' as headers, payload::json -> 'source' ->> 'schema' as schema, payload::json -> 'source' ->> 'table' as table
from fanout.outbox o join fanout.topic t using (topic_id) where t.topic = 'capture_partition';

-- to another partition: the server makes a delete and an insert of it
update event set day = '2024-05-01' where id = 1;
-- in the same one: an update of the key
update event set day = '2024-05-02' where id = 1;
select * from messages();

-- attached later: captured from then on; detached: no longer
create table event_2025 (like event);
insert into event_2025 values (4, '2025-01-01', 'before it was attached');
alter table event attach partition event_2025 for values from ('2025-01-01') to ('2026-01-01');
insert into event values (5, '2025-01-01', 'attached');
alter table event detach partition event_2023;
insert into event_2023 values (6, '2023-01-01', 'detached');
create table event_rest partition of event default;
insert into event values (7, '2030-01-01', 'rest');
select * from messages();

-- of two levels
create table event_2026 partition of event for values from ('2026-01-01') to ('2027-01-01') partition by list (id);
create table event_2026_1 partition of event_2026 for values in (1);
insert into event values (1, '2026-01-01', 'deep');
insert into event_2026_1 values (1, '2026-01-02', 'deep');
select * from messages();

-- TRUNCATE is the parent's
truncate event_rest;
truncate event;
select * from messages();

-- a renamed column is renamed below, too
select fanout.uncapture('event');
select fanout.capture('event', 'capture_partition', exclude => '{note}', key => '{day,id}');
insert into event values (1, '2026-01-01', 'secret');
alter table event rename note to remark;
alter table event rename id to number;
insert into event values (11, '2024-01-01', 'secret'), (1, '2026-01-02', 'secret');
select key, exclude from fanout.captures where entity = 'event'::regclass;
select * from messages();
-- and one that the key names is not dropped, from nowhere
create table plain (id int, a int, b int) partition by list (a);
create table plain_1 partition of plain for values in (1);
select fanout.capture('plain', 'capture_partition', key => '{b}', columns => '{id,b}');
alter table plain drop column b;
alter table plain drop column id;
insert into plain values (1, 2);
select * from messages();

-- renamed, the table gives its new name to what its partitions make
alter table event rename to happening;
insert into event_2024 (number, day, remark) values (12, '2024-01-02', 'x');
create schema capture_partition_2;
alter table happening set schema capture_partition_2;
insert into event_2024 (number, day, remark) values (13, '2024-01-02', 'x');
select type, key from messages();
-- the partition's own name is nobody's business
alter table event_2024 rename to any_name;
insert into any_name (number, day, remark) values (14, '2024-01-02', 'x');
select type, key from messages();

-- uncapture goes for all of them; a partition alone cannot be let go
select fanout.uncapture('any_name');
insert into any_name (number, day, remark) values (15, '2024-01-02', 'x');
select fanout.uncapture('capture_partition_2.happening');
insert into any_name (number, day, remark) values (16, '2024-01-02', 'x');
select type, key from messages();

-- a partition alone may be captured, under its own name
select fanout.capture('any_name', 'capture_partition');
insert into capture_partition_2.happening values (17, '2024-01-02', 'x'), (17, '2026-01-02', 'x') on conflict do nothing;
select type, key from messages();
-- which then stands in the way of its parent's capture into the same topic
select fanout.capture('capture_partition_2.happening', 'capture_partition');
select fanout.uncapture('any_name');
drop table capture_partition_2.happening;

-- a condition in partitions whose columns are in another order
create table measure (id int, place text, value int) partition by list (place);
create table measure_a partition of measure for values in ('a');
create table measure_b (value int, place text, id int);
alter table measure attach partition measure_b for values in ('b');
select fanout.capture('measure', 'capture_partition', key => '{id}', "when" => 'new.value > 5 and old is null or old.value > 5 and new is null');
insert into measure values (1, 'a', 10), (2, 'b', 10), (3, 'a', 1), (4, 'b', 1);
update measure set place = 'b' where place = 'a';
delete from measure;
select * from messages();

-- heirs: PostgreSQL does not inherit triggers, and neither do we
create table parent (id int primary key, a text);
create table child (b text) inherits (parent);
select fanout.capture('parent', 'capture_partition', exclude => '{a}');
insert into parent values (1, 'x');
insert into child values (2, 'y', 'z');
update parent set a = 'u';
select * from messages();
select fanout.capture('child', 'capture_partition', exclude => '{a}');
update parent set a = 'v';
-- a rename goes to both
alter table parent rename a to alpha;
update parent set alpha = 'w';
select * from messages();

set client_min_messages = warning;
drop schema capture_partition, capture_partition_2 cascade;
