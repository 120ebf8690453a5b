
# What fails at a bad moment still costs only itself: while its subscription is
# changed, while somebody has its row locked, in a handler that does odd things, and
# with errors of any text.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, init => { extra => [ '--encoding=UTF8', '--locale=C' ] }, conf => q(
log_statement = none
max_worker_processes = 24
restart_after_crash = on
));

sql(q(
create table log (n serial, topic text, key text, body jsonb, attempt int, sequence bigint);
create function note(m fanout.message) returns void language sql as $$
	insert into log (topic, key, body, attempt, sequence) values (m.topic, m.key, m.body, m.attempt, m.sequence);
$$;
create function apply(m fanout.message) returns void language plpgsql as $$
begin
	if m.attempt <= (m.body ->> 'fail')::int then raise exception 'attempt %', m.attempt; end if;
	if m.body ? 'sleep' then perform pg_sleep((m.body ->> 'sleep')::float8); end if;
	if m.body ? 'do' then execute m.body ->> 'do'; end if;
	if m.body ? 'late fail' then raise exception 'after all'; end if;
	perform note(m);
end $$));

# ---- on_failure is changed while a message waits in its queue ----

subscribe('changed', q(ordered => false, on_failure => 'requeue', retry_delay => '2 s', max_retry_delay => '2 s'));
publish('changed', 'k', '{"fail": 3}');
ok(soon(q((select attempts >= 1 from fanout.delivery_failure))), 'a message waits in its queue');
sql(q(select fanout.alter_subscription('changed', 'g', on_failure => 'wait', retry_delay => '50 ms', max_retry_delay => '50 ms')));
ok(soon(q((select attempt = 4 from log where topic = 'changed'))), 'once on_failure is "wait" it is tried from the waiting room, with the attempts that it had');
is(waiting('changed'), '0|0', 'and neither waits nor is known any more');
end_of('changed');

# ---- a process that ends in the handler, with on_failure "requeue" ----

subscribe('ends', q(ordered => false, on_failure => 'requeue', retry_delay => '100 ms', max_retry_delay => '100 ms'));
publish('ends', 'a', q({"fail": 1, "do": "select pg_terminate_backend(pg_backend_pid()) from (select) x where not exists (select from log where topic = 'ends' and key = 'b')"}));
ok(soon(q((select attempts > 0 from fanout.delivery_failure))), 'a message failed, and waits in its queue');
sleep 3;
publish('ends', 'b', '{}');
ok(soon(q((select count(*) = 2 from log where topic = 'ends'))), 'a process that ended in the handler of a message with attempts does not end again and again');
is(waiting('ends'), '0|0', 'nothing waits');
end_of('ends');

# ---- somebody has waiting messages locked ----

subscribe('locked', q(retry_delay => '1 h', max_retry_delay => '1 h', prefetch => 400));
publish('locked', "a$_", '{"fail": 1}') foreach 1 .. 3;
publish('locked', 'b', '{"fail": 1}');
publish('locked', 'b', '{"n": 2}');
publish('locked', 'b', '{"n": 3}');
publish('locked', 'c', '{"fail": 1}');
ok(soon(q((select waiting = 7 from fanout.stat_subscriptions where topic = 'locked'))), 'messages wait');
my $behind = sql(q(select message_id from fanout.waiting where payload::jsonb ->> 'n' = '2'));
my $locker = $node->background_psql('postgres');
$locker->query_safe("begin; select fanout.retry('locked', 'g', message_id) from fanout.waiting where key ~ '^a'; select fanout.skip('locked', 'g', '$behind')");
sql(q(select fanout.retry('locked', 'g', message_id) from fanout.waiting where key !~ '^a' and attempts > 0));
ok(soon(q((select count(*) = 2 from log where topic = 'locked'))), 'an open transaction that has some locked keeps no other key waiting');
is(sql(q(select string_agg(key || coalesce(body ->> 'n', ''), ' ' order by key) from log where topic = 'locked')), 'b c', 'nor lets a message overtake one that it has locked');
publish('locked', 'd', '{"fail": 1}');
publish('locked', 'd', '{"n": 2}');
ok(soon(q((select count(*) = 2 from fanout.waiting where key = 'd'))), 'more messages wait meanwhile');
sql(q(select fanout.retry('locked', 'g', message_id) from fanout.waiting where key = 'd' and attempts > 0));
ok(soon(q((select count(*) = 4 from log where topic = 'locked'))), 'and are applied');
$locker->query_safe('rollback');
$locker->quit;
ok(soon(q((select count(*) = 6 from log where topic = 'locked'))), 'once it is rolled back, what was behind follows');
is(sql(q(select string_agg(key || coalesce(body ->> 'n', ''), ' ' order by key, n) from log where topic = 'locked')), 'b b2 b3 c d d2', 'in order');
sql(q(select fanout.retry('locked', 'g')));
ok(soon(q((select count(*) = 9 from log where topic = 'locked'))), 'and the rest once it is retried');
end_of('locked');

# ---- skip() and the like, called by the handler itself ----

subscribe('itself', q(retry_delay => '50 ms', max_retry_delay => '50 ms', max_attempts => 3));
publish('itself', 'a', q({"fail": 1, "do": "select fanout.skip('itself', 'g', message_id) from fanout.waiting where attempts > 0"}));
publish('itself', 'a', '{"n": 2}');
ok(soon(q((select count(*) >= 1 from log where topic = 'itself' and body ->> 'n' = '2'))), 'a handler that skips its own message holds up nothing');
ok(soon(q((select count(*) = 1 from fanout.dead_letter where topic = 'itself'))), 'it is a dead letter');
publish('itself', 'b', q({"do": "select fanout.alter_subscription('itself', 'g', prefetch => 7)"}));
publish('itself', 'c', q({"do": "select fanout.pause('itself', 'g'); select fanout.resume('itself', 'g')"}));
ok(soon(q((select count(*) = 2 from log where topic = 'itself' and key in ('b', 'c')))), 'a handler may alter its subscription');
publish('itself', 'd', q({"do": "select fanout.unsubscribe('itself', 'g')"}));
ok(soon(q((select count(*) = 1 from log where topic = 'itself' and key = 'd'))), 'a handler may end its subscription');
ok(soon(q((select count(*) = 0 from pg_stat_activity where backend_type = 'pg_fanout consumer'))), 'which ends then');
sql('select fanout.purge()');

# ---- unsubscribe(drop_queue) while the handler runs, and fails ----

sql(q(select fanout.subscribe('dropped', 'g', 'apply(fanout.message)')));
ok(soon(q((select state = 'idle' from fanout.stat_subscriptions where topic = 'dropped'))), 'subscribed');
$broker->amqp('publish', '--exchange', 'dropped', '{"sleep": 2, "late fail": 1}');
ok(soon(q(exists (select from pg_stat_activity where backend_type = 'pg_fanout consumer' and wait_event = 'PgSleep'))), 'the handler runs');
sql(q(select fanout.unsubscribe('dropped', 'g', drop_queue => true)));
PgFanout::poll(sub { $broker->ctl('list_queues', '-p', $broker->vhost, 'name') !~ /^dropped_g$/m }, 'the queue is gone');
ok(soon(q((select not drop_queue from fanout.subscription where topic = 'dropped'))), 'the queue was dropped');
is(sql(q(select count(*) from fanout.waiting)), 0, 'what failed meanwhile does not stay');

# ---- errors of any kind ----

subscribe('odd', q(retry_delay => '50 ms', max_retry_delay => '50 ms', max_attempts => 2, handler_timeout => '5 s'));
my %odd = (
	'a long text of two-byte characters' => q(do $x$ begin raise exception '%', repeat('ä', 5000) using detail = repeat('ö', 5000); end $x$),
	'100 MB of text' => q(do $x$ begin raise exception '%', repeat('x', 100000000); end $x$),
	'an empty text' => q(do $x$ begin raise exception ''; end $x$),
	'SQLSTATE 00000' => q(do $x$ begin raise exception using errcode = '00000'; end $x$),
	'SQLSTATE ZZZZZ' => q(do $x$ begin raise exception using errcode = 'ZZZZZ'; end $x$),
	'no data' => q(do $x$ begin raise no_data_found; end $x$),
	'assertion' => q(do $x$ begin assert false; end $x$),
	'commit' => q(do $x$ begin commit; end $x$),
	'listen' => q(listen something),
	'vacuum' => q(vacuum log),
	'a transaction that is read only' => q(set transaction read only; insert into log (key) values ('never')),
	'read only for the session' => q(do $x$ begin set session characteristics as transaction read only; set default_transaction_read_only = on; raise exception 'x'; end $x$),
	'drop extension' => q(drop extension pg_fanout cascade),
	'lock timeout' => q(do $x$ begin set lock_timeout = 1; set statement_timeout = 1; perform pg_sleep(0.1); raise exception 'x'; end $x$),
	'deferred' => q(create temp table if not exists deferred (id int unique deferrable initially deferred); insert into deferred values (1), (1)),
	'too late' => q(select pg_sleep(20)),
);
foreach my $name (sort keys %odd)
{
	publish_body('odd', "odd $name", { do => $odd{$name} });
	publish('odd', "odd $name", '{}');
	publish('odd', "$name", '{}');
}
my $count = keys %odd;
ok(soon(qq((select count(*) = $count from fanout.dead_letter where topic = 'odd'))), 'each error makes a dead letter');
is(sql(qq(select count(*) from log where topic = 'odd' and key !~ '^odd')), $count, 'and costs no other key anything');
ok(soon(qq((select count(*) = 2 * $count from log where topic = 'odd'))), 'nor, at last, those behind it');
is(sql(q(select max(length(reason)) <= 1024 and max(octet_length(reason)) <= 1024 from fanout.dead_letter)), 't', 'texts are bounded');
note sql(q(select key, sqlstate, attempts, left(reason, 60) from fanout.dead_letter order by 1));
my %fine = (
	'flood' => q(do $x$ begin for i in 1 .. 20000 loop raise notice 'n %', i; raise debug 'd'; end loop; end $x$),
	'temp' => q(create temp table fine_temp (x int) on commit drop; drop table fine_temp; create temp table if not exists log2 as select 1 as x),
	'advisory' => q(select pg_advisory_lock(i) from generate_series(1, 1000) i),
	'settings' => q(set role pg_monitor; set work_mem = '64kB'; set enable_indexscan = off; set standard_conforming_strings = off; reset role; set session_replication_role = replica),
	'notify' => q(notify something, 'x'),
	'cursor' => q(declare c cursor with hold for select generate_series(1, 1000000000)),
	'caught' => q(do $x$ begin for i in 1 .. 100 loop begin perform 1 / 0; exception when others then null; end; end loop; end $x$),
	'prepare' => q(do $x$ begin if not exists (select from pg_prepared_statements where name = 'p') then execute 'prepare p as select 1'; end if; end $x$),
	'many' => q(select fanout.publish('odd', '{"made": true}', key => 'made ' || i) from generate_series(1, 500) i),
);
# none of these is to be ended for its time, however slow the machine is
sql(q(select fanout.alter_subscription('odd', 'g', handler_timeout => '120 s'); truncate log));
foreach my $name (sort keys %fine)
{
	publish_body('odd', "fine $name", { do => $fine{$name} });
	publish('odd', "fine $name", '{}');
}
$count = keys %fine;
ok(soon(qq((select count(*) = 2 * $count + 500 from log where topic = 'odd'))), 'what a handler may do leaves nothing behind that harms the next')
  or diag(sql(q(select key, sqlstate, attempts, left(error, 300) from fanout.delivery_failure order by 1; select key, left(reason, 300) from fanout.dead_letter where key ~ 'fine')));
ok(soon(q((select count(*) = 0 from pg_locks where locktype = 'advisory'))), 'no advisory lock stays');
publish_body('odd', 'cancels itself', { do => q(select pg_cancel_backend(pg_backend_pid()), pg_sleep(1)) });
publish('odd', 'other', '{}');
ok(soon(q((select count(*) = 1 from log where key = 'other'))), 'a handler that cancels itself delays no other');
sql(q(select fanout.skip('odd', 'g', message_id) from fanout.delivery_failure));
publish_body('odd', 'ends itself', { do => q(select pg_terminate_backend(pg_backend_pid()), pg_sleep(1)) });
publish('odd', "other $_", '{}') foreach 1 .. 20;
ok(soon(q((select count(*) = 20 from log where key ~ 'other '))), 'nor does one that ends its process');
ok(soon(q(exists (select from fanout.dead_letter where key = 'ends itself'))), 'which is given up at last');
end_of('odd');

# ---- keys and sequences of other producers ----

subscribe('foreign', q(retry_delay => '1 h', max_retry_delay => '1 h'));
$broker->amqp('publish', '--routing-key', 'foreign_g', '--message-id', 'f1', '--headers', '{"key": 42}', '{"fail": 1, "n": 1}');
ok(soon(q((select attempts = 1 from fanout.delivery_failure))), 'a message with an integer as its key has failed');
$broker->amqp('publish', '--routing-key', 'foreign_g', '--message-id', 'f2', '--headers', '{"key": 42}', '{"n": 2}');
ok(soon(q((select waiting = 2 from fanout.stat_subscriptions where topic = 'foreign'))), 'a later one of the key waits');
sql(q(select fanout.retry('foreign', 'g')));
ok(soon(q((select count(*) = 2 from log where topic = 'foreign'))), 'it is applied');
is(sql(q(select string_agg(key || ' ' || (body ->> 'n'), ' ' order by n) from log)), '42 1 42 2', 'before the later one');
sql(q(select fanout.alter_subscription('foreign', 'g', retry_delay => '1 s', max_retry_delay => '1 s'); select fanout.pause('foreign', 'g'); truncate log));
my $n = 0;
my @mixed = ('{"key": "k", "sequence": 7}', '{"key": "k"}', '{"key": "k", "sequence": 8}', '{"key": "k"}');
$broker->amqp('publish', '--routing-key', 'foreign_g', '--message-id', 'm' . ++$n, '--headers', $_, qq({"n": $n, "sleep": 0.5})) foreach @mixed;
sql(q(select fanout.resume('foreign', 'g')));
ok(soon(q(exists (select from pg_stat_activity where backend_type = 'pg_fanout consumer' and wait_event = 'PgSleep'))), 'the handler runs');
sql(q(select fanout.pause('foreign', 'g')));
ok(soon(q(not exists (select from pg_stat_activity where backend_type = 'pg_fanout consumer'))), 'the worker has ended');
sql(q(select fanout.resume('foreign', 'g')));
ok(soon(q((select count(*) = 4 from log where topic = 'foreign'))), 'messages of one key with and without a sequence are delivered again');
is(sql(q(select string_agg(body ->> 'n', ' ' order by n) from log)), '1 2 3 4', 'and keep their order');
end_of('foreign');

# ---- a delivery limit and on_failure "requeue" ----

sql(q(select fanout.declare_binding('limited', 'g', arguments => '{"x-delivery-limit": 3}');
	select fanout.subscribe('limited', 'g', 'apply(fanout.message)', ordered => false, on_failure => 'requeue', max_attempts => 6, retry_delay => '50 ms', max_retry_delay => '50 ms')));
ok(soon(q((select state = 'refused' and last_error ~ 'has a delivery limit of 3' from fanout.stat_subscriptions where topic = 'limited'))),
	'a queue with a delivery limit below max_attempts, which would lose what is given back to it, is refused');
publish('limited', 'k', '{"fail": 3}');
sql(q(select fanout.alter_subscription('limited', 'g', max_attempts => 4)));
ok(soon(q((select attempt = 4 from log where topic = 'limited'))), 'with as many attempts as it lets be made nothing is lost');
end_of('limited');

# ---- ordered is changed while messages wait behind another ----

subscribe('order', q(retry_delay => '1 h', max_retry_delay => '1 h'));
publish('order', 'k', '{"fail": 9}');
publish('order', 'k', qq({"n": $_})) foreach 1 .. 3;
ok(soon(q((select waiting = 4 from fanout.stat_subscriptions where topic = 'order'))), 'three wait behind one that failed');
sql(q(select fanout.alter_subscription('order', 'g', ordered => false)));
ok(soon(q((select count(*) = 3 from log where topic = 'order'))), 'they go on once the subscription is not ordered any more');
end_of('order');

# ---- the breaker ----

subscribe('broken', q(retry_delay => '50 ms', max_retry_delay => '50 ms', max_attempts => 2));
sql(q(select fanout.pause('broken', 'g')));
# one after the other: they need not all be at hand at once
foreach my $i (1 .. 12)
{
	publish_body('broken', "bad $i", { do => q(do $x$ begin raise exception '%', repeat('äö', 600); end $x$) });
	publish('broken', "good $i", '{}');
}
PgFanout::flush($node);
my $restarts = () = slurp_file($node->logfile) =~ /consumer of broken_g does not consume/g;
sql(q(select fanout.resume('broken', 'g')));
ok(soon(q((select count(*) = 12 from log where topic = 'broken') and (select count(*) = 12 from fanout.dead_letter where topic = 'broken'))), 'bad messages, and good ones among them');
is((() = slurp_file($node->logfile) =~ /consumer of broken_g does not consume/g), $restarts, 'are not taken for a handler that is broken for all');
sql('truncate log; select fanout.purge()');
sql(q(create table broken_for_all ()));
sql(q(select fanout.pause('broken', 'g')));
publish_body('broken', "bad $_", { do => q(do $x$ begin if to_regclass('broken_for_all') is not null then raise exception 'x%', repeat('ä', 600); end if; end $x$) }) foreach 1 .. 12;
sql(q(select fanout.resume('broken', 'g')));
ok(soon(q((select state = 'refused' from fanout.stat_subscriptions where topic = 'broken'))), 'bad ones alone are');
is(sql(q(select right(encode(convert_to(last_error, 'UTF8'), 'hex'), 4) from fanout.stat_subscriptions where topic = 'broken')), 'c3a4', 'the error ends with a whole character');
sql('drop table broken_for_all');
ok(soon(q((select count(*) = 12 from log where topic = 'broken'))), 'and it goes on by itself');

done_testing();

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub subscribe
{
	my ($topic, $options) = @_;

	sql(qq(select fanout.declare_binding('$topic', 'g'); select fanout.subscribe('$topic', 'g', 'apply(fanout.message)', $options)));
	ok(soon("(select state = 'idle' from fanout.stat_subscriptions where topic = '$topic')"), "$topic: subscribed");
	return;
}

sub publish
{
	my ($topic, $key, $body) = @_;

	sql("select fanout.publish('$topic', \$body\$$body\$body\$, key => '$key')");
	return;
}

sub publish_body
{
	my ($topic, $key, $body) = @_;
	my $do = $body->{do};

	sql("select fanout.publish('$topic', jsonb_build_object('do', \$do\$$do\$do\$::text), key => '$key')");
	return;
}

# In the waiting room, and requeued, of a topic.
sub waiting
{
	my ($topic) = @_;

	return sql("select count(*) filter (where not requeued), count(*) filter (where requeued) from fanout.waiting join fanout.subscription s using (subscription_id) where s.topic = '$topic'");
}

sub end_of
{
	my ($topic) = @_;

	sql("select fanout.unsubscribe('$topic', 'g'); delete from fanout.waiting; truncate log; select fanout.purge()");
	return;
}

sub soon { return PgFanout::soon($node, $_[0]); }
