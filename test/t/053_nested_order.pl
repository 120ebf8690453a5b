# Tests that of each key the message with the highest id is the row's last
# state, whatever programs of triggers change the tables inside each statement.
#
# A program is a random set of triggers on captured tables: before and after
# ours in order of names, BEFORE and AFTER, for each row and each statement,
# with transition tables, deferred; they run random statements of their own,
# some in subtransactions that are rolled back.  Random statements run in
# transactions, also in SQL functions, cursors and savepoints.  Then the
# messages of each key, in order of id, must be a chain of images, each
# beginning with what the one before ends with, the last one with the row as it
# is.  Of a table without a key, each image must be made before it is replaced.
#
# No broker is needed: what is judged is the outbox.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";
use PgFanout;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $seed = $ENV{PG_FANOUT_TEST_SEED} || int(rand(1_000_000));
my $programs = $ENV{PG_FANOUT_LONG} ? 4000 : 40;
note "seed $seed, $programs programs";

my $node = PgFanout::Node->new('main');
$node->init(allows_streaming => 'logical');
$node->append_conf('postgresql.conf', <<"END");
shared_preload_libraries = 'pg_fanout'
pg_fanout.uri = 'amqp://guest:guest\@127.0.0.1:1/'
fsync = off
autovacuum_naptime = 1h
client_min_messages = warning
max_stack_depth = 2MB
END
$node->start;

# What COPY reads.
my $rows = $node->basedir . '/rows';
append_to_file($rows, "3\tcopied\n9\tcopied\n15\tcopied\n");

$node->safe_psql('postgres', <<"END" . <<'END');
create schema model;
create function model.copied() returns text language sql as \$\$ select '$rows' \$\$;
END
create extension pg_fanout;
set search_path = model, public;
select fanout.declare_topic(t) from unnest('{t,o,moving,named,keyless}'::text[]) t;
create sequence stamp;
create sequence changes;

create function pick(low int, high int) returns int language sql volatile as $$ select low + floor(random() * (high - low + 1))::int $$;

-- One random statement on a few rows.
create function mutate() returns void language plpgsql as $$
declare
    k int := model.pick(1, 6);
    k2 int := model.pick(1, 6);
    r record;
begin
    -- some programs would go on for an hour
    if nextval('model.changes') > 2000 then return; end if;
    case model.pick(1, case when model.has_more() then 32 else 22 end)
    when 1 then insert into model.t (id, a) values (k, 'i') on conflict do nothing;
    when 2 then insert into model.t (id, a) values (k, 'i'), (k2 + 6, 'j') on conflict (id) do update set a = left(model.t.a, 20) || 'c';
    when 3 then update model.t set a = left(a, 20) || 'u' where id = k;
    when 4 then update model.t set a = left(a, 20) || 'm' where id between k and k + 3;
    when 5 then delete from model.t where id = k;
    when 6 then delete from model.t where id = k; insert into model.t (id, a) values (k, 'r');
    when 7 then update model.t set id = k2 where id = k;
    when 8 then update model.t set up = k2 where id = k and exists (select from model.t where id = k2);
    when 9 then with d as (delete from model.t where id = k returning *) insert into model.t (id, a) select k2 + 6, a from d on conflict do nothing;
    when 10 then insert into model.o values (k, 'i') on conflict (id) do update set a = left(model.o.a, 20) || 'c';
    when 11 then update model.o set a = left(a, 20) || 'u';
    when 12 then delete from model.o where id = k;
    when 13 then update model.t set a = left(a, 20) || 'f' where id = model.touched(k);
    when 14 then execute 'merge into model.t using (values ($1), ($2)) v(id) on t.id = v.id
                          when matched and t.id % 2 = 0 then delete
                          when matched then update set a = left(a, 20) || ''g''
                          when not matched then insert (id, a) values (v.id, ''g'')' using k, k % 6 + 1;
    when 15 then update model.t set id = id + 6, a = left(a, 20) || 'v' where id <= 6 and id between k and k2;
    when 16 then perform model.in_sql(k, k2);
    when 17 then perform model.by_cursor(k);
    when 18 then for r in update model.t set a = left(a, 20) || 'l' where id between k and k + 2 returning id loop
                     update model.t set a = left(a, 20) || 'L' where id = r.id + 1;
                 end loop;
    when 19 then delete from model.t where id in (3, 9, 15); execute format('copy model.t (id, a) from %L', model.copied());
    when 20 then if random() < 0.5 then truncate model.o; end if;
    when 21 then if random() < 0.3 then truncate model.t; end if;
    when 22 then with u as (update model.t set a = left(a, 20) || 'w' where id between k and k + 2 returning id),
                      d as (delete from model.o where id = model.touched(k2) returning id)
                 insert into model.o select id + 6, 'w' from u on conflict (id) do update set a = left(model.o.a, 20) || 'w';
    when 23 then insert into model.moving values (k, k % 2, 'i'), (k2, k2 % 2, 'j') on conflict do nothing;
    when 24 then update model.moving set part = 1 - part, a = left(a, 20) || 'p' where id between k and k2;
    when 25 then update model.moving set part = model.touched(k) % 2, id = id + 6 where id between k and k + 2 and id <= 6;
    when 26 then delete from model.moving where id = k2;
    when 27 then insert into model.named (name, a) values ('n' || k, 'i') on conflict (name) do update set a = left(model.named.a, 20) || 'c';
    when 28 then update model.named set name = 'n' || k2 where name = 'n' || k;
    when 29 then with d as (delete from model.named where name = 'n' || k returning *) insert into model.named (name, a) select name, 'r' from d;
    when 30 then insert into model.keyless values (k), (k2);
    when 31 then update model.keyless set n = model.touched(n), stamp = default where n = k;
    when 32 then delete from model.keyless where n = k2;
    end case;
end $$;
create function has_more() returns boolean language sql as $$ select to_regclass('model.moving') is not null $$;
create function touched(k int) returns int language plpgsql as $$
begin
    if random() < 0.3 and model.depth() < 4 then perform model.nested(); end if;
    return k;
end $$;
create function depth() returns int language sql as $$ select pg_trigger_depth() $$;

-- Several statements in a function of SQL; a cursor that calls a function while
-- the rows are changed that it reads.
create function in_sql(k int, k2 int) returns setof int language plpgsql as $$
begin
    -- an inner one of SQL, made here because the tables come and go
    create or replace function model.of_sql(k int, k2 int) returns setof int language sql as $f$
        update model.t set a = left(a, 20) || 's' where id between k and k2;
        delete from model.o where id = k2;
        insert into model.t (id, a) values (k, 's') on conflict (id) do update set a = left(model.t.a, 20) || 'q';
        select model.touched(id) from model.t where id <= k2;
    $f$;
    return query select * from model.of_sql(k, k2);
    return query select model.of_sql(k, k2) limit 1;
end $$;
create function by_cursor(k int) returns void language plpgsql as $$
declare
    c cursor for select id, model.touched(id) from model.t where id <= k order by id;
    w cursor for select * from model.t where id >= k for update;
    r record;
begin
    c := null;  -- no names: there may be several
    w := null;
    open c;
    fetch c into r;
    update model.t set a = left(a, 20) || 'y' where id = r.id;
    move forward 2 from c;
    open w;
    fetch w into r;
    if found then update model.t set a = left(a, 20) || 'x' where current of w; end if;
    fetch c into r;
    close c;
    close w;
end $$;

-- Some statements, of which some are rolled back.
create function nested() returns void language plpgsql as $$
begin
    for i in 1 .. model.pick(1, 2) loop
        begin
            perform model.mutate();
            if random() < 0.2 then raise exception using errcode = 'P0002'; end if;
        exception
            when no_data_found or integrity_constraint_violation or unique_violation or foreign_key_violation
                 or check_violation or triggered_data_change_violation or cardinality_violation or feature_not_supported
                 or object_not_in_prerequisite_state or object_in_use or invalid_cursor_state then null;
        end;
    end loop;
end $$;
create function act() returns trigger language plpgsql as $$
begin
    if pg_trigger_depth() < 4 and random() < tg_argv[0]::float8 then perform model.nested(); end if;
    if tg_level = 'STATEMENT' or tg_when = 'AFTER' then return null; end if;
    return case when tg_op = 'DELETE' then old else new end;
end $$;
-- makes room for a row that moves
create function make_room() returns trigger language plpgsql as $$
begin
    delete from model.moving where id = new.id and part = new.part;
    return new;
end $$;
-- of a statement, knowing the rows
create function act_on_rows() returns trigger language plpgsql as $$
begin
    if pg_trigger_depth() < 4 and random() < 0.7 then
        update model.t set a = left(a, 20) || 'S' where id in (select id from changed) and random() < 0.7;
        if random() < 0.3 then
            insert into model.t (id, a) select id, 'T' from changed on conflict (id) do update set a = left(model.t.a, 20) || 'T';
        end if;
    end if;
    return null;
end $$;

-- Captured tables, and a few triggers.
create procedure new_program() language plpgsql as $$
declare
    tables text[] := '{t,t,o}';
begin
    drop table if exists model.t, model.o, model.moving, model.named, model.keyless;
    truncate fanout.outbox;
    perform setval('model.changes', 1);
    execute format('create table model.t (id int primary key, up int references model.t on delete %s on update cascade%s, a text)',
                   (array['set null', 'cascade', 'no action'])[model.pick(1, 3)],
                   case when random() < 0.3 then ' deferrable initially deferred' else '' end);
    create table model.o (id int primary key, a text);
    perform fanout.capture('model.t', 't', old_row => true), fanout.capture('model.o', 'o', old_row => true);
    if random() < 0.4 then
        tables := '{t,o,moving,named,keyless}';
        create table model.moving (id int, part int, a text, primary key (id, part)) partition by list (part);
        create table model.moving_0 partition of model.moving for values in (0);
        create table model.moving_1 partition of model.moving for values in (1);
        if random() < 0.7 then
            create trigger room before insert on model.moving_1 for each row execute function model.make_room();
        end if;
        create table model.named (id int generated always as identity primary key, name text not null unique, a text);
        create table model.keyless (n int, stamp bigint not null default nextval('model.stamp'));
        perform fanout.capture('model.moving', 'moving', old_row => true),
                fanout.capture('model.named', 'named', key => '{name}', old_row => true),
                fanout.capture('model.keyless', 'keyless', old_row => true);
    end if;
    for i in 1 .. model.pick(1, cardinality(tables) + 1) loop
        execute format('create trigger %I %s %s on model.%I for each %s execute function model.act(%L)',
                       (array['A', 'a', 'q', 'z'])[model.pick(1, 4)] || i,
                       (array['before', 'after', 'after'])[model.pick(1, 3)],
                       (array['insert', 'update', 'delete', 'insert or update', 'insert or update or delete'])[model.pick(1, 5)],
                       tables[model.pick(1, cardinality(tables))], (array['row', 'row', 'statement'])[model.pick(1, 3)],
                       (random() * 0.8)::numeric(3, 2));
    end loop;
    -- The server forgets to look, after BEFORE triggers, whether deferred events
    -- are pending: only o has none.
    if random() < 0.2 then
        execute format('create trigger %I %s for each statement execute function model.act(0.8)',
                       (array['A', 'z'])[model.pick(1, 2)] || '_truncate',
                       (array['after truncate on model.t', 'after truncate on model.o', 'before truncate on model.o'])[model.pick(1, 3)]);
    end if;
    if random() < 0.3 then
        execute format('create trigger %I after %s for each statement execute function model.act_on_rows()',
                       (array['A', 'z'])[model.pick(1, 2)] || '_rows',
                       (array['insert on model.t referencing new table as changed', 'update on model.t referencing new table as changed',
                              'delete on model.t referencing old table as changed'])[model.pick(1, 3)]);
    end if;
    if random() < 0.3 then
        execute format('create constraint trigger %I after %s on model.t deferrable initially deferred for each row execute function model.act(0.3)',
                       (array['A', 'z'])[model.pick(1, 2)] || '_deferred',
                       (array['insert', 'update', 'delete', 'insert or update'])[model.pick(1, 4)]);
    end if;
end $$;

create function consistent() returns boolean language plpgsql as $$
begin
    set constraints all immediate;
    return true;
exception
    when no_data_found or integrity_constraint_violation or foreign_key_violation or triggered_data_change_violation
         or cardinality_violation or feature_not_supported or object_not_in_prerequisite_state then
        return false;
end $$;
create procedure run_program() language plpgsql as $$
begin
    for i in 1 .. 10 loop
        begin
            for j in 1 .. model.pick(1, 3) loop perform model.nested(); end loop;
            if not model.consistent() or random() < 0.1 then raise exception using errcode = 'P0002'; end if;
        exception
            when no_data_found then null;
        end;
        commit;
    end loop;
end $$;

-- What each message does to each key, in order of id.  A row that leaves a key
-- for another one does something to both.
create function events(topic text) returns table (id bigint, key text, before jsonb, after jsonb, truncates boolean)
language sql as $$
    with messages as (
        select o.id, o.key, o.headers ->> 'op' as op, o.headers ->> 'old_key' as old_key,
               nullif(o.payload::jsonb -> 'before', 'null') as before, nullif(o.payload::jsonb -> 'after', 'null') as after
        from fanout.outbox o join fanout.topic t using (topic_id) where t.topic = events.topic
    )
    select id, key, case when old_key is null then before end, after, false from messages where op <> 't'
    union all
    select id, old_key, before, null, false from messages where old_key is not null
    union all
    select m.id, k.key, null, null, true
    from messages m, (select distinct key from messages where op <> 't') k where m.op = 't'
$$;
create function wrong(topic text, entity regclass, key text) returns setof text language plpgsql as $$
begin
    return query execute format($q$
        with chain as (
            select *, lag(after) over w as previous, lead(id) over w is null as last
            from model.events(%1$L) window w as (partition by key order by id)
        )
        select format('%%s: message %%s of key %%s says %%s, the row is %%s', %1$L, c.id, coalesce(c.key, %3$s), c.after, to_jsonb(r))
        from (select * from chain where last) c full join %2$s r on %3$s = c.key where c.after is distinct from to_jsonb(r)
        union all
        select format('%%s: message %%s of key %%s begins with %%s, the one before ends with %%s', %1$L, id, key, before, previous)
        from chain where previous is distinct from before and not truncates$q$, topic, entity, key);
end $$;
-- Each image is one of its kind.
create function wrong_without_key() returns setof text language plpgsql as $$
begin
    return query
        with made as (select id, after as image from model.events('keyless') where after is not null),
             replaced as (select id, before as image from model.events('keyless') where before is not null)
        select format('keyless: %s is made by message %s, replaced by message %s, the row is %s', image, m.id, p.id, to_jsonb(r))
        from made m full join replaced p using (image) full join model.keyless r on to_jsonb(r) = image
        where m.id is null or p.id <= m.id or (p.id is null) = (r.stamp is null);
end $$;
create function all_wrong() returns setof text language plpgsql as $$
begin
    return query select * from model.wrong('t', 'model.t', 'r.id::text') union all select * from model.wrong('o', 'model.o', 'r.id::text');
    if model.has_more() then
        return query select * from model.wrong('moving', 'model.moving', 'format(''[%s,%s]'', r.id, r.part)')
           union all select * from model.wrong('named', 'model.named', 'r.name')
           union all select * from model.wrong_without_key();
    end if;
end $$;
END

my $messages = 0;

# Ends a transaction, in which deferred constraints may be broken.
my $end = <<'END';
select consistent() \gset
\if :consistent
commit;
\else
rollback;
\endif
END

# Runs programs, each in two sessions of its own, so that statements begin with
# nothing cached.  Returns the number of those whose messages are wrong.
sub run_programs
{
	my ($first, $last) = @_;
	my $bad = 0;

	for my $program ($first .. $last)
	{
		my $random = ($seed * 7919 + $program) % 1_000_003 / 1_000_003;
		my $output = $node->safe_psql('postgres', <<"END");
set search_path = model, public;
select setseed($random) \\g /dev/null
call new_program();
\\c
set search_path = model, public;
select setseed(-$random) \\g /dev/null
begin;
select nested() where random() < 0.5 \\g /dev/null
$end
call run_program();
begin;
select nested() \\g /dev/null
savepoint a;
select nested() \\g /dev/null
savepoint b;
select nested(), touched(1) \\g /dev/null
select random() < 0.5 as back \\gset
\\if :back
rollback to a;
\\else
release a;
\\endif
select nested() from generate_series(1, 2) \\g /dev/null
$end
select 'wrong', w from all_wrong() w;
select 'messages', count(*) from fanout.outbox;
END
		my @wrong = grep { /^wrong/ } split /\n/, $output;

		$messages += $1 if $output =~ /^messages\|(\d+)/m;
		next unless @wrong;
		$bad++;
		diag "seed $seed, program $program:\n", join("\n", @wrong[0 .. ($#wrong < 4 ? $#wrong : 4)]), "\n",
		  $node->safe_psql('postgres',
			q{select pg_get_triggerdef(oid) from pg_trigger where tgrelid::regclass::text ~ '^model' and tgparentid = 0 and not tgisinternal})
		  if $bad <= 3;
		last if $bad >= 20;
	}
	return $bad;
}

is(run_programs(1, $programs), 0, 'of each key the message with the highest id is the row, and each follows from the one before');
cmp_ok($messages, '>', $programs * 20, 'programs of triggers wrote messages');
note "$messages messages";

# An apply worker's changes are inside no statement.
$node->safe_psql('postgres', <<'END');
create table applied (id int primary key, n int);
create publication p for table applied;
select pg_create_logical_replication_slot('s', 'pgoutput');
create database copy;
END
$node->safe_psql('copy', <<'END');
create table applied (id int primary key, n int);
create extension pg_fanout;
create table counted (id int primary key, n int);
select fanout.declare_topic('applied'), fanout.declare_topic('counted');
select fanout.capture('applied', 'applied', old_row => true), fanout.capture('counted', 'counted', old_row => true);
create function again() returns trigger language plpgsql set search_path = public as $$
begin
    insert into counted values (coalesce(new.id, old.id), 1) on conflict (id) do update set n = counted.n + 1;
    begin
        update applied set n = -n where id = coalesce(new.id, old.id) and pg_trigger_depth() < 3;
        raise exception using errcode = 'P0002';
    exception when no_data_found then null;
    end;
    if tg_when = 'AFTER' then
        update applied set n = n + 1000 where id = new.id and pg_trigger_depth() < 3;
        delete from counted where id = old.id - 1;
    end if;
    return coalesce(new, old);
end $$;
create trigger "A" after insert or update or delete on applied for each row execute function again();
create trigger z after insert or update on applied for each row execute function again();
create trigger b before delete on applied for each row execute function again();
do $$
declare t record;
begin
    for t in select tgrelid::regclass as relation, tgname from pg_trigger where not tgisinternal and tgrelid::regclass::text in ('applied', 'counted') loop
        execute format('alter table %s enable always trigger %I', t.relation, t.tgname);
    end loop;
end $$;
END
$node->safe_psql('postgres', 'insert into applied select i, i from generate_series(1, 3) i');
my ($host, $port) = ($node->host, $node->port);
$node->safe_psql('copy', "create subscription s connection 'port=$port host=$host dbname=postgres' publication p
	with (create_slot = false, slot_name = 's')");
$node->poll_query_until('copy', "select bool_and(srsubstate = 'r') from pg_subscription_rel") or die 'the table was not copied';
$node->safe_psql('postgres', <<'END');
insert into applied select i, i from generate_series(4, 9) i;
begin;
update applied set n = n + 1 where id > 2;
delete from applied where id in (1, 5);
insert into applied values (5, 50);
savepoint a;
update applied set id = id + 10 where id in (6, 7);
rollback to a;
update applied set id = id + 20 where id in (7, 8);
commit;
END
$node->wait_for_catchup('s');
is( $node->safe_psql('copy', <<'END'), '',
with m as (
    select t.topic, o.id, o.key, o.headers ->> 'old_key' as old_key, nullif(o.payload::jsonb -> 'before', 'null') as before,
           nullif(o.payload::jsonb -> 'after', 'null') as after
    from fanout.outbox o join fanout.topic t using (topic_id)
), events as (
    select topic, id, key, case when old_key is null then before end as before, after from m
    union all select topic, id, old_key, before, null from m where old_key is not null
), rows as (
    select 'applied' as topic, id::text as key, to_jsonb(a) as row from applied a
    union all select 'counted', id::text, to_jsonb(c) from counted c
), chain as (
    select *, lag(after) over w as previous, lead(id) over w is null as last from events window w as (partition by topic, key order by id)
)
select topic, key, id, before, previous, after, row from chain full join rows using (topic, key)
where previous is distinct from before or (last or id is null) and after is distinct from row
END
	'so it is with what an apply worker changes');
cmp_ok($node->safe_psql('copy', 'select count(*) from fanout.outbox'), '>', 60, 'which makes messages');
$node->safe_psql('copy', 'alter subscription s disable');

# Without the preload, the first statement that makes a message loads the
# library, having begun without it.
$node->append_conf('postgresql.conf', "shared_preload_libraries = ''");
$node->restart;
is(run_programs($programs + 1, $programs + $programs / 6), 0, 'so it is where the library is not preloaded');
$node->safe_psql('postgres', <<'END');
set search_path = model, public;
call new_program();
drop table t;
create table t (id int primary key, a text);
select fanout.capture('t', 't', old_row => true);
create function again() returns trigger language plpgsql as $$
begin
    update model.t set a = a || tg_argv[0] where id = new.id and pg_trigger_depth() < 3;
    return null;
end $$;
create trigger "A" after insert or update on t for each row execute function again('A');
create trigger z after insert or update on t for each row execute function again('z');
END
$node->safe_psql('postgres', $_)
  for q(insert into model.t select i, '' from generate_series(1, 3) i), q(with u as (update model.t set a = '!' returning *) select from u);
is($node->safe_psql('postgres', q(select * from model.wrong('t', 'model.t', 'r.id::text'))), '', 'also with the very statement that loads it');

$node->stop;
done_testing();
