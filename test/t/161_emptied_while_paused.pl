# A topic that is paused costs the others nothing when a segment of the outbox is emptied:
# nobody reads all that is in it, which would take the publisher the longer the more that
# is, and nothing is published meanwhile.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $rows = $ENV{PG_FANOUT_LONG} ? 1_000_000 : 20_000;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
pg_fanout.retention = 1h
autovacuum = off
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

# workers report it when transactions end, but not more often than once a second
sub rows_read
{
	my ($table) = @_;

	Time::HiRes::sleep(2);
	return sql("select seq_tup_read from pg_stat_all_tables where relid = 'fanout.$table'::regclass");
}

sub wait_until
{
	my ($condition, $what) = @_;

	PgFanout::poll(sub { sql("select $condition") eq 't' }, $what, 300);
	return;
}

sql(q(select fanout.declare_binding(t, 'g', 'classic') from unnest('{many,silent,waiting}'::text[]) t;
	select fanout.publish('waiting', '1', 'k') from fanout.pause('waiting');
	select fanout.pause('silent')));
wait_until(q((select count(*) from fanout.detached) = 2), 'topics that are paused');
sql(qq(select count(fanout.publish('many', to_jsonb(i), 'k' || i % 100)) from generate_series(2, $rows) i));
wait_until(qq(confirmed >= $rows - 1 from fanout.stat_publisher), 'all that can be sent');
sql(q(select fanout.publish('waiting', '2', 'k')));

my $segment = 'outbox_' . sql('select current from fanout.rotation');
my $before = rows_read($segment);
my $slowest = 0;
sql(q(alter system set pg_fanout.retention = '3s'));
$node->reload;
while (sql("select pg_relation_size('fanout.$segment')") > 0)
{
	my $since = Time::HiRes::time();
	my $sent = sql('select confirmed from fanout.stat_publisher');

	sql(q(select fanout.publish('many', '0')));
	wait_until("confirmed > $sent from fanout.stat_publisher", 'the next message');
	$slowest = Time::HiRes::time() - $since if Time::HiRes::time() - $since > $slowest;
	Time::HiRes::sleep(0.1);
}
my $read = rows_read($segment) - $before;
note(sprintf('%d rows read, the slowest message took %.3f s', $read, $slowest));
cmp_ok($read, '<', $rows / 10, 'to empty a segment, few of its rows are read');

sql(q(select fanout.publish('waiting', '3', 'k'); select fanout.resume(t) from unnest('{silent,waiting}'::text[]) t));
PgFanout::flush($node);
is_deeply([ map { $_->{body} } $broker->collect('waiting_g', expect => 3) ], [ 1, 2, 3 ], 'what waited is sent once, in order');

done_testing();
