# An alert stops nothing: what NOTIFY cannot take is skipped, once for all in the
# log, and messages are published.
#
# The errors are real ones of the transaction that notifies.  Transactions that
# notify commit one after the other, under a lock of the server, and one that
# waits for a synchronous standby keeps it.  And the server's queue of notifications is
# full, which can be had only where that may be small.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

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
sql(q(select fanout.publish('healthy', '1')));
PgFanout::wait_for_state($node, 'sent', where => "topic = 'healthy'");
is(sql("select wait_event from pg_stat_activity where pid = $blocker_pid"), 'SyncRep', 'another topic is published meanwhile');
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

# ---- resume() sets the time of the next attempt; another one fails before that is read ----

my $stall = q(fanout.stall where topic_id = (select topic_id from fanout.topic where topic = 'nowhere_4'));
sql("update fanout.stall set retry_at = '2020-01-01' where topic_id = (select topic_id from $stall)");
my $attempts = sql("select attempts from $stall");
$node->poll_query_until('postgres', "select attempts > $attempts from $stall") or die PgFanout::status($node, 'postgres');
is(sql("select retry_at = '2020-01-01' from $stall"), 't', 'a time for the next attempt that was not read is kept');
sql(q(select fanout.resume('nowhere_4')));
$attempts = sql("select attempts from $stall");
$node->poll_query_until('postgres', "select attempts > $attempts and retry_at > now() - interval '1 minute' from $stall") or die PgFanout::status($node, 'postgres');
pass('and another one is set once it was');

# ---- the server's queue of notifications is full ----

SKIP:
{
	skip 'the queue of notifications has 8 GB before PostgreSQL 17', 5
	  if sql(q(select count(*) from pg_settings where name = 'max_notify_queue_pages')) == 0;

	$node->append_conf('postgresql.conf', "max_notify_queue_pages = 64\nsynchronous_standby_names = ''\n");
	$node->restart;
	$pid = PgFanout::publisher_pid($node);
	$offset = -s $node->logfile;

	# who listens, and does not end its transaction, keeps all that comes after
	my $keeper = $node->background_psql('postgres');
	$keeper->query_safe('listen anything');
	$keeper->query_safe('begin');
	$keeper->query_safe('select 1');
	my ($full, $n) = ('', 0);
	while ($full !~ /too many notifications in the NOTIFY queue/ && $n++ < 1000)
	{
		$node->psql('postgres', "notify anything, '$n " . ('x' x 7900) . "'", stderr => \$full);
	}
	like($full, qr/too many notifications in the NOTIFY queue/, 'the queue of notifications is full');

	foreach my $topic ('nowhere_5', 'nowhere_6')
	{
		sql("select fanout.declare_topic('$topic'); select fanout.publish('$topic', '1')");
		$node->poll_query_until('postgres', "select attempts >= 3 from fanout.stat_topics where topic = '$topic'")
		  or die PgFanout::status($node, 'postgres');
	}
	sql(q(select fanout.publish('healthy', '1')));
	PgFanout::wait_for_state($node, 'sent', where => "topic = 'healthy'");
	is(PgFanout::publisher_pid($node), $pid, 'messages are published meanwhile, by the same publisher');
	@lines = slurp_file($node->logfile, $offset) =~
	  /WARNING:  pg_fanout cannot notify listeners.*\n.*DETAIL:  too many notifications in the NOTIFY queue/g;
	is(scalar(@lines), 1, 'the log says once that the queue is full');

	$keeper->query_safe('commit');
	my $again = $node->background_psql('postgres');
	$again->query_safe('listen pg_fanout_alert');
	sql(q(select fanout.declare_topic('nowhere_7'); select fanout.publish('nowhere_7', '1')));
	$node->wait_for_log(qr/pg_fanout notifies listeners on channel "pg_fanout_alert" again/, $offset);
	pass('the log says when alerts are sent again');
	like($again->query('select 1'), qr/pg_fanout_alert" with payload ".*nowhere_7/, 'and a listener gets the next one');
	$again->quit;
	$keeper->quit;
}
$node->stop('fast');

done_testing();
