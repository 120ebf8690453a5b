# Workers, the consuming server and the broker are killed at random while
# messages flow from one database to another: the two stay equal, every message
# has its effects exactly once, in order per key, and nothing is left behind.
#
# PG_FANOUT_LONG=1: 20 kills in place of 6, at 150 transactions per second in
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
my $kills = $ENV{PG_FANOUT_TEST_KILLS} || ($long ? 20 : 6);
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
select fanout.declare_binding('counter', group_) from unnest('{ordered,unordered}'::text[]) group_;
select fanout.declare_binding('user', 'copy');
select fanout.capture('counters', 'counter', '{update}');
select fanout.capture('users', 'user');
));

# The witnesses: they count, tell what comes out of order, and fail now and
# then.  The third subscription keeps a table equal to its original.
$b->safe_psql(
	'postgres', q(
create table effects (group_ text, id int, effects int not null, value int not null, disorder int not null, primary key (group_, id));
insert into effects select group_, i, 0, 0, 0 from generate_series(1, 50) i, unnest('{ordered,unordered}'::text[]) group_;
create table log (n serial, message_id uuid, group_ text, key text, value int, attempt int, redelivered boolean, at timestamptz default clock_timestamp());
create function count(m fanout.message) returns void language plpgsql as $$
begin
	insert into log (message_id, group_, key, value, attempt, redelivered)
	values (m.message_id, m.consumer_group, m.key, (m.body #>> '{after,value}')::int, m.attempt, m.redelivered);
	update effects set effects = effects + 1,
		disorder = disorder + (value >= (m.body #>> '{after,value}')::int)::int,
		value = greatest(value, (m.body #>> '{after,value}')::int)
	where id = m.key::int and group_ = m.consumer_group;
	if m.attempt = 1 and hashtext(m.message_id::text) % 50 = 0 then
		raise exception 'now and then';
	end if;
end $$;
select fanout.subscribe('counter', group_, 'count(fanout.message)', max_attempts => 1000, retry_delay => '100 ms',
	max_retry_delay => '500 ms', ordered => group_ = 'ordered')
from unnest('{ordered,unordered}'::text[]) group_;
create table users (id int primary key, name text, changes int);
select fanout.sync_table('user', 'copy', 'users', max_attempts => 1000, retry_delay => '100 ms', max_retry_delay => '500 ms');
));

my $directory = PostgreSQL::Test::Utils::tempdir;
append_to_file("$directory/counters.sql", '\\set id random(1, 50)
update counters set value = value + 1 where id = :id;
');
append_to_file("$directory/users.sql", '\\set id random(1, 300)
\\set kind random(1, 5)
\\if :kind = 1
delete from users where id = :id;
\\elif :kind = 2
update users set id = id + 1000 where id = :id and not exists (select from users where id = :id + 1000);
\\else
insert into users values (:id, :client_id) on conflict (id) do update set changes = users.changes + 1;
\\endif
');
my ($out, $err) = ('', '');
my $load = IPC::Run::start(
	[ 'env', 'PGAPPNAME=pgbench', 'pgbench', '-n', '-c', '2', '-R', $rate, '-T', '1200', '-f', "$directory/counters.sql\@2", '-f', "$directory/users.sql\@1", $a->connstr('postgres') ],
	'<', \undef, '>', \$out, '2>', \$err);

# NULL while the server is not there.
sub ask
{
	my ($query) = @_;

	return PgFanout::ask($b, $query) =~ /^(\d+)$/ ? $1 : undef;
}

# Of the two that count, the one that has less.
sub applied { return ask(q(select min(n) from (select sum(effects) as n from effects group by group_) e)); }

# One of the three, whichever.
sub kill_worker
{
	my ($signal) = @_;
	my $pid = ask(q(select pid from fanout.stat_subscriptions where pid is not null order by random() limit 1));

	kill $signal, $pid if $pid;
	return;
}

my %ways = (
	worker_kill => sub { kill_worker('KILL') },
	worker_term => sub { kill_worker('TERM') },
	server => sub { $b->stop('immediate'); $b->start },
	broker => sub { $broker->kill; $broker->start },
	disconnect => sub { $broker->ctl('close_all_connections', 'test') });
my @often = qw(worker_kill worker_kill worker_term worker_term server server broker disconnect);
my %done;

for my $i (1 .. $kills)
{
	my $before = applied();
	my $way = $i <= 4 ? (qw(worker_kill worker_term server broker))[ $i - 1 ] : $often[ int(rand(@often)) ];

	PgFanout::poll(sub { my $now = applied(); defined $now && (!defined $before || $now > $before + $rate / 5) },
		'progress after kill ' . ($i - 1));
	select(undef, undef, undef, rand(0.5));
	$ways{$way}->();
	$done{$way}++;
}
note 'kills: ' . join(', ', map { "$_ $done{$_}" } sort keys %done);

$load->signal('TERM');
$load->finish;
# what the load has not been told about may still be at work
PgFanout::poll(sub { $a->safe_psql('postgres', q(select count(*) from pg_stat_activity where application_name = 'pgbench')) == 0 }, 'end of the load');
PgFanout::flush($a, timeout => '120 s');
my $written = $a->safe_psql('postgres', 'select sum(value) from counters');
eval {
	PgFanout::poll(sub { $broker->count($_) == 0 }, "$_ is empty") foreach qw(counter_ordered counter_unordered user_copy);
	$b->poll_query_until('postgres', q(select bool_and(waiting = 0 and state = 'idle') from fanout.stat_subscriptions)) or die 'not idle';
	1;
} or diag($@);

my $users = 'select * from users order by id';
is($b->safe_psql('postgres', q(select group_, sum(effects), sum(disorder) from effects where group_ = 'ordered' group by 1)),
	"ordered|$written|0", "$kills kills: the effects of $written messages are there exactly once, in order per key");
is($b->safe_psql('postgres', q(select group_, sum(effects) from effects where group_ = 'unordered' group by 1)), "unordered|$written", 'exactly once without order, too');
is($b->safe_psql('postgres', 'select count(*) - count(distinct message_id::text || group_) from log'), '0', 'no message was applied twice');
is($b->safe_psql('postgres', qq(select id, value from effects where group_ = '$_' order by id)),
	$a->safe_psql('postgres', 'select id, value from counters order by id'), "both databases agree ($_)") foreach qw(ordered unordered);
cmp_ok($a->safe_psql('postgres', 'select count(*) from users'), '>', 20, 'there are users');
is($b->safe_psql('postgres', $users), $a->safe_psql('postgres', $users), 'a table kept in sync is equal');
is($b->safe_psql('postgres', 'select count(*) from fanout.dead_letter'), '0', 'no message was given up');
is($b->safe_psql('postgres', 'select count(*) from fanout.delivery_failure'), '0', 'no failure is left');
note $b->safe_psql('postgres', q(
	select string_agg(concat_ws(' ', key, value, 'before', previous, 'attempt', attempt, 'redelivered', redelivered, at), E'\n')
	from (select *, lag(value) over (partition by key order by n) as previous from log where group_ = 'ordered') l where value <> previous + 1));
note 'repeats skipped since the last start: ' . $b->safe_psql('postgres', q(select string_agg(skipped::text, ', ' order by topic, consumer_group) from fanout.stat_subscriptions));

done_testing();

END
{
	local ($?, $@);

	$load->kill_kill if $load;
}
