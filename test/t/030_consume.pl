# What is delivered runs its handler once, in a transaction; what fails is tried
# again, waits, and is given up as declared, and costs only itself.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 24
));

$node->safe_psql(
	'postgres', q(
create role app login;
grant usage on schema fanout to app;
grant create on schema public to app;
grant execute on function fanout.subscribe, fanout.unsubscribe, fanout.publish to app;
select fanout.grant_topic(null, 'app');
select fanout.declare_binding('t', 'g');
set role app;
create table log (n serial, message_id uuid, key text, sequence bigint, attempt int, role text, body jsonb);
create function handle(m fanout.message) returns void language plpgsql as $$
begin
    insert into log (message_id, key, sequence, attempt, role, body)
    values (m.message_id, m.key, m.sequence, m.attempt, current_user || '/' || session_user, m.body);
    if m.body ? 'fail' and m.attempt <= (m.body ->> 'fail')::int then
        raise exception 'attempt % of %', m.attempt, m.key using errcode = 'P0042';
    end if;
end $$;
));

# Runs SQL as the role that subscribes.
sub app
{
	my ($sql) = @_;

	return $node->safe_psql('postgres', $sql, extra_params => [ '-U', 'app' ]);
}

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub wait_until
{
	my ($condition) = @_;

	$node->poll_query_until('postgres', "select $condition")
	  or die "not so: $condition\n"
	  . $node->safe_psql('postgres',
		'select * from fanout.stat_subscriptions; select * from fanout.delivery_failure; select count(*) from log'
	  );
	return;
}

sub of_subscription
{
	my ($column, $topic) = @_;
	return sql("select $column from fanout.stat_subscriptions where topic = '$topic'");
}

# once, in order, as the role that subscribed
app(q(select fanout.subscribe('t', 'g', 'handle(fanout.message)', retry_delay => '100 ms', max_attempts => 3)));
sql(q(select fanout.publish('t', jsonb_build_object('n', i), key => (i % 10)::text) from generate_series(1, 1000) i));
wait_until('(select count(*) from log) >= 1000');
is(sql('select count(*), count(distinct message_id), min(role), max(role) from log'),
	'1000|1000|app/app|app/app', 'every message ran the handler once, as the role that subscribed');
is(sql('select count(*) from (select sequence < lag(sequence) over (partition by key order by n) as wrong from log) x where wrong'),
	'0', 'in order per key');
wait_until(q((select applied from fanout.stat_subscriptions) = 1000));
unlike(slurp_file('/proc/' . of_subscription('pid', 't') . '/maps'), qr/llvmjit/, 'its own statements are not compiled');
is($broker->count('t_g'), 0, 'and the queue is empty');

# a batch with failures: they cost only themselves, and their keys wait
sql('truncate log');
sql(q(select fanout.publish('t', jsonb_build_object('n', i) || case when i = 5000 then '{"fail": 2}' else '{}' end::jsonb,
							key => (i % 100)::text) from generate_series(1, 10000) i));
wait_until('(select count(*) from log where body is not null) >= 10000');
is( sql(q(select count(*), count(distinct message_id), count(*) filter (where attempt > 1) from log)),
	'10000|10000|1',
	'a poison message among 10,000 is tried again, all others run once');
is( sql(q(select attempt from log where body ->> 'n' = '5000')),
	'3', 'it has succeeded at its third attempt');
is( sql(q(select count(*) from (select sequence < lag(sequence) over (partition by key order by n) as wrong from log) x where wrong)),
	'0',
	'no message of its key was applied before it, all are in order per key');
is( sql(q(select count(*) >= 100 from log l, (select n, sequence from log where body ->> 'n' = '5000') p
			where l.n < p.n and l.sequence > p.sequence)),
	't', 'other keys went on meanwhile');
is(sql('select count(*) from fanout.delivery_failure'),
	'0', 'what succeeded at last is no failure any more');
is(sql('select count(*) from fanout.dead_letter'), '0', 'nor a dead letter');

# a message that always fails
sql('truncate log');
app(q(do $$ begin perform fanout.unsubscribe('t', 'g');
	perform fanout.subscribe('t', 'g', 'handle(fanout.message)', max_attempts => 3, retry_delay => '1 h', max_retry_delay => '1 h'); end $$));
my $dead = sql(q(select fanout.publish('t', '{"fail": 100}', key => 'k', type => 'poison')));
sql(q(select fanout.publish('t', '{"behind": true}', key => 'k')));
sql(q(select fanout.publish('t', '{"other": true}', key => 'other')));
wait_until(q(exists (select from log where body ? 'other')));
wait_until(q(exists (select from fanout.delivery_failure)));
is( sql(q(select topic, consumer_group, message_id, type, key, sqlstate, split_part(error, E'\n', 1) ~ '^attempt [12] of k$' , next_try > failed_at
			from fanout.delivery_failure)),
	"t|g|$dead|poison|k|P0042|t|t",
	'a failure is recorded with its error, and when it is tried again');
# its other attempts only now: by the clock, they might be over before one looks
foreach my $attempt (1 .. 2)
{
	wait_until(qq(exists (select from fanout.delivery_failure where attempts = $attempt and sqlstate = 'P0042')));
	sql(q(select fanout.retry('t', 'g')));
}
wait_until('(select count(*) from fanout.dead_letter) = 1');
is( sql(q(select topic, consumer_group, message_id, type, key, payload::jsonb, raw, sqlstate, attempts, split_part(reason, E'\n', 1)
			from fanout.dead_letter)),
	qq(t|g|$dead|poison|k|{"fail": 100}||P0042|3|attempt 3 of k),
	'after max_attempts it is a dead letter with its body and error');
wait_until(q(exists (select from log where body ? 'behind')));
is(sql(q(select count(*) from log where body ? 'fail')),
	'0', 'nothing of the failed attempts is left');
is(sql('select count(*) from fanout.delivery_failure'),
	'0', 'and it is no failure any more');
wait_until(q((select waiting from fanout.stat_subscriptions) = 0));
is($broker->count('t_g'), 0, 'it was acked');
is( sql(q(select dead, failed from fanout.stat_subscriptions)),
	'1|5', 'its attempts, and those before, are counted');

# redrive and purge
is(sql(q(select fanout.redrive('t'))), '1', 'redrive() takes it');
wait_until(q(exists (select from fanout.dead_letter where redriven_at is null and attempts = 4)));
is(sql(q(select split_part(reason, E'\n', 1) from fanout.dead_letter)),
	'attempt 4 of k', 'it runs again, fails, and is a dead letter still');
sql(q(update fanout.dead_letter set payload = '{"fail": 4}';
	create function suppress() returns trigger language plpgsql as 'begin return null; end';
	create trigger suppress before delete on fanout.dead_letter for each row execute function suppress();
	select fanout.redrive('t')));
wait_until(q(exists (select from fanout.dead_letter where redriven_at is null and attempts = 5 and reason ~ 'changed 0 rows instead of 1')));
is(sql(q(select count(*) from log where body ? 'fail')), '0', 'it is not applied without being removed');
sql('drop trigger suppress on fanout.dead_letter');
is(sql(q(select fanout.redrive('t', consumer_group => 'g'))),
	'1', 'redrive() takes it again');
wait_until('not exists (select from fanout.dead_letter)');
is( sql(q(select attempt, key, message_id from log where body ? 'fail')),
	"6|k|$dead", 'it runs again and succeeds');
app(q(do $$ begin perform fanout.unsubscribe('t', 'g');
	perform fanout.subscribe('t', 'g', 'handle(fanout.message)', max_attempts => 1, retry_delay => '100 ms'); end $$));
sql(q(select fanout.publish('t', '{"fail": 100}', key => 'k')));
wait_until('(select count(*) from fanout.dead_letter) = 1');
is(sql(q(select fanout.purge('t', consumer_group => 'g'))),
	'1', 'purge() removes a dead letter');
app(q(do $$ begin perform fanout.unsubscribe('t', 'g');
	perform fanout.subscribe('t', 'g', 'handle(fanout.message)', max_attempts => 3, retry_delay => '100 ms'); end $$));

# a repeat
sql('truncate log');
my $id = 'abcdef11-2222-4333-8444-555555555555';
my $skipped = of_subscription('skipped', 't');
$broker->amqp('publish', '--exchange', 't', '--message-id', $id, '--count', 3, '{"n": 1}');
wait_until(qq((select skipped from fanout.stat_subscriptions) = $skipped + 2));
$broker->amqp('publish', '--exchange', 't', '--message-id', $id, '{"n": 1}');
wait_until(qq((select skipped from fanout.stat_subscriptions) = $skipped + 3));
is(sql(q(select count(*), min(message_id::text) from log)),
	"1|$id", 'a repeat is skipped, in the same batch and later');

# other producers
app(q(create table kept (like fanout.message);
	  create function keep(m fanout.message) returns void language sql as $$ insert into kept select m.* $$;
	  select fanout.subscribe('other', 'g', 'keep(fanout.message)', prefetch => 1)));
wait_until(q((select state from fanout.stat_subscriptions where topic = 'other') = 'idle'));
ok($broker->ctl('list_bindings', '-p', $broker->vhost, 'source_name', 'destination_name') =~ /^other\tother_g$/m,
	'a queue that did not exist is declared and bound');
$broker->amqp('publish', '--exchange', 'other', 'no JSON');
$broker->amqp('publish', '--exchange', 'other', 'no JSON');
$broker->amqp('publish', '--exchange', 'other', '--message-id', 'order-17', '{"a": 1}');
$broker->amqp('publish', '--exchange', 'other', '--message-id', 'order-17', '{"a": 2}');
$broker->amqp('publish', '--exchange', 'other', '--message-id', uc $id, '--headers',
	'{"key": 7, "sequence": "x", "nested": {"a": [1, null, {"b": true}]}, "op": "c", "ä": "ö"}', '');
wait_until(q((select count(*) from kept) = 3 and (select skipped from fanout.stat_subscriptions where topic = 'other') = 2));
is( sql(q(select body is null, convert_from(raw, 'UTF8'), key is null, sequence is null, headers, attempt, topic, consumer_group
			from kept where convert_from(raw, 'UTF8') = 'no JSON')),
	't|no JSON|t|t|{}|1|other|g',
	'a body that is not JSON is given as bytes; what is missing is NULL; the repeat is recognised by its content');
is( sql(q(select body from kept where message_id <> 'abcdef11-2222-4333-8444-555555555555' and body is not null)),
	'{"a": 1}', 'a message id that is no UUID tells repeats, too');
is( sql(qq(select body is null, length(raw), key, sequence is null, headers from kept where message_id = '$id')),
	't|0|7|t|{"op": "c", "ä": "ö", "key": 7, "nested": {"a": [1, null, {"b": true}]}, "sequence": "x"}',
	'headers are given as they are, nested ones too, and a key may be an integer');
app(q(select fanout.unsubscribe('other', 'g')));

# a handler of arrays
app(q(create table sizes (n serial, size int, first bigint);
	  create function handle_all(m fanout.message[]) returns void language plpgsql as $$
	  begin
		  insert into sizes (size, first) values (cardinality(m), m[1].sequence);
		  if exists (select from unnest(m) where body ? 'fail') then raise exception 'fails'; end if;
	  end $$));
sql(q(select fanout.declare_binding('many', 'g')));
sql(q(select fanout.publish('many', case when i = 30 then '{"fail": 1}' else '{}' end::jsonb) from generate_series(1, 50) i));
PgFanout::flush($node);
app(q(select fanout.subscribe('many', 'g', 'handle_all(fanout.message[])', retry_delay => '100 ms', max_attempts => 2)));
wait_until(q((select count(*) from fanout.dead_letter where topic = 'many') = 1));
is(sql('select sum(size), bool_or(size > 1) or true from sizes'), '49|t',
	'a handler of arrays is given each message once; one that fails costs only itself');
app(q(select fanout.unsubscribe('many', 'g')));
sql('select fanout.purge()');

# handlers that misbehave: each is one message, with a good one behind it and one of another key
app(q(
create function misbehave(m fanout.message) returns void language plpgsql as $$
begin
	insert into log (message_id, key, sequence, attempt, body) values (m.message_id, m.key, m.sequence, m.attempt, m.body);
	if m.body ->> 'do' = 'hang' then perform pg_sleep(600);
	elsif m.body ->> 'do' = 'hang caught' then
		loop begin perform pg_sleep(600); exception when query_canceled then null; end; end loop;
	elsif m.body ->> 'do' = 'commit' then commit;
	elsif m.body ->> 'do' = 'rollback' then rollback;
	elsif m.body ->> 'do' = 'fatal' then perform pg_terminate_backend(pg_backend_pid()); perform pg_sleep(1);
	elsif m.body ->> 'do' = 'lock' then lock table locked in access exclusive mode;
	elsif m.body ->> 'do' = 'listen' then listen x;
	elsif m.body ->> 'do' = 'deferred' then insert into deferred values (1), (1);
	elsif m.body ->> 'do' = 'cancel' then perform pg_cancel_backend(pg_backend_pid()); perform pg_sleep(600);
	elsif m.body ->> 'do' = 'set' then
		perform set_config('search_path', 'nowhere', false), set_config('synchronous_commit', 'off', false);
	elsif m.body ->> 'do' = 'super' then execute 'reset role; set session authorization postgres';
	end if;
end $$;
create table locked ();
create table deferred (i int unique deferrable initially deferred);
));
sql(q(select fanout.declare_binding('bad', 'g')));
app(q(select fanout.subscribe('bad', 'g', 'misbehave(fanout.message)', max_attempts => 2, retry_delay => '50 ms',
	handler_timeout => '500 ms')));
my $locker = $node->background_psql('postgres');
$locker->query_safe('begin; lock table locked in access share mode;');
my %errors = (
	'hang' => '57014|the handler did not end within its timeout of 500 ms',
	'commit' => '2D000|invalid transaction termination',
	'rollback' => '2D000|invalid transaction termination',
	'fatal' => '57P01|the handler runs, or the worker ended while it did',
	'lock' => '57014|the handler did not end within its timeout of 500 ms',
	'listen' => '0A000|cannot execute LISTEN within a background process',
	'deferred' => '23505|duplicate key value violates unique constraint "deferred_i_key"',
	'super' => '42501|permission denied to set session authorization',
	'hang caught' => '57P01|the handler runs, or the worker ended while it did');
foreach my $what (sort keys %errors)
{
	sql('truncate log');
	sql(qq(select fanout.publish('bad', '{"do": "good"}', key => 'a'), fanout.publish('bad', '{"do": "$what"}', key => 'k'),
			fanout.publish('bad', '{"do": "good"}', key => 'k'), fanout.publish('bad', '{"do": "good"}', key => 'b')));
	wait_until(q((select count(*) from fanout.dead_letter) = 1 and (select count(*) from log) = 3));
	like(sql(q(select sqlstate, split_part(reason, E'\n', 1) from fanout.dead_letter where attempts = 2)),
		qr/^\Q$errors{$what}\E/, "handler that does $what: a failed attempt, and a dead letter at last");
	is(sql(q(select count(*), count(distinct message_id) from log where body ->> 'do' = 'good')),
		'3|3', 'all others ran once');
	sql('select fanout.purge()');
}
$locker->quit;

# what somebody cancels is no attempt
sql('truncate log');
sql(q(select fanout.publish('bad', '{"do": "cancel"}', key => 'k'), fanout.publish('bad', '{"do": "good"}', key => 'k'),
	fanout.publish('bad', '{"do": "good"}', key => 'a')));
# all in one look: while it is tried again, the error is another one
wait_until(q((select string_agg(concat_ws('|', key, attempts, sqlstate, split_part(error, chr(10), 1)), ' ') from fanout.delivery_failure
	where next_try > failed_at + interval '300 ms') = 'k|0|57014|canceling statement due to user request'));
is(sql('select string_agg(key, $$ $$) from log'), 'a', 'a handler that is cancelled again and again: no attempt counts, and only its key waits');
sql('delete from fanout.waiting; select fanout.wake_consumers()');

sql('truncate log');
sql(q(select fanout.publish('bad', '{"do": "set"}'), fanout.publish('bad', '{"do": "good"}')));
wait_until('(select count(*) from log) = 2');
is(sql('select count(*) from fanout.delivery_failure'), '0', 'what a handler sets ends with its call');

# time-outs that come as a call ends: half of the calls are cancelled, a third of those say
# nothing of it; and calls that end without having noticed that they are
sql('select fanout.declare_binding(x, $$g$$) from unnest($${race,late}$$::text[]) x');
app(q(truncate log;
create function race(m fanout.message) returns void language plpgsql as $$
begin
	insert into log (message_id, key, attempt) values (m.message_id, m.key, m.attempt);
	perform pg_sleep(random() * 0.02);
exception when query_canceled then
	if random() < 0.7 then raise; end if;
	insert into log (message_id, key, attempt) values (m.message_id, m.key, m.attempt);
end $$;
create function late(m fanout.message) returns int language plpgsql as $$
begin
	insert into log (message_id, key, attempt) values (m.message_id, 'late', m.attempt);
	return length(rpad('x', 20000000 + m.attempt));
end $$;
select fanout.subscribe(x, 'g', (x || '(fanout.message)')::regprocedure, handler_timeout => '10 ms', max_attempts => 1000, retry_delay => '10 ms', max_retry_delay => '10 ms')
from unnest('{race,late}'::text[]) x));
wait_until(q((select bool_and(connected_to is not null) from fanout.stat_subscriptions where topic in ('race', 'late'))));
my $racing = q(select string_agg(pid || ' ' || reconnects, ' ' order by topic) from fanout.stat_subscriptions where topic in ('race', 'late'));
my $racers = sql($racing);
sql(q(select fanout.publish('race', '{}', key => i::text) from generate_series(1, 150) i; select fanout.publish('late', '{}') from generate_series(1, 5)));
wait_until(q((select count(distinct message_id) from log) = 155 and (select bool_and(waiting = 0 and state = 'idle') from fanout.stat_subscriptions where topic in ('race', 'late'))));
is(sql('select count(*), count(distinct message_id) from log'), '155|155', 'time-outs as calls end: each message is applied once');
is(sql('select count(*) filter (where attempt > 1) > 0, count(*) filter (where attempt = 1) > 0 from log'), 't|t', 'some at the first attempt, some later');
is(sql($racing), $racers, 'by the same workers, over the same connections');
app(q(select fanout.unsubscribe(x, 'g') from unnest('{race,late}'::text[]) x));

# a handler that cannot be used: nothing is consumed, no attempt counts
foreach my $case (
	[ 'dropped', 'drop function misbehave(fanout.message)', 'function public.misbehave does not exist any more',
	  'create function misbehave(m fanout.message) returns void language sql as $$insert into log (body) values (m.body)$$' ],
	[ 'revoked', 'revoke all on function misbehave(fanout.message) from public, app', 'permission denied for function public.misbehave',
	  'grant execute on function misbehave(fanout.message) to app' ],
	[ 'replaced', 'create or replace function misbehave(m fanout.message) returns void language sql as $$insert into log (body, key) values (m.body, $q$new$q$)$$',
	  undef, 'select 1' ])
{
	my ($name, $break, $error, $mend) = @$case;

	sql('truncate log');
	app($break);
	sql(q(select fanout.publish('bad', '{"do": "good"}', key => 'k')));
	if ($error)
	{
		wait_until(q((select state from fanout.stat_subscriptions where topic = 'bad') = 'refused'));
		is(of_subscription('last_error', 'bad'), $error, "handler $name: the state says so");
		wait_until(q((select pid is not null and connected_to is null from fanout.stat_subscriptions where topic = 'bad')));
		is( sql('select count(*) from log') . sql('select count(*) from fanout.delivery_failure') . sql('select count(*) from fanout.dead_letter'),
			'000', 'nothing was handled, and no attempt is counted');
		like(sql(q(select detail from fanout.check() where item = 'subscription of "g" to "bad"' and not ok)),
			qr/^refused: \Q$error\E/, 'check() says so');
	}
	app($mend);
	wait_until('(select count(*) from log) = 1');
	pass("handler $name: it goes on");
}

# a handler that changes while it runs, which it does until a lock is given up: the call goes on as it began
my $holder = PgFanout::session($node);
sql(q(select fanout.declare_binding('swap', 'g')));
app(q(truncate log;
	create function swap(m fanout.message) returns void language plpgsql as $$ begin perform pg_advisory_xact_lock(1); insert into log (key, role) values (m.key, 'old'); end $$;
	select fanout.subscribe('swap', 'g', 'swap(fanout.message)')));
foreach my $case (
	[ 'replaced', q(create or replace function swap(m fanout.message) returns void language plpgsql as
		$$ begin perform pg_advisory_xact_lock(1); insert into log (key, role) values (m.key, 'replaced'); end $$), 'old replaced' ],
	[ 'dropped, and another created', q(begin; drop function swap(fanout.message); create function swap(m fanout.message) returns int language sql as
		$$ insert into log (key, role) select m.key, 'another' from pg_advisory_xact_lock(1); select 1 $$; commit), 'replaced another' ],
	[ 'dropped', 'drop function swap(fanout.message)', 'another' ])
{
	my ($name, $change, $versions) = @$case;

	sql('truncate log');
	PgFanout::run_in($holder, 'select pg_advisory_lock(1)');
	sql(q(select fanout.publish('swap', '{}', key => 'first')));
	wait_until(q(exists (select from pg_stat_activity where backend_type = 'pg_fanout consumer' and wait_event = 'advisory')));
	app($change);
	sql(q(select fanout.publish('swap', '{}', key => 'second')));
	PgFanout::run_in($holder, 'select pg_advisory_unlock(1)');
	wait_until('(select count(*) from log) = ' . scalar(split(/ /, $versions)));
	is(sql(q(select string_agg(role, ' ' order by n) from log)), $versions, "handler $name while it runs: that call ends as it began, the next is of what is there");
}
wait_until(q((select state = 'refused' and last_error ~ 'does not exist any more' from fanout.stat_subscriptions where topic = 'swap')));
app(q(create function swap(m fanout.message) returns void language sql as $$ insert into log (key, role) values (m.key, 'created again') $$));
wait_until('(select count(*) from log) = 2');
is(sql(q(select string_agg(key || ' ' || role, ', ' order by n) from log)), 'first another, second created again', 'once there is one again, it goes on');
is(sql('select count(*) from fanout.delivery_failure') . sql('select count(*) from fanout.dead_letter'), '00', 'none of this is a failed attempt');
app(q(select fanout.unsubscribe('swap', 'g')));
$holder->{harness}->kill_kill;

# attempts are counted across restarts
sql('truncate log');
app(q(select fanout.unsubscribe('t', 'g');
	  select fanout.subscribe('t', 'g', 'handle(fanout.message)', max_attempts => 5, retry_delay => '2 s', max_retry_delay => '2 s')));
sql(q(select fanout.publish('t', '{"fail": 3}', key => 'k'), fanout.publish('t', '{"behind": 1}', key => 'k')));
wait_until('(select attempts from fanout.delivery_failure) >= 1');
$node->restart;
# or it has succeeded already
wait_until(q((select attempts from fanout.delivery_failure) >= 2 or exists (select from log where body ? 'fail')));
sql(q(select pg_terminate_backend(pid) from fanout.stat_subscriptions where topic = 't'));
wait_until('(select count(*) from log where body is not null) = 2');
is(sql('select body, attempt from log order by n'),
	qq({"fail": 3}|4\n{"behind": 1}|1), 'attempts survive restarts of server and worker, and so does the order');

# the next worker ends as soon as it has got something of what the one before had
# at hand: the broker delivers it in another order
sql('truncate log');
app(q(select fanout.unsubscribe('t', 'g');
create function tarry(m fanout.message) returns void language plpgsql as $$ begin perform pg_sleep(0.05); perform handle(m); end $$));
sql(q(select fanout.publish('t', jsonb_build_object('n', i), key => 'k') from generate_series(1, 60) i));
PgFanout::flush($node);
app(q(select fanout.subscribe('t', 'g', 'tarry(fanout.message)', prefetch => 40)));
wait_until('(select count(*) from log) > 0');
sql(q(do $$
declare
	before bigint;
	until timestamptz = clock_timestamp() + interval '20 s';
begin
	select delivered into before from fanout.stat_subscriptions where topic = 't';
	perform pg_terminate_backend(pid, 10000) from fanout.stat_subscriptions where topic = 't';
	while (select delivered from fanout.stat_subscriptions where topic = 't') = before and clock_timestamp() < until loop
		perform pg_sleep(0.002);
	end loop;
	perform pg_terminate_backend(pid) from fanout.stat_subscriptions where topic = 't';
end $$));
wait_until('(select count(*) from log) = 60');
is(sql(q(select string_agg(body ->> 'n', ' ' order by n) from log)), join(' ', 1 .. 60), 'two ends in a row: in order all the same');

# one in 25 fails at first, and those of its key wait behind it
sql('truncate log');
app(q(
create table came (n serial, key text, sequence bigint, attempt int, redelivered boolean);
create function come(m fanout.message) returns void language plpgsql as $$
begin
	if m.attempt = 1 and hashtext(m.message_id::text) % 25 = 0 then raise exception 'one in 25 fails at first'; end if;
	insert into came (key, sequence, attempt, redelivered) values (m.key, m.sequence, m.attempt, m.redelivered);
end $$));
sql(q(select fanout.declare_binding('room', 'g')));
app(q(select fanout.subscribe('room', 'g', 'come(fanout.message)', prefetch => 40, retry_delay => '100 ms', max_retry_delay => '200 ms')));
sql(q(select fanout.publish('room', '1', key => (random() * 40)::int::text) from generate_series(1, 500))) foreach 1 .. 6;
wait_until('(select count(*) from came) = 3000');
is(sql(q(select count(distinct sequence), count(*) filter (where redelivered) from came)), '3000|0',
	'what waits is not delivered again');
is(sql(q(select count(*) from (select sequence < lag(sequence) over (partition by key order by n) as wrong from came) x where wrong)), '0', 'and all in order');
app(q(select fanout.unsubscribe('room', 'g')));

# the one that ends the worker comes after as many that wait
sql('truncate log');
app(q(
create function wait_or_end(m fanout.message) returns void language plpgsql as $$
begin
	insert into log (body) values (m.body);
	if m.body ? 'fail' then raise exception 'fails'; end if;
	if m.body ? 'end' then perform pg_terminate_backend(pg_backend_pid()); perform pg_sleep(1); end if;
end $$;
));
sql(q(select fanout.declare_binding('end', 'g')));
sql(q(select fanout.publish('end', case i when 1 then '{"fail": 1}' when 10 then '{"end": 1}' else '{}' end::jsonb, key => case i when 10 then 'other' else 'k' end)
	from generate_series(1, 10) i));
PgFanout::flush($node);
my $offset = -s $node->logfile;
app(q(select fanout.subscribe('end', 'g', 'wait_or_end(fanout.message)', prefetch => 2, retry_delay => '1 min')));
wait_until(q(exists (select from fanout.delivery_failure where key = 'other' and sqlstate = '57P01')));
sql(q(select fanout.publish('end', '{"n": 1}', key => 'another')));
wait_until(q(exists (select from log where body ? 'n')));
is(sql('select key, attempts from fanout.delivery_failure order by key'), "k|1\nother|1", 'what ends the worker is found among many that wait');
is(scalar(() = slurp_file($node->logfile, $offset) =~ /FATAL:  terminating background worker "pg_fanout consumer"/g), 2, 'when it does so again');
app(q(select fanout.unsubscribe('end', 'g')));

# the queue goes away
sql('truncate log');
$broker->ctl('delete_queue', '-p', $broker->vhost, 't_g');
wait_until(q((select state in ('idle', 'consuming') from fanout.stat_subscriptions where topic = 't')));
PgFanout::poll(sub { $broker->ctl('list_queues', '-p', $broker->vhost, 'name', 'consumers') =~ /^t_g\t1$/m }, 'the queue is consumed again');
sql(q(select fanout.publish('t', '{"n": 1}')));
wait_until('(select count(*) from log) = 1');
pass('a queue that was deleted is declared and consumed again');

# the end
app(q(select fanout.unsubscribe('t', 'g'), fanout.unsubscribe('bad', 'g')));
wait_until(q(not exists (select from pg_stat_activity where backend_type = 'pg_fanout consumer')));
pass('an unsubscribed worker ends');

done_testing();
