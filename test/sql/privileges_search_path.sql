-- traps in the search path of those who call, and of those who write
set client_min_messages = warning;
create extension if not exists pg_fanout;
drop role if exists fanout_trapper;
create role fanout_trapper;
\set SHOW_CONTEXT never
create schema traps authorization fanout_trapper;
set role fanout_trapper;
set search_path = traps;

-- everything that our SQL could mistake for the server's: functions, operators, types, tables
create function trap() returns void language plpgsql as $$ begin raise exception 'trapped as %', current_user; end $$;
do $$
declare
    f record;
begin
    -- with the very arguments, so that they would win
    for f in
        select p.oid, p.proname, pg_get_function_identity_arguments(p.oid) as args, format_type(p.prorettype, null) as result, p.proretset
        from pg_proc p
        where p.pronamespace = 'pg_catalog'::regnamespace and p.prokind = 'f'
          and p.proname in ('quote_ident', 'quote_literal', 'array_to_string', 'string_to_array', 'array_remove',
                            'array_replace', 'array_position', 'array_length', 'octet_length', 'convert_to', 'starts_with', 'md5',
                            'btrim', 'regexp_replace', 'jsonb_typeof', 'jsonb_array_elements_text',
                            'jsonb_path_exists', 'generate_series', 'now', 'clock_timestamp', 'current_setting', 'has_function_privilege',
                            'pg_visible_in_snapshot', 'pg_snapshot_xmax', 'pg_snapshot_xip', 'nextval')
          and pg_get_function_identity_arguments(p.oid) !~ 'VARIADIC|OUT '
        order by p.oid
    loop
        execute pg_catalog.format('create function traps.%I(%s) returns %s%s language plpgsql as %L', f.proname, f.args,
                       case when f.proretset then 'setof ' else '' end, f.result,
                       'begin perform traps.trap(); return' || case when f.proretset then '' else ' null' end || '; end');
    end loop;
    create function traps.format(text, text, text) returns text language sql as 'select traps.trap()::text';
    create function traps.format(text, text) returns text language sql as 'select traps.trap()::text';
end $$;
create function trap_oid(oid, oid) returns boolean language plpgsql as $$ begin perform traps.trap(); return true; end $$;
create function trap_int(int, int) returns boolean language plpgsql as $$ begin perform traps.trap(); return true; end $$;
create function trap_text(text, text) returns boolean language plpgsql as $$ begin perform traps.trap(); return true; end $$;
create function trap_concat(text, text) returns text language plpgsql as $$ begin perform traps.trap(); return ''; end $$;
create operator = (leftarg = text, rightarg = text, procedure = trap_text);
create operator <> (leftarg = text, rightarg = text, procedure = trap_text);
create operator ~ (leftarg = text, rightarg = text, procedure = trap_text);
create operator || (leftarg = text, rightarg = text, procedure = trap_concat);
create operator = (leftarg = oid, rightarg = oid, procedure = trap_oid);
create operator = (leftarg = integer, rightarg = integer, procedure = trap_int);
create table pg_class (oid oid, relname text);
create table pg_trigger (oid oid, tgname text);
create table pg_attribute (attrelid oid);
create table pg_extension (extname text, extversion text);
create table topic (topic_id int);
create domain text as pg_catalog.text check (false);
create domain regclass as pg_catalog.text check (false);
create domain name as pg_catalog.text check (false);
reset role;
select pg_catalog.count(*) operator(pg_catalog.>) 50 as many_traps
from pg_catalog.pg_proc where pronamespace operator(pg_catalog.=) 'traps'::pg_catalog.regnamespace;
-- the same in the session's own temporary schema, which is searched first if nobody says otherwise
create temp table pg_class (oid oid, relname pg_catalog.text);
create temp table pg_trigger (oid oid);
create temp table topic (topic_id int);
create domain pg_temp.text as pg_catalog.text check (false);

set search_path = traps, pg_catalog;
do $$ begin perform 'a'::pg_catalog.text = 'b'::pg_catalog.text; exception when others then raise warning 'the traps work: %', sqlerrm; end $$;

-- each function, called by a superuser
select fanout.declare_topic('search_path');
select fanout.declare_topic('search_path');
select fanout.declare_binding('search_path', 'g', 'classic', '{"x-max-length": 5}');
select fanout.declare_binding('search_path', 'g', 'classic', '{"x-max-length": 5}');
select fanout.declare_binding('search_path', 'g', 'quorum', '{"x-max-length": 6}');
select fanout.declare_bindings('{"search_path": "a, b", "search_path_2": ["a", "b"]}');
select fanout.declare_topic('amq.x');
select fanout.drop_binding('search_path', 'g');
select fanout.drop_topic('search_path');
create table public.search_path_entity (id int primary key, a pg_catalog.text, b pg_catalog.text);
select fanout.capture('public.search_path_entity', 'search_path', '{insert,update,delete,truncate}', columns => '{id,a}', key => '{id}', "when" => 'new.a operator(pg_catalog.=) ''x''', old_row => true);
select fanout.capture('public.search_path_entity', 'search_path', '{insert,update,delete,truncate}', columns => '{id,a}', key => '{id}', "when" => 'new.a operator(pg_catalog.=) ''x''', old_row => true);
select fanout.capture('public.search_path_entity', 'search_path', '{insert,update}', columns => '{id,b}');
insert into public.search_path_entity values (1, 'x'), (2, 'y');
alter table public.search_path_entity rename a to c;
alter table public.search_path_entity drop column id;
update public.search_path_entity set c = 'x';
select pg_catalog.count(*) from fanout.captures where topic operator(pg_catalog.=) 'search_path';
select fanout.publish('search_path', '{"a": 1}', 'k', 't', '{"h": 1}') is not null as published;
select fanout.pause('search_path');
select fanout.resume('search_path');
select fanout.redrive('search_path');
select fanout.purge('search_path');
select fanout.purge('search_path', held => true);
select fanout.flush('1 ms');
select pg_catalog.count(*) from fanout.topics where topic operator(pg_catalog.=) 'search_path';
select pg_catalog.count(*) from fanout.bindings where topic operator(pg_catalog.=) 'search_path';
do $$ begin
    for i in 1 .. 200 loop
        exit when (select pending operator(pg_catalog.=) 4 from fanout.stat_topics where topic operator(pg_catalog.=) 'search_path');
        perform pg_catalog.pg_sleep(0.05);
    end loop;
end $$;
select pending, held, dead from fanout.stat_topics where topic operator(pg_catalog.=) 'search_path';
select pg_catalog.count(*) from fanout.outbox_status where topic operator(pg_catalog.=) 'search_path';
select pg_catalog.count(*) from fanout.pending p where p.key operator(pg_catalog.=) 'k';
select pg_catalog.count(*) from fanout.check_topology() where item operator(pg_catalog.~) 'search_path';
select pg_catalog.count(*) from fanout.check_flow() where item operator(pg_catalog.~) 'search_path';
select pg_catalog.count(*) from fanout.check_captures() where item operator(pg_catalog.~) 'search_path';
select pg_catalog.count(*) from fanout.check_settings() where item operator(pg_catalog.=) 'room for workers';
select fanout.uncapture('public.search_path_entity');

reset search_path;
drop table public.search_path_entity;
drop schema traps cascade;
drop domain pg_temp.text;
drop role fanout_trapper;
