# Which failures count: a deadlock, a lock that is not granted, a lack of
# resources or somebody's intervention is no attempt of a message; and two workers
# that write the same rows do not stand in each other's way.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $long = $ENV{PG_FANOUT_LONG};
my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 24
));
my $rows = "$PostgreSQL::Test::Utils::tmp_check/experiments";
my $messages = $long ? 30000 : 6000;

sql(q(
create table acc (id int primary key, n int not null default 0);
insert into acc select i from generate_series(1, 50) i;
create function add(m fanout.message) returns void language sql as $$ update acc set n = n + 1 where id = (m.body ->> 'r')::int $$;
create function wait_for_sum(total int) returns void language plpgsql as $$
begin
	while (select sum(n) from acc) < total loop perform pg_sleep(0.002); end loop;
end $$;
create table log (n serial, topic text, key text, attempt int);
create function note(m fanout.message) returns void language sql as $$ insert into log (topic, key, attempt) values (m.topic, m.key, m.attempt) $$;
select fanout.declare_binding(t, 'g') from unnest('{one,d1,d2,errors,child,exhausted}'::text[]) t;
));

# ---- two subscriptions, the same rows ----

my $publish = q(select fanout.publish('%s', jsonb_build_object('r', 1 + (random() * 49)::int), key => 'k' || i) from generate_series(1, %d) i);
my ($one, $two, $failed);
# up to three times, for the machine may be slower while the two are at it
foreach (1 .. 3)
{
	sql(q(select fanout.unsubscribe(t, 'g') from unnest('{d1,d2}'::text[]) t; update acc set n = 0)) if defined $two;
	sql(sprintf($publish, 'one', 2 * $messages));
	sql(sprintf($publish, $_, $messages)) foreach qw(d1 d2);
	PgFanout::flush($node);
	$one = seconds(sub { sql(q(select fanout.subscribe('one', 'g', 'add(fanout.message)', max_attempts => 1))) }, 2 * $messages);
	sql(q(select fanout.unsubscribe('one', 'g'); update acc set n = 0));
	$two = seconds(sub { sql(q(select fanout.subscribe(t, 'g', 'add(fanout.message)', max_attempts => 1) from unnest('{d1,d2}'::text[]) t)) }, 2 * $messages);
	note sprintf('%d messages: %.1f s by one subscription, %.1f s by two on the same 50 rows, %.2f of the rate', 2 * $messages, $one, $two, $one / $two);
	$failed += sql(q(select coalesce(sum(failed), -1) from fanout.stat_subscriptions));
	last if $two < 5 * $one + 2;
}
is(sql('select sum(n) from acc'), 2 * $messages, 'two subscriptions that update the same 50 rows: each message is applied once');
is(sql('select count(*) from fanout.dead_letter'), 0, 'and none is given up, though they have one attempt');
is($failed, 0, 'there was no deadlock');
cmp_ok($two, '<', 5 * $one + 2, 'they do not wait for each other to time out');
record('two subscriptions update the same 50 rows', 2 * $messages);
sql(q(select fanout.unsubscribe(t, 'g') from unnest('{d1,d2}'::text[]) t));

# ---- errors that count, and those that do not ----

sql(q(
create function err(m fanout.message) returns void language plpgsql as $$
begin
	if not exists (select from calm) then
		raise exception 'as told' using errcode = m.body ->> 'code';
	end if;
	perform note(m);
end $$;
create table calm ();
select fanout.subscribe('errors', 'g', 'err(fanout.message)', max_attempts => 3, retry_delay => '50 ms', max_retry_delay => '100 ms')));
my @no_attempts = qw(40001 40P01 40000 55P03 53100 53200 53300 57014 57P01);
my @attempts = qw(P0001 23505 22012 42P01 XX000 57014x);
sql(qq(select fanout.publish('errors', '{"code": "$_"}', key => '$_'))) foreach @no_attempts, grep { !/x/ } @attempts;
wait_until(q((select count(*) = 5 from fanout.dead_letter)));
sleep 1.5;
is(sql(q(select string_agg(key, ' ' order by key), min(attempts), max(attempts) from fanout.dead_letter)), '22012 23505 42P01 P0001 XX000|3|3',
	'errors of the message itself are attempts');
is_soon(q(select string_agg(sqlstate, ' ' order by sqlstate) || '|' || max(attempts) from fanout.delivery_failure), join(' ', sort @no_attempts) . '|0',
	'conflicts, a lack of resources and interventions are none');
sql('alter table calm add x int; insert into calm values (1)');
wait_until(qq((select count(*) = ${\ scalar @no_attempts} from log)));
is(sql('select max(attempt) from log'), 1, 'and when they are over, each message is applied at its first attempt');
sql(q(select fanout.unsubscribe('errors', 'g'); truncate log; select fanout.purge()));

# ---- a foreign key whose other row comes later ----

sql(q(
create table parent (id int primary key);
create table child (id int primary key references parent);
create function add_child(m fanout.message) returns void language plpgsql as $$
begin
	insert into child values ((m.body ->> 'id')::int);
	perform note(m);
end $$;
select fanout.subscribe('child', 'g', 'add_child(fanout.message)', max_attempts => 2, retry_delay => '100 ms', max_retry_delay => '200 ms');
select fanout.publish('child', jsonb_build_object('id', i), key => i::text) from generate_series(1, 30) i));
wait_until(q((select count(*) = 30 from fanout.delivery_failure)));
sleep 1.5;
is_soon(q((select count(*) || '|' || max(attempts) || '|' || min(sqlstate) from fanout.delivery_failure) || '|' || (select state in ('idle', 'consuming') from fanout.stat_subscriptions)), '30|0|23503|true',
	'what waits for its parent makes no attempts, and is no reason to refuse');
sql('insert into parent select generate_series(1, 30)');
wait_until(q((select count(*) = 30 from child)));
is(sql('select max(attempt) from log'), 1, 'it is applied once that is there');
sql(q(select fanout.unsubscribe('child', 'g');
	select fanout.subscribe('child', 'g', 'add_child(fanout.message)', max_attempts => 2, retry_delay => '100 ms', max_wait => '1 s');
	select fanout.publish('child', '{"id": 99}')));
wait_until(q((select count(*) = 1 from fanout.dead_letter)));
is(sql('select sqlstate, attempts from fanout.dead_letter'), '23503|2', 'after max_wait its attempts count');

done_testing();

sub sql { return $node->safe_psql('postgres', $_[0]); }

# How long it takes to the last message.  From the first one on would be too short where
# they are under way before that is looked at.
sub seconds
{
	my ($begin, $count) = @_;
	my $start = time;

	$begin->();
	sql("select wait_for_sum($count)");
	return time - $start;
}

# A worker's first attempts are recorded before they are made, so one that is just being
# made is seen as well.
sub is_soon
{
	my ($value, $expected, $name) = @_;

	ok(PgFanout::soon($node, "($value) = '$expected'"), $name);
	return;
}

sub wait_until
{
	my ($condition) = @_;

	$node->poll_query_until('postgres', "select coalesce($condition, false)")
	  or die "not so: $condition\n" . sql('select * from fanout.stat_subscriptions; select * from fanout.delivery_failure limit 20; select * from log');
	return;
}

sub record
{
	my ($name, $messages) = @_;

	append_to_file($rows, "| $name | 061_conflicts | 1 client | $messages | 0 | 0 |\n");
	return;
}
