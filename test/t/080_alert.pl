# An alert stops nothing: what NOTIFY cannot take is skipped, once for all in the
# log, and messages are published.
#
# The error is a real one of the transaction that notifies.  Transactions that
# notify commit one after the other, under a lock of the server, and one that
# waits for a synchronous standby keeps it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker();
my $node = PgFanout::cluster(
	'main', $broker,
	conf => qq(
synchronous_standby_names = 'nobody'
synchronous_commit = local
wal_level = replica
max_wal_senders = 2
pg_fanout.retry_interval = 100ms
pg_fanout.retry_limit = 2
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

sql(q(select fanout.declare_binding('healthy', 'g')));
PgFanout::flush($node);

my $listener = $node->background_psql('postgres');
$listener->query_safe('listen pg_fanout_alert');

my $offset = -s $node->logfile;
my $pid = PgFanout::publisher_pid($node);
my $blocker = $node->background_psql('postgres');
my $blocker_pid = $blocker->query_safe('select pg_backend_pid()');
$blocker->query_until(qr/^begun/, "set synchronous_commit = on;\n\\echo begun\nbegin;\ncreate table written ();\nnotify somebody;\ncommit;\n");
$node->poll_query_until('postgres',
	"select wait_event = 'SyncRep' from pg_stat_activity where pid = $blocker_pid")
  or die 'the blocker does not wait for its standby';

# three alerts, one after the other
foreach my $topic (map { "nowhere_$_" } 1 .. 3)
{
	sql("select fanout.declare_topic('$topic'); select fanout.publish('$topic', '1')");
	$node->poll_query_until('postgres', "select attempts >= 3 from fanout.stat_topics where topic = '$topic'")
	  or die PgFanout::status($node, 'postgres');
}
pass('topics are tried again after alerts that cannot be sent');
my $begin = Time::HiRes::time();
sql(q(select fanout.publish('healthy', '1')));
PgFanout::wait_for_state($node, 'sent', where => "topic = 'healthy'");
cmp_ok(Time::HiRes::time() - $begin, '<', 3, 'another topic is published meanwhile');
is(PgFanout::publisher_pid($node), $pid, 'by the same publisher');

my @lines = slurp_file($node->logfile, $offset) =~ /WARNING:  pg_fanout cannot notify listeners.*\n.*DETAIL:  .*lock timeout/g;
is(scalar(@lines), 1, 'the log says once that alerts cannot be sent, and why');
unlike(slurp_file($node->logfile, $offset), qr/notifies listeners on channel .* again/, 'and not that they are');

$node->psql('postgres', "select pg_terminate_backend($blocker_pid)");
sql(q(select fanout.declare_topic('nowhere_4'); select fanout.publish('nowhere_4', '1')));
$node->wait_for_log(qr/pg_fanout notifies listeners on channel "pg_fanout_alert" again/, $offset);
pass('the log says when alerts are sent again');
like($listener->query('select 1'), qr/pg_fanout_alert" with payload ".*nowhere_4.*312 NO_ROUTE/,
	'and a listener gets the next one');
$listener->quit;
$node->stop('fast');

done_testing();
