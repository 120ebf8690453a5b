# What happens to one topic concerns no other: while each of these things happens,
# messages of a healthy topic arrive as soon as ever.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Independence;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster(
	'main', $broker,
	conf => q(
pg_fanout.retry_interval = 1s
pg_fanout.confirm_timeout = 5s
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub wait_for_reason
{
	my ($topic, $reason) = @_;

	$node->poll_query_until('postgres', "select coalesce(reason ~ '$reason', false) from fanout.stat_topics where topic = '$topic'")
	  or die PgFanout::status($node, 'postgres');
	return;
}

sql( q(select fanout.declare_binding('ill', 'g', 'classic');
	   select fanout.declare_binding('ill_q', 'g', 'quorum');
	   create table hot (id int primary key, n int);
	   create table big (id int primary key, v text);
	   select fanout.declare_binding('hot', 'g', 'classic');
	   select fanout.declare_binding('big', 'g', 'classic', '{"x-max-length": 10}');
	   select fanout.capture('hot', 'hot');
	   select fanout.capture('big', 'big');
	   insert into hot values (1, 0)));
PgFanout::flush($node);
PgFanout::Independence::of($node, $broker);

# ---- a queue that does not confirm ----

$broker->suspend_queue('ill_g');
sql(q(select fanout.publish('ill', to_jsonb(i), 'k' || i) from generate_series(1, 100) i));
is_independent('a queue that does not confirm', count => 100);
wait_for_reason('ill', 'did not confirm');
is_independent('once that is noticed');
$broker->resume_queue('ill_g');
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'ill'));
ok(1, 'and it goes on by itself');
$broker->amqp('purge', '--queue', 'ill_g');

# ---- the same with more than is kept in memory of all topics ----

$broker->suspend_queue('ill_g');
sql(q(select count(fanout.publish('ill', to_jsonb(repeat('x', 100000)))) from generate_series(1, 200) i));
is_independent('a queue that does not confirm very large messages', count => 100);
$broker->resume_queue('ill_g');
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'ill'));
$broker->amqp('purge', '--queue', 'ill_g');

# ---- a quorum queue without a leader ----

$broker->eval_queue('ill_q_g', 'ra:stop_server(quorum_queues, amqqueue:get_pid(Q))');
sql(q(select fanout.publish('ill_q', to_jsonb(i), 'k' || i) from generate_series(1, 100) i));
is_independent('a quorum queue that has lost its leader', count => 100);
wait_for_reason('ill_q', '.');
is_independent('once that is noticed');
$broker->eval_queue('ill_q_g', 'ra:restart_server(quorum_queues, amqqueue:get_pid(Q))');
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'ill_q'));
ok(1, 'and it goes on by itself');

# ---- refusals that last ----

my $bound = q(select fanout.declare_binding('refused', 'g', 'classic'););
my $publish = q(select count(fanout.publish('refused', to_jsonb(i), 'k' || i)) from generate_series(1, 100) i;);

# Others do not notice what the broker refuses of a topic, nor that it is tried again.
sub is_refused
{
	my ($name, $reason, $sql) = @_;

	sql($sql);
	wait_for_reason('refused', $reason);
	is_independent("a topic is refused, $name", count => 40);
	$broker->permit('guest');
	sql( q(select fanout.drop_binding(topic, consumer_group, false, false) from fanout.bindings where topic = 'refused';
		   select fanout.purge('refused', held => true)));
	PgFanout::poll(sub { sql(q(select count(*) from fanout.bindings where topic = 'refused')) == 0 }, 'the queue to be dropped');
	sql(q(select fanout.drop_topic('refused')));
	PgFanout::poll(sub { sql(q(select count(*) from fanout.topics where topic = 'refused')) == 0 }, 'the topic to be dropped');
	return;
}

is_refused('since no queue is bound', '^returned: 312', "select fanout.declare_topic('refused'); $publish");
is_refused('since a queue is full', '^nacked', qq(select fanout.declare_binding('refused', 'g', 'classic', '{"x-max-length": 1, "x-overflow": "reject-publish"}'); $publish));
$broker->amqp('declare', '--queue', 'refused_g', '--arguments', '{"x-max-length": 5}');
is_refused('since a queue exists with other arguments', '^406', $bound . $publish);
$broker->permit('guest', '.*', '^(?!refused$)');
is_refused('since the right to write is missing', '^403', $bound . $publish);
sql($bound);
PgFanout::flush($node);
$broker->permit('guest', '^(?!refused)');
$broker->evaluate(sprintf('rabbit_exchange:delete(rabbit_misc:r(<<"%s">>, exchange, <<"refused">>), false, <<"test">>)', $broker->vhost));
is_refused('since an exchange is missing and may not be declared', '^40[34]', $publish);

# ---- a declaration that the broker answers by closing the connection ----

my $reconnects = sql('select reconnects from fanout.stat_publisher');
sql( q(select fanout.declare_binding('hated', 'g', 'classic', '{"x-queue-master-locator": "min-master"}');
	   select fanout.publish('hated', '1')));
wait_for_reason('hated', 'closed the connection');
like(sql(q(select last_error from fanout.bindings where topic = 'hated')), qr/declare queue "hated_g": the broker closed the connection/,
	'the request is named for which the broker has closed the connection twice');
my ($error) = sql(q(select detail from fanout.check() where item like '%hated_g%'));
like($error, qr/closed the connection/, 'and check() shows it');
# the connection is lost for it, and a busy machine takes a second or two to log in again
is_independent('while that goes on', count => 100, within => 3000);
$reconnects = sql('select reconnects from fanout.stat_publisher') - $reconnects;
my $attempts = sql(q(select attempts from fanout.stat_topics where topic = 'hated'));
# the pauses between attempts become longer
cmp_ok($attempts, '<', 12, 'it is not asked again and again');
cmp_ok($reconnects, '<=', 2 * $attempts + 3, 'and the connection is lost for it only then');
sql(q(select fanout.drop_binding('hated', 'g')));
PgFanout::poll(sub { sql(q(select count(*) from fanout.bindings where topic = 'hated')) == 0 }, 'the culprit to be dropped');
sql(q(select fanout.purge('hated', held => true)));
sql(q(select fanout.drop_topic('hated')));
is_independent('after that');

# ---- a declaration that is not answered ----

sql(q(select fanout.declare_binding('mute', 'g', 'classic')));
PgFanout::flush($node);
$broker->suspend_queue('mute_g');
sql(q(select fanout.declare_binding('mute', 'other', 'classic')));
is(sql(q(select fanout.verify('2 s'))), 'f', 'a queue does not answer');
is_independent('a declaration that is not answered', count => 100);
wait_for_reason('mute', 'did not answer');
ok($node->poll_query_until('postgres', q(select last_error = 'declare queue "mute_g": the broker did not answer' from fanout.bindings where queue = 'mute_g')),
	'the request is named that is not answered');
like(sql(q(select ok, detail, hint from fanout.check() where item = 'queue "mute_g"')),
	qr/^f\|declare queue "mute_g": the broker did not answer\|Remove what stands in the way/, 'and check() shows it');
is_independent('once that is noticed');
$broker->resume_queue('mute_g');
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

# From here on no queue is slow.  A broker that the machine keeps from confirming for some
# seconds is not to be given up, since what was in flight would come twice.
sql(q(alter system set pg_fanout.confirm_timeout = '60s'));
$node->reload;

# ---- a hot row ----

my $file = PostgreSQL::Test::Utils::tempdir() . '/hot.sql';
append_to_file($file, "update hot set n = n + 1 where id = 1;\n");
my $bench = IPC::Run::start([ 'pgbench', '-n', '-c', 1, '-T', 8, '-f', $file, $node->connstr('postgres') ],
	'>', \my $bench_out, '2>', \my $bench_err, IPC::Run::timeout(600));
is_independent('a row that changes all the time', count => 100);
$bench->finish;
PgFanout::flush($node);
my @hot = map { $_->{body}->{after}->{n} } $broker->collect('hot_g', idle => 1);
is_deeply(\@hot, [ 0 .. $#hot ], 'a row that changes all the time: all changes arrive in order');

# ---- a transaction of very many rows ----

$bench = IPC::Run::start(
	[ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', 'insert into big select i, md5(i::text) from generate_series(1, 300000) i' ],
	'>', \$bench_out, '2>', \$bench_err, IPC::Run::timeout(600));
is_independent('a transaction of many rows', count => 200);
$bench->finish;
is_independent('while it is sent');
PgFanout::flush($node, timeout => '600 s');
is(sql(q(select count(*) from fanout.outbox_status where topic = 'big' and state <> 'sent')), 0, 'all of it is sent');

# ---- pause ----

sql(q(select fanout.pause('ill')));
sql(q(select count(fanout.publish('ill', to_jsonb(i))) from generate_series(1, 20000) i));
is_independent('a paused topic that is written to');
is(sql('select count(*) from fanout.held'), 0, 'pausing copies nothing');
sql(q(select fanout.resume('ill')));
is_independent('while its backlog is sent');
PgFanout::flush($node);
is($broker->count('ill_g'), 20000, 'all of it arrives');
PgFanout::Independence::end();

done_testing();
