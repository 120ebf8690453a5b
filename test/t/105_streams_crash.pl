# Workers, both servers and the broker are killed at random while a stream is read: every
# message has its effects exactly once, in order per key, also for a group that begins
# late, and also where the inbox has forgotten everything.
#
# PG_FANOUT_LONG=1: 20 kills in place of 7, at 150 transactions per second in
# place of 60.  PG_FANOUT_TEST_KILLS sets another number of kills,
# PG_FANOUT_TEST_SEED repeats a run's choice.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $long = $ENV{PG_FANOUT_LONG};
my $kills = $ENV{PG_FANOUT_TEST_KILLS} || ($long ? 20 : 7);
my $rate = $long ? 150 : 60;
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
create table users (id int primary key, name text, changes int not null default 1);
select fanout.declare_binding('counter', 'g', 'stream', '{"x-max-length-bytes": 1000000000, "x-stream-max-segment-size-bytes": 100000}');
select fanout.declare_binding('user', 'copy', 'stream');
select fanout.capture('counters', 'counter', '{update}');
select fanout.capture('users', 'user');
));

# The witnesses: they count, tell what comes out of order, and fail now and then.
$b->safe_psql('postgres', 'create database late');
foreach my $database (qw(postgres late))
{
	$b->safe_psql($database, 'create extension if not exists pg_fanout');
	$b->safe_psql(
		$database, q(
set client_min_messages = warning;
create table effects (id int primary key, effects int not null, value int not null, disorder int not null);
insert into effects select i, 0, 0, 0 from generate_series(1, 50) i;
create table log (n serial, message_id uuid, key text, value int, attempt int);
create function count(m fanout.message) returns void language plpgsql as $$
begin
	insert into log (message_id, key, value, attempt) values (m.message_id, m.key, (m.body #>> '{after,value}')::int, m.attempt);
	update effects set effects = effects + 1,
		disorder = disorder + (value >= (m.body #>> '{after,value}')::int)::int,
		value = greatest(value, (m.body #>> '{after,value}')::int)
	where id = m.key::int;
	if m.attempt = 1 and hashtext(m.message_id::text) % 50 = 0 then
		raise exception 'now and then';
	end if;
end $$;
create table users (id int primary key, name text, changes int);
));
}

sub begin
{
	my ($database) = @_;

	$b->safe_psql(
		$database, q(
set client_min_messages = warning;
select fanout.subscribe('counter', 'g', 'count(fanout.message)', start_at => 'first', max_attempts => 1000, retry_delay => '100 ms', max_retry_delay => '500 ms');
select fanout.sync_table('user', 'copy', 'users', start_at => 'first', max_attempts => 1000, retry_delay => '100 ms', max_retry_delay => '500 ms');
));
	return;
}
begin('postgres');

my $directory = PostgreSQL::Test::Utils::tempdir;
append_to_file("$directory/counters.sql", '\\set id random(1, 50)
update counters set value = value + 1 where id = :id;
');
append_to_file("$directory/users.sql", '\\set id random(1, 300)
\\set kind random(1, 5)
\\if :kind = 1
delete from users where id = :id;
\\else
insert into users values (:id, :client_id) on conflict (id) do update set changes = users.changes + 1;
\\endif
');
my ($out, $err) = ('', '');
my $load;

sub load
{
	$load = IPC::Run::start(
		[ 'env', 'PGAPPNAME=pgbench', 'pgbench', '-n', '-c', '2', '-R', $rate, '-T', '1200', '-f', "$directory/counters.sql\@2", '-f', "$directory/users.sql\@1", $a->connstr('postgres') ],
		'<', \undef, '>', \$out, '2>', \$err);
	return;
}
load();

# NULL while the server is not there.
sub ask
{
	my ($query) = @_;

	return PgFanout::ask($b, $query) =~ /^(\d+)$/ ? $1 : undef;
}

sub applied { return ask('select sum(effects) from effects'); }

# One of all, whichever.
sub kill_worker
{
	my ($signal) = @_;
	my $pid = ask(q(select pid from pg_stat_activity where backend_type ~ 'consumer' order by random() limit 1));

	kill $signal, $pid if $pid;
	return;
}

my %ways = (
	worker_kill => sub { kill_worker('KILL') },
	worker_term => sub { kill_worker('TERM') },
	server => sub { $b->stop('immediate'); $b->start },
	source => sub { $a->stop('immediate'); eval { $load->finish }; $a->start; load() },
	broker => sub { $broker->kill; $broker->start },
	disconnect => sub { $broker->ctl('close_all_connections', '-p', $broker->vhost, 'test') });
my @often = qw(worker_kill worker_kill worker_term worker_term server server source broker disconnect);
my %done;

for my $i (1 .. $kills)
{
	my $before = applied();
	my $way = $i <= 5 ? (qw(worker_kill source worker_term server broker))[ $i - 1 ] : $often[ int(rand(@often)) ];

	PgFanout::poll(sub { my $now = applied(); defined $now && (!defined $before || $now > $before + $rate / 5) },
		'progress after kill ' . ($i - 1));
	select(undef, undef, undef, rand(0.5));
	$ways{$way}->();
	begin('late') if $i == 3;
	$done{$way}++;
}
note 'kills: ' . join(', ', map { "$_ $done{$_}" } sort keys %done);

$load->signal('TERM');
$load->finish;
# what the load has not been told about may still be at work
PgFanout::poll(sub { $a->safe_psql('postgres', q(select count(*) from pg_stat_activity where application_name = 'pgbench')) == 0 }, 'end of the load');
PgFanout::flush($a, timeout => '120 s');
my $written = $a->safe_psql('postgres', 'select sum(value) from counters');
my $users = 'select * from users order by id';
foreach my $database (qw(postgres late))
{
	$b->poll_query_until($database, "select sum(effects) >= $written from effects") or diag 'effects are missing';
	$b->poll_query_until($database, q(select bool_and(waiting = 0 and state = 'idle') from fanout.stat_subscriptions)) or diag 'not idle';
	is($b->safe_psql($database, 'select sum(effects), sum(disorder) from effects'),
		"$written|0", "$kills kills: the effects of $written messages are there exactly once, in order per key ($database)");
	is($b->safe_psql($database, 'select count(*) - count(distinct message_id::text) from log'), '0', 'no message was applied twice');
	is($b->safe_psql($database, 'select id, value from effects order by id'),
		$a->safe_psql('postgres', 'select id, value from counters order by id'), 'both databases agree');
	$b->poll_query_until($database, "select md5(string_agg(u::text, ',' order by id)) from users u",
		$a->safe_psql('postgres', "select md5(string_agg(u::text, ',' order by id)) from users u"));
	is($b->safe_psql($database, $users), $a->safe_psql('postgres', $users), 'a table kept in sync is equal');
	is($b->safe_psql($database, 'select count(*) from fanout.dead_letter'), '0', 'no message was given up');
	is($b->safe_psql($database, 'select count(*) from fanout.delivery_failure'), '0', 'no failure is left');
	is($b->safe_psql($database, 'select sum(missed) from fanout.subscriptions'), '0', 'nothing was missed');
	note 'repeats skipped since the last start: ' . $b->safe_psql($database, q(select string_agg(skipped::text, ', ' order by topic) from fanout.stat_subscriptions));
}

# The place alone is enough.
$b->stop('immediate');
$b->start;
$b->safe_psql('postgres', 'delete from fanout.inbox');
$a->safe_psql('postgres', 'update counters set value = value + 1');
$b->poll_query_until('postgres', "select sum(effects) >= $written + 50 from effects");
is($b->safe_psql('postgres', 'select sum(effects), sum(disorder) from effects'), ($written + 50) . '|0', 'exactly once also if the inbox has forgotten all');

done_testing();

END
{
	local ($?, $@);

	$load->kill_kill if $load;
}
