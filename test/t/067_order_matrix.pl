# Order per key, and exactly once, on every kind of queue: classic, quorum with and
# without a delivery limit, with a single active consumer; with a prefetch of 1 to
# 65535, little memory, one in ten messages that fails at first, and workers that
# are terminated all the time.
#
# PG_FANOUT_LONG=1: 12,000 messages in each experiment in place of 600.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $long = $ENV{PG_FANOUT_LONG};
my $messages = $long ? 12000 : 600;
my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 24
));
my $rows = "$PostgreSQL::Test::Utils::tmp_check/experiments";

sql(q(
create table log (n serial, message_id uuid, key text, sequence bigint, redelivered boolean);
create function apply(m fanout.message) returns void language plpgsql as $$
begin
	perform pg_sleep(0.002);
	if m.attempt = 1 and random() < 0.1 then raise exception 'one in ten fails'; end if;
	insert into log (message_id, key, sequence, redelivered) values (m.message_id, m.key, m.sequence, m.redelivered);
end $$));

# queue, its arguments, prefetch, memory, workers terminated
my @experiments = (
	[ 'classic', '{}', 20, '64kB', 1 ],
	[ 'quorum', '{"x-delivery-limit": null}', 20, '64kB', 1 ],
	[ 'quorum', '{"x-delivery-limit": null}', 100, '64MB', 1 ],
	[ 'quorum', '{"x-delivery-limit": 100}', 7, '64kB', 1 ],
	[ 'quorum', '{"x-delivery-limit": 5}', 65535, '64MB', 1 ],
	[ 'quorum', '{"x-single-active-consumer": true}', 100, '1MB', 1 ],
	[ 'classic', '{}', 65535, '64kB', 1 ],
	[ 'quorum', '{}', 1, '64MB', 0 ]);
my $n = 0;
foreach my $experiment (@experiments)
{
	my ($type, $arguments, $prefetch, $memory, $kill) = @$experiment;
	my $topic = 'm' . ++$n;
	my $count = $prefetch == 1 ? $messages / 5 : $messages;
	my $name = "$type, $arguments, prefetch $prefetch, $memory" . ($kill ? ', workers terminated' : '');
	my ($kills, $start) = (0, time);

	sql(qq(alter system set pg_fanout.consumer_memory = '$memory'; select pg_reload_conf(); truncate log;
		select fanout.declare_binding('$topic', 'g', queue_type => '$type', arguments => '$arguments');
		select fanout.publish('$topic', jsonb_build_object('n', i), key => (i % 20)::text) from generate_series(1, $count) i));
	PgFanout::flush($node);
	sql(qq(select fanout.subscribe('$topic', 'g', 'apply(fanout.message)', prefetch => $prefetch, retry_delay => '50 ms', max_retry_delay => '200 ms')));
	while (sql('select count(*) from log') < $count && time - $start < 300)
	{
		sleep($long ? 0.5 : 0.1);
		next if !$kill || $kills >= ($long ? 24 : 5);
		$kills += sql(qq(select count(*) from (select pg_terminate_backend(pid) from fanout.stat_subscriptions where topic = '$topic' and state = 'consuming') x));
	}
	wait_until(qq((select waiting = 0 from fanout.stat_subscriptions where topic = '$topic')));
	is(sql(q(select count(*), count(distinct message_id), count(*) filter (where sequence < previous) from
		(select *, lag(sequence) over (partition by key order by n) as previous from log) l)), "$count|$count|0",
		"$name: $count messages once, none out of order");
	note sprintf('%d workers terminated, %.1f s', $kills, time - $start);
	append_to_file($rows, "| $name | 067_order_matrix | one transaction | $count | 0 | 0 |\n");
	sql(qq(select fanout.unsubscribe('$topic', 'g')));
}

done_testing();

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub wait_until
{
	my ($condition) = @_;

	$node->poll_query_until('postgres', "select coalesce($condition, false)")
	  or die "not so: $condition\n" . sql('select * from fanout.stat_subscriptions; select * from fanout.delivery_failure limit 20; select count(*) from log');
	return;
}
