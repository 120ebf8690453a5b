# The waiting room, while somebody else changes it: whoever skips, retries, locks or
# restarts in whatever order, the first message of a key is tried in the end, and what
# cannot be written keeps back nobody else.

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
max_worker_processes = 30
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub told
{
	return sql('select s.topic, w.key, payload, attempts, next_try - now(), error from fanout.waiting w join fanout.subscription s using (subscription_id)')
	  . sql('select topic, state, waiting, last_error from fanout.stat_subscriptions');
}

sub wait_for
{
	my ($condition, $what) = @_;

	PgFanout::poll(sub { sql("select coalesce($condition, false)") eq 't' }, sub { "$what: " . told() });
	return;
}

sub id
{
	my ($topic, $n) = @_;

	return sql("select message_id from fanout.waiting join fanout.subscription using (subscription_id)
		where topic = '$topic' and payload::jsonb ->> 'n' = '$n'");
}

sub skipping { return "select fanout.skip('$_[0]', 'g', '" . id(@_) . "')"; }

sql(q(
create table log (topic text, n int);
create table bad (topic text, n int);
create function handle(m fanout.message) returns void language plpgsql as $$
begin
	if exists (select from public.bad where topic = m.topic and n = (m.body ->> 'n')::int) then
		raise 'bad';
	end if;
	insert into public.log values (m.topic, (m.body ->> 'n')::int);
end $$;
create sequence tries;
create function fail_at_the_end() returns trigger language plpgsql as $$
begin
	if nextval('public.tries') = 1 then
		raise 'bad at the end';
	end if;
	return null;
end $$;
create constraint trigger at_the_end after insert on log deferrable initially deferred
	for each row when (new.topic = 'undone' and new.n = 2) execute function fail_at_the_end();
));

# Message 1 of key K fails, 2 and 3 are behind it; 0 of another key fails, so that something is
# due, in an hour.
sub make_room
{
	my ($topic) = @_;

	sql(qq(
insert into bad values ('$topic', 0), ('$topic', 1);
select fanout.declare_binding('$topic', 'g');
select fanout.subscribe('$topic', 'g', 'handle(fanout.message)', retry_delay => '1 h', max_retry_delay => '1 h');
select fanout.publish('$topic', jsonb_build_object('n', i), key => 'K') from generate_series(1, 3) i;
select fanout.publish('$topic', '{"n": 0}', key => 'other')));
	wait_for("(select waiting = 4 from fanout.stat_subscriptions where topic = '$topic')", 'four messages wait');
	return;
}

sub applied
{
	my ($topic, $n, $what) = @_;

	wait_for("(select count(*) = 1 from log where topic = '$topic' and n = $n)", $what);
	pass($what);
	return;
}

my $session = PgFanout::session($node);

# ---- what others have locked ----

make_room('locked');
PgFanout::run_in($session, 'begin; ' . skipping('locked', 2));
sql(q(delete from bad where topic = 'locked' and n = 1; select fanout.retry('locked', 'g')));
applied('locked', 1, 'the first message is applied while the next one is locked');
PgFanout::run_in($session, 'rollback');
applied('locked', 3, 'and what was locked is made due after that');

# ---- two that skip at once ----

make_room('two');
my $first = skipping('two', 1);
my $other = PgFanout::session($node);
PgFanout::run_in($session, 'begin; ' . skipping('two', 2));
$other->{in} .= "$first;\n\\echo done\n";
$other->{harness}->pump_nb;
wait_for(q(exists (select from pg_stat_activity where wait_event_type = 'Lock' and query ~ 'skip')), 'the other one waits');
PgFanout::run_in($session, 'commit');
$other->{harness}->pump until $other->{out} =~ /^done/m;
applied('two', 3, 'the message behind two that two sessions have skipped is applied');

# ---- a worker that begins anew meanwhile ----

make_room('restart');
PgFanout::run_in($session, 'begin; ' . skipping('restart', 2));
sql(q(delete from bad where topic = 'restart' and n = 1; select fanout.retry('restart', 'g')));
wait_for(q((select count(*) = 1 from log where topic = 'restart')), 'the first');
sql(q(select fanout.pause('restart', 'g')));
wait_for(q((select state = 'paused' from fanout.stat_subscriptions where topic = 'restart')), 'paused');
sql(q(select fanout.resume('restart', 'g')));
wait_for(q((select state = 'idle' from fanout.stat_subscriptions where topic = 'restart')), 'idle');
PgFanout::run_in($session, 'rollback');
applied('restart', 3, 'the message that was locked while the worker began anew is made due');

# ---- an attempt that is undone at its end ----

make_room('undone');
# begins after a clean end, so that messages are tried together
my $old = sql(q(select pid from fanout.stat_subscriptions where topic = 'undone' and pg_terminate_backend(pid)));
wait_for("(select state = 'idle' and pid <> $old from fanout.stat_subscriptions where topic = 'undone')", 'another worker');
PgFanout::run_in($session, 'begin; ' . skipping('undone', 2));
sql(q(delete from bad where topic = 'undone' and n = 1; select fanout.retry('undone', 'g')));
wait_for(q((select count(*) = 1 from log where topic = 'undone')), 'the first');
PgFanout::run_in($session, 'rollback');
applied('undone', 3, 'messages that were made due are so although the transaction was undone');

# ---- a message that is skipped while its repeat is looked up ----

make_room('repeat');
my $id = id('repeat', 1);
my $skip = skipping('repeat', 1);
# of a subscription that asks the table: as is left of a message that was given back
sql(q(insert into fanout.waiting (subscription_id, place, barrier, message_id, headers, redelivered, attempts, postponed, next_try, requeued)
	select subscription_id, 0, false, gen_random_uuid(), '{}', false, 1, 0, now(), true from fanout.subscription where topic = 'repeat';
	delete from bad where topic = 'repeat' and n = 1));
my $pid = sql(q(select pid from fanout.stat_subscriptions where topic = 'repeat' and pg_terminate_backend(pid)));
wait_for("(select state = 'idle' and pid <> $pid from fanout.stat_subscriptions where topic = 'repeat')", 'another worker');
$pid = sql(q(select pid from fanout.stat_subscriptions where topic = 'repeat'));
PgFanout::run_in($session, 'begin; lock table fanout.waiting in access exclusive mode');
$broker->amqp('publish', '--routing-key', 'repeat_g', '--message-id', $id, '--headers', '{"key": "K"}', '{"n": 1}');
wait_for("(select wait_event_type = 'Lock' from pg_stat_activity where pid = $pid)", 'the worker waits for the lock');
PgFanout::run_in($session, "$skip; commit");
applied('repeat', 3, 'what was behind it is applied');
is(sql(q(select count(*) from log where topic = 'repeat' and n = 1)), '0', 'what was skipped is not applied when it comes again');

# ---- what cannot be written ----

make_room('unwritable');
# as if it had been applied: it cannot be given up
sql(q(select fanout.alter_subscription('unwritable', 'g', max_attempts => 2, retry_delay => '1 s', max_retry_delay => '5 s');
	insert into fanout.inbox (segment, inbox_id, message_id)
	select r.current, s.inbox_id, w.message_id from fanout.waiting w join fanout.subscription s using (subscription_id), fanout.inbox_rotation r
	where s.topic = 'unwritable' and w.payload::jsonb ->> 'n' = '1'));
sql(q(select fanout.retry('unwritable', 'g')));
wait_for(q(exists (select from fanout.delivery_failure where topic = 'unwritable' and error ~ 'duplicate key')), 'the error is shown');
my $before = sql(q(select pg_stat_get_db_xact_rollback(oid) from pg_database where datname = 'postgres'));
sql(q(insert into bad values ('unwritable', 7); select fanout.publish('unwritable', '{"n": 7}', key => 'seven')));
wait_for(q(exists (select from fanout.delivery_failure where topic = 'unwritable' and key = 'seven')), 'another one fails');
sql(q(delete from bad where n = 7; select fanout.retry('unwritable', 'g', message_id) from fanout.delivery_failure where key = 'seven'));
applied('unwritable', 7, 'a message that cannot be given up keeps back no other');
sleep 3;
cmp_ok(sql(q(select pg_stat_get_db_xact_rollback(oid) from pg_database where datname = 'postgres')) - $before, '<', 100, 'and is tried at pauses');

# ---- one that is late, behind one that fails for another reason at the second try ----

sql(q(
create function slow(m fanout.message) returns void language plpgsql as $$
begin
	if m.key = 'slow' then
		perform pg_sleep(60);
	elsif exists (select from public.bad where topic = m.topic) then
		raise 'bad by now';
	end if;
end $$;
select fanout.declare_binding('late', 'g');
select fanout.subscribe('late', 'g', 'slow(fanout.message)', retry_delay => '1 h', max_retry_delay => '1 h', handler_timeout => '3 s')));
wait_for(q((select state = 'idle' from fanout.stat_subscriptions where topic = 'late')), 'idle');
sql(q(select fanout.pause('late', 'g')));
wait_for(q((select state = 'paused' from fanout.stat_subscriptions where topic = 'late')), 'paused');
sql(q(select fanout.publish('late', '{}', key => 'quick'), fanout.publish('late', '{}', key => 'slow')));
PgFanout::flush($node);
sql(q(select fanout.resume('late', 'g')));
wait_for(q(exists (select from pg_stat_activity where wait_event = 'PgSleep' and backend_type = 'pg_fanout consumer')), 'the slow one');
sql(q(insert into bad values ('late', 0)));
wait_for(q((select count(*) = 2 from fanout.delivery_failure where topic = 'late')), 'both have failed');
like(sql(q(select error from fanout.delivery_failure where topic = 'late' and key = 'quick')), qr/bad by now/, 'the quick one has failed when both were tried again');
like(sql(q(select error from fanout.delivery_failure where topic = 'late' and key = 'slow')), qr/did not end within/, 'the other one was too slow, and is told so');

done_testing();
