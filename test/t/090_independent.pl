# What happens to one topic concerns no other: while each of these things happens,
# messages of a healthy topic arrive as soon as ever.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster(
	'main', $broker,
	conf => q(
pg_fanout.retry_interval = 1s
pg_fanout.confirm_timeout = 5s
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

# A session of its own, which costs no new connection for each query.
my %s = (in => '', out => '', err => '');
$s{harness} = IPC::Run::start(
	[ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('postgres') ],
	'<', \$s{in}, '>', \$s{out}, '2>', \$s{err}, IPC::Run::timeout(600));

sub query
{
	my ($sql) = @_;

	$s{in} .= "$sql;\n\\echo done\n";
	$s{harness}->pump until $s{out} =~ s/^(.*\n)?done\n//ms;
	my $result = defined $1 ? $1 : '';
	chomp $result;
	return $result;
}

# An independent client notes when messages of the healthy topic arrive.
my $arrivals = "$PostgreSQL::Test::Utils::tmp_check/arrivals";
my $collector;

sub start_collector
{
	$collector = IPC::Run::start(
		[ "$PgFanout::lib/collector", '--uri', $broker->uri, '--out', $arrivals, '--queue', 'healthy_g' ],
		'<', \undef, '>', \my $collector_out, '2>', \my $collector_err);
	PgFanout::poll(sub { -e $arrivals }, 'the collector');
	return;
}

# Token => time of arrival.
sub arrived
{
	return map { my @column = split /\t/; chomp @column; ($column[7] => $column[0]) } split /^/, slurp_file($arrivals);
}

# How long single messages of the healthy topic take from their commit to the client:
# in milliseconds, in order.
my $token = 0;

sub latencies
{
	my ($count) = @_;
	my %committed;
	my %arrived;

	for (1 .. $count)
	{
		$token++;
		query("insert into beat (token) values ('t$token')");
		$committed{"t$token"} = Time::HiRes::time();
		select(undef, undef, undef, 0.03);
	}
	for (1 .. 200)
	{
		%arrived = arrived();
		last unless grep { !defined $arrived{$_} } keys %committed;
		select(undef, undef, undef, 0.1);
	}
	return sort { $a <=> $b } map { (($arrived{$_} || 1e12) - $committed{$_}) * 1000 } keys %committed;
}

# While something happens to the topic "ill", is the healthy one as quick as ever?
my $worst;

sub is_independent
{
	my ($name, %params) = @_;
	my @ms = latencies($params{count} || 60);
	my ($median, $slow, $p99) = map { $ms[ int(@ms * $_) ] } 0.5, 0.97, 0.99;

	note sprintf('%s: p50 %.1f ms, p97 %.1f ms, p99 %.1f ms, longest %.1f ms', $name, $median, $slow, $p99, $ms[-1]);
	cmp_ok($slow, '<', $worst, "$name: another topic's messages arrive as soon as ever");
	cmp_ok($ms[-1], '<', 2000, "$name: and none of them waits");
	return;
}

sub eval_queue
{
	my ($queue, $erlang) = @_;
	my $vhost = $broker->vhost;

	return $broker->ctl('eval',
		qq({ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"$vhost">>, queue, <<"$queue">>)), $erlang.));
}

sub ill_state { return sql(q(select string_agg(distinct state, ',') from fanout.outbox_status where topic = 'ill')); }

sub wait_for_reason
{
	my ($topic, $reason) = @_;

	$node->poll_query_until('postgres', "select coalesce(reason ~ '$reason', false) from fanout.stat_topics where topic = '$topic'")
	  or die PgFanout::status($node, 'postgres');
	return;
}

sql( q(select fanout.declare_binding('healthy', 'g', 'classic');
	   create table beat (id serial primary key, token text);
	   select fanout.capture('beat', 'healthy');
	   insert into beat (token) values ('first');
	   select fanout.declare_binding('ill', 'g', 'classic');
	   select fanout.declare_binding('ill_q', 'g', 'quorum');
	   create table hot (id int primary key, n int);
	   create table big (id int primary key, v text);
	   select fanout.declare_binding('hot', 'g', 'classic');
	   select fanout.declare_binding('big', 'g', 'classic', '{"x-max-length": 10}');
	   select fanout.capture('hot', 'hot');
	   select fanout.capture('big', 'big');
	   insert into hot values (1, 0)));
PgFanout::flush($node);
start_collector();
my @alone = latencies(60);
note sprintf('alone: p50 %.1f ms, longest %.1f ms', $alone[ @alone / 2 ], $alone[-1]);
$worst = $alone[ int(@alone * 0.97) ] + 300;

# ---- a queue that does not confirm ----

eval_queue('ill_g', 'sys:suspend(amqqueue:get_pid(Q))');
sql(q(select fanout.publish('ill', to_jsonb(i), 'k' || i) from generate_series(1, 100) i));
is_independent('a queue that does not confirm', count => 100);
wait_for_reason('ill', 'did not confirm');
is_independent('once that is noticed');
eval_queue('ill_g', 'sys:resume(amqqueue:get_pid(Q))');
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'ill'));
ok(1, 'and it goes on by itself');
$broker->amqp('purge', '--queue', 'ill_g');

# ---- the same with more than is kept in memory of all topics ----

eval_queue('ill_g', 'sys:suspend(amqqueue:get_pid(Q))');
sql(q(select count(fanout.publish('ill', to_jsonb(repeat('x', 100000)))) from generate_series(1, 200) i));
is_independent('a queue that does not confirm very large messages', count => 100);
eval_queue('ill_g', 'sys:resume(amqqueue:get_pid(Q))');
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'ill'));
$broker->amqp('purge', '--queue', 'ill_g');

# ---- a quorum queue without a leader ----

eval_queue('ill_q_g', 'ra:stop_server(quorum_queues, amqqueue:get_pid(Q))');
sql(q(select fanout.publish('ill_q', to_jsonb(i), 'k' || i) from generate_series(1, 100) i));
is_independent('a quorum queue that has lost its leader', count => 100);
wait_for_reason('ill_q', '.');
is_independent('once that is noticed');
eval_queue('ill_q_g', 'ra:restart_server(quorum_queues, amqqueue:get_pid(Q))');
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'ill_q'));
ok(1, 'and it goes on by itself');

# ---- a declaration that the broker answers by closing the connection ----

my $reconnects = sql('select reconnects from fanout.stat_publisher');
sql( q(select fanout.declare_binding('hated', 'g', 'classic', '{"x-queue-master-locator": "min-master"}');
	   select fanout.publish('hated', '1')));
wait_for_reason('hated', 'closed the connection');
like(sql(q(select last_error from fanout.bindings where topic = 'hated')), qr/declare queue "hated_g": the broker closed the connection/,
	'the request is named for which the broker has closed the connection twice');
my ($error) = sql(q(select detail from fanout.check() where item like '%hated_g%'));
like($error, qr/closed the connection/, 'and check() shows it');
is(sql('select reconnects from fanout.stat_publisher') - $reconnects < 8 ? 'few' : 'many', 'few', 'it is not asked again and again');
sql(q(select fanout.drop_binding('hated', 'g')));
PgFanout::poll(sub { sql(q(select count(*) from fanout.bindings where topic = 'hated')) == 0 }, 'the culprit to be dropped');
sql(q(select fanout.purge('hated', held => true)));
sql(q(select fanout.drop_topic('hated')));
is_independent('after that');

# ---- a declaration that is not answered ----

sql(q(select fanout.declare_binding('mute', 'g', 'classic')));
PgFanout::flush($node);
eval_queue('mute_g', 'sys:suspend(amqqueue:get_pid(Q))');
sql(q(select fanout.declare_binding('mute', 'other', 'classic')));
is(sql(q(select fanout.verify('2 s'))), 'f', 'a queue does not answer');
is_independent('a declaration that is not answered', count => 100);
wait_for_reason('mute', 'did not answer');
is_independent('once that is noticed');
eval_queue('mute_g', 'sys:resume(amqqueue:get_pid(Q))');
$node->poll_query_until('postgres', q(select count(*) = 0 from fanout.stat_topics where topic = 'mute' and reason is not null));
ok(1, 'and it goes on by itself');

# ---- a queue of another type than the catalog says is to be dropped ----

$broker->amqp('declare', '--queue', 'typed_g', '--arguments', '{"x-queue-type": "quorum"}');
sql(q(select fanout.declare_binding('typed', 'g', 'classic')));
PgFanout::poll(sub { sql(q(select state from fanout.bindings where topic = 'typed')) eq 'error' }, 'the error');
sql(q(select fanout.drop_binding('typed', 'g')));
PgFanout::poll(sub { sql(q(select count(*) from fanout.bindings where topic = 'typed')) == 0 }, 'the binding to be dropped');
ok(1, 'a queue that is a quorum queue, against what was declared, can be dropped');
sql(q(select fanout.drop_topic('typed')));

# ---- a hot row ----

my $file = PostgreSQL::Test::Utils::tempdir() . '/hot.sql';
append_to_file($file, "update hot set n = n + 1 where id = 1;\n");
my $bench = IPC::Run::start([ 'pgbench', '-n', '-c', 1, '-T', 8, '-f', $file, $node->connstr('postgres') ],
	'>', \my $bench_out, '2>', \my $bench_err, IPC::Run::timeout(120));
is_independent('a row that changes all the time', count => 100);
$bench->finish;
PgFanout::flush($node);
my @hot = map { $_->{body}->{after}->{n} } $broker->collect('hot_g', idle => 1);
is_deeply(\@hot, [ 0 .. $#hot ], 'a row that changes all the time: all changes arrive in order');

# ---- a transaction of very many rows ----

$bench = IPC::Run::start(
	[ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', 'insert into big select i, md5(i::text) from generate_series(1, 300000) i' ],
	'>', \$bench_out, '2>', \$bench_err, IPC::Run::timeout(120));
is_independent('a transaction of many rows', count => 200);
$bench->finish;
is_independent('while it is sent');
PgFanout::flush($node, timeout => '180 s');
is(sql(q(select count(*) from fanout.outbox_status where topic = 'big' and state <> 'sent')), 0, 'all of it is sent');

# ---- pause ----

sql(q(select fanout.pause('ill')));
sql(q(select count(fanout.publish('ill', to_jsonb(i))) from generate_series(1, 20000) i));
is_independent('a paused topic that is written to');
is(sql('select count(*) from fanout.held'), 0, 'pausing copies nothing');
sql(q(select fanout.resume('ill')));
is_independent('while its backlog is sent');
PgFanout::flush($node, timeout => '60 s');
is($broker->count('ill_g'), 20000, 'all of it arrives');
$s{harness}->kill_kill;
$collector->signal('TERM');
$collector->finish;

done_testing();
