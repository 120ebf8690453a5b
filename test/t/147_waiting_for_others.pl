# Messages whose handler waits for what other messages write (wait_for): only attempts that
# do not count are made sooner because others were applied; and whatever is done to
# subscriptions of all kinds at random meanwhile, each message is applied once, and those of a
# key in order.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $seconds = $ENV{PG_FANOUT_LONG} ? 120 : 15;
my $nodes = $ENV{PG_FANOUT_LONG} ? 5000 : 600;
my $seed = $ENV{PG_FANOUT_SEED} || int(rand(2**31));

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 24
));

note "seed $seed";
srand($seed);

# ---- attempts that count ----

sql(q(
create table parent (id int primary key);
create table child (id int references parent);
create function need(m fanout.message) returns void language sql as $$ insert into child values (m.key::int) $$;
select fanout.declare_binding('needs', 'g');
select fanout.subscribe('needs', 'g', 'need(fanout.message)', retry_delay => '1 h', max_retry_delay => '1 h', max_wait => '0 s')));
sql(q(select fanout.publish('needs', '{}', '1')));
until_true(q(select count(*) = 1 from fanout.delivery_failure where attempts = 1), 'an attempt counts');
sql(q(select fanout.alter_subscription('needs', 'g', max_wait => '1 h')));
sql(q(select fanout.publish('needs', '{}', '2'), fanout.publish('needs', '{}', '3')));
until_true(q(select count(*) = 2 from fanout.delivery_failure where attempts = 0), 'two wait');
sql(q(select fanout.alter_subscription('needs', 'g', max_wait => '0 s')));
sql(q(insert into parent values (2), (3); select fanout.retry('needs', 'g', message_id) from fanout.waiting where key = '2'));
until_true(q(select count(*) = 2 from child), 'one is tried again, and is followed at once by the other one, which found what it waited for, too');
sleep 1;
is(sql('select attempts from fanout.waiting'), '1', 'but not by one whose attempts count');
sql(q(insert into parent values (1); select fanout.retry('needs', 'g')));
until_true(q(select count(*) = 3 from child), 'which comes when it is due');
sql(q(select fanout.unsubscribe('needs', 'g')));

# ---- at random ----

my %handlers = (one => 'one(fanout.message)', requeued => 'one(fanout.message)', free => 'one(fanout.message)', many => 'many(fanout.message[])', many_free => 'many(fanout.message[])');
my %options = (
	one => '', many => '', free => ', ordered => false', many_free => ', ordered => false',
	requeued => q(, ordered => false, on_failure => 'requeue'),
);

sql(q(
create table node (consumer_group text, id int, parent int, primary key (consumer_group, id), foreign key (consumer_group, parent) references node);
create table log (n bigserial, consumer_group text, message_id uuid, key text, sequence bigint, attempt int);
create table fails (share float8);
insert into fails values (0.1);
create function one(m fanout.message) returns void language plpgsql as $$
begin
	insert into log (consumer_group, message_id, key, sequence, attempt) values (m.consumer_group, m.message_id, m.key, m.sequence, m.attempt);
	insert into node values (m.consumer_group, m.key::int, (m.body->>'parent')::int) on conflict (consumer_group, id) do update set parent = excluded.parent;
	if random() < (select share from fails) then raise exception 'at random' using errcode = (array['P0001','40001','22012','55P03'])[1 + floor(random() * 4)]; end if;
end $$;
create function many(messages fanout.message[]) returns void language plpgsql as $$
declare
	m fanout.message;
begin
	foreach m in array messages loop perform one(m); end loop;
end $$));
foreach my $group (sort keys %handlers)
{
	sql("select fanout.declare_binding('t', '$group'), fanout.subscribe('t', '$group', '$handlers{$group}', prefetch => 400, retry_delay => '300 ms', max_retry_delay => '2 s',
		max_attempts => 1000, wait_for => '{23503, P0001, 40001}' $options{$group})");
}

my $waits = q(select message_id, consumer_group from fanout.waiting join fanout.subscription using (subscription_id) where not requeued order by random() limit 1);
my @groups = sort keys %handlers;
my @calls = (
	sub { "select fanout.retry('t', '$_[0]')" },
	sub { "select fanout.retry('t', consumer_group, message_id) from ($waits) w" },
	sub { "select fanout.pause('t', '$_[0]'), pg_sleep(0.3); select fanout.resume('t', '$_[0]')" },
	sub { "select fanout.alter_subscription('t', '$_[0]', max_wait => interval '1 s' * (random() * 2)::int)" },
	sub { "select fanout.alter_subscription('t', '$_[0]', prefetch => 1 + (random() * 400)::int)" },
	sub { q(select pg_terminate_backend(pid) from fanout.stat_subscriptions where random() < 0.3) },
	sub { q(select pg_cancel_backend(pid) from fanout.stat_subscriptions) },
);
my $published = 0;
my $end = time + $seconds;
my $id = 0;
while (time < $end || $id < $nodes)
{
	# a statement writes a tree, children first or in any order, and then changes it
	if ($id < $nodes)
	{
		my ($first, $n) = ($id + 1, 1 + int(rand(60)));
		my $order = (qw(i desc i random()))[ rand 2 ] eq 'i' ? 'k, i' : 'k, random()';

		$id += $n;
		sql("select fanout.publish('t', jsonb_build_object('parent', case when k = 0 then nullif(i + 1, $id + 1) end), i::text)
			from (select i, k from generate_series($first, $id) i, generate_series(0, 2) k order by $order) x");
		$published += 3 * $n;
	}
	my $call = $calls[ rand @calls ]->($groups[ rand @groups ]);
	my $hold = rand() < 0.3 ? rand(1) : 0;
	my $how = rand() < 0.3 ? 'rollback' : 'commit';

	$node->psql('postgres', "set lock_timeout = '3s'; begin; $call; select pg_sleep($hold); $how", stderr => \my $stderr);
	sleep rand(0.1);
}
sql(q(update fails set share = 0));
PgFanout::flush($node);
sql("select fanout.resume('t', '$_'), fanout.retry('t', '$_')") foreach @groups;
until_true("select count(*) >= $published * " . @groups . ' from log', 'all messages are applied')
  or diag(sql('select * from fanout.stat_subscriptions; select topic, consumer_group, key, attempts, sqlstate, left(error, 200), next_try from fanout.delivery_failure limit 20'));
until_true('select count(*) = 0 from fanout.waiting', 'nothing waits any more')
  or diag(sql('select s.consumer_group, w.requeued, w.key, w.attempts, w.postponed, w.sqlstate, w.next_try, w.waits_since, now(), (select (n, l.attempt, l.sequence) from log l where l.message_id = w.message_id and l.consumer_group = s.consumer_group) from fanout.waiting w join fanout.subscription s using (subscription_id) limit 20; select * from fanout.stat_subscriptions'));
is(sql('select count(*) from fanout.dead_letter'), '0', 'no message was given up');
is(sql('select distinct count(*), count(distinct message_id) from log group by consumer_group'), "$published|$published", 'each was applied once');
is(sql(q(select count(*) from (select sequence < lag(sequence) over (partition by consumer_group, key order by n) as wrong from log where consumer_group in ('one', 'many')) x where wrong)), '0', 'those of a key in order, where that was wanted')
  or diag(sql(q(select * from (select *, lag(sequence) over w as before, lag(n) over w as n_before from log where consumer_group in ('one', 'many') window w as (partition by consumer_group, key order by n)) x where before > sequence limit 10)));

done_testing();

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub until_true
{
	my ($query, $name) = @_;

	return ok($node->poll_query_until("postgres", $query), $name);
}
