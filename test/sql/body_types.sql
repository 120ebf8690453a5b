-- a row in a message is, byte for byte, what row_to_json() makes of it under fixed settings, without casts to json, but for arrays that are their text
set client_min_messages = warning;
create extension if not exists pg_fanout;
reset client_min_messages;
\set SHOW_CONTEXT never
create schema body_types;
set search_path = body_types;

-- A table with a column of every kind of type, and rows with their edge values.
-- Values are the same under any DateStyle and TimeZone: dates are in ISO form.

create type mood as enum ('sad', 'ok', 'it''s "great" \o/', 'ünïcödé');
-- enums with a cast to json, which nobody may run while a row is rendered
create type color as enum ('red', 'green');
create function color_to_json(color) returns json
    language plpgsql
    as $$ begin raise 'a cast to json was run'; end $$;
create cast (color as json) with function color_to_json(color);
-- types of somebody's own with output functions of the server's
-- servers differ in how they say that a type is only a shell yet
set client_min_messages = warning;
create type clock;
create function clock_in(cstring) returns clock language internal immutable strict as 'interval_in';
create function clock_out(clock) returns cstring language internal immutable strict as 'interval_out';
create type clock (input = clock_in, output = clock_out, internallength = 16, alignment = double);
create type named;
create function named_in(cstring) returns named language internal stable strict as 'regclassin';
create function named_out(named) returns cstring language internal stable strict as 'regclassout';
create type named (input = named_in, output = named_out, like = oid);
create type amount;
create function amount_in(cstring) returns amount language internal immutable strict as 'cash_in';
create function amount_out(amount) returns cstring language internal immutable strict as 'cash_out';
create type amount (input = amount_in, output = amount_out, like = money);
reset client_min_messages;

create domain positive as int4 check (value > 0);
create domain doubly as positive;
create domain label as varchar(20);
create domain day as date;
create domain moodly as mood;
create domain ints as int4[];
create domain colorly as color;

create type "inner" as (a int, "b ""x""" text, c numeric[], d timestamptz);
create type "outer" as (i "inner", m mood, n "inner"[], j json, k color);
create domain innerly as "inner";
create type nothing as ();
create type floatrange as range (subtype = float8);
create type moneyrange as range (subtype = money);
create type everything as (t timestamptz, m money, b bytea, f float4, i interval, r regtype, o regclass, y clock, n named, a amount, mr moneyrange, fr floatrange[]);
create type everythings as range (subtype = everything);

create table alltypes (
    id          int primary key,
    b           bool,
    i2          int2,
    i4          int4,
    i8          int8,
    f4          float4,
    f8          float8,
    n           numeric,
    n2          numeric(12, 3),
    t           text,
    vc          varchar(60),
    vc0         varchar,
    bp          char(6),
    ch          "char",
    na          name,
    u           uuid,
    d           date,
    ti          time,
    ttz         timetz,
    ts          timestamp,
    ts0         timestamp(0),
    tstz        timestamptz,
    iv          interval,
    ba          bytea,
    js          json,
    jb          jsonb,
    jp          jsonpath,
    o           oid,
    rc          regclass,
    rt          regtype,
    mo          money,
    bi          bit(5),
    vb          varbit,
    ip          inet,
    ci          cidr,
    mac         macaddr,
    mac8        macaddr8,
    po          point,
    li          line,
    ls          lseg,
    bo          box,
    pa          path,
    pg          polygon,
    cir         circle,
    tsv         tsvector,
    tsq         tsquery,
    lsn         pg_lsn,
    snap        pg_snapshot,
    x8          xid8,
    ti_d        tid,
    i4r         int4range,
    nr          numrange,
    tstzr       tstzrange,
    dr          daterange,
    fr          floatrange,
    i4mr        int4multirange,
    tstzmr      tstzmultirange,
    e           mood,
    ec          color,
    dom         positive,
    dom2        doubly,
    dlabel      label,
    dday        day,
    dmood       moodly,
    dints       ints,
    dcolor      colorly,
    i4a         int4[],
    ta          text[],
    f8a         float8[],
    ba_a        bool[],
    jsa         json[],
    jba         jsonb[],
    tstza       timestamptz[],
    ea          mood[],
    eca         color[],
    da          positive[],
    byta        bytea[],
    ca          "inner"[],
    iv2         int2vector,
    ov          oidvector,
    c           "inner",
    cc          "outer",
    dc          innerly,
    cn          nothing,
    mra         int4multirange[],
    rpr         regprocedure,
    rop         regoperator,
    rns         regnamespace,
    yc          clock,
    nd          named,
    am          amount,
    mor         moneyrange,
    ea_         everything,
    ea_r        everythings,
    moa         money[],
    ivb         interval[],
    rca         regclass[],
    "quo""ted \ column
é"              text,
    """"        int,
    g           int generated always as (i4 / 2) stored
);

-- what some values below name
create table copies ();

-- nothing but NULLs
insert into alltypes (id) values (1);

-- ordinary values
insert into alltypes values (
    2, true, 1, 2, 3, 1.5, 2.5, 10.50, 10.5, 'text', 'varchar', 'varchar', 'bp', 'c', 'name',
    'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '2024-02-29', '12:34:56.789', '12:34:56+05:30',
    '2024-02-29 12:34:56.789', '2024-02-29 12:34:56', '2024-02-29 12:34:56.789+00',
    '1 year 2 months -3 days 04:05:06.7', '\x00ff5c22', '{"a" : 1, "b":[1,2 ,"x\u00e9"] }',
    '{"b": [1, 2.50, null, "q\"\\\n"], "a": {}}', '$.a[*] ? (@ > 1)', 42, 'pg_class', 'int4', 1234.56,
    '10101', '110', '192.168.0.1/24', '10.0.0.0/8', '08:00:2b:01:02:03', '08:00:2b:01:02:03:04:05',
    '(1.5,2)', '{1,2,3}', '[(0,0),(1,1)]', '(2,2),(0,0)', '((0,0),(1,1),(2,0))', '((0,0),(1,1),(2,0))',
    '<(1,2),3>', 'a:1 ''fat cat'':2,3B "q"', 'fat & (rat | !cat:AB)', '16/B374D848', '10:20:10,14,15',
    '18446744073709551615', '(7,8)', '[1,5)', '[1.1,2.2]', '[2024-01-01 00:00+00,2024-02-01 00:00+00)',
    '[2024-01-01,infinity)', '[1e-5,1e300)', '{[1,3),[5,7)}', '{[2024-01-01 00:00+00,)}', 'ok', 'red',
    7, 8, 'label', '2024-02-29', 'ok', '{1,2}', 'green', '{1,2,3}', '{a,"b c","d\"e",NULL}', '{1.5,NaN,-Infinity}',
    '{t,f,NULL}', array['{"a": 1}', '"s"', null]::json[], array['{"a": 1}', '"s"', null]::jsonb[],
    '{2024-01-01 00:00+00,infinity,NULL}', array['sad', 'it''s "great" \o/', null]::mood[], '{red,NULL}', '{1,2}',
    array['\x00ff', '\x5c']::bytea[],
    array[row(1, 'x', '{1,NaN}', '2024-01-01 00:00+00'), null, row(null, null, null, null)]::"inner"[],
    '1 2 3', '1 2 3', row(1, e'x\ty', '{{1,2},{3,NULL}}', '2024-01-01 12:00+00'),
    row(row(1, 'x', '{}', null), 'sad', array[row(null, '"', null, 'infinity')]::"inner"[], '[1, {"k" : null}]', 'green'),
    row(1, 'x', '{}', null), row(), array['{[1,2)}', '{}']::int4multirange[],
    'clock_in(cstring)', 'pg_catalog.+(int,int)', 'body_types', '-1 day -2:00', 'copies', '-1000', '[-1234567.89,0.05]',
    row('2024-02-29 12:00+00', '-12.50', '\x00ff', 0.1::float4 + 0.2::float4, '1 mon -1 day', 'mood', 'pg_catalog.pg_class', '1 day -1:00', 'copies', '1', '[1,2]', '{"[0.1,0.30000000000000004)"}'),
    everythings(row('2024-02-29 12:00+00', '-12.50', '\x00ff', 0.1::float4 + 0.2::float4, '1 mon -1 day', 'mood', 'copies', '1 day -1:00', 'copies', '1', '[1,2]', '{"[0.1,0.30000000000000004)"}'), null),
    '{-0.01,999.99,1000,NULL}', '[0:1]={-1 day -2:00,1 mon -1 day}', '[-1:0]={copies,pg_catalog.pg_class}', 'quoted', 1);

-- largest, smallest, empty; every ASCII byte that needs an escape
insert into alltypes (
    id, b, i2, i4, i8, f4, f8, n, n2, t, vc, vc0, bp, ch, na, u, d, ti, ttz, ts, ts0, tstz, iv, ba, js, jb, o, mo, bi, vb, ip, ci,
    po, tsv, tsq, i4r, nr, tstzr, dr, fr, i4mr, tstzmr, e, ec, i4a, ta, f8a, jsa, ea, ca, c, cc, mra, "quo""ted \ column
é", """")
values
    (3, false, -32768, -2147483648, -9223372036854775808, '-Infinity', '-Infinity', '-Infinity', -999999999.999, '', '', '', '', '', '',
    '00000000-0000-0000-0000-000000000000', '-infinity', '00:00', '00:00+15:59', '-infinity', '-infinity', '-infinity',
    '-178000000 years', '', '1', '1', 0, '-92233720368547758.08', '00000', '', '::', '::/0',
    '(-Infinity,NaN)', '', null, 'empty', 'empty', 'empty', 'empty', 'empty', '{}', '{}', 'ünïcödé', 'green', '{}', '{}', '{}',
    '{}', '{}', '{}', row(null, null, null, null), row(null, null, null, null, null), '{}', '', 0),
    (4, null, 32767, 2147483647, 9223372036854775807, 'Infinity', 'Infinity', 'Infinity', 999999999.999,
    (select string_agg(chr(i), '' order by i) from generate_series(1, 300) i),
    e'"\\/\b\f\n\r\t\x01\x1f\x7f', repeat('€', 10), e'a\n"', '"', '"na\me"',
    'ffffffff-ffff-ffff-ffff-ffffffffffff', 'infinity', '24:00', '23:59:59.999999-15:59', 'infinity', 'infinity', 'infinity',
    '178000000 years -1 mons +1 day -00:00:00.000001', (select string_agg(set_byte('\x00', 0, i), '' order by i) from generate_series(0, 255) i),
    '"\u00e9\ud83d\ude00 \u0000"', '"\u00e9\ud83d\ude00"', 4294967295, '92233720368547758.07', '11111', repeat('10', 100)::varbit,
    'ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff', '255.255.255.255/32', '(1e308,-1e-308)', '''\\''''''"q'':1', '''"'' <-> ''\\''',
    '(,)', '(,)', '(,)', '(,)', '(,)', '{(,)}', '{(,)}', 'it''s "great" \o/', null,
    '[-1:1]={1,2,3}', '{{a,b},{"",NULL}}', '{{{1},{2}},{{3},{4}}}', array[array['1', '[]'], array[null, 'true']]::json[],
    '{{sad,ok},{ok,NULL}}', array[null, null]::"inner"[], row(-1, repeat('"', 10), null, '-infinity'), null, '{NULL}', e'"\n', -1),
    (5, null, -1, -1, -1, 'NaN', 'NaN', 'NaN', 'NaN', e'\t', ' ', ' ', '      ', 'z', repeat('x', 63),
    null, '4714-11-24 BC', '23:59:60', '00:00:00-00:00:01', '4714-11-24 00:00:00 BC', '294276-12-31 23:59:59', '4714-11-24 00:00:00+00 BC',
    '0', '\x00', 'null', 'null', 1, 0, '00001', '0', '1.2.3.4', '1.2.3.0/24',
    '(0,-0)', 'x', '!x', '[1,1]', '[0,0]', '[-infinity,infinity]', '[4714-11-24 BC,5874897-12-31)', '[NaN,NaN]', '{[1,1],[2,2],[5,5]}', '{}',
    'sad', 'red', '{NULL}', '{NULL,"NULL"," "}', '{-0,1e-320,1e308}', array[' 1 ', e'{\n"a":\t1}']::json[], null, null, null, null, null, null, 0);

-- floats of every magnitude, one digit and many
insert into alltypes (id, f4, f8, n)
select 100 + e + s * 50, (s * 1.2345678::float8 * 10.0::float8 ^ e)::float4, s * 1.2345678901234567::float8 * 10.0::float8 ^ (e * 10), s * 1.23450::numeric * 10::numeric ^ e
from generate_series(-25, 25) e, unnest(array[-1, 1]) s;
insert into alltypes (id, f4, f8, n, i2, i4, i8)
values
    (201, 0, 0, 0, 0, 0, 0), (202, '-0', '-0', '-0.000', 10, 10, 10), (203, 1e15, 1e15, 1e15, 99, 100000, 100000000000),
    (204, 1e16, 1e16, 1e-20, -10, -99999, 4294967296), (205, 1.17549435e-38, 4.9e-324, 1e300, 9999, 1000000000, -4294967297),
    (206, 3.4028235e38, 1.7976931348623157e308, repeat('9', 500)::numeric, 100, 999999999, 1000000000000000000);

-- values out of line, and compressed
insert into alltypes (id, t, vc0, ba, js, jb, n, ta, tsv, c)
select 300 + i, txt, txt, convert_to(txt, 'UTF8'), to_json(txt), jsonb_build_object('k', txt), repeat('1234567890', 200 * i)::numeric,
    array[txt, txt], to_tsvector('simple', left(txt, 2000)), row(1, txt, null, null)::"inner"
from (select i, case when i < 3 then repeat(e'a "b" \\ \n', 3000 * i) else (select string_agg(md5(g::text), e'\n"') from generate_series(1, 4000) g) end as txt
      from generate_series(1, 3) i) s;

-- columns that went and columns that came
insert into alltypes (id, ls, dlabel) values (400, '[(0,0),(1,1)]', 'before');
alter table alltypes drop column ls, drop column dlabel, drop column id cascade;
alter table alltypes add column id serial;
alter table alltypes add column added_text text default e'added "later"\n';
alter table alltypes add column added_null int;
alter table alltypes add column added_tstz timestamptz default '2024-07-01 00:00+00';
alter table alltypes add column added_numeric numeric default 'NaN';
insert into alltypes (added_null, added_text) values (1, null);
alter table alltypes add column added_last jsonb default '{"a": [1]}';

-- a captured table that gets all of these rows
select fanout.declare_topic('body_types', 'row');
alter table alltypes drop column g;
drop table copies;
create table copies as select * from alltypes limit 0;
alter table copies add column g int generated always as (i4 / 2) stored;
alter table copies add primary key (id);
select fanout.capture('copies', 'body_types');

-- what the messages are to have: made without the cast, and with the arrays that are their text as such
create function promises(out id int, out body text) returns setof record language plpgsql
    set datestyle = iso set intervalstyle = postgres set timezone = utc set extra_float_digits = 1 set bytea_output = hex
    set quote_all_identifiers = off set lc_monetary = 'C' set search_path = pg_catalog as $$
begin
    drop cast (body_types.color as json);
    create table body_types.promised as table body_types.copies;
    alter table body_types.promised alter iv2 type text, alter ov type text, alter jsa type text, alter jba type text,
        alter i4a type json using case when array_lower(i4a, 1) <> 1 then to_json(i4a::text) else to_json(i4a) end,
        alter ivb type json using case when array_lower(ivb, 1) <> 1 then to_json(ivb::text) else to_json(ivb) end,
        alter rca type json using case when array_lower(rca, 1) <> 1 then to_json(rca::text) else to_json(rca) end;
    return query select p.id, row_to_json(p)::text from body_types.promised p;
    drop table body_types.promised;
    create cast (body_types.color as json) with function body_types.color_to_json(body_types.color);
end $$;
-- differences between the messages and that, and how many were compared
create function differences(out compared bigint, out different bigint, out not_json bigint) language plpgsql as $$
begin
    delete from body_types.copies;
    create temp table mark as select coalesce(max(id), 0) as id from fanout.outbox;
    insert into body_types.copies select a.* from body_types.alltypes a;
    select count(*), count(*) filter (where m.payload is distinct from p.body), count(*) filter (where m.payload::json is null)
    into compared, different, not_json
    from body_types.promises() p
         left join (select o.key, o.payload from fanout.outbox o, mark
                    where o.id > mark.id and o.headers ->> 'table' = 'copies') m on m.key = p.id::text;
    drop table mark;
end $$;
select * from differences();
-- whatever the settings of the session
create table pg_class (id int);
set datestyle = 'SQL, DMY';
set intervalstyle = 'iso_8601';
set bytea_output = 'escape';
set extra_float_digits = -3;
set timezone = 'Asia/Kathmandu';
set search_path = body_types, pg_catalog;
set quote_all_identifiers = on;
set xmlbinary = 'hex';
set xmloption = 'document';
set array_nulls = off;
select * from differences();
set datestyle = 'German';
set intervalstyle = 'sql_standard';
set extra_float_digits = 0;
set timezone = 'America/St_Johns';
set search_path = '';
select * from body_types.differences();
set datestyle = 'ISO, YMD';
set intervalstyle = 'postgres_verbose';
set extra_float_digits = 3;
set timezone = '<+00>-00';
select * from body_types.differences();
-- and they are as they were
select name, setting from pg_settings where name in ('DateStyle', 'IntervalStyle', 'extra_float_digits', 'TimeZone', 'search_path', 'quote_all_identifiers', 'bytea_output') order by 1;
select now()::text ~ '\+00$' as utc, interval '1 day', 'pg_class'::regclass, '\x00'::bytea;
reset all;
\set SHOW_CONTEXT never
set search_path = body_types;
-- a row that cannot be rendered leaves the settings alone, too
set client_min_messages = warning;
create type broken;
create function broken_in(cstring) returns broken language internal immutable strict as 'int4in';
create function broken_out(broken) returns cstring language internal immutable strict as 'shell_out';
create type broken (input = broken_in, output = broken_out, like = int4);
reset client_min_messages;
create table breaks (id int primary key, r regclass, b broken[]);
select fanout.capture('breaks', 'body_types');
set datestyle = 'German';
set intervalstyle = 'iso_8601';
insert into breaks values (1, 'breaks', '{1}');
do $$
begin
    insert into breaks values (1, 'breaks', '{1}');
exception when others then
    raise notice '%: % % %', sqlerrm, date '2024-02-29', interval '1 day', current_setting('search_path');
end $$;
select date '2024-02-29', interval '1 day', current_setting('search_path');
reset datestyle;
reset intervalstyle;
-- deletes and updates render the same values
create table mark as select max(id) as id from fanout.outbox;
update copies set id = id;
select count(*) as compared, count(*) filter (where m.payload is distinct from p.body) as different
from promises() p left join (select o.key, o.payload from fanout.outbox o, mark where o.id > mark.id) m on m.key = p.id::text;
create table gone as select * from promises();
delete from copies;
select count(*) as compared, count(*) filter (where m.payload is distinct from g.body) as different
from gone g left join (select o.key, o.payload from fanout.outbox o where o.headers ->> 'op' = 'd' and o.headers ->> 'table' = 'copies'
                       and o.id > (select id from mark)) m on m.key = g.id::text;

-- some of it to see
create table sample (id int primary key, n numeric, f float8, ts timestamptz, d date, ba bytea, a int[][], j json, jb jsonb,
                     r int4range, c "inner", e mood, iv interval, t text, ch char(4));
select fanout.capture('sample', 'body_types');
set timezone = 'UTC';
insert into sample values
    (1, 'NaN', '-Infinity', 'infinity', '-infinity', '\x00ff', '{{1,2},{3,NULL}}', '{"a" :  1}', '{"a" :  1}', '[1,5)',
     row(1, 'x', '{1,NaN}', '2024-01-01 00:00+00'), 'ünïcödé', '1 day 02:03', e'\u0001\t"', 'x'),
    (2, 1.50, 0.1, '2024-02-29 12:34:56.789+00', '2024-02-29', '', '{}', 'null', '[]', 'empty', null, null, null, null, null);
select payload from fanout.outbox o join fanout.topic t using (topic_id)
where topic = 'body_types' and headers ->> 'table' = 'sample' order by o.id;

-- times of all years, at the ends of the ordinary ones and of the types, with all kinds of fractions; and texts of all lengths with what must be escaped anywhere
create table texts (id int primary key, d date, t timestamp, z timestamptz, s text, k varchar);
select fanout.capture('texts', 'body_types');
insert into texts
select i, day, day + time, (day + time) at time zone 'UTC', overlay(repeat('x', i % 40) placing e'"\\\n\u0001é' from 1 + i % 41 for i % 3),
       substr('abcdefghijklm', 1, i % 14) || chr(i % 126 + 1)
from generate_series(1, 5000) i,
     lateral (select date '0001-01-01' + (i * 7368787::bigint % 3652059)::int as day, i * 12342857017::bigint % 86400000000 as us,
                     case i % 4 when 0 then 1000000 when 1 then 1000 when 2 then 10 else 1 end as unit) t,
     lateral (select (us - us % unit) * interval '1 us' as time) f;
insert into texts (id, d, t, z)
select -row_number() over (), t::date, t, t at time zone 'UTC'
from unnest('{4714-11-24 00:00:00 BC,0001-12-31 23:59:59.999999 BC,0001-01-01,0001-01-01 00:00:00.000001,1999-12-31 23:59:59.999999,2000-01-01,2000-01-01 00:00:00.1,
              9999-12-31 23:59:59.999999,10000-01-01,294276-12-31 23:59:59.999999,infinity,-infinity}'::timestamp[]) t;
select count(*) as compared, count(*) filter (where o.payload is distinct from row_to_json(x)::text) as different
from texts x left join fanout.outbox o on o.key = x.id::text and o.headers ->> 'table' = 'texts';

set client_min_messages = warning;
drop schema body_types cascade;
