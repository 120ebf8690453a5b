# Very many topics, of which some hundred publish at a time, on few channels: all of it
# arrives, in order per key; the broker never has more channels than pg_fanout.max_channels
# and those for requests; topics take turns; and idle ones cost the broker nothing.
#
# PG_FANOUT_LONG: 2,000 topics.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $topics = $ENV{PG_FANOUT_LONG} ? 2000 : 300;
my $busy = $ENV{PG_FANOUT_LONG} ? 400 : 150;
my $channels = $ENV{PG_FANOUT_LONG} ? 64 : 16;
my $requests = 8 + 2;	# topology.c, and what finds out whether the broker is there
my $slack = 32;	# channels that are being closed

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('main', $broker, conf => qq(
log_statement = none
pg_fanout.max_channels = $channels
));

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub channels { return $broker->evaluate('length(rabbit_channel:list())'); }

sql("select count(fanout.declare_binding('t' || i, 'g', 'classic')) from generate_series(1, $topics) i");
PgFanout::flush($node, timeout => '600 s');
PgFanout::poll(sub { channels() == 0 }, 'no channel');
ok(1, "$topics topics without messages cost no channel");

# ---- some hundred are busy ----

my $end = time + ($ENV{PG_FANOUT_LONG} ? 60 : 10);
my $most = 0;
my $script = PostgreSQL::Test::Utils::tempdir() . '/write.sql';
append_to_file($script, "\\set topic random(1, $busy)\n\\set n random(1, 20)\n"
	  . "select fanout.publish('t' || (:topic * $topics / $busy), to_jsonb(i), :client_id || '-' || i % 3) from generate_series(1, :n) i;\n");
my $load = IPC::Run::start([ 'pgbench', '-n', '-c', 4, '-R', 200, '-T', int($end - time), '-f', $script, $node->connstr('postgres') ],
	'>', \my $out, '2>', \my $err, IPC::Run::timeout(300));
while (time < $end)
{
	my $n = channels();

	$most = $n if $n > $most;
}
$load->finish;
PgFanout::flush($node, timeout => '300 s');
cmp_ok($most, '<=', $channels + $requests + $slack, "no more channels than pg_fanout.max_channels, and some for requests ($most)");
cmp_ok($most, '>', $channels / 2, 'and these are used');
is(sql('select reconnects from fanout.stat_publisher'), 0, 'on one connection');

my ($again, $wrong) = (0, 0);
my (%seen, %newest);
my $all = sql('select count(*) from fanout.outbox');
foreach my $message ($broker->collect([ map { "t${_}_g" } 1 .. $topics ], expect => $all))
{
	my ($topic, $key, $sequence) = ($message->{exchange}, @{ $message->{headers} }{qw(key sequence)});

	$again++ if $seen{ $message->{message_id} }++;
	$wrong++ if $sequence < ($newest{"$topic $key"} || 0);
	$newest{"$topic $key"} = $sequence;
}
my $missing = $all - keys %seen;
is("$missing missing, $wrong in another order", '0 missing, 0 in another order', "all $all messages of some hundred topics arrive in order");
cmp_ok($again, '<', $all / 100, "hardly any is sent again because topics take turns ($again)");

# ---- others never stop ----

sql('alter system set pg_fanout.max_channels = 4');
sql('select pg_reload_conf()');
my $busy_script = PostgreSQL::Test::Utils::tempdir() . '/busy.sql';
append_to_file($busy_script, "select fanout.publish('t' || i % 6 + 1, to_jsonb(i)) from generate_series(1, 300) i;\n");
$load = IPC::Run::start([ 'pgbench', '-n', '-c', 2, '-T', 600, '-f', $busy_script, $node->connstr('postgres') ],
	'>', \$out, '2>', \$err, IPC::Run::timeout(900));
$node->poll_query_until('postgres', q(select sum(pending) > 2000 from fanout.stat_topics where topic ~ '^t[1-6]$')) or die PgFanout::status($node, 'postgres');
my $slowest = 0;
foreach my $n (1 .. 5)
{
	my $begin = time;

	sql("select fanout.publish('t" . (10 + $n) . "', '1')");
	PgFanout::poll(sub { $broker->count('t' . (10 + $n) . '_g') > 0 }, sub { PgFanout::status($node, 'postgres') });
	$slowest = time - $begin if time - $begin > $slowest;
}
ok($load->pumpable, 'messages of other topics are sent while more topics than channels have more than they can send');
note sprintf('%.1f s at most', $slowest);
$load->signal('TERM');
$load->finish;
# what is confirmed once was published once
PgFanout::flush($node, timeout => '600 s');
my ($published, $repeated) = split /\|/, sql('select published, published - confirmed from fanout.stat_publisher');
cmp_ok($repeated, '<', $published / 200, "hardly any of these is sent again either ($repeated of $published)");

done_testing();
