-- what a message says of a value is read back to the equal value, whatever the settings of the session that wrote it and of the one that reads it
set client_min_messages = warning;
create extension if not exists pg_fanout;
\set SHOW_CONTEXT never
create schema sync_types;
set search_path = sync_types;
select fanout.declare_topic('sync_types', 'row');

-- what a consumer does with the messages
create function feed() returns void language plpgsql as $$
declare
    m fanout.message;
begin
    for m in
        select o.message_id, 'sync_types', 'g', o.type, o.key, o.id, o.headers, null, convert_to(o.payload, 'UTF8'),
               o.created_at, false, 1, 'application/json'
        from fanout.outbox o join fanout.topic using (topic_id) where topic = 'sync_types' order by o.id
    loop
        begin
            perform fanout.sync_messages(array[m]);
        exception when others then
            raise warning 'key %: % %', m.key, sqlstate, sqlerrm;
        end;
    end loop;
end $$;
create function hostile() returns void language sql as $$
    select set_config(name, value, false)
    from (values ('datestyle', 'sql, dmy'), ('intervalstyle', 'sql_standard'), ('timezone', 'America/St_Johns'), ('extra_float_digits', '-15'),
                 ('bytea_output', 'escape'), ('quote_all_identifiers', 'on'), ('array_nulls', 'off'), ('xmloption', 'document'),
                 ('xmlbinary', 'hex'), ('search_path', 'sync_types, pg_catalog')) s(name, value);
$$;

-- a type of somebody's own, whose output function is one of the server's; and it has a cast to json
create type named;
create function named_in(cstring) returns named language internal strict stable as 'regclassin';
create function named_out(named) returns cstring language internal strict stable as 'regclassout';
create type named (input = named_in, output = named_out, like = regclass);
create function refuse(named) returns json language plpgsql as $$ begin raise 'a cast was run'; end $$;
create cast (named as json) with function refuse(named);

create type mood as enum ('sad', 'it''s "great" \o/');
create domain ints as int[] check (value <> '{13}');
create domain documents as jsonb[];
create type point_in_time as (at timestamptz, took interval, price money, raw bytea, kind mood);
create type deep as (p point_in_time, ps point_in_time[], d ints, j jsonb, js json[], n named, "a ""b""" text);
create domain deeply as deep check ((value).d is distinct from '{13}');
create type times as range (subtype = timestamp);
create type deeps as range (subtype = point_in_time);
create table pg_class (id int);     -- hides another where search_path says so
create table sources (
    id int primary key,
    -- settings
    tstz timestamptz, iv interval, ttz timetz, f8 float8, f4 float4, ba bytea, mo money, d date, p point, c circle, x xml,
    rc regclass, rp regprocedure, ro regoperator, rt regtype, rn regnamespace, na named,
    -- the same within others
    dr daterange, tr times, tzr tstzrange, dmr datemultirange, tstza timestamptz[], iva interval[], baa bytea[], moa money[], rca regclass[], naa named[], xa xml[], fa float8[],
    trs times[], ds deeps, dsa deeps[],
    -- bounds, dimensions and NULLs
    ia int[], ta text[], ja json[], jba jsonb[], iv2 int2vector, ov oidvector, da ints, daa ints[], doc documents, nulls text[], i2va int2vector[],
    -- composites
    pt point_in_time, pta point_in_time[], dp deep, dpa deep[], dl deeply, dla deeply[]);
create table copies (like sources including all);
select fanout.capture('sources', 'sync_types');
select fanout.sync_table('sync_types', 'g', 'copies');

create table rows (like sources);
insert into rows (id) values (1);
insert into rows values (2,
    '2024-02-03 04:05:06.789+00', '1 year -2 mons +3 days -04:05:06.7', '12:34:56+05:30', 0.1::float8 + 0.2::float8, 0.1::float4 + 0.2::float4, '\x00ff5c27', '-1234567.89', '2024-02-03', '(0.1,1e300)', '<(1,2),0.30000000000000004>',
    'a <b>c</b>', 'pg_catalog.pg_class', 'feed()', 'pg_catalog.=(int,int)', 'mood', 'sync_types', 'pg_catalog.pg_class',
    '[2024-02-01,2024-03-02)', '[2024-02-01,2024-03-02 01:02:03.4)', '[2024-02-01 10:00+00,)', '{[2024-02-01,2024-03-02),[2024-04-01,)}',
    '{2024-02-03 04:05:06.789+00,NULL,-infinity}', '{-1 day -2:00,1 mon -1 day}', array['\x00ff', '\x', null]::bytea[], '{1.5,-0.01,NULL}', '{pg_catalog.pg_class,sync_types.pg_class,NULL}', '{sync_types.copies}',
    array['<a/>', 'x']::xml[], '{0.30000000000000004,NaN,-Infinity,NULL}', array['[2024-02-01,2024-03-02)', 'empty']::times[],
    deeps(row('2024-02-03 04:05:06+00', '-1 day -2:00', '$1,000.00', '\x5c', 'sad'), row('2024-03-02 04:05:06+00', null, null, null, null), '[]'), null,
    '[0:1]={1,2}', '[-1:0][5:6]={{a,NULL},{"",NULL}}', array['{"a": null}', 'null', null, '"x"', '[1, 2]']::json[], array['{"a": null}', 'null', null, '"x"', '[1, 2]']::jsonb[],
    '1 2 3', '4 5', '{{1,2},{3,NULL}}', array['{1,2}', null, '[0:0]={5}']::ints[], array['null']::jsonb[], '{NULL,"NULL",null,"null"," "}', array['1 2', '', null]::int2vector[],
    row('2024-02-03 04:05:06.789+00', '-1 day -2:00', '-$0.05', '\x00ff', 'it''s "great" \o/'), null, null, null, null, null);
insert into rows (id, iv2, ov, ia, ja, da, daa, pta) values (3, '', '', '{}', '{}', '[2:2]={7}', '{}', '{}');
update rows set pta = array[pt, null, row(null, null, null, null, null)::point_in_time],
    dp = row(pt, array[pt, null], '[0:1]={1,2}', '"x"', array['null', '[]']::json[], 'copies', e'\t"\\') where id = 2;
update rows set dpa = array[array[dp, null], array[dp, row(null, null, null, null, null, null, null)::deep]], dl = dp, dla = array[dp, null]::deeply[], dsa = array[ds, 'empty'] where id = 2;
insert into rows select (json_populate_record(r, '{"id": 4}')).* from rows r where id = 2;
update rows set pta = null, dpa = ('[3:3]=' || array[dp]::text)::deep[], rca = '[0:0]={sync_types.pg_class}', moa = '[2:2]={-1234567.89}', ds = null,
    tstza = '[0:1]={2024-02-03 04:05:06.789+00,infinity}', iva = '[0:0]={-1 day -2:00}', naa = '[0:0]={sync_types.pg_class}', dsa = ('[0:0]=' || array[ds]::text)::deeps[] where id = 4;

-- the same bytes from every session
insert into sources select * from rows;
delete from sources;
select hostile();
insert into sync_types.sources select * from sync_types.rows;
reset all;
set client_min_messages = warning;
set search_path = sync_types;
create view messages as
    select o.id, o.key, o.headers ->> 'op' as op, o.payload from fanout.outbox o join fanout.topic using (topic_id) where topic = 'sync_types';
select key, count(*), count(distinct payload) from messages where op = 'c' group by key order by key;
create temp table texts as
    select m.key, e.key as name, e.value::text, e.n
    from (select distinct on (key) key, payload from messages where op = 'c') m, json_each(m.payload::json) with ordinality e(key, value, n);
\pset format unaligned
select t.key, t.name, t.value from texts t left join texts t2 on t.key = '4' and t2.key = '2' and t2.name = t.name
where t.value <> 'null' and t.value is distinct from t2.value order by t.key, t.n;

\pset format aligned
-- and the equal row from them, with nothing said of the settings of those who read
select hostile();
select sync_types.feed();
reset all;
set client_min_messages = warning;
set search_path = sync_types;
select id, a::text is not distinct from b::text as same_text, record_image_eq(a, b) as same from rows a full join copies b using (id) order by id;

-- what the table's triggers and the constraints of domains see is the session's search_path and, for triggers, its settings
create function is_even(int) returns boolean language sql return $1 % 2 = 0;
create function in_search_path(int) returns boolean language plpgsql as $$ begin return is_even($1); end $$;
create domain even as int check (in_search_path(value));
create function look() returns trigger language plpgsql as $$
begin
    new.seen := current_setting('datestyle') || '; ' || current_setting('search_path');
    return new;
end $$;
create table watched (id int primary key, e even, seen text);
create trigger look before insert on watched for each row execute function look();
select fanout.sync_table('watched', 'g', 'watched');
set datestyle = 'german';
set search_path = sync_types, pg_catalog;
select fanout.sync_messages(array[row(null, 'watched', 'g', null, '1', 1, '{"op": "c", "schema": "s", "table": "t", "format": "row"}', '{"id": 1, "e": 2}', '', null, false, 1, null)]::fanout.message[]);
select * from watched;
reset datestyle;
set search_path = sync_types;

-- a key of one column names its row where the body does not, whatever its type
create function follow(type text, first text, second text) returns table (changed text, gone boolean) language plpgsql as $$
declare
    t text := 'key_' || md5(type);
    k text[];
begin
    execute format('create table %I (k %s primary key, v int); create table %I (like %1$I including all)', t, type, t || '_copy');
    perform fanout.declare_topic(t, 'row');
    perform fanout.capture(t::regclass, t);
    perform fanout.sync_table(t, 'g', (t || '_copy')::regclass);
    execute format('insert into %1$I values (%2$L, 1); update %1$I set k = %3$L, v = 2', t, first, second);
    perform fanout.sync_messages(array[row(o.message_id, t, 'g', o.type, o.key, o.id, o.headers, null, convert_to(o.payload, 'UTF8'), o.created_at, false, 1, null)::fanout.message])
    from (select o.* from fanout.outbox o join fanout.topic using (topic_id) where topic = t order by o.id) o;
    select array_agg(o.key order by o.id) into k from fanout.outbox o join fanout.topic using (topic_id) where topic = t;
    execute format('select %L || string_agg(x::text, $1) from %I x', k::text || ' ', t || '_copy') using ' ' into changed;
    execute format('delete from %I', t);
    perform fanout.sync_messages(array[row(o.message_id, t, 'g', o.type, o.key, o.id, o.headers, null, convert_to(o.payload, 'UTF8'), o.created_at, false, 1, null)::fanout.message])
    from (select o.* from fanout.outbox o join fanout.topic using (topic_id) where topic = t order by o.id desc limit 1) o;
    execute format('select count(*) = 0 from %I', t || '_copy') into gone;
    return next;
end $$;
create type pair as (a int, b text);
select type, f.* from (values
    ('int', '1', '2'), ('text', '[1]', '"x"'), ('jsonb', '"x"', '{"a": 1}'), ('int[]', '{1,2}', '{3}'), ('int4[]', '[0:1]={1,2}', '[-1:-1]={3}'), ('text[]', '{"]={",":"}', '{}'), ('jsonb[]', '{}', '{"{}"}'),
    ('pair', '(1,x)', '(2,"")'), ('pair[]', '{"(1,x)"}', '[0:0]={"(1,x)"}'), ('timestamptz', '2024-01-01 00:00+00', 'infinity'), ('bytea', '\x00', '\x5c'), ('int4range', '[1,2)', 'empty'),
    ('ints', '{1}', '[0:0]={1}'), ('bool', 't', 'f'), ('float8', '0.1', 'NaN'), ('money', '-1.50', '1'), ('interval', '-1 day -2:00', '1 mon'), ('oidvector', '1 2', '')) v(type, first, second), follow(type, first, second) f;

-- a composite type may change while its values are captured
create type altered as (a int, b interval);
create table alters (id int primary key, c altered, ca altered[]);
select fanout.capture('alters', 'sync_types');
insert into alters values (1, '(1,1 day)', '{"(1,1 day)"}');
alter type altered add attribute c timestamptz;
update alters set id = 2;
alter type altered rename attribute a to "A";
alter type altered drop attribute b;
insert into alters values (3, '(1,2024-01-01 00:00+00)', '{"(1,2024-01-01 00:00+00)",NULL}');
update alters set id = 4 where id = 2;
select payload from messages where op <> 'd' and key::int < 5 and payload ~ '"ca"' order by id;

set client_min_messages = warning;
select count(fanout.unsubscribe(topic, consumer_group)) from fanout.subscriptions where topic ~ '^(sync_types|watched|key_)';
drop schema sync_types cascade;
