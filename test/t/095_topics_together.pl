# A backlog spread over very many topics is read once: as long as they are done one after
# the other, none leaves the main cursor to read its messages by itself.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my ($topics, $messages) = (400, 40000);
my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => "log_statement = none\npg_fanout.max_channels = 500");

sub sql { return $node->safe_psql('postgres', $_[0]); }

sql("select count(fanout.declare_binding('t' || i, 'g', 'classic', '{\"x-max-length\": 10}')) from generate_series(1, $topics) i");
PgFanout::flush($node, timeout => '180 s');
my $pid = PgFanout::publisher_pid($node);
PgFanout::suspend($node, $pid);
sql("select count(fanout.publish('t' || 1 + i % $topics, to_jsonb(i), key => i::text)) from generate_series(1, $messages) i");
kill 'CONT', $pid;
PgFanout::flush($node, timeout => '180 s');
is(sql(q(select count(*) from fanout.outbox_status where state = 'sent')), $messages, 'all of it is sent');
my $alone = sql('select count(distinct topic_id) from fanout.sent where topic_id is not null');
cmp_ok($alone, '<', $topics / 2, "most topics are read together, $alone of $topics by themselves");
is(PgFanout::publisher_pid($node), $pid, 'by one publisher');

done_testing();
