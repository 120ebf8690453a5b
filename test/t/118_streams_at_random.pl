# A stream is read to its end, each message applied once and in order per key, while all
# that can be done with a subscription is done to it at random, and to its stream.
#
# With PG_FANOUT_LONG it takes 200 turns in place of 40.  PG_FANOUT_TEST_SEED repeats a
# run's choice.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use Test::More;
use Time::HiRes qw(sleep);

my $turns = $ENV{PG_FANOUT_LONG} ? 200 : 40;
my $seed = $ENV{PG_FANOUT_TEST_SEED} || int(rand(1_000_000));
srand($seed);
note "seed $seed";

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('a', $broker, conf => q(
log_statement = none
restart_after_crash = on
pg_fanout.retry_interval = 200ms
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

# Also while the server starts.
sub ask { return PgFanout::ask($node, @_); }

sub wait_until
{
	my ($condition) = @_;

	eval { PgFanout::poll(sub { ask("select $condition") eq 't' }, $condition, 120); 1 }
	  or die "not so: $condition\n" . ask('select * from fanout.stat_subscriptions; select * from fanout.subscriptions; select * from fanout.delivery_failure');
	return;
}

sub subscribe
{
	my ($topic, $start_at, $more) = @_;

	return "select fanout.subscribe('$topic', 'g', 'note(fanout.message)', start_at => '$start_at', max_attempts => 1000, retry_delay => '50 ms', max_retry_delay => '50 ms', prefetch => "
	  . ($more // 100) . ')';
}

my %published = ();

# Messages of ten keys, each with the next number.
sub publish
{
	my ($topic, $count) = @_;
	my $first = ($published{$topic} // 0) + 1;
	my $last = $published{$topic} = $first + $count - 1;

	sql("select fanout.publish('$topic', jsonb_build_object('n', n), key => (n % 10)::text) from generate_series($first, $last) n");
	return;
}

# All that was published is applied, as often as it should be, and nothing waits.
sub consumed
{
	my ($topic) = @_;

	PgFanout::flush($node);
	wait_until("(select count(distinct n) from log where topic = '$topic') = " . ($published{$topic} // 0));
	wait_until("not exists (select from fanout.delivery_failure where topic = '$topic')");
	return;
}

sub verdict
{
	my ($topic, $name) = @_;

	consumed($topic);
	is(sql("select count(*), count(distinct n) from log where topic = '$topic'"), "$published{$topic}|$published{$topic}", "$name: each message is applied once");
	is(sql("select count(*) from (select n, lag(n) over (partition by n % 10 order by at) as before from log where topic = '$topic') l where before > n"), '0', "$name: in order per key");
	is(sql("select count(*) from fanout.dead_letter where topic = '$topic'"), '0', "$name: none is given up");
	is(sql("select missed from fanout.subscriptions where topic = '$topic'"), '0', "$name: none is missed");
	return;
}

sql(q(
create table log (at bigserial, topic text, n int);
create function note(m fanout.message) returns void language plpgsql as $$
begin
	if m.attempt = 1 and hashtext(m.message_id::text) % 20 = 0 then raise exception 'the first attempt fails'; end if;
	insert into log (topic, n) values (m.topic, (m.body ->> 'n')::int);
end $$;
select fanout.declare_binding(t, 'g', 'stream') from unnest('{single,foreign,broken,old,loop}'::text[]) t));
PgFanout::flush($node);

# ---- one message at a time ----

publish('single', 300);
sql(subscribe('single', 'first', 1));
verdict('single', 'with a prefetch of 1');

# ---- without message ids ----

$broker->amqp('publish', '--exchange', 'foreign', '--bare', "{\"n\": $_}") foreach 1 .. 5;
$published{foreign} = 5;
sql(subscribe('foreign', 'first'));
consumed('foreign');
foreach my $i (1 .. 3)
{
	sql(q(select pg_terminate_backend(pid) from fanout.stat_subscriptions where topic = 'foreign'));
	$published{foreign}++;
	$broker->amqp('publish', '--exchange', 'foreign', '--bare', "{\"n\": $published{foreign}}");
	consumed('foreign');
}
verdict('foreign', 'messages without ids, after a restart of the worker');

# ---- a handler that is missing ----

publish('broken', 100);
sql(subscribe('broken', 'first'));
consumed('broken');
sql('alter function note(fanout.message) rename to renamed');
publish('broken', 100);
wait_until(q((select state = 'refused' from fanout.stat_subscriptions where topic = 'broken')));
sql(q(select pg_terminate_backend(pid) from fanout.stat_subscriptions where topic = 'broken'));
sql('alter function renamed(fanout.message) rename to note');
verdict('broken', 'refused for a while');

# ---- what a database sends once more ----

sql(q(
create table items (id int primary key, n int);
select fanout.alter_topic('old', format => 'row'), fanout.capture('items', 'old')));
sql('insert into items select i, i from generate_series(1, 200) i');
$published{old} = 200;
sql(subscribe('old', 'first'));
consumed('old');
sql(q(select fanout.replay('old', 'g', now() - interval '1 hour', again => true)));
wait_until(q((select count(*) filter (where n is not null) = 400 from log where topic = 'old')));
sql(q(select fanout.backfill('items', 'old', consumer_group => 'g')));
wait_until(q((select count(*) filter (where n is not null) = 600 from log where topic = 'old')));
is(sql(q(select min(c), max(c) from (select count(*) c from log where topic = 'old' and n is not null group by n) c)), '3|3', 'a replay and a backfill go into a stream, too');

# ---- at random ----

sql(subscribe('loop', 'first'));

my %actions = (
	publish => sub { publish('loop', 1 + int(rand(200))) },
	pause => sub { sql("select fanout.pause('loop', 'g')"); publish('loop', int(rand(20))); sleep rand(0.3); sql("select fanout.resume('loop', 'g')") },
	prefetch => sub { sql("select fanout.alter_subscription('loop', 'g', prefetch => " . (1, 2, 10, 1000, 65535)[ int(rand(5)) ] . ')') },
	subscribe => sub {
		sql("select fanout.unsubscribe('loop', 'g')");
		publish('loop', int(rand(20)));
		sql(subscribe('loop', (qw(first next last 0))[ int(rand(4)) ]));
	},
	terminate => sub { ask("select pg_terminate_backend(pid) from fanout.stat_subscriptions where topic = 'loop'") },
	server => sub { $node->stop('immediate'); $node->start },
	broker => sub { $broker->kill; $broker->start },
	disconnect => sub { $broker->ctl('close_all_connections', '-p', $broker->vhost, 'test') },
	delete => sub {
		consumed('loop');
		# read only what the worker has settled
		wait_until(q((select state = 'idle' from fanout.stat_subscriptions where topic = 'loop')));
		# what the old stream had must not be sent again after a crash: who begins a
		# stream anew, as is done below, remembers nothing of what was before
		sql('checkpoint');
		$broker->amqp('delete', '--queue', 'loop_g');
		wait_until('fanout.verify()');
		publish('loop', 1 + int(rand(100)));
		PgFanout::flush($node);
		wait_until(q((select state = 'refused' from fanout.stat_subscriptions where topic = 'loop')));
		sql(q(select fanout.alter_subscription('loop', 'g', start_at => 'first')));
		# until something was read, another start_at is another place
		wait_until(q((select stream_offset is not null from fanout.subscriptions where topic = 'loop')));
	},);
my @often = ((qw(publish) x 12), (qw(pause prefetch subscribe terminate) x 3), qw(disconnect server broker delete delete));
my %done;

publish('loop', 50);
consumed('loop');
foreach my $turn (1 .. $turns)
{
	my $action = $often[ int(rand(@often)) ];

	$actions{$action}->();
	wait_until('true');
	$done{$action}++;
	consumed('loop') if $action eq 'server' || rand() < 0.2;
}
note 'done: ' . join(', ', map { "$_ $done{$_}" } sort keys %done);
verdict('loop', 'whatever is done to it');

done_testing();
