# What somebody does to a subscription at the very moment at which its worker is at the same
# messages: locks what is due, ends the worker while a dead letter is tried again, or drops
# the queue while a batch is committed.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 24
));

my $unfinished = 'the handler runs, or the worker ended while it did';

sql(q(
create table log (n serial, topic text, key text, body jsonb, attempt int);
create table hold (topic text);
create table failing (topic text);
create table emptied (id int primary key);
create function apply(m fanout.message) returns void language plpgsql as $$
begin
	if m.attempt <= (m.body ->> 'fail')::int or exists (select from failing where topic = m.topic) then raise exception 'attempt %', m.attempt; end if;
	if exists (select from hold where topic = m.topic) then perform pg_sleep(60); end if;
	if m.body ? 'do' then execute m.body ->> 'do'; end if;
	insert into log (topic, key, body, attempt) values (m.topic, m.key, m.body, m.attempt);
end $$));

# ---- somebody has locked what is due ----

subscribe('due', q(retry_delay => '1 s', max_retry_delay => '1 s', max_attempts => 1000));
sql(q(insert into failing values ('due')));
publish('due', 'a', '{}');
pause_once('due', 1);
my $locker = transaction(q(select fanout.skip('due', 'g', message_id) from fanout.waiting));
sql(q(delete from failing; select fanout.resume('due', 'g')));
ok(soon(q((select next_try < clock_timestamp() - interval '1 s' from fanout.waiting) and (select state = 'idle' from fanout.stat_subscriptions where topic = 'due'))),
	'a message is due, and in the hands of a transaction that skips it');
ok(is_calm('due'), 'the worker does not look for it all the time');
publish('due', 'b', '{"fail": 1}');
ok(soon(q((select attempt = 2 from log where topic = 'due'))), 'another message fails, and is tried again meanwhile');
ok(is_calm('due'), 'and the worker waits on');
end_transaction($locker, 'rollback');
ok(soon(q((select count(*) = 2 from log where topic = 'due'))), 'once that transaction is undone, the message is tried');
end_of('due');

# skip() of a TRUNCATE makes those behind it due, whatever else they wait for
subscribe('behind', q(retry_delay => '1 h', max_retry_delay => '1 h'));
publish('behind', 'a', '{"fail": 1}');
empty_table('behind');
publish('behind', 'a', '{"n": 2}');
pause_once('behind', 3);
skip_truncate('behind');
$locker = transaction(q(select fanout.skip('behind', 'g', message_id) from fanout.waiting where payload::jsonb ->> 'n' = '2'));
sql(q(select fanout.resume('behind', 'g')));
publish('behind', 'b', '{}');
ok(soon(q((select key = 'b' from log where topic = 'behind'))), 'a message that is due and locked, but has to wait for another one, keeps nobody waiting');
ok(is_calm('behind'), 'nor the worker busy');
end_transaction($locker, 'rollback');
sql(q(select fanout.retry('behind', 'g')));
ok(soon(q((select count(*) = 3 from log where topic = 'behind'))), 'it is applied in the end');
is(log_of('behind', 'a'), ' 2', 'behind the other one');
end_of('behind');

# ---- what the error of a message says while it is tried again ----

# it is due again in a second, so what holds its second attempt is there before the first
sql(q(insert into hold values ('again')));
subscribe('again', q(retry_delay => '1 s', max_retry_delay => '1 s'));
publish('again', 'a', '{"fail": 1}');
ok(soon(q((select error ~ '\mattempt 1\M' from fanout.delivery_failure))), 'a message has failed');
ok(handler_sleeps(), 'it is tried again');
like(sql('select error from fanout.delivery_failure'), qr/^$unfinished; before that: attempt 1\b/, 'its error says so, and what it was before');
end_worker('again');
ok(soon(q((select attempts = 3 from fanout.delivery_failure))) && handler_sleeps(), 'so is it by the next worker');
like(sql('select error from fanout.delivery_failure'), qr/^$unfinished; before that: attempt 1\b(?!.*before that)/s, 'the error says it once');
sql('delete from hold');
end_worker('again');
ok(soon(q((select count(*) = 1 from log where topic = 'again'))), 'it is applied in the end');
end_of('again');

# ---- the worker ends while a dead letter is tried again ----

subscribe('dead', 'max_attempts => 1');
publish('dead', 'a', '{"fail": 1}');
ok(soon(q((select count(*) = 1 from fanout.dead_letter where topic = 'dead'))), 'a message is a dead letter');
redrive_and_end();
ok(soon(q((select count(*) = 1 from log where topic = 'dead'))), 'redrive() is not forgotten when the worker ends: the message is tried by the next one');
is(sql(q(select count(*) from fanout.dead_letter where topic = 'dead')), 0, 'and is no dead letter any more');

publish('dead', 'b', q({"fail": 1, "do": "select pg_terminate_backend(pg_backend_pid())"}));
ok(soon(q((select count(*) = 1 from fanout.dead_letter where topic = 'dead'))), 'another one will end each worker that tries it');
sql(q(select fanout.redrive('dead')));
ok(soon(q((select redriven_at is null and sqlstate = '57P01' from fanout.dead_letter where topic = 'dead'))), 'it is redriven, and given up');
is(sql(q(select attempts from fanout.dead_letter where topic = 'dead')), 3, 'after it has ended two workers');
sql(q(select fanout.purge()));

publish('dead', 'c', '{"fail": 1}');
ok(soon(q((select count(*) = 1 from fanout.dead_letter where topic = 'dead'))), 'one more dead letter');
sql(q(select fanout.pause('dead', 'g'), fanout.redrive('dead')));
$locker = transaction('select from fanout.dead_letter for update');
sql(q(select fanout.resume('dead', 'g')));
publish('dead', 'd', '{}');
ok(soon(q((select count(*) = 2 from log where topic = 'dead'))), 'is locked when the worker looks for it');
sleep 0.5;
end_transaction($locker, 'rollback');
ok(soon(q((select count(*) = 3 from log where topic = 'dead'))), 'and is tried once it is not');
end_of('dead');

# ---- a queue is dropped while a batch is committed ----

sql(q(set client_min_messages = warning; select fanout.subscribe('dropped', 'g', 'apply(fanout.message)', retry_delay => '1 h', max_retry_delay => '1 h')));
ok(soon(q((select state = 'idle' from fanout.stat_subscriptions where topic = 'dropped'))), 'a subscription that has declared its queue');
$locker = transaction(q(select fanout.unsubscribe('dropped', 'g', drop_queue => true)));
$broker->amqp('publish', '--exchange', 'dropped', '{"fail": 1}');
ok(soon(q((select count(*) = 1 from fanout.waiting))), 'while it is ended, a message fails');
end_transaction($locker, 'commit');
ok(soon(q((select not drop_queue from fanout.subscription where topic = 'dropped'))), 'then its queue is dropped');
is(sql(q(select count(*) from fanout.waiting)), 0, 'and nothing of it waits');

done_testing();

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub soon { return PgFanout::soon($node, $_[0], 60); }

# A transaction that stays open, in a session of its own.
sub transaction
{
	my ($sql) = @_;
	my $session = PgFanout::session($node);

	PgFanout::run_in($session, "begin; $sql");
	return $session;
}

sub end_transaction
{
	my ($session, $how) = @_;

	PgFanout::run_in($session, $how);
	$session->{harness}->finish;
	return;
}

sub subscribe
{
	my ($topic, $options) = @_;

	sql("select fanout.declare_binding('$topic', 'g'); select fanout.subscribe('$topic', 'g', 'apply(fanout.message)', $options)");
	return;
}

sub publish
{
	my ($topic, $key, $body) = @_;

	sql("select fanout.publish('$topic', \$body\$$body\$body\$, key => '$key')");
	return;
}

# A TRUNCATE waits for all that is before it, and all for it.
sub empty_table
{
	my ($topic) = @_;

	sql("select fanout.capture('emptied', '$topic'); truncate emptied; select fanout.uncapture('emptied')");
	return;
}

sub skip_truncate
{
	my ($topic) = @_;

	sql("select fanout.skip('$topic', 'g', message_id) from fanout.waiting where barrier");
	return;
}

sub pause_once
{
	my ($topic, $n) = @_;

	ok(soon("(select count(*) = $n from fanout.waiting)"), "$n messages wait");
	sql("select fanout.pause('$topic', 'g')");
	ok(soon("(select pid is null from fanout.stat_subscriptions where topic = '$topic')"), 'the subscription is paused');
	return;
}

# Ends the worker in the handler of a dead letter.
sub redrive_and_end
{
	sql(q(insert into hold values ('dead'); select fanout.redrive('dead')));
	ok(handler_sleeps(), 'it is redriven');
	like(sql(q(select reason from fanout.dead_letter where topic = 'dead')), qr/^$unfinished; before that: attempt 1\b/, 'the reason says so meanwhile, and what it was');
	sql('delete from hold');
	end_worker('dead');
	return;
}

sub end_worker
{
	my ($topic) = @_;

	sql("select pg_terminate_backend(pid) from fanout.stat_subscriptions where topic = '$topic'");
	return;
}

sub handler_sleeps
{
	return soon(q(exists (select from pg_stat_activity where backend_type = 'pg_fanout consumer' and wait_event = 'PgSleep')));
}

# Does the worker rest most of the time?  What it waits for the processor is no rest, so one
# that rests may seem busy while the machine is, but not each time.
sub is_calm
{
	my ($topic) = @_;
	my $pid = sql("select pid from fanout.stat_subscriptions where topic = '$topic'");

	foreach (1 .. 5)
	{
		my ($since, $before) = (time, busy($pid));

		sleep 2;
		my $share = (busy($pid) - $before) / (time - $since);
		note(sprintf('busy for %.2f of the time', $share));
		return 1 if $share < 0.7;
	}
	return 0;
}

# Seconds that a process has run for, or would have if it had got the processor.
sub busy
{
	my ($pid) = @_;
	my ($ran, $waited) = split(/ /, slurp_file("/proc/$pid/schedstat"));

	return ($ran + $waited) / 1e9;
}

sub log_of
{
	my ($topic, $key) = @_;

	return sql("select string_agg(coalesce(body ->> 'n', ''), ' ' order by n) from log where topic = '$topic' and key = '$key'");
}

sub end_of
{
	my ($topic) = @_;

	sql("select fanout.unsubscribe('$topic', 'g'); truncate log; delete from fanout.waiting");
	return;
}
