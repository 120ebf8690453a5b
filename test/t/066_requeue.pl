# on_failure => 'requeue': a message that failed is given back to its queue when its
# next attempt is due, for whichever instance of the group takes it; its attempts
# are counted, and nothing else waits for it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, extension => 0, conf => q(
log_statement = none
max_worker_processes = 24
));

$node->safe_psql('postgres', "create database $_") foreach qw(b c);
foreach my $database (qw(b c))
{
	sql($database, 'create extension pg_fanout');
	sql($database, q(
set client_min_messages = warning;
create table log (n serial, message_id uuid, body jsonb, attempt int, redelivered boolean);
create function apply(m fanout.message) returns void language plpgsql as $$
begin
	if m.body ->> 'fails' ~ current_database() then raise exception 'attempt %', m.attempt; end if;
	insert into log (message_id, body, attempt, redelivered) values (m.message_id, m.body, m.attempt, m.redelivered);
end $$));
}
sql('b', q(select fanout.declare_binding('t', 'g')));
my $subscribe = q(select fanout.subscribe('t', 'g', 'apply(fanout.message)', ordered => false, on_failure => 'requeue',
	retry_delay => '1 s', max_retry_delay => '1 s', max_attempts => 3, prefetch => %d));

# ---- alone ----

# so long that each attempt is seen
my $patiently = $subscribe =~ s/1 s/4 s/gr;
sql('b', sprintf($patiently, 10));
wait_until('b', q((select state = 'idle' from fanout.stat_subscriptions)));
sql('b', q(select fanout.publish('t', '{"fails": "b"}', key => 'k'), fanout.publish('t', '{"n": 1}', key => 'k')));
wait_until('b', 'exists (select from log)');
is(sql('b', 'select count(*), max(attempts) from fanout.delivery_failure'), '1|1', 'a message that failed does not keep later ones of its key');
is(sql('b', q(select waiting from fanout.stat_subscriptions)), '0', 'and is not in the waiting room');
wait_until('b', q((select count(*) = 1 from fanout.dead_letter)));
is(sql('b', 'select attempts, payload::jsonb from fanout.dead_letter'), '3|{"fails": "b"}', 'its attempts are counted, and it is given up after the last');
PgFanout::poll(sub { unacked() == 0 }, 'none unacked');
is(sql('b', 'select count(*) from fanout.waiting'), '0', 'then it is neither known nor in the queue any more');
sql('b', q(select fanout.purge()));

# attempts are remembered by the next worker
sql('b', q(select fanout.publish('t', '{"fails": "b"}')));
wait_until('b', q((select attempts = 2 from fanout.delivery_failure)));
sql('b', q(select pg_terminate_backend(pid) from fanout.stat_subscriptions));
wait_until('b', q((select count(*) = 1 from fanout.dead_letter)));
is(sql('b', 'select attempts from fanout.dead_letter'), '3', 'attempts survive the worker');
sql('b', q(select fanout.purge()));

# the connection is lost while it is held: the broker delivers it at once
sql('b', q(select fanout.alter_subscription('t', 'g', retry_delay => '5 s', max_retry_delay => '5 s')));
wait_until('b', q((select state = 'idle' from fanout.stat_subscriptions)));
sql('b', q(select fanout.publish('t', '{"fails": "b"}')));
foreach my $attempt (1, 2)
{
	wait_until('b', qq((select attempts = $attempt from fanout.delivery_failure)));
	my $due = sql('b', 'select next_try from fanout.delivery_failure');

	if ($attempt == 1)
	{
		sql('b', q(select pg_terminate_backend(pid) from fanout.stat_subscriptions));
	}
	else
	{
		$broker->ctl('close_all_connections', '-p', $broker->vhost, 'test');
	}
	sql('b', q(select fanout.publish('t', '{"n": 2}')));
	wait_until('b', q(exists (select from log where body ->> 'n' = '2')));
	sql('b', q(delete from log where body ->> 'n' = '2'));
	wait_until('b', 'exists (select from ' . ($attempt == 1 ? 'fanout.delivery_failure where attempts = 2' : 'fanout.dead_letter') . ')');
	is(sql('b', $attempt == 1 ? qq(select failed_at >= '$due' from fanout.delivery_failure) : qq(select dead_at >= '$due' from fanout.dead_letter)), 't',
		$attempt == 1 ? 'after the end of its worker it is not tried before it is due' : 'nor after a connection that was lost');
}
is(sql('b', 'select attempts from fanout.dead_letter'), '3', 'and no attempt is lost');
sql('b', q(select fanout.purge(); select fanout.alter_subscription('t', 'g', retry_delay => '1 s', max_retry_delay => '1 s')));
wait_until('b', q((select state = 'idle' from fanout.stat_subscriptions)));

# ---- another instance ----

sql('c', sprintf($subscribe, 10));
wait_until('c', q((select state = 'idle' from fanout.stat_subscriptions)));
sql('b', q(select fanout.publish('t', jsonb_build_object('fails', case when i % 4 = 0 then 'b' when i % 4 = 1 then 'c' else 'none' end, 'n', i))
	from generate_series(1, 400) i));
PgFanout::poll(sub { count() + dead() == 401 }, 'all messages');
my @failed = map { sql($_, q(select count(*) from log where body ->> 'fails' in ('b', 'c'))) } qw(b c);
is($failed[0] + $failed[1] + dead(), 200, 'what fails in one instance is applied by the other, or given up after all attempts by one of them');
cmp_ok($failed[0] + $failed[1], '>', 40, "many of them are applied by the other: $failed[0] and $failed[1]");
is(sql('b', 'select count(*) - count(distinct message_id) from log') . sql('c', 'select count(*) - count(distinct message_id) from log'), '00', 'each once');
PgFanout::poll(sub { $broker->count('t_g') == 0 && unacked() == 0 }, 'an empty queue');
pass('nothing is left in the queue');

# ---- ordered, in two instances ----

sql($_, q(select fanout.unsubscribe('t', 'g'); truncate log;
create function apply_second(m fanout.message) returns void language plpgsql as $$
begin
	if m.attempt = 1 and m.body ? 'fails' then raise exception 'once'; end if;
	insert into log (message_id, body, attempt, redelivered) values (m.message_id, m.body, m.attempt, m.redelivered);
end $$)) foreach qw(b c);
my $ordered = q(set client_min_messages = warning;
	select fanout.subscribe('two', 'g', 'apply_second(fanout.message)', retry_delay => '1 h', max_retry_delay => '1 h', prefetch => 5));
sql('b', q(select fanout.declare_binding('two', 'g'); select fanout.publish('two', '{"fails": 1, "n": 0}', key => 'k')));
sql('b', $ordered);
wait_until('b', q((select attempts = 1 from fanout.delivery_failure where topic = 'two')));
sql('c', $ordered);
wait_until('c', q((select state = 'idle' from fanout.stat_subscriptions)));
sql('b', q(select fanout.publish('two', jsonb_build_object('n', i), key => 'k') from generate_series(1, 20) i));
my $kept = q(select count(*) from fanout.waiting where not requeued);
PgFanout::poll(sub { sql('b', $kept) + sql('c', 'select count(*) from log') == 21 }, 'all messages in one of two instances');
is(sql('b', 'select count(*) from log') . sql('c', $kept), '00', 'where a message waits later ones of its key wait, and in another instance of the group they do not');
sql('b', q(select fanout.retry('two', 'g')));
wait_until('b', q((select waiting = 0 from fanout.stat_subscriptions)));
is(count(), 21, 'once it succeeds all are applied');
is(sql($_, q(select string_agg(body ->> 'n', ' ' order by n) from log)), sql($_, q(select string_agg(body ->> 'n', ' ' order by (body ->> 'n')::int) from log)),
	"in order in $_") foreach qw(b c);
sql($_, q(select fanout.unsubscribe('two', 'g'))) foreach qw(b c);
sql('c', sprintf($subscribe, 10));
sql('b', sprintf($subscribe, 10));

# ---- the prefetch ----

sql('c', q(select fanout.unsubscribe('t', 'g')));
sql('b', q(select fanout.unsubscribe('t', 'g'); truncate log; select fanout.purge()));
# so long that the others go by before any is given up
sql('b', sprintf($subscribe =~ s/1 s/10 s/gr, 5));
wait_until('b', q((select state = 'idle' from fanout.stat_subscriptions)));
sql('b', q(select fanout.publish('t', '{"fails": "b"}') from generate_series(1, 4) i));
sql('b', q(select fanout.publish('t', '{"n": 1}') from generate_series(1, 100) i));
wait_until('b', q((select count(*) = 100 from log)));
is(sql('b', 'select count(*) from fanout.dead_letter'), '0', 'those that wait in the queue count in the prefetch, and others go by');
sql('b', q(update fanout.waiting set next_try = now() - interval '1 month'; alter system set pg_fanout.inbox_retention = '2s'; select pg_reload_conf()));
wait_until('b', q((select count(*) = 4 from fanout.dead_letter)));
is(sql('b', 'select max(attempts) from fanout.dead_letter') > 0 ? 'given up' : '', 'given up', 'and are given up at last');
wait_until('b', q((select count(*) = 0 from fanout.waiting)));
pass('what somebody else may have taken is forgotten in time');

done_testing();

sub sql { return $node->safe_psql($_[0], $_[1]); }

sub count { return sql('b', 'select count(*) from log') + sql('c', 'select count(*) from log'); }
sub dead { return sql('b', 'select -count(*) from fanout.dead_letter') * -1 + sql('c', 'select count(*) from fanout.dead_letter'); }

sub unacked
{
	my ($found) = $broker->ctl('list_queues', '-p', $broker->vhost, 'name', 'messages_unacknowledged') =~ /^t_g\t(\d+)$/m;

	return $found;
}

sub wait_until
{
	my ($database, $condition) = @_;

	$node->poll_query_until($database, "select coalesce($condition, false)")
	  or die "not so in $database: $condition\n" . sql($database, 'select * from fanout.stat_subscriptions; select * from fanout.delivery_failure limit 20');
	return;
}
