# What is dropped while it is being declared, or while much is being sent: it goes, and not
# before what was written earlier has been sent.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use Test::More;

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $node = PgFanout::cluster('main', $proxy);

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub exists_at_broker
{
	my ($kind, $name) = @_;
	my $function = $kind eq 'exchange' ? 'rabbit_exchange:lookup' : 'rabbit_amqqueue:lookup';

	return $broker->evaluate(sprintf('%s(rabbit_misc:r(<<"%s">>, %s, <<"%s">>))', $function, $broker->vhost, $kind, $name)) =~ /^\{ok/;
}

# ---- while the broker's answer to the declaration is under way ----

sql(q(select fanout.declare_topic('old')));
foreach my $each (
	[ 'a topic', 'exchange', 'soon', q(fanout.declare_topic('soon')), q(fanout.drop_topic('soon')), q(fanout.topic where topic = 'soon') ],
	[ 'a binding', 'queue', 'old_soon', q(fanout.declare_binding('old', 'soon')), q(fanout.drop_binding('old', 'soon')), q(fanout.binding where consumer_group = 'soon') ])
{
	my ($what, $kind, $name, $declare, $drop, $row) = @$each;
	my $declared;

	# again if all that has taken longer than the answer
	foreach (1 .. 5)
	{
		PgFanout::flush($node);
		$proxy->command('delay 3000');
		sql("select $declare");
		PgFanout::poll(sub { exists_at_broker($kind, $name) }, 'it to be declared');
		sql("select $drop");
		PgFanout::poll(sub { sql('select count(*) from fanout.topology_change') == 0 }, 'the publisher to know that');
		$declared = sql("select count(declared_at) from $row");
		$proxy->command('pass');
		PgFanout::flush($node);
		last if $declared == 0;
	}
	is($declared, 0, "$what is dropped before the answer to its declaration has come");
	is(sql("select count(*) from $row"), 0, 'it is gone all the same');
	ok(!exists_at_broker($kind, $name), 'at the broker, too');
}

# ---- and while it is under way, declared again ----

sql(q(select fanout.declare_topic('soon')));
PgFanout::flush($node);
$proxy->command('delay 1500');
sql(q(select fanout.drop_topic('soon')));
PgFanout::poll(sub { !exists_at_broker('exchange', 'soon') }, 'it to be deleted');
sql(q(select fanout.declare_topic('soon')));
PgFanout::poll(sub { sql('select count(*) from fanout.topology_change') == 0 }, 'the publisher to know that');
$proxy->command('pass');
PgFanout::flush($node);
is(sql(q(select state from fanout.topics where topic = 'soon')), 'declared', 'a topic is declared again before the answer to its deletion has come');
ok(exists_at_broker('exchange', 'soon'), 'at the broker, too');

# ---- a queue that does not answer the broker ----

# Of such a quorum queue RabbitMQ says that it is empty.
sql(q(select fanout.declare_binding('silent', 'g'); select fanout.publish('silent', to_jsonb(i)) from generate_series(1, 5) i));
PgFanout::flush($node);
$broker->suspend_queue('silent_g');
sql(q(select fanout.drop_binding('silent', 'g')));
sleep 2;
$broker->resume_queue('silent_g');
PgFanout::poll(sub { sql(q(select last_error from fanout.bindings where topic = 'silent')) ne '' }, 'an answer');
is(sql(q(select last_error from fanout.bindings where topic = 'silent')), 'not dropped: the queue has 5 messages',
	'a queue is not dropped because it does not answer');
is($broker->left('silent_g'), 5, 'it has all that it had');

# ---- while a large batch is being read ----

sql(q(select fanout.declare_binding('last', 'g', 'classic')));
sql("select fanout.declare_binding('t$_', 'g', 'classic')") foreach 1 .. 8;
PgFanout::flush($node);
PgFanout::suspend($node, PgFanout::publisher_pid($node));
foreach my $i (1 .. 40)
{
	sql("select fanout.publish('t' || 1 + n % 8, to_jsonb(n)) from generate_series(1, 1000) n");
}
kill 'CONT', PgFanout::publisher_pid($node);
PgFanout::poll(sub { sql('select in_flight > 0 from fanout.stat_publisher') eq 't' }, 'messages in flight');
sql(q(begin; select fanout.publish('last', '1'), fanout.drop_binding('last', 'g'); commit));
PgFanout::flush($node);
is($broker->count('last_g'), 1, 'a queue gets what was written when it was dropped');
like(sql(q(select last_error from fanout.binding where topic_id = (select topic_id from fanout.topic where topic = 'last'))),
	qr/^not dropped: the queue has 1 messages$/, 'so it is not empty, and stays');

# The publisher finds the messages and that the queue is to be dropped when it starts.
sql(q(select fanout.declare_binding('start', 'g', 'classic')));
PgFanout::flush($node);
$proxy->command('freeze');
sql('select pg_terminate_backend(pid) from fanout.stat_publisher');
sql(q(select count(fanout.publish('start', to_jsonb(i))) from generate_series(1, 50) i));
sql(q(select fanout.drop_binding('start', 'g', if_unused => false, if_empty => false)));
$proxy->command('pass');
PgFanout::poll(sub { sql(q(select count(*) from fanout.bindings where topic = 'start')) == 0 }, 'it to be dropped');
is(sql(q(select string_agg(distinct state, ' ') from fanout.outbox_status where topic = 'start')), 'sent',
	'a publisher that starts drops no queue before it has what was written');

# A topic with so many messages reads them by itself, after the others.
sql(q(select fanout.declare_binding('large', 'g', 'classic')));
PgFanout::flush($node);
sql(q(begin; select count(fanout.publish('large', to_jsonb(i))) from generate_series(1, 25000) i; select fanout.drop_binding('large', 'g'); commit));
PgFanout::flush($node);
is($broker->count('large_g'), 25000, 'a queue gets all of a large transaction that drops it');
like(sql(q(select last_error from fanout.binding where topic_id = (select topic_id from fanout.topic where topic = 'large'))),
	qr/^not dropped: the queue has 25000 messages$/, 'and stays, too');

done_testing();
