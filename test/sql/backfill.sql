-- What fanout.backfill() refuses, who may use it, and what it declares.
create extension pg_fanout;
-- so that numbers are the same each time
alter sequence fanout.backfill_backfill_id_seq restart;
select fanout.declare_binding('item', 'one');
create table items (id int primary key, a int, t text);
select fanout.capture('items', 'item');

-- bad input
select fanout.backfill(null, 'item');
select fanout.backfill('items', null);
select fanout.backfill('items', 'nosuch');
select fanout.backfill('items', 'item', 'nosuch');
select fanout.backfill('items', 'item', rate => 0);
select fanout.backfill('items', 'item', rate => -5);
select fanout.backfill('items', 'item', "where" => 'nosuch = 1');
select fanout.backfill('items', 'item', "where" => 'a');
select fanout.backfill('items', 'item', "where" => 'a = 1; drop table items');
select fanout.backfill('items', 'item', "where" => 'a = 1) or (a = 2');
select fanout.backfill('items', 'item', "where" => '');
select fanout.backfill('items', 'item', "where" => 'a in (select 1)');
select fanout.backfill('items', 'item', "where" => 'count(*) > 0');

-- tables
create table plain (id int primary key);
create view a_view as select * from plain;
create temp table temporary_items (id int primary key);
select fanout.capture('temporary_items', 'item');
create table parts (id int) partition by range (id);
create table parts_1 partition of parts for values from (0) to (10);
select fanout.capture('parts', 'item');
create table pages (id int);
select fanout.capture('pages', 'item', '{insert,delete}');
create table only_when (id int);
select fanout.capture('only_when', 'item', "when" => 'true');
create table filtered (id int primary key);
select fanout.capture('filtered', 'item', "where" => 'id > 0', "when" => 'true');
create table truncated (id int primary key);
select fanout.capture('truncated', 'item', '{truncate}');
create table disabled (id int primary key);
select fanout.capture('disabled', 'item');
alter table disabled disable trigger all;
select fanout.backfill('plain', 'item');
select fanout.backfill('a_view', 'item');
select fanout.backfill('temporary_items', 'item');
select fanout.backfill('parts', 'item');
select fanout.backfill('parts_1', 'item');
select fanout.backfill('pages', 'item');
select fanout.backfill('only_when', 'item');
select fanout.backfill('filtered', 'item');
select fanout.backfill('truncated', 'item');
select fanout.backfill('disabled', 'item');

-- what it walks by
create function walked_by(t regclass) returns text[] language sql as $$
    select array_agg(attname::text order by n) from unnest(fanout.walk_key(t, (select key from fanout.captures where entity = t))) with ordinality u(attnum, n)
    join pg_attribute a on attrelid = t and a.attnum = u.attnum $$;
create table keys (a int not null, b text not null, c text collate "C" not null, d int);
select fanout.capture('keys', 'item');
select walked_by('keys');
create unique index on keys (d);
select walked_by('keys');
create unique index on keys (b collate "C");
create unique index on keys (a desc);
create unique index on keys (b text_pattern_ops);
create unique index on keys (a) where a > 0;
create unique index on keys ((a + 1));
create index on keys (a);
select walked_by('keys');
create unique index on keys (b, a) include (d);
select walked_by('keys');
create unique index on keys (c);
select walked_by('keys');
alter table keys add primary key (a, c);
select walked_by('keys');
select fanout.capture('keys', 'item', key => '{b,a}', replace => true);
select walked_by('keys');

-- the condition means the same to the worker, whose search_path is another one
create schema elsewhere;
create function elsewhere.wanted(int) returns boolean language sql as 'select $1 > 0';
set search_path = elsewhere, public;
begin;
select fanout.backfill('items', 'item', 'one', "where" => 'wanted(a) and items.t ~~ ''x%'' -- and so on', rate => 5);
reset search_path;
select kind, entity, topic, consumer_group, "where", rate, state, rows_done, rows_sent, last_key, error, finished_at from fanout.backfills;
-- states
select fanout.pause_backfill(1), fanout.pause_backfill(1);
commit;
select fanout.backfill('items', 'item', 'one');
begin;
select fanout.resume_backfill(1);
select fanout.backfill('items', 'item');
rollback;
select fanout.cancel_backfill(1), fanout.cancel_backfill(1);
select fanout.pause_backfill(1);
select fanout.resume_backfill(1);
select fanout.cancel_backfill(99);
select fanout.cancel_backfill(null);
select id, state, finished_at is null from fanout.backfills order by id;

-- it is no declaration
select * from fanout.declarations() d where d ~ 'backfill';

-- rights
create role regress_reader;
create role regress_owner;
grant usage on schema fanout to regress_reader, regress_owner;
grant all on items to regress_reader;
set role regress_reader;
select fanout.backfill('items', 'item');
select fanout.cancel_backfill(2);
select * from fanout.backfills;
reset role;
grant execute on function fanout.backfill, fanout.cancel_backfill to regress_reader, regress_owner;
set role regress_reader;
select fanout.backfill('items', 'item', 'one');
reset role;
alter table items owner to regress_owner;
grant usage on schema elsewhere to regress_owner;
set role regress_owner;
begin;
select fanout.cancel_backfill(fanout.backfill('items', 'item', 'one'));
commit;
reset role;
alter table items enable row level security;
begin;
select fanout.cancel_backfill(fanout.backfill('items', 'item'));
commit;
alter table items force row level security;
select fanout.backfill('items', 'item') > 0;
begin read only;
select fanout.backfill('items', 'item');
rollback;

drop extension pg_fanout cascade;
drop table items, plain, parts, pages, only_when, filtered, truncated, disabled, keys cascade;
drop schema elsewhere cascade;
drop owned by regress_reader, regress_owner;
drop role regress_reader, regress_owner;
