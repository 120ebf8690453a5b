# Workers, the consuming server and the broker are killed at random while
# messages flow from one database to another: every message has its effects
# exactly once, in order per key, and nothing is left behind.
#
# PG_FANOUT_TEST_KILLS sets how many kills (6); PG_FANOUT_TEST_SEED the seed.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $kills = $ENV{PG_FANOUT_TEST_KILLS} || 6;
my $seed = $ENV{PG_FANOUT_TEST_SEED} || int(rand(1_000_000));
srand($seed);
note "seed $seed";

my $broker = PgFanout::broker(private => 1);
my $conf = q(
log_statement = none
restart_after_crash = on
);
my $a = PgFanout::cluster('a', $broker, conf => $conf);
my $b = PgFanout::cluster('b', $broker, conf => $conf);

$a->safe_psql(
	'postgres', q(
create table counters (id int primary key, value int not null, filler text);
insert into counters select i, 0 from generate_series(1, 50) i;
select fanout.declare_binding('counter', 'b');
select fanout.capture('counters', 'counter', '{update}');
));

# The witness: it counts, tells what comes out of order, and fails now and then.
$b->safe_psql(
	'postgres', q(
create table effects (id int primary key, effects int not null, value int not null, disorder int not null);
insert into effects select i, 0, 0, 0 from generate_series(1, 50) i;
create table log (n serial, message_id uuid, key text, value int, attempt int, redelivered boolean, at timestamptz default clock_timestamp());
create function count(m fanout.message) returns void language plpgsql as $$
begin
	insert into log (message_id, key, value, attempt, redelivered)
	values (m.message_id, m.key, (m.body #>> '{after,value}')::int, m.attempt, m.redelivered);
	update effects set effects = effects + 1,
		disorder = disorder + (value >= (m.body #>> '{after,value}')::int)::int,
		value = (m.body #>> '{after,value}')::int
	where id = m.key::int;
	if m.attempt = 1 and (m.body #>> '{after,value}')::int % 97 = 0 then
		raise exception 'now and then';
	end if;
end $$;
select fanout.subscribe('counter', 'b', 'count(fanout.message)', max_attempts => 1000, retry_delay => '100 ms',
	max_retry_delay => '500 ms');
));

# Writes in a loop for as long as the file exists.
my $flag = PostgreSQL::Test::Utils::tempdir . '/go';
PostgreSQL::Test::Utils::append_to_file($flag, '');
my $script = PostgreSQL::Test::Utils::tempdir . '/load.sql';
PostgreSQL::Test::Utils::append_to_file($script,
	"\\set id random(1, 50)\nupdate counters set value = value + 1 where id = :id;\n");
my ($out, $err) = ('', '');
my $load = IPC::Run::start(
	[ 'pgbench', '-n', '-c', '2', '-R', '60', '-T', '600', '-f', $script, '-p', $a->port, '-h', $a->host, 'postgres' ],
	'<', \undef, '>', \$out, '2>', \$err);

sub consumer_pid
{
	my ($stdout, $stderr) = ('', '');
	$b->psql('postgres', 'select pid from fanout.stat_subscriptions where pid is not null',
		stdout => \$stdout, stderr => \$stderr, on_error_die => 0);
	return $stdout =~ /^(\d+)$/ ? $1 : undef;
}

# Is progress being made?
sub applied
{
	my ($stdout, $stderr) = ('', '');
	$b->psql('postgres', 'select coalesce(sum(effects), 0) from effects',
		stdout => \$stdout, stderr => \$stderr, on_error_die => 0);
	return $stdout =~ /^(\d+)$/ ? $1 : -1;
}

my %done;
for my $i (1 .. $kills)
{
	my $before = applied();
	PgFanout::poll(sub { applied() > $before + 10 || $before < 0 && applied() >= 0 }, "progress after kill " . ($i - 1), 120);
	select(undef, undef, undef, rand(0.5));

	my $what = ($i <= 4) ? (qw(worker_kill worker_term server broker))[$i - 1]
	  : (qw(worker_kill worker_kill worker_term worker_term server server broker disconnect))[ int(rand(8)) ];
	my $pid = consumer_pid();
	$done{$what}++;
	if ($what eq 'worker_kill') { kill 'KILL', $pid if $pid; }
	elsif ($what eq 'worker_term') { kill 'TERM', $pid if $pid; }
	elsif ($what eq 'server') { $b->stop('immediate'); $b->start; }
	elsif ($what eq 'broker') { $broker->kill; $broker->start; }
	else { $broker->ctl('close_all_connections', 'test'); }
}
note 'kills: ' . join(', ', map { "$_ $done{$_}" } sort keys %done);

$load->kill_kill(grace => 1);
PgFanout::flush($a, timeout => '120 s');
my $written = $a->safe_psql('postgres', 'select sum(value) from counters');
my $deadline = time + 120;
select(undef, undef, undef, 0.2) while applied() < $written && time < $deadline;
$b->poll_query_until('postgres', q(select waiting = 0 and state = 'idle' from fanout.stat_subscriptions)) or die;
PgFanout::poll(sub { $broker->count('counter_b') == 0 }, 'the queue is empty', 60);

is( $b->safe_psql('postgres', 'select sum(effects), sum(disorder) from effects'),
	"$written|0", "$kills kills: the effects of $written messages are there exactly once, in order per key");
is($b->safe_psql('postgres', 'select count(*) - count(distinct message_id) from log'), '0', 'no message was applied twice');
is($b->safe_psql('postgres', 'select id, value from effects order by id'),
	$a->safe_psql('postgres', 'select id, value from counters order by id'), 'both databases agree');
is($b->safe_psql('postgres', 'select count(*) from fanout.dead_letter'), '0', 'no message was given up');
is($b->safe_psql('postgres', 'select count(*) from fanout.delivery_failure'), '0', 'no failure is left');
note $b->safe_psql('postgres', q(
	select string_agg(concat_ws(' ', key, value, 'before', previous, 'attempt', attempt, 'redelivered', redelivered, at), E'\n')
	from (select *, lag(value) over (partition by key order by n) as previous from log) l where value <> previous + 1));
note 'repeats skipped since the last start: ' . $b->safe_psql('postgres', 'select skipped from fanout.stat_subscriptions');

done_testing();
