# A topic whose declaration the broker refuses gives messages up as any other, one after
# the other, if its on_exhausted says so; and no more of them than had their attempts.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
pg_fanout.retry_interval = 100ms
pg_fanout.retry_limit = 2
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub dead { return sql('select count(*) from fanout.dead_letter'); }

$broker->amqp('declare', '--queue', 'other_g', '--arguments', '{"x-max-length": 5}');
sql( q(select fanout.declare_topic('other', on_exhausted => 'dead_letter');
	   select fanout.declare_binding('other', 'g', 'classic');
	   select fanout.publish('other', to_jsonb(i), 'k') from generate_series(1, 2) i;));
PgFanout::poll(sub { dead() == 2 }, 'both messages to be given up', 60);
is(sql(q(select string_agg(format('%s %s %s', payload, attempts, reason ~ 'inequivalent arg'), ', ' order by id) from fanout.dead_letter)),
	'1 2 t, 2 2 t', 'each of them after its attempts');
$broker->amqp('delete', '--queue', 'other_g');
sql(q(select fanout.publish('other', '3', 'k')));
PgFanout::flush($node);
is_deeply([ map { $_->{body} } $broker->collect('other_g', expect => 1) ], [3], 'once the queue is right, the topic flows');

# ---- what is to be given up no more ----

# the publisher declares by the clock, too
my $pid = PgFanout::publisher_pid($node);
PgFanout::suspend($node, $pid);
$broker->amqp('delete', '--queue', 'other_g');
$broker->amqp('declare', '--queue', 'other_g', '--arguments', '{"x-max-length": 5}');
kill 'CONT', $pid;
sql('select fanout.verify()');
sql(q(select fanout.publish('other', '4', 'k')));
PgFanout::poll(sub { dead() == 3 }, 'a message to be given up', 60);
sql(q(select fanout.pause('other'); select fanout.publish('other', to_jsonb(i), 'k') from generate_series(5, 3005) i));
sql(q(select fanout.alter_topic('other', on_exhausted => 'hold')));
$broker->amqp('delete', '--queue', 'other_g');
sql('select fanout.verify()');
sql(q(select fanout.resume('other')));
PgFanout::flush($node, timeout => '60 s');
is(dead(), 3, 'a topic that holds its messages gives none up');
is($broker->count('other_g'), 3001, 'and all of them arrive');

done_testing();
