-- names of schemas, tables, columns, types, roles and topics that are anything but plain
set client_min_messages = warning;
create extension if not exists pg_fanout;
\set SHOW_CONTEXT never
create schema hostile_names;
set search_path = hostile_names;

-- each is, one after the other, the name of everything
create table names (n int primary key, name text);
insert into names values
    (1, 'a"b'), (2, 'a.b'), (3, '"; drop table names; --'), (4, '$$'), (5, '%s%n%I'), (6, ''' or true'), (7, E'\\'), (8, '{"a",NULL}'),
    (9, 'NULL'), (10, 'old'), (11, 'select'), (12, '😀 ünï ' || chr(8238) || ' e'), (13, repeat('x', 63)), (14, repeat('é', 31)), (15, ' '), (16, E'new\nline\ttab'),
    (17, '*/ --'), (18, ':x'), (19, 'pg_class');

create function everything(name text, body text) returns text language plpgsql as $$
declare
    tname text := 'hostile_names ' || regexp_replace(name, '[\n\t]', '', 'g');
    target text := format('%I.%I', 's' || left(name, 60), name);
    answer record;
begin
    perform fanout.declare_topic(tname, body);
    execute format('create schema %I', 's' || left(name, 60));
    execute format('create type %I.%I as (%I text)', 's' || left(name, 60), 't' || left(name, 60), name);
    execute format('create role %I', 'fanout ' || left(name, 50));
    execute format('create table %s (%I text primary key, %I int, c %I.%I)', target, name, 'second' || left(name, 50),
                   's' || left(name, 60), 't' || left(name, 60));
    execute format('grant all on schema %I to %I', 's' || left(name, 60), 'fanout ' || left(name, 50));
    execute format('alter table %s owner to %I', target, 'fanout ' || left(name, 50));
    perform fanout.capture(target::regclass, tname, '{insert,update,delete,truncate}', columns => array[name, 'c'], key => array[name],
                           "when" => format('old.%I is null or new.%I is null or old.%1$I <> new.%2$I', name, name), old_row => true);
    -- the same again is the same
    perform fanout.capture(target::regclass, tname, '{insert,update,delete,truncate}', columns => array[name, 'c'], key => array[name],
                           "when" => format('old.%I is null or new.%I is null or old.%1$I <> new.%2$I', name, name), old_row => true);
    execute format('set local role %I', 'fanout ' || left(name, 50));
    execute format('insert into %s values (%L, 1, row(%L))', target, name, name);
    execute format('update %s set %I = 1', target, 'second' || left(name, 50));
    -- the options follow
    execute format('alter table %s rename %I to %I', target, name, 'r' || left(name, 60));
    execute format('delete from %s', target);
    execute format('truncate %s', target);
    reset role;
    select c.entity = target::regclass, c.topic = tname, c.columns, c.key into answer from fanout.captures c where c.topic = tname;
    return answer::text;
end $$;
select n, everything(name, (array['debezium', 'row', 'cloudevents'])[1 + n % 3]) from names order by n;
-- what came of it: two changes and a truncate, under the very names; a header of another name would be a forged one
select n, count(*) as messages,
       bool_and(o.headers ->> 'schema' = 's' || left(name, 60) and o.headers ->> 'table' = name) as names,
       bool_and(o.key is not distinct from case when o.headers ->> 'op' <> 't' then name end) as key,
       bool_and(o.type = format('%s.%s.%s', 's' || left(name, 60), name, case o.headers ->> 'op' when 'c' then 'insert' when 'd' then 'delete' else 'truncate' end)) as type,
       bool_and(o.payload::json is not null) as json
from names join fanout.topic t on t.topic = 'hostile_names ' || regexp_replace(name, '[\n\t]', '', 'g') join fanout.outbox o using (topic_id)
group by n order by n;
select n, o.payload from names join fanout.topic t on t.topic = 'hostile_names ' || regexp_replace(name, '[\n\t]', '', 'g') join fanout.outbox o using (topic_id)
where t.format = 'row' and o.headers ->> 'op' = 'c' order by n;
-- CloudEvents wants a URI
select n, substring(o.payload::json ->> 'source' from '/[^/]*/[^/]*$') as source
from names join fanout.topic t on t.topic = 'hostile_names ' || regexp_replace(name, '[\n\t]', '', 'g') join fanout.outbox o using (topic_id)
where t.format = 'cloudevents' and o.headers ->> 'op' = 'c' order by n;
-- all of it is taken back
select sum(fanout.uncapture(c.entity)) from fanout.captures c where c.topic like 'hostile\_names%';
do $$ declare r record; begin
    for r in select * from names loop
        perform fanout.drop_topic('hostile_names ' || regexp_replace(r.name, '[\n\t]', '', 'g'));
        execute format('drop schema %I cascade', 's' || left(r.name, 60));
        execute format('drop role %I', 'fanout ' || left(r.name, 50));
    end loop;
end $$;

-- 255 bytes in UTF-8 and no more: of topics, consumer groups, and the two together
create function attempt(command text) returns text language plpgsql as $$
begin
    execute command;
    return 'ok';
exception when others then
    return sqlstate || ' ' || sqlerrm;
end $$;
select n, attempt(format('select fanout.declare_topic(%L)', t)) from (values
    (1, repeat('t', 255)), (2, repeat('t', 256)), (3, repeat('é', 127) || 't'), (4, repeat('é', 128)), (5, repeat('😀', 63) || 'ttt'), (6, repeat('😀', 64)),
    (7, repeat('t', 10000))) v(n, t);
select n, attempt(format('select fanout.declare_binding(%L, %L)', t, g)) from (values
    (1, 'hostile_names', repeat('g', 241)), (2, 'hostile_names', repeat('g', 242)), (3, 'hostile_names', repeat('é', 120) || 'g'), (4, 'hostile_names', repeat('é', 121)),
    (5, 'hostile_names', repeat('g', 255)), (6, 'hostile_names', repeat('g', 256)), (7, repeat('t', 255), 'g'), (8, 't', repeat('€', 84) || 'g')) v(n, t, g);
-- a capture into a topic with such a name: the trigger's name must fit 63 bytes, and two of them must differ
create table entity (id int primary key);
select fanout.declare_topic(repeat('é', 126) || 'a'), fanout.declare_topic(repeat('é', 126) || 'b');
select fanout.capture('entity', repeat('é', 126) || 'a'), fanout.capture('entity', repeat('é', 126) || 'b', "when" => 'true');
insert into entity values (1);
select count(*), count(distinct tgname), max(octet_length(tgname::text)) from pg_trigger where tgrelid = 'entity'::regclass;
select right(topic, 1) as topic, count(*) from fanout.outbox join fanout.topic using (topic_id) where topic like 'éééé%' group by 1 order by 1;

-- names of headers and of queue arguments; numbers that no double holds would make the broker close the connection
select fanout.declare_topic('hostile_names');
select n, attempt(format('select fanout.publish(''hostile_names'', ''1'', headers => %L)', h)) from (values
    (1, jsonb_build_object(repeat('h', 128), 1)), (2, jsonb_build_object(repeat('é', 64), 1)), (3, jsonb_build_object(repeat('é', 65), 1)), (4, jsonb_build_object('"%s"', '"%n"')),
    (5, '{"a": 1e308}'), (6, '{"a": -1.8e308}'), (7, '{"a": 1e400}'), (8, '{"a": 1e-400}'), (9, jsonb_build_object('a', repeat('9', 400)::numeric))) v(n, h);
select n, attempt(format('select fanout.declare_binding(''hostile_names'', ''a%s'', arguments => %L)', n, a)) from (values
    (1, '{"a": 1e308}'), (2, '{"a": -1.8e308}'), (3, '{"a": 1e400}'), (4, jsonb_build_object(repeat('é', 65), 1))) v(n, a);

drop schema hostile_names cascade;
do $$ declare b record; begin
    for b in select topic, consumer_group from fanout.bindings where topic ~ '^(hostile_names|t+)$' loop
        perform fanout.drop_binding(b.topic, b.consumer_group, false, false);
    end loop;
end $$;
