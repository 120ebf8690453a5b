# Queues that do not answer keep back no declaration of other topics: not at first, not
# on another connection, not when all is looked at again; and what is not answered costs
# the broker one channel, however often it would be asked again.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use POSIX ();

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $hanging = 30;

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
pg_fanout.retry_interval = 1s
pg_fanout.confirm_timeout = 10s
));
my @queues = map { "ill${_}_g" } 1 .. $hanging;
my $new = 0;

# check() has all declared again, and waits for the answers.
sub begin_check
{
	my $pid = fork;

	die "could not fork: $!" unless defined $pid;
	return $pid if $pid;
	open STDOUT, '>', '/dev/null' or POSIX::_exit(1);
	exec('psql', '-XAtqc', 'select count(*) from fanout.check()', $node->connstr('postgres')) or POSIX::_exit(1);
}

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub channels { return $broker->evaluate('length(rabbit_channel:list())'); }

# The processes of queues, all at once.
sub each_queue
{
	my ($what) = @_;
	my $names = join ',', map { qq(<<"$_">>) } @queues;

	$broker->evaluate(sprintf('[begin {ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"%s">>, queue, N)), catch sys:%s(amqqueue:get_pid(Q)) end || N <- [%s]], ok',
		$broker->vhost, $what, $names));
	return;
}

# Until a message of each healthy topic is sent, in seconds.
sub delay
{
	my $start = time;

	sql("select fanout.publish('well' || i, '1') from generate_series(1, 8) i");
	$node->poll_query_until('postgres', q(select not exists (select from fanout.outbox_status where topic ~ '^well' and state <> 'sent')))
	  or die PgFanout::status($node, 'postgres');
	return time - $start;
}

# The longest delay in so many seconds.
sub longest
{
	my ($seconds) = @_;
	my $end = time + $seconds;
	my $longest = 0;

	while (time < $end)
	{
		my $delay = delay();

		$longest = $delay if $delay > $longest;
		sleep 0.1;
	}
	return $longest;
}

# Until a topic that is new is declared and its message sent.
sub delay_of_new
{
	my $start = time;

	$new++;
	sql("select fanout.declare_binding('new$new', 'g', 'classic'), fanout.publish('new$new', '1')");
	$node->poll_query_until('postgres', "select state = 'sent' from fanout.outbox_status where topic = 'new$new'")
	  or die PgFanout::status($node, 'postgres');
	return time - $start;
}


sql(qq(
select count(fanout.declare_binding('ill' || i, 'g', 'classic')) from generate_series(1, $hanging) i;
select count(fanout.declare_binding('well' || i, 'g', 'classic')) from generate_series(1, 8) i;
));
PgFanout::flush($node);

each_queue('suspend');
my $took = longest(2);
cmp_ok($took, '<', 1, sprintf('queues that hang: others as ever, %.2f s', $took));
my $check = begin_check();
$took = longest(15);
cmp_ok($took, '<', 3, sprintf('all is looked at again, %.2f s at most', $took));
waitpid $check, 0;
$took = delay_of_new();
cmp_ok($took, '<', 4, sprintf('a topic is new, %.2f s', $took));

sql("select count(fanout.publish('ill' || i, '1')) from generate_series(1, $hanging) i");
$took = longest(3);
cmp_ok($took, '<', 3, sprintf('they have messages, %.2f s at most', $took));
# to close them would take until the queues answer
$broker->evaluate('[exit(P, kill) || P <- rabbit_networking:connections_local()], ok');
$took = longest(15);
cmp_ok($took, '<', 5, sprintf('on another connection, %.2f s at most', $took));
$took = delay_of_new();
cmp_ok($took, '<', 4, sprintf('a topic is new, %.2f s', $took));
sleep 5;
my $before = channels();
$check = begin_check();
$took = longest(25);
waitpid $check, 0;
cmp_ok($took, '<', 3, sprintf('while all is tried again and again, %.2f s at most', $took));
my $after = channels();
cmp_ok($after, '<=', $before + 8, "and costs no channels: $before, $after");
my $reconnects = sql('select reconnects from fanout.stat_publisher');

each_queue('resume');
PgFanout::wait_for_state($node, 'sent');
ok(1, 'all are sent once the queues answer');
# a topic keeps its own for a minute
PgFanout::poll(sub { channels() <= $hanging + 8 + $new + 2 }, sub { 'channels: ' . channels() });
ok(1, 'and no channel is left on which something was asked');
is(sql('select reconnects from fanout.stat_publisher'), $reconnects, 'on the same connection');

# ---- few channels ----

$broker->evaluate('application:set_env(rabbit, channel_max, 65)');
PgFanout::new_publisher($node);
PgFanout::flush($node);
sleep 2;
PgFanout::flush($node);
$reconnects = sql('select reconnects from fanout.stat_publisher');
splice @queues, 20;
each_queue('suspend');
sql("select count(fanout.publish('ill' || i, '1')) from generate_series(1, 20) i");
$took = longest(45);
cmp_ok($took, '<', 5, sprintf('with few channels, %.2f s at most', $took));
is(sql('select reconnects from fanout.stat_publisher'), $reconnects, 'they do not run out');
each_queue('resume');
PgFanout::wait_for_state($node, 'sent');

# ---- topics that are known to hang, and are paused and resumed ----

$node->append_conf('postgresql.conf', 'pg_fanout.max_channels = 4');
$node->reload;
PgFanout::flush($node);
each_queue('suspend');
sql("select count(fanout.publish('ill' || i, '1')) from generate_series(1, 20) i");
sleep 20;
$took = longest(3);
cmp_ok($took, '<', 3, sprintf('with four channels, once they are known, %.2f s at most', $took));
sql("select count(fanout.pause('ill' || i)) from generate_series(1, 20) i");
sleep 1;
sql("select count(fanout.resume('ill' || i)) from generate_series(1, 20) i");
$took = longest(10);
cmp_ok($took, '<', 3, sprintf('they are paused and resumed, %.2f s at most', $took));
each_queue('resume');
PgFanout::wait_for_state($node, 'sent');
is(sql(q(select count(*) from fanout.stat_topics where topic ~ '^(well|new)' and stalled_since is not null)), '0', 'no other was refused');

done_testing();
