# What is kept for consumers stays within its bounds: the inbox, attempts and
# their delays, bodies in memory, prefetch; and what stat_subscriptions says of
# lag and connections is so.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use IPC::Run ();
use List::Util qw(max min);
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 24
autovacuum = off
pg_fanout.retry_interval = 200ms
));
my $rows = "$PostgreSQL::Test::Utils::tmp_check/experiments";

sql(q(
create table log (n serial, message_id uuid, topic text, key text, sequence bigint, attempt int, redelivered boolean,
	at timestamptz default clock_timestamp());
create function note(m fanout.message) returns void language sql as $$
	insert into log (message_id, topic, key, sequence, attempt, redelivered)
	values (m.message_id, m.topic, m.key, m.sequence, m.attempt, m.redelivered);
$$;
create sequence tries;
create function fail(m fanout.message) returns void language plpgsql as $$
begin
	perform nextval('tries');
	raise log 'try: % of % at %', m.attempt, m.key, extract(epoch from clock_timestamp());
	perform note(m);
	if m.attempt <= (m.body ->> 'fail')::int then raise exception 'fails'; end if;
end $$;
create table gate ();
create function pass_gate(m fanout.message) returns void language plpgsql as $$ begin lock table gate; perform note(m); end $$;
select fanout.declare_binding(t, 'g') from unnest('{busy,busier,gated,fails,behind}'::text[]) t;
));

# ---- the inbox ----

# Consumers that hardly ever have no transaction open; and one message that
# comes again and again.
my $retention = 2;
my $repeated = 'abcdef11-2222-4333-8444-555555555555';
my $script = PostgreSQL::Test::Utils::tempdir() . '/load.sql';
my ($out, $err) = ('', '');
append_to_file($script, join(' ', split(/\n/, q(select fanout.publish('busy', '{}', key => i::text), fanout.publish('busier', '{}', key => i::text)
	from generate_series(1, 10) i;))) . "\n");
sql(qq(
alter system set pg_fanout.inbox_retention = '${retention}s';
select pg_reload_conf();
select fanout.subscribe(t, 'g', 'note(fanout.message)') from unnest('{busy,busier}'::text[]) t));
my $start = time;
my @background = map { IPC::Run::start($_, '<', \undef, '>', \$out, '2>', \$err) }
	[ 'pgbench', '-n', '-c', '2', '-R', '80', '-T', '600', '-f', $script, $node->connstr('postgres') ],
	[ "$PgFanout::lib/amqp", 'publish', '--uri', $broker->uri, '--exchange', 'busy', '--message-id', $repeated, '--count', 46, '--interval', 0.3 ];
my ($current, @rotated) = (-1);
# a machine that stands still does not rotate either
while (time - $start < 14 || (@rotated < 6 && time - $start < 120))
{
	my ($now, $at) = split(/\|/, sql('select current, rotated_at from fanout.inbox_rotation'));

	push @rotated, $at if $now != $current;
	$current = $now;
	sleep 0.1;
}
# while messages still come: without them, all are soon gone
my $kept = sql("select min(log.at) from fanout.inbox join log using (message_id) where message_id <> '$repeated'");
$background[0]->signal('TERM');
$_->finish foreach @background;
PgFanout::flush($node);
wait_until(q((select sum(applied) + sum(skipped) = (select count(*) from fanout.outbox) + 46 from fanout.stat_subscriptions)));
my $applied = sql('select count(*) from log');
cmp_ok(scalar @rotated, '>=', 5, "the inbox is rotated while consumers are busy, $#rotated times");
# its four segments were each begun by one of the last four rotations, and by
# transactions that had begun before
cmp_ok($kept, 'ge', $rotated[-5], "of $applied messages it keeps those since $kept, not older than five rotations");
is(sql(q(select sum(n_tup_ins) > 0, sum(n_dead_tup + n_tup_upd + n_tup_del) from pg_stat_user_tables where relname ~ '^inbox_[0-9]')), 't|0',
	'and no tuple in it is dead');
my ($times, $gap) = split(/\|/, sql(qq(select count(*), min(gap) from (select extract(epoch from at - lag(at) over (order by at)) as gap from log
	where message_id = '$repeated') x)));
cmp_ok($times, '>', 1, "a message that comes again after the retention is applied again, $times times of 46");
cmp_ok($gap, '>=', $retention, 'within the retention it never is');
is(sql(qq(select count(*) - count(distinct message_id) from log where message_id <> '$repeated')), '0', 'all others are applied once');
record('inbox rotated while two consumers are busy', '2 clients, 80/s', $applied, 0, 0);
PgFanout::poll(sub { sql('select count(*) from fanout.inbox') == 0 }, 'an empty inbox');
pass('with no more messages it is emptied');
sql(q(update fanout.inbox_rotation set rotated_at = now() + interval '1 year'));
PgFanout::poll(sub { sql('select rotated_at <= clock_timestamp() from fanout.inbox_rotation') eq 't' },
	'a rotation that the clock put into the future');
pass('a wrong clock does not stop its rotation');
sql(q(alter system reset pg_fanout.inbox_retention; select pg_reload_conf();
	select fanout.unsubscribe(t, 'g') from unnest('{busy,busier}'::text[]) t; truncate log));

# ---- lag and reconnects; attempts and delays ----

sql(q(select fanout.publish('gated', '{}') from generate_series(1, 30) i));
PgFanout::flush($node);
my $locker = $node->background_psql('postgres');
$locker->query_safe('begin; lock table gate');
sql(q(select fanout.subscribe('gated', 'g', 'pass_gate(fanout.message)', prefetch => 5)));
wait_until(q((select state = 'consuming' from fanout.stat_subscriptions)));
is(stat_of('lag, reconnects, delivered > 0, applied', 'gated'), '30|0|t|0', 'lag: what is ready in the queue');
$locker->quit;
wait_until(q((select lag = 0 and applied = 30 from fanout.stat_subscriptions)));
pass('it is 0 once all are applied');

my $tried = '(select attempts from fanout.delivery_failure union all select attempts from fanout.dead_letter) t';
# in all, longer than a broker takes to start, if the machine is not too busy
my ($delay, $longest, $max_attempts) = (0.4, 4, 10);
sql(qq(select fanout.subscribe('fails', 'g', 'fail(fanout.message)', retry_delay => '$delay s', max_retry_delay => '$longest s', max_attempts => $max_attempts)));
sql(q(select fanout.publish('fails', jsonb_build_object('fail', case when i % 10 = 0 then 1000 else 0 end), key => i::text) from generate_series(1, 50) i));
wait_until(q((select min(attempts) >= 2 and count(*) = 5 from fanout.delivery_failure)));
my @attempts = attempts();
$broker->stop;
wait_until(q((select count(*) = 2 and bool_and(lag is null and connected_to is null and connected_at is null) from fanout.stat_subscriptions)));
pass('without a connection the lag is not known');
push @attempts, attempts();
$broker->start;
wait_until(q((select count(*) = 2 and bool_and(lag is not null and connected_to is not null and reconnects = 1) from fanout.stat_subscriptions)));
pass('the connection made again is counted as one');
wait_until("(select min(attempts) >= 4 from $tried)");
push @attempts, attempts();
$node->restart;
push @attempts, attempts();
wait_until(q((select count(*) = 5 from fanout.dead_letter)));
is(join(' ', sort { $a <=> $b } @attempts), "@attempts", "attempts survive restarts of broker and server: @attempts");
is(sql(q(select count(*), min(attempts), max(attempts) from fanout.dead_letter)), "5|$max_attempts|$max_attempts", 'and are as many as declared at last');
is(sql(q(select count(*), count(distinct key) from log where topic = 'fails')), '45|45', 'all others are applied');
judge_tries();
record('handlers that always fail, broker and server restarted', 'one transaction', 50, 0, 0);
sql(q(select fanout.unsubscribe(t, 'g') from unnest('{fails,gated}'::text[]) t; truncate log));

# ---- prefetch and memory, when a key waits ----

sql(q(alter system set pg_fanout.consumer_memory = '1MB'; select pg_reload_conf();
	select fanout.subscribe('behind', 'g', 'fail(fanout.message)', retry_delay => '1 h', max_retry_delay => '1 h', prefetch => 10)));
wait_until(q((select state = 'idle' from fanout.stat_subscriptions)));
sql(q(select fanout.publish('behind', '{"fail": 1}', key => 'k')));
wait_until(q(exists (select from fanout.delivery_failure)));
sql(q(select fanout.publish('behind', jsonb_build_object('filler', repeat('x', 100000)), key => 'k') from generate_series(1, 200) i));
sql(q(select fanout.publish('behind', '{}', key => 'other ' || i) from generate_series(1, 20) i));
wait_until(q((select count(*) = 20 from log)));
wait_until(q((select waiting = 201 from fanout.stat_subscriptions)));
is(sql(q(select (select attempts from fanout.delivery_failure) || '|' || count(*) from log)) . '|' . $broker->count('behind_g'), '1|20|0',
	'1 MB, prefetch 10: 201 messages of 20 MB wait, others are handled, and the queue is empty');
sql(q(select fanout.retry('behind', 'g')));
wait_until(q((select count(*) = 221 from log)));
is(sql(q(select count(distinct message_id), count(*) filter (where redelivered), count(*) filter (where key = 'k' and sequence < previous) from
	(select *, lag(sequence) over (partition by key order by n) as previous from log) l)), '221|0|0', 'all are applied once, in order, and none was delivered twice');
is(sql(q(select waiting from fanout.stat_subscriptions)) . sql('select count(*) from fanout.waiting'), '00', 'and none waits any more');
record('201 messages of 20 MB wait for a retry, prefetch 10, consumer_memory 1MB', '1 client', 221, 0, 0);
sql(q(select fanout.unsubscribe('behind', 'g'); truncate log));

# Two copies of a message come while the first of its key waits, and once more
# while one of them waits itself.
sql(q(select fanout.subscribe('behind', 'g', 'fail(fanout.message)', retry_delay => '1 h', max_retry_delay => '1 h', prefetch => 10)));
wait_until(q((select state = 'idle' from fanout.stat_subscriptions)));
sql(q(select fanout.publish('behind', '{"fail": 1}', key => 'b')));
wait_until(q(exists (select from fanout.delivery_failure)));
foreach (1 .. 2)
{
	system_or_bail("$PgFanout::lib/amqp", 'publish', '--uri', $broker->uri, '--exchange', 'behind', '--message-id', $repeated,
		'--headers', '{"key": "b"}', '--count', 2, '{}');
	PgFanout::poll(sub { $broker->count('behind_g') == 0 }, 'an empty queue');
}
wait_until(q((select waiting = 2 and skipped >= 3 from fanout.stat_subscriptions)));
pass('of four copies of a message one waits behind the one that failed');
sql(q(select fanout.retry('behind', 'g')));
PgFanout::poll(sub { sql('select count(*) from log') == 2 }, 'both');
is(sql(q(select count(distinct message_id) from log)), 2, 'and is applied once');

done_testing();

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub wait_until
{
	my ($condition) = @_;

	$node->poll_query_until('postgres', "select coalesce($condition, false)")
	  or die "not so: $condition\n"
	  . sql('select * from fanout.stat_subscriptions; select * from fanout.delivery_failure; select * from fanout.inbox_rotation;
		select * from log order by n desc limit 10');
	return;
}

sub stat_of
{
	my ($columns, $topic) = @_;

	return sql("select $columns from fanout.stat_subscriptions where topic = '$topic'");
}

# Of the message that has been tried least.
sub attempts { return sql("select min(attempts) from $tried"); }

# By the times that the handler wrote itself, where no rollback undoes it.
sub judge_tries
{
	my $log = slurp_file($node->logfile);
	my %at;
	my ($runs, $too_soon, $too_often) = (0, 0, 0);

	while ($log =~ /LOG:  try: (\d+) of (\d+) at ([\d.]+)/g)
	{
		push @{ $at{$2}->{$1} }, $3;
		$runs++;
	}
	foreach my $key (grep { $_ % 10 == 0 } keys %at)
	{
		my $tries = $at{$key};

		$too_often++ if max(keys %$tries) > $max_attempts || keys %$tries != $max_attempts;
		foreach my $attempt (1 .. $max_attempts)
		{
			# the first may run in a batch, in a savepoint, and alone
			$too_often++ if @{ $tries->{$attempt} || [] } > ($attempt == 1 ? 3 : 1);
			$too_soon++ if $attempt > 1 &&
			  min(@{ $tries->{$attempt} }) - max(@{ $tries->{ $attempt - 1 } }) < min($longest, $delay * 2**($attempt - 2)) - 0.002;
		}
	}
	is($too_often, 0, 'no handler runs more often than its attempts allow');
	is($too_soon, 0, 'or sooner than its delays allow');
	is(sql('select last_value from tries'), $runs, "a sequence has counted the same $runs runs");
	return;
}

sub record
{
	append_to_file($rows, '| ' . join(' | ', $_[0], '035_consume_edges', @_[ 1 .. $#_ ]) . " |\n");
	return;
}
