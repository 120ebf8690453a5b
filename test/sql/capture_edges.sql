-- what captures make of settings, names and commands that do not expect them
set client_min_messages = warning;
\set VERBOSITY terse
create schema capture_edges;
set search_path = capture_edges, fanout, public;
select fanout.declare_topic('capture_edges');
reset client_min_messages;
create view messages as
    select o.type, o.key, o.payload as body
    from fanout.outbox o join fanout.topic t using (topic_id) where t.topic = 'capture_edges' order by o.id;

-- a trigger made by hand that says what only row triggers can mean
create table by_hand (id int primary key);
create trigger by_hand after truncate on by_hand
for each statement execute function fanout.capture_trigger('capture_edges', 'sent_as', 'delete');
truncate by_hand;
create trigger by_hand_2 after insert on by_hand
for each row execute function fanout.capture_trigger('capture_edges', 'sent_as', 'delete');
insert into by_hand values (1);
drop table by_hand;

-- a table of another extension: dumps do not have its triggers
create table owned (id int primary key);
alter extension plpgsql add table owned;
\set VERBOSITY default
select fanout.capture('owned', 'capture_edges');
\set VERBOSITY terse
alter extension plpgsql drop table owned;
select fanout.capture('owned', 'capture_edges', replace => true);
drop table owned;

-- two triggers made by hand each keep their own columns
create table twice (id int primary key, a text, b text);
create trigger one after insert on twice
for each row execute function fanout.capture_trigger('capture_edges', 'exclude', '{a}');
create trigger two after insert on twice
for each row execute function fanout.capture_trigger('capture_edges', 'exclude', '{b}');
alter trigger two on twice rename to three;
alter table twice rename a to c;
insert into twice values (1, 'x', 'y');
select body::json -> 'after' as after from messages where type ~ 'twice';
drop table twice;

-- strings are read the old way
set standard_conforming_strings = off;
set escape_string_warning = off;
create table "back\\slash" (id int primary key, "a\\b" text);
select fanout.capture('"back\\\\slash"', 'capture_edges', exclude => array[E'a\\\\b']);
insert into "back\\slash" values (1, 'x');
drop table "back\\slash";
reset standard_conforming_strings;
reset escape_string_warning;
select body::json -> 'after' as after from messages where type ~ 'back';

-- a table in the schema of temporary tables does not take another one's place
create table shadowed (id int primary key, a int);
create temp table shadowed (id int primary key, a int);
select fanout.capture('capture_edges.shadowed', 'capture_edges', "where" => 'a > 1', "when" => 'new.a > 1 or old.a > 1');
select entity, operations from fanout.captures where topic = 'capture_edges';
drop table pg_temp.shadowed;
drop table shadowed;

-- types and domains of columns are altered by others
create domain positive as int check (value > 0);
create type pair as (a int, b int);
create table typed (id int primary key, p positive, q pair);
select fanout.capture('typed', 'capture_edges', key => '{id,p}', "when" => 'old is distinct from new');
alter domain positive add check (value < 1000);
alter type pair add attribute c json;
alter type pair drop attribute c;
-- the owner of the table is refused, also by way of a parent
create table parent (id int, p positive, q pair);
alter table typed inherit parent;
alter table parent add column bad json;
alter table typed no inherit parent;
drop table parent;
-- a rewrite is not stopped by a condition over a missing row
alter table typed add column added int default (random() * 10)::int;
alter table typed alter added type bigint;
-- but an own column in the key stays, also where a type takes it along
drop domain positive cascade;
select fanout.uncapture('typed');
drop table typed;

-- replaced as it was: for replicas, or not at all
create table states (id int primary key, a int);
select fanout.capture('states', 'capture_edges');
alter table states enable replica trigger pg_fanout_row_capture_edges, enable replica trigger pg_fanout_truncate_capture_edges;
select fanout.capture('states', 'capture_edges', "when" => 'true', replace => true);
select tgname, tgenabled from pg_trigger where tgrelid = 'states'::regclass order by 1;

-- conditions that no row of some operations can meet
select fanout.capture('states', 'capture_edges', "when" => 'old *<> new', replace => true);
select fanout.capture('states', 'capture_edges', "when" => '(old *= new) is not true', replace => true);
select fanout.capture('states', 'capture_edges', "when" => 'not (new.a > 1) and true', replace => true);
select fanout.capture('states', 'capture_edges', "when" => 'not (new.a > 1 and false) or new.a is null', replace => true);

-- conditions on the row look at nothing else
select fanout.capture('states', 'capture_edges', "where" => 'a > random()', replace => true);
select fanout.capture('states', 'capture_edges', "where" => 'a > random()', "when" => 'true', replace => true);
select fanout.capture('states', 'capture_edges', "where" => 'ctid is not null', "when" => 'true', replace => true);
select fanout.capture('states', 'capture_edges', "where" => 'nothing > 1', operations => '{truncate}', replace => true);
select fanout.capture('states', 'capture_edges', "where" => 'a in (select 1)', operations => '{truncate}', replace => true);

-- only the owner ends a capture
create role fanout_edges;
grant usage on schema capture_edges, fanout to fanout_edges;
grant execute on function fanout.uncapture to fanout_edges;
set role fanout_edges;
select fanout.uncapture('capture_edges.states');
reset role;
select count(*) from fanout.captures where topic = 'capture_edges';

-- a table that is one of the whole rows' parts is compared in many ways
create table compared (id int primary key, j json, p point, r int4range);
select c, fanout.capture('compared', 'capture_edges', '{update}', "when" => c, replace => true)
from unnest(array['old.r <> new.r', 'row(old.id, old.r) < row(new.id, new.r)', 'old *<> new']) c;
select fanout.capture('compared', 'capture_edges', '{update}', "when" => 'row(old.id, old) is distinct from row(new.id, new)', replace => true);
select fanout.capture('compared', 'capture_edges', '{update}', "when" => 'old = any (array[new])', replace => true);
select fanout.capture('compared', 'capture_edges', '{update}', "when" => 'record_eq(old, new)', replace => true);

-- A capture that a trigger replaces in the middle of a statement is the new one from then on.
-- No change is lost for that, and the last message of a key tells what the row is.
create table replaced (id int primary key, a text, secret text default 'SECRET');
select fanout.capture('replaced', 'capture_edges');
create function replace_capture() returns trigger language plpgsql as $$
begin
    if tg_argv[0] = 'where' then
        perform fanout.capture('replaced', 'capture_edges', exclude => '{secret}', "where" => 'id > 0', "when" => 'true', replace => true);
    else
        perform fanout.capture('replaced', 'capture_edges', columns => '{id,a}', replace => true);
    end if;
    update replaced set a = a || ' nested' where id in (1, 4);
    return null;
end $$;
create trigger a_replace after insert on replaced for each row when (new.id in (2, 3)) execute function replace_capture('where');
create trigger a_replace_again after update on replaced for each row when (new.id = 2 and new.a = 'updated') execute function replace_capture('no where');
begin;
insert into replaced select i, 'x' from generate_series(1, 4) i;
update replaced set a = 'updated';
delete from replaced where id = 1;
commit;
select type, key, body::json ->> 'op' as op, body::json ->> 'after' as after from messages where type ~ 'replaced';
drop table replaced;
drop function replace_capture();

set client_min_messages = warning;
drop schema capture_edges cascade;
drop owned by fanout_edges;
drop role fanout_edges;
delete from fanout.outbox o using fanout.topic t where t.topic_id = o.topic_id and t.topic = 'capture_edges';
