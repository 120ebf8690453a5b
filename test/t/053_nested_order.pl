# Tests that of each key the message with the highest id is the row's last
# state, whatever programs of triggers change the tables inside each statement.
#
# A program is a random set of triggers on two captured tables: before and after
# ours in order of names, BEFORE and AFTER, for each row and each statement,
# which run random statements of their own, some in subtransactions that are
# rolled back.  Random statements run in transactions; then each key's messages,
# in order of id, must be a chain of images that ends with the row as it is.
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
my $programs = $ENV{PG_FANOUT_LONG} ? 5000 : 100;
note "seed $seed, $programs programs";

my $node = PostgreSQL::Test::Cluster->new('main');
$node->init;
$node->append_conf('postgresql.conf', <<"END");
shared_preload_libraries = 'pg_fanout'
pg_fanout.uri = 'amqp://guest:guest\@127.0.0.1:1/'
fsync = off
autovacuum_naptime = 1h
client_min_messages = warning
max_stack_depth = 2MB
END
$node->start;

$node->safe_psql('postgres', <<'END');
create extension pg_fanout;
create schema model;
set search_path = model, public;
select fanout.declare_topic('model'), fanout.declare_topic('other');

create function pick(low int, high int) returns int language sql volatile as $$ select low + floor(random() * (high - low + 1))::int $$;

-- One random statement on a few rows.
create function mutate() returns void language plpgsql as $$
declare
    k int := model.pick(1, 6);
    k2 int := model.pick(1, 6);
begin
    case model.pick(1, 15)
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
    end case;
end $$;
create function touched(k int) returns int language plpgsql as $$
begin
    if random() < 0.3 and model.depth() < 4 then perform model.nested(); end if;
    return k;
end $$;
create function depth() returns int language sql as $$ select pg_trigger_depth() $$;

-- Some statements, of which some are rolled back.
create function nested() returns void language plpgsql as $$
begin
    for i in 1 .. model.pick(1, 2) loop
        begin
            perform model.mutate();
            if random() < 0.2 then raise exception using errcode = 'P0002'; end if;
        exception
            when no_data_found or unique_violation or foreign_key_violation or check_violation
                 or triggered_data_change_violation or cardinality_violation or feature_not_supported or object_not_in_prerequisite_state then null;
        end;
    end loop;
end $$;
create function act() returns trigger language plpgsql as $$
begin
    if pg_trigger_depth() < 4 and random() < tg_argv[0]::float8 then perform model.nested(); end if;
    if tg_level = 'STATEMENT' or tg_when = 'AFTER' then return null; end if;
    return case when tg_op = 'DELETE' then old else new end;
end $$;

-- Two tables, captured, and a few triggers.
create procedure new_program() language plpgsql as $$
declare
    tab text;
begin
    drop table if exists model.t, model.o;
    truncate fanout.outbox;
    execute format('create table model.t (id int primary key, up int references model.t on delete %s on update cascade%s, a text)',
                   (array['set null', 'cascade', 'no action'])[model.pick(1, 3)],
                   case when random() < 0.3 then ' deferrable initially deferred' else '' end);
    create table model.o (id int primary key, a text);
    perform fanout.capture('model.t', 'model', old_row => true), fanout.capture('model.o', 'other', old_row => true);
    for i in 1 .. model.pick(1, 4) loop
        tab := (array['t', 't', 'o'])[model.pick(1, 3)];
        execute format('create trigger %I %s %s on model.%I for each %s execute function model.act(%L)',
                       (array['A', 'a', 'q', 'z'])[model.pick(1, 4)] || i,
                       (array['before', 'after', 'after'])[model.pick(1, 3)],
                       (array['insert', 'update', 'delete', 'insert or update', 'insert or update or delete'])[model.pick(1, 5)],
                       tab, (array['row', 'row', 'statement'])[model.pick(1, 3)],
                       (random() * 0.8)::numeric(3, 2));
    end loop;
    if random() < 0.3 then
        execute format('create constraint trigger %I after %s on model.t deferrable initially deferred for each row execute function model.act(0.3)',
                       (array['A', 'z'])[model.pick(1, 2)] || '_deferred',
                       (array['insert', 'update', 'delete', 'insert or update'])[model.pick(1, 4)]);
    end if;
end $$;

create procedure run_program() language plpgsql as $$
begin
    for i in 1 .. 12 loop
        begin
            for j in 1 .. model.pick(1, 3) loop perform model.nested(); end loop;
            set constraints all immediate;
            if random() < 0.1 then raise exception using errcode = 'P0002'; end if;
        exception
            when no_data_found or unique_violation or foreign_key_violation or triggered_data_change_violation
                 or cardinality_violation or feature_not_supported or object_not_in_prerequisite_state then null;
        end;
        commit;
    end loop;
end $$;

create function wrong(topic text, entity regclass) returns setof text language plpgsql as $$
begin
    return query execute format($q$
        with messages as (
            select o.id, o.key, o.headers ->> 'op' as op, o.headers ->> 'old_key' as old_key,
                   nullif(o.payload::jsonb -> 'before', 'null') as before, nullif(o.payload::jsonb -> 'after', 'null') as after
            from fanout.outbox o join fanout.topic t using (topic_id) where t.topic = %1$L
        ), events as (
            select id, key, case when old_key is null then before end as before, after from messages
            union all
            select id, old_key, before, null from messages where old_key is not null
        ), chain as (
            select *, lag(after) over w as previous, lead(id) over w is null as last
            from events window w as (partition by key order by id)
        )
        select format('%%s: message %%s of key %%s says %%s, the row is %%s', %1$L, c.id, coalesce(c.key, r.id::text), c.after, to_jsonb(r))
        from (select * from chain where last) c full join %2$s r on r.id::text = c.key where c.after is distinct from to_jsonb(r)
        union all
        select format('%%s: message %%s of key %%s begins with %%s, the one before ends with %%s', %1$L, id, key, before, previous)
        from chain where previous is distinct from before$q$, topic, entity);
end $$;
END

my $messages = 0;
my $bad = 0;

# A program for each session, so that sessions begin with nothing cached, too.
for my $program (1 .. $programs)
{
	my $random = ($seed * 7919 + $program) % 1_000_003 / 1_000_003;
	my $output = $node->safe_psql('postgres', <<"END");
set search_path = model, public;
select setseed($random) \\g /dev/null
call new_program();
call run_program();
select 'wrong', w from wrong('model', 't') w union all select 'wrong', w from wrong('other', 'o') w;
select 'messages', count(*) from fanout.outbox;
END
	my @wrong = grep { /^wrong/ } split /\n/, $output;

	$messages += $1 if $output =~ /^messages\|(\d+)/m;
	next unless @wrong;
	$bad++;
	diag "seed $seed, program $program:\n", join("\n", @wrong[0 .. ($#wrong < 4 ? $#wrong : 4)]), "\n",
	  $node->safe_psql('postgres',
		q{select pg_get_triggerdef(oid) from pg_trigger where tgrelid in ('model.t'::regclass, 'model.o'::regclass) and not tgisinternal})
	  if $bad <= 3;
	last if $bad >= 20;
}
cmp_ok($messages, '>', $programs * 20, 'programs of triggers wrote messages');
is($bad, 0, 'of each key the message with the highest id is the row, and each follows from the one before');
note "$messages messages";

$node->stop;
done_testing();
