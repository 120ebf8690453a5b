# Handlers that behave badly, in two databases that consume the same queues, while
# workers are ended and killed: what they do costs only their own message, which is applied
# once or given up, and all others are applied once, in order where there is one consumer.
#
# PG_FANOUT_LONG=1: also what does not end in time, and 40 ends of workers in place of 5.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $long = $ENV{PG_FANOUT_LONG};
my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, extension => 0, conf => q(
log_statement = none
max_worker_processes = 30
max_parallel_workers = 4
max_prepared_transactions = 5
max_locks_per_transaction = 64
restart_after_crash = on
));

# What handlers do, which is undone where it raises an error.
my %bad = (
	'advisory locks by the thousand' => q(select pg_advisory_lock(i) from generate_series(1, 3000) i),
	'advisory locks, and then an error' => q(do $x$ begin perform pg_advisory_lock(1), pg_advisory_xact_lock(2); raise exception 'x'; end $x$),
	'advisory locks until there are no more' => q(do $x$ begin if nextval('once') < 8 then perform pg_advisory_lock(i) from generate_series(1, 1000000) i; end if; end $x$),
	'cursors' => q(do $x$ declare c refcursor; begin open c for select generate_series(1, 1000000); for i in 1 .. 100 loop execute format('declare c%s cursor with hold for select 1', i); end loop; end $x$),
	'a cursor that fails at commit' => q(declare d cursor with hold for select 1 / (2 - i) from generate_series(1, 3) i),
	'temporary tables' => q(do $x$ begin execute format('create temp table t%s (x int primary key deferrable initially deferred) on commit delete rows', nextval('names')); end $x$),
	'settings' => q(set search_path = nowhere; set role pg_monitor; set datestyle = 'German'; set work_mem = 64; set default_transaction_read_only = on; set lock_timeout = 1; set statement_timeout = 1; reset role; set session_replication_role = replica),
	'another user' => q(set session authorization pg_monitor),
	'transaction' => q(set transaction read only),
	'all reset' => q(reset all; discard plans; discard temp; discard sequences),
	'LISTEN' => q(listen x),
	'NOTIFY' => q(select pg_notify('x', repeat('y', 7000)) from generate_series(1, 100)),
	'UNLISTEN' => q(unlisten *),
	'PREPARE TRANSACTION' => q(prepare transaction 'x'),
	'COMMIT' => q(call commits()),
	'ROLLBACK' => q(rollback),
	'SAVEPOINT' => q(savepoint x),
	'COPY' => q(copy log from stdin),
	'a program' => q(copy (select 1) to program 'false'),
	'parallel' => q(set max_parallel_workers_per_gather = 4; set parallel_setup_cost = 0; set parallel_tuple_cost = 0; set min_parallel_table_scan_size = 0; select count(*) from large),
	'parallel, and an error' => q(set max_parallel_workers_per_gather = 4; set parallel_setup_cost = 0; set parallel_tuple_cost = 0; set min_parallel_table_scan_size = 0; select sum(1 / (x - 5000)) from large),
	'another session' => q(select elsewhere('create table if not exists made_elsewhere ()')),
	'another session fails' => q(select elsewhere('select 1 / 0')),
	'another session that stays' => q(select dblink_connect('c' || nextval('names'), format('dbname=%s host=%s port=%s', current_database(), split_part(current_setting('unix_socket_directories'), ',', 1), current_setting('port')))),
	'a large object' => q(select lo_open(lo_create(0), 393216)),
	'a snapshot' => q(select pg_export_snapshot()),
	'a flood of notices' => q(do $x$ begin for i in 1 .. 5000 loop raise notice '%', repeat('x', 1000); raise warning '%', repeat('y', 10); end loop; end $x$),
	'a long error' => q(do $x$ begin raise exception '%', repeat('ä', 10000000) using detail = repeat('x', 10000000), hint = repeat('x', 10000000); end $x$),
	'an error in an error' => q(do $x$ begin begin raise exception 'a'; exception when others then raise exception 'b %', 1 / 0; end; end $x$),
	'too deep' => q(select deeper(1)),
	'too much memory' => q(do $x$ declare t text := repeat('x', 1000000); begin for i in 1 .. 12 loop t := t || t; end loop; end $x$),
	'out of memory' => q(do $x$ begin if nextval('once') < 20 then raise exception 'out of memory' using errcode = '53200'; end if; end $x$),
	'deferred constraint' => q(insert into deferred values (1), (1)),
	'deferred trigger' => q(insert into deferred_trigger values (1)),
	'deferred trigger that waits' => q(insert into deferred_trigger values (2)),
	'constraints set' => q(set constraints all immediate; insert into deferred values (2)),
	'its own table' => q(alter table log add column if not exists more int; alter table log drop column more),
	'truncated' => q(create table if not exists emptied (); truncate emptied),
	'its own function' => q(alter function apply(fanout.message) set work_mem = 100; alter function apply(fanout.message) reset work_mem),
	'cancelled' => q(do $x$ begin if nextval('once') < 20 then perform pg_cancel_backend(pg_backend_pid()), pg_sleep(1); end if; end $x$),
	'ended' => q(select pg_terminate_backend(pg_backend_pid()), pg_sleep(5)),
	'ended unheard' => q(do $x$ begin begin perform pg_terminate_backend(pg_backend_pid()), pg_sleep(5); exception when others then null; end; end $x$),
	'late' => q(select pg_sleep(5)),
	'late and deaf' => q(do $x$ begin loop begin perform pg_sleep(1); exception when query_canceled then null; end; end loop; end $x$),
	'flush' => q(select fanout.flush('100 ms')),
	'configuration' => q(select pg_reload_conf()),
	'others ended' => q(select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'pg_fanout publisher'),
	'serial' => q(do $x$ begin if nextval('once') < 20 then raise exception 'x' using errcode = '40001'; end if; end $x$),
	'shut down' => q(do $x$ begin if nextval('once') < 20 then raise exception 'x' using errcode = '57P01'; end if; end $x$),
);

# calls that do not end in time let a worker wait for others
delete @bad{ 'late', 'late and deaf', 'too much memory', 'deferred trigger that waits', 'its own table' } unless $long;

foreach my $database (qw(b c))
{
	$node->safe_psql('postgres', "create database $database");
	sql($database, q(
set client_min_messages = warning;
create extension pg_fanout;
create extension dblink;
create table log (n serial, topic text, message_id uuid, key text, sequence bigint, attempt int);
create sequence once;
create sequence names;
create table large as select i as x from generate_series(1, 10000) i;
create table deferred (x int unique deferrable initially deferred);
create table deferred_trigger (x int);
create function deferred_trigger() returns trigger language plpgsql as $$
begin
	if new.x = 1 then raise exception 'at the end'; end if;
	perform pg_sleep(5);
	return null;
end $$;
create constraint trigger fails after insert on deferred_trigger deferrable initially deferred for each row execute function deferred_trigger();
create procedure commits() language plpgsql as $$ begin commit; end $$;
create function deeper(n int) returns int language plpgsql as $$ begin return deeper(n + 1); end $$;
create function elsewhere(command text) returns void language sql as $$
	select dblink_exec(format('dbname=%s host=%s port=%s', current_database(), split_part(current_setting('unix_socket_directories'), ',', 1), current_setting('port')), command);
$$;
create function apply(m fanout.message) returns void language plpgsql as $$
begin
	if m.body ? 'do' then execute m.body ->> 'do'; end if;
	insert into public.log (topic, message_id, key, sequence, attempt) values (m.topic, m.message_id, m.key, m.sequence, m.attempt);
end $$;
create function apply_all(m fanout.message[]) returns void language plpgsql as $$
begin
	perform apply(n) from unnest(m) n;
end $$));
}

my %topics = (
	ordered => [ 'apply(fanout.message)', '' ],
	free => [ 'apply(fanout.message)', ', ordered => false' ],
	requeued => [ 'apply(fanout.message)', q(, ordered => false, on_failure => 'requeue') ],
	many => [ 'apply_all(fanout.message[])', '' ],
);
foreach my $topic (sort keys %topics)
{
	sql('b', "select fanout.declare_binding('$topic', 'g')");
	sql('b', join(';', map { "select fanout.publish('$topic', jsonb_build_object('do', \$do\$$bad{$_}\$do\$), key => '$_');
		select fanout.publish('$topic', '{}', key => '$_');
		select fanout.publish('$topic', '{}', key => 'other ' || i) from generate_series(1, 5) i" } sort keys %bad));
}
PgFanout::flush($node, dbname => 'b');
foreach my $database (qw(b c))
{
	sql($database, 'set client_min_messages = warning;' . join(';', map { qq(select fanout.subscribe('$_', 'g', '$topics{$_}->[0]', max_attempts => 2, prefetch => 20,
		retry_delay => '100 ms', max_retry_delay => '200 ms', handler_timeout => '1 s' $topics{$_}->[1])) } grep { $database eq 'b' || $topics{$_}->[1] } sort keys %topics));
}
my $messages = 7 * keys(%bad) * keys(%topics);
my $began = time;
foreach my $i (1 .. ($long ? 40 : 5))
{
	my $database = (qw(b c))[ $i % 2 ];

	sleep 1;
	PgFanout::ask($node, q(select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'pg_fanout consumer' order by random() limit 1), $database);
}
eval { PgFanout::poll(sub { ask_sum('select (select count(*) from log) + (select count(*) from fanout.dead_letter)') >= $messages }, 'all messages applied, or given up', 400); 1 } or diag(map { sql($_, 'select * from fanout.stat_subscriptions; select topic, key, attempts, sqlstate, left(error, 100), next_try from fanout.delivery_failure limit 50') } qw(b c));
note sprintf('%d messages in %.1f s', $messages, time - $began);
my (%applied, %dead);
$applied{$_}++ foreach map { split(/\n/, sql($_, 'select message_id from log')) } qw(b c);
$dead{$_}++ foreach map { split(/\n/, sql($_, 'select message_id from fanout.dead_letter')) } qw(b c);
is(scalar(keys %{ { %applied, %dead } }), $messages, 'each message is applied or given up');
my @again = grep { $applied{$_} > 1 } sort keys %applied;
is(scalar(grep { $_ != 1 } values %applied, values %dead), 0, 'once');
foreach my $database (qw(b c))
{
	diag(sql($database, "select '$database', * from log where message_id = any ('{" . join(',', @again) . "}') order by n")) if @again;
}
is(scalar(grep { $dead{$_} } keys %applied), 0, 'and not both');
is(sum(q(select count(*) from fanout.dead_letter where payload = '{}')), 0, 'none is given up because of others');
is(sum(q(select count(*) from (select sequence < lag(sequence) over (partition by topic, key order by n) as wrong from log where topic in ('ordered', 'many')) x where wrong)), 0, 'keys are in order where there is one consumer');
# the last ones are let go of after the commit
ok($node->poll_query_until('postgres', q(select count(*) = 0 from pg_locks where locktype = 'advisory')), 'no lock is left');
is(sql('postgres', q(select count(*) from pg_prepared_xacts)), 0, 'nor a transaction');
note sql('b', q(select distinct key, sqlstate, regexp_replace(left(reason, 80), '\n.*', '') from fanout.dead_letter order by 1));

done_testing();

sub sql { return $node->safe_psql($_[0], $_[1]); }

sub sum
{
	my ($query) = @_;

	return sql('b', $query) + sql('c', $query);
}

# The same, where the server may be away: then there is no result.
sub ask_sum
{
	my ($query) = @_;
	my $sum = 0;

	foreach my $database (qw(b c))
	{
		my $count = PgFanout::ask($node, $query, $database);

		return 0 if $count !~ /^\d+$/;
		$sum += $count;
	}
	return $sum;
}
