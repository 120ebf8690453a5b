# A backlog spread over very many topics is read once, to find it, and once more to fetch it:
# topics with little in memory that is confirmed later than others' do not read by themselves.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my ($topics, $slow, $messages) = (400, 20, 20000);
my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => "log_statement = none\npg_fanout.max_channels = 500");

sub sql { return $node->safe_psql('postgres', $_[0]); }

# How often blocks of the outbox were looked at, by processes that are gone; before PostgreSQL
# 15 another process counts that, a little later.
sub blocks_seen
{
	sleep 2 if $node->pg_version < 15;
	return sql(q(select sum(heap_blks_hit + heap_blks_read) from pg_statio_all_tables where schemaname = 'fanout' and relname ~ '^outbox_\d'));
}

sql("select count(fanout.declare_binding('t' || i, 'g', 'classic', '{\"x-max-length\": 10}')) from generate_series(1, $topics) i");
PgFanout::flush($node, timeout => '180 s');
my $pid = PgFanout::publisher_pid($node);
PgFanout::suspend($node, $pid);
sql("select count(fanout.publish('t' || 1 + i % $topics, to_jsonb(i), key => i::text)) from generate_series(1, $messages) i");
my $before = blocks_seen();
$broker->suspend_queue("t${_}_g") foreach 1 .. $slow;
kill 'CONT', $pid;
my $slow_ones = join(', ', map { "'t$_'" } 1 .. $slow);
# does not look at the outbox
$node->poll_query_until('postgres', "select sum(pending) = 0 from fanout.stat_topics where topic not in ($slow_ones)") or die;
$broker->resume_queue("t${_}_g") foreach 1 .. $slow;
PgFanout::flush($node, timeout => '180 s');
is(PgFanout::publisher_pid($node), $pid, 'one publisher sends all of it');
sql("select pg_terminate_backend($pid, 60000)");
my $seen = blocks_seen() - $before;
my $blocks = sql(q(select sum(pg_relation_size(oid) / 8192)::bigint from pg_class where relnamespace = 'fanout'::regnamespace and relname ~ '^outbox_\d+$'));

is(sql(q(select count(*) from fanout.outbox_status where state = 'sent')), $messages, 'all of it is sent');
cmp_ok($seen, '>', $blocks, 'reads are counted');
cmp_ok(sql('select count(distinct topic_id) from fanout.sent'), '>=', $slow, 'others did not wait for the slow ones');
cmp_ok($seen, '<', 10 * $blocks, "$topics topics are read together ($seen looks at $blocks blocks)");

done_testing();
