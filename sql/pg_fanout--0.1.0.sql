-- complain if the script is sourced in psql rather than by CREATE EXTENSION
\echo Use "CREATE EXTENSION pg_fanout" to load this file. \quit

-- A schema of that name that exists already could hold somebody's traps, so
-- it is created here, never adopted.
create schema fanout;
comment on schema fanout is 'pg_fanout: transactional outbox for RabbitMQ';
revoke all on schema fanout from public;


-- ---------------------------------------------------------------------------
-- Library
-- ---------------------------------------------------------------------------

create function fanout.library_version() returns text
language c stable strict parallel safe
as 'MODULE_PATHNAME', 'pgf_library_version';
comment on function fanout.library_version() is
'version of the loaded library; differs from the extension''s between an upgrade of the package and the restart';
revoke all on function fanout.library_version() from public;

create function fanout.preloaded() returns boolean
language c stable strict parallel safe
as 'MODULE_PATHNAME', 'pgf_preloaded';
comment on function fanout.preloaded() is
'is the library in shared_preload_libraries of the running server? Without that, messages are written but nobody publishes them';
revoke all on function fanout.preloaded() from public;

create function fanout.wake_publisher() returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_wake_publisher';
comment on function fanout.wake_publisher() is
'internal: makes the publisher read topics, bindings and held messages again once this transaction has committed';
revoke all on function fanout.wake_publisher() from public;

create function fanout.wake_consumers() returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_wake_consumers';
comment on function fanout.wake_consumers() is
'internal: makes the consumers of this database look for dead letters to redrive once this transaction has committed';
revoke all on function fanout.wake_consumers() from public;

create function fanout.topology_changed() returns trigger
language c volatile
as 'MODULE_PATHNAME', 'pgf_topology_changed';
comment on function fanout.topology_changed() is
'internal: statement trigger on topics and bindings, does what wake_publisher() does';
revoke all on function fanout.topology_changed() from public;


-- ---------------------------------------------------------------------------
-- Topology: what shall exist on the broker
-- ---------------------------------------------------------------------------

-- Tables are heaps, whatever default_table_access_method says: rows are locked,
-- and some are written without the executor (segment.c).

create sequence fanout.topic_id_seq as integer;
comment on sequence fanout.topic_id_seq is 'internal: ids of topics';
revoke all on sequence fanout.topic_id_seq from public;

create table fanout.topic (
    topic_id     integer primary key default nextval('fanout.topic_id_seq'),
    topic        text not null unique,
    format       text not null default 'debezium'
                 check (format in ('debezium', 'row', 'cloudevents')),
    on_exhausted text not null default 'hold'
                 check (on_exhausted in ('hold', 'dead_letter')),
    paused       boolean not null default false,
    dropping     boolean not null default false,
    declared_at  timestamptz,
    last_error   text
) using heap;
alter sequence fanout.topic_id_seq owned by fanout.topic.topic_id;
comment on table fanout.topic is
'internal: one row per topic, that is, per durable fanout exchange; see the view fanout.topics';
revoke all on fanout.topic from public;

-- A transaction that began before may still commit messages of a topic that was dropped.
create table fanout.dropped_topic (
    topic_id   integer primary key,
    topic      text        not null,
    dropped_at timestamptz not null default clock_timestamp()
) using heap;
comment on table fanout.dropped_topic is
'internal: names of topics that were dropped, for what becomes a dead letter because of that; they are kept for 30 days';
revoke all on fanout.dropped_topic from public;

create function fanout.keep_dropped_name() returns trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    delete from fanout.dropped_topic d where d.dropped_at < clock_timestamp() - interval '30 days';
    insert into fanout.dropped_topic (topic_id, topic) values (old.topic_id, old.topic) on conflict do nothing;
    return null;
end
$$;
comment on function fanout.keep_dropped_name() is 'internal: trigger on fanout.topic';
revoke all on function fanout.keep_dropped_name() from public;

create trigger dropped_name after delete on fanout.topic
for each row execute function fanout.keep_dropped_name();
alter table fanout.topic enable always trigger dropped_name;

-- topic_id has no foreign key, because pg_restore -j would copy this table
-- before the other.  keep_topic() and drop_topic() do what it would do.
create table fanout.binding (
    topic_id       integer not null,
    consumer_group text not null,
    queue          text not null unique,
    queue_type     text not null check (queue_type in ('quorum', 'classic', 'stream')),
    arguments      jsonb not null default '{}',
    dead_letter    boolean not null default false,
    dead_letters   bigint,
    drop_if_unused boolean,     -- not null: to be dropped
    drop_if_empty  boolean,
    declared_at    timestamptz,
    last_error     text,
    primary key (topic_id, consumer_group),
    check (not (dead_letter and queue like '%\_dead'))
) using heap;
-- No queue has the name of another one's queue of dead letters, in no isolation level.
create unique index binding_dead_queue on fanout.binding
    ((case when queue like '%\_dead' then queue when dead_letter then queue || '_dead' end));
comment on table fanout.binding is
'internal: one row per consumer group of a topic, that is, per queue; see the view fanout.bindings';
comment on column fanout.binding.dead_letter is 'there is a queue of dead letters, whose name is the queue''s with "_dead" after it';
comment on column fanout.binding.dead_letters is 'messages in it when the publisher last looked';
revoke all on fanout.binding from public;

-- Which database these tables belong to.  CREATE EXTENSION writes a row, and a
-- dump brings the row of the database that it was made from.  So a database
-- whose only row is its own is no copy.
create table fanout.identity (
    system_identifier bigint not null,
    database          oid    not null,
    name              text   not null
) using heap;
alter table fanout.identity replica identity full;
comment on table fanout.identity is
'internal: the database that owns this extension''s tables, and those whose dumps were restored into it; see fanout.activate()';
comment on column fanout.identity.system_identifier is 'of the server; 0: triggers of a dump came without their topics';
comment on column fanout.identity.name is 'of the database when the row was written';
revoke all on fanout.identity from public;

create function fanout.this_database() returns fanout.identity
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select s.system_identifier, d.oid, d.datname::text
    from pg_control_system() s, pg_database d where d.datname = current_database()
$$;
comment on function fanout.this_database() is 'internal: the row of this database in fanout.identity';
revoke all on function fanout.this_database() from public;

insert into fanout.identity select * from fanout.this_database();

-- Definitions travel with pg_dump, messages do not.
select pg_extension_config_dump('fanout.identity', '');
select pg_extension_config_dump('fanout.topic_id_seq', '');
select pg_extension_config_dump('fanout.topic', '');
select pg_extension_config_dump('fanout.binding', '');

-- The publisher compares this table with its last snapshot before each batch,
-- so that it declares what a transaction declared before it publishes what
-- the same transaction wrote.
create table fanout.topology_change (
    xid xid8 not null
) using heap;
-- deleted from without a key: a publication FOR ALL TABLES must not forbid it
alter table fanout.topology_change replica identity full;
comment on table fanout.topology_change is
'internal: transactions that changed topics or bindings; emptied by the publisher once it has read them';
revoke all on fanout.topology_change from public;

-- Columns in which the publisher records the broker's answers are left out.
create trigger topology_changed
after insert or delete or truncate or update of topic, format, on_exhausted, paused, dropping
on fanout.topic
for each statement execute function fanout.topology_changed();

create trigger topology_changed
after insert or delete or truncate or update of queue, queue_type, arguments, dead_letter, drop_if_unused, drop_if_empty
on fanout.binding
for each statement execute function fanout.topology_changed();

-- also in sessions, and apply workers, of session_replication_role = replica
alter table fanout.topic enable always trigger topology_changed;
alter table fanout.binding enable always trigger topology_changed;


-- ---------------------------------------------------------------------------
-- Outbox
-- ---------------------------------------------------------------------------

-- CACHE 1: ids of two transactions that change the same row one after the
-- other must come in that order.
-- Ids begin at the microseconds since 1970, and whenever the server has started or
-- was promoted, the first session moves the sequence on to them.  So they never go
-- back: not in a database that was restored, nor after the extension was dropped
-- and created again.
create sequence fanout.outbox_id_seq cache 1;
select setval('fanout.outbox_id_seq', (extract(epoch from clock_timestamp()) * 1000000)::bigint);
comment on sequence fanout.outbox_id_seq is 'internal: ids of outbox rows, the header "sequence" of their messages';
revoke all on sequence fanout.outbox_id_seq from public;

create table fanout.outbox (
    segment    smallint    not null,
    database   oid         not null,
    id         bigint      not null,
    xid        xid8        not null,
    topic_id   integer     not null,
    message_id uuid        not null,
    type       text,
    key        text,
    headers    jsonb,
    payload    text        not null,
    queue      text,
    created_at timestamptz not null
) partition by list (segment);
comment on table fanout.outbox is
'internal: messages, insert-only, in a ring of three segments; see the view fanout.outbox_status';
comment on column fanout.outbox.database is 'where the row was written: a database made from a template has rows of the template';
comment on column fanout.outbox.xid is 'top-level transaction that wrote the row';
comment on column fanout.outbox.payload is 'the body, JSON, rendered when the row was written';
comment on column fanout.outbox.queue is 'NULL: to the topic''s exchange; otherwise to this queue alone';
revoke all on fanout.outbox from public;

create table fanout.outbox_0 partition of fanout.outbox for values in (0) using heap;
create table fanout.outbox_1 partition of fanout.outbox for values in (1) using heap;
create table fanout.outbox_2 partition of fanout.outbox for values in (2) using heap;
-- repair_ledger() updates them, which a publication FOR ALL TABLES must not forbid
alter table fanout.outbox_0 replica identity full;
alter table fanout.outbox_1 replica identity full;
alter table fanout.outbox_2 replica identity full;
comment on table fanout.outbox_0 is 'internal: a segment of the outbox';
comment on table fanout.outbox_1 is 'internal: a segment of the outbox';
comment on table fanout.outbox_2 is 'internal: a segment of the outbox';
revoke all on fanout.outbox_0, fanout.outbox_1, fanout.outbox_2 from public;

-- Rows that went another way than the library's own: they lie wherever there was room.
-- Rows that were deleted by hand: what lay behind them may be cut off.
create table fanout.scattered (
    xid     xid8     not null,
    segment smallint not null
) using heap;
create index scattered_xid_idx on fanout.scattered (xid);
-- deleted from without a key: a publication FOR ALL TABLES must not forbid it
alter table fanout.scattered replica identity full;
comment on table fanout.scattered is
'internal: transactions whose rows may be anywhere in a segment of the outbox, or that have deleted some, so that the publisher reads the segment as a whole; emptied by the publisher';
revoke all on fanout.scattered from public;

create table fanout.rotation (
    current    smallint    not null,
    rotated_at timestamptz not null
) using heap;
alter table fanout.rotation replica identity full;
create unique index rotation_one_row on fanout.rotation ((true));
comment on table fanout.rotation is 'internal: one row, the segment that new messages go to, and since when';
insert into fanout.rotation values (0, now());
revoke all on fanout.rotation from public;

create sequence fanout.sent_id_seq;
comment on sequence fanout.sent_id_seq is 'internal: numbers of entries in the ledger';
revoke all on sequence fanout.sent_id_seq from public;

create table fanout.sent (
    segment smallint    not null,
    sent_id bigint      not null default nextval('fanout.sent_id_seq'),
    topic_id integer,
    attached boolean,
    base    pg_snapshot not null,
    target  pg_snapshot not null,
    last_id bigint      not null,
    count   integer     not null,
    sent_at timestamptz not null default clock_timestamp(),
    files   oid[]       not null default '{0,0,0}',
    unread  bigint[]    not null default '{0,0,0}'
) partition by list (segment);
create table fanout.sent_0 partition of fanout.sent for values in (0) using heap;
create table fanout.sent_1 partition of fanout.sent for values in (1) using heap;
create table fanout.sent_2 partition of fanout.sent for values in (2) using heap;
create index sent_main_idx on fanout.sent (sent_id) where topic_id is null;
create index sent_topic_id_idx on fanout.sent (topic_id, sent_id) where topic_id is not null;
create index sent_sent_at_idx on fanout.sent (sent_at);
comment on table fanout.sent_0 is 'internal: a segment of the ledger';
comment on table fanout.sent_1 is 'internal: a segment of the ledger';
comment on table fanout.sent_2 is 'internal: a segment of the ledger';
comment on table fanout.sent is
'internal: the ledger, insert-only, in a ring of three segments. An outbox row is sent if it is visible in the newest entry''s base, or visible in its target with an id up to last_id, and is neither held nor dead. That is the main cursor''s entry, or the topic''s own unless that says attached';
comment on column fanout.sent.topic_id is 'whose entry it is, of a topic that has left the main cursor or joins it again; NULL: the main cursor''s';
comment on column fanout.sent.attached is 'true: from here on the main cursor''s entries are true for the topic';
comment on column fanout.sent.files is 'for each segment of the outbox, the file (pg_class.relfilenode) that "unread" is about';
comment on column fanout.sent.unread is
'for each segment, a block: as long as it is that file, all rows before it that are ever committed are visible in base';
-- What this transaction writes is still to be sent, and so is what any other
-- transaction writes that has not ended yet.  Its own snapshot would not do: it
-- does not list this transaction as in progress.  Before xmin, which is this
-- transaction at most, all have ended, and there was no outbox to write to.
-- sent_id is not taken from the sequence: with wal_level = minimal, one that is used in
-- the transaction that creates it goes back to what it was then, if the server crashes
-- before the next checkpoint.  The newest entry would not be the one with the highest.
insert into fanout.sent (segment, sent_id, base, target, last_id, count)
select 0, 0, base, base, 0, 0
from (select format('%1$s:%1$s:', pg_snapshot_xmin(pg_current_snapshot()))::pg_snapshot as base) first;
revoke all on fanout.sent, fanout.sent_0, fanout.sent_1, fanout.sent_2 from public;

-- A loose scan of the index on topic_id: there are few topics and many entries.
create view fanout.topic_entry as
with recursive topic(topic_id) as (
    select min(topic_id) from fanout.sent where topic_id is not null
    union all
    select (select min(s.topic_id) from fanout.sent s where s.topic_id > t.topic_id)
    from topic t where t.topic_id is not null
)
select s.* from topic t, lateral (
    select * from fanout.sent s where s.topic_id = t.topic_id order by s.sent_id desc limit 1) s;
comment on view fanout.topic_entry is
'internal: the newest entry in the ledger of each topic that has left the main cursor of the publisher, or did';
revoke all on fanout.topic_entry from public;

create view fanout.detached as
select * from fanout.topic_entry where not attached;
comment on view fanout.detached is
'internal: the newest entry of each topic that has left the main cursor of the publisher';
revoke all on fanout.detached from public;

-- A loose end of fanout.purge(): removed once the topic rides with the main cursor.
create table fanout.purged (
    purged_id  uuid        primary key default gen_random_uuid(),
    topic_id   integer     not null,
    snapshot   pg_snapshot not null,
    message_id uuid
) using heap;
comment on table fanout.purged is
'internal: messages that fanout.purge() gave up before the publisher read them: all that the snapshot shows of the topic, or a single one';
revoke all on fanout.purged from public;

-- Of two snapshots up to the same transaction, the later one lists fewer as in progress.
create function fanout.purged_order(mark fanout.purged) returns numeric[]
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select array[pg_snapshot_xmax(mark.snapshot)::text::numeric, -(select count(*) from pg_snapshot_xip(mark.snapshot))]
$$;
comment on function fanout.purged_order(fanout.purged) is 'internal: a later mark of fanout.purge() has a greater one';
revoke all on function fanout.purged_order(fanout.purged) from public;

-- One that is empty, or not of this server, knows of nothing that was sent.
create view fanout.main_position as
select coalesce(s.base, '3:3:') as base, coalesce(s.target, '3:3:') as target, coalesce(s.last_id, 0) as last_id,
       s.files, s.unread
from (select) one left join (select * from fanout.sent where topic_id is null order by sent_id desc limit 1) s
     on greatest(pg_snapshot_xmax(s.base), pg_snapshot_xmax(s.target)) <= pg_snapshot_xmax(pg_current_snapshot());
comment on view fanout.main_position is 'internal: where the publisher''s main cursor is';
revoke all on fanout.main_position from public;

create view fanout.topic_position as
select d.topic_id, d.base, d.target, d.last_id, d.files, d.unread,
       (select p.snapshot from fanout.purged p where p.topic_id = d.topic_id and p.message_id is null
        order by fanout.purged_order(p) desc limit 1) as purged,
       (select array_agg(p.message_id) from fanout.purged p
        where p.topic_id = d.topic_id and p.message_id is not null) as purged_messages
from fanout.detached d
where greatest(pg_snapshot_xmax(d.base), pg_snapshot_xmax(d.target)) <= pg_snapshot_xmax(pg_current_snapshot());
comment on view fanout.topic_position is 'internal: where each topic is that has left the main cursor';
revoke all on fanout.topic_position from public;

-- The first place in each segment that may have a message which was not sent.
create view fanout.first_place as
with place as (
    select case when p.files[1] = pg_relation_filenode('fanout.outbox_0') and c.segments & 1 = 0
                then format('(%s,0)', p.unread[1])::tid else '(0,0)' end as first_0,
           case when p.files[2] = pg_relation_filenode('fanout.outbox_1') and c.segments & 2 = 0
                then format('(%s,0)', p.unread[2])::tid else '(0,0)' end as first_1,
           case when p.files[3] = pg_relation_filenode('fanout.outbox_2') and c.segments & 4 = 0
                then format('(%s,0)', p.unread[3])::tid else '(0,0)' end as first_2
    from (select base, files, unread from fanout.main_position
          union all
          select base, files, unread from fanout.topic_position) p,
         lateral (select coalesce(bit_or(1 << segment), 0) from fanout.scattered
                  where not pg_visible_in_snapshot(xid, p.base)) c(segments)
)
select min(first_0) as first_0, min(first_1) as first_1, min(first_2) as first_2 from place;
comment on view fanout.first_place is 'internal: part of fanout.pending';
revoke all on fanout.first_place from public;

create table fanout.held (
    id         bigint primary key,
    xid        xid8        not null,
    topic_id   integer     not null,
    message_id uuid        not null,
    type       text,
    key        text,
    headers    jsonb,
    payload    text        not null,
    queue      text,
    created_at timestamptz not null,
    held_at    timestamptz not null default clock_timestamp()
) using heap;
create index held_topic_id_idx on fanout.held (topic_id, id);
comment on table fanout.held is
'internal: messages that are sent before those in the outbox: redriven ones, and what a paused or stalled topic had not sent of a segment that was emptied; see the view fanout.outbox_status';
revoke all on fanout.held from public;

create table fanout.dead_letter (
    dead_id        bigint generated always as identity primary key,
    id             bigint,
    topic          text        not null,
    consumer_group text,
    message_id     uuid        not null,
    type           text,
    key            text,
    headers        jsonb,
    payload        text,
    raw            bytea,
    content_type   text,
    queue          text,
    xid            xid8,
    created_at     timestamptz,
    reason         text        not null,
    sqlstate       text,
    attempts       integer     not null,
    dead_at        timestamptz not null default clock_timestamp(),
    redriven_at    timestamptz
) using heap;
-- not of those with consumer_group null alone: a search by message_id would use that
create index dead_letter_id_idx on fanout.dead_letter (id);
create index dead_letter_message_id_idx on fanout.dead_letter (message_id);
create index dead_letter_redriven_at_idx on fanout.dead_letter (topic, consumer_group, dead_id) where redriven_at is not null;
comment on table fanout.dead_letter is
'messages that the publisher gave up, and that the handlers of subscriptions failed on too often; fanout.redrive() tries them again, fanout.purge() removes them';
comment on column fanout.dead_letter.dead_id is 'number of the dead letter';
comment on column fanout.dead_letter.id is 'the header "sequence", of the publisher''s the outbox id; NULL: the message has none';
comment on column fanout.dead_letter.consumer_group is 'whose subscription gave it up; NULL: the publisher did';
comment on column fanout.dead_letter.message_id is 'the message id, stable over all attempts';
comment on column fanout.dead_letter.payload is 'the body as text; NULL: see raw';
comment on column fanout.dead_letter.raw is 'the body of a delivery that this database''s encoding cannot hold unchanged';
comment on column fanout.dead_letter.content_type is 'of a delivery';
comment on column fanout.dead_letter.queue is 'of the publisher: NULL: meant for the topic''s exchange; otherwise for this queue alone';
comment on column fanout.dead_letter.created_at is 'when the change was made; NULL: the delivery does not say';
comment on column fanout.dead_letter.reason is 'why it was given up, in the words of the broker or of the error; while a handler tries it again, behind the words that say so';
comment on column fanout.dead_letter.sqlstate is 'of the handler''s error; 57P01 while it is tried again';
comment on column fanout.dead_letter.attempts is 'attempts made; 0: it could not even be tried';
comment on column fanout.dead_letter.dead_at is 'when it was given up';
comment on column fanout.dead_letter.redriven_at is 'since when the subscription is to try it again; NULL: it is not';
comment on sequence fanout.dead_letter_dead_id_seq is 'internal: numbers of dead letters';
revoke all on sequence fanout.dead_letter_dead_id_seq from public;
revoke all on fanout.dead_letter from public;

-- How many rows fanout.held and fanout.dead_letter have, by topic and consumer group.
-- Nobody who looks counts them.  Each statement that changes them adds to fanout.tally
-- by how much, in its own transaction.  Each total is true for one snapshot, and the
-- entries of the transactions that this snapshot does not show are added to it:
--
--      total, for the snapshot in fanout.counted
--        + entries of transactions in progress then   (xid in the snapshot's list)
--        + entries of later transactions              (xid >= the snapshot's xmax)
--
-- An entry without a number says that rows went or changed uncounted: as long as it would
-- be added, all rows are counted.  That is an insertion, too, because a transaction of
-- REPEATABLE READ does not see, and cannot remove, what was written since it began.
--
-- So an entry that was added to a total is not looked at again, however long it stays.
-- The publisher adds them up (fanout.add_tallies()) and removes them.
create table fanout.tally (
    xid            xid8    not null default pg_current_xact_id(),
    topic_id       integer not null,
    topic          text    not null,
    consumer_group text    not null,
    count          bigint,
    first_id       bigint,
    oldest         timestamptz
) using heap;
create index tally_xid_idx on fanout.tally (xid);
-- deleted from without a key: a publication FOR ALL TABLES must not forbid it
alter table fanout.tally replica identity full;
comment on table fanout.tally is
'internal: by how much a statement changed the number of rows in fanout.held (topic_id) or fanout.dead_letter (topic, and consumer_group, which is empty for the publisher''s); what does not apply is 0 or empty';
comment on column fanout.tally.count is 'NULL: by an unknown number, of any topics';
comment on column fanout.tally.first_id is 'of fanout.held, the lowest id of the rows that came; NULL: rows went';
comment on column fanout.tally.oldest is 'likewise, when the oldest one was made';
revoke all on fanout.tally from public;

create table fanout.total (
    topic_id       integer not null,
    topic          text    not null,
    consumer_group text    not null,
    count          bigint  not null,
    first_id       bigint,
    oldest         timestamptz,
    primary key (topic_id, topic, consumer_group)
) using heap with (fillfactor = 50);
comment on table fanout.total is 'internal: as fanout.tally, of all that fanout.counted shows';
comment on column fanout.total.first_id is 'there are no rows with a lower id';
comment on column fanout.total.oldest is 'when the oldest row was made, as of the last time that entries were added up';
revoke all on fanout.total from public;

create table fanout.counted (
    one      boolean     primary key default true check (one),
    snapshot pg_snapshot not null
) using heap;
comment on table fanout.counted is
'internal: one row, what fanout.total is true for; no row: the publisher counts all rows anew, and until then whoever looks does';
revoke all on fanout.counted from public;

create function fanout.note_tallies(entries integer) returns void
language c volatile strict
as 'MODULE_PATHNAME', 'pgf_note_tallies';
comment on function fanout.note_tallies(integer) is
'internal: tells the publisher of new entries in fanout.tally, and wakes it once there are many';
revoke all on function fanout.note_tallies(integer) from public;

-- What a TRUNCATE took away, or an UPDATE made something else, is found by counting anew.
create function fanout.tally_change() returns trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    sign integer := case tg_op when 'INSERT' then 1 else -1 end;
    entries integer;
begin
    if tg_op in ('TRUNCATE', 'UPDATE') then
        insert into fanout.tally (topic_id, topic, consumer_group) values (0, '', '');
        entries := 1000;    -- to be counted soon
    elsif tg_table_name = 'held' then
        insert into fanout.tally (topic_id, topic, consumer_group, count, first_id, oldest)
        select c.topic_id, '', '', sign * count(*),
               case when sign > 0 then min(c.id) end, case when sign > 0 then min(c.created_at) end
        from changed c group by c.topic_id;
        get diagnostics entries = row_count;
    else
        insert into fanout.tally (topic_id, topic, consumer_group, count)
        select 0, c.topic, coalesce(c.consumer_group, ''), sign * count(*)
        from changed c group by c.topic, c.consumer_group;
        get diagnostics entries = row_count;
    end if;
    perform fanout.note_tallies(entries);
    return null;
end
$$;
comment on function fanout.tally_change() is
'internal: statement trigger on fanout.held and fanout.dead_letter, keeps count of their rows';
revoke all on function fanout.tally_change() from public;

create trigger tally_insert after insert on fanout.held
referencing new table as changed for each statement execute function fanout.tally_change();
create trigger tally_delete after delete on fanout.held
referencing old table as changed for each statement execute function fanout.tally_change();
create trigger tally_void after update of topic_id or truncate on fanout.held
for each statement execute function fanout.tally_change();

create trigger tally_insert after insert on fanout.dead_letter
referencing new table as changed for each statement execute function fanout.tally_change();
create trigger tally_delete after delete on fanout.dead_letter
referencing old table as changed for each statement execute function fanout.tally_change();
create trigger tally_void after update of topic, consumer_group or truncate on fanout.dead_letter
for each statement execute function fanout.tally_change();

-- also in sessions of session_replication_role = replica
alter table fanout.held enable always trigger tally_insert, enable always trigger tally_delete, enable always trigger tally_void;
alter table fanout.dead_letter enable always trigger tally_insert, enable always trigger tally_delete, enable always trigger tally_void;

create function fanout.tallies_since(base pg_snapshot)
returns table (topic_id integer, topic text, consumer_group text, count bigint, first_id bigint, oldest timestamptz)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select t.topic_id, t.topic, t.consumer_group, t.count, t.first_id, t.oldest
    from fanout.tally t where t.xid >= pg_snapshot_xmax(tallies_since.base)
    union all
    select t.topic_id, t.topic, t.consumer_group, t.count, t.first_id, t.oldest
    from fanout.tally t where t.xid = any (array(select pg_snapshot_xip(tallies_since.base)))
$$;
comment on function fanout.tallies_since(pg_snapshot) is 'internal: entries of transactions that a snapshot does not show';
revoke all on function fanout.tallies_since(pg_snapshot) from public;

create function fanout.totals_void(base pg_snapshot) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select totals_void.base is null or exists (select from fanout.tallies_since(totals_void.base) t where t.count is null)
$$;
comment on function fanout.totals_void(pg_snapshot) is 'internal: must all rows be counted, although fanout.total was true for that snapshot?';
revoke all on function fanout.totals_void(pg_snapshot) from public;

create function fanout.count_rows()
returns table (topic_id integer, topic text, consumer_group text, count bigint, first_id bigint, oldest timestamptz)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select h.topic_id, '', '', count(*), min(h.id), min(h.created_at) from fanout.held h group by h.topic_id
    union all
    select 0, d.topic, coalesce(d.consumer_group, ''), count(*), null, null
    from fanout.dead_letter d group by d.topic, d.consumer_group
$$;
comment on function fanout.count_rows() is 'internal: counts all rows of fanout.held and fanout.dead_letter';
revoke all on function fanout.count_rows() from public;

-- Without sequential scans, because behind the entries that count there may be many that
-- an old snapshot keeps from being removed; and without JIT, which takes a plan without
-- another way for dear.
create function fanout.counts()
returns table (topic_id integer, topic text, consumer_group text, count bigint, oldest timestamptz)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp set enable_seqscan = off set jit = off
as $$
#variable_conflict use_column
declare
    base pg_snapshot := (select c.snapshot from fanout.counted c);
begin
    if fanout.totals_void(base) then
        return query select c.topic_id, c.topic, c.consumer_group, c.count, c.oldest from fanout.count_rows() c;
        return;
    end if;
    return query
    select c.topic_id, c.topic, c.consumer_group, sum(c.count)::bigint, min(c.oldest)
    from (select t.topic_id, t.topic, t.consumer_group, t.count, t.oldest from fanout.total t
          union all
          select t.topic_id, t.topic, t.consumer_group, t.count, t.oldest from fanout.tallies_since(base) t) c
    group by c.topic_id, c.topic, c.consumer_group
    having sum(c.count) <> 0;
end
$$;
comment on function fanout.counts() is
'internal: how many rows of fanout.held (topic_id) and of fanout.dead_letter (topic, and consumer_group, which is empty for the publisher''s) there are';
revoke all on function fanout.counts() from public;

-- Each statement sees what was committed before it.  So whatever makes a total true for
-- a snapshot is one statement with what says so.  Entries go whatever transaction they
-- name, as they may be another server's.
create function fanout.count_anew() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    delete from fanout.tally;
    delete from fanout.total;
    delete from fanout.counted;
    with total as (
        insert into fanout.total (topic_id, topic, consumer_group, count, first_id, oldest)
        select c.topic_id, c.topic, c.consumer_group, c.count, c.first_id, c.oldest from fanout.count_rows() c
    )
    insert into fanout.counted (snapshot) values (pg_current_snapshot());
end
$$;
comment on function fanout.count_anew() is 'internal: part of fanout.add_tallies()';
revoke all on function fanout.count_anew() from public;

-- Rows with lower ids that come meanwhile bring theirs with them.
create function fanout.find_oldest_held() returns void
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    update fanout.total t
    set (first_id, oldest) = (select h.id, h.created_at from fanout.held h
                              where h.topic_id = t.topic_id and h.id >= t.first_id order by h.id limit 1)
    where t.topic_id <> 0 and not exists (select from fanout.held h where h.id = t.first_id);
    delete from fanout.total t where t.count = 0;
$$;
comment on function fanout.find_oldest_held() is 'internal: part of fanout.add_tallies()';
revoke all on function fanout.find_oldest_held() from public;

-- For the publisher alone: there is one for each database.  It waits for nobody who is
-- about to remove the snapshot.  In a transaction that has changed nothing else:
-- a snapshot does not tell which of one's own entries were added.
create function fanout.add_tallies() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    base pg_snapshot;
begin
    select c.snapshot into base from fanout.counted c for update skip locked;
    if base is null and exists (select from fanout.counted)
       or base is not null and not exists (select from fanout.tallies_since(base)) then
        return;
    end if;
    with added as (
        insert into fanout.total as t (topic_id, topic, consumer_group, count, first_id, oldest)
        select c.topic_id, c.topic, c.consumer_group, sum(c.count), min(c.first_id), min(c.oldest)
        from fanout.tallies_since(base) c where c.count is not null group by c.topic_id, c.topic, c.consumer_group
        on conflict (topic_id, topic, consumer_group) do update
            set count = t.count + excluded.count, first_id = least(t.first_id, excluded.first_id),
                oldest = least(t.oldest, excluded.oldest)
    )
    update fanout.counted set snapshot = pg_current_snapshot();
    -- not before, or an entry without a number could be committed in between
    if fanout.totals_void(base) then
        perform fanout.count_anew();
    else
        perform fanout.find_oldest_held();
    end if;
    delete from fanout.tally t where t.xid < (select pg_snapshot_xmin(c.snapshot) from fanout.counted c);
end
$$;
comment on function fanout.add_tallies() is
'internal: adds the entries of fanout.tally to fanout.total, or counts all rows anew if fanout.counted is empty or an entry has no number';
revoke all on function fanout.add_tallies() from public;

-- These two have no foreign keys: their writer, the publisher, must not wait
-- for somebody's lock on a topic.
create table fanout.stall (
    topic_id   integer primary key,
    stalled_at timestamptz not null,
    attempts   integer     not null,
    retry_at   timestamptz not null,
    last_error text        not null
) using heap;
comment on table fanout.stall is 'internal: topics that the broker refuses messages of; see the view fanout.stat_topics';
revoke all on fanout.stall from public;

create table fanout.topic_stat (
    topic_id   integer primary key,
    sent       bigint           not null,
    rate       double precision not null,
    updated_at timestamptz      not null
) using heap with (fillfactor = 50);
comment on table fanout.topic_stat is 'internal: counters of sent messages, written every few seconds; see the view fanout.stat_topics';
revoke all on fanout.topic_stat from public;


-- ---------------------------------------------------------------------------
-- Declaring topics, consumer groups and bindings
-- ---------------------------------------------------------------------------

create function fanout.check_name(what text, name text) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if name is null then
        raise exception '% must not be null', what
            using errcode = 'null_value_not_allowed';
    elsif name = '' then
        raise exception '% must not be empty', what
            using errcode = 'invalid_name';
    elsif octet_length(convert_to(name, 'UTF8')) > 255 then
        raise exception '% is too long', what
            using errcode = 'name_too_long',
                  detail = format('It has %s bytes in UTF-8; AMQP names have at most 255.',
                                  octet_length(convert_to(name, 'UTF8'))),
                  hint = 'Choose a shorter name. A queue is named after its topic and consumer group, joined by "_".';
    elsif name ~ E'[\\x01-\\x1f\\x7f]' then
        raise exception '% "%" contains a control character', what,
                        regexp_replace(name, E'[\\x01-\\x1f\\x7f]', '?', 'g')
            using errcode = 'invalid_name';
    elsif starts_with(name, 'amq.') then
        raise exception '% "%" is reserved', what, name
            using errcode = 'reserved_name',
                  detail = 'AMQP keeps names that begin with "amq." for the broker.';
    end if;
end
$$;
comment on function fanout.check_name(text, text) is 'internal: raises an error unless name can be an AMQP name';
revoke all on function fanout.check_name(text, text) from public;

create function fanout.require_topic(topic text) returns integer
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    found_id integer;
begin
    select t.topic_id into found_id
    from fanout.topic t
    where t.topic = require_topic.topic and not t.dropping;
    if found_id is null then
        raise exception 'topic "%" does not exist', require_topic.topic
            using errcode = 'undefined_object',
                  hint = 'Declare it first, with fanout.declare_topic() or fanout.declare_binding().';
    end if;
    return found_id;
end
$$;
comment on function fanout.require_topic(text) is 'internal: the id of a topic, or an error';
revoke all on function fanout.require_topic(text) from public;

-- KEY SHARE conflicts with drop_topic(), and not with what the publisher records.
create function fanout.keep_topic(topic text) returns integer
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    found_id integer;
begin
    select t.topic_id into found_id
    from fanout.topic t
    where t.topic = keep_topic.topic and not t.dropping
    for key share;
    return found_id;
end
$$;
comment on function fanout.keep_topic(text) is
'internal: the id of a topic that is not dropped before this transaction ends; NULL if it does not exist';
revoke all on function fanout.keep_topic(text) from public;

create function fanout.raise_difference(object text, differences text[], hint text default 'Drop it first, or declare it as it is.')
returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if array_length(differences, 1) > 0 then
        raise exception '% already exists with a different declaration', object
            using errcode = 'duplicate_object',
                  detail = array_to_string(differences, ' '),
                  hint = raise_difference.hint;
    end if;
end
$$;
comment on function fanout.raise_difference(text, text[], text) is 'internal: the error for declaring something again differently';
revoke all on function fanout.raise_difference(text, text[], text) from public;

create function fanout.difference(what text, old text, new text) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select format('%s is %s, not %s.', what, coalesce(quote_literal(old), 'not set'),
                  coalesce(quote_literal(new), 'unset'))
    where old is distinct from new
$$;
comment on function fanout.difference(text, text, text) is 'internal: says how two declarations differ, or returns NULL';
revoke all on function fanout.difference(text, text, text) from public;

create function fanout.check_topic_grant(role regrole, topic text, what text, consumer_group text default null) returns void
language c stable
as 'MODULE_PATHNAME', 'pgf_check_topic_grant';
comment on function fanout.check_topic_grant(regrole, text, text, text) is
'internal: raises an error unless the role may do that with the topic, or with the queue of the consumer group';
revoke all on function fanout.check_topic_grant(regrole, text, text, text) from public;

create function fanout.check_topic_options(format text, on_exhausted text) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if check_topic_options.format is null
       or check_topic_options.format not in ('debezium', 'row', 'cloudevents') then
        raise exception 'unknown format %', coalesce(quote_literal(check_topic_options.format), 'null')
            using errcode = 'invalid_parameter_value',
                  hint = 'Formats are "debezium", "row" and "cloudevents".';
    end if;
    if check_topic_options.on_exhausted is null
       or check_topic_options.on_exhausted not in ('hold', 'dead_letter') then
        raise exception 'unknown on_exhausted %', coalesce(quote_literal(check_topic_options.on_exhausted), 'null')
            using errcode = 'invalid_parameter_value',
                  hint = 'It is "hold" or "dead_letter".';
    end if;
end
$$;
comment on function fanout.check_topic_options(text, text) is
'internal: refuses options of a topic that there are not';
revoke all on function fanout.check_topic_options(text, text) from public;

create function fanout.declare_topic_as(role regrole, topic text, format text, on_exhausted text)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    old fanout.topic;
begin
    perform fanout.check_topic_grant(declare_topic_as.role, declare_topic_as.topic, 'declare');
    perform fanout.check_name('topic', declare_topic_as.topic);
    perform fanout.check_topic_options(declare_topic_as.format, declare_topic_as.on_exhausted);

    -- ON CONFLICT locks the row in any case, and the publisher would wait for it
    if fanout.keep_topic(declare_topic_as.topic) is null then
        perform fanout.adopt_if_empty();
        insert into fanout.topic as t (topic, format, on_exhausted)
        values (declare_topic_as.topic, declare_topic_as.format, declare_topic_as.on_exhausted)
        on conflict (topic) do update
            set format = excluded.format, on_exhausted = excluded.on_exhausted,
                dropping = false, paused = false
            where t.dropping;
        if found then
            return;
        end if;
    end if;

    select * into strict old from fanout.topic t where t.topic = declare_topic_as.topic;
    perform fanout.raise_difference(
        pg_catalog.format('topic "%s"', declare_topic_as.topic),
        array_remove(array[fanout.difference('format', old.format, declare_topic_as.format),
                           fanout.difference('on_exhausted', old.on_exhausted, declare_topic_as.on_exhausted)],
                     null),
        'Use fanout.alter_topic(), or declare it as it is.');
end
$$;
comment on function fanout.declare_topic_as(regrole, text, text, text) is 'internal: what fanout.declare_topic() does with the rights of pg_fanout';
revoke all on function fanout.declare_topic_as(regrole, text, text, text) from public;

create function fanout.declare_topic(topic text, format text default 'debezium', on_exhausted text default 'hold')
returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_declare';
comment on function fanout.declare_topic(text, text, text) is
'declares a topic, a durable fanout exchange of that name. format: body of captured changes ("debezium", "row", "cloudevents"); on_exhausted: what happens to a message that the broker refused pg_fanout.retry_limit times ("hold": keep trying, "dead_letter": go on without it). Errors: 22004, 42602, 42622, 42939 for the name, 22023 for the rest, 42710 if it exists with another declaration';
revoke all on function fanout.declare_topic(text, text, text) from public;

create function fanout.check_arguments(arguments jsonb) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    name text;
    value jsonb;
begin
    if arguments is null or jsonb_typeof(arguments) <> 'object' then
        raise exception 'arguments must be a JSON object'
            using errcode = 'invalid_parameter_value',
                  hint = 'For example {"x-max-length": 1000}.';
    end if;
    for name, value in select * from jsonb_each(arguments) loop
        if jsonb_typeof(value) in ('object', 'array') then
            raise exception 'argument "%" must be a string, a number, a boolean or null', name
                using errcode = 'invalid_parameter_value';
        elsif octet_length(convert_to(name, 'UTF8')) not between 1 and 128 then
            raise exception 'names of arguments have 1 to 128 bytes in UTF-8'
                using errcode = 'invalid_parameter_value';
        elsif jsonb_typeof(value) = 'number' and abs(value::numeric) > 1.7976931348623157e308 then
            raise exception 'argument "%" is out of range', name
                using errcode = 'invalid_parameter_value',
                      detail = 'Numbers are sent as 64-bit integers, or else in double precision.';
        elsif name = 'x-queue-type' then
            raise exception 'argument "x-queue-type" cannot be given'
                using errcode = 'invalid_parameter_value',
                      hint = 'Use the parameter queue_type.';
        end if;
    end loop;
end
$$;
comment on function fanout.check_arguments(jsonb) is 'internal: raises an error unless the queue arguments can be sent';
revoke all on function fanout.check_arguments(jsonb) from public;

-- What the broker would refuse to declare.  An argument that is not known here is
-- the broker's business.
create function fanout.check_stream_arguments(queue_type text, arguments jsonb) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    name text;
    value jsonb;
begin
    for name, value in select * from jsonb_each(arguments) where jsonb_each.value <> 'null' loop
        if queue_type <> 'stream' then
            if name ~ '^x-(max-age|stream-.*|initial-cluster-size)$' then
                raise exception 'argument "%" is for streams only', name
                    using errcode = 'invalid_parameter_value',
                          hint = 'Use queue_type => ''stream''.';
            end if;
        elsif name ~ '^x-(message-ttl|expires|max-length|overflow|dead-letter-.*|delivery-limit|max-priority|single-active-consumer|max-in-memory-.*|quorum-.*|queue-mode|queue-version|queue-master-locator|ha-.*|consumer-timeout|delayed-retry-.*)$' then
            raise exception 'a stream does not take argument "%"', name
                using errcode = 'invalid_parameter_value',
                      hint = 'What it keeps is bounded by "x-max-age" and "x-max-length-bytes".';
        elsif name = 'x-max-age' and (jsonb_typeof(value) <> 'string' or value #>> '{}' !~ '^[0-9]{1,9}[YMDhms]$') then
            raise exception 'argument "x-max-age" must be a number of Y, M, D, h, m or s'
                using errcode = 'invalid_parameter_value',
                      hint = 'For example "7D" for seven days.';
        elsif name in ('x-max-length-bytes', 'x-stream-max-segment-size-bytes', 'x-initial-cluster-size')
              and (jsonb_typeof(value) <> 'number' or value::numeric <> trunc(value::numeric)
                   or value::numeric not between 1 and case name when 'x-max-length-bytes' then 9223372036854775807
                                                                 when 'x-initial-cluster-size' then 65535 else 3000000000 end) then
            raise exception 'argument "%" must be a positive integer', name
                using errcode = 'invalid_parameter_value',
                      detail = 'A segment has 3000000000 bytes at most.';
        end if;
    end loop;
end
$$;
comment on function fanout.check_stream_arguments(text, jsonb) is
'internal: raises an error if queue arguments are for streams, and it is none, or the other way round, or wrong ones of a stream';
revoke all on function fanout.check_stream_arguments(text, jsonb) from public;

-- What a queue with dead letters is declared with, besides the caller's arguments.
-- At-least-once needs reject-publish, though a queue without a length never refuses.
create function fanout.dead_letter_arguments(queue text) returns jsonb
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select jsonb_build_object('x-dead-letter-exchange', '', 'x-dead-letter-routing-key', queue || '_dead',
                              'x-dead-letter-strategy', 'at-least-once', 'x-overflow', 'reject-publish')
$$;
comment on function fanout.dead_letter_arguments(text) is
'internal: arguments that make a quorum queue hand its dead letters to "<queue>_dead"';
revoke all on function fanout.dead_letter_arguments(text) from public;

create function fanout.queue_arguments(b fanout.binding) returns jsonb
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case when b.dead_letter then '{"x-delivery-limit": 20}' || b.arguments || fanout.dead_letter_arguments(b.queue)
                else b.arguments end
$$;
comment on function fanout.queue_arguments(fanout.binding) is 'internal: the arguments that the queue of a binding is declared with';
revoke all on function fanout.queue_arguments(fanout.binding) from public;

create function fanout.check_dead_letter(queue text, queue_type text, arguments jsonb) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    name text;
    value jsonb;
    problem text;
begin
    if queue_type <> 'quorum' then
        raise exception 'a queue of type "%" does not hand dead letters on at least once', queue_type
            using errcode = 'invalid_parameter_value',
                  hint = 'Use queue_type => ''quorum'', or leave dead_letter out.';
    end if;
    for name, value in select * from jsonb_each(fanout.dead_letter_arguments(queue)) loop
        if arguments -> name <> value then
            raise exception 'argument "%" contradicts dead_letter', name
                using errcode = 'invalid_parameter_value',
                      detail = pg_catalog.format('It is %s where there is a queue of dead letters.', value),
                      hint = 'Leave the argument out, or dead_letter.';
        end if;
    end loop;
    value := arguments -> 'x-delivery-limit';
    -- not in one condition: what is no number must not be cast
    if jsonb_typeof(value) <> 'number' then
        problem := 'it is no number';
    elsif value::numeric <> trunc(value::numeric) or value::numeric not between 0 and 1000000 then
        problem := 'it is no integer from 0 to 1000000';
    end if;
    if problem is not null then
        raise exception 'argument "x-delivery-limit" contradicts dead_letter'
            using errcode = 'invalid_parameter_value',
                  detail = pg_catalog.format('With %s, %s.', value, problem),
                  hint = 'A queue of dead letters gets what was given back more often than that; the default is 20.';
    end if;
    if queue like '%\_dead' then
        raise exception 'queue "%" has a name of queues of dead letters', queue
            using errcode = 'invalid_parameter_value',
                  hint = 'Leave dead_letter out, or choose another consumer group.';
    end if;
    perform fanout.check_name('queue of dead letters', queue || '_dead');
end
$$;
comment on function fanout.check_dead_letter(text, text, jsonb) is
'internal: raises an error if a queue cannot have a queue of dead letters. Errors: 22023, 42622';
revoke all on function fanout.check_dead_letter(text, text, jsonb) from public;

create function fanout.check_dead_queue(queue text, dead_letter boolean) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    other text;
begin
    select b.queue into other from fanout.binding b
    where b.queue || '_dead' = check_dead_queue.queue and b.dead_letter
       or b.queue = check_dead_queue.queue || '_dead' and check_dead_queue.dead_letter
    limit 1;
    if other is null and check_dead_queue.dead_letter then
        select s.topic || '_' || s.consumer_group into other from fanout.subscription s
        where s.topic || '_' || s.consumer_group = check_dead_queue.queue || '_dead' and s.active;
    end if;
    if other is not null then
        raise exception 'queue "%" and queue "%" exclude each other', check_dead_queue.queue, other
            using errcode = 'duplicate_object',
                  detail = 'One has the name of the other''s queue of dead letters.',
                  hint = 'Choose another consumer group.';
    end if;
end
$$;
comment on function fanout.check_dead_queue(text, boolean) is
'internal: raises an error if a queue, or its queue of dead letters, is another one''s queue of dead letters, or queue. Errors: 42710';
revoke all on function fanout.check_dead_queue(text, boolean) from public;

create function fanout.declare_binding_as(role regrole, topic text, consumer_group text, queue_type text, arguments jsonb,
                                          dead_letter boolean)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    old fanout.binding;
    queue_name text := declare_binding_as.topic || '_' || declare_binding_as.consumer_group;
    id integer;
begin
    perform fanout.check_topic_grant(declare_binding_as.role, declare_binding_as.topic, 'declare', declare_binding_as.consumer_group);
    perform fanout.check_name('topic', declare_binding_as.topic);
    perform fanout.check_name('consumer group', declare_binding_as.consumer_group);
    perform fanout.check_name('queue', queue_name);
    perform fanout.check_arguments(declare_binding_as.arguments);
    if declare_binding_as.queue_type is null or declare_binding_as.queue_type not in ('quorum', 'classic', 'stream') then
        raise exception 'unknown queue type %', coalesce(quote_literal(declare_binding_as.queue_type), 'null')
            using errcode = 'invalid_parameter_value',
                  hint = 'Queue types are "quorum", "classic" and "stream".';
    end if;
    perform fanout.check_stream_arguments(declare_binding_as.queue_type, declare_binding_as.arguments);
    if declare_binding_as.dead_letter is null then
        raise exception 'dead_letter must not be null' using errcode = 'null_value_not_allowed';
    elsif declare_binding_as.dead_letter then
        perform fanout.check_dead_letter(queue_name, declare_binding_as.queue_type, declare_binding_as.arguments);
    end if;
    perform fanout.check_dead_queue(queue_name, declare_binding_as.dead_letter);

    if fanout.keep_topic(declare_binding_as.topic) is null then
        perform fanout.declare_topic_as(declare_binding_as.role, declare_binding_as.topic, 'debezium', 'hold');
    end if;
    id := fanout.require_topic(declare_binding_as.topic);

    insert into fanout.binding as b (topic_id, consumer_group, queue, queue_type, arguments, dead_letter)
    values (id, declare_binding_as.consumer_group, queue_name,
            declare_binding_as.queue_type, declare_binding_as.arguments, declare_binding_as.dead_letter)
    on conflict do nothing;
    if found then
        return;
    end if;

    select * into old from fanout.binding b
    where b.topic_id = id and b.consumer_group = declare_binding_as.consumer_group
    for update;
    if not found then
        perform fanout.check_dead_queue(queue_name, declare_binding_as.dead_letter);
        raise exception 'queue "%" belongs to another topic already', queue_name
            using errcode = 'duplicate_object',
                  detail = coalesce((select pg_catalog.format('Topic "%s" and consumer group "%s" give the same queue name.',
                                                              t.topic, b.consumer_group)
                                     from fanout.binding b join fanout.topic t using (topic_id)
                                     where b.queue = queue_name), ''),
                  hint = 'Choose another consumer group.';
    end if;
    perform fanout.raise_difference(
        pg_catalog.format('binding of topic "%s" to consumer group "%s"',
                          declare_binding_as.topic, declare_binding_as.consumer_group),
        array_remove(array[fanout.difference('queue_type', old.queue_type, declare_binding_as.queue_type),
                           fanout.difference('arguments', old.arguments::text, declare_binding_as.arguments::text),
                           fanout.difference('dead_letter', old.dead_letter::text, declare_binding_as.dead_letter::text)],
                     null));
    if old.drop_if_unused is not null then
        update fanout.binding b set drop_if_unused = null, drop_if_empty = null
        where b.topic_id = id and b.consumer_group = declare_binding_as.consumer_group;
    end if;
end
$$;
comment on function fanout.declare_binding_as(regrole, text, text, text, jsonb, boolean) is 'internal: what fanout.declare_binding() does with the rights of pg_fanout';
revoke all on function fanout.declare_binding_as(regrole, text, text, text, jsonb, boolean) from public;

create function fanout.declare_binding(topic text, consumer_group text, queue_type text default 'quorum',
                                       arguments jsonb default '{}', dead_letter boolean default false)
returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_declare';
comment on function fanout.declare_binding(text, text, text, jsonb, boolean) is
'declares a consumer group''s durable queue "<topic>_<consumer_group>" and binds it to the topic, which is declared too if it does not exist. queue_type: "quorum", "classic" or "stream"; arguments: of queue.declare (strings, numbers, booleans; null leaves a default of pg_fanout out); of a stream "x-max-age" and "x-max-length-bytes" bound what it keeps; dead_letter: of a quorum queue, declares "<queue>_dead", too, which gets what consumers reject, or give back more often than "x-delivery-limit" (20), see fanout.recover_dead(). Errors: 22004, 42602, 42622, 42939 for the names, 22023 for the rest, 42710 if it exists with another declaration';
revoke all on function fanout.declare_binding(text, text, text, jsonb, boolean) from public;

create function fanout.declare_bindings_as(role regrole, bindings jsonb)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    topic_name text;
    groups jsonb;
    consumer_group text;
begin
    if bindings is null or jsonb_typeof(bindings) <> 'object' then
        raise exception 'bindings must be a JSON object of topics'
            using errcode = 'invalid_parameter_value',
                  hint = 'For example {"exchange_user": ["consumer_user_rpc", "consumer_org_rpc"]}.';
    end if;
    for topic_name, groups in select * from jsonb_each(bindings) loop
        if jsonb_typeof(groups) = 'string' then
            select coalesce(jsonb_agg(trim(name)), '[]') into groups
            from unnest(string_to_array(groups #>> '{}', ',')) name
            where trim(name) <> '';
        elsif jsonb_typeof(groups) <> 'array'
              or jsonb_path_exists(groups, 'strict $[*] ? (@.type() != "string")') then
            raise exception 'consumer groups of topic "%" must be an array of strings or a comma-separated string', topic_name
                using errcode = 'invalid_parameter_value';
        end if;
        -- a topic that nobody listens to yet is still declared
        if jsonb_array_length(groups) = 0
           and not exists (select from fanout.topic t where t.topic = topic_name and not t.dropping) then
            perform fanout.declare_topic_as(role, topic_name, 'debezium', 'hold');
        end if;
        for consumer_group in select jsonb_array_elements_text(groups) loop
            perform fanout.declare_binding_as(role, topic_name, consumer_group, 'quorum', '{}', false);
        end loop;
    end loop;
end
$$;
comment on function fanout.declare_bindings_as(regrole, jsonb) is 'internal: what fanout.declare_bindings() does with the rights of pg_fanout';
revoke all on function fanout.declare_bindings_as(regrole, jsonb) from public;

create function fanout.declare_bindings(bindings jsonb)
returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_declare';
comment on function fanout.declare_bindings(jsonb) is
'declares many bindings with default settings at once: {"topic": ["consumer_group", ...], ...}, or a comma-separated string instead of the array. Errors: 22023 if bindings is not of that form, and those of fanout.declare_binding()';
revoke all on function fanout.declare_bindings(jsonb) from public;

create function fanout.drop_binding_as(role regrole, topic text, consumer_group text, if_unused boolean, if_empty boolean)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
    perform fanout.check_topic_grant(drop_binding_as.role, drop_binding_as.topic, 'declare', drop_binding_as.consumer_group);
    update fanout.binding b
    set drop_if_unused = coalesce(drop_binding_as.if_unused, true),
        drop_if_empty = coalesce(drop_binding_as.if_empty, true)
    where b.topic_id = fanout.require_topic(drop_binding_as.topic)
      and b.consumer_group = drop_binding_as.consumer_group;
    if not found then
        raise exception 'topic "%" has no binding to consumer group "%"',
                        drop_binding_as.topic, drop_binding_as.consumer_group
            using errcode = 'undefined_object';
    end if;
end
$$;
comment on function fanout.drop_binding_as(regrole, text, text, boolean, boolean) is 'internal: what fanout.drop_binding() does with the rights of pg_fanout';
revoke all on function fanout.drop_binding_as(regrole, text, text, boolean, boolean) from public;

create function fanout.drop_binding(topic text, consumer_group text,
                                    if_unused boolean default true, if_empty boolean default true)
returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_declare';
comment on function fanout.drop_binding(text, text, boolean, boolean) is
'deletes a consumer group''s queue, and its queue of dead letters, once this transaction has committed. if_unused, if_empty: only if neither has consumers, messages; if the broker has a reason to refuse, the binding stays and fanout.bindings shows the reason. Errors: 42704 if there is no such binding';
revoke all on function fanout.drop_binding(text, text, boolean, boolean) from public;

create function fanout.capture_trigger() returns trigger
language c volatile
as 'MODULE_PATHNAME', 'pgf_capture_trigger';
comment on function fanout.capture_trigger() is
'writes a message for each changed row; made into triggers by fanout.capture(). Errors: 42704 if the topic does not exist';
revoke all on function fanout.capture_trigger() from public;

-- The server checks that whoever writes to a captured table may execute this.
-- In a query it raises an error.
create function fanout.count_change() returns boolean
language c volatile
as 'MODULE_PATHNAME', 'pgf_count_change';
comment on function fanout.count_change() is
'internal: the last part of the condition of each capture trigger; true. Counts the changes, so that messages are numbered in their order. Everybody may execute it, and must be able to. Errors: 0A000 if a query calls it';
grant execute on function fanout.count_change() to public;

create function fanout.trigger_arguments(trigger oid) returns text[]
language c stable strict
as 'MODULE_PATHNAME', 'pgf_trigger_arguments';
comment on function fanout.trigger_arguments(oid) is 'internal: arguments of a trigger, NULL if there is no such trigger';
revoke all on function fanout.trigger_arguments(oid) from public;

-- In SQL, since commands on tables that are not captured must work without the
-- library.
create function fanout.trigger_topic(tgargs bytea) returns text
language sql stable strict
set search_path = pg_catalog, pg_temp
as $$
    select convert_from(substring(tgargs from 1 for position(decode('00', 'hex') in tgargs) - 1), getdatabaseencoding())
    where position(decode('00', 'hex') in tgargs) > 0
$$;
comment on function fanout.trigger_topic(bytea) is 'internal: the first argument of a trigger, NULL if it has none';
revoke all on function fanout.trigger_topic(bytea) from public;

create function fanout.trigger_option(arguments text[], name text) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    -- topic, then pairs of name and value
    select arguments[i + 1]
    from generate_series(2, array_length(arguments, 1) - 1, 2) i
    where arguments[i] = name
$$;
comment on function fanout.trigger_option(text[], text) is 'internal: one option among the arguments of a capture trigger';
revoke all on function fanout.trigger_option(text[], text) from public;

-- A trigger that was made by hand can have anything as an option.
create function fanout.column_list(option text) returns text[]
language plpgsql immutable strict
set search_path = pg_catalog, pg_temp
as $$
begin
    return option::text[];
exception when invalid_text_representation then
    return '{}';
end
$$;
comment on function fanout.column_list(text) is
'internal: an option of a capture trigger that lists columns; if it is no list, an empty one, which fanout.capture() refuses';
revoke all on function fanout.column_list(text) from public;

-- Which captures there are, so that a command that changes no captured table
-- costs next to nothing; filled when a capture's trigger is created.
create table fanout.capture (
    entity      oid  not null,
    topic       text collate "C" not null,
    entity_name text not null,
    primary key (entity, topic)
) using heap;
comment on table fanout.capture is
'internal: tables that are captured; the triggers say how, see the view fanout.captures';
comment on column fanout.capture.entity_name is 'what the table was called when it was captured';
revoke all on fanout.capture from public;

-- A column keeps its number whatever it is called.  The triggers' arguments have
-- the names, which is what a dump needs.
create table fanout.captured_column (
    entity  oid      not null,
    trigger text     collate "C" not null,
    option  text     collate "C" not null check (option in ('columns', 'exclude', 'key')),
    n       integer  not null,
    attnum  smallint not null,
    name    text     not null,
    primary key (entity, trigger, option, n)
) using heap;
comment on table fanout.captured_column is
'internal: columns that the options of capture triggers name, by number';
comment on column fanout.captured_column.trigger is 'name of the trigger: dumps and pg_upgrade keep it';
comment on column fanout.captured_column.attnum is '0: it was dropped; another one of that name takes its place';
comment on column fanout.captured_column.name is 'its name in the arguments of the triggers';
revoke all on fanout.captured_column from public;

create function fanout.captured_columns(entity oid, trigger text, option text, arguments text[]) returns text[]
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select case when g.given is null then null
                when r.n > 0 then r.columns
                else fanout.column_list(g.given) end
    from (select fanout.trigger_option(captured_columns.arguments, captured_columns.option)) g(given),
         (select count(*), coalesce(array_agg(a.attname::text order by c.n) filter (where not a.attisdropped), '{}')
          from fanout.captured_column c left join pg_attribute a on a.attrelid = c.entity and a.attnum = c.attnum
          where c.entity = captured_columns.entity and c.trigger = captured_columns.trigger
            and c.option = captured_columns.option) r(n, columns)
$$;
comment on function fanout.captured_columns(oid, text, text, text[]) is
'internal: what the columns that an option of a capture trigger names are called now; NULL: it is not given';
revoke all on function fanout.captured_columns(oid, text, text, text[]) from public;

create function fanout.index_columns(index oid) returns text[]
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select array_agg(a.attname::text order by k.n)
    from pg_index i
         cross join unnest(i.indkey::int2[]) with ordinality k(attnum, n)
         join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
    where i.indexrelid = index_columns.index and k.n <= i.indnkeyatts
$$;
comment on function fanout.index_columns(oid) is 'internal: key columns of an index';
revoke all on function fanout.index_columns(oid) from public;

create function fanout.default_key(entity oid, exclude text[]) returns text[]
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select fanout.index_columns(i.indexrelid)
    from pg_index i
    where i.indrelid = entity and (i.indisprimary or i.indisreplident)
      and not fanout.index_columns(i.indexrelid) && coalesce(exclude, '{}')
    order by i.indisprimary desc limit 1
$$;
comment on function fanout.default_key(oid, text[]) is
'internal: columns of the primary key, else of the replica identity, else NULL; not one that has an excluded column';
revoke all on function fanout.default_key(oid, text[]) from public;

create function fanout.trigger_condition(trigger oid) returns text
language sql stable
set search_path = pg_catalog, pg_temp set quote_all_identifiers = off
as $$
    select regexp_replace(nullif(c, 'fanout.count_change()'), E'^\\((.*) AND fanout\\.count_change\\(\\)\\)$', E'\\1')
    from substring(pg_get_triggerdef(trigger) from
                   E' WHEN \\((.*)\\) EXECUTE FUNCTION fanout\\.capture_trigger\\(') c
$$;
comment on function fanout.trigger_condition(oid) is
'internal: the condition of a capture trigger as the server has it, without count_change(); NULL: none';
revoke all on function fanout.trigger_condition(oid) from public;

-- An idle trigger is what fanout.capture(replace => true) makes of one that is
-- not needed any more: DROP TRIGGER would wait for all readers of the table.
create view fanout.capture_trigger_list as
select t.oid as trigger, t.tgrelid as entity, t.args[1] as topic, t.args, t.tgname as name, t.tgtype,
       fanout.trigger_option(t.args, 'idle') is not null as idle,
       not exists (with recursive clones(oid, tgenabled) as (
                       select t.oid, t.tgenabled
                       union all
                       select c.oid, c.tgenabled from pg_trigger c join clones p on c.tgparentid = p.oid
                   )
                   select from clones where tgenabled not in ('O', 'A')) as enabled
from (select t.*, fanout.trigger_arguments(t.oid) as args
      from pg_trigger t
      where t.tgfoid = 'fanout.capture_trigger()'::regprocedure and t.tgparentid = 0) t;
comment on view fanout.capture_trigger_list is
'internal: triggers of captures, without those of partitions; enabled: also in all partitions';
comment on column fanout.capture_trigger_list.trigger is 'oid of the trigger';
comment on column fanout.capture_trigger_list.entity is 'oid of the table';
comment on column fanout.capture_trigger_list.topic is 'where its messages go; NULL: it names none';
comment on column fanout.capture_trigger_list.args is 'its arguments: the topic, then pairs of option and value';
comment on column fanout.capture_trigger_list.name is 'its name';
comment on column fanout.capture_trigger_list.tgtype is 'as in pg_trigger';
comment on column fanout.capture_trigger_list.idle is 'its condition is false';
comment on column fanout.capture_trigger_list.enabled is 'does it fire, on the table and on all partitions?';
revoke all on fanout.capture_trigger_list from public;

-- A capture is its triggers: they are dropped, renamed, dumped and inherited by
-- partitions together with the table.
create view fanout.captures as
select c.entity::regclass as entity, c.topic, c.operations, l.columns, l.exclude,
       coalesce(l.key, fanout.default_key(c.entity, l.exclude)) as key,
       fanout.trigger_option(c.args, 'where') as "where",
       fanout.trigger_option(c.args, 'when') as "when",
       fanout.trigger_condition(c.condition_trigger) as condition,
       coalesce(fanout.trigger_option(c.args, 'old_row') = 'true', false) as old_row,
       c.enabled
from (select t.entity, t.topic, array_agg(distinct operation) as operations,
             (array_agg(t.name order by t.trigger))[1] as name,
             fanout.trigger_arguments(min(t.trigger)) as args,
             -- of several, the one that has no other row in the place of OLD or NEW
             (array_agg(t.trigger order by fanout.trigger_option(t.args, 'sent_as') is not null, t.tgtype & 16 = 0)
              filter (where t.tgtype & 1 <> 0))[1] as condition_trigger,
             bool_and(t.enabled)
                 and count(distinct t.trigger)::text
                     is not distinct from coalesce(min(fanout.trigger_option(t.args, 'triggers')),
                                                   count(distinct t.trigger)::text) as enabled
      from fanout.capture_trigger_list t,
           lateral (values (4, 'insert'), (16, 'update'), (8, 'delete'), (32, 'truncate')) o(bit, operation)
      where t.tgtype & bit <> 0 and not t.idle
      group by t.entity, t.topic) c,
     lateral (select fanout.captured_columns(c.entity, c.name, 'columns', c.args) as columns,
                     fanout.captured_columns(c.entity, c.name, 'exclude', c.args) as exclude,
                     fanout.captured_columns(c.entity, c.name, 'key', c.args) as key) l;
comment on view fanout.captures is 'tables whose changes are captured, and how; made by fanout.capture()';
comment on column fanout.captures.entity is 'the table';
comment on column fanout.captures.topic is 'where its changes go';
comment on column fanout.captures.operations is 'among insert, update, delete, truncate';
comment on column fanout.captures.columns is 'columns in the message; NULL: all';
comment on column fanout.captures.exclude is 'columns left out; NULL: none';
comment on column fanout.captures.key is 'columns of the message key: those given, else the primary key, else the replica identity; NULL: none';
comment on column fanout.captures."where" is 'condition on the row as given; NULL: all rows';
comment on column fanout.captures."when" is 'condition on the event as given; NULL: always';
comment on column fanout.captures.condition is 'what a trigger checks for both, as the server has it now; of the updates'' trigger if there is one; NULL: nothing';
comment on column fanout.captures.old_row is 'do messages of updates always carry the row as it was before?';
comment on column fanout.captures.enabled is
'false: a trigger is missing, or was disabled with ALTER TABLE or made to fire for replicas only, on the table or on one of its partitions';
revoke all on fanout.captures from public;

create function fanout.drop_topic_as(role regrole, topic text)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    dropped_id integer := fanout.require_topic(drop_topic_as.topic);
    dependents text;
begin
    perform fanout.check_topic_grant(drop_topic_as.role, drop_topic_as.topic, 'declare');
    -- after those that are binding or capturing it right now, see keep_topic()
    perform from fanout.topic t where t.topic_id = dropped_id and not t.dropping for update;
    if not found then
        perform fanout.require_topic(drop_topic_as.topic);
    end if;
    select string_agg(object, E'\n' order by kind, object collate "C") into dependents
    from (select 1, pg_catalog.format('consumer group "%s" is bound to it', b.consumer_group)
          from fanout.binding b where b.topic_id = dropped_id
          union all
          select 2, pg_catalog.format('table %s is captured into it', c.entity)
          from fanout.captures c where c.topic = drop_topic_as.topic
          union all
          select 3, pg_catalog.format('%s messages are held for it', w.count)
          from (select count(*) from (
                    select from fanout.held h where h.topic_id = dropped_id
                    union all
                    select from fanout.pending p
                    where p.topic_id = dropped_id
                      and (exists (select from fanout.topic t where t.topic_id = dropped_id and t.paused)
                           or exists (select from fanout.stall st where st.topic_id = dropped_id))) m) w
          where w.count > 0) d(kind, object);
    if dependents is not null then
        raise exception 'cannot drop topic "%" because something depends on it', drop_topic_as.topic
            using errcode = 'dependent_objects_still_exist',
                  detail = dependents,
                  hint = 'Use fanout.drop_binding(), fanout.uncapture(), fanout.purge(held => true) first.';
    end if;
    update fanout.topic t set dropping = true where t.topic_id = dropped_id;
end
$$;
comment on function fanout.drop_topic_as(regrole, text) is 'internal: what fanout.drop_topic() does with the rights of pg_fanout';
revoke all on function fanout.drop_topic_as(regrole, text) from public;

create function fanout.drop_topic(topic text)
returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_declare';
comment on function fanout.drop_topic(text) is
'deletes a topic''s exchange, if nothing else is bound to it, once this transaction has committed. Errors: 42704 if there is no such topic, 2BP01 if it has bindings, captures or held messages';
revoke all on function fanout.drop_topic(text) from public;


-- ---------------------------------------------------------------------------
-- Capturing changes
-- ---------------------------------------------------------------------------

create function fanout.condition_for(operation text, entity regclass, condition text) returns text
language c stable strict
as 'MODULE_PATHNAME', 'pgf_condition_for';
comment on function fanout.condition_for(text, regclass, text) is
'internal: a condition over OLD and NEW with the row that the operation lacks (OLD of an insert, NEW of a delete) replaced by NULL. Errors: 42601 if it is not one expression';
revoke all on function fanout.condition_for(text, regclass, text) from public;

create function fanout.row_condition(row_name text, entity regclass, condition text) returns text
language c stable strict
as 'MODULE_PATHNAME', 'pgf_row_condition';
comment on function fanout.row_condition(text, regclass, text) is
'internal: a condition on columns of a table, made one on columns of OLD or NEW. Errors: 42601 if it is not one expression, 42P10 if it names another table';
revoke all on function fanout.row_condition(text, regclass, text) from public;

create function fanout.condition_names_columns(condition text) returns boolean
language c immutable strict
as 'MODULE_PATHNAME', 'pgf_condition_names_columns';
comment on function fanout.condition_names_columns(text) is
'internal: does a condition over OLD and NEW name single columns of them?';
revoke all on function fanout.condition_names_columns(text) from public;

create function fanout.condition_problem(trigger oid) returns text
language c stable strict
as 'MODULE_PATHNAME', 'pgf_condition_problem';
comment on function fanout.condition_problem(oid) is
'internal: why a trigger''s condition fails for some rows; NULL: nothing is known';
revoke all on function fanout.condition_problem(oid) from public;

create function fanout.condition_counts_too_often(trigger oid) returns boolean
language c stable strict
as 'MODULE_PATHNAME', 'pgf_condition_counts_too_often';
comment on function fanout.condition_counts_too_often(oid) is
'internal: true if a trigger''s condition calls fanout.count_change() elsewhere than as its last part';
revoke all on function fanout.condition_counts_too_often(oid) from public;

create function fanout.condition_is_never_true(trigger oid) returns boolean
language c stable strict
as 'MODULE_PATHNAME', 'pgf_condition_is_never_true';
comment on function fanout.condition_is_never_true(oid) is
'internal: is a trigger''s condition true for no row, since OLD or NEW is missing?';
revoke all on function fanout.condition_is_never_true(oid) from public;

create function fanout.check_condition(entity oid, topic text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    problem text;
begin
    select p into problem
    from fanout.capture_trigger_list t, fanout.condition_problem(t.trigger) p
    where t.entity = check_condition.entity and t.topic = check_condition.topic and p is not null
    limit 1;
    if found then
        raise exception 'condition of the capture of table % into topic "%" cannot be evaluated for every row',
                        check_condition.entity::regclass, check_condition.topic
            using errcode = 'datatype_mismatch',
                  detail = problem,
                  hint = 'Name columns, or write "(old *= new) is not true", or "old::text is distinct from new::text".';
    end if;
end
$$;
comment on function fanout.check_condition(oid, text) is
'internal: raises an error if a condition of a capture fails for some rows';
revoke all on function fanout.check_condition(oid, text) from public;

create function fanout.trigger_name(topic text, kind text) returns name
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    -- kinds are words without "_", so that no two captures meet; a long name is
    -- cut by characters, and stays unique by its hash
    select case when octet_length(full_name) < 64 then full_name
                else format('pg_fanout_%s#%s', kind, md5(topic)) end::name
    from (select format('pg_fanout_%s_%s', kind, topic)) n(full_name)
$$;
comment on function fanout.trigger_name(text, text) is 'internal: name of a capture''s trigger';
revoke all on function fanout.trigger_name(text, text) from public;

create function fanout.check_columns(entity regclass, what text, columns text[]) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    missing text;
begin
    if columns is null then
        return;
    elsif cardinality(columns) = 0 or exists (select from unnest(columns) c where c is null) then
        raise exception '% must name at least one column, and no null', what
            using errcode = 'invalid_parameter_value';
    end if;
    select c into missing from unnest(columns) c group by c having count(*) > 1 limit 1;
    if found then
        raise exception '% names column "%" twice', what, missing
            using errcode = 'duplicate_column';
    end if;
    select c into missing
    from unnest(columns) c
    where not exists (select from pg_attribute a
                      where a.attrelid = entity and a.attname = c and a.attnum > 0 and not a.attisdropped)
    limit 1;
    if found then
        raise exception 'column "%" of table % does not exist', missing, entity
            using errcode = 'undefined_column',
                  detail = format('It is named in "%s".', what);
    end if;
end
$$;
comment on function fanout.check_columns(regclass, text, text[]) is 'internal: raises an error unless all columns exist';
revoke all on function fanout.check_columns(regclass, text, text[]) from public;

create function fanout.captures_of(entity regclass)
returns table (topic text, name name, arguments text[])
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select t.topic, (array_agg(t.name order by t.idle, t.trigger))[1],
           fanout.trigger_arguments((array_agg(t.trigger order by t.idle, t.trigger))[1])
    from fanout.capture_trigger_list t where t.entity = captures_of.entity
    group by t.topic
$$;
comment on function fanout.captures_of(regclass) is 'internal: captures of one table, with the arguments of their triggers';
revoke all on function fanout.captures_of(regclass) from public;

create function fanout.lock_capture(entity regclass) returns void
language c volatile strict
as 'MODULE_PATHNAME', 'pgf_lock_capture';
comment on function fanout.lock_capture(regclass) is
'internal: makes transactions that capture the same table wait for each other';
revoke all on function fanout.lock_capture(regclass) from public;

create function fanout.qualified_name(relation oid) returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select format('%I.%I', n.nspname, c.relname)
    from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = qualified_name.relation
$$;
comment on function fanout.qualified_name(oid) is 'internal: name of a table with its schema, whatever the search_path; NULL: it is gone';
revoke all on function fanout.qualified_name(oid) from public;

-- The options of a capture, in the form in which its triggers have them.
create function fanout.capture_arguments(entity regclass, topic text, columns text[], exclude text[], key text[],
                                         "where" text, "when" text, old_row boolean)
returns text[]
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select array[topic]
           || case when columns is not null then array['columns', columns::text] else '{}' end
           || case when exclude is not null then array['exclude', exclude::text] else '{}' end
           || case when key is not null then array['key', key::text] else '{}' end
           || case when "where" is not null then array['where', "where"] else '{}' end
           || case when "when" is not null then array['when', "when"] else '{}' end
           || case when old_row then array['old_row', 'true'] else '{}' end
           -- for a dump of the schema alone, see declare_captured_topic()
           || (select case when t.format <> 'debezium' then array['format', t.format] else '{}' end
                      || case when t.on_exhausted <> 'hold' then array['on_exhausted', t.on_exhausted] else '{}' end
               from fanout.topic t where t.topic = capture_arguments.topic)
$$;
comment on function fanout.capture_arguments(regclass, text, text[], text[], text[], text, text, boolean) is
'internal: arguments of a capture''s triggers, but for those that differ between them';
revoke all on function fanout.capture_arguments(regclass, text, text[], text[], text[], text, text, boolean) from public;

-- One trigger for all operations if there is no condition.  Else one for each,
-- and with a filter on the row two more: of an update that takes the row out of
-- it, a delete is published; of one that brings it in, an insert.  All count, as
-- the last thing, the changes for which they fire.
create function fanout.capture_triggers(entity regclass, operations text[], "where" text, "when" text)
returns table (kind text, events text, level text, condition text, sent_as text)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    with given as (
        select array_agg(distinct o order by o) as operations from unnest(operations) o
    ), wheres as (
        select format(E'(%s\n)', fanout.row_condition('old', entity, "where")) as old_in,
               format(E'(%s\n)', fanout.row_condition('new', entity, "where")) as new_in
        where "where" is not null
    ), kinds(kind, event, row_condition, sent_as) as (
        select 'insert', 'insert', (select new_in from wheres), null
        union all
        select 'delete', 'delete', (select old_in from wheres), null
        union all
        select 'update', 'update', (select old_in || ' and ' || new_in from wheres), null
        union all
        select 'leave', 'update', old_in || ' and ' || new_in || ' is not true', 'delete' from wheres
        union all
        select 'enter', 'update', new_in || ' and ' || old_in || ' is not true', 'insert' from wheres
    )
    select 'row', array_to_string(array_remove(g.operations, 'truncate'), ' or '), 'row', 'fanout.count_change()', null
    from given g
    where "where" is null and "when" is null and array_remove(g.operations, 'truncate') <> '{}'
    union all
    select k.kind, k.event, 'row',
           concat_ws(' and ', case when "when" is not null
                                   then format(E'(%s\n)', fanout.condition_for(k.event, entity, "when")) end,
                     k.row_condition, 'fanout.count_change()'),
           k.sent_as
    from kinds k, given g
    where ("where" is not null or "when" is not null) and k.event = any (g.operations)
    union all
    select 'truncate', 'truncate', 'statement', 'fanout.count_change()', null
    from given g where 'truncate' = any (g.operations)
$$;
comment on function fanout.capture_triggers(regclass, text[], text, text) is
'internal: the triggers that a capture needs; sent_as: the operation that their messages tell of, if it is not the event''s';
revoke all on function fanout.capture_triggers(regclass, text[], text, text) from public;

create function fanout.check_capture(entity regclass, topic text, operations text[], columns text[],
                                     exclude text[], key text[])
returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    c pg_class;
    clashing text;
begin
    select * into c from pg_class where oid = check_capture.entity;
    if not found or c.relkind not in ('r', 'p') then
        raise exception '% is not a table', check_capture.entity
            using errcode = 'wrong_object_type',
                  detail = 'Only ordinary and partitioned tables can be captured.';
    elsif c.relnamespace = 'fanout'::regnamespace then
        raise exception 'tables of pg_fanout cannot be captured'
            using errcode = 'wrong_object_type';
    end if;
    if check_capture.operations is null or array_length(check_capture.operations, 1) is null
       or not check_capture.operations <@ array['insert', 'update', 'delete', 'truncate']
    then
        raise exception 'operations must be among insert, update, delete and truncate'
            using errcode = 'invalid_parameter_value',
                  hint = 'They are written in lower case, as in ''{insert,update}''.';
    end if;
    perform fanout.check_columns(check_capture.entity, 'columns', check_capture.columns);
    perform fanout.check_columns(check_capture.entity, 'exclude', check_capture.exclude);
    perform fanout.check_columns(check_capture.entity, 'key', check_capture.key);
    if check_capture.columns is not null and check_capture.exclude is not null then
        raise exception 'columns and exclude cannot be given both'
            using errcode = 'invalid_parameter_value';
    end if;
    select e into clashing
    from unnest(check_capture.exclude) e
    where e = any (coalesce(check_capture.key, fanout.default_key(check_capture.entity, null))) limit 1;
    if found then
        raise exception 'column "%" cannot be excluded', clashing
            using errcode = 'invalid_parameter_value',
                  detail = 'It belongs to the key, and every message carries its key.',
                  hint = 'Name other columns in "key".';
    end if;
end
$$;
comment on function fanout.check_capture(regclass, text, text[], text[], text[], text[]) is
'internal: raises an error unless a table can be captured so';
revoke all on function fanout.check_capture(regclass, text, text[], text[], text[], text[]) from public;

create function fanout.capture_differences(entity regclass, old_name name, old_arguments text[], topic text, operations text[],
                                           columns text[], exclude text[], key text[],
                                           "where" text, "when" text, old_row boolean)
returns text[]
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    old fanout.captures;
begin
    select * into old from fanout.captures c
    where c.entity = capture_differences.entity and c.topic = capture_differences.topic;
    return array_remove(array[
        fanout.difference('operations', old.operations::text,
                          (select array_agg(distinct o order by o)::text from unnest(capture_differences.operations) o)),
        fanout.difference('columns', old.columns::text, capture_differences.columns::text),
        fanout.difference('exclude', old.exclude::text, capture_differences.exclude::text),
        fanout.difference('key', fanout.captured_columns(capture_differences.entity, old_name, 'key', old_arguments)::text,
                          capture_differences.key::text),
        fanout.difference('where', old."where", capture_differences."where"),
        fanout.difference('when', old."when", capture_differences."when"),
        fanout.difference('old_row', old.old_row::text, coalesce(capture_differences.old_row, false)::text)], null);
end
$$;
comment on function fanout.capture_differences(regclass, name, text[], text, text[], text[], text[], text[], text, text, boolean) is
'internal: how a capture that exists differs from one that is declared';
revoke all on function fanout.capture_differences(regclass, name, text[], text, text[], text[], text[], text[], text, text, boolean) from public;

-- Looks things up with the rights of pg_fanout, and changes nothing.  The locks
-- make a second session that captures the same table find the capture of the
-- first, and keep the topic.
create function fanout.capture_statements(entity regclass, topic text, operations text[], columns text[],
                                          exclude text[], key text[], "where" text, "when" text,
                                          old_row boolean, replace boolean)
returns text[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    old_name name;
    old_arguments text[];
    differences text[];
    arguments text[];
    statements text[];
    -- the caller's search path is another one
    table_name text := fanout.qualified_name(capture_statements.entity);
begin
    if capture_statements.entity is null then
        raise exception 'entity must not be null' using errcode = 'null_value_not_allowed';
    end if;
    perform fanout.check_name('topic', capture_statements.topic);
    perform fanout.lock_capture(capture_statements.entity);
    perform fanout.keep_topic(capture_statements.topic);
    perform fanout.require_topic(capture_statements.topic);
    perform fanout.check_capture(capture_statements.entity, capture_statements.topic, capture_statements.operations,
                                 capture_statements.columns, capture_statements.exclude, capture_statements.key);

    select c.name, c.arguments into old_name, old_arguments from fanout.captures_of(capture_statements.entity) c
    where c.topic = capture_statements.topic;
    if found then
        differences := fanout.capture_differences(
            capture_statements.entity, old_name, old_arguments, capture_statements.topic, capture_statements.operations,
            capture_statements.columns, capture_statements.exclude, capture_statements.key,
            capture_statements."where", capture_statements."when", capture_statements.old_row);
        if not coalesce(capture_statements.replace, false) then
            perform fanout.raise_difference(
                format('capture of table %s into topic "%s"', capture_statements.entity, capture_statements.topic),
                differences, 'Use replace => true to change it, or declare it as it is.');
            return '{}';
        end if;
    end if;

    arguments := fanout.capture_arguments(
        capture_statements.entity, capture_statements.topic, capture_statements.columns,
        capture_statements.exclude, capture_statements.key, capture_statements."where",
        capture_statements."when", capture_statements.old_row);
    with needed as (
        select t.*, fanout.trigger_name(capture_statements.topic, t.kind) as name, count(*) over () as n
        from fanout.capture_triggers(capture_statements.entity, capture_statements.operations,
                                     capture_statements."where", capture_statements."when") t
    ), existing as (
        select l.name, l.tgtype, l.idle, t.tgenabled as state
        from fanout.capture_trigger_list l join pg_trigger t on t.oid = l.trigger
        where l.entity = capture_statements.entity and l.topic = capture_statements.topic
    ), triggers as (
        select case when n.name in (select name from existing) then 'create or replace' else 'create' end as command,
               n.name, n.events, n.level, n.condition,
               arguments || array['triggers', n.n::text]
                   || case when n.sent_as is not null then array['sent_as', n.sent_as] else '{}' end as args
        from needed n
        union all
        select 'create or replace', e.name, case when e.tgtype & 1 <> 0 then 'insert' else 'truncate' end,
               case when e.tgtype & 1 <> 0 then 'row' else 'statement' end, 'false', arguments || array['idle', 'true']
        from existing e where e.name not in (select name from needed)
    )
    select array_agg(statement) into statements
    from (select format('%s trigger %I after %s on %s for each %s when (%s) execute function fanout.capture_trigger(%s)',
                        t.command, t.name, t.events, table_name, t.level, t.condition,
                        (select string_agg(quote_literal(a), ', ' order by i)
                         from unnest(t.args) with ordinality u(a, i)))
          from triggers t
          union all
          -- a trigger that is replaced loses this
          select format('alter table %s %s trigger %I', table_name,
                        case o.state when 'A' then 'enable always' when 'R' then 'enable replica' else 'disable' end, n.name)
          from needed n,
               (select min(state) from existing where not idle having count(distinct state) = 1) o(state)
          where o.state <> 'O') s(statement);
    return statements;
end
$$;
comment on function fanout.capture_statements(regclass, text, text[], text[], text[], text[], text, text, boolean, boolean) is
'internal: checks what fanout.capture() was given and returns the statements that it runs, none if the table is captured so already';
revoke all on function fanout.capture_statements(regclass, text, text[], text[], text[], text[], text, text, boolean, boolean) from public;

-- Numbers are taken from names when a trigger is created, by whatever command.
create function fanout.bind_trigger(t fanout.capture_trigger_list) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    wrong text;
begin
    if t.topic is null then
        raise exception 'a capture trigger of table % names no topic', t.entity::regclass
            using errcode = 'invalid_parameter_value',
                  hint = 'Use fanout.capture() to create it.';
    end if;
    select o into wrong
    from unnest(array['columns', 'exclude', 'key']) o, fanout.trigger_option(t.args, o) given
    where given <> '{}' and fanout.column_list(given) = '{}';
    if found then
        raise exception 'option "%" of a capture trigger of table % is malformed', wrong, t.entity::regclass
            using errcode = 'invalid_parameter_value',
                  hint = 'Use fanout.capture() to create it.';
    end if;
    if fanout.condition_counts_too_often(t.trigger) then
        raise exception 'condition of a capture trigger of table % calls fanout.count_change() elsewhere than at its end', t.entity::regclass
            using errcode = 'invalid_object_definition',
                  hint = 'Use fanout.capture() to create it.';
    end if;
    if not exists (select from fanout.topic p where p.topic = t.topic and not p.dropping) then
        -- the first write will declare it
        perform fanout.check_name('topic', t.topic);
        if not has_function_privilege(session_user, 'fanout.declare_topic(text, text, text)', 'execute') then
            perform fanout.require_topic(t.topic);
        end if;
        perform fanout.check_topic_grant(session_user::regrole, t.topic, 'declare');
        perform fanout.note_copied_schema();
    end if;
    -- one whose table is gone, and whose name this one has now
    delete from fanout.capture c
    where c.topic = t.topic and to_regclass(c.entity_name) = t.entity
      and not exists (select from pg_class r where r.oid = c.entity);
    insert into fanout.capture as c (entity, topic, entity_name)
    values (t.entity, t.topic, t.entity::regclass)
    on conflict (entity, topic) do update set entity_name = excluded.entity_name;
    delete from fanout.captured_column c where c.entity = t.entity and c.trigger = t.name;
    insert into fanout.captured_column (entity, trigger, option, n, attnum, name)
    select t.entity, t.name, o.option, u.n, coalesce(a.attnum, 0), u.name
    from unnest(array['columns', 'exclude', 'key']) o(option),
         unnest(fanout.column_list(fanout.trigger_option(t.args, o.option))) with ordinality u(name, n)
         left join pg_attribute a on a.attrelid = t.entity and a.attname = u.name
                                 and a.attnum > 0 and not a.attisdropped
    where u.name is not null;
    select c.name into wrong from fanout.captured_column c
    where c.entity = t.entity and c.trigger = t.name and c.attnum = 0 limit 1;
    if found then
        raise exception 'column "%" of table % does not exist', wrong, t.entity::regclass
            using errcode = 'undefined_column',
                  detail = format('The capture into topic "%s" names it.', t.topic),
                  hint = 'Use fanout.capture() to capture the table.';
    end if;
end
$$;
comment on function fanout.bind_trigger(fanout.capture_trigger_list) is
'internal: records the numbers of the columns that a capture trigger names. Errors: 22023 bad options, 42P17 if its condition calls count_change() elsewhere than at its end, 42703 if a column does not exist, 42704 if the topic does not, and the user may not declare it';
revoke all on function fanout.bind_trigger(fanout.capture_trigger_list) from public;

create function fanout.capture_declared(entity regclass, topic text, operations text[], columns text[],
                                        exclude text[], key text[], "where" text, "when" text,
                                        old_row boolean, replace boolean)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    unseen text;
    extension name;
begin
    perform fanout.bind_trigger(c)
    from fanout.capture_trigger_list c
    where c.entity = capture_declared.entity and c.topic = capture_declared.topic;
    perform fanout.check_condition(capture_declared.entity, capture_declared.topic);
    if exists (select from fanout.captures c
               where c.entity = capture_declared.entity and c.topic = capture_declared.topic
                 and c.key is null and c.operations <> '{truncate}')
    then
        raise notice 'table % has no key', capture_declared.entity
            using detail = 'Its messages have no key, and no order among themselves.',
                  hint = 'Give it a primary key, or name columns in "key".';
    end if;
    if fanout.condition_names_columns(capture_declared."when") then
        raise notice 'copies of table % may differ from it', capture_declared.entity
            using detail = 'Changes that "when" leaves out reach nobody.',
                  hint = 'Use "where" to publish a part of the rows: a row that leaves it is deleted from the copies.';
    end if;
    select string_agg(upper(o), ' and no ' order by o) into unseen
    from unnest(array['insert', 'update', 'delete']) o
         join fanout.capture_trigger_list l on l.name = fanout.trigger_name(capture_declared.topic, o)
    where l.entity = capture_declared.entity and not l.idle and fanout.condition_is_never_true(l.trigger);
    if unseen is not null then
        raise notice 'no % of table % is published', unseen, capture_declared.entity
            using detail = 'OLD of an INSERT and NEW of a DELETE are NULL, so "when" is not true.',
                  hint = 'Leave them out of "operations", or write "when" so that it is true then.';
    end if;
    select x.extname into extension
    from pg_depend d join pg_extension x on x.oid = d.refobjid
    where d.classid = 'pg_class'::regclass and d.objid = capture_declared.entity
      and d.refclassid = 'pg_extension'::regclass and d.deptype = 'e';
    if found then
        raise notice 'table % belongs to extension "%"', capture_declared.entity, extension
            using detail = 'Dumps have the extension, but not the triggers of the capture.',
                  hint = 'Capture the table again wherever a dump is restored.';
    end if;
end
$$;
comment on function fanout.capture_declared(regclass, text, text[], text[], text[], text[], text, text, boolean, boolean) is
'internal: what fanout.capture() does after it has created triggers';
revoke all on function fanout.capture_declared(regclass, text, text[], text[], text[], text[], text, text, boolean, boolean) from public;

create function fanout.capture(entity regclass, topic text,
                               operations text[] default '{insert,update,delete,truncate}',
                               columns text[] default null, exclude text[] default null,
                               key text[] default null, "where" text default null, "when" text default null,
                               old_row boolean default false, replace boolean default false)
returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_capture';
comment on function fanout.capture(regclass, text, text[], text[], text[], text[], text, text, boolean, boolean) is
'publishes every change of a table to a topic, from the next statement on. operations: among insert, update, delete, truncate; columns, exclude: which columns the message carries (NULL: all); key: columns that make the message key (NULL: primary key, else replica identity, else none); where: SQL condition on the row, as in a WHERE clause: only rows for which it is true are published, an update that takes a row out of them is a delete, one that brings it in an insert (NULL: all rows); when: SQL condition on the event, over OLD and NEW, NULL values where an operation has no such row (NULL: always); old_row: messages of updates always carry the row as it was; replace: changes a capture that exists. Conditions are read with the caller''s search_path. The caller needs the right to create triggers on the table. Errors: 42704 unknown topic, 42703 unknown column, 42701 a column named twice, 42809 not a table, 22023 bad options, 42804 a condition that fails for some rows, 42501 missing rights, 42710 if it is captured differently';
revoke all on function fanout.capture(regclass, text, text[], text[], text[], text[], text, text, boolean, boolean) from public;

create function fanout.uncapture_statements(entity regclass, topic text) returns text[]
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(array_agg(format('drop trigger %I on %I.%I', t.name, n.nspname, r.relname)), '{}')
    from fanout.capture_trigger_list t
         join pg_class r on r.oid = t.entity join pg_namespace n on n.oid = r.relnamespace
    where t.entity = uncapture_statements.entity
      and (uncapture_statements.topic is null or t.topic = uncapture_statements.topic)
$$;
comment on function fanout.uncapture_statements(regclass, text) is
'internal: the statements that fanout.uncapture() runs';
revoke all on function fanout.uncapture_statements(regclass, text) from public;

create function fanout.end_captures(entity regclass, topic text) returns integer
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    delete from fanout.capture c
    where to_regclass(c.entity_name) = end_captures.entity and c.entity <> end_captures.entity
      and (end_captures.topic is null or c.topic = end_captures.topic);
    select count(*)::integer from fanout.captures_of(end_captures.entity) c
    where end_captures.topic is null or c.topic = end_captures.topic
$$;
comment on function fanout.end_captures(regclass, text) is
'internal: how many captures of a table fanout.uncapture() ends; forgets those of a table whose place this one took';
revoke all on function fanout.end_captures(regclass, text) from public;

create function fanout.uncapture(entity regclass, topic text default null) returns integer
language c volatile
as 'MODULE_PATHNAME', 'pgf_uncapture';
comment on function fanout.uncapture(regclass, text) is
'ends the capture of a table into a topic (NULL: into all topics); returns how many captures there were. The caller must own the table. Errors: 42501 missing rights';
revoke all on function fanout.uncapture(regclass, text) from public;


-- ---------------------------------------------------------------------------
-- What other commands do to captured tables
-- ---------------------------------------------------------------------------

create function fanout.set_trigger_arguments(trigger oid, arguments text[]) returns void
language c volatile strict
as 'MODULE_PATHNAME', 'pgf_set_trigger_arguments';
comment on function fanout.set_trigger_arguments(oid, text[]) is
'internal: replaces the arguments of a capture trigger';
revoke all on function fanout.set_trigger_arguments(oid, text[]) from public;

-- The options of a capture's triggers that are its topic's, for a dump of the schema
-- alone (see capture_arguments()), before those that differ between its triggers.
create function fanout.with_topic_options(args text[], format text, on_exhausted text) returns text[]
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    with pair as (
        select n, args[n] as name, args[n + 1] as value from generate_series(2, cardinality(args), 2) n
    )
    select args[1:1]
           || coalesce((select array_agg(v order by n, place)
                        from pair, lateral (values (1, name), (2, value)) e(place, v)
                        where name in ('columns', 'exclude', 'key', 'where', 'when', 'old_row')), '{}')
           || case when format <> 'debezium' then array['format', format] else '{}' end
           || case when on_exhausted <> 'hold' then array['on_exhausted', on_exhausted] else '{}' end
           || coalesce((select array_agg(v order by n, place)
                        from pair, lateral (values (1, name), (2, value)) e(place, v)
                        where name not in ('columns', 'exclude', 'key', 'where', 'when', 'old_row',
                                           'format', 'on_exhausted')), '{}')
$$;
comment on function fanout.with_topic_options(text[], text, text) is
'internal: arguments of a capture trigger with other options of its topic';
revoke all on function fanout.with_topic_options(text[], text, text) from public;

create function fanout.alter_topic_as(role regrole, topic text, format text, on_exhausted text)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    altered fanout.topic;
    t fanout.capture_trigger_list;
begin
    perform fanout.check_topic_grant(alter_topic_as.role, alter_topic_as.topic, 'declare');
    perform fanout.check_topic_options(coalesce(alter_topic_as.format, 'debezium'),
                                       coalesce(alter_topic_as.on_exhausted, 'hold'));
    update fanout.topic o
    set format = coalesce(alter_topic_as.format, o.format),
        on_exhausted = coalesce(alter_topic_as.on_exhausted, o.on_exhausted)
    where o.topic_id = fanout.require_topic(alter_topic_as.topic)
    returning o.* into altered;
    for t in select l.* from fanout.capture_trigger_list l where l.topic = alter_topic_as.topic
             order by l.entity, l.trigger
    loop
        execute pg_catalog.format('lock table only %s in share row exclusive mode', fanout.qualified_name(t.entity));
        perform fanout.set_trigger_arguments(
            t.trigger, fanout.with_topic_options(fanout.trigger_arguments(t.trigger),
                                                 altered.format, altered.on_exhausted));
    end loop;
end
$$;
comment on function fanout.alter_topic_as(regrole, text, text, text) is 'internal: what fanout.alter_topic() does with the rights of pg_fanout';
revoke all on function fanout.alter_topic_as(regrole, text, text, text) from public;

create function fanout.alter_topic(topic text, format text default null, on_exhausted text default null)
returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_declare';
comment on function fanout.alter_topic(text, text, text) is
'changes a topic. format: body of changes that are captured from then on; on_exhausted: what happens from then on to a message that the broker refused pg_fanout.retry_limit times; NULL: as it is. Waits for transactions that have written to tables which are captured into the topic, and keeps others from it until it commits. Errors: 42704 unknown topic, 22023 an unknown option, 42501';
revoke all on function fanout.alter_topic(text, text, text) from public;

create function fanout.bind_new_triggers() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    t fanout.capture_trigger_list;
begin
    for t in select l.* from pg_event_trigger_ddl_commands() c join fanout.capture_trigger_list l on l.trigger = c.objid
             where c.classid = 'pg_trigger'::regclass
    loop
        perform fanout.bind_trigger(t);
        perform fanout.check_condition(t.entity, t.topic);
    end loop;
    delete from fanout.captured_column c
    where not exists (select from pg_trigger g where g.tgrelid = c.entity and g.tgname = c.trigger);
end
$$;
comment on function fanout.bind_new_triggers() is
'internal: part of fanout.schema_changed(); triggers that were created, replaced or renamed';
revoke all on function fanout.bind_new_triggers() from public;

-- Dropped with the table, with a column that their condition names, or by hand.
-- Where another table has the dropped one's name, it may have taken its place:
-- check() tells that it is not captured.
create function fanout.forget_captures() returns void
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    delete from fanout.capture c
    where not exists (select from pg_trigger t where t.tgrelid = c.entity
                      and t.tgfoid = 'fanout.capture_trigger()'::regprocedure
                      and fanout.trigger_topic(t.tgargs) = c.topic)
      and (to_regclass(c.entity_name) is null
           or exists (select from pg_class r where r.oid = c.entity));
    delete from fanout.captured_column c
    where not exists (select from pg_trigger t where t.tgrelid = c.entity and t.tgname = c.trigger);
$$;
comment on function fanout.forget_captures() is 'internal: part of fanout.schema_changed()';
revoke all on function fanout.forget_captures() from public;

-- A column that is exchanged for another one of its name, or that comes back, is
-- meant by what names it.
create function fanout.replace_dropped_columns() returns table (entity oid, trigger text)
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    update fanout.captured_column c set attnum = live.attnum
    from pg_attribute live
    where live.attrelid = c.entity and live.attname = c.name and live.attnum > 0 and not live.attisdropped
      and live.attnum <> c.attnum
      and not exists (select from pg_attribute a where a.attrelid = c.entity and a.attnum = c.attnum
                      and a.attnum > 0 and not a.attisdropped)
    returning c.entity, c.trigger
$$;
comment on function fanout.replace_dropped_columns() is 'internal: part of fanout.schema_changed()';
revoke all on function fanout.replace_dropped_columns() from public;

create function fanout.follow_columns(entity oid, trigger text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
    perform fanout.set_trigger_arguments(l.trigger, (
        select array_agg(case when n % 2 = 1 and l.args[n - 1] in ('columns', 'exclude', 'key')
                              then fanout.captured_columns(l.entity, l.name, l.args[n - 1], l.args)::text
                              else a end order by n)
        from unnest(l.args) with ordinality u(a, n)))
    from fanout.capture_trigger_list l
    where l.entity = follow_columns.entity and l.name = follow_columns.trigger;
    update fanout.captured_column c
    set name = case when a.attisdropped then c.name else a.attname end,
        attnum = case when a.attisdropped then 0 else c.attnum end
    from pg_attribute a
    where c.entity = follow_columns.entity and c.trigger = follow_columns.trigger
      and a.attrelid = c.entity and a.attnum = c.attnum;
end
$$;
comment on function fanout.follow_columns(oid, text) is
'internal: makes the arguments of a capture trigger name its columns as they are called now';
revoke all on function fanout.follow_columns(oid, text) from public;

create function fanout.follow_changed_columns() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    t record;
begin
    for t in select distinct * from fanout.replace_dropped_columns() loop
        perform fanout.follow_columns(t.entity, t.trigger);
    end loop;
    -- a dropped column has another name, too
    for t in select distinct c.entity, c.trigger
             from fanout.captured_column c join pg_attribute a on a.attrelid = c.entity and a.attnum = c.attnum
             where a.attname <> c.name
    loop
        perform fanout.follow_columns(t.entity, t.trigger);
    end loop;
end
$$;
comment on function fanout.follow_changed_columns() is 'internal: part of fanout.schema_changed()';
revoke all on function fanout.follow_changed_columns() from public;

-- Refuses to alter a captured table, or one above it, so that its condition would
-- fail.  Whoever alters a type is only told: the table is not theirs.
create function fanout.check_conditions(of_types boolean) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    t record;
    why text;
begin
    for t in
        with recursive altered(relid) as (
            select d.objid from pg_event_trigger_ddl_commands() d where d.classid = 'pg_class'::regclass
            union
            select i.inhrelid from pg_inherits i join altered a on i.inhparent = a.relid
        )
        select c.entity, c.topic, c.entity in (select relid from altered) as is_altered
        from fanout.capture c
        where (c.entity in (select relid from altered)
               or of_types and (
                   exists (select from pg_attribute a join pg_type y on y.oid = a.atttypid
                                left join pg_type e on e.oid = y.typelem
                           where a.attrelid = c.entity and a.attnum > 0
                             and (y.typtype in ('c', 'd', 'r', 'm') or e.typtype in ('c', 'd', 'r', 'm')))
                   or exists (select from pg_class r where r.oid = c.entity and r.reloftype <> 0)))
        order by 1, 2
    loop
        begin
            perform fanout.check_condition(t.entity, t.topic);
        exception when datatype_mismatch then
            if t.is_altered then
                raise;
            end if;
            get stacked diagnostics why = pg_exception_detail;
            raise warning '%', sqlerrm
                using detail = why,
                      hint = 'Updates of the table fail. Use fanout.capture() with another condition and replace => true.';
        end;
    end loop;
end
$$;
comment on function fanout.check_conditions(boolean) is
'internal: part of fanout.schema_changed(); of_types: the command may have changed types';
revoke all on function fanout.check_conditions(boolean) from public;

-- Looks only at what this command drops.
create function fanout.keep_keys() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    lost record;
begin
    select c.* into lost
    from pg_event_trigger_dropped_objects() d
         join fanout.captured_column c on c.entity = d.objid and c.attnum = d.objsubid
    where d.classid = 'pg_class'::regclass and d.objsubid > 0 and c.option = 'key'
      and exists (select from pg_class r where r.oid = c.entity)
      and exists (select from pg_trigger t where t.tgrelid = c.entity and t.tgname = c.trigger)
      and not exists (select from pg_attribute a where a.attrelid = c.entity and a.attname = c.name
                      and not a.attisdropped)
    order by c.entity, c.trigger limit 1;
    if found then
        raise exception 'cannot drop column "%" of table %', lost.name, lost.entity::regclass
            using errcode = 'dependent_objects_still_exist',
                  detail = format('Trigger "%s" of a capture names it in the key.', lost.trigger),
                  hint = 'Use fanout.uncapture(), or fanout.capture() with another key and replace => true, first.';
    end if;
end
$$;
comment on function fanout.keep_keys() is
'internal: part of fanout.objects_dropped(). Errors: 2BP01';
revoke all on function fanout.keep_keys() from public;

create function fanout.tell_lost_triggers() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    t record;
begin
    for t in
        select distinct c.entity, c.topic
        from pg_event_trigger_dropped_objects() d
             join fanout.capture c on c.entity = to_regclass(format('%I.%I', d.address_names[1], d.address_names[2]))
        where d.classid = 'pg_trigger'::regclass and not d.original
          and d.address_names[3] in (
              select fanout.trigger_name(c.topic, k)
              from unnest(array['row', 'insert', 'update', 'delete', 'leave', 'enter', 'truncate']) k)
        order by 1, 2
    loop
        raise warning 'capture of table % into topic "%" has lost triggers', t.entity::regclass, t.topic
            using detail = 'They were dropped with what their conditions named. What they published goes unpublished.',
                  hint = 'Use fanout.capture() with replace => true.';
    end loop;
end
$$;
comment on function fanout.tell_lost_triggers() is 'internal: part of fanout.objects_dropped()';
revoke all on function fanout.tell_lost_triggers() from public;

create function fanout.objects_dropped() returns event_trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if to_regclass('fanout.captured_column') is null then
        return;                     -- the schema was renamed while event triggers were off
    end if;
    perform fanout.keep_keys();
    perform fanout.tell_lost_triggers();
end
$$;
comment on function fanout.objects_dropped() is
'internal: refuses to drop a column that a capture''s key names, and tells which captures lose triggers. Errors: 2BP01';
revoke all on function fanout.objects_dropped() from public;

-- In PL/pgSQL, and quick where no captured table is concerned: commands on other
-- tables must work even where the library is gone.
create function fanout.schema_changed() returns event_trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if tg_tag in ('CREATE TRIGGER', 'ALTER TRIGGER', 'CREATE SCHEMA', 'CREATE EXTENSION', 'ALTER EXTENSION')
       and to_regprocedure('fanout.capture_trigger()') is not null
       and exists (select from pg_event_trigger_ddl_commands() c join pg_trigger t on t.oid = c.objid
                   where c.classid = 'pg_trigger'::regclass
                     and t.tgfoid = to_regprocedure('fanout.capture_trigger()'))
    then
        perform fanout.bind_new_triggers();
    end if;
    -- pg_restore --disable-triggers has filled it
    if tg_tag = 'ALTER TABLE'
       and exists (select from pg_event_trigger_ddl_commands() c where c.objid = to_regclass('fanout.identity'))
    then
        perform fanout.restart_workers();
    end if;
    if to_regclass('fanout.capture') is null then
        return;                     -- the schema was renamed while event triggers were off
    elsif not exists (select from fanout.capture) then
        return;
    elsif tg_tag like 'ALTER %' or tg_tag like 'DROP %' then
        perform fanout.forget_captures();
        perform fanout.follow_changed_columns();
    end if;
    if tg_tag like 'ALTER %' then
        perform fanout.check_conditions(tg_tag in ('ALTER TYPE', 'ALTER DOMAIN', 'ALTER TABLE'));
    end if;
end
$$;
comment on function fanout.schema_changed() is
'internal: keeps captures true when tables and types are changed. Errors: 42804 when a condition would fail for some rows, 42703 when a trigger of a capture is created that names a column which does not exist';
revoke all on function fanout.schema_changed() from public;

create event trigger pg_fanout_schema_changed on ddl_command_end
execute function fanout.schema_changed();
-- Also where session_replication_role is "replica": a dump restored there would
-- name the columns as they were.
alter event trigger pg_fanout_schema_changed enable always;
comment on event trigger pg_fanout_schema_changed is 'pg_fanout: keeps captures true when tables and types are changed';

-- Whoever creates a trigger asks for himself.
create function fanout.check_capture_grant(trigger oid) returns void
language c stable strict
as 'MODULE_PATHNAME', 'pgf_check_capture_grant';
comment on function fanout.check_capture_grant(oid) is
'internal: raises an error unless the caller may capture into the topic that a trigger names';

-- With the rights of whoever creates the trigger, and no more than the catalog looked
-- at unless it is a capture's: he may have no right on this schema, and the library
-- may be gone.
create function fanout.trigger_created() returns event_trigger
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    capture oid;
begin
    for capture in
        select t.oid from pg_event_trigger_ddl_commands() c join pg_trigger t on t.oid = c.objid
        join pg_proc p on p.oid = t.tgfoid join pg_namespace n on n.oid = p.pronamespace
        where c.classid = 'pg_trigger'::regclass and n.nspname = 'fanout' and p.proname = 'capture_trigger'
    loop
        perform fanout.check_capture_grant(capture);
    end loop;
    if exists (select from pg_event_trigger_ddl_commands() c join pg_trigger t on t.oid = c.objid
               join pg_proc p on p.oid = t.tgfoid join pg_namespace n on n.oid = p.pronamespace,
               pg_proc f join pg_namespace m on m.oid = f.pronamespace
               where c.classid = 'pg_trigger'::regclass and (n.nspname <> 'fanout' or p.proname <> 'capture_trigger')
                 and m.nspname = 'fanout' and f.proname = 'count_change'
                 and strpos(t.tgqual::text, format('{FUNCEXPR :funcid %s ', f.oid)) > 0)
    then
        raise exception 'function fanout.count_change() cannot be called in the condition of this trigger'
            using errcode = 'invalid_object_definition',
                  detail = 'It counts the messages that capture triggers are going to write.';
    end if;
end
$$;
comment on function fanout.trigger_created() is
'internal: refuses a trigger that captures into a topic for which its creator has no grant, and one that counts as captures do. Errors: 42501, 42P17';
revoke all on function fanout.trigger_created() from public;

create event trigger pg_fanout_trigger_created on ddl_command_end
when tag in ('CREATE TRIGGER', 'CREATE SCHEMA')
execute function fanout.trigger_created();
alter event trigger pg_fanout_trigger_created enable always;
comment on event trigger pg_fanout_trigger_created is 'pg_fanout: lets tables be captured by those alone who may';

create event trigger pg_fanout_objects_dropped on sql_drop
execute function fanout.objects_dropped();
alter event trigger pg_fanout_objects_dropped enable always;
comment on event trigger pg_fanout_objects_dropped is
'pg_fanout: keeps the columns of captures'' keys, and tells which captures lose triggers';


-- ---------------------------------------------------------------------------
-- Publishing by hand, and control
-- ---------------------------------------------------------------------------

create function fanout.publish(topic text, payload jsonb, key text default null,
                               type text default null, headers jsonb default '{}')
returns uuid
language c volatile
as 'MODULE_PATHNAME', 'pgf_publish';
comment on function fanout.publish(text, jsonb, text, text, jsonb) is
'writes a message; it is published once this transaction has committed. payload: the body; key: messages of the same key keep their order; type: AMQP property; headers: object of strings, numbers, booleans, nulls. Returns the message id. Errors: 42704 unknown topic, 22004 topic or payload is null, 22023 bad headers or a type over 255 bytes, 25006 in a read-only transaction';
revoke all on function fanout.publish(text, jsonb, text, text, jsonb) from public;

create function fanout.pause_topic(topic text) returns void
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    update fanout.topic t set paused = true
    where t.topic_id = fanout.require_topic(pause_topic.topic) and not t.paused
$$;
comment on function fanout.pause_topic(text) is 'internal: part of fanout.pause()';
revoke all on function fanout.pause_topic(text) from public;

create function fanout.resume_topic(topic text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    id integer := fanout.require_topic(resume_topic.topic);
begin
    update fanout.stall s set retry_at = clock_timestamp() where s.topic_id = id;
    update fanout.topic t set paused = false where t.topic_id = id;
end
$$;
comment on function fanout.resume_topic(text) is 'internal: part of fanout.resume()';
revoke all on function fanout.resume_topic(text) from public;

create function fanout.pause(topic text, consumer_group text default null) returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_pause';
comment on function fanout.pause(text, text) is
'holds a topic''s messages back, in order, until fanout.resume(); other topics flow. They stay in the outbox. With consumer_group: stops that subscription of this database; attempts and what waits are kept. Errors: 42704 unknown topic or subscription, 42501 somebody else''s subscription';
revoke all on function fanout.pause(text, text) from public;

create function fanout.resume(topic text, consumer_group text default null) returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_resume';
comment on function fanout.resume(text, text) is
'lets a paused topic flow again, what waits first; a stalled topic is tried again at once. With consumer_group: lets that subscription of this database go on. Errors: 42704 unknown topic or subscription, 42501 somebody else''s subscription';
revoke all on function fanout.resume(text, text) from public;

-- The workers' statements have query_change() for that (query.c).
create function fanout.require_rows(target text, changed bigint, wanted bigint) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if changed <> wanted then
        raise exception 'a statement of pg_fanout changed % rows instead of %', changed, wanted
            using errcode = 'data_corrupted',
                  detail = pg_catalog.format('The table is fanout.%s.', target),
                  hint = 'Look for a trigger or a rule on the table that keeps rows away, and drop it.';
    end if;
end
$$;
comment on function fanout.require_rows(text, bigint, bigint) is
'internal: after a statement that moved messages, refuses to go on without some of them. Errors: XX001';
revoke all on function fanout.require_rows(text, bigint, bigint) from public;

create function fanout.redrive_published(topic text, message_id uuid) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    taken bigint;
    moved bigint;
begin
    with dead as (
        delete from fanout.dead_letter d using fanout.topic t
        where d.consumer_group is null
          and t.topic = d.topic and not t.dropping
          and (redrive_published.topic is null or d.topic = redrive_published.topic)
          and (redrive_published.message_id is null or d.message_id = redrive_published.message_id)
        returning d.*, t.topic_id
    ), held as (
        insert into fanout.held (id, xid, topic_id, message_id, type, key, headers, payload, queue, created_at)
        select id, xid, topic_id, message_id, type, key, headers, payload, queue, created_at from dead
        returning 1
    )
    select (select count(*) from dead), (select count(*) from held) into taken, moved;
    perform fanout.require_rows('held', moved, taken);
    if moved > 0 then
        perform fanout.wake_publisher();
    end if;
    return moved;
end
$$;
comment on function fanout.redrive_published(text, uuid) is 'internal: part of fanout.redrive()';
revoke all on function fanout.redrive_published(text, uuid) from public;

create function fanout.redrive_delivered(topic text, message_id uuid, consumer_group text) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    marked bigint;
begin
    update fanout.dead_letter d set redriven_at = clock_timestamp()
    where d.redriven_at is null
      and (redrive_delivered.topic is null or d.topic = redrive_delivered.topic)
      and (redrive_delivered.message_id is null or d.message_id = redrive_delivered.message_id)
      and (redrive_delivered.consumer_group is null or d.consumer_group = redrive_delivered.consumer_group)
      and exists (select from fanout.subscription s
                  where s.topic = d.topic and s.consumer_group = d.consumer_group and s.active);
    get diagnostics marked = row_count;
    if marked > 0 then
        perform fanout.wake_consumers();
    end if;
    return marked;
end
$$;
comment on function fanout.redrive_delivered(text, uuid, text) is 'internal: part of fanout.redrive()';
revoke all on function fanout.redrive_delivered(text, uuid, text) from public;

create function fanout.note_undriven(message_id uuid) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    dead bigint;
    topics text;
begin
    select sum(d.count), string_agg(pg_catalog.format('"%s"', d.topic), ', ' order by d.topic) into dead, topics
    from (select d.topic, count(*) from fanout.dead_letter d
          where d.consumer_group is null
            and (note_undriven.message_id is null or d.message_id = note_undriven.message_id)
            and not exists (select from fanout.topic t where t.topic = d.topic and not t.dropping)
          group by d.topic) d;
    if dead > 0 then
        raise notice 'dead letters of topics that were dropped stay: %', dead
            using detail = pg_catalog.format('Topics: %s.', topics),
                  hint = 'Declare the topic again to redrive them, or use fanout.purge().';
    end if;
end
$$;
comment on function fanout.note_undriven(uuid) is 'internal: part of fanout.redrive()';
revoke all on function fanout.note_undriven(uuid) from public;

create function fanout.redrive(topic text default null, message_id uuid default null, consumer_group text default null)
returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
    if redrive.topic is not null
       and not exists (select from fanout.subscription s where s.topic = redrive.topic)
    then
        perform fanout.require_topic(redrive.topic);
    end if;
    if redrive.topic is null and redrive.consumer_group is null then
        perform fanout.note_undriven(redrive.message_id);
    end if;
    return fanout.redrive_delivered(redrive.topic, redrive.message_id, redrive.consumer_group)
           + case when redrive.consumer_group is null
                  then fanout.redrive_published(redrive.topic, redrive.message_id) else 0 end;
end
$$;
comment on function fanout.redrive(text, uuid, text) is
'tries dead letters again: of a topic (NULL: of all), or a single message; with consumer_group, only those of that subscription. The publisher''s go out in order of id, under their old message ids; a subscription''s go through its handler once more. The publisher''s of a topic that was dropped stay, with a NOTICE, until it is declared again. Returns how many. Errors: 42704 unknown topic';
revoke all on function fanout.redrive(text, uuid, text) from public;

-- A snapshot of a transaction does not list the transaction itself as in progress, and so
-- would show what it is yet to write, once a later one has ended.
create function fanout.committed_snapshot() returns pg_snapshot
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select case when own.xid < pg_snapshot_xmax(s.now) then
        (select format('%s:%s:%s', pg_snapshot_xmin(s.now), pg_snapshot_xmax(s.now), string_agg(x::text, ',' order by x))::pg_snapshot
         from (select pg_snapshot_xip(s.now) union select own.xid) running(x)) else s.now end
    from (select pg_current_snapshot()) s(now), (select pg_current_xact_id_if_assigned()) own(xid)
$$;
comment on function fanout.committed_snapshot() is
'internal: the current snapshot, but without what this transaction writes';
revoke all on function fanout.committed_snapshot() from public;

-- Messages in the outbox are only marked, whatever they are: by what the snapshot shows.
create function fanout.purge_held(topic text, message_id uuid) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    removed bigint;
    topics bigint;
    marks bigint;
    marked bigint;
begin
    delete from fanout.held h using fanout.topic t
    where t.topic_id = h.topic_id
      and (purge_held.topic is null or t.topic = purge_held.topic)
      and (purge_held.message_id is null or h.message_id = purge_held.message_id);
    get diagnostics removed = row_count;
    with waiting as (
        select t.topic_id, count(*) as count
        from fanout.pending p join fanout.topic t using (topic_id)
        where (purge_held.topic is null or t.topic = purge_held.topic)
          and (purge_held.message_id is null or p.message_id = purge_held.message_id)
          and (t.paused or exists (select from fanout.stall s where s.topic_id = t.topic_id))
          -- not what this transaction has written, unless it is named
          and (purge_held.message_id is not null or pg_visible_in_snapshot(p.xid, (select fanout.committed_snapshot())))
        group by t.topic_id
    ), mark as (
        insert into fanout.purged (topic_id, snapshot, message_id)
        select topic_id, fanout.committed_snapshot(), purge_held.message_id from waiting
        returning 1
    )
    select count(*), (select count(*) from mark), coalesce(sum(count), 0) into topics, marks, marked from waiting;
    perform fanout.require_rows('purged', marks, topics);
    return removed + marked;
end
$$;
comment on function fanout.purge_held(text, uuid) is 'internal: part of fanout.purge()';
revoke all on function fanout.purge_held(text, uuid) from public;

create function fanout.purge(topic text default null, message_id uuid default null, held boolean default false,
                             consumer_group text default null)
returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    removed bigint;
begin
    if purge.held then
        removed := fanout.purge_held(purge.topic, purge.message_id);
        if removed > 0 then
            perform fanout.wake_publisher();
        end if;
        return removed;
    else
        delete from fanout.dead_letter d
        where (purge.topic is null or d.topic = purge.topic)
          and (purge.message_id is null or d.message_id = purge.message_id)
          and (purge.consumer_group is null or d.consumer_group = purge.consumer_group);
    end if;
    get diagnostics removed = row_count;
    return removed;
end
$$;
comment on function fanout.purge(text, uuid, boolean, text) is
'removes dead letters for good: of a topic (NULL: of all), or a single message; with consumer_group, only those of that subscription; with held, gives up what waits of topics that are paused or stalled instead, as far as the call sees it, but for what its own transaction has written. Returns how many';
revoke all on function fanout.purge(text, uuid, boolean, text) from public;

create function fanout.flush(timeout interval default '30 s') returns boolean
language c volatile
as 'MODULE_PATHNAME', 'pgf_flush';
comment on function fanout.flush(interval) is
'waits until the broker has acknowledged everything that was committed before the call, messages and topology; false if that took longer than timeout. What waits of paused or stalled topics and refused topology, of whatever topic, count as not acknowledged; dead letters are over. Errors: 55000 if the library is not preloaded, 53400 if no publisher can be started, 22004 if timeout is null, 22023 if it is negative';
revoke all on function fanout.flush(interval) from public;

create function fanout.verify(timeout interval default '10 s') returns boolean
language c volatile
as 'MODULE_PATHNAME', 'pgf_verify';
comment on function fanout.verify(interval) is
'makes the publisher declare everything on the broker again, and waits until it has; false if that took longer than timeout. Errors: as fanout.flush()';
revoke all on function fanout.verify(interval) from public;


-- ---------------------------------------------------------------------------
-- Consuming: deliveries become transactions
-- ---------------------------------------------------------------------------

create type fanout.message as (
    message_id     uuid,
    topic          text,
    consumer_group text,
    type           text,
    key            text,
    sequence       bigint,
    headers        jsonb,
    body           jsonb,
    raw            bytea,
    published_at   timestamptz,
    redelivered    boolean,
    attempt        integer,
    content_type   text
);
comment on type fanout.message is 'a delivery, as handlers get it';
comment on column fanout.message.message_id is 'the AMQP property if it is a UUID, else derived from it, or from the content if there is none';
comment on column fanout.message.topic is 'as subscribed';
comment on column fanout.message.consumer_group is 'as subscribed';
comment on column fanout.message.type is 'AMQP property; NULL: absent';
comment on column fanout.message.key is 'header "key", a string or an integer; NULL: absent';
comment on column fanout.message.sequence is 'header "sequence"; NULL: absent, or no integer';
comment on column fanout.message.headers is 'all headers; {}: none';
comment on column fanout.message.body is 'the body; NULL: it is not JSON in UTF-8';
comment on column fanout.message.raw is 'the body''s bytes';
comment on column fanout.message.published_at is 'AMQP property timestamp, in whole seconds; NULL: absent';
comment on column fanout.message.redelivered is 'did the broker deliver it before, or is it a dead letter that was redriven?';
comment on column fanout.message.attempt is '1 unless the handler failed on it before';
comment on column fanout.message.content_type is 'AMQP property; NULL: absent';

create function fanout.subscriptions_changed() returns trigger
language c volatile
as 'MODULE_PATHNAME', 'pgf_subscriptions_changed';
comment on function fanout.subscriptions_changed() is
'internal: statement trigger on subscriptions, makes the publisher start and stop their workers once this transaction has committed';
revoke all on function fanout.subscriptions_changed() from public;

create sequence fanout.subscription_id_seq as integer;
comment on sequence fanout.subscription_id_seq is 'internal: ids of subscriptions';
revoke all on sequence fanout.subscription_id_seq from public;

-- A row stays when its subscription ends, so that the inbox is still its own
-- if it begins again.  Handler and roles are kept by name, so that a dump can be
-- restored where one of them is missing; see fanout.subscription_bound.
create table fanout.subscription (
    subscription_id integer primary key default nextval('fanout.subscription_id_seq'),
    topic           text        not null,
    consumer_group  text        not null,
    handler         text        not null,
    batch           boolean     not null,
    handler_owner   text        not null,
    role            text        not null,
    prefetch        integer     not null,
    max_attempts    integer     not null,
    retry_delay     interval    not null,
    max_retry_delay interval    not null,
    ordered         boolean     not null,
    handler_timeout interval    not null,
    on_failure      text        not null,
    wait_for        text[]      not null,
    max_wait        interval    not null,
    start_at        text,
    inbox_id        integer     not null default nextval('fanout.subscription_id_seq'),
    queue_declared  boolean,
    active          boolean     not null default true,
    paused          boolean     not null default false,
    drop_queue      boolean     not null default false,
    version         integer     not null default 1,
    subscribed_at   timestamptz not null default now(),
    unique (topic, consumer_group)
) using heap;
create unique index subscription_queue_idx on fanout.subscription ((topic || '_' || consumer_group)) where active;
alter sequence fanout.subscription_id_seq owned by fanout.subscription.subscription_id;
comment on table fanout.subscription is 'internal: one row per subscription; see the view fanout.subscriptions';
comment on column fanout.subscription.handler is 'schema and name, quoted where needed; its argument is fanout.message, or an array of it (batch)';
comment on column fanout.subscription.role is 'who subscribed, by the name that it had when it was last looked at';
comment on column fanout.subscription.handler_owner is 'as role';
comment on column fanout.subscription.start_at is 'where its stream is read from at first: first, last, next, an offset, or a time; NULL: its queue is no stream';
comment on column fanout.subscription.inbox_id is 'whose rows of the inbox are its own; another one: it knows no message any more';
comment on column fanout.subscription.queue_declared is 'did its worker declare the queue? NULL: it was not looked for yet';
comment on column fanout.subscription.paused is 'by fanout.pause()';
comment on column fanout.subscription.drop_queue is 'it has ended, and its worker is to delete the queue';
comment on column fanout.subscription.version is 'another one: the worker starts again';
revoke all on fanout.subscription from public;

select pg_extension_config_dump('fanout.subscription_id_seq', '');
select pg_extension_config_dump('fanout.subscription', '');

-- The only row of a subscription is updated with each batch.
create table fanout.stream_offset (
    inbox_id      integer primary key,
    stream_offset bigint  not null,
    message_id    uuid,
    missed        bigint  not null default 0
) using heap with (fillfactor = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
comment on table fanout.stream_offset is 'internal: how far each subscription has read its stream, written with the effects of what was read';
comment on column fanout.stream_offset.inbox_id is 'of fanout.subscription';
comment on column fanout.stream_offset.stream_offset is 'up to this one all messages were applied, given up or stored in the waiting room; -1: there was none yet';
comment on column fanout.stream_offset.message_id is 'of the message at that offset; NULL: not known';
comment on column fanout.stream_offset.missed is 'messages, at most, that the stream had removed before they were read';
revoke all on fanout.stream_offset from public;
select pg_extension_config_dump('fanout.stream_offset', '');

create trigger subscriptions_changed
after insert or update or delete or truncate
on fanout.subscription
for each statement execute function fanout.subscriptions_changed();
alter table fanout.subscription enable always trigger subscriptions_changed;

-- What the names in a subscription mean, as long as the database is the same: so
-- they can be renamed, and what has their name later is not taken for them.  It is
-- not dumped.  In a database restored from a dump there is nothing yet, and the
-- names are what counts, until the worker has found what they mean.
create table fanout.subscription_bound (
    subscription_id integer primary key,
    role            oid,
    handler_owner   oid,
    target          oid
) using heap;
comment on table fanout.subscription_bound is 'internal: oids of what subscriptions name, in this database; NULL: not looked up since it was restored';
comment on column fanout.subscription_bound.target is 'of fanout.sync_table(); attribute numbers in fanout.sync_column are those of this table';
revoke all on fanout.subscription_bound from public;

create function fanout.subscriber(s fanout.subscription) returns regrole
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select r.oid::regrole from (select) x left join fanout.subscription_bound b on b.subscription_id = s.subscription_id
         join pg_roles r on case when b.role is not null then r.oid = b.role else r.rolname = s.role end
$$;
comment on function fanout.subscriber(fanout.subscription) is
'internal: the role that subscribed; NULL: there is none';
revoke all on function fanout.subscriber(fanout.subscription) from public;

create function fanout.handler_owner(s fanout.subscription) returns regrole
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select r.oid::regrole from (select) x left join fanout.subscription_bound b on b.subscription_id = s.subscription_id
         join pg_roles r on case when b.handler_owner is not null then r.oid = b.handler_owner else r.rolname = s.handler_owner end
$$;
comment on function fanout.handler_owner(fanout.subscription) is
'internal: the role that owned the handler when it was subscribed; NULL: there is none';
revoke all on function fanout.handler_owner(fanout.subscription) from public;

create table fanout.topic_grant (
    grant_id       uuid primary key default gen_random_uuid(),
    role           text not null,
    topic          text,
    consumer_group text,
    what           text not null
) using heap;
comment on table fanout.topic_grant is 'internal: who may do what with a topic, by fanout.grant_topic()';
comment on column fanout.topic_grant.role is 'by the name that it had when it was last looked at';
comment on column fanout.topic_grant.topic is 'NULL: all topics';
comment on column fanout.topic_grant.consumer_group is 'NULL: all consumer groups';
revoke all on fanout.topic_grant from public;
select pg_extension_config_dump('fanout.topic_grant', '');

-- As fanout.subscription_bound: a dump has the name, which need not be there, and in
-- this database the oid decides, so that a new role does not get what one of its name had.
create table fanout.topic_grant_bound (
    grant_id uuid primary key,
    role     oid not null
) using heap;
comment on table fanout.topic_grant_bound is 'internal: which roles are named in fanout.topic_grant, in this database; no row: whichever has the name';
revoke all on fanout.topic_grant_bound from public;

create function fanout.bind_grants() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    -- who asks for a right only reads it
    lock table fanout.topic_grant in share row exclusive mode;
    delete from fanout.topic_grant g using fanout.topic_grant_bound b
    where b.grant_id = g.grant_id and not exists (select from pg_roles r where r.oid = b.role);
    delete from fanout.topic_grant_bound b where not exists (select from fanout.topic_grant g where g.grant_id = b.grant_id);
    update fanout.topic_grant g set role = r.rolname from fanout.topic_grant_bound b join pg_roles r on r.oid = b.role
    where b.grant_id = g.grant_id and g.role <> r.rolname;
    insert into fanout.topic_grant_bound (grant_id, role)
    select g.grant_id, r.oid from fanout.topic_grant g join pg_roles r on r.rolname = g.role
    where not exists (select from fanout.topic_grant_bound b where b.grant_id = g.grant_id)
    on conflict do nothing;
end
$$;
comment on function fanout.bind_grants() is
'internal: notes which roles have been granted something, and the names that these have now; ends the grants of roles that were dropped';
revoke all on function fanout.bind_grants() from public;

create table fanout.inbox (
    segment    smallint not null,
    inbox_id   integer  not null,
    message_id uuid     not null,
    primary key (inbox_id, message_id, segment)
) partition by list (segment);
comment on table fanout.inbox is
'internal: messages that were applied, or given up; insert-only, in a ring of four segments, for pg_fanout.inbox_retention at least';
revoke all on fanout.inbox from public;

create table fanout.inbox_0 partition of fanout.inbox for values in (0) using heap;
create table fanout.inbox_1 partition of fanout.inbox for values in (1) using heap;
create table fanout.inbox_2 partition of fanout.inbox for values in (2) using heap;
create table fanout.inbox_3 partition of fanout.inbox for values in (3) using heap;
comment on table fanout.inbox_0 is 'internal: a segment of the inbox';
comment on table fanout.inbox_1 is 'internal: a segment of the inbox';
comment on table fanout.inbox_2 is 'internal: a segment of the inbox';
comment on table fanout.inbox_3 is 'internal: a segment of the inbox';
revoke all on fanout.inbox_0, fanout.inbox_1, fanout.inbox_2, fanout.inbox_3 from public;

create table fanout.inbox_rotation (
    current    smallint    not null,
    rotated_at timestamptz not null
) using heap;
alter table fanout.inbox_rotation replica identity full;
create unique index inbox_rotation_one_row on fanout.inbox_rotation ((true));
comment on table fanout.inbox_rotation is 'internal: one row, the segment that the inbox grows in, and since when';
insert into fanout.inbox_rotation values (0, now());
revoke all on fanout.inbox_rotation from public;

-- Messages that were acked and are yet to be applied.  An ordered subscription
-- tries them in order of place; one with next_try NULL waits behind another of its
-- keys, which are hashes.
create table fanout.waiting (
    waiting_id      bigint generated always as identity primary key,
    subscription_id integer     not null,
    message_id      uuid        not null,
    place           bigint      not null,
    key1            bigint,
    key2            bigint,
    barrier         boolean     not null,
    type            text,
    key             text,
    sequence        bigint,
    headers         jsonb       not null,
    payload         text,
    raw             bytea,
    published_at    timestamptz,
    redelivered     boolean     not null,
    content_type    text,
    attempts        integer     not null,
    postponed       integer     not null,
    sqlstate        text,
    error           text,
    failed_at       timestamptz,
    waits_since     timestamptz,
    next_try        timestamptz,
    requeued        boolean     not null default false,
    unique (subscription_id, message_id),
    check (requeued or (payload is null) <> (raw is null))
) using heap with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000);
create index waiting_place_idx on fanout.waiting (subscription_id, place, waiting_id);
create index waiting_key1_idx on fanout.waiting (subscription_id, key1, place, waiting_id) where key1 is not null;
create index waiting_key2_idx on fanout.waiting (subscription_id, key2, place, waiting_id) where key2 is not null;
create index waiting_barrier_idx on fanout.waiting (subscription_id, place, waiting_id) where barrier;
create index waiting_next_try_idx on fanout.waiting (subscription_id, next_try) where next_try is not null and not requeued;
comment on table fanout.waiting is 'internal: the waiting room, messages that were acked and are yet to be applied; see the view fanout.delivery_failure';
comment on column fanout.waiting.place is 'the message''s sequence, or that of the one before it';
comment on column fanout.waiting.payload is 'the body as text; NULL: see raw';
comment on column fanout.waiting.attempts is 'attempts that count';
comment on column fanout.waiting.postponed is 'tries that did not count, in a row';
comment on column fanout.waiting.waits_since is 'when it first failed with an error of wait_for';
comment on column fanout.waiting.requeued is 'it waits in its queue, and only its attempts are here';
comment on column fanout.waiting.next_try is 'NULL: behind another message of its keys';
comment on sequence fanout.waiting_waiting_id_seq is 'internal: order of what came into the waiting room';
revoke all on sequence fanout.waiting_waiting_id_seq from public;
revoke all on fanout.waiting from public;

create function fanout.check_interval(what text, value interval, lowest interval, highest interval) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if value is null then
        raise exception '% must not be null', what
            using errcode = 'null_value_not_allowed';
    elsif value < lowest or value > highest then
        raise exception '% must be between % and %', what, lowest, highest
            using errcode = 'invalid_parameter_value';
    end if;
end
$$;
comment on function fanout.check_interval(text, interval, interval, interval) is 'internal: raises an error unless the interval is within limits';
revoke all on function fanout.check_interval(text, interval, interval, interval) from public;

create function fanout.check_number(what text, value integer, lowest integer, highest integer) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if value is null then
        raise exception '% must not be null', what
            using errcode = 'null_value_not_allowed';
    elsif value < lowest or value > highest then
        raise exception '% must be between % and %', what, lowest, highest
            using errcode = 'invalid_parameter_value';
    end if;
end
$$;
comment on function fanout.check_number(text, integer, integer, integer) is 'internal: raises an error unless the number is within limits';
revoke all on function fanout.check_number(text, integer, integer, integer) from public;

create function fanout.check_grant(role regrole, what text[], consumer_group text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if check_grant.role is null or check_grant.what is null then
        raise exception 'role and what must not be null'
            using errcode = 'null_value_not_allowed';
    elsif not exists (select from pg_roles r where r.oid = check_grant.role) then
        raise exception 'role with OID % does not exist', check_grant.role::oid
            using errcode = 'undefined_object';
    elsif not check_grant.what <@ '{declare,capture,publish,subscribe}' then
        raise exception 'what must be among declare, capture, publish and subscribe'
            using errcode = 'invalid_parameter_value';
    elsif check_grant.consumer_group is not null and not check_grant.what <@ '{declare,subscribe}' then
        raise exception 'consumer_group goes with declare and subscribe only'
            using errcode = 'invalid_parameter_value',
                  detail = 'What is captured and published comes to all consumer groups.';
    end if;
end
$$;
comment on function fanout.check_grant(regrole, text[], text) is 'internal: raises an error unless the arguments of fanout.grant_topic() are valid';
revoke all on function fanout.check_grant(regrole, text[], text) from public;

create function fanout.grant_topic(topic text, role regrole, what text[] default '{subscribe}', consumer_group text default null)
returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
    perform fanout.check_grant(grant_topic.role, grant_topic.what, grant_topic.consumer_group);
    perform fanout.bind_grants();
    insert into fanout.topic_grant (role, topic, consumer_group, what)
    select pg_get_userbyid(grant_topic.role), grant_topic.topic, grant_topic.consumer_group, w
    from (select distinct unnest(grant_topic.what)) u(w)
    where not exists (
        select from fanout.topic_grant g
        where g.role = pg_get_userbyid(grant_topic.role) and g.topic is not distinct from grant_topic.topic
          and g.consumer_group is not distinct from grant_topic.consumer_group and g.what = u.w);
    perform fanout.bind_grants();
end
$$;
comment on function fanout.grant_topic(text, regrole, text[], text) is
'lets a role, and all that have its privileges, use a topic (NULL: all topics): what is among declare (and drop), capture, publish and subscribe; with a consumer_group, declare and subscribe are of its queue alone. A role needs EXECUTE on the functions, too; members of the role that owns pg_fanout, and superusers, need no grant. It follows a role that is renamed, and ends with one that is dropped; a dump has it by the role''s name, of a minute ago at worst. For administrators. Errors: 22004, 22023, 42704';
revoke all on function fanout.grant_topic(text, regrole, text[], text) from public;

create function fanout.revoke_topic(topic text, role regrole, what text[] default '{subscribe}', consumer_group text default null)
returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
    perform fanout.check_grant(revoke_topic.role, revoke_topic.what, revoke_topic.consumer_group);
    perform fanout.bind_grants();
    delete from fanout.topic_grant g
    where g.role = pg_get_userbyid(revoke_topic.role) and g.topic is not distinct from revoke_topic.topic
      and g.consumer_group is not distinct from revoke_topic.consumer_group and g.what = any (revoke_topic.what);
end
$$;
comment on function fanout.revoke_topic(text, regrole, text[], text) is
'takes back what fanout.grant_topic() gave with the same arguments; subscriptions that there are go on. For administrators. Errors: 22004, 22023, 42704';
revoke all on function fanout.revoke_topic(text, regrole, text[], text) from public;

create function fanout.check_failing(ordered boolean, on_failure text, wait_for text[]) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if check_failing.ordered is null then
        raise exception 'ordered must not be null'
            using errcode = 'null_value_not_allowed';
    elsif check_failing.on_failure is null or check_failing.on_failure not in ('wait', 'requeue') then
        raise exception 'on_failure must be "wait" or "requeue"'
            using errcode = 'invalid_parameter_value';
    elsif check_failing.on_failure = 'requeue' and check_failing.ordered then
        raise exception 'on_failure "requeue" needs ordered => false'
            using errcode = 'invalid_parameter_value',
                  detail = 'A message that is given back to its queue is overtaken by later ones.';
    elsif check_failing.wait_for is null
          or exists (select from unnest(check_failing.wait_for) c where c is null or c !~ '^[0-9A-Z]{5}$') then
        raise exception 'wait_for must be an array of SQLSTATEs'
            using errcode = 'invalid_parameter_value',
                  hint = 'For example {23503}, or {} for none.';
    end if;
end
$$;
comment on function fanout.check_failing(boolean, text, text[]) is
'internal: raises an error unless these options of fanout.subscribe() fit together';
revoke all on function fanout.check_failing(boolean, text, text[]) from public;

-- A time is returned in a form that says the same in every session.
create function fanout.check_start_at(start_at text) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    at timestamptz;
begin
    if check_start_at.start_at is null or check_start_at.start_at in ('first', 'last', 'next') then
        return check_start_at.start_at;
    elsif check_start_at.start_at ~ '^[0-9]+$' then
        if check_start_at.start_at::numeric > 9223372036854775807 then
            raise exception 'start_at is out of range'
                using errcode = 'invalid_parameter_value';
        end if;
        return check_start_at.start_at::bigint;
    end if;
    begin
        at := check_start_at.start_at::timestamptz;
    exception when data_exception then
        raise exception 'start_at must be "first", "last", "next", an offset or a time'
            using errcode = 'invalid_parameter_value';
    end;
    if at < 'epoch' or at > clock_timestamp() then
        raise exception 'start_at must be a time since 1970, and not in the future'
            using errcode = 'invalid_parameter_value';
    end if;
    return to_char(at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || '+00';
end
$$;
comment on function fanout.check_start_at(text) is
'internal: raises an error unless a stream can be read from there; returns it as it is kept';
revoke all on function fanout.check_start_at(text) from public;

create function fanout.check_stream(topic text, consumer_group text, start_at text, on_failure text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    declared text := (select b.queue_type from fanout.bindings b
                      where b.topic = check_stream.topic and b.consumer_group = check_stream.consumer_group
                        and b.state <> 'dropping');
begin
    if declared = 'stream' and check_stream.start_at is null then
        raise exception 'queue "%" is a stream', check_stream.topic || '_' || check_stream.consumer_group
            using errcode = 'invalid_parameter_value',
                  hint = 'Say where to begin, for example start_at => ''first''.';
    elsif declared <> 'stream' and check_stream.start_at is not null then
        raise exception 'queue "%" is no stream', check_stream.topic || '_' || check_stream.consumer_group
            using errcode = 'invalid_parameter_value',
                  detail = pg_catalog.format('It is declared as a %s queue. Only a stream can be read from a place of choice.', declared);
    elsif check_stream.start_at is not null and check_stream.on_failure = 'requeue' then
        raise exception 'on_failure "requeue" cannot be used with a stream'
            using errcode = 'invalid_parameter_value',
                  detail = 'A stream takes no message back.';
    end if;
end
$$;
comment on function fanout.check_stream(text, text, text, text) is
'internal: raises an error unless the options of fanout.subscribe() fit the queue, as far as that is known';
revoke all on function fanout.check_stream(text, text, text, text) from public;

create function fanout.check_handler(handler regprocedure) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    p pg_proc;
begin
    if check_handler.handler is null then
        raise exception 'handler must not be null'
            using errcode = 'null_value_not_allowed';
    end if;
    select * into p from pg_proc where oid = check_handler.handler;
    if not found then
        raise exception 'function with OID % does not exist', check_handler.handler::oid
            using errcode = 'undefined_function';
    elsif p.prokind <> 'f' or p.proretset or p.pronargs <> 1
          or p.proargtypes[0] not in ('fanout.message'::regtype, 'fanout.message[]'::regtype)
          or exists (select from pg_type t where t.oid = p.prorettype and t.typtype = 'p'
                     and t.typname not in ('void', 'record'))
    then
        raise exception 'function % cannot be a handler', check_handler.handler
            using errcode = 'wrong_object_type',
                  detail = 'A handler takes one argument, fanout.message or an array of it, and returns void, or a single value that is ignored.';
    end if;
    return p.proargtypes[0] = 'fanout.message[]'::regtype;
end
$$;
comment on function fanout.check_handler(regprocedure) is
'internal: raises an error unless the function can be a handler; true if it takes an array';
revoke all on function fanout.check_handler(regprocedure) from public;

create function fanout.check_subscriber(role regrole, handler regprocedure) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if not (select r.rolcanlogin from pg_roles r where r.oid = check_subscriber.role) then
        raise exception 'role % cannot subscribe because it may not log in', check_subscriber.role
            using errcode = 'insufficient_privilege',
                  detail = 'The handler runs in a session of the role that subscribes.',
                  hint = 'Subscribe as a role with LOGIN.';
    elsif not has_database_privilege(check_subscriber.role, current_database(), 'connect') then
        raise exception 'role % cannot subscribe because it may not connect to database %',
                        check_subscriber.role, quote_ident(current_database())
            using errcode = 'insufficient_privilege',
                  hint = 'Grant it CONNECT on the database.';
    elsif not has_function_privilege(check_subscriber.role, check_subscriber.handler, 'execute') then
        raise exception 'permission denied for function %', check_subscriber.handler
            using errcode = 'insufficient_privilege',
                  hint = pg_catalog.format('Grant EXECUTE on it to %s.', check_subscriber.role);
    end if;
end
$$;
comment on function fanout.check_subscriber(regrole, regprocedure) is
'internal: raises an error unless the role has the rights that its worker will need';
revoke all on function fanout.check_subscriber(regrole, regprocedure) from public;

-- What keeps a subscription from having a worker.
create function fanout.subscription_problem(s fanout.subscription) returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select case
        when r.oid is null then format('role "%s", which subscribed, does not exist', s.role)
        when not r.rolcanlogin then format('role %I may not log in any more', r.rolname)
        when not has_database_privilege(r.oid, current_database(), 'connect')
            then format('role %I may not connect to this database any more', r.rolname)
        end
    from (select) x left join pg_roles r on r.oid = fanout.subscriber(s)
$$;
comment on function fanout.subscription_problem(fanout.subscription) is
'internal: why a subscription can have no worker; NULL: it can';
revoke all on function fanout.subscription_problem(fanout.subscription) from public;

create function fanout.subscription_handler(s fanout.subscription) returns oid
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select to_regprocedure(s.handler || case when s.batch then '(fanout.message[])' else '(fanout.message)' end)::oid
$$;
comment on function fanout.subscription_handler(fanout.subscription) is
'internal: the handler of a subscription; NULL: there is none of that name';
revoke all on function fanout.subscription_handler(fanout.subscription) from public;

-- Another owner: what has its name now need not be what was meant.
create function fanout.handler_problem(s fanout.subscription) returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select case
        when p.oid is null then format('function %s does not exist any more', s.handler)
        when p.prokind <> 'f' or p.proretset then format('function %s cannot be a handler any more', s.handler)
        when p.proowner is distinct from fanout.handler_owner(s) then format('function %s has another owner now', s.handler)
        when not has_schema_privilege(h.role, p.pronamespace, 'usage')
            then format('permission denied for schema %s', p.pronamespace::regnamespace)
        when not has_function_privilege(h.role, p.oid, 'execute')
            then format('permission denied for function %s', s.handler)
        end
    from (select fanout.subscription_handler(s) as handler, fanout.subscriber(s)::oid as role) h left join pg_proc p on p.oid = h.handler
$$;
comment on function fanout.handler_problem(fanout.subscription) is
'internal: why a subscription cannot run its handler; NULL: it can';
revoke all on function fanout.handler_problem(fanout.subscription) from public;

-- A limit that is null is the broker's own: 20 since RabbitMQ 4, none before.
create function fanout.delivery_limit(b fanout.binding) returns numeric
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case when b.queue_type <> 'quorum' or b.dead_letter then null
                when jsonb_typeof(b.arguments -> 'x-delivery-limit') = 'null' then 20
                when jsonb_typeof(b.arguments -> 'x-delivery-limit') = 'number' and (b.arguments ->> 'x-delivery-limit')::numeric >= 0
                    then (b.arguments ->> 'x-delivery-limit')::numeric end
$$;
comment on function fanout.delivery_limit(fanout.binding) is
'internal: how often the queue of a binding takes a message back before it drops it; NULL: any number of times';
revoke all on function fanout.delivery_limit(fanout.binding) from public;

-- With the rights of pg_fanout, since views for monitoring call it.
create function fanout.queue_problem(s fanout.subscription) returns text
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select format('queue "%s" has a delivery limit of %s, and drops what on_failure "requeue" with max_attempts %s gives back to it more often; use on_failure "wait"',
                  b.queue, fanout.delivery_limit(b), s.max_attempts)
    from fanout.binding b join fanout.topic t using (topic_id)
    where t.topic = s.topic and b.consumer_group = s.consumer_group and s.on_failure = 'requeue'
      and fanout.delivery_limit(b) <= s.max_attempts - 2
$$;
comment on function fanout.queue_problem(fanout.subscription) is
'internal: why a queue that is declared in this database would lose messages of a subscription; NULL: it would not';
revoke all on function fanout.queue_problem(fanout.subscription) from public;

create function fanout.check_queue_is_free(topic text, consumer_group text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    other fanout.subscription;
begin
    select * into other from fanout.subscription s
    where s.topic || '_' || s.consumer_group = check_queue_is_free.topic || '_' || check_queue_is_free.consumer_group
      and s.topic <> check_queue_is_free.topic and s.active;
    if found then
        raise exception 'queue "%" is consumed already', other.topic || '_' || other.consumer_group
            using errcode = 'duplicate_object',
                  detail = pg_catalog.format('Consumer group "%s" is subscribed to topic "%s".', other.consumer_group, other.topic);
    end if;
end
$$;
comment on function fanout.check_queue_is_free(text, text) is
'internal: raises an error if a subscription of another topic and consumer group consumes the queue';
revoke all on function fanout.check_queue_is_free(text, text) from public;

create function fanout.add_subscription(role regrole, topic text, consumer_group text, handler regprocedure,
                                        prefetch integer, max_attempts integer, retry_delay interval,
                                        max_retry_delay interval, ordered boolean, handler_timeout interval,
                                        on_failure text default 'wait', wait_for text[] default '{23503}',
                                        max_wait interval default '1 h', start_at text default null)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    old fanout.subscription;
    new fanout.subscription;
    violated text;
begin
    perform fanout.check_name('topic', add_subscription.topic);
    perform fanout.check_name('consumer group', add_subscription.consumer_group);
    perform fanout.check_name('queue', add_subscription.topic || '_' || add_subscription.consumer_group);
    new.batch := fanout.check_handler(add_subscription.handler);
    perform fanout.check_number('prefetch', add_subscription.prefetch, 1, 65535);
    perform fanout.check_number('max_attempts', add_subscription.max_attempts, 1, 2147483647);
    perform fanout.check_interval('retry_delay', add_subscription.retry_delay, '1 ms', '1 day');
    perform fanout.check_interval('max_retry_delay', add_subscription.max_retry_delay, add_subscription.retry_delay, '1 day');
    perform fanout.check_interval('handler_timeout', add_subscription.handler_timeout, '1 ms', '12 h');
    perform fanout.check_interval('max_wait', add_subscription.max_wait, '0 s', '1 year');
    perform fanout.check_failing(add_subscription.ordered, add_subscription.on_failure, add_subscription.wait_for);
    perform fanout.check_subscriber(add_subscription.role, add_subscription.handler);
    new.start_at := fanout.check_start_at(add_subscription.start_at);
    perform fanout.check_stream(add_subscription.topic, add_subscription.consumer_group, new.start_at, add_subscription.on_failure);
    perform fanout.check_dead_queue(add_subscription.topic || '_' || add_subscription.consumer_group, false);

    perform fanout.check_queue_is_free(add_subscription.topic, add_subscription.consumer_group);
    if not exists (select from fanout.topic t where t.topic = add_subscription.topic and not t.dropping)
       and not exists (select from fanout.subscription s where s.topic = add_subscription.topic)
    then
        raise notice 'topic "%" is not declared in this database', add_subscription.topic
            using detail = 'If the broker has no such exchange and queue, they are declared; fanout.check() tells.';
    end if;
    perform fanout.adopt_if_empty();

    select pg_catalog.format('%I.%I', n.nspname, p.proname), pg_get_userbyid(p.proowner), pg_get_userbyid(add_subscription.role)
    into new.handler, new.handler_owner, new.role
    from pg_proc p join pg_namespace n on n.oid = p.pronamespace
    where p.oid = add_subscription.handler;

    begin
        insert into fanout.subscription as s
            (topic, consumer_group, handler, batch, handler_owner, role, prefetch, max_attempts,
             retry_delay, max_retry_delay, ordered, handler_timeout, on_failure, wait_for, max_wait, start_at)
        values (add_subscription.topic, add_subscription.consumer_group, new.handler, new.batch, new.handler_owner,
                new.role, add_subscription.prefetch, add_subscription.max_attempts,
                add_subscription.retry_delay, add_subscription.max_retry_delay, add_subscription.ordered,
                add_subscription.handler_timeout, add_subscription.on_failure, add_subscription.wait_for,
                add_subscription.max_wait, new.start_at)
        on conflict (topic, consumer_group) do update
            set handler = excluded.handler, batch = excluded.batch, handler_owner = excluded.handler_owner,
                role = excluded.role, prefetch = excluded.prefetch, max_attempts = excluded.max_attempts,
                retry_delay = excluded.retry_delay, max_retry_delay = excluded.max_retry_delay,
                ordered = excluded.ordered, handler_timeout = excluded.handler_timeout,
                on_failure = excluded.on_failure, wait_for = excluded.wait_for, max_wait = excluded.max_wait,
                start_at = excluded.start_at, queue_declared = null, paused = false, drop_queue = false, active = true, version = s.version + 1, subscribed_at = now()
            where not s.active
        returning s.subscription_id into new.subscription_id;
    exception when unique_violation then
        get stacked diagnostics violated = constraint_name;
        if violated <> 'subscription_queue_idx' then
            raise;
        end if;
        -- another session was faster; it may be too new for this transaction's snapshot
        perform fanout.check_queue_is_free(add_subscription.topic, add_subscription.consumer_group);
        raise exception 'queue "%" is consumed already', add_subscription.topic || '_' || add_subscription.consumer_group
            using errcode = 'duplicate_object';
    end;
    if found then
        insert into fanout.subscription_bound as b (subscription_id, role, handler_owner)
        select new.subscription_id, add_subscription.role, p.proowner from pg_proc p where p.oid = add_subscription.handler
        on conflict (subscription_id) do update set role = excluded.role, handler_owner = excluded.handler_owner;
        if new.handler <> 'fanout.sync_messages' then
            perform fanout.forget_sync_target(new.subscription_id);
        end if;
        return;
    end if;

    select * into strict old from fanout.subscription s
    where s.topic = add_subscription.topic and s.consumer_group = add_subscription.consumer_group;
    perform fanout.raise_difference(
        pg_catalog.format('subscription of consumer group "%s" to topic "%s"',
                          add_subscription.consumer_group, add_subscription.topic),
        array_remove(array[
            fanout.difference('handler', old.handler || case when old.batch then '(fanout.message[])' else '(fanout.message)' end,
                              new.handler || case when new.batch then '(fanout.message[])' else '(fanout.message)' end),
            fanout.difference('role', coalesce(fanout.subscriber(old)::text, old.role), add_subscription.role::text),
            fanout.difference('prefetch', old.prefetch::text, add_subscription.prefetch::text),
            fanout.difference('max_attempts', old.max_attempts::text, add_subscription.max_attempts::text),
            fanout.difference('retry_delay', old.retry_delay::text, add_subscription.retry_delay::text),
            fanout.difference('max_retry_delay', old.max_retry_delay::text, add_subscription.max_retry_delay::text),
            fanout.difference('ordered', old.ordered::text, add_subscription.ordered::text),
            fanout.difference('handler_timeout', old.handler_timeout::text, add_subscription.handler_timeout::text),
            fanout.difference('on_failure', old.on_failure, add_subscription.on_failure),
            fanout.difference('wait_for', old.wait_for::text, add_subscription.wait_for::text),
            fanout.difference('max_wait', old.max_wait::text, add_subscription.max_wait::text),
            fanout.difference('start_at', old.start_at, new.start_at)],
            null));
end
$$;
comment on function fanout.add_subscription(regrole, text, text, regprocedure, integer, integer, interval, interval, boolean, interval, text, text[], interval, text) is
'internal: what fanout.subscribe() does with the rights of pg_fanout';
revoke all on function fanout.add_subscription(regrole, text, text, regprocedure, integer, integer, interval, interval, boolean, interval, text, text[], interval, text) from public;

-- In C because only there the role that calls can be told from the one whose
-- rights are needed.
create function fanout.subscribe(topic text, consumer_group text, handler regprocedure,
                                 prefetch integer default 100, max_attempts integer default 10,
                                 retry_delay interval default '1 s', max_retry_delay interval default '5 min',
                                 ordered boolean default true, handler_timeout interval default '30 s',
                                 on_failure text default 'wait', wait_for text[] default '{23503}',
                                 max_wait interval default '1 h', start_at text default null)
returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_subscribe';
comment on function fanout.subscribe(text, text, regprocedure, integer, integer, interval, interval, boolean, interval, text, text[], interval, text) is
'makes a worker consume the queue "<topic>_<consumer_group>" once this transaction has committed: each message runs the handler, once, in a transaction of the role that calls this. handler: function of one argument, fanout.message or an array of it; prefetch: messages in work at once; max_attempts: then it goes to fanout.dead_letter; retry_delay: before the second attempt, doubling up to max_retry_delay; ordered: later messages of a key wait for one that failed; handler_timeout: of one call; on_failure: "wait" in the waiting room, or "requeue": given back to the queue when its next attempt is due, for any consumer of the group, refused if the delivery limit of the queue would drop it; wait_for: SQLSTATEs with which a message is kept waiting for max_wait before its attempts count; start_at: of a stream, where to begin at first: "first", "last" (its last piece), "next" (what comes from now on), an offset, or a time; NULL: the queue is no stream. Errors: 22004, 42602, 42622, 42939 for the names, 22023 for numbers, intervals and start_at, 42883 and 42809 for the handler, 42501 missing rights of the role, 42710 if it is subscribed differently';
revoke all on function fanout.subscribe(text, text, regprocedure, integer, integer, interval, interval, boolean, interval, text, text[], interval, text) from public;

create function fanout.own_subscription(role regrole, topic text, consumer_group text) returns fanout.subscription
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    found_row fanout.subscription;
begin
    select * into found_row from fanout.subscription s
    where s.topic = own_subscription.topic and s.consumer_group = own_subscription.consumer_group and s.active;
    if not found then
        raise exception 'consumer group "%" is not subscribed to topic "%"',
                        own_subscription.consumer_group, own_subscription.topic
            using errcode = 'undefined_object';
    end if;
    if not pg_has_role(own_subscription.role, fanout.subscriber(found_row), 'usage') then
        raise exception 'permission denied for subscription of consumer group "%" to topic "%"',
                        own_subscription.consumer_group, own_subscription.topic
            using errcode = 'insufficient_privilege',
                  detail = pg_catalog.format('Role %s subscribed.', fanout.subscriber(found_row));
    end if;
    return found_row;
end
$$;
comment on function fanout.own_subscription(regrole, text, text) is
'internal: a subscription that the role may change; raises an error if there is none';
revoke all on function fanout.own_subscription(regrole, text, text) from public;

create function fanout.remove_subscription(role regrole, topic text, consumer_group text, drop_queue boolean) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    old fanout.subscription := fanout.own_subscription(role, topic, consumer_group);
begin
    if remove_subscription.drop_queue
       and exists (select from fanout.bindings b
                   where b.topic = remove_subscription.topic and b.consumer_group = remove_subscription.consumer_group)
    then
        raise exception 'queue "%" is declared in this database', old.topic || '_' || old.consumer_group
            using errcode = 'object_in_use',
                  hint = 'Use fanout.drop_binding() after fanout.unsubscribe().';
    end if;
    update fanout.subscription s
    set active = false, version = s.version + 1, drop_queue = coalesce(remove_subscription.drop_queue, false),
        inbox_id = case when remove_subscription.drop_queue then nextval('fanout.subscription_id_seq') else s.inbox_id end
    where s.subscription_id = old.subscription_id;
    if remove_subscription.drop_queue then
        delete from fanout.waiting w where w.subscription_id = old.subscription_id;
    end if;
    update fanout.waiting w set attempts = 0, postponed = 0, waits_since = null,
        next_try = case when next_try is not null then clock_timestamp() end
    where w.subscription_id = old.subscription_id and attempts + postponed > 0;
end
$$;
comment on function fanout.remove_subscription(regrole, text, text, boolean) is
'internal: what fanout.unsubscribe() does with the rights of pg_fanout';
revoke all on function fanout.remove_subscription(regrole, text, text, boolean) from public;

create function fanout.unsubscribe(topic text, consumer_group text, drop_queue boolean default false) returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_unsubscribe';
comment on function fanout.unsubscribe(text, text, boolean) is
'ends a subscription once this transaction has committed; the queue and its messages stay, and so do the place in a stream and those that wait, whose attempts are forgotten; they are tried again when the subscription is made again. drop_queue: deletes the queue, and its messages, and those that wait. Only for members of the role that subscribed, if it still exists. Errors: 42704 if there is no such subscription, 42501, 55006 if the queue is declared in this database';
revoke all on function fanout.unsubscribe(text, text, boolean) from public;

create function fanout.change_subscription(role regrole, topic text, consumer_group text, handler regprocedure,
                                           prefetch integer, max_attempts integer, retry_delay interval,
                                           max_retry_delay interval, ordered boolean, handler_timeout interval,
                                           on_failure text, wait_for text[], max_wait interval, start_at text)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    old fanout.subscription := fanout.own_subscription(role, topic, consumer_group);
    subscriber regrole := fanout.subscriber(old);
begin
    if subscriber is null then
        raise exception '%', fanout.subscription_problem(old)
            using errcode = 'undefined_object',
                  hint = 'Use fanout.unsubscribe(), and subscribe as another role.';
    end if;
    if handler is null and old.handler = 'fanout.sync_messages' and (ordered is not null or on_failure is not null) then
        raise exception 'a subscription of fanout.sync_table() is always ordered'
            using errcode = 'invalid_parameter_value';
    end if;
    update fanout.subscription s set active = false where s.subscription_id = old.subscription_id;
    perform fanout.add_subscription(
        subscriber, old.topic, old.consumer_group,
        coalesce(handler, fanout.subscription_handler(old)::regprocedure),
        coalesce(prefetch, old.prefetch), coalesce(max_attempts, old.max_attempts),
        coalesce(retry_delay, old.retry_delay), coalesce(max_retry_delay, old.max_retry_delay),
        coalesce(ordered, old.ordered), coalesce(handler_timeout, old.handler_timeout),
        coalesce(on_failure, old.on_failure), coalesce(wait_for, old.wait_for), coalesce(max_wait, old.max_wait),
        coalesce(start_at, old.start_at));
    -- what is to be read again must not be known
    update fanout.subscription s
    set paused = old.paused, queue_declared = old.queue_declared, subscribed_at = old.subscribed_at,
        inbox_id = case when change_subscription.start_at is null then old.inbox_id
                        else nextval('fanout.subscription_id_seq') end
    where s.subscription_id = old.subscription_id;
end
$$;
comment on function fanout.change_subscription(regrole, text, text, regprocedure, integer, integer, interval, interval, boolean, interval, text, text[], interval, text) is
'internal: what fanout.alter_subscription() does with the rights of pg_fanout';
revoke all on function fanout.change_subscription(regrole, text, text, regprocedure, integer, integer, interval, interval, boolean, interval, text, text[], interval, text) from public;

create function fanout.alter_subscription(topic text, consumer_group text, handler regprocedure default null,
                                          prefetch integer default null, max_attempts integer default null,
                                          retry_delay interval default null, max_retry_delay interval default null,
                                          ordered boolean default null, handler_timeout interval default null,
                                          on_failure text default null, wait_for text[] default null,
                                          max_wait interval default null, start_at text default null)
returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_alter_subscription';
comment on function fanout.alter_subscription(text, text, regprocedure, integer, integer, interval, interval, boolean, interval, text, text[], interval, text) is
'changes options of a subscription once this transaction has committed; NULL: as it is. Attempts and what waits are kept. start_at: the stream is read anew from there, and what was applied before is applied again. Only for members of the role that subscribed, as which the handler still runs. Errors: those of fanout.subscribe(), 42704 if there is no such subscription';
revoke all on function fanout.alter_subscription(text, text, regprocedure, integer, integer, interval, interval, boolean, interval, text, text[], interval, text) from public;

create function fanout.set_paused(role regrole, topic text, consumer_group text, paused boolean) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    old fanout.subscription := fanout.own_subscription(role, topic, consumer_group);
begin
    update fanout.subscription s set paused = set_paused.paused, version = s.version + 1
    where s.subscription_id = old.subscription_id and s.paused <> set_paused.paused;
end
$$;
comment on function fanout.set_paused(regrole, text, text, boolean) is 'internal: part of fanout.pause() and fanout.resume()';
revoke all on function fanout.set_paused(regrole, text, text, boolean) from public;

create function fanout.pause_as(role regrole, topic text, consumer_group text) returns void
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    select case when $3 is null then fanout.pause_topic($2) else fanout.set_paused($1, $2, $3, true) end
$$;
comment on function fanout.pause_as(regrole, text, text) is 'internal: what fanout.pause() does with the rights of pg_fanout';
revoke all on function fanout.pause_as(regrole, text, text) from public;

create function fanout.resume_as(role regrole, topic text, consumer_group text) returns void
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    select case when $3 is null then fanout.resume_topic($2) else fanout.set_paused($1, $2, $3, false) end
$$;
comment on function fanout.resume_as(regrole, text, text) is 'internal: what fanout.resume() does with the rights of pg_fanout';
revoke all on function fanout.resume_as(regrole, text, text) from public;

create function fanout.retry_as(role regrole, topic text, consumer_group text, message_id uuid) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    own fanout.subscription := fanout.own_subscription(role, topic, consumer_group);
    due bigint;
begin
    -- two statements: the plan of one for both looks at all messages
    if retry_as.message_id is null then
        update fanout.waiting w set next_try = clock_timestamp()
        where w.subscription_id = own.subscription_id and w.next_try is not null and not w.requeued;
    else
        update fanout.waiting w set next_try = clock_timestamp()
        where w.subscription_id = own.subscription_id and w.message_id = retry_as.message_id
          and w.next_try is not null and not w.requeued;
    end if;
    get diagnostics due = row_count;
    perform fanout.wake_consumers();
    return due;
end
$$;
comment on function fanout.retry_as(regrole, text, text, uuid) is 'internal: what fanout.retry() does with the rights of pg_fanout';
revoke all on function fanout.retry_as(regrole, text, text, uuid) from public;

create function fanout.retry(topic text, consumer_group text, message_id uuid default null) returns bigint
language c volatile
as 'MODULE_PATHNAME', 'pgf_retry';
comment on function fanout.retry(text, text, uuid) is
'tries messages of a subscription that failed now, and not when their next attempt would be due; one of them, or all. Returns how many. Only for members of the role that subscribed. Errors: 42704 if there is no such subscription, 42501';
revoke all on function fanout.retry(text, text, uuid) from public;

-- Two look-ups: no index finds a message by either of its keys.
create function fanout.first_waiting(subscription_id integer, key bigint) returns bigint
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select f.waiting_id
    from ((select w.waiting_id, w.place from fanout.waiting w where w.subscription_id = $1 and w.key1 = $2
           order by w.place, w.waiting_id limit 1)
          union all
          (select w.waiting_id, w.place from fanout.waiting w where w.subscription_id = $1 and w.key2 = $2
           order by w.place, w.waiting_id limit 1)) f
    order by f.place, f.waiting_id limit 1
$$;
comment on function fanout.first_waiting(integer, bigint) is 'internal: the first message of a key that waits; NULL: there is none';
revoke all on function fanout.first_waiting(integer, bigint) from public;

-- The first messages of its keys are due; of a barrier, all are looked at.
create function fanout.skip_as(role regrole, topic text, consumer_group text, message_id uuid) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    own fanout.subscription := fanout.own_subscription(role, topic, consumer_group);
    old fanout.waiting;
    stored bigint;
begin
    delete from fanout.waiting w
    where w.subscription_id = own.subscription_id and w.message_id = skip_as.message_id and not w.requeued
    returning * into old;
    if not found then
        raise exception 'message % does not wait', skip_as.message_id
            using errcode = 'undefined_object',
                  hint = 'See fanout.delivery_failure.';
    end if;
    insert into fanout.dead_letter (message_id, topic, consumer_group, type, key, id, headers, content_type, created_at,
                                    payload, raw, reason, sqlstate, attempts)
    values (old.message_id, own.topic, own.consumer_group, old.type, old.key, old.sequence, old.headers, old.content_type,
            old.published_at, old.payload, old.raw,
            coalesce(old.error, 'skipped'), old.sqlstate, old.attempts);
    get diagnostics stored = row_count;
    perform fanout.require_rows('dead_letter', stored, 1);
    insert into fanout.inbox (segment, inbox_id, message_id)
    select r.current, own.inbox_id, old.message_id from fanout.inbox_rotation r;
    get diagnostics stored = row_count;
    perform fanout.require_rows('inbox', stored, 1);
    if old.barrier then
        update fanout.waiting w set next_try = clock_timestamp()
        where w.subscription_id = own.subscription_id and w.next_try is null;
    else
        update fanout.waiting w set next_try = clock_timestamp()
        where w.next_try is null
          and w.waiting_id = any (array(select fanout.first_waiting(own.subscription_id, k)
                                        from unnest(array[old.key1, old.key2]) k where k is not null));
    end if;
    perform fanout.wake_consumers();
end
$$;
comment on function fanout.skip_as(regrole, text, text, uuid) is 'internal: what fanout.skip() does with the rights of pg_fanout';
revoke all on function fanout.skip_as(regrole, text, text, uuid) from public;

create function fanout.skip(topic text, consumer_group text, message_id uuid) returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_skip';
comment on function fanout.skip(text, text, uuid) is
'gives a message up that waits, whatever attempts it has left: it goes to fanout.dead_letter, and those behind it go on. Only for members of the role that subscribed. Errors: 42704 if there is no such subscription, or no such message waits, 42501';
revoke all on function fanout.skip(text, text, uuid) from public;


-- ---------------------------------------------------------------------------
-- Keeping a table equal to a remote one
-- ---------------------------------------------------------------------------

create table fanout.sync_target (
    subscription_id integer  primary key,
    target          text     not null,
    source_schema   text,
    source_table    text,
    unknown_columns text     not null,
    ignored_columns text[]   not null default '{}',
    floor           bigint   not null default 0,
    floor_xid       bigint,
    dropped         boolean  not null default false
) using heap;
comment on table fanout.sync_target is 'internal: one row per subscription that fanout.sync_table() made';
comment on column fanout.sync_target.target is 'by the name that it has; see fanout.note_target_names()';
comment on column fanout.sync_target.source_schema is 'of the table that it is a copy of; NULL: no message has come yet';
comment on column fanout.sync_target.unknown_columns is 'ignore or error';
comment on column fanout.sync_target.ignored_columns is 'those of the latest message that the target does not have';
comment on column fanout.sync_target.floor is 'sequence of the newest TRUNCATE';
comment on column fanout.sync_target.floor_xid is 'its transaction at the source';
comment on column fanout.sync_target.dropped is 'the table is no more: what has its name is another one';
revoke all on fanout.sync_target from public;
select pg_extension_config_dump('fanout.sync_target', '');

create function fanout.target_table(t fanout.sync_target) returns regclass
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select case when t.dropped then null
                when b.target is null then to_regclass(t.target)
                else (select c.oid::regclass from pg_class c where c.oid = b.target) end
    from (select) x left join fanout.subscription_bound b on b.subscription_id = t.subscription_id
$$;
comment on function fanout.target_table(fanout.sync_target) is
'internal: the table that a subscription keeps; NULL: there is none';
revoke all on function fanout.target_table(fanout.sync_target) from public;

create function fanout.target_is_bound(t fanout.sync_target) returns boolean
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select exists (select from fanout.subscription_bound b where b.subscription_id = t.subscription_id and b.target is not null)
$$;
comment on function fanout.target_is_bound(fanout.sync_target) is
'internal: are the attribute numbers those of this database''s table?';
revoke all on function fanout.target_is_bound(fanout.sync_target) from public;

-- Its worker calls it, whenever it reads its subscription.  Without need nothing
-- is written, since the trigger on subscriptions wakes the publisher.
create function fanout.bind_subscription(subscription_id integer) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    s fanout.subscription;
    role_now name;
    owner_now name;
begin
    select * into s from fanout.subscription f where f.subscription_id = bind_subscription.subscription_id;
    insert into fanout.subscription_bound as b (subscription_id, role, handler_owner)
    select s.subscription_id, fanout.subscriber(s), fanout.handler_owner(s) where s.subscription_id is not null
    on conflict (subscription_id) do update
        set role = coalesce(b.role, excluded.role), handler_owner = coalesce(b.handler_owner, excluded.handler_owner)
        where b.role is null and excluded.role is not null
           or b.handler_owner is null and excluded.handler_owner is not null;
    role_now := (select r.rolname from pg_roles r where r.oid = fanout.subscriber(s));
    owner_now := (select r.rolname from pg_roles r where r.oid = fanout.handler_owner(s));
    if role_now <> s.role or owner_now <> s.handler_owner then
        update fanout.subscription f set role = coalesce(role_now, s.role),
               handler_owner = coalesce(owner_now, s.handler_owner)
        where f.subscription_id = s.subscription_id;
    end if;
    perform fanout.note_target_names(bind_subscription.subscription_id);
end
$$;
comment on function fanout.bind_subscription(integer) is
'internal: notes what the names in a subscription mean, and the names that these have now';
revoke all on function fanout.bind_subscription(integer) from public;

create table fanout.sync_column (
    subscription_id integer  not null,
    attnum          smallint not null,
    local           text     not null,
    remote          text,
    mapped          boolean  not null,
    key_position    smallint,
    seen            boolean  not null default false,
    missing         boolean  not null default false,
    primary key (subscription_id, attnum)
) using heap;
comment on table fanout.sync_column is 'internal: columns of the targets of fanout.sync_table(), but for generated ones';
comment on column fanout.sync_column.local is 'the name that it has; attnum tells which column it is';
comment on column fanout.sync_column.remote is 'its name in messages; NULL: no message sets it';
comment on column fanout.sync_column.mapped is 'was it named in "columns" of fanout.sync_table()?';
comment on column fanout.sync_column.key_position is 'NULL: not of the key';
comment on column fanout.sync_column.seen is 'has a message had it?';
comment on column fanout.sync_column.missing is 'and the latest one has not?';
revoke all on fanout.sync_column from public;
select pg_extension_config_dump('fanout.sync_column', '');

-- A dump has the names that tables and columns have when it is made, also if they were
-- renamed or dropped just before: what had another one's name would be written instead of
-- it where the dump is restored.  A column of the key stays, and the name of one that was
-- dropped is none that a column can have.
create function fanout.note_target_names(id integer default null) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    update fanout.sync_target t set dropped = true
    from fanout.subscription_bound b
    where b.subscription_id = t.subscription_id and (id is null or t.subscription_id = id)
      and b.target is not null and not exists (select from pg_class c where c.oid = b.target) and not t.dropped;
    update fanout.sync_target t set target = fanout.qualified_name(b.target)
    from fanout.subscription_bound b
    where b.subscription_id = t.subscription_id and (id is null or t.subscription_id = id)
      and exists (select from pg_class c where c.oid = b.target) and t.target <> fanout.qualified_name(b.target);
    delete from fanout.sync_column k using fanout.subscription_bound b
    where b.subscription_id = k.subscription_id and (id is null or k.subscription_id = id) and k.key_position is null
      and exists (select from pg_class c where c.oid = b.target)
      and not exists (select from pg_attribute a where a.attrelid = b.target and a.attnum = k.attnum
                      and not a.attisdropped and a.attgenerated = '');
    update fanout.sync_column k set local = a.attname
    from fanout.subscription_bound b join pg_attribute a on a.attrelid = b.target
    where b.subscription_id = k.subscription_id and (id is null or k.subscription_id = id)
      and a.attnum = k.attnum and k.local <> a.attname;
end
$$;
comment on function fanout.note_target_names(integer) is
'internal: notes the names that targets and their columns have now, and which of them are no more; NULL: of all subscriptions';
revoke all on function fanout.note_target_names(integer) from public;

create function fanout.target_altered() returns event_trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    -- not if the schema was renamed while event triggers were off
    if (tg_tag like 'ALTER %' or tg_tag like 'DROP %') and to_regclass('fanout.sync_target') is not null then
        perform fanout.note_target_names();
    end if;
end
$$;
comment on function fanout.target_altered() is
'internal: notes the names of what fanout.sync_table() writes in the transaction that alters or drops it';
revoke all on function fanout.target_altered() from public;

create event trigger pg_fanout_target_altered on ddl_command_end
execute function fanout.target_altered();
alter event trigger pg_fanout_target_altered enable always;
comment on event trigger pg_fanout_target_altered is 'pg_fanout: keeps the names of tables that it writes, so that a dump has them';

create table fanout.sync_row (
    subscription_id integer not null,
    hash            uuid    not null,
    sequence        bigint  not null,
    xid             bigint,
    deleted_at      timestamptz,
    -- the subscription first: a TRUNCATE reads all rows of one, and none of the others
    primary key (subscription_id, hash)
) using heap with (fillfactor = 50);
create index sync_row_deleted_at_idx on fanout.sync_row (deleted_at) where deleted_at is not null;
comment on table fanout.sync_row is 'internal: sequence of what was last applied, by key';
comment on column fanout.sync_row.hash is 'of the key''s values';
comment on column fanout.sync_row.xid is 'the transaction at the source that made what was last applied';
comment on column fanout.sync_row.deleted_at is 'not NULL: the row is deleted; forgotten after pg_fanout.inbox_retention';
revoke all on fanout.sync_row from public;

create table fanout.sync_comparison (
    subscription_id integer     not null,
    run             bigint      not null,
    repair          boolean     not null default false,
    ranges          bigint      not null default 0,
    ranges_sent     bigint,
    compared        bigint      not null default 0,
    left_out        bigint      not null default 0,
    missing         bigint      not null default 0,
    different       bigint      not null default 0,
    extra           bigint      not null default 0,
    mended          bigint      not null default 0,
    error           text,
    failure         text,
    started_at      timestamptz not null default clock_timestamp(),
    updated_at      timestamptz not null default clock_timestamp(),
    finished_at     timestamptz,
    primary key (subscription_id, run)
) using heap with (fillfactor = 50);
comment on table fanout.sync_comparison is 'internal: comparisons of copies with their sources; see the view fanout.sync_comparisons';
comment on column fanout.sync_comparison.run is 'what fanout.compare() returned at the source';
comment on column fanout.sync_comparison.ranges_sent is 'NULL: the message that tells of it has not come yet';
comment on column fanout.sync_comparison.error is 'why the copy cannot be compared';
comment on column fanout.sync_comparison.failure is 'why the source has ended it before all rows were sent';
revoke all on fanout.sync_comparison from public;

create table fanout.sync_difference (
    subscription_id integer     not null,
    run             bigint      not null,
    kind            text        not null check (kind in ('missing', 'different', 'extra')),
    key             jsonb       not null,
    columns         text[]      not null,
    mended          boolean     not null,
    found_at        timestamptz not null default clock_timestamp()
) using heap;
alter table fanout.sync_difference replica identity full;
create index sync_difference_run_idx on fanout.sync_difference (subscription_id, run);
comment on table fanout.sync_difference is 'internal: see the view fanout.sync_differences';
revoke all on fanout.sync_difference from public;

-- Somebody may delete subscriptions by hand; their numbers come again when data of a
-- dump are restored, and then are those of others.
create function fanout.forget_subscriptions() returns trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    relation text;
begin
    foreach relation in array '{subscription_bound,waiting,sync_target,sync_column,sync_row,sync_comparison,sync_difference}'::text[] loop
        execute format('delete from fanout.%I x where not exists (select from fanout.subscription s where s.subscription_id = x.subscription_id)', relation);
    end loop;
    delete from fanout.stream_offset o where not exists (select from fanout.subscription s where s.inbox_id = o.inbox_id);
    return null;
end
$$;
comment on function fanout.forget_subscriptions() is
'internal: statement trigger on subscriptions, removes what belongs to those that were deleted';
revoke all on function fanout.forget_subscriptions() from public;
create trigger forget_subscriptions
after delete or truncate
on fanout.subscription
for each statement execute function fanout.forget_subscriptions();
alter table fanout.subscription enable always trigger forget_subscriptions;

-- What a handler needs for a range; it runs with the rights of the extension's owner.
create function fanout.record_comparison(subscription_id integer, run bigint, repair boolean, ranges bigint,
                                         ranges_sent bigint, compared bigint, left_out bigint, missing bigint,
                                         different bigint, extra bigint, mended bigint, error text, failure text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
    insert into fanout.sync_comparison as c
           (subscription_id, run, repair, ranges, ranges_sent, compared, left_out, missing, different, extra, mended, error,
            failure, finished_at)
    select record_comparison.subscription_id, record_comparison.run, record_comparison.repair, record_comparison.ranges,
           record_comparison.ranges_sent, record_comparison.compared, record_comparison.left_out,
           record_comparison.missing, record_comparison.different, record_comparison.extra, record_comparison.mended,
           record_comparison.error, record_comparison.failure,
           case when record_comparison.ranges_sent is not null or record_comparison.failure is not null then clock_timestamp() end
    on conflict (subscription_id, run) do update
    set repair = c.repair or excluded.repair, ranges = c.ranges + excluded.ranges,
        ranges_sent = coalesce(excluded.ranges_sent, c.ranges_sent),
        compared = c.compared + excluded.compared, left_out = c.left_out + excluded.left_out,
        missing = c.missing + excluded.missing, different = c.different + excluded.different,
        extra = c.extra + excluded.extra, mended = c.mended + excluded.mended,
        error = coalesce(c.error, excluded.error), updated_at = clock_timestamp(),
        -- one that failed may have been resumed
        failure = case when excluded.ranges_sent is null then coalesce(excluded.failure, c.failure) end,
        finished_at = coalesce(excluded.finished_at, c.finished_at);
    if record_comparison.ranges_sent is not null or record_comparison.failure is not null then
        -- the ten latest are kept
        with old as (
            delete from fanout.sync_comparison c
            where c.subscription_id = record_comparison.subscription_id
              and c.run < (select min(k.run) from (select l.run from fanout.sync_comparison l
                                                   where l.subscription_id = record_comparison.subscription_id
                                                   order by l.run desc limit 10) k)
            returning c.run)
        delete from fanout.sync_difference d
        where d.subscription_id = record_comparison.subscription_id and d.run in (select o.run from old o);
    end if;
end
$$;
comment on function fanout.record_comparison(integer, bigint, boolean, bigint, bigint, bigint, bigint, bigint, bigint, bigint, bigint, text, text) is
'internal: adds what the comparison of a range has found; ranges_sent, failure: of the last message';
revoke all on function fanout.record_comparison(integer, bigint, boolean, bigint, bigint, bigint, bigint, bigint, bigint, bigint, bigint, text, text) from public;

-- Two columns of the same text here sort the same values in the same order.
create function fanout.key_order(rel oid, attnums smallint[]) returns text[]
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    with recursive base as (
        select k.n, a.atttypid as type, a.attcollation as collation
        from unnest(key_order.attnums) with ordinality k(attnum, n)
             join pg_attribute a on a.attrelid = key_order.rel and a.attnum = k.attnum
        union all
        select b.n, t.typbasetype, b.collation from base b join pg_type t on t.oid = b.type where t.typtype = 'd')
    select array_agg(
        case when t.typtype = 'e' then 'enum ' || (select json_agg(e.enumlabel order by e.enumsortorder) from pg_enum e where e.enumtypid = t.oid)::text
             when t.oid in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) then 'integer'
             when t.oid in ('text'::regtype, 'varchar'::regtype) then 'text'
             else format_type(t.oid, null) end
        || case when b.collation = 0 then ''
                else ' collate ' || (select concat_ws(' ', case when l.collprovider = 'd' then d.locale else c.locale end,
                                                      pg_collation_actual_version(l.oid), getdatabaseencoding())) end
        order by b.n)
    from base b join pg_type t on t.oid = b.type and t.typtype <> 'd'
         left join pg_collation l on l.oid = b.collation
         -- names of the columns differ between versions of PostgreSQL
         left join lateral (select coalesce(to_jsonb(l) ->> 'colllocale', to_jsonb(l) ->> 'colliculocale', l.collcollate) as locale) c on true
         left join lateral (select coalesce(to_jsonb(x) ->> 'datlocale', to_jsonb(x) ->> 'daticulocale', x.datcollate) as locale
                            from pg_database x where x.datname = current_database()) d on true
$$;
comment on function fanout.key_order(oid, smallint[]) is
'internal: of each column, what says in which order its values sort, the same at both ends of a comparison';
revoke all on function fanout.key_order(oid, smallint[]) from public;

create function fanout.sync_messages(messages fanout.message[]) returns void
language c volatile strict
as 'MODULE_PATHNAME', 'pgf_sync_messages';
comment on function fanout.sync_messages(fanout.message[]) is
'the handler of subscriptions made by fanout.sync_table(): applies messages to the table, one after the other. Errors: 22023 a message that cannot be applied, 42703 one with a column that is refused, 23505 another subscription has the row, 42704 not such a subscription, 42501 of another role, or no right to act as the table''s owner, 42P01 the table is gone, 55000 it cannot be kept equal any more, 40001 its schema was renamed meanwhile, and those of the table';
revoke all on function fanout.sync_messages(fanout.message[]) from public;

create function fanout.is_sync_key(i pg_index) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select i.indisunique and i.indimmediate and i.indisvalid and not i.indisexclusion
           and i.indpred is null and i.indexprs is null and i.indnkeyatts = i.indnatts
           and not exists (select from unnest(i.indkey, i.indcollation, i.indclass) k(attnum, coll, class)
                           join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
                           join pg_opclass o on o.oid = k.class
                           where not a.attnotnull or a.attgenerated <> '' or k.coll <> a.attcollation or not o.opcdefault)
$$;
comment on function fanout.is_sync_key(pg_index) is
'internal: does the index tell rows apart by each value of its columns, as their types compare?';
revoke all on function fanout.is_sync_key(pg_index) from public;

create function fanout.sync_key(target regclass, key text[]) returns text[]
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    found_key text[];
begin
    select array(select a.attname::text from unnest(i.indkey) with ordinality k(attnum, n)
                 join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum order by k.n)
    into found_key
    from pg_index i
    where i.indrelid = sync_key.target and fanout.is_sync_key(i)
      and case when sync_key.key is null then i.indisprimary
               else array(select a.attname::text from unnest(i.indkey) k(attnum)
                          join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum order by 1)
                    = array(select k from unnest(sync_key.key) k order by 1) end
    limit 1;
    if found_key is null and sync_key.key is null then
        raise exception 'table % has no primary key by which rows can be found', sync_key.target
            using errcode = 'invalid_parameter_value',
                  detail = 'It must be neither deferrable nor WITHOUT OVERLAPS.',
                  hint = 'Name the columns of a unique index in "key".';
    elsif found_key is null then
        raise exception 'table % has no unique index on (%) by which rows can be found',
                        sync_key.target, array_to_string(sync_key.key, ', ')
            using errcode = 'invalid_parameter_value',
                  detail = 'Its columns must be NOT NULL and not generated; it must be neither partial nor deferrable, and compare as the columns'' types do.',
                  hint = 'Create one: it tells which row a message is about.';
    end if;
    return found_key;
end
$$;
comment on function fanout.sync_key(regclass, text[]) is
'internal: the key by which rows of a table are found, that given or its primary key; raises an error unless a unique index is on it';
revoke all on function fanout.sync_key(regclass, text[]) from public;

-- What keeps a role from keeping a table in sync; key: attribute numbers.
create function fanout.sync_obstacle(role oid, target oid, key smallint[], out code text, out problem text, out hint text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    c pg_class;
    owner pg_roles;
    name text := sync_obstacle.target::regclass::text;
    wrong text;
begin
    select * into c from pg_class where oid = sync_obstacle.target;
    if not found then
        code := 'undefined_table';
        problem := 'the table of this subscription does not exist any more';
        hint := 'Call fanout.unsubscribe(), and fanout.sync_table() with another table.';
        return;
    end if;
    code := 'wrong_object_type';
    if c.relkind not in ('r', 'p') or c.relpersistence = 't' then
        problem := format('%s is not an ordinary or partitioned table', name);
        return;
    elsif exists (select from pg_class p where p.relpersistence = 'u'
                  and (p.oid = c.oid or p.oid in (select relid from pg_partition_tree(c.oid)))) then
        problem := format('table %s is unlogged, so a crash would empty it for good', name);
        hint := 'Use ALTER TABLE ... SET LOGGED.';
        return;
    elsif exists (select from pg_rewrite w where w.ev_class = c.oid) then
        problem := format('table %s has rules, which change what is written', name);
        return;
    end if;
    code := 'insufficient_privilege';
    select * into owner from pg_roles where oid = c.relowner;
    select string_agg(p, ', ') into wrong
    from unnest(array['SELECT', 'INSERT', 'UPDATE', 'DELETE']) p
    where not has_table_privilege(owner.oid, c.oid, p);
    if not pg_has_role(sync_obstacle.role, owner.oid,
                       case when current_setting('server_version_num')::integer >= 160000 then 'SET' else 'MEMBER' end) then
        problem := format('permission denied to act as the owner of table %s', name);
        hint := format('Rows are written as their table''s owner. Subscribe as %1$I, or as a role that %1$I is granted to.', owner.rolname);
        return;
    elsif wrong is not null then
        problem := format('the owner of table %s lacks %s on it', name, wrong);
        return;
    elsif not has_schema_privilege(owner.oid, c.relnamespace, 'usage') then
        problem := format('the owner of table %s lacks USAGE on its schema', name);
        return;
    elsif c.relrowsecurity and c.relforcerowsecurity and not owner.rolsuper and not owner.rolbypassrls then
        problem := format('row security applies to the owner of table %s', name);
        hint := 'It would hide rows from the copy. Use ALTER TABLE ... NO FORCE ROW LEVEL SECURITY.';
        return;
    end if;
    code := 'invalid_parameter_value';
    if not exists (select from pg_index i where i.indrelid = c.oid and fanout.is_sync_key(i)
                   and array(select k from unnest(i.indkey) k order by 1) = array(select k from unnest(sync_obstacle.key) k order by 1)) then
        problem := format('table %s has no unique index any more by which rows can be found', name);
        hint := 'Create it again: not partial, not deferrable, on columns that are NOT NULL.';
        return;
    end if;
    select quote_ident(n.conname) into wrong from pg_constraint n
    where n.conrelid = c.oid and n.contype in ('u', 'x', 'p') and n.condeferrable limit 1;
    if found then
        problem := format('constraint %s of table %s is unique and deferrable', wrong, name);
        hint := 'Rows that are valid only together come in messages of their own. Leave it to the source, and use an index that is not unique here.';
        return;
    end if;
    code := null;
end
$$;
comment on function fanout.sync_obstacle(oid, oid, smallint[]) is
'internal: why a role cannot keep a table equal to a remote one; NULL: it can';
revoke all on function fanout.sync_obstacle(oid, oid, smallint[]) from public;

-- With the rights of pg_fanout, since views for monitoring call it.
create function fanout.sync_problem(subscription_id integer) returns text
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select case when r.target is null and not r.bound and not t.dropped then format('table %s does not exist', t.target)
                when r.target is not null and cardinality(key.attnums) < (select count(*) from fanout.sync_column k
                    where k.subscription_id = t.subscription_id and k.key_position is not null)
                then format('table %s lacks a column of the key', t.target)
                else o.problem end
    from fanout.subscription s
         join fanout.sync_target t using (subscription_id),
         lateral (select fanout.subscriber(s)::oid, fanout.target_table(t)::oid, fanout.target_is_bound(t)) r(role, target, bound),
         lateral (select case when r.bound
                              then array(select k.attnum from fanout.sync_column k
                                         where k.subscription_id = t.subscription_id and k.key_position is not null)
                              else array(select a.attnum from fanout.sync_column k
                                         join pg_attribute a on a.attrelid = r.target and a.attname = k.local and a.attnum > 0
                                         where k.subscription_id = t.subscription_id and k.key_position is not null) end) key(attnums),
         lateral fanout.sync_obstacle(r.role, r.target, key.attnums) o
    where s.subscription_id = sync_problem.subscription_id and r.role is not null
$$;
comment on function fanout.sync_problem(integer) is
'internal: why a subscription of fanout.sync_table() cannot be consumed; NULL: it can, or is another one';
revoke all on function fanout.sync_problem(integer) from public;

-- A column is the one that it was when it was first seen, whatever its name is
-- now.  One that was added since is known by its own name, unless another
-- column has that already.
create function fanout.sync_refresh_columns(subscription_id integer)
returns table (attnum smallint, remote text, key_position smallint, seen boolean)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    t fanout.sync_target;
    relid oid;
    kept fanout.sync_column[];
begin
    select * into strict t from fanout.sync_target s where s.subscription_id = sync_refresh_columns.subscription_id;
    relid := fanout.target_table(t);
    if not fanout.target_is_bound(t) then
        -- restored from a dump: attribute numbers are others, names are not
        select array_agg(k) into kept from fanout.sync_column k where k.subscription_id = t.subscription_id;
        delete from fanout.sync_column k where k.subscription_id = t.subscription_id;
        insert into fanout.sync_column
        select t.subscription_id, a.attnum, k.local, k.remote, k.mapped, k.key_position, k.seen, k.missing
        from unnest(kept) k join pg_attribute a on a.attrelid = relid and a.attname = k.local and a.attnum > 0;
        insert into fanout.subscription_bound as b (subscription_id, target) values (t.subscription_id, relid)
        on conflict (subscription_id) do update set target = excluded.target;
    end if;
    perform fanout.note_target_names(t.subscription_id);
    insert into fanout.sync_column (subscription_id, attnum, local, remote, mapped)
    select t.subscription_id, a.attnum, a.attname, case when not exists (select from fanout.sync_column k
               where k.subscription_id = t.subscription_id and k.remote = a.attname) then a.attname end, false
    from pg_attribute a
    where a.attrelid = relid and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
      and not exists (select from fanout.sync_column k where k.subscription_id = t.subscription_id and k.attnum = a.attnum);
    return query select k.attnum, k.remote, k.key_position, k.seen from fanout.sync_column k
    where k.subscription_id = t.subscription_id order by k.attnum;
end
$$;
comment on function fanout.sync_refresh_columns(integer) is
'internal: the columns of a target, after what was altered was noted';
revoke all on function fanout.sync_refresh_columns(integer) from public;

create function fanout.sync_set_columns(subscription_id integer, attnums smallint[], remotes text[], ignored text[]) returns void
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    update fanout.sync_column k
    set seen = k.seen or n.remote is not null, missing = k.seen and n.remote is null, remote = coalesce(n.remote, k.remote)
    from fanout.sync_column o left join unnest(sync_set_columns.attnums, sync_set_columns.remotes) n(attnum, remote) on n.attnum = o.attnum
    where o.subscription_id = sync_set_columns.subscription_id and k.subscription_id = o.subscription_id and k.attnum = o.attnum
      and (k.seen or n.remote is not null, k.seen and n.remote is null, coalesce(n.remote, k.remote))
          is distinct from (k.seen, k.missing, k.remote);
    update fanout.sync_target t set ignored_columns = sync_set_columns.ignored
    where t.subscription_id = sync_set_columns.subscription_id and t.ignored_columns <> sync_set_columns.ignored;
$$;
comment on function fanout.sync_set_columns(integer, smallint[], text[], text[]) is
'internal: notes which columns the latest message set, and which of its columns the target does not have';
revoke all on function fanout.sync_set_columns(integer, smallint[], text[], text[]) from public;

create function fanout.check_sync_columns(target regclass, columns jsonb) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    wrong text;
begin
    if check_sync_columns.columns is null then
        return;
    elsif jsonb_typeof(check_sync_columns.columns) <> 'object'
       or exists (select from jsonb_each(check_sync_columns.columns) e where jsonb_typeof(e.value) <> 'string') then
        raise exception 'columns must be an object of strings'
            using errcode = 'invalid_parameter_value',
                  hint = 'For example {"remote_name": "local_name"}.';
    end if;
    select e.value into wrong from jsonb_each_text(check_sync_columns.columns) e
    where not exists (select from pg_attribute a where a.attrelid = check_sync_columns.target
                      and a.attname = e.value and a.attnum > 0 and not a.attisdropped)
    limit 1;
    if found then
        raise exception 'column "%" of table % does not exist', wrong, check_sync_columns.target
            using errcode = 'undefined_column';
    end if;
    select e.value into wrong from jsonb_each_text(check_sync_columns.columns) e
    join pg_attribute a on a.attrelid = check_sync_columns.target and a.attname = e.value and a.attgenerated <> '' limit 1;
    if found then
        raise exception 'column "%" of table % is generated', wrong, check_sync_columns.target
            using errcode = 'invalid_parameter_value';
    end if;
    select e.value into wrong from jsonb_each_text(check_sync_columns.columns) e
    group by e.value having count(*) > 1 limit 1;
    if found then
        raise exception 'column "%" is named twice', wrong
            using errcode = 'invalid_parameter_value';
    end if;
end
$$;
comment on function fanout.check_sync_columns(regclass, jsonb) is
'internal: raises an error unless the renames of fanout.sync_table() fit the table';
revoke all on function fanout.check_sync_columns(regclass, jsonb) from public;

-- With the rights of pg_fanout, since views for monitoring call it.
create function fanout.sync_mapping(subscription_id integer) returns jsonb
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select jsonb_object_agg(k.remote, coalesce(a.attname, k.local))
    from fanout.sync_column k
         join fanout.sync_target t using (subscription_id)
         left join fanout.subscription_bound b using (subscription_id)
         left join pg_attribute a on a.attrelid = b.target and a.attnum = k.attnum
    where k.subscription_id = sync_mapping.subscription_id and k.mapped
$$;
comment on function fanout.sync_mapping(integer) is
'internal: "columns" as fanout.sync_table() takes it, by the names of now';
revoke all on function fanout.sync_mapping(integer) from public;

-- With the rights of pg_fanout, since views for monitoring call it.
create function fanout.sync_key_columns(subscription_id integer) returns text[]
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select array_agg(coalesce(a.attname, k.local)::text order by k.key_position)
    from fanout.sync_column k
         join fanout.sync_target t using (subscription_id)
         left join fanout.subscription_bound b using (subscription_id)
         left join pg_attribute a on a.attrelid = b.target and a.attnum = k.attnum
    where k.subscription_id = sync_key_columns.subscription_id and k.key_position is not null
$$;
comment on function fanout.sync_key_columns(integer) is
'internal: the key of a target, by the names of now';
revoke all on function fanout.sync_key_columns(integer) from public;

create function fanout.check_sync_source(source text, out source_schema text, out source_table text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    names text[];
begin
    if check_sync_source.source is null then
        return;
    end if;
    begin
        names := parse_ident(check_sync_source.source);
    exception when invalid_parameter_value then
        names := '{}';
    end;
    if cardinality(names) <> 2 then
        raise exception 'source "%" is not a table''s name with its schema', check_sync_source.source
            using errcode = 'invalid_parameter_value',
                  hint = 'For example public.users.';
    end if;
    source_schema := names[1];
    source_table := names[2];
end
$$;
comment on function fanout.check_sync_source(text) is
'internal: takes the name of a source table apart; raises an error if it is none';
revoke all on function fanout.check_sync_source(text) from public;

-- A subscription that gets another handler keeps no table any more.
create function fanout.forget_sync_target(id integer) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
    delete from fanout.sync_row r where r.subscription_id = forget_sync_target.id;
    delete from fanout.sync_comparison c where c.subscription_id = forget_sync_target.id;
    delete from fanout.sync_difference d where d.subscription_id = forget_sync_target.id;
    delete from fanout.sync_column k where k.subscription_id = forget_sync_target.id;
    delete from fanout.sync_target t where t.subscription_id = forget_sync_target.id;
    update fanout.subscription_bound b set target = null where b.subscription_id = forget_sync_target.id and b.target is not null;
end
$$;
comment on function fanout.forget_sync_target(integer) is
'internal: removes what is known of the table that a subscription keeps';
revoke all on function fanout.forget_sync_target(integer) from public;

create function fanout.add_sync_target(id integer, target regclass, key text[], columns jsonb,
                                       source_schema text, source_table text, unknown_columns text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    old fanout.sync_target;
begin
    select * into old from fanout.sync_target t where t.subscription_id = add_sync_target.id;
    -- another table knows nothing of what the one before was told
    if fanout.target_table(old) is distinct from add_sync_target.target
       or fanout.sync_key_columns(add_sync_target.id) is distinct from add_sync_target.key then
        perform fanout.forget_sync_target(add_sync_target.id);
    end if;
    delete from fanout.sync_column k where k.subscription_id = add_sync_target.id;
    insert into fanout.sync_target as t (subscription_id, target, source_schema, source_table, unknown_columns)
    values (add_sync_target.id, fanout.qualified_name(add_sync_target.target), add_sync_target.source_schema,
            add_sync_target.source_table, add_sync_target.unknown_columns)
    on conflict (subscription_id) do update
        set source_schema = excluded.source_schema, source_table = excluded.source_table,
            unknown_columns = excluded.unknown_columns, ignored_columns = '{}', target = excluded.target;
    update fanout.subscription_bound b set target = add_sync_target.target where b.subscription_id = add_sync_target.id;
    insert into fanout.sync_column (subscription_id, attnum, local, remote, mapped)
    select add_sync_target.id, a.attnum, a.attname, e.key, true
    from jsonb_each_text(add_sync_target.columns) e
         join pg_attribute a on a.attrelid = add_sync_target.target and a.attname = e.value and a.attnum > 0;
    perform fanout.sync_refresh_columns(add_sync_target.id);
    update fanout.sync_column k set key_position = array_position(add_sync_target.key, k.local)
    where k.subscription_id = add_sync_target.id;
end
$$;
comment on function fanout.add_sync_target(integer, regclass, text[], jsonb, text, text, text) is
'internal: notes what fanout.sync_table() was given for a new subscription';
revoke all on function fanout.add_sync_target(integer, regclass, text[], jsonb, text, text, text) from public;

-- Rows of a partition are its parents', too.
create function fanout.sync_overlap(a regclass, b regclass) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select a = b or a in (select relid from pg_partition_ancestors(b)) or b in (select relid from pg_partition_ancestors(a))
$$;
comment on function fanout.sync_overlap(regclass, regclass) is
'internal: are two targets the same table, or one a partition of the other?';
revoke all on function fanout.sync_overlap(regclass, regclass) from public;

create function fanout.sync_sharers(t fanout.sync_target) returns integer[]
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select array(select o.subscription_id
                 from fanout.subscription_bound own, fanout.subscription_bound o join fanout.subscription s using (subscription_id)
                 where own.subscription_id = t.subscription_id
                   and (o.subscription_id = t.subscription_id or s.active and fanout.sync_overlap(o.target, own.target)))
$$;
comment on function fanout.sync_sharers(fanout.sync_target) is
'internal: the subscriptions that write into the table of one, itself included';
revoke all on function fanout.sync_sharers(fanout.sync_target) from public;

create function fanout.check_sync_sharers(id integer, target regclass, key text[]) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    other fanout.subscription;
begin
    select s.* into other from fanout.sync_target t join fanout.subscription s using (subscription_id)
    where s.active and s.subscription_id <> check_sync_sharers.id
      and fanout.sync_overlap(fanout.target_table(t), check_sync_sharers.target)
      and fanout.sync_key_columns(s.subscription_id) is distinct from check_sync_sharers.key
    limit 1;
    if found then
        raise exception 'table % is kept by another key for consumer group "%" of topic "%"',
                        check_sync_sharers.target, other.consumer_group, other.topic
            using errcode = 'invalid_parameter_value',
                  hint = 'Subscriptions that keep one table must use the same key.';
    end if;
end
$$;
comment on function fanout.check_sync_sharers(integer, regclass, text[]) is
'internal: raises an error if another subscription keeps the table, or a part of it, by another key';
revoke all on function fanout.check_sync_sharers(integer, regclass, text[]) from public;

create function fanout.raise_obstacle(code text, problem text, hint text) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if raise_obstacle.hint is null then
        raise exception '%', raise_obstacle.problem using errcode = raise_obstacle.code;
    end if;
    raise exception '%', raise_obstacle.problem using errcode = raise_obstacle.code, hint = raise_obstacle.hint;
end
$$;
comment on function fanout.raise_obstacle(text, text, text) is 'internal: raises what fanout.sync_obstacle() found';
revoke all on function fanout.raise_obstacle(text, text, text) from public;

create function fanout.add_sync_table(role regrole, topic text, consumer_group text, target regclass, key text[],
                                      columns jsonb, source text, unknown_columns text, prefetch integer,
                                      max_attempts integer, retry_delay interval, max_retry_delay interval,
                                      handler_timeout interval, start_at text)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    was_active boolean;
    id integer;
    key_columns text[];
    given record;
    obstacle record;
    old fanout.sync_target;
begin
    if add_sync_table.target is null then
        raise exception 'target must not be null'
            using errcode = 'null_value_not_allowed';
    elsif add_sync_table.unknown_columns is null or add_sync_table.unknown_columns not in ('ignore', 'error') then
        raise exception 'unknown_columns must be "ignore" or "error"'
            using errcode = 'invalid_parameter_value';
    end if;
    -- what is wrong with the table comes before what is wrong with its key
    select * into obstacle from fanout.sync_obstacle(add_sync_table.role, add_sync_table.target, '{}');
    if obstacle.code <> 'invalid_parameter_value' then
        perform fanout.raise_obstacle(obstacle.code, obstacle.problem, obstacle.hint);
    end if;
    perform fanout.check_sync_columns(add_sync_table.target, add_sync_table.columns);
    select * into given from fanout.check_sync_source(add_sync_table.source);
    key_columns := fanout.sync_key(add_sync_table.target, add_sync_table.key);
    select * into obstacle from fanout.sync_obstacle(add_sync_table.role, add_sync_table.target,
        array(select a.attnum from pg_attribute a where a.attrelid = add_sync_table.target and a.attname = any (key_columns)));
    if obstacle.code is not null then
        perform fanout.raise_obstacle(obstacle.code, obstacle.problem, obstacle.hint);
    end if;

    was_active := exists (select from fanout.subscription s where s.topic = add_sync_table.topic
                          and s.consumer_group = add_sync_table.consumer_group and s.active);
    perform fanout.add_subscription(add_sync_table.role, add_sync_table.topic, add_sync_table.consumer_group,
                                    'fanout.sync_messages(fanout.message[])'::regprocedure,
                                    add_sync_table.prefetch, add_sync_table.max_attempts,
                                    add_sync_table.retry_delay, add_sync_table.max_retry_delay, true,
                                    add_sync_table.handler_timeout, start_at => add_sync_table.start_at);
    select s.subscription_id into strict id from fanout.subscription s
    where s.topic = add_sync_table.topic and s.consumer_group = add_sync_table.consumer_group;
    perform fanout.check_sync_sharers(id, add_sync_table.target, key_columns);
    if not was_active then
        perform fanout.add_sync_target(id, add_sync_table.target, key_columns, add_sync_table.columns,
                                       given.source_schema, given.source_table, add_sync_table.unknown_columns);
        return;
    end if;
    select * into strict old from fanout.sync_target t where t.subscription_id = id;
    perform fanout.raise_difference(
        pg_catalog.format('subscription of consumer group "%s" to topic "%s"',
                          add_sync_table.consumer_group, add_sync_table.topic),
        array_remove(array[
            fanout.difference('target', coalesce(fanout.target_table(old)::text, old.target), add_sync_table.target::text),
            fanout.difference('key', fanout.sync_key_columns(id)::text, key_columns::text),
            fanout.difference('columns', fanout.sync_mapping(id)::text, nullif(add_sync_table.columns, '{}')::text),
            case when given.source_table is not null
                 then fanout.difference('source', old.source_schema || '.' || old.source_table,
                                        given.source_schema || '.' || given.source_table) end,
            fanout.difference('unknown_columns', old.unknown_columns, add_sync_table.unknown_columns)], null));
end
$$;
comment on function fanout.add_sync_table(regrole, text, text, regclass, text[], jsonb, text, text, integer, integer, interval, interval, interval, text) is
'internal: what fanout.sync_table() does with the rights of pg_fanout';
revoke all on function fanout.add_sync_table(regrole, text, text, regclass, text[], jsonb, text, text, integer, integer, interval, interval, interval, text) from public;

create function fanout.sync_table(topic text, consumer_group text, target regclass, key text[] default null,
                                  columns jsonb default null, source text default null,
                                  unknown_columns text default 'ignore', prefetch integer default 1000,
                                  max_attempts integer default 10, retry_delay interval default '1 s',
                                  max_retry_delay interval default '5 min', handler_timeout interval default '30 s',
                                  start_at text default null)
returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_sync_table';
comment on function fanout.sync_table(text, text, regclass, text[], jsonb, text, text, integer, integer, interval, interval, interval, text) is
'subscribes with a handler that keeps a table equal to the remote one: rows are inserted, updated, deleted, all of them at a TRUNCATE; never is something older written over something newer. target: the table; key: its columns that identify a row, with a unique index; NULL: the primary key; columns: {"remote name": "local name"} where names differ; NULL: nowhere; source: the remote table, schema.table; NULL: that of the first message; unknown_columns: what becomes of a message with a column that the table does not have: ignore: the column is left out, error: the message fails. The others as in fanout.subscribe(). Errors: those of subscribe(), 42809 a table that cannot be kept, 42703 unknown column, 22023 no such unique index, a deferrable unique constraint, or a wrong source, 42501 no right to act as the table''s owner';
revoke all on function fanout.sync_table(text, text, regclass, text[], jsonb, text, text, integer, integer, interval, interval, interval, text) from public;


-- ---------------------------------------------------------------------------
-- May this database publish and consume?
-- ---------------------------------------------------------------------------

-- Rows are appended, so the last block of a segment has its newest ones, and that
-- is all that need be looked at.  A volatile function must be called in a subquery, or
-- the server reads the whole table and calls it for each row.
create function fanout.newest_transactions() returns setof xid8
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select xid from fanout.outbox_0
    where ctid >= (select format('(%s,0)', greatest(pg_relation_size('fanout.outbox_0') / current_setting('block_size')::bigint - 1, 0))::tid)
    union all
    select xid from fanout.outbox_1
    where ctid >= (select format('(%s,0)', greatest(pg_relation_size('fanout.outbox_1') / current_setting('block_size')::bigint - 1, 0))::tid)
    union all
    select xid from fanout.outbox_2
    where ctid >= (select format('(%s,0)', greatest(pg_relation_size('fanout.outbox_2') / current_setting('block_size')::bigint - 1, 0))::tid)
$$;
comment on function fanout.newest_transactions() is 'internal: of the newest rows of the outbox''s segments';
revoke all on function fanout.newest_transactions() from public;

-- A snapshot of this server ends at its next transaction at the latest, and so
-- does whatever is visible.
create function fanout.ledger_problem() returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    with ledger as (
        select * from fanout.sent where topic_id is null order by sent_id desc limit 1
    ), problem(place, text) as (
        select 1, 'table "fanout.rotation" must have one row'
        where (select count(*) from fanout.rotation) <> 1
        union all
        select 2, 'table "fanout.inbox_rotation" must have one row'
        where (select count(*) from fanout.inbox_rotation) <> 1
        union all
        select 3, 'the ledger "fanout.sent" is empty'
        where not exists (select from ledger)
        union all
        select 4, format('the ledger "fanout.sent" was not written by this server: it knows of transactions up to %s, and the next one is %s',
                         greatest(pg_snapshot_xmax(l.base), pg_snapshot_xmax(l.target)), n.xid)
        from ledger l, pg_snapshot_xmax(pg_current_snapshot()) n(xid)
        where pg_snapshot_xmax(l.base) > n.xid or pg_snapshot_xmax(l.target) > n.xid
        union all
        select 5, format('table "fanout.outbox" has rows that this server did not write: of transactions up to %s, and the next one is %s',
                         o.xid, n.xid)
        from pg_snapshot_xmax(pg_current_snapshot()) n(xid),
             (select max(xid) from fanout.newest_transactions() xid
              where xid is distinct from pg_current_xact_id_if_assigned()) o(xid)
        where o.xid >= n.xid
    )
    select text from problem order by place limit 1
$$;
comment on function fanout.ledger_problem() is
'internal: why the publisher cannot go on from ledger, rotation and outbox; NULL: it can';
revoke all on function fanout.ledger_problem() from public;

-- pg_upgrade brings the files into another server, so that their row is the only
-- one.  The database has the same oid there, or at least the same name (before
-- PostgreSQL 15).  One made from a template has neither.
create function fanout.copy_problem() returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    with identity as (
        select distinct i.*, i.system_identifier = d.system_identifier and i.database = d.database as own,
               i.system_identifier not in (0, d.system_identifier)
                   and (i.database = d.database or i.name = d.name) as upgraded
        from fanout.identity i, fanout.this_database() d
    )
    select case
        when count(*) = 0 then 'table "fanout.identity" is empty'
        when bool_and(own) or count(*) = 1 and bool_and(upgraded) then null
        when bool_and(own or system_identifier = 0) then 'it is a copy, restored from a dump of the schema alone'
        else format('it is a copy of database "%s"',
                    (array_agg(name order by system_identifier = 0, upgraded, name) filter (where not own))[1])
        end
    from identity
$$;
comment on function fanout.copy_problem() is
'internal: why this database counts as the copy of another one; NULL: it does not';
revoke all on function fanout.copy_problem() from public;

create function fanout.passive_reason() returns text
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(case when not coalesce(current_setting('pg_fanout.enabled', true), 'on')::boolean
                         then 'pg_fanout.enabled is off' end,
                    fanout.copy_problem(), fanout.ledger_problem())
$$;
comment on function fanout.passive_reason() is
'internal: why this database neither publishes nor consumes; NULL: it does';
revoke all on function fanout.passive_reason() from public;


create function fanout.stop_workers() returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_stop_workers';
comment on function fanout.stop_workers() is
'internal: stops the workers of this database, and keeps them out until the transaction ends. Errors: 55006 if they do not stop';
revoke all on function fanout.stop_workers() from public;

create function fanout.restart_workers() returns void
language c volatile
as 'MODULE_PATHNAME', 'pgf_restart_workers';
comment on function fanout.restart_workers() is
'internal: makes the workers of this database start again once this transaction has committed';
revoke all on function fanout.restart_workers() from public;

create function fanout.identity_changed() returns trigger
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    perform fanout.restart_workers();
    return null;
end
$$;
comment on function fanout.identity_changed() is
'internal: statement trigger on the identity, so that a database that became a copy is passive at once';
revoke all on function fanout.identity_changed() from public;

create trigger identity_changed
after insert or update or delete or truncate
on fanout.identity
for each statement execute function fanout.identity_changed();
alter table fanout.identity enable always trigger identity_changed;

create function fanout.own_identity() returns void
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    delete from fanout.identity;
    insert into fanout.identity select * from fanout.this_database();
$$;
comment on function fanout.own_identity() is 'internal: makes this database one of its own';
revoke all on function fanout.own_identity() from public;

-- A copy of a database in which nothing was declared, as of a template that has
-- the extension, has nothing that it could publish or consume twice.
create function fanout.adopt_if_empty() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    if not exists (select from fanout.topic where not dropping)
       and not exists (select from fanout.subscription where active)
       and fanout.copy_problem() is not null
    then
        perform fanout.own_identity();
    end if;
end
$$;
comment on function fanout.adopt_if_empty() is
'internal: makes a copy a database of its own if nothing is declared in it yet';
revoke all on function fanout.adopt_if_empty() from public;

-- Triggers that came without their topics are those of a dump of the schema
-- alone.  Where there are other topics, only a table was restored.
create function fanout.note_copied_schema() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    if not exists (select from fanout.topic) and fanout.copy_problem() is null then
        insert into fanout.identity values (0, 0, '');
    end if;
end
$$;
comment on function fanout.note_copied_schema() is
'internal: makes the database passive if a capture''s topic does not exist, and no other one either';
revoke all on function fanout.note_copied_schema() from public;

-- Writes must not fail because a dump of the schema alone has no topics, and
-- what they write must not be lost.
create function fanout.declare_captured_topic(topic text, format text, on_exhausted text) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform fanout.check_name('topic', declare_captured_topic.topic);
    perform fanout.note_copied_schema();
    insert into fanout.topic as t (topic, format, on_exhausted)
    values (declare_captured_topic.topic, declare_captured_topic.format, declare_captured_topic.on_exhausted)
    on conflict on constraint topic_topic_key do update
        set format = excluded.format, on_exhausted = excluded.on_exhausted, dropping = false, paused = false
        where t.dropping;
end
$$;
comment on function fanout.declare_captured_topic(text, text, text) is
'internal: declares the topic of a capture whose trigger was restored without it, when it fires';
revoke all on function fanout.declare_captured_topic(text, text, text) from public;


-- ---------------------------------------------------------------------------
-- Views
-- ---------------------------------------------------------------------------

create view fanout.topics as
select t.topic, t.format, t.on_exhausted, t.paused,
       case when t.dropping then 'dropping'
            when t.last_error is not null then 'error'
            when t.declared_at is null then 'pending'
            else 'declared' end as state,
       t.declared_at, t.last_error
from fanout.topic t;
comment on view fanout.topics is 'topics, and what the broker said of their exchanges';
comment on column fanout.topics.topic is 'name of the topic and of its exchange';
comment on column fanout.topics.format is 'body of captured changes';
comment on column fanout.topics.on_exhausted is 'what happens to a message refused pg_fanout.retry_limit times';
comment on column fanout.topics.paused is 'by fanout.pause()';
comment on column fanout.topics.state is 'pending: not declared yet; declared; error: refused, see last_error; dropping';
comment on column fanout.topics.declared_at is 'when the broker last confirmed the exchange; NULL: never';
comment on column fanout.topics.last_error is 'what the broker said when it last refused; NULL: it did not';
revoke all on fanout.topics from public;

create view fanout.bindings as
select t.topic, b.consumer_group, b.queue, b.queue_type, b.arguments,
       case when b.drop_if_unused is not null then 'dropping'
            when b.last_error is not null then 'error'
            when b.declared_at is null then 'pending'
            else 'declared' end as state,
       b.declared_at, b.last_error, b.dead_letter, b.dead_letters
from fanout.binding b join fanout.topic t using (topic_id);
comment on view fanout.bindings is 'queues of consumer groups, and what the broker said of them';
comment on column fanout.bindings.topic is 'the topic the queue is bound to';
comment on column fanout.bindings.consumer_group is 'whose queue it is';
comment on column fanout.bindings.queue is 'name of the queue, <topic>_<consumer_group>';
comment on column fanout.bindings.queue_type is 'quorum, classic or stream';
comment on column fanout.bindings.arguments is 'arguments as declared, without pg_fanout''s own';
comment on column fanout.bindings.state is 'pending: not declared yet; declared; error: refused, see last_error; dropping';
comment on column fanout.bindings.declared_at is 'when the broker last confirmed queue and binding; NULL: never';
comment on column fanout.bindings.last_error is 'what the broker said when it last refused; NULL: it did not';
comment on column fanout.bindings.dead_letter is 'the queue has a queue of dead letters, "<queue>_dead"';
comment on column fanout.bindings.dead_letters is 'messages in the queue of dead letters when the publisher last looked; NULL: not yet, or there is none';
revoke all on fanout.bindings from public;

create view fanout.outbox_status as
select o.id, t.topic, o.message_id, o.type, o.key, o.created_at,
       case when c.is_sent then 'sent'
            when t.paused or exists (select from fanout.stall st where st.topic_id = o.topic_id) then 'held'
            else 'pending' end as state,
       case when c.is_sent then
           -- entries of the main cursor do not count for a topic that had left it
           (select e.sent_at from fanout.sent e
            where e.sent_at >= o.created_at
              and (pg_visible_in_snapshot(o.xid, e.base)
                   or (pg_visible_in_snapshot(o.xid, e.target) and o.id <= e.last_id))
              and (e.topic_id = o.topic_id
                   or e.topic_id is null
                      and coalesce((select f.attached from fanout.sent f
                                    where f.topic_id = o.topic_id and f.sent_id < e.sent_id
                                    order by f.sent_id desc limit 1), true))
            order by e.sent_at limit 1) end as sent_at
from fanout.outbox o
     cross join fanout.main_position m
     left join fanout.topic_position d using (topic_id)
     left join fanout.topic t using (topic_id),
     lateral (select pg_visible_in_snapshot(o.xid, coalesce(d.base, m.base))
                     or (pg_visible_in_snapshot(o.xid, coalesce(d.target, m.target))
                         and o.id <= coalesce(d.last_id, m.last_id))
                     or pg_visible_in_snapshot(o.xid, d.purged)
                     or o.message_id = any (d.purged_messages)) s(is_passed),
     lateral (select coalesce(s.is_passed, false)) c(is_sent)
where not exists (select from fanout.held h where h.id = o.id)
  and not exists (select from fanout.dead_letter d where d.id = o.id and d.consumer_group is null)
union all
select h.id, t.topic, h.message_id, h.type, h.key, h.created_at, 'held', null
from fanout.held h left join fanout.topic t using (topic_id)
union all
select d.id, d.topic, d.message_id, d.type, d.key, d.created_at, 'dead', null
from fanout.dead_letter d where d.consumer_group is null;
comment on view fanout.outbox_status is
'every message in the outbox; sent ones stay for pg_fanout.retention. It reads all of it: for counts per topic see fanout.stat_topics';
comment on column fanout.outbox_status.id is 'outbox id, the header "sequence"';
comment on column fanout.outbox_status.topic is 'NULL: the topic was dropped';
comment on column fanout.outbox_status.message_id is 'AMQP message id';
comment on column fanout.outbox_status.type is 'AMQP type';
comment on column fanout.outbox_status.key is 'key of the row or message; NULL: none';
comment on column fanout.outbox_status.created_at is 'when the change was made';
comment on column fanout.outbox_status.state is
'pending: waits for the publisher; sent: acknowledged by the broker, or given up with fanout.purge(); held: its topic is paused or stalled; dead: given up';
comment on column fanout.outbox_status.sent_at is 'when the broker''s acknowledgement was recorded; NULL: not sent, or too long ago to tell';
revoke all on fanout.outbox_status from public;

create function fanout.publisher_status(out pid integer, out state text, out since timestamptz,
    out connected_to text, out connected_at timestamptz, out in_flight integer,
    out published bigint, out confirmed bigint, out returned bigint, out nacked bigint,
    out dead bigint, out reconnects bigint, out last_error text, out last_error_at timestamptz)
returns record
language c volatile strict
as 'MODULE_PATHNAME', 'pgf_publisher_status';
comment on function fanout.publisher_status() is 'internal: the publisher of this database; see the view fanout.stat_publisher';
revoke all on function fanout.publisher_status() from public;

create view fanout.stat_publisher as
select s.* from fanout.publisher_status() s where s.state is not null;
comment on view fanout.stat_publisher is
'the publisher of this database; one row, none if the library is not preloaded or no publisher was started yet. Counters begin when the server starts, or when the extension is created';
comment on column fanout.stat_publisher.pid is 'process id; NULL: it is not running';
comment on column fanout.stat_publisher.state is
'starting; connecting; idle: nothing to send; publishing; blocked: by the broker''s memory or disk alarm; disconnected: waits before it connects again; passive: the database neither publishes nor consumes, see last_error; stopped';
comment on column fanout.stat_publisher.since is 'when it entered that state';
comment on column fanout.stat_publisher.connected_to is 'host:port/vhost; NULL: not connected';
comment on column fanout.stat_publisher.connected_at is 'since when; NULL: not connected';
comment on column fanout.stat_publisher.in_flight is 'messages published and not confirmed yet';
comment on column fanout.stat_publisher.published is 'messages handed to the broker, repeats included';
comment on column fanout.stat_publisher.confirmed is 'messages acknowledged';
comment on column fanout.stat_publisher.returned is 'messages returned as unroutable';
comment on column fanout.stat_publisher.nacked is 'messages refused by a queue';
comment on column fanout.stat_publisher.dead is 'messages moved to fanout.dead_letter';
comment on column fanout.stat_publisher.reconnects is 'connections made after the first';
comment on column fanout.stat_publisher.last_error is 'most recent error; NULL: none';
comment on column fanout.stat_publisher.last_error_at is 'when it happened';
revoke all on fanout.stat_publisher from public;

-- Reads from where the ledger says, so that what was sent already costs nothing.
create view fanout.pending as
select o.segment, o.id, o.xid, o.topic_id, o.message_id, o.type, o.key, o.headers, o.payload, o.queue, o.created_at, o.place
from fanout.main_position m cross join fanout.first_place f, lateral (
    select o.*, o.ctid as place
    from fanout.outbox_0 o left join fanout.topic_position d using (topic_id)
    where o.ctid >= f.first_0
      and not pg_visible_in_snapshot(o.xid, coalesce(d.base, m.base))
      and not (pg_visible_in_snapshot(o.xid, coalesce(d.target, m.target)) and o.id <= coalesce(d.last_id, m.last_id))
      and not coalesce(pg_visible_in_snapshot(o.xid, d.purged), false)
      and not coalesce(o.message_id = any (d.purged_messages), false) offset 0) o
union all
select o.segment, o.id, o.xid, o.topic_id, o.message_id, o.type, o.key, o.headers, o.payload, o.queue, o.created_at, o.place
from fanout.main_position m cross join fanout.first_place f, lateral (
    select o.*, o.ctid as place
    from fanout.outbox_1 o left join fanout.topic_position d using (topic_id)
    where o.ctid >= f.first_1
      and not pg_visible_in_snapshot(o.xid, coalesce(d.base, m.base))
      and not (pg_visible_in_snapshot(o.xid, coalesce(d.target, m.target)) and o.id <= coalesce(d.last_id, m.last_id))
      and not coalesce(pg_visible_in_snapshot(o.xid, d.purged), false)
      and not coalesce(o.message_id = any (d.purged_messages), false) offset 0) o
union all
select o.segment, o.id, o.xid, o.topic_id, o.message_id, o.type, o.key, o.headers, o.payload, o.queue, o.created_at, o.place
from fanout.main_position m cross join fanout.first_place f, lateral (
    select o.*, o.ctid as place
    from fanout.outbox_2 o left join fanout.topic_position d using (topic_id)
    where o.ctid >= f.first_2
      and not pg_visible_in_snapshot(o.xid, coalesce(d.base, m.base))
      and not (pg_visible_in_snapshot(o.xid, coalesce(d.target, m.target)) and o.id <= coalesce(d.last_id, m.last_id))
      and not coalesce(pg_visible_in_snapshot(o.xid, d.purged), false)
      and not coalesce(o.message_id = any (d.purged_messages), false) offset 0) o;
comment on view fanout.pending is 'internal: messages that the publisher has not passed yet';
revoke all on fanout.pending from public;

create function fanout.publisher_backlog(out topic_id integer, out pending bigint, out oldest timestamptz)
returns setof record
language c stable strict
as 'MODULE_PATHNAME', 'pgf_backlog';
comment on function fanout.publisher_backlog() is
'internal: what waits for each topic, as the publisher knows it, and a row for topic 0; no rows: it does not know';
revoke all on function fanout.publisher_backlog() from public;

-- A function, so that nobody who looks has to plan, or compile, what counts the rows.
create function fanout.backlog() returns table (topic_id integer, waiting bigint, oldest timestamptz)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    return query select b.topic_id, b.pending, b.oldest from fanout.publisher_backlog() b;
    if not found then
        return query select p.topic_id, count(*), min(p.created_at) from fanout.pending p group by p.topic_id;
    end if;
end
$$;
comment on function fanout.backlog() is
'internal: what waits for each topic in the outbox; counts it if the publisher does not know. Part of fanout.stat_topics';
revoke all on function fanout.backlog() from public;

create view fanout.stat_topics as
with kept as materialized (
    select * from fanout.counts()
)
select t.topic, t.paused,
       case when b.blocked then 0 else coalesce(w.waiting, 0) end as pending,
       case when b.blocked then coalesce(w.waiting, 0) else 0 end + coalesce(h.count, 0) as held,
       clock_timestamp() - least(w.oldest, h.oldest) as oldest_pending_age,
       coalesce(s.sent, 0) as sent,
       case when s.updated_at > clock_timestamp() - interval '30 s' then s.rate else 0 end as rate,
       coalesce(d.count, 0) as dead,
       st.stalled_at as stalled_since,
       st.last_error as reason,
       st.attempts, st.retry_at
from fanout.topic t
     left join fanout.backlog() w using (topic_id)
     left join (select topic_id, count, oldest from kept) h using (topic_id)
     left join (select topic, count from kept where topic_id = 0 and consumer_group = '') d using (topic)
     left join fanout.topic_stat s using (topic_id)
     left join fanout.stall st using (topic_id),
     lateral (select t.paused or st.topic_id is not null) b(blocked);
comment on view fanout.stat_topics is 'per topic: what waits, what was sent, and whether the broker refuses it';
comment on column fanout.stat_topics.topic is 'the topic';
comment on column fanout.stat_topics.paused is 'by fanout.pause()';
comment on column fanout.stat_topics.pending is
'messages committed and not acknowledged yet, as far as the publisher has found them: it looks for new ones after each batch, or every tenth of a second while it cannot publish. While it does not know, the view counts, which takes longer';
comment on column fanout.stat_topics.held is 'messages that wait because the topic is paused or stalled';
comment on column fanout.stat_topics.oldest_pending_age is 'age of the oldest message pending or held, about; NULL: none';
comment on column fanout.stat_topics.sent is 'messages acknowledged since the topic was declared; written every few seconds';
comment on column fanout.stat_topics.rate is 'messages acknowledged per second, lately';
comment on column fanout.stat_topics.dead is 'messages in fanout.dead_letter';
comment on column fanout.stat_topics.stalled_since is 'since when the broker refuses its messages; NULL: it does not';
comment on column fanout.stat_topics.reason is 'what the broker said';
comment on column fanout.stat_topics.attempts is 'attempts since';
comment on column fanout.stat_topics.retry_at is 'when the next one is due';
revoke all on fanout.stat_topics from public;


create view fanout.subscriptions as
select s.topic, s.consumer_group, s.topic || '_' || s.consumer_group as queue,
       s.handler || case when s.batch then '(fanout.message[])' else '(fanout.message)' end as handler,
       fanout.subscriber(s) as role, s.prefetch, s.max_attempts, s.retry_delay, s.max_retry_delay, s.ordered, s.handler_timeout,
       s.on_failure, s.wait_for, s.max_wait, s.start_at, nullif(o.stream_offset, -1) as stream_offset, o.missed,
       s.subscribed_at, fanout.target_table(t) as target, fanout.sync_key_columns(s.subscription_id) as key,
       fanout.sync_mapping(s.subscription_id) as columns,
       case when t.source_table is not null then format('%I.%I', t.source_schema, t.source_table) end as source,
       t.unknown_columns, t.ignored_columns,
       case when t.target is not null
            then array(select k.remote from fanout.sync_column k
                       where k.subscription_id = s.subscription_id and k.missing order by k.attnum) end as missing_columns
from fanout.subscription s
     left join fanout.sync_target t using (subscription_id)
     left join fanout.stream_offset o on o.inbox_id = s.inbox_id and s.start_at is not null
where s.active;
comment on view fanout.subscriptions is 'subscriptions of this database, made by fanout.subscribe()';
comment on column fanout.subscriptions.topic is 'the topic';
comment on column fanout.subscriptions.consumer_group is 'the consumer group';
comment on column fanout.subscriptions.queue is 'the queue that is consumed, <topic>_<consumer_group>';
comment on column fanout.subscriptions.handler is 'the function that each message runs';
comment on column fanout.subscriptions.role is 'who subscribed, and as whom the handler runs; NULL: it does not exist, see fanout.stat_subscriptions';
comment on column fanout.subscriptions.prefetch is 'messages in work at once';
comment on column fanout.subscriptions.max_attempts is 'attempts until a message goes to fanout.dead_letter';
comment on column fanout.subscriptions.retry_delay is 'time before the second attempt; it doubles with each';
comment on column fanout.subscriptions.max_retry_delay is 'up to this';
comment on column fanout.subscriptions.ordered is 'do later messages of a key wait for one that failed?';
comment on column fanout.subscriptions.handler_timeout is 'time allowed for one call of the handler';
comment on column fanout.subscriptions.on_failure is 'where a message waits that the handler failed on: in the waiting room (wait), or in its queue (requeue)';
comment on column fanout.subscriptions.wait_for is 'SQLSTATEs with which a message is kept waiting before its attempts count';
comment on column fanout.subscriptions.max_wait is 'for so long';
comment on column fanout.subscriptions.start_at is 'where its stream is read from at first; NULL, as the next two: its queue is no stream';
comment on column fanout.subscriptions.stream_offset is 'up to this offset all messages were applied, given up or stored in the waiting room; NULL: none was read yet';
comment on column fanout.subscriptions.missed is 'messages, at most, that the stream had removed before they were read, since it is read from start_at';
comment on column fanout.subscriptions.subscribed_at is 'since when';
comment on column fanout.subscriptions.target is 'the table that fanout.sync_table() keeps; NULL, as all that follow: there is another handler';
comment on column fanout.subscriptions.key is 'its columns that tell rows apart';
comment on column fanout.subscriptions.columns is 'remote name: local name, as given to fanout.sync_table(); NULL: nothing was';
comment on column fanout.subscriptions.source is 'the remote table that it is a copy of; NULL: no message has come yet';
comment on column fanout.subscriptions.unknown_columns is 'what becomes of a message with a column that the table does not have: ignore or error';
comment on column fanout.subscriptions.ignored_columns is 'columns of the latest message that the table does not have';
comment on column fanout.subscriptions.missing_columns is 'columns that messages have had, and the latest one has not, by their remote names';
revoke all on fanout.subscriptions from public;

create function fanout.subscription_status(out subscription_id integer, out pid integer, out state text,
    out since timestamptz, out connected_to text, out connected_at timestamptz,
    out delivered bigint, out applied bigint, out skipped bigint, out stale bigint, out own bigint, out ignored bigint, out failed bigint, out dead bigint,
    out waiting integer, out lag bigint, out reconnects bigint, out last_error text, out last_error_at timestamptz)
returns setof record
language c volatile strict
as 'MODULE_PATHNAME', 'pgf_subscription_status';
comment on function fanout.subscription_status() is 'internal: the consumers of this database; see the view fanout.stat_subscriptions';
revoke all on function fanout.subscription_status() from public;

create view fanout.stat_subscriptions as
select s.topic, s.consumer_group, w.pid,
       case when a.reason is not null then 'passive' when s.paused then 'paused'
            when p.problem is not null then 'refused' else coalesce(w.state, 'stopped') end as state,
       w.since, w.connected_to, w.connected_at,
       coalesce(w.delivered, 0) as delivered, coalesce(w.applied, 0) as applied,
       coalesce(w.skipped, 0) as skipped, coalesce(w.stale, 0) as stale,
       coalesce(w.own, 0) as own, coalesce(w.ignored, 0) as ignored, coalesce(w.failed, 0) as failed, coalesce(w.dead, 0) as dead,
       coalesce(w.waiting, 0) as waiting, w.lag, coalesce(w.reconnects, 0) as reconnects,
       coalesce(p.problem, w.last_error) as last_error, w.last_error_at
from fanout.subscription s
     left join fanout.subscription_status() w using (subscription_id),
     (select fanout.passive_reason() offset 0) a(reason),
     lateral (select coalesce(a.reason, fanout.subscription_problem(s), fanout.handler_problem(s), fanout.queue_problem(s),
                              fanout.sync_problem(s.subscription_id))) p(problem)
where s.active;
comment on view fanout.stat_subscriptions is
'what the worker of each subscription is doing. Counters begin when it is first started, at the earliest when the server starts';
comment on column fanout.stat_subscriptions.topic is 'the topic';
comment on column fanout.stat_subscriptions.consumer_group is 'the consumer group';
comment on column fanout.stat_subscriptions.pid is 'process id; NULL: it is not running';
comment on column fanout.stat_subscriptions.state is
'starting; connecting; idle: nothing to do; consuming; refused: the queue, the handler or the role cannot be used, see last_error; disconnected: waits before it connects again; passive: as the publisher, see last_error; stopped';
comment on column fanout.stat_subscriptions.since is 'when it entered that state';
comment on column fanout.stat_subscriptions.connected_to is 'host:port/vhost; NULL: not connected';
comment on column fanout.stat_subscriptions.connected_at is 'since when; NULL: not connected';
comment on column fanout.stat_subscriptions.delivered is 'messages delivered, repeats included';
comment on column fanout.stat_subscriptions.applied is 'messages whose handler has succeeded and committed';
comment on column fanout.stat_subscriptions.skipped is 'repeats of messages that were applied, or given up, before';
comment on column fanout.stat_subscriptions.stale is 'changes that sync_table() did not write because something newer had been applied';
comment on column fanout.stat_subscriptions.own is 'messages that sync_table() left out because their change had come through this very table';
comment on column fanout.stat_subscriptions.ignored is 'messages that sync_table() left out because they are of another table or no captured changes, and rows that a trigger of the table left out';
comment on column fanout.stat_subscriptions.failed is 'attempts that failed';
comment on column fanout.stat_subscriptions.dead is 'messages moved to fanout.dead_letter';
comment on column fanout.stat_subscriptions.waiting is 'messages in the waiting room: those that failed, and those of the same keys behind them; of more than a thousand, after a change of others as of a second ago, or, if counting takes that long, of several';
comment on column fanout.stat_subscriptions.lag is 'messages that were ready in the queue when it was last looked at, every few seconds; NULL: not known, or it is a stream';
comment on column fanout.stat_subscriptions.reconnects is 'connections made after the first';
comment on column fanout.stat_subscriptions.last_error is 'most recent error; NULL: none';
comment on column fanout.stat_subscriptions.last_error_at is 'when it happened';
revoke all on fanout.stat_subscriptions from public;

create view fanout.delivery_failure with (security_barrier) as
select s.topic, s.consumer_group, w.message_id, w.type, w.key, w.sequence, w.headers, w.payload, w.raw,
       w.attempts, w.sqlstate, w.error, w.failed_at, w.next_try
from fanout.waiting w join fanout.subscription s using (subscription_id)
where w.error is not null
  -- as fanout.subscriber(), which readers may not call
  and (exists (select from (select) x left join fanout.subscription_bound b on b.subscription_id = s.subscription_id
               where pg_has_role(coalesce(b.role::oid, to_regrole(quote_ident(s.role))::oid), 'usage'))
       or has_table_privilege('fanout.waiting', 'select'));
comment on view fanout.delivery_failure is
'messages that a handler failed on, and that will be tried again: those of one''s own subscriptions, and with SELECT on fanout.waiting all of them';
comment on column fanout.delivery_failure.topic is 'of the subscription';
comment on column fanout.delivery_failure.consumer_group is 'of the subscription';
comment on column fanout.delivery_failure.message_id is 'as the handler gets it';
comment on column fanout.delivery_failure.type is 'AMQP property';
comment on column fanout.delivery_failure.key is 'later messages of this key wait, if the subscription is ordered';
comment on column fanout.delivery_failure.sequence is 'header';
comment on column fanout.delivery_failure.headers is 'as the handler gets them';
comment on column fanout.delivery_failure.payload is 'the body as text; NULL: see raw, or it waits in its queue';
comment on column fanout.delivery_failure.raw is 'the body if it is not text in this database''s encoding';
comment on column fanout.delivery_failure.attempts is 'attempts that count; 0: conflicts, a lack of resources, or an error of wait_for';
comment on column fanout.delivery_failure.sqlstate is 'of the last error; 57P01 while it is tried again';
comment on column fanout.delivery_failure.error is 'the last error, its first 1024 bytes; while it is tried again, behind the words that say so';
comment on column fanout.delivery_failure.failed_at is 'when it happened';
comment on column fanout.delivery_failure.next_try is 'when the next attempt is due';
revoke all on fanout.delivery_failure from public;


-- ---------------------------------------------------------------------------
-- History: rows that exist already
-- ---------------------------------------------------------------------------

create table fanout.backfill (
    backfill_id    bigint      generated always as identity primary key,
    kind           text        not null,
    entity         oid         not null default 0,
    entity_name    text,
    topic          text        not null,
    topic_id       integer     not null,
    consumer_group text,
    queue          text,
    "where"        text,
    rate           integer,
    since          timestamptz,
    until          timestamptz,
    again          boolean     not null default false,
    repair         boolean     not null default false,
    state          text        not null default 'running'
                   check (state in ('running', 'paused', 'done', 'failed', 'cancelled')),
    key            smallint[]  not null default '{}',
    position       text[],
    key_order      text,
    file           oid,
    walked         boolean     not null default false,
    last_xid       xid8,
    rows_done      bigint      not null default 0,
    rows_sent      bigint      not null default 0,
    rows_estimated bigint,
    error          text,
    created_at     timestamptz not null default clock_timestamp(),
    started_at     timestamptz,
    updated_at     timestamptz,
    finished_at    timestamptz
) using heap with (fillfactor = 50);
create index backfill_running_idx on fanout.backfill (backfill_id) where state = 'running';
comment on table fanout.backfill is 'internal: one row per backfill, where it is; see the view fanout.backfills';
comment on column fanout.backfill.key is 'numbers of the columns in whose order the table is walked; {}: by pages';
comment on column fanout.backfill.position is 'the key up to which it has come; of a walk by pages, the first place (ctid) that was not read';
comment on column fanout.backfill.key_order is 'of a walk by a key, fanout.key_order() when position was written: in which order that is the next row''s predecessor';
comment on column fanout.backfill.file is 'of a walk by pages, the file (pg_class.relfilenode) that position is about';
comment on column fanout.backfill.walked is 'all rows are in the outbox';
comment on column fanout.backfill.last_xid is 'the last transaction that wrote messages';
-- Not those of a database that this one was restored in place of, whose comparisons copies know by them.
select setval('fanout.backfill_backfill_id_seq', (extract(epoch from clock_timestamp()) * 1000)::bigint);
comment on sequence fanout.backfill_backfill_id_seq is 'internal: numbers of backfills';
revoke all on sequence fanout.backfill_backfill_id_seq from public;
revoke all on fanout.backfill from public;

create table fanout.replay_message (
    backfill_id bigint   not null,
    id          bigint   not null,
    segment     smallint not null,
    place       tid      not null,
    primary key (backfill_id, id)
) using heap;
comment on table fanout.replay_message is 'internal: messages that replays are to send, and where they are; emptied when a replay ends';
comment on column fanout.replay_message.place is 'in the segment of the outbox';
revoke all on fanout.replay_message from public;

-- The publisher asks for the worker.
create trigger backfills_changed
after insert or delete or truncate or update of state
on fanout.backfill
for each statement execute function fanout.subscriptions_changed();
alter table fanout.backfill enable always trigger backfills_changed;

-- Order and equality of the server's own, so that comparisons need no search_path.
create function fanout.walk_key(entity oid, key text[]) returns smallint[]
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select c.attnums
    from pg_index i join pg_class r on r.oid = i.indexrelid join pg_am m on m.oid = r.relam,
         lateral (select array_agg(a.attnum order by k.n) as attnums,
                         array_agg(a.attname::text order by k.n) as names,
                         bool_and(a.attnotnull and o.opcdefault and o.opcnamespace = 'pg_catalog'::regnamespace
                                  and i.indcollation[k.n - 1] = a.attcollation and i.indoption[k.n - 1] = 0) as usable
                  from unnest(i.indkey::int2[]) with ordinality k(attnum, n)
                       left join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
                       join pg_opclass o on o.oid = i.indclass[k.n - 1]
                  where k.n <= i.indnkeyatts) c
    where i.indrelid = entity and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
      and m.amname = 'btree' and c.usable
    order by c.names = walk_key.key desc, i.indisprimary desc, i.indnkeyatts, i.indexrelid limit 1
$$;
comment on function fanout.walk_key(oid, text[]) is
'internal: columns of a unique index in whose order a table can be walked, rather that of the key; NULL: none';
revoke all on function fanout.walk_key(oid, text[]) from public;

create function fanout.check_backfill_group(topic text, consumer_group text) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    queue text;
begin
    select b.queue into queue from fanout.binding b join fanout.topic t using (topic_id)
    where t.topic = check_backfill_group.topic and b.consumer_group = check_backfill_group.consumer_group
      and b.drop_if_unused is null;
    if not found then
        raise exception 'consumer group "%" is not bound to topic "%"', check_backfill_group.consumer_group, check_backfill_group.topic
            using errcode = 'undefined_object',
                  hint = 'Use fanout.declare_binding() first, so that the queue has all changes from then on.';
    end if;
    return queue;
end
$$;
comment on function fanout.check_backfill_group(text, text) is 'internal: the queue of a consumer group. Errors: 42704 if it is not bound';
revoke all on function fanout.check_backfill_group(text, text) from public;

create function fanout.check_backfill_entity(entity regclass, topic text) returns fanout.captures
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    r pg_class;
    c fanout.captures;
begin
    select * into r from pg_class where oid = check_backfill_entity.entity;
    select * into c from fanout.captures k
    where k.entity = check_backfill_entity.entity and k.topic = check_backfill_entity.topic
      and k.operations <> '{truncate}';
    if not found then
        raise exception 'table % is not captured into topic "%"', check_backfill_entity.entity, check_backfill_entity.topic
            using errcode = 'undefined_object',
                  detail = 'A backfill sends rows in the form in which their changes are sent.',
                  hint = case when r.relispartition
                              then 'Name the partitioned table above it, if that is captured.'
                              else 'Use fanout.capture() first.' end;
    elsif not c.enabled then
        raise exception 'not all changes of table % are captured', check_backfill_entity.entity
            using errcode = 'object_not_in_prerequisite_state',
                  detail = 'A trigger of the capture is missing or disabled.',
                  hint = 'Use ALTER TABLE ... ENABLE TRIGGER, or fanout.capture(replace => true).';
    elsif r.relpersistence = 't' then
        raise exception 'table % is temporary', check_backfill_entity.entity
            using errcode = 'wrong_object_type', detail = 'Other sessions cannot read it.';
    elsif c."where" is not null and c."when" is not null then
        raise exception 'table % is captured with "where" and "when"', check_backfill_entity.entity
            using errcode = 'feature_not_supported',
                  detail = 'Which of its rows belong to the topic cannot be told from the row alone.';
    elsif r.relrowsecurity and r.relforcerowsecurity
          and not (select o.rolsuper or o.rolbypassrls from pg_roles o where o.oid = r.relowner) then
        raise exception 'row-level security of table % applies to its owner', check_backfill_entity.entity
            using errcode = 'insufficient_privilege',
                  detail = 'Rows are read with the rights of the owner, who may not see all of them.',
                  hint = 'Use ALTER TABLE ... NO FORCE ROW LEVEL SECURITY, or give the owner BYPASSRLS.';
    end if;
    return c;
end
$$;
comment on function fanout.check_backfill_entity(regclass, text) is
'internal: the capture of a table whose rows can be sent. Errors: see fanout.backfill()';
revoke all on function fanout.check_backfill_entity(regclass, text) from public;

-- Without a key a row is found by its page, and an update may put it into another one.
create function fanout.check_backfill_key(c fanout.captures, key smallint[]) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if key is not null then
        return;
    elsif (select relkind from pg_class where oid = c.entity) = 'p' then
        raise exception 'table % has no unique index in whose order it can be walked', c.entity
            using errcode = 'feature_not_supported',
                  hint = 'Give it a primary key.';
    elsif not c.operations @> '{update}' or c."when" is not null then
        raise exception 'table % has no unique index in whose order it can be walked', c.entity
            using errcode = 'feature_not_supported',
                  detail = 'Without one a row could be missed that is updated meanwhile, since not all updates are captured.',
                  hint = 'Give it a primary key.';
    end if;
end
$$;
comment on function fanout.check_backfill_key(fanout.captures, smallint[]) is
'internal: raises an error (0A000) if rows could be missed';
revoke all on function fanout.check_backfill_key(fanout.captures, smallint[]) from public;

create function fanout.declare_backfill(entity regclass, topic text, consumer_group text, "where" text, rate integer) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    c fanout.captures;
    walk_key smallint[];
    id integer;
    group_queue text;
    result bigint;
begin
    perform fanout.check_name('topic', declare_backfill.topic);
    id := fanout.require_topic(declare_backfill.topic);
    if declare_backfill.consumer_group is not null then
        group_queue := fanout.check_backfill_group(declare_backfill.topic, declare_backfill.consumer_group);
    end if;
    perform fanout.check_number('rate', declare_backfill.rate, 1, 1000000) where declare_backfill.rate is not null;
    c := fanout.check_backfill_entity(declare_backfill.entity, declare_backfill.topic);
    walk_key := fanout.walk_key(declare_backfill.entity, c.key);
    perform fanout.check_backfill_key(c, walk_key);
    -- sessions take turns
    lock table fanout.backfill in share row exclusive mode;
    select b.backfill_id into result from fanout.backfill b
    where b.entity = declare_backfill.entity and b.topic = declare_backfill.topic
      and b.consumer_group is not distinct from declare_backfill.consumer_group and b.state in ('running', 'paused') limit 1;
    if found then
        raise exception 'backfill % of table % is under way', result, declare_backfill.entity
            using errcode = 'object_in_use',
                  detail = 'It sends the same rows to the same queues.',
                  hint = 'Wait for it, or use fanout.cancel_backfill().';
    elsif (select count(*) from fanout.backfill b where b.state in ('running', 'paused')) >= 100 then
        raise exception 'too many backfills are under way'
            using errcode = 'configuration_limit_exceeded', detail = 'There can be 100.';
    end if;
    insert into fanout.backfill (kind, entity, entity_name, topic, topic_id, consumer_group, queue, "where", rate, key, rows_estimated)
    select 'backfill', declare_backfill.entity, fanout.qualified_name(declare_backfill.entity), declare_backfill.topic, id,
           declare_backfill.consumer_group, group_queue, declare_backfill."where", declare_backfill.rate, coalesce(walk_key, '{}'),
           (select sum(r.reltuples) from pg_class r
            where r.relkind = 'r' and (r.oid = declare_backfill.entity
                                       or r.oid in (select relid from pg_partition_tree(declare_backfill.entity)))
            having min(r.reltuples) >= 0)
    returning backfill_id into result;
    return result;
end
$$;
comment on function fanout.declare_backfill(regclass, text, text, text, integer) is 'internal: part of fanout.backfill()';
revoke all on function fanout.declare_backfill(regclass, text, text, text, integer) from public;

create function fanout.backfill(entity regclass, topic text, consumer_group text default null,
                                "where" text default null, rate integer default null) returns bigint
language c volatile
as 'MODULE_PATHNAME', 'pgf_backfill';
comment on function fanout.backfill(regclass, text, text, text, integer) is
'sends the rows that a captured table has: to the queue of one consumer group, or to the topic (NULL), as the capture would send them, with op "r" and the header "backfill", and then a message without op that has the header "last". Each is sent with a sequence that puts it among the row''s changes where it belongs. A worker does it once this transaction has committed, in short transactions, and goes on where it was after a crash; see fanout.backfills. where: SQL condition on the row, read with the caller''s search_path; rate: rows per second at most (NULL: what the broker takes, live messages first). The caller must own the table. Returns the number of the backfill. Errors: 42704 unknown topic, group not bound, or table not captured, 42501 not the owner, or row-level security applies to the owner, 0A000 rows could be missed, 55006 the same backfill is under way, 53400 too many, 22023 bad rate, 55000 a trigger is disabled, 42809 a temporary table';
revoke all on function fanout.backfill(regclass, text, text, text, integer) from public;

-- Ranges are those of the key that the copy has, too.
create function fanout.declare_comparison(entity regclass, topic text, consumer_group text, repair boolean) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    c fanout.captures;
    result bigint;
begin
    if declare_comparison.consumer_group is null or declare_comparison.repair is null then
        raise exception '% must not be null', case when declare_comparison.repair is null then 'repair' else 'consumer_group' end
            using errcode = 'null_value_not_allowed';
    end if;
    -- with all its checks
    result := fanout.declare_backfill(declare_comparison.entity, declare_comparison.topic, declare_comparison.consumer_group, null, null);
    c := fanout.check_backfill_entity(declare_comparison.entity, declare_comparison.topic);
    if c.key is null or not exists (
        select from fanout.backfill b
        where b.backfill_id = result
          and (select array_agg(a.attname::text order by a.attname) from pg_attribute a
               where a.attrelid = declare_comparison.entity and a.attnum = any (b.key))
              = (select array_agg(k order by k) from unnest(c.key) k)) then
        raise exception 'table % has no unique index on the key of its capture', declare_comparison.entity
            using errcode = 'feature_not_supported',
                  detail = 'Ranges of keys are compared: a btree index is needed whose columns are NOT NULL, with the default order of types of PostgreSQL''s own.',
                  hint = 'Capture the table with its primary key as "key".';
    end if;
    update fanout.backfill b set kind = 'compare', repair = declare_comparison.repair where b.backfill_id = result;
    return result;
end
$$;
comment on function fanout.declare_comparison(regclass, text, text, boolean) is 'internal: part of fanout.compare()';
revoke all on function fanout.declare_comparison(regclass, text, text, boolean) from public;

create function fanout.compare(entity regclass, topic text, consumer_group text, repair boolean default false) returns bigint
language c volatile
as 'MODULE_PATHNAME', 'pgf_compare';
comment on function fanout.compare(regclass, text, text, boolean) is
'has the copy that fanout.sync_table() keeps for a consumer group compared with the table, while both are written: sends the rows, range by range of the key, to the queue of that group, in messages without op that other consumers ignore, with the snapshot under which they were read. The copy lists what differs in fanout.sync_differences, and leaves out rows that were changed meanwhile. repair: also mends what differs; the rows of a range are then locked while they are read, as those of a backfill. A worker does it once this transaction has committed; see fanout.backfills here, and fanout.sync_comparisons at the copy. The caller must own the table. Returns the number of the run. Errors: as of fanout.backfill(); 22004 an argument is null, 0A000 the key of the capture has no unique index of NOT NULL columns';
revoke all on function fanout.compare(regclass, text, text, boolean) from public;

create function fanout.replay(topic text, consumer_group text, since timestamptz, until timestamptz default null,
                              again boolean default false) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    replayed_id integer;
    group_queue text;
    oldest timestamptz;
    result bigint;
begin
    if replay.topic is null or replay.consumer_group is null or replay.since is null or replay.again is null then
        raise exception '% must not be null', case when replay.topic is null then 'topic' when replay.consumer_group is null then 'consumer_group'
                                                   when replay.since is null then 'since' else 'again' end
            using errcode = 'null_value_not_allowed';
    elsif replay.until <= replay.since then
        raise exception 'until must be later than since' using errcode = 'invalid_parameter_value';
    end if;
    replayed_id := fanout.require_topic(replay.topic);
    group_queue := fanout.check_backfill_group(replay.topic, replay.consumer_group);
    lock table fanout.backfill in share row exclusive mode;
    select b.backfill_id into result from fanout.backfill b
    where b.kind = 'replay' and b.topic = replay.topic and b.consumer_group = replay.consumer_group
      and b.state in ('running', 'paused') limit 1;
    if found then
        raise exception 'replay % of topic "%" is under way', result, replay.topic
            using errcode = 'object_in_use', hint = 'Wait for it, or use fanout.cancel_backfill().';
    elsif (select count(*) from fanout.backfill b where b.state in ('running', 'paused')) >= 100 then
        raise exception 'too many backfills are under way'
            using errcode = 'configuration_limit_exceeded', detail = 'There can be 100.';
    end if;
    select min(o.created_at) into oldest from fanout.outbox o
    where o.topic_id = replayed_id and o.database = (fanout.this_database()).database and not coalesce(o.headers ? 'replay', false);
    if oldest is null then
        raise notice 'the outbox has no messages of topic "%"', replay.topic
            using detail = 'Sent messages stay there for pg_fanout.retention.';
    elsif oldest > replay.since then
        raise notice 'the oldest message of topic "%" in the outbox is of %', replay.topic, oldest
            using detail = 'Sent messages stay there for pg_fanout.retention.',
                  hint = 'Use fanout.backfill() to send all rows as they are now.';
    end if;
    insert into fanout.backfill (kind, topic, topic_id, consumer_group, queue, since, until, again)
    values ('replay', replay.topic, replayed_id, replay.consumer_group, group_queue, replay.since,
            coalesce(replay.until, clock_timestamp()), replay.again)
    returning backfill_id into result;
    return result;
end
$$;
comment on function fanout.replay(text, text, timestamptz, timestamptz, boolean) is
'sends messages of a topic that were sent already, and that the outbox still has (pg_fanout.retention), once more to the queue of one consumer group, in their order: those of since up to until (NULL: now), also if they were given up with fanout.purge(). With the same message ids, headers and sequence, and the header "replay"; with again, under new message ids, so that subscriptions of pg_fanout, which skip ids they know, take them anew, and with the header "replay_of". Then comes a message without op that has the header "last". A worker does it, see fanout.backfills; fanout.cancel_backfill() and its like work. A NOTICE tells the oldest time that is still there. Returns its number. Errors: 42704 unknown topic, or group not bound, 22004 an argument is null, 22023 until is not later than since, 55006 one is under way, 53400 too many';
revoke all on function fanout.replay(text, text, timestamptz, timestamptz, boolean) from public;

create function fanout.recover_dead(topic text, consumer_group text) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    recovered_id integer;
    group_queue text;
    result bigint;
begin
    if recover_dead.topic is null or recover_dead.consumer_group is null then
        raise exception '% must not be null', case when recover_dead.topic is null then 'topic' else 'consumer_group' end
            using errcode = 'null_value_not_allowed';
    end if;
    recovered_id := fanout.require_topic(recover_dead.topic);
    group_queue := fanout.check_backfill_group(recover_dead.topic, recover_dead.consumer_group);
    if not exists (select from fanout.binding b where b.queue = group_queue and b.dead_letter) then
        raise exception 'queue "%" has no queue of dead letters', group_queue
            using errcode = 'object_not_in_prerequisite_state',
                  hint = 'fanout.declare_binding() makes one if it is called with dead_letter.';
    end if;
    lock table fanout.backfill in share row exclusive mode;
    select b.backfill_id into result from fanout.backfill b
    where b.kind = 'recover_dead' and b.queue = group_queue and b.state in ('running', 'paused') limit 1;
    if found then
        raise exception 'recovery % of queue "%" is under way', result, group_queue
            using errcode = 'object_in_use', hint = 'Wait for it, or use fanout.cancel_backfill().';
    elsif (select count(*) from fanout.backfill b where b.state in ('running', 'paused')) >= 100 then
        raise exception 'too many backfills are under way'
            using errcode = 'configuration_limit_exceeded', detail = 'There can be 100.';
    end if;
    insert into fanout.backfill (kind, topic, topic_id, consumer_group, queue)
    values ('recover_dead', recover_dead.topic, recovered_id, recover_dead.consumer_group, group_queue)
    returning backfill_id into result;
    return result;
end
$$;
comment on function fanout.recover_dead(text, text) is
'moves the dead letters of a consumer group''s queue, those that are in "<queue>_dead" when it begins, back to the queue, as they were: with their properties, headers and bodies, and "x-death" among the headers. None is lost; after a failure some may be in the queue twice, with the same message id. A worker does it, see fanout.backfills; fanout.cancel_backfill() and its like work. Returns its number. Errors: 42704 unknown topic, or group not bound, 22004 an argument is null, 55000 the queue has no queue of dead letters, 55006 one is under way, 53400 too many';
revoke all on function fanout.recover_dead(text, text) from public;

create function fanout.write_comparison(topic text, queue text, headers jsonb, body text) returns void
language c volatile strict
as 'MODULE_PATHNAME', 'pgf_write_comparison';
comment on function fanout.write_comparison(text, text, jsonb, text) is 'internal: writes a message of a comparison, for one queue';
revoke all on function fanout.write_comparison(text, text, jsonb, text) from public;

-- Under the name that the table had when the comparison began, by which its copy knows it.
create function fanout.end_comparison(id bigint, failure text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    b fanout.backfill;
    name text[];
begin
    select f.* into b from fanout.backfill f
    where f.backfill_id = end_comparison.id and f.kind = 'compare'
      and exists (select from fanout.topic t where t.topic = f.topic)
      and exists (select from fanout.binding n where n.queue = f.queue);
    if not found then
        return;
    end if;
    name := parse_ident(b.entity_name);
    perform fanout.write_comparison(
        b.topic, b.queue, jsonb_build_object('compare', end_comparison.id, 'schema', name[1], 'table', name[2], 'last', true),
        format('{"compare":%s,"repair":%s,%s}', end_comparison.id, to_json(b.repair),
               coalesce('"failure":' || to_json(end_comparison.failure), '"ranges":' || b.rows_sent)));
end
$$;
comment on function fanout.end_comparison(bigint, text) is
'internal: tells the copy that a comparison has ended, if its queue is still there; failure: why, before all rows were sent, or NULL';
revoke all on function fanout.end_comparison(bigint, text) from public;

create function fanout.set_backfill_state(id bigint, state text, allowed text[]) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    old_state text;
begin
    select b.state into old_state from fanout.backfill b where b.backfill_id = set_backfill_state.id for update;
    if not found then
        raise exception 'backfill % does not exist', set_backfill_state.id using errcode = 'undefined_object';
    elsif old_state = set_backfill_state.state then
        return;
    elsif not old_state = any (allowed) then
        raise exception 'backfill % is %', set_backfill_state.id, old_state
            using errcode = 'object_not_in_prerequisite_state',
                  hint = 'Use fanout.backfill() to send the rows again.';
    end if;
    update fanout.backfill b
    set state = set_backfill_state.state, error = null, updated_at = clock_timestamp(),
        finished_at = case when set_backfill_state.state = 'cancelled' then clock_timestamp() end
    where b.backfill_id = set_backfill_state.id;
    if set_backfill_state.state = 'cancelled' then
        delete from fanout.replay_message r where r.backfill_id = set_backfill_state.id;
        perform fanout.end_comparison(set_backfill_state.id, 'it was cancelled at the source');
    end if;
end
$$;
comment on function fanout.set_backfill_state(bigint, text, text[]) is 'internal: part of fanout.cancel_backfill() and its like';
revoke all on function fanout.set_backfill_state(bigint, text, text[]) from public;

create function fanout.cancel_backfill(id bigint) returns void
language sql volatile security definer
set search_path = pg_catalog, pg_temp
as $$ select fanout.set_backfill_state(id, 'cancelled', '{running,paused,failed}') $$;
comment on function fanout.cancel_backfill(bigint) is
'ends a backfill; what is in the outbox is sent. Errors: 42704 there is none of that number, 55000 it is done';
revoke all on function fanout.cancel_backfill(bigint) from public;

create function fanout.pause_backfill(id bigint) returns void
language sql volatile security definer
set search_path = pg_catalog, pg_temp
as $$ select fanout.set_backfill_state(id, 'paused', '{running}') $$;
comment on function fanout.pause_backfill(bigint) is
'stops a backfill until fanout.resume_backfill(). Errors: 42704 there is none of that number, 55000 it has ended';
revoke all on function fanout.pause_backfill(bigint) from public;

create function fanout.resume_backfill(id bigint) returns void
language sql volatile security definer
set search_path = pg_catalog, pg_temp
as $$ select fanout.set_backfill_state(id, 'running', '{paused,failed}') $$;
comment on function fanout.resume_backfill(bigint) is
'lets a backfill go on that was paused, or has failed, where it was. Errors: 42704 there is none of that number, 55000 it was cancelled, or is done';
revoke all on function fanout.resume_backfill(bigint) from public;

create view fanout.backfills as
select b.backfill_id as id, b.kind, coalesce(r.oid::regclass::text, b.entity_name) as entity, b.topic, b.consumer_group, b."where", b.since, b.until, b.rate,
       case when b.state = 'running' and b.started_at is null then 'waiting' else b.state end as state,
       b.rows_done, b.rows_estimated, b.rows_sent,
       (select string_agg(p, ', ' order by n) from unnest(b.position) with ordinality u(p, n) where b.key <> '{}' or b.kind = 'replay' and array_length(b.position, 1) = 1) as last_key,
       b.error, b.created_at, b.started_at, b.updated_at, b.finished_at
from fanout.backfill b left join pg_class r on r.oid = b.entity;
comment on view fanout.backfills is 'backfills, replays, comparisons and recoveries of dead letters of this database, made by fanout.backfill(), fanout.replay(), fanout.compare() and fanout.recover_dead(), and how far they are';
comment on column fanout.backfills.id is 'its number, the header "backfill" of its messages';
comment on column fanout.backfills.kind is 'backfill, replay, compare or recover_dead';
comment on column fanout.backfills.entity is 'the table; NULL: of a replay or a recovery';
comment on column fanout.backfills.topic is 'the topic';
comment on column fanout.backfills.consumer_group is 'whose queue gets the rows; NULL: all of the topic';
comment on column fanout.backfills."where" is 'condition on the row; NULL: all rows';
comment on column fanout.backfills.since is 'of a replay: messages from then on';
comment on column fanout.backfills.until is 'of a replay: and up to then';
comment on column fanout.backfills.rate is 'rows per second at most; NULL: what the broker takes';
comment on column fanout.backfills.state is
'waiting: for the worker; running; paused; done: all was sent; failed: see error, fanout.resume_backfill() goes on; cancelled';
comment on column fanout.backfills.rows_done is 'rows looked at; of recover_dead, messages moved';
comment on column fanout.backfills.rows_estimated is 'rows the table had, by ANALYZE; of recover_dead, messages there were when it began; NULL: not known';
comment on column fanout.backfills.rows_sent is 'messages written to the outbox; of recover_dead, to the queue';
comment on column fanout.backfills.last_key is 'up to which it is done, of a replay the sequence; NULL: at the beginning, or walked by pages';
comment on column fanout.backfills.error is 'why it failed, or what holds it up';
comment on column fanout.backfills.created_at is 'when it was declared';
comment on column fanout.backfills.started_at is 'when it wrote its first rows; NULL: not yet';
comment on column fanout.backfills.updated_at is 'when it last went on';
comment on column fanout.backfills.finished_at is 'when it ended; NULL: it has not';
revoke all on fanout.backfills from public;

create view fanout.sync_comparisons as
select c.run, s.topic, s.consumer_group, fanout.target_table(t) as target, c.repair,
       case when c.error is not null then 'refused'
            when c.finished_at is null then 'running'
            when c.failure is not null then 'failed'
            when c.ranges <> c.ranges_sent then 'incomplete'
            when c.missing + c.different + c.extra > 0 then 'different'
            else 'equal' end as state,
       c.compared, c.left_out, c.missing, c.different, c.extra, c.mended, coalesce(c.error, c.failure) as error,
       c.started_at, c.updated_at, c.finished_at
from fanout.sync_comparison c join fanout.subscription s using (subscription_id) join fanout.sync_target t using (subscription_id);
comment on view fanout.sync_comparisons is 'comparisons of this database''s copies with their sources: the ten latest of each, made by fanout.compare() at the source';
comment on column fanout.sync_comparisons.run is 'what fanout.compare() returned at the source';
comment on column fanout.sync_comparisons.topic is 'the topic';
comment on column fanout.sync_comparisons.consumer_group is 'the consumer group';
comment on column fanout.sync_comparisons.target is 'the copy';
comment on column fanout.sync_comparisons.repair is 'is it to mend what differs?';
comment on column fanout.sync_comparisons.state is
'running; equal; different: see the counts; incomplete: messages of the run were lost, or wait to be tried again; refused: the tables cannot be compared, see error; failed: the source has ended it, see error';
comment on column fanout.sync_comparisons.compared is 'rows of the copy or the source that were compared';
comment on column fanout.sync_comparisons.left_out is 'rows that were changed meanwhile, or have messages that wait';
comment on column fanout.sync_comparisons.missing is 'rows that the source has and the copy has not';
comment on column fanout.sync_comparisons.different is 'rows that both have, with other values';
comment on column fanout.sync_comparisons.extra is 'rows that the copy has and the source has not';
comment on column fanout.sync_comparisons.mended is 'of these, how many were mended';
comment on column fanout.sync_comparisons.error is 'why the tables cannot be compared, or why the source has ended the comparison';
comment on column fanout.sync_comparisons.started_at is 'when its first message was handled';
comment on column fanout.sync_comparisons.updated_at is 'when its latest message was handled';
comment on column fanout.sync_comparisons.finished_at is 'when its last message was handled; NULL: not yet';
revoke all on fanout.sync_comparisons from public;

create view fanout.sync_differences as
select d.run, s.topic, s.consumer_group, fanout.target_table(t) as target, d.kind, d.key, d.columns, d.mended, d.found_at
from fanout.sync_difference d join fanout.subscription s using (subscription_id) join fanout.sync_target t using (subscription_id);
comment on view fanout.sync_differences is 'rows in which a copy differs from its source, the first 10,000 of each comparison; see fanout.sync_comparisons';
comment on column fanout.sync_differences.run is 'the comparison that found it';
comment on column fanout.sync_differences.topic is 'the topic';
comment on column fanout.sync_differences.consumer_group is 'the consumer group';
comment on column fanout.sync_differences.target is 'the copy';
comment on column fanout.sync_differences.kind is 'missing: the source has the row alone; different; extra: the copy has it alone';
comment on column fanout.sync_differences.key is 'of the row, by names of the copy''s columns';
comment on column fanout.sync_differences.columns is 'the copy''s columns that have another value';
comment on column fanout.sync_differences.mended is 'is it mended?';
comment on column fanout.sync_differences.found_at is 'when it was found';
revoke all on fanout.sync_differences from public;


-- ---------------------------------------------------------------------------
-- State that is this server's own
-- ---------------------------------------------------------------------------

create function fanout.guard() returns trigger
language c volatile
as 'MODULE_PATHNAME', 'pgf_guard';
comment on function fanout.guard() is
'internal: trigger on each table of pg_fanout. Passes over what logical replication writes; an argument names the column of an inserted row that must be the transaction which inserts it. Errors: 23514 if it is not, 55000 if logical replication truncates a table with rows';
revoke all on function fanout.guard() from public;

-- Always: workers of subscriptions run with session_replication_role = replica.
do $$
declare
    relation text;
    argument text;
begin
    for relation, argument in
        select c.relname, case when i.inhparent = 'fanout.outbox'::regclass then quote_literal('xid') else '' end
        from pg_class c left join pg_inherits i on i.inhrelid = c.oid
        where c.relnamespace = 'fanout'::regnamespace and c.relkind = 'r'
        order by c.relname
    loop
        execute format('create trigger pg_fanout_guard before insert or update or delete on fanout.%I'
                       ' for each row execute function fanout.guard(%s)', relation, argument);
        execute format('create trigger pg_fanout_guard_truncate before truncate on fanout.%I'
                       ' for each statement execute function fanout.guard()', relation);
        execute format('alter table fanout.%I enable always trigger pg_fanout_guard,'
                       ' enable always trigger pg_fanout_guard_truncate', relation);
    end loop;
end
$$;

-- A table without a row in pg_subscription_rel is neither copied nor written by
-- the workers of the subscription.  No command takes one out, and the server
-- puts it there again with each refresh.
create function fanout.leave_subscriptions() returns event_trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    delete from pg_subscription_rel s
    using pg_depend d, pg_extension e
    where e.extname = 'pg_fanout' and d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid
      and d.deptype = 'e' and d.classid = 'pg_class'::regclass and d.objid = s.srrelid;
    if found then
        raise notice 'the tables of pg_fanout are not replicated'
            using detail = 'They are published, but what they say is true of one server only, so they were taken out of the subscription.';
    end if;
end
$$;
comment on function fanout.leave_subscriptions() is
'internal: takes the tables of pg_fanout out of subscriptions as soon as these are made or refreshed';
revoke all on function fanout.leave_subscriptions() from public;

create event trigger pg_fanout_leave_subscriptions on ddl_command_end
when tag in ('CREATE SUBSCRIPTION', 'ALTER SUBSCRIPTION')
execute function fanout.leave_subscriptions();
alter event trigger pg_fanout_leave_subscriptions enable always;
comment on event trigger pg_fanout_leave_subscriptions is
'pg_fanout: keeps logical replication away from the tables of pg_fanout';

-- Looks at the schema as it is after the command (so it must be volatile): it
-- can get its name back if it was renamed while event triggers were off.
create function fanout.keep_schema() returns event_trigger
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    if exists (select from pg_event_trigger_ddl_commands() c
               join pg_namespace n on c.classid = 'pg_namespace'::regclass and n.oid = c.objid
               join pg_depend d on d.classid = c.classid and d.objid = c.objid and d.deptype = 'e'
               join pg_extension e on d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid
               where e.extname = 'pg_fanout' and n.nspname <> 'fanout')
    then
        raise exception 'cannot rename schema fanout'
            using errcode = 'feature_not_supported',
                  detail = 'pg_fanout finds its tables and functions by the name of their schema.';
    end if;
end
$$;
comment on function fanout.keep_schema() is 'internal: refuses to rename the schema fanout. Errors: 0A000';
revoke all on function fanout.keep_schema() from public;

create event trigger pg_fanout_keep_schema on ddl_command_end
when tag in ('ALTER SCHEMA')
execute function fanout.keep_schema();
alter event trigger pg_fanout_keep_schema enable always;
comment on event trigger pg_fanout_keep_schema is 'pg_fanout: refuses to rename the schema fanout';

-- The inbox grows in one segment, and the one behind it is empty: that is how
-- the place is found again.
create function fanout.repair_rotations() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    filled boolean[] := array[exists (select from fanout.inbox_0), exists (select from fanout.inbox_1),
                              exists (select from fanout.inbox_2), exists (select from fanout.inbox_3)];
begin
    if (select count(*) from fanout.rotation) <> 1 then
        delete from fanout.rotation;
        insert into fanout.rotation values (0, clock_timestamp());
    end if;
    if (select count(*) from fanout.inbox_rotation) <> 1 then
        delete from fanout.inbox_rotation;
        insert into fanout.inbox_rotation
        select coalesce(min(i), 0), clock_timestamp() from generate_series(0, 3) i
        where filled[i + 1] and not filled[(i + 1) % 4 + 1];
    end if;
end
$$;
comment on function fanout.repair_rotations() is 'internal: part of fanout.repair_ledger()';
revoke all on function fanout.repair_rotations() from public;

-- Rows of a transaction that this server has not reached would be passed over
-- until it does.  They get this one.  Ids go on behind those that are there,
-- since a second message of an id would be taken for the first.
create function fanout.adopt_rows() returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    adopted bigint;
    last_id bigint := (select max(id) from (select id from fanout.outbox union all select id from fanout.held
                                            union all select id from fanout.dead_letter where consumer_group is null) ids);
begin
    update fanout.outbox set xid = pg_current_xact_id()
    where xid >= pg_snapshot_xmax(pg_current_snapshot()) and xid <> pg_current_xact_id();
    get diagnostics adopted = row_count;
    if last_id > (select s.last_value from fanout.outbox_id_seq s) then
        perform setval('fanout.outbox_id_seq', last_id);
    end if;
    return adopted;
end
$$;
comment on function fanout.adopt_rows() is
'internal: part of fanout.repair_ledger(); how many rows of the outbox were not of this server';
revoke all on function fanout.adopt_rows() from public;

-- All transactions before "first" have ended.  What they wrote counts as sent,
-- and what later ones wrote, or are about to write, does not.
create function fanout.repair_ledger(since timestamptz) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    adopted bigint;
    first xid8;
    passed bigint;
begin
    perform fanout.repair_rotations();
    adopted := fanout.adopt_rows();
    first := least(pg_snapshot_xmin(pg_current_snapshot()),
                   (select o.xid from fanout.outbox o
                    where repair_ledger.since is null or o.created_at >= repair_ledger.since
                    order by o.xid limit 1));
    truncate fanout.sent, fanout.scattered, fanout.purged;
    delete from fanout.counted;
    insert into fanout.sent (segment, base, target, last_id, count)
    select r.current, base, base, 0, 0
    from fanout.rotation r, (select format('%1$s:%1$s:', first)::pg_snapshot) b(base);

    -- what is published from the outbox is not to be sent, or made a dead letter, twice
    delete from fanout.held h using fanout.outbox o where o.id = h.id and o.xid >= first;
    delete from fanout.dead_letter d using fanout.outbox o
    where d.consumer_group is null and o.id = d.id and o.xid >= first;

    select count(*) into passed from fanout.outbox o where o.xid < first;
    raise notice 'it is not known which messages were sent'
        using detail = format('All that are in the outbox%s will be published, those that were given up or purged, too. A repeated message has the same message id.',
                              case when repair_ledger.since is not null then ' since then' else '' end);
    if adopted > 0 then
        raise notice '% of them were not written by this server', adopted
            using detail = 'They go to the topic that has the same number here, if there is one.';
    end if;
    if passed > 0 then
        raise notice '% older messages count as sent', passed;
    end if;
end
$$;
comment on function fanout.repair_ledger(timestamptz) is
'internal: part of fanout.activate(); forgets what was sent';
revoke all on function fanout.repair_ledger(timestamptz) from public;

-- What came with the files of another database, and not by what was written here.
create function fanout.forget_copied_messages() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    forgotten bigint;
    waiting bigint;
begin
    select count(*) into forgotten
    from fanout.outbox_status s
         left join fanout.outbox o on o.id = s.id and o.database = (fanout.this_database()).database
    where s.state in ('pending', 'held') and o.id is null;
    delete from fanout.outbox o where o.database <> (fanout.this_database()).database;
    delete from fanout.held;
    if forgotten > 0 then
        raise notice '% messages that came with the copy are forgotten', forgotten
            using detail = 'The original has them, too, and publishes them.',
                  hint = 'If it is gone, roll back, and use publish_copied => true.';
    end if;
    -- acked by the original, which has taken them out of queues that are its own
    delete from fanout.waiting;
    get diagnostics waiting = row_count;
    if waiting > 0 then
        raise notice '% deliveries that waited when the copy was made are forgotten', waiting
            using detail = 'They wait in the original, too, and are applied there.',
                  hint = 'If it is gone, roll back, and use publish_copied => true.';
    end if;
end
$$;
comment on function fanout.forget_copied_messages() is 'internal: part of fanout.activate()';
revoke all on function fanout.forget_copied_messages() from public;

create function fanout.end_copied_backfills() returns void
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    update fanout.backfill b set state = 'failed', error = 'the database is a copy', finished_at = clock_timestamp()
    where b.state in ('running', 'paused')
$$;
comment on function fanout.end_copied_backfills() is 'internal: part of fanout.activate(); the original goes on with its backfills';
revoke all on function fanout.end_copied_backfills() from public;

create function fanout.activate(publish_copied boolean default false, since timestamptz default null) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    reason text;
    waiting bigint;
begin
    perform fanout.stop_workers();
    lock table fanout.identity, fanout.sent in access exclusive mode;
    reason := coalesce(fanout.copy_problem(), fanout.ledger_problem());
    if reason is not null then
        if fanout.copy_problem() is not null then
            -- tables that were here before a dump was restored have a row of this database
            if exists (select from fanout.identity)
               and not exists (select from fanout.identity i, fanout.this_database() d
                               where i.system_identifier = d.system_identifier and i.database = d.database)
               and not coalesce(activate.publish_copied, false)
            then
                perform fanout.forget_copied_messages();
            end if;
            perform fanout.own_identity();
            perform fanout.end_copied_backfills();
        end if;
        if fanout.ledger_problem() is not null then
            perform fanout.repair_ledger(activate.since);
        end if;
    end if;
    select count(*) into waiting from fanout.outbox_status s where s.state in ('pending', 'held');
    return format('%s; %s messages will be published', coalesce(reason, 'it was active already'), waiting);
end
$$;
comment on function fanout.activate(boolean, timestamptz) is
'makes a copy of a database publish and consume, as a database of its own, or one whose ledger is empty or not of this server. publish_copied: of a database made from a template, also publish messages that its original had not sent when it was copied, and apply those that waited in its waiting room (the original is gone); since: if it is not known what was sent, publish only what was created since then (NULL: all that is still in the outbox, with the same message ids). Stops the workers of the database until the transaction ends. Returns what was wrong and how many messages will be published. Changes nothing if nothing is wrong. Errors: 55006 if the workers do not stop';
revoke all on function fanout.activate(boolean, timestamptz) from public;


-- ---------------------------------------------------------------------------
-- Everything that is declared, as SQL
-- ---------------------------------------------------------------------------

create function fanout.option(name text, value text, usual text) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select case when value is distinct from usual and value is not null
                then format(', %I => %L', option.name, option.value) else '' end
$$;
comment on function fanout.option(text, text, text) is
'internal: an argument of a call; nothing if it has its usual value';
revoke all on function fanout.option(text, text, text) from public;

create function fanout.declared_topics() returns setof text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select format('select fanout.declare_topic(%L%s%s);', t.topic,
                  fanout.option('format', t.format, 'debezium'),
                  fanout.option('on_exhausted', t.on_exhausted, 'hold'))
    from (select * from fanout.topic where not dropping order by topic) t
    union all
    select format('select fanout.declare_binding(%L, %L%s%s%s);', b.topic, b.consumer_group,
                  fanout.option('queue_type', b.queue_type, 'quorum'),
                  fanout.option('arguments', b.arguments::text, '{}'),
                  fanout.option('dead_letter', b.dead_letter::text, 'false'))
    from (select t.topic, b.* from fanout.binding b join fanout.topic t using (topic_id)
          where not t.dropping and b.drop_if_unused is null order by t.topic, b.consumer_group) b
    union all
    select format('select fanout.pause(%L);', t.topic)
    from (select * from fanout.topic where paused and not dropping order by topic) t
$$;
comment on function fanout.declared_topics() is 'internal: part of fanout.declarations()';
revoke all on function fanout.declared_topics() from public;

create function fanout.declared_captures() returns setof text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select format('select fanout.capture(%L, %L%s%s%s%s%s%s%s);', fanout.qualified_name(c.entity), c.topic,
                  fanout.option('operations', c.operations::text, '{delete,insert,truncate,update}'),
                  fanout.option('columns', c.columns::text, null),
                  fanout.option('exclude', c.exclude::text, null),
                  fanout.option('key', fanout.captured_columns(c.entity, o.name, 'key', o.arguments)::text, null),
                  fanout.option('where', c."where", null),
                  fanout.option('when', c."when", null),
                  fanout.option('old_row', c.old_row::text, 'false'))
    from (select * from fanout.captures order by fanout.qualified_name(entity), topic) c
         join lateral fanout.captures_of(c.entity) o on o.topic = c.topic
    union all
    select format('alter table %s %s trigger %I;', fanout.qualified_name(l.entity),
                  case l.tgenabled when 'A' then 'enable always' when 'R' then 'enable replica' else 'disable' end, l.name)
    from (select l.*, t.tgenabled from fanout.capture_trigger_list l join pg_trigger t on t.oid = l.trigger
          where t.tgenabled <> 'O' and not l.idle order by fanout.qualified_name(l.entity), l.name) l
$$;
comment on function fanout.declared_captures() is 'internal: part of fanout.declarations()';
revoke all on function fanout.declared_captures() from public;

-- As the role that subscribed, since it is the one that calls.
create function fanout.declared_topic_grants() returns setof text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select format('select fanout.grant_topic(%L, %L, %L%s);', g.topic, quote_ident(r.rolname), array[g.what]::text,
                  fanout.option('consumer_group', g.consumer_group, null))
    from fanout.topic_grant g left join fanout.topic_grant_bound b on b.grant_id = g.grant_id
         join pg_roles r on case when b.role is not null then r.oid = b.role else r.rolname = g.role end
    order by r.rolname, g.topic, g.consumer_group, g.what
$$;
comment on function fanout.declared_topic_grants() is 'internal: part of fanout.declarations()';
revoke all on function fanout.declared_topic_grants() from public;

create function fanout.declared_subscriptions() returns setof text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select command
    from fanout.subscription s left join fanout.sync_target t using (subscription_id),
         lateral (select fanout.subscriber(s)) r(role), lateral unnest(array[
        format('set role %s;', r.role),
        case when t.subscription_id is null
             then format('select fanout.subscribe(%L, %L, %L%s%s%s%s%s', s.topic, s.consumer_group,
                         s.handler || case when s.batch then '(fanout.message[])' else '(fanout.message)' end,
                         fanout.option('prefetch', s.prefetch::text, '100'),
                         fanout.option('ordered', s.ordered::text, 'true'),
                         fanout.option('on_failure', s.on_failure, 'wait'),
                         fanout.option('wait_for', s.wait_for::text, '{23503}'),
                         fanout.option('max_wait', s.max_wait::text, interval '1 h'::text))
             else format('select fanout.sync_table(%L, %L, %L%s%s%s%s%s', s.topic, s.consumer_group,
                         coalesce(fanout.qualified_name(fanout.target_table(t)), t.target),
                         fanout.option('key', fanout.sync_key_columns(s.subscription_id)::text, null),
                         fanout.option('columns', fanout.sync_mapping(s.subscription_id)::text, null),
                         fanout.option('source', case when t.source_table is not null
                                                      then format('%I.%I', t.source_schema, t.source_table) end, null),
                         fanout.option('unknown_columns', t.unknown_columns, 'ignore'),
                         fanout.option('prefetch', s.prefetch::text, '1000')) end
        || format('%s%s%s%s%s);',
                  fanout.option('start_at', s.start_at, null),
                  fanout.option('max_attempts', s.max_attempts::text, '10'),
                  fanout.option('retry_delay', s.retry_delay::text, interval '1 s'::text),
                  fanout.option('max_retry_delay', s.max_retry_delay::text, interval '5 min'::text),
                  fanout.option('handler_timeout', s.handler_timeout::text, interval '30 s'::text)),
        case when s.paused then format('select fanout.pause(%L, %L);', s.topic, s.consumer_group) end,
        'reset role;']) with ordinality c(command, place)
    where s.active and command is not null and r.role is not null
    order by s.topic, s.consumer_group, c.place
$$;
comment on function fanout.declared_subscriptions() is 'internal: part of fanout.declarations()';
revoke all on function fanout.declared_subscriptions() from public;

-- All rights on objects of the extension, as they are and as they were when it
-- was created.
create function fanout.rights() returns table (object text, owner oid, now aclitem[], at_first aclitem[])
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    with object(classid, objid, subid, text, owner, acl, usual) as (
        select 'pg_namespace'::regclass, n.oid, 0, format('schema %I', n.nspname), n.nspowner, n.nspacl, acldefault('n', n.nspowner)
        from pg_namespace n
        union all
        select 'pg_proc'::regclass, p.oid, 0, format('function %s', p.oid::regprocedure), p.proowner, p.proacl, acldefault('f', p.proowner)
        from pg_proc p
        union all
        select 'pg_type'::regclass, t.oid, 0, format('type %s', t.oid::regtype), t.typowner, t.typacl, acldefault('T', t.typowner)
        from pg_type t
        union all
        select 'pg_class'::regclass, c.oid, 0, format('%s %s', case c.relkind when 'S' then 'sequence' else 'table' end, c.oid::regclass),
               c.relowner, c.relacl, acldefault(case c.relkind when 'S' then 's' else 'r' end::"char", c.relowner)
        from pg_class c
        union all
        select 'pg_class'::regclass, c.oid, a.attnum, format('(%I) on table %s', a.attname, c.oid::regclass),
               c.relowner, a.attacl, null
        from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    )
    select o.text, o.owner, coalesce(o.acl, o.usual), coalesce(i.initprivs, o.usual)
    from object o
         join pg_depend d on d.classid = o.classid and d.objid = o.objid and d.deptype = 'e'
                         and d.refclassid = 'pg_extension'::regclass
         join pg_extension e on e.oid = d.refobjid and e.extname = 'pg_fanout'
         left join pg_init_privs i on i.classoid = o.classid and i.objoid = o.objid and i.objsubid = o.subid
$$;
comment on function fanout.rights() is 'internal: part of fanout.declarations()';
revoke all on function fanout.rights() from public;

create function fanout.declared_grants() returns setof text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    with granted as (
        select r.object, a.grantee, a.privilege_type, a.is_grantable
        from fanout.rights() r, aclexplode(r.now) a where a.grantee <> r.owner
    ), initial as (
        select r.object, a.grantee, a.privilege_type, a.is_grantable
        from fanout.rights() r, aclexplode(r.at_first) a where a.grantee <> r.owner
    ), change(place, command, preposition, object, grantee, privilege_type, ending) as (
        select 1, 'revoke', 'from', object, grantee, privilege_type, ''
        from (select object, grantee, privilege_type from initial
              except select object, grantee, privilege_type from granted) i
        union all
        select 2, 'grant', 'to', object, grantee, privilege_type, case when is_grantable then ' with grant option' else '' end
        from (table granted except table initial) g
    )
    select format('%s %s%s%s %s %s%s;', c.command, lower(c.privilege_type),
                  case when c.object like '(%' then ' ' else ' on ' end, c.object, c.preposition,
                  case when c.grantee = 0 then 'public' else c.grantee::regrole::text end, c.ending)
    from change c
    order by c.place, c.object, c.grantee::regrole::text, c.privilege_type
$$;
comment on function fanout.declared_grants() is 'internal: part of fanout.declarations()';
revoke all on function fanout.declared_grants() from public;

create function fanout.declarations() returns setof text
language sql stable security definer
set search_path = pg_catalog, pg_temp set datestyle = 'ISO' set intervalstyle = 'postgres'
as $$
    select 'create extension if not exists pg_fanout;'
    union all
    select fanout.declared_topics()
    union all
    select fanout.declared_captures()
    union all
    select fanout.declared_grants()
    union all
    select fanout.declared_topic_grants()
    union all
    select fanout.declared_subscriptions()
$$;
comment on function fanout.declarations() is
'everything that is declared in this database, as SQL for migrations and tests: topics, bindings, pauses, captures, grants on the objects of the extension, subscriptions; one command a row. Run in a database that has the same tables, functions and roles, it declares the same; run again, it changes nothing. Conditions of captures are as they were given, to be run with the search_path that they were given with; one that names a column which was renamed since fails. Subscriptions are declared as the roles that subscribed';
revoke all on function fanout.declarations() from public;


-- ---------------------------------------------------------------------------
-- When nothing arrives
-- ---------------------------------------------------------------------------

create function fanout.check_server() returns table (item text, ok boolean, detail text, hint text)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    p fanout.stat_publisher;
    verified boolean := false;
    installed text := (select extversion from pg_extension where extname = 'pg_fanout');
    problem text := fanout.passive_reason();
begin
    if fanout.preloaded() and problem is null then
        verified := fanout.verify('5 s');
    end if;
    select * into p from fanout.stat_publisher;

    item := 'library preloaded';
    ok := fanout.preloaded();
    detail := 'shared_preload_libraries = ' || current_setting('shared_preload_libraries');
    hint := case when not ok then 'Add pg_fanout to shared_preload_libraries and restart the server.' end;
    return next;

    item := 'versions match';
    ok := fanout.library_version() = installed;
    detail := format('library %s, extension %s', fanout.library_version(), installed);
    hint := case when not ok then 'Restart the server, then ALTER EXTENSION pg_fanout UPDATE.' end;
    return next;

    item := 'publisher running';
    ok := p.pid is not null;
    detail := coalesce('pid ' || p.pid, p.last_error, 'no publisher was started');
    hint := case when not ok then 'Look into the server log; raise max_worker_processes or pg_fanout.max_databases if it says so.' end;
    return next;

    item := 'database active';
    ok := problem is null;
    detail := coalesce(problem, 'it publishes and consumes');
    hint := case when problem = 'pg_fanout.enabled is off' then 'Set pg_fanout.enabled to on.'
                 when not ok then 'Nothing is published or consumed until fanout.activate() is used.' end;
    return next;

    item := 'broker connected';
    ok := p.connected_to is not null;
    detail := case when ok then format('%s, since %s', p.connected_to, p.connected_at)
                   else coalesce(p.last_error, 'not connected') end;
    hint := case when problem is not null and not ok then 'It connects once the database is active.'
                 when not ok then 'Check pg_fanout.uri, pg_fanout.password_file and the tls settings; they are applied by reload.' end;
    return next;

    item := 'broker accepts messages';
    ok := p.state is distinct from 'blocked' and p.connected_to is not null;
    detail := coalesce('publisher is ' || p.state, 'no publisher');
    hint := case when p.state = 'blocked' then 'A memory or disk alarm of the broker; it goes on by itself.' end;
    return next;

    item := 'topology verified';
    ok := verified;
    detail := case when ok then 'declared again just now'
                   when problem is not null then 'the database is passive'
                   else 'the publisher did not answer within 5 seconds' end;
    hint := case when not ok then 'What follows is what the broker said last.' end;
    return next;
end
$$;
comment on function fanout.check_server() is 'internal: part of fanout.check()';
revoke all on function fanout.check_server() from public;

create function fanout.check_topology() returns table (item text, ok boolean, detail text, hint text)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select format('exchange "%s"', t.topic), t.state = 'declared', coalesce(t.last_error, t.state),
           case t.state when 'pending' then 'The publisher has not declared it yet.'
                        when 'error' then 'Remove what stands in the way on the broker, or the lack of rights; it is tried again by itself.' end
    from fanout.topics t
    union all
    select format('queue "%s"', b.queue), b.state = 'declared', coalesce(b.last_error, b.state),
           case b.state when 'pending' then 'The publisher has not declared it yet.'
                        when 'error' then 'Remove what stands in the way on the broker, or the lack of rights; it is tried again by itself.' end
    from fanout.bindings b
    union all
    select format('dead letters of queue "%s"', b.queue), coalesce(b.dead_letters, 0) = 0,
           coalesce(b.dead_letters::text, 'not known yet'),
           case when b.dead_letters > 0 then 'Once what they failed for is mended, use fanout.recover_dead().' end
    from fanout.bindings b
    where b.dead_letter
    union all
    select format('topic "%s" has a consumer group', t.topic), false, 'nothing is bound to it',
           'Its messages are held until a queue is bound; use fanout.declare_binding().'
    from fanout.topics t
    where not exists (select from fanout.bindings b where b.topic = t.topic)
      and not exists (select from fanout.subscriptions s where s.topic = t.topic)
$$;
comment on function fanout.check_topology() is 'internal: part of fanout.check()';
revoke all on function fanout.check_topology() from public;

create function fanout.check_flow() returns table (item text, ok boolean, detail text, hint text)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select format('topic "%s" flows', s.topic),
           not s.paused and s.stalled_since is null,
           case when s.paused then format('paused, %s messages held', s.held)
                when s.stalled_since is not null then format('stalled since %s: %s', s.stalled_since, s.reason)
                else format('%s pending, %s held', s.pending, s.held) end,
           case when s.paused then 'Use fanout.resume().'
                when s.stalled_since is not null then format('It is tried again at %s, or at once with fanout.resume().', s.retry_at) end
    from fanout.stat_topics s
    union all
    select format('topic "%s" has no dead letters', s.topic), false, format('%s in fanout.dead_letter', s.dead),
           'Look at their "reason", then use fanout.redrive() or fanout.purge().'
    from fanout.stat_topics s where s.dead > 0
    union all
    select format('dropped topic "%s" has no dead letters', d.topic), false, format('%s in fanout.dead_letter', d.count),
           'Declare it again and use fanout.redrive(), or use fanout.purge().'
    from fanout.counts() d
    where d.topic_id = 0 and d.consumer_group = '' and not exists (select from fanout.topic t where t.topic = d.topic)
$$;
comment on function fanout.check_flow() is 'internal: part of fanout.check()';
revoke all on function fanout.check_flow() from public;

-- What is wrong with a capture, the worst first.
create function fanout.capture_problems(entity oid, topic text)
returns table (severity integer, detail text, hint text)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select 1, 'the topic does not exist; the first write to the table will declare it', 'Declare the topic, or use fanout.uncapture().'
    where not exists (select from fanout.topic t where t.topic = capture_problems.topic and not t.dropping)
    union all
    select 2, 'a condition fails for some rows, and with it writes to the table: ' || p,
           'Use fanout.capture() with another condition and replace => true.'
    from fanout.capture_trigger_list l, fanout.condition_problem(l.trigger) p
    where l.entity = capture_problems.entity and l.topic = capture_problems.topic and p is not null
    union all
    select 3, 'not everybody may execute fanout.count_change(): writes to the table fail for some',
           'Use GRANT EXECUTE ON FUNCTION fanout.count_change() TO PUBLIC.'
    where not has_function_privilege('public', 'fanout.count_change()', 'execute')
    union all
    select 4, format('column "%s" of its key is gone', c.name),
           'Use fanout.capture() with another key and replace => true.'
    from fanout.capture_trigger_list l join fanout.captured_column c on c.entity = l.entity and c.trigger = l.name
    where l.entity = capture_problems.entity and l.topic = capture_problems.topic and c.option = 'key'
      and not exists (select from pg_attribute a where a.attrelid = c.entity and a.attnum = c.attnum
                      and a.attnum > 0 and not a.attisdropped)
    union all
    select 5, format('the numbers of the columns in "%s" are not recorded', o.option),
           'Event triggers were off when the capture was made. Use fanout.capture() with replace => true.'
    from unnest(array['columns', 'exclude', 'key']) o(option)
    where exists (select from fanout.capture_trigger_list l
                  where l.entity = capture_problems.entity and l.topic = capture_problems.topic and not l.idle
                    and fanout.trigger_option(l.args, o.option) not in ('', '{}')
                    and not exists (select from fanout.captured_column c
                                    where c.entity = l.entity and c.trigger = l.name and c.option = o.option))
    union all
    select 6, 'a trigger is missing, disabled, or fires for replicas only',
           'Use ALTER TABLE ... ENABLE TRIGGER, also for partitions, or fanout.capture() with replace => true.'
    from fanout.captures c
    where c.entity = capture_problems.entity and c.topic = capture_problems.topic and not c.enabled
    union all
    select 7, 'an excluded column belongs to its primary key, so that its messages have no key',
           'Name other columns in "key", with replace => true.'
    from fanout.captures c
    where c.entity = capture_problems.entity and c.topic = capture_problems.topic
      and c.key is null and fanout.default_key(c.entity, null) is not null
    union all
    select 8, format('another table is called %s now, as this one was when it was captured', c.entity_name),
           'If it took the place of this one, capture it; else use fanout.capture() with replace => true.'
    from fanout.capture c
    where c.entity = capture_problems.entity and c.topic = capture_problems.topic
      and to_regclass(c.entity_name) <> c.entity
    union all
    select 9, 'its messages have no key, and no order among themselves',
           'Give the table a primary key, or name columns in "key".'
    from fanout.captures c
    where c.entity = capture_problems.entity and c.topic = capture_problems.topic
      and c.key is null and fanout.default_key(c.entity, null) is null and c.operations <> '{truncate}'
    union all
    select 10, 'a trigger does not count changes: where statements run inside others, messages may be out of order',
           'Use fanout.capture() with replace => true.'
    from fanout.capture_trigger_list l
    where l.entity = capture_problems.entity and l.topic = capture_problems.topic and not l.idle
      and not exists (select from pg_depend d where d.classid = 'pg_trigger'::regclass and d.objid = l.trigger
                                                and d.refobjid = 'fanout.count_change()'::regprocedure)
$$;
comment on function fanout.capture_problems(oid, text) is 'internal: part of fanout.check()';
revoke all on function fanout.capture_problems(oid, text) from public;

create function fanout.check_captures() returns table (item text, ok boolean, detail text, hint text)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select format('capture of %s into "%s"', c.entity, c.topic), p.severity is null,
           coalesce(p.detail, array_to_string(c.operations, ', ')), p.hint
    from fanout.captures c
         left join lateral (select * from fanout.capture_problems(c.entity, c.topic) order by severity limit 1) p on true
    union all
    select format('capture of %s into "%s"', c.entity_name, c.topic), false,
           'a captured table was dropped, and this one has its name, but is not captured',
           'Use fanout.capture(), or fanout.uncapture() if that is right.'
    from fanout.capture c
    where to_regclass(c.entity_name) is not null and not exists (select from pg_class r where r.oid = c.entity)
    union all
    select format('capture of %s into "%s"', l.entity::regclass, l.topic), false,
           'only triggers that do nothing are left',
           'Use fanout.uncapture(), or fanout.capture() with replace => true.'
    from fanout.capture_trigger_list l
    group by l.entity, l.topic having bool_and(l.idle)
$$;
comment on function fanout.check_captures() is 'internal: part of fanout.check()';
revoke all on function fanout.check_captures() from public;

-- However many messages wait, it looks at a thousand that failed; a bitmap scan would
-- look for all.
create function fanout.check_subscriptions() returns table (item text, ok boolean, detail text, hint text)
language sql stable
set search_path = pg_catalog, pg_temp set enable_bitmapscan = off set enable_seqscan = off set jit = off
as $$
    with worker as materialized (
        select * from fanout.stat_subscriptions
    )
    select format('subscription of "%s" to "%s"', s.consumer_group, s.topic),
           s.pid is not null and s.connected_to is not null and s.state <> 'refused',
           case when s.state = 'paused' then 'paused'
                when s.pid is null or s.connected_to is null or s.state = 'refused'
                then format('%s: %s', s.state, coalesce(s.last_error, 'no worker was started'))
                else format('pid %s, %s', s.pid, s.state) end,
           case when s.state = 'passive' then 'See "database active".'
                when s.state = 'paused' then 'Use fanout.resume() with its consumer group.'
                when s.state = 'refused' then 'Put right what last_error says; it is tried again by itself.'
                when s.pid is null then 'Look into the server log; raise max_worker_processes or pg_fanout.max_subscriptions if it says so.'
                when s.connected_to is null then 'It connects as the publisher does; see above.' end
    from worker s
    union all
    select format('subscription of "%s" to "%s" has a topic', s.consumer_group, s.topic), false,
           'its queue did not exist and was declared, and nothing has come from it since the worker''s first start',
           'Is the name of the topic right?'
    from fanout.subscription s join worker w using (topic, consumer_group)
    where s.active and s.queue_declared and w.delivered = 0
      and not exists (select from fanout.topics t where t.topic = s.topic)
    union all
    select format('subscription of "%s" to "%s" succeeds', s.consumer_group, s.topic), false,
           format('%s messages failed and will be tried again', case when f.count > 1000 then 'more than 1000' else f.count::text end),
           'Look at "error" in fanout.delivery_failure.'
    from fanout.subscription s,
         lateral (select count(*)
                  from ((select 1 from fanout.waiting w
                         where w.subscription_id = s.subscription_id and w.error is not null
                           and w.next_try is not null and not w.requeued limit 1001)
                        union all
                        (select 1 from fanout.waiting w
                         where w.subscription_id = s.subscription_id and w.error is not null
                           and w.requeued and s.on_failure = 'requeue' limit 1001)) w) f
    where f.count > 0
    union all
    select format('subscription of "%s" to "%s" gets newer messages', s.consumer_group, s.topic), false,
           format('%s changes were older than what had been applied, and not written', s.stale),
           'Repeats are older, and harmless. If rows stay as they are, the sequence of the source went back: unsubscribe, and sync_table() into a new table.'
    from worker s where s.stale > s.skipped
    union all
    select format('subscription of "%s" to "%s" has missed nothing', s.consumer_group, s.topic), false,
           format('up to %s messages had been removed from the stream before they were read', s.missed),
           'Let the stream keep more (x-max-age, x-max-length-bytes). alter_subscription() with start_at begins anew.'
    from fanout.subscriptions s where s.missed > 0
    union all
    select format('subscription of "%s" to "%s" has no dead letters', d.consumer_group, d.topic), false,
           format('%s in fanout.dead_letter', d.count),
           'Look at their "reason", then use fanout.redrive() or fanout.purge().'
    from fanout.counts() d where d.consumer_group <> ''
$$;
comment on function fanout.check_subscriptions() is 'internal: part of fanout.check()';
revoke all on function fanout.check_subscriptions() from public;

create function fanout.check_guards() returns table (item text, ok boolean, detail text, hint text)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select format('triggers of %s', c.oid::regclass), false,
           format('not enabled always: %s', string_agg(quote_ident(t.tgname), ', ' order by t.tgname)),
           format('Use ALTER TABLE %s %s.', c.oid::regclass,
                  string_agg(format('ENABLE ALWAYS TRIGGER %I', t.tgname), ', ' order by t.tgname))
    from pg_trigger t join pg_class c on c.oid = t.tgrelid
    where t.tgfoid in ('fanout.guard()'::regprocedure, 'fanout.topology_changed()'::regprocedure,
                       'fanout.identity_changed()'::regprocedure,
                       'fanout.subscriptions_changed()'::regprocedure, 'fanout.forget_subscriptions()'::regprocedure,
                       'fanout.tally_change()'::regprocedure)
      and t.tgenabled <> 'A'
    group by c.oid
    union all
    select format('event trigger %I', e.evtname), false, 'not enabled always',
           format('Use ALTER EVENT TRIGGER %I ENABLE ALWAYS.', e.evtname)
    from pg_event_trigger e join pg_proc p on p.oid = e.evtfoid
    where p.pronamespace = 'fanout'::regnamespace and e.evtenabled <> 'A'
    union all
    select format('subscription %I leaves pg_fanout alone', s.subname), false,
           format('%s tables of pg_fanout are in it', count(*)),
           'Enable event triggers, then use ALTER SUBSCRIPTION ... REFRESH PUBLICATION.'
    from pg_subscription_rel r
         join pg_class c on c.oid = r.srrelid and c.relnamespace = 'fanout'::regnamespace
         join pg_subscription s on s.oid = r.srsubid
    group by s.subname
$$;
comment on function fanout.check_guards() is 'internal: part of fanout.check()';
revoke all on function fanout.check_guards() from public;

-- A segment is due half a retention after the last rotation; what is not sent by
-- then is told of by check_flow().
create function fanout.check_ring(segment regclass, rotated_at timestamptz, retention text)
returns table (item text, ok boolean, detail text, hint text)
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    select format('%s is emptied', segment), false,
           format('due since %s, but %s uses it, in a transaction that began at %s',
                  rotated_at + r.retention, coalesce('process ' || l.pid, 'a prepared transaction'),
                  coalesce(a.xact_start, x.prepared)),
           'It can be emptied when that transaction has ended; until then its successor grows.'
    from (select setting::int * interval '1 s' from pg_settings where name = check_ring.retention) r(retention),
         pg_class c join pg_locks l on l.relation in (c.oid, c.reltoastrelid) and l.granted
                                   and l.database = (select oid from pg_database where datname = current_database())
         left join pg_stat_activity a using (pid)
         left join pg_locks v on l.pid is null and v.virtualtransaction = l.virtualtransaction and v.locktype = 'transactionid'
         left join pg_prepared_xacts x on x.transaction = v.transactionid
    where c.oid = segment and pg_relation_size(segment) > 0
      and rotated_at + r.retention < clock_timestamp()
      and l.pid is distinct from pg_backend_pid() and coalesce(a.backend_type, '') not like E'pg\\_fanout%'
    order by coalesce(a.xact_start, x.prepared) limit 1
$$;
comment on function fanout.check_ring(regclass, timestamptz, text) is 'internal: part of fanout.check()';
revoke all on function fanout.check_ring(regclass, timestamptz, text) from public;

create function fanout.check_rings() returns table (item text, ok boolean, detail text, hint text)
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    select c.* from fanout.rotation r,
                    fanout.check_ring(format('fanout.outbox_%s', (r.current + 1) % 3)::regclass, r.rotated_at, 'pg_fanout.retention') c
    union all
    select c.* from fanout.inbox_rotation r,
                    fanout.check_ring(format('fanout.inbox_%s', (r.current + 1) % 4)::regclass, r.rotated_at, 'pg_fanout.inbox_retention') c
$$;
comment on function fanout.check_rings() is 'internal: part of fanout.check()';
revoke all on function fanout.check_rings() from public;

create function fanout.check_settings() returns table (item text, ok boolean, detail text, hint text)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select 'setting ' || s.name, not s.pending_restart,
           case when s.name = 'pg_fanout.uri' then 'set' else s.setting end,
           'It takes effect with the next restart of the server.'
    from pg_settings s
    where s.name like E'pg\\_fanout.%' and s.pending_restart
    union all
    select 'room for workers', free.n >= 0,
           format('max_worker_processes = %s', current_setting('max_worker_processes')),
           case when free.n < 0 then 'Raise max_worker_processes: one for the launcher, one for each database with the extension, one for each subscription.' end
    from (select current_setting('max_worker_processes')::int - 2
                 - (select count(*)::int from pg_stat_activity where backend_type like E'pg\\_fanout%') as n) free
    union all
    select 'rights of role ' || quote_ident(r.role), true,
           coalesce('may execute ' || string_agg(p.proname, ', ' order by p.proname), 'may execute nothing'), null
    from (select session_user::text as role) r
         left join pg_proc p on p.pronamespace = 'fanout'::regnamespace
                            and p.proname in ('declare_topic', 'declare_binding', 'capture', 'publish', 'flush', 'redrive', 'purge', 'subscribe')
                            and has_function_privilege(r.role::name, p.oid, 'execute')
    group by r.role
$$;
comment on function fanout.check_settings() is 'internal: part of fanout.check()';
revoke all on function fanout.check_settings() from public;

create function fanout.check() returns table (item text, ok boolean, detail text, hint text)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    -- one after the other: the first makes the publisher renew what the others read
    return query select * from fanout.check_server();
    return query select * from fanout.check_topology();
    return query select * from fanout.check_flow();
    return query select * from fanout.check_captures();
    return query select * from fanout.check_subscriptions();
    return query select * from fanout.check_guards();
    return query select * from fanout.check_rings();
    return query select * from fanout.check_settings();
end
$$;
comment on function fanout.check() is
'for when nothing arrives: one row per thing checked. ok: false is a problem; detail: what was found; hint: what to do, NULL if nothing. Makes the publisher declare all topology again, and waits up to 5 seconds for it';
revoke all on function fanout.check() from public;


-- What monitoring needs, and no message's content.
grant usage on schema fanout to pg_monitor;
grant select on fanout.topics, fanout.bindings, fanout.captures, fanout.stat_publisher, fanout.stat_topics,
    fanout.subscriptions, fanout.stat_subscriptions to pg_monitor;
grant execute on function fanout.passive_reason(), fanout.publisher_status(), fanout.backlog(), fanout.counts(), fanout.subscription_status(), fanout.subscription_problem(fanout.subscription),
    fanout.subscription_handler(fanout.subscription), fanout.handler_problem(fanout.subscription), fanout.queue_problem(fanout.subscription),
    fanout.subscriber(fanout.subscription), fanout.handler_owner(fanout.subscription), fanout.target_table(fanout.sync_target),
    fanout.sync_problem(integer), fanout.sync_mapping(integer), fanout.sync_key_columns(integer), fanout.preloaded(), fanout.library_version(),
    fanout.trigger_arguments(oid), fanout.trigger_option(text[], text), fanout.column_list(text), fanout.trigger_condition(oid),
    fanout.captured_columns(oid, text, text, text[]), fanout.default_key(oid, text[]), fanout.index_columns(oid) to pg_monitor;
grant execute on function fanout.check() to pg_monitor;


-- ---------------------------------------------------------------------------
-- Installing without the preload is no error, but not what is wanted
-- ---------------------------------------------------------------------------

do $$
begin
    if not fanout.preloaded() then
        raise warning 'pg_fanout is not in shared_preload_libraries'
            using detail = 'Changes are captured and kept, but nothing publishes them.',
                  hint = 'Add it to shared_preload_libraries and restart the server.';
    end if;
end
$$;
