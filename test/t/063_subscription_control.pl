# What an operator can do with a subscription: try now what waits, give a message
# up, stop it and let it go on, change it, and end it together with its queue; and
# nothing of that costs attempts, order or messages.

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

sql(q(
create table log (n serial, message_id uuid, key text, body jsonb, attempt int);
create function apply(m fanout.message) returns void language plpgsql as $$
begin
	if m.attempt <= (m.body ->> 'fail')::int then raise exception 'attempt %', m.attempt; end if;
	insert into log (message_id, key, body, attempt) values (m.message_id, m.key, m.body, m.attempt);
end $$;
select fanout.declare_binding('t', 'g');
select fanout.subscribe('t', 'g', 'apply(fanout.message)', retry_delay => '1 h', max_retry_delay => '1 h')));

# ---- retry ----

publish('a', 1, 1);
publish('a', 2);
publish('b', 3, 2);
wait_until(q((select count(*) = 2 from fanout.delivery_failure) and (select waiting = 3 from fanout.stat_subscriptions)));
my $a = sql(q(select message_id from fanout.delivery_failure where key = 'a'));
sql(q(create function suppress() returns trigger language plpgsql as 'begin return null; end';
	create trigger stay before delete on fanout.waiting for each row execute function suppress()));
sql("select fanout.retry('t', 'g', '$a')");
wait_until(q((select attempts = 2 and error ~ 'changed 0 rows instead of 1' from fanout.delivery_failure where key = 'a')));
is(log_of(), '', 'a message that cannot be removed from where it waits is not applied');
sql(q(drop trigger stay on fanout.waiting));
is(sql("select fanout.retry('t', 'g', '$a')"), 1, 'retry() of a message');
wait_until(q((select count(*) = 2 from log)));
is(log_of(), 'a1 a2', 'tries it now, and those behind it follow');
is(sql(q(select fanout.retry('t', 'g'))), 1, 'retry() of all that wait');
wait_until(q((select attempts = 2 from fanout.delivery_failure where key = 'b')));
pass('which is an attempt as any');

# ---- skip ----

publish('b', 4);
wait_until(q((select waiting = 2 from fanout.stat_subscriptions)));
my $b = sql(q(select message_id from fanout.delivery_failure where key = 'b'));
# a message that cannot get where skip() puts it stays where it is
foreach my $table (qw(dead_letter inbox_0))
{
	sql("create trigger away before insert on fanout.$table for each row execute function suppress()");
	like(error("select fanout.skip('t', 'g', '$b')"), qr/changed 0 rows instead of 1/, "skip() fails that cannot write to $table");
	is(sql("select count(*) from fanout.waiting where message_id = '$b'"), 1, 'and the message waits');
	sql("drop trigger away on fanout.$table");
}
sql("select fanout.skip('t', 'g', '$b')");
wait_until(q((select count(*) = 3 from log)));
is(log_of(), 'a1 a2 b4', 'skip() gives a message up, and those behind it go on');
is(sql(q(select message_id, attempts, sqlstate, payload::jsonb from fanout.dead_letter)), qq($b|2|P0001|{"n": 3, "fail": 2}), 'it is a dead letter, with its error');
$broker->amqp('publish', '--routing-key', 't_g', '--message-id', $b, '{"n": 3}');
wait_until(q((select skipped = 1 from fanout.stat_subscriptions)));
is(log_of(), 'a1 a2 b4', 'and a repeat of it is skipped');
like(error("select fanout.skip('t', 'g', '$b')"), qr/message $b does not wait/, 'what does not wait cannot be skipped');

# a transaction that stays open after skip() or retry() stops nobody else
publish('x', 10, 1);
publish('x', 11);
wait_until(q((select waiting = 2 from fanout.stat_subscriptions)));
my $x = sql(q(select message_id from fanout.delivery_failure where key = 'x'));
my $session = $node->background_psql('postgres');
$session->query_safe("begin; select fanout.retry('t', 'g'); select fanout.skip('t', 'g', '$x')");
sql(q(select fanout.retry('t', 'g', gen_random_uuid())));
publish('y', 12);
wait_until(q((select count(*) = 4 from log)));
is(log_of(), 'a1 a2 b4 y12', 'while skip() is not committed, other keys go on, and its own waits');
$session->query_safe('rollback');
$session->quit;
sql(q(select fanout.retry('t', 'g')));
wait_until(q((select count(*) = 6 from log)));
is(log_of(), 'a1 a2 b4 y12 x10 x11', 'if it is rolled back, the message is tried, and before those behind it');
sql(q(delete from log where key in ('x', 'y')));

# ---- pause and resume ----

publish('c', 5, 1);
publish('c', 6);
wait_until(q((select waiting = 2 from fanout.stat_subscriptions)));
sql(q(select fanout.pause('t', 'g')));
wait_until(q((select state = 'paused' and pid is null from fanout.stat_subscriptions)));
publish('d', 7);
PgFanout::flush($node);
sleep 1;
is(log_of() . '|' . $broker->count('t_g'), 'a1 a2 b4|1', 'a paused subscription takes nothing from its queue');
is(sql(q(select attempts from fanout.delivery_failure)), 1, 'what waits keeps its attempts');
like(sql(q(select detail from fanout.check() where item = 'subscription of "g" to "t"' and not ok)), qr/^paused$/, 'check() says so');
is(sql(q(select count(*) from fanout.topics where paused)), 0, 'the topic is not paused');
sql(q(select fanout.resume('t', 'g')));
wait_until(q((select count(*) = 4 from log)));
is(log_of(), 'a1 a2 b4 d7', 'resume() lets it go on');
is(sql(q(select attempts from fanout.delivery_failure)), 1, 'and what waits still waits');

# ---- alter ----

sql(q(create function other(m fanout.message) returns void language sql as $$ insert into log (key, body) values ('other', m.body) $$;
	select fanout.alter_subscription('t', 'g', handler => 'other(fanout.message)', retry_delay => '100 ms', prefetch => 7)));
is(sql(q(select handler, prefetch, retry_delay, max_retry_delay, max_attempts from fanout.subscriptions)), 'public.other(fanout.message)|7|00:00:00.1|01:00:00|10',
	'alter_subscription() changes what is given, and nothing else');
sql(q(select fanout.retry('t', 'g')));
wait_until(q((select count(*) = 6 from log)));
is(log_of(), 'a1 a2 b4 d7 other5 other6', 'what waited goes to the new handler, in order');
like(error(q(select fanout.alter_subscription('t', 'g', prefetch => 0))), qr/prefetch must be between/, 'an option that is not valid is refused');
like(error(q(select fanout.alter_subscription('t', 'nobody'))), qr/is not subscribed/, 'and so is an unknown subscription');

# ---- unsubscribe ----

sql(q(select fanout.alter_subscription('t', 'g', handler => 'apply(fanout.message)', retry_delay => '1 h')));
publish('e', 8, 1);
wait_until(q((select waiting = 1 from fanout.stat_subscriptions)));
sql(q(select fanout.unsubscribe('t', 'g')));
like(error(q(select fanout.skip('t', 'g', gen_random_uuid()))), qr/is not subscribed/, 'a subscription that has ended is none');
sql(q(select fanout.subscribe('t', 'g', 'other(fanout.message)')));
wait_until(q((select count(*) = 7 from log)));
is(log_of(), 'a1 a2 b4 d7 other5 other6 other8', 'what waited when it ended is applied when it is made again');
like(error(q(select fanout.unsubscribe('t', 'g', drop_queue => true))), qr/queue "t_g" is declared in this database/, 'a queue that a binding has declared is not dropped by unsubscribe()');
sql(q(select fanout.subscribe('elsewhere', 'g', 'other(fanout.message)')));
wait_until(q((select state = 'idle' from fanout.stat_subscriptions where topic = 'elsewhere')));
like(sql(q(select hint from fanout.check() where item = 'subscription of "g" to "elsewhere" has a topic')), qr/name of the topic/,
	'check() tells of a queue that did not exist');
$broker->amqp('publish', '--exchange', 'elsewhere', '{"n": 9}');
wait_until(q((select count(*) = 8 from log)));
is(sql(q(select count(*) from fanout.check() where item ~ 'has a topic')), 0, 'until something comes from it');
sql(q(select fanout.unsubscribe('elsewhere', 'g', drop_queue => true)));
PgFanout::poll(sub { $broker->ctl('list_queues', '-p', $broker->vhost, 'name') !~ /^elsewhere_g$/m }, 'the queue is gone');
pass('unsubscribe(drop_queue) deletes the queue');
PgFanout::poll(sub { sql(q(select count(*) from pg_stat_activity where backend_type = 'pg_fanout consumer')) == 1 }, 'the worker has ended');
pass('and its worker ends');

sql(q(select fanout.declare_topic('alone'); select fanout.subscribe('alone', 'g', 'other(fanout.message)')));
wait_until(q((select state = 'idle' from fanout.stat_subscriptions where topic = 'alone')));
is(sql(q(select count(*) from fanout.check() where item = 'topic "alone" has a consumer group')), 0, 'check() knows that subscribe() alone binds a queue');

done_testing();

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub error
{
	my ($sql) = @_;
	my $stderr = '';

	$node->psql('postgres', $sql, stderr => \$stderr);
	return $stderr;
}

sub publish
{
	my ($key, $n, $fail) = @_;

	sql(sprintf(q(select fanout.publish('t', '{"n": %d%s}', key => '%s')), $n, $fail ? qq(, "fail": $fail) : '', $key));
	return;
}

sub log_of { return sql(q(select string_agg(key || (body ->> 'n'), ' ' order by n) from log)); }

sub wait_until
{
	my ($condition) = @_;

	$node->poll_query_until('postgres', "select coalesce($condition, false)")
	  or die "not so: $condition\n" . sql('select * from fanout.stat_subscriptions; select * from fanout.delivery_failure limit 20; select * from log');
	return;
}
