# The header "via" of a change that was made while messages were handled: that of its
# own message or, where nobody can tell which one it was, what all of them have in
# common.  So no change is taken for one that has been somewhere before, and is lost.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, extension => 0, conf => q(
log_statement = none
max_worker_processes = 40
pg_fanout.max_subscriptions = 20
));
my (%id, $runs);

foreach my $database ('a', 'b', 'c')
{
	sql('postgres', "create database $database");
	sql($database, 'create extension pg_fanout; create table u (id int primary key, x int)');
	$id{$database} = sql($database, q(select to_hex(system_identifier) || '.' || (select oid from pg_database where datname = current_database()) from pg_control_system()));
}

deferred_trigger_of_a_copy();
arrays('array handler', 10);
arrays('array handler, from the waiting room', 10, fails => 1);
deferred_trigger_of_a_handler();
forged();

$node->stop('fast');
done_testing();

# C -> A -> B, whose trigger has it written to w, which goes to C.
sub deferred_trigger_of_a_copy
{
	sql('c', q(select fanout.declare_binding('cu', 'a'), fanout.capture('u', 'cu')));
	sql('a', q(select fanout.sync_table('cu', 'a', 'u'); select fanout.declare_binding('au', 'b'), fanout.capture('u', 'au')));
	sql('b', q(
		create table w (like u including all);
		create function note() returns trigger language plpgsql as $$ begin
			insert into w values (new.id, new.x) on conflict (id) do update set x = excluded.x; return null; end $$;
		create constraint trigger note after insert or update on u deferrable initially deferred for each row execute function note();
		select fanout.declare_binding('w', 'c'), fanout.capture('w', 'w'), fanout.sync_table('au', 'b', 'u')));
	sql('c', q(select fanout.sync_table('w', 'c', 'u')));
	in_one_batch('u', 'au_b', sub { sql('a', 'insert into u values (0, 1)') }, sub {
		sql('a', 'insert into u values (1, 1)');
		sql('c', 'insert into u values (2, 1)');
		wait_for_rows('a', 'u', '0 1 2');
	});
	wait_for_rows('b', 'w', '0 1 2');
	wait_for_rows('c', 'u', '0 1 2');
	pass('what a deferred trigger writes at the end of a batch goes where not all of its messages have been');
	is(vias('w'), "0 $id{a}/public/u\n1 $id{a}/public/u\n2 $id{a}/public/u", 'it carries what their ways have in common');
	quiet();
	is(sql('a', q(select own from fanout.stat_subscriptions)), '3', 'and it ends where all of them have been');
	sql('b', 'truncate fanout.outbox');
	sql('c', 'insert into u values (3, 1)');
	wait_for_rows('b', 'w', '0 1 2 3');
	is(vias('w'), "3 $id{c}/public/u,$id{a}/public/u", 'that of a single message carries its way');
	quiet();
	is(sql('c', q(select own from fanout.stat_subscriptions)), '1', 'and is left out where it has been');
	return;
}

# Has a consumer of database b take several messages together: they come while the one before
# them waits for a lock on a table.
sub in_one_batch
{
	my ($table, $queue, $first, $others) = @_;
	my $lock = PgFanout::session($node, 'b');

	PgFanout::run_in($lock, "begin; lock table $table in access exclusive mode");
	$first->();
	PgFanout::poll(sub { sql('b', "select count(*) from pg_locks where not granted and relation = '$table'::regclass") > 0 }, 'the first message to wait');
	$others->();
	PgFanout::flush($node, dbname => 'a');
	PgFanout::poll(sub { $broker->count($queue) == 0 }, 'the others to be delivered');
	PgFanout::run_in($lock, 'commit');
	$lock->{harness}->kill_kill;
	return;
}

# Each message of an array has its own way, and the handler writes all of them.
sub arrays
{
	my ($what, $n, %params) = @_;
	$runs++;
	my $fails = $params{fails} ? 'if not exists (select from ready) then raise exception $e$not ready$e$; end if;' : '';
	my @expect = map { $_ % 3 == 0 ? "$_ $id{a}" : "$_ $id{a}/public/t" . $_ % 3 } 1 .. 3 * $n;

	sql('a', q(create table t1 (id int primary key); create table t2 (id int primary key);
		select fanout.declare_binding('many', 'b'), fanout.capture('t1', 'many'), fanout.capture('t2', 'many')));
	sql('b', qq(
		create table v (id int primary key);
		create table ready ();
		create function take(m fanout.message[]) returns void language plpgsql as \$\$ begin
			$fails insert into v select coalesce(n.body ->> 'id', n.body -> 'after' ->> 'id')::int from unnest(m) n; end \$\$;
		select fanout.declare_binding('v$runs', 'g'), fanout.capture('v', 'v$runs');
		select fanout.subscribe('many', 'b', 'take(fanout.message[])', retry_delay => '10 ms', max_retry_delay => '100 ms', max_attempts => 100000)));
	sql('b', q(select fanout.pause('many', 'b')));
	sql('a', qq(do \$\$ begin for i in 1 .. 3 * $n loop
		if i % 3 = 0 then perform fanout.publish('many', jsonb_build_object('id', i), i::text);
		else execute format('insert into t%s values (%s)', i % 3, i); end if; end loop; end \$\$));
	PgFanout::flush($node, dbname => 'a');
	sql('b', q(select fanout.resume('many', 'b')));
	if ($params{fails})
	{
		# or some, if the same error of all has the subscription refused before
		PgFanout::poll(sub { sql('b', "select count(*) = 3 * $n or (select state = 'refused' from fanout.stat_subscriptions where topic = 'many') from fanout.delivery_failure") eq 't' },
			'all of them in the waiting room');
		sql('b', 'insert into ready default values');
	}
	wait_for_rows('b', 'v', join(' ', 1 .. 3 * $n));
	is(vias("v$runs"), join("\n", @expect), "$what: each change carries the way of its own message");
	sql('b', q(select fanout.unsubscribe('many', 'b'); drop function take; drop table v; drop table ready));
	sql('a', q(drop table t1; drop table t2));
	return;
}

sub deferred_trigger_of_a_handler
{
	sql('a', q(create table t1 (id int primary key); create table t2 (id int primary key);
		select fanout.capture('t1', 'many'), fanout.capture('t2', 'many')));
	sql('b', q(
		create table x (id int);
		create table y (id int primary key);
		create function note_x() returns trigger language plpgsql as $$ begin insert into y values (new.id); return null; end $$;
		create constraint trigger note after insert on x deferrable initially deferred for each row execute function note_x();
		create function take(m fanout.message) returns void language sql as $$ insert into x values ((m.body -> 'after' ->> 'id')::int) $$;
		select fanout.declare_binding('y', 'g'), fanout.capture('y', 'y');
		select fanout.subscribe('many', 'b', 'take(fanout.message)')));
	in_one_batch('x', 'many_b', sub { sql('a', 'insert into t1 values (0)') }, sub { sql('a', 'insert into t1 values (1); insert into t2 values (2)') });
	wait_for_rows('b', 'y', '0 1 2');
	is(vias('y'), "0 $id{a}/public/t1\n1 \n2 ", 'what deferred triggers write for a handler carries no way that one of its messages has not come');
	sql('a', 'insert into t2 values (3)');
	wait_for_rows('b', 'y', '0 1 2 3');
	like(vias('y'), qr/^3 \Q$id{a}\E\/public\/t2$/m, 'and that of a single message carries its way');
	return;
}

# A producer may send any header.
sub forged
{
	sql('a', q(
		create table forged (id int primary key);
		select fanout.sync_table('forged', 'g', 'forged', source => 's.forged');
		select fanout.sync_messages(array_agg(row(gen_random_uuid(), 'forged', 'g', null, i::text, i,
			jsonb_build_object('op', 'c', 'schema', 's', 'table', 'forged', 'format', 'row', 'via', (array[',,', ',x,,', '', 'y'])[i]),
			jsonb_build_object('id', i), '', now(), false, 1, null)::fanout.message)) from generate_series(1, 4) i));
	is(sql('a', 'select count(*) from forged'), '4', 'ways with empty elements are taken as they are');
	return;
}

sub sql { return $node->safe_psql($_[0], $_[1]); }

sub wait_for_rows
{
	my ($database, $table, $ids) = @_;

	PgFanout::poll(sub { sql($database, "select coalesce(string_agg(id::text, ' ' order by id), '') from $table") eq $ids },
		sub { "rows $ids in $table of $database, which has " . sql($database, "select string_agg(id::text, ' ' order by id) from $table; select topic, state, delivered, applied, failed, waiting, last_error from fanout.stat_subscriptions; select pid, backend_type, state, wait_event, query from pg_stat_activity where backend_type ~ 'consumer'; select message_id, attempts, error from fanout.delivery_failure limit 3") });
	return;
}

# Keys and ways of what was captured in database b.
sub vias
{
	my ($topic) = @_;

	return sql('b', qq(select key || ' ' || coalesce(headers ->> 'via', '') from fanout.outbox join fanout.topic using (topic_id)
		where topic = '$topic' order by key::int));
}

# Waits until what was written goes round no more: three times, as there are databases.
sub quiet
{
	foreach my $round (1 .. 3)
	{
		foreach my $database ('c', 'a', 'b')
		{
			PgFanout::flush($node, dbname => $database);
			my $to = { c => 'a', a => 'b', b => 'c' }->{$database};
			my $queue = { c => 'cu_a', a => 'au_b', b => 'w_c' }->{$database};

			PgFanout::poll(sub { $broker->left($queue) == 0 && sql($to, 'select delivered = applied + skipped from fanout.stat_subscriptions') eq 't' },
				"the end of $queue");
		}
	}
	return;
}
