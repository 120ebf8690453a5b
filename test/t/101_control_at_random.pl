
# While messages fail and come, somebody calls retry(), skip(), pause(), resume(),
# alter_subscription() and redrive() at random moments, leaves such transactions open
# for a while, rolls some back, and ends workers: each message is applied once, or is
# skipped, and those of a key in order.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $messages = $ENV{PG_FANOUT_LONG} ? 40000 : 4000;
my $seconds = $ENV{PG_FANOUT_LONG} ? 120 : 20;
my $keys = 25;
my $seed = $ENV{PG_FANOUT_SEED} || int(rand(2**31));
my $rows = "$PostgreSQL::Test::Utils::tmp_check/experiments";

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 24
));

note "seed $seed";
srand($seed);
sql(q(
create table log (n serial, message_id uuid, key text, sequence bigint, attempt int);
create table fails (share float8);
insert into fails values (0.3);
create function apply(m fanout.message) returns void language plpgsql as $$
begin
	if random() < (select share from fails) then raise exception 'at random' using errcode = (array['P0001','40001','23503','22012'])[1 + floor(random() * 4)]; end if;
	insert into log (message_id, key, sequence, attempt) values (m.message_id, m.key, m.sequence, m.attempt);
end $$;
select fanout.declare_binding('t', 'g');
select fanout.subscribe('t', 'g', 'apply(fanout.message)', retry_delay => '500 ms', max_retry_delay => '2 s', max_attempts => 1000, max_wait => '1 s')));

# what somebody may do with it
my $waits = q(select message_id from fanout.waiting order by random() limit 1);
my @calls = (
	q(select fanout.retry('t', 'g')),
	qq(select fanout.retry('t', 'g', ($waits))),
	qq(select fanout.skip('t', 'g', message_id) from ($waits) x),
	q(select fanout.skip('t', 'g', message_id) from fanout.waiting where next_try is null order by random() limit 3),
	q(select fanout.pause('t', 'g'); select fanout.resume('t', 'g')),
	q(select fanout.alter_subscription('t', 'g', prefetch => 1 + (random() * 400)::int)),
	q(select fanout.pause('t', 'g'), pg_sleep(0.3); select fanout.resume('t', 'g')),
	q(select pg_terminate_backend(pid) from fanout.stat_subscriptions),
);

my $script = "$PostgreSQL::Test::Utils::tmp_check/load.sql";
my $pause = $seconds * 0.8 * 20 / $messages;
append_to_file($script, "select fanout.publish('t', '{}', key => ((random() * $keys)::int)::text) from generate_series(1, 20);\nselect pg_sleep($pause);\n")
  foreach 1 .. $messages / 20;
my $load = IPC::Run::start([ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('postgres'), '-f', $script ], '>', '/dev/null');
my $end = time + $seconds;
my (%done, %refused);
while (time < $end || (time < $end + 60 && sql('select count(*) from fanout.dead_letter') == 0))
{
	my $call = $calls[ rand @calls ];
	my $hold = rand() < 0.3 ? rand(1.5) : 0;
	my $how = rand() < 0.3 ? 'rollback' : 'commit';

	# skip() raises an error if the message has gone meanwhile, or a worker has it
	my $stderr = '';
	$node->psql('postgres', "set lock_timeout = '3s'; begin; $call; select pg_sleep($hold); $how", stderr => \$stderr);
	$done{$call}++;
	$refused{$1}++ if $stderr =~ /ERROR:  (?:message \S+ )?(.*)/;
	sleep rand(0.1);
}
$load->finish;
note join(', ', map { "$done{$_} x $_" } sort keys %done);
note join(', ', map { "$refused{$_} x $_" } sort keys %refused);
sql(q(update fails set share = 0));
PgFanout::flush($node);
sql(q(select fanout.resume('t', 'g'); select fanout.retry('t', 'g')));
$node->poll_query_until('postgres', qq(select (select count(*) from log) + (select count(*) from fanout.dead_letter) >= $messages))
  or fail('all messages are applied or skipped');
is(sql('select count(*) from fanout.waiting'), 0, 'nothing waits any more') or diag(sql('select * from fanout.waiting limit 5; select * from fanout.stat_subscriptions'));
my $skipped = sql('select count(*) from fanout.dead_letter');
note "$skipped skipped";
cmp_ok($skipped, '>', 0, 'some messages were skipped');
is(sql('select count(*), count(distinct message_id) from log'), ($messages - $skipped) . '|' . ($messages - $skipped), 'every other one is applied, once');
is(sql('select count(*) from log join fanout.dead_letter using (message_id)'), 0, 'none of those that were skipped');
is(sql('select count(*) from (select sequence < lag(sequence) over (partition by key order by n) as wrong from log) x where wrong'), 0, 'those of a key in order')
  or diag(sql("select * from (select *, lag(sequence) over w as before, lag(n) over w as n_before from log window w as (partition by key order by n)) x where before > sequence"));

# ---- a snapshot that is open for the whole time ----

# How long it takes to apply messages that wait.
sub apply_waiting
{
	sql('truncate log; select fanout.purge(); update fails set share = 2');
	sql("select fanout.publish('t', '{}', key => (i % 5)::text) from generate_series(1, 2 * $messages) i");
	$node->poll_query_until('postgres', "select waiting = 2 * $messages from fanout.stat_subscriptions") or die;
	sql('update fails set share = 0');

	my $start = time;
	sql(q(select fanout.retry('t', 'g')));
	$node->poll_query_until('postgres', "select count(*) = 2 * $messages from log") or fail('all are applied');
	return time - $start;
}

sql(q(select fanout.alter_subscription('t', 'g', retry_delay => '1 h', max_retry_delay => '1 h', prefetch => 1000)));
my $alone = apply_waiting();
my $snapshot = PgFanout::session($node);
PgFanout::run_in($snapshot, 'begin isolation level repeatable read; select count(*) from fails');
my $beside = PgFanout::again_if_slow(3 * $alone + 5, \&apply_waiting);
note sprintf('%d messages that waited were applied in %.1f s, in %.1f s beside an open snapshot', 2 * $messages, $alone, $beside);
cmp_ok($beside, '<', 3 * $alone + 5, 'beside an open snapshot, what waits is applied as quickly as ever');
is(sql('select count(*) from (select sequence < lag(sequence) over (partition by key order by n) as wrong from log) x where wrong'), 0, 'in order');
PgFanout::run_in($snapshot, 'rollback');
$snapshot->{in} .= "\\q\n";
$snapshot->{harness}->finish;
append_to_file($rows, "| retry(), skip(), pause(), alter_subscription() at random, workers terminated | 101_control_at_random | 1 client | $messages | 0 | 0 |\n");

done_testing();

sub sql { return $node->safe_psql('postgres', $_[0]); }
