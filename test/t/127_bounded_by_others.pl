# What bounds a topic's publishing may not be used up by others, and costs nothing where
# it is reached: bytes in flight of topics whose queues do not confirm, turns while channels
# are opened slowly, windows that are full while the broker does not read.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $broker = PgFanout::broker(private => 1);
my $proxy = $broker->proxy;
my $node = PgFanout::cluster('main', $proxy, conf => q(
pg_fanout.confirm_timeout = 15min
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub set
{
	my ($name, $value) = @_;

	sql("alter system set pg_fanout.$name = $value");
	sql('select pg_reload_conf()');
	return;
}

# Seconds of processor time that the publisher has had.
sub cpu
{
	my @stat = split / /, slurp_file('/proc/' . PgFanout::publisher_pid($node) . '/stat') =~ s/.*\) //r;

	return ($stat[11] + $stat[12]) / 100;
}

my @hanging = map { "hanging_$_" } 1 .. 6;

sql("select fanout.declare_binding('$_', 'g', 'classic')") foreach @hanging, qw(well other);
PgFanout::flush($node);
# a second after its start the publisher declares them once more
sleep 2;
PgFanout::flush($node);

# ---- very many bytes in flight of topics whose queues do not confirm ----

$broker->suspend_queue("${_}_g") foreach @hanging;
$proxy->command('delay 20');
sql("select count(fanout.publish('$_', to_jsonb(repeat('x', 100000)))) from generate_series(1, 80)") foreach @hanging;
PgFanout::poll(sub { sql('select in_flight > 160 from fanout.stat_publisher') eq 't' }, '16 MB in flight');
my $begin = time;
sql(q(select count(fanout.publish('well', to_jsonb(i), 'k' || i)) from generate_series(1, 3000) i));
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'well'));
note sprintf('%.1f s', time - $begin);
# one after the other they take 40 ms each
cmp_ok(time - $begin, '<', 60, 'while queues do not confirm very many bytes, another topic\'s messages are not sent one by one');
is(sql('select in_flight > 160 from fanout.stat_publisher'), 't', 'and these are in flight all the time');
$proxy->command('pass');
$broker->resume_queue("${_}_g") foreach @hanging;
PgFanout::wait_for_state($node, 'sent');

# ---- a broker that takes its time to open channels ----

set('max_channels', 4);
$proxy->command('delay 700');
sql(join(';', map { "select fanout.publish('$_', '1')" } qw(well other), @hanging));
PgFanout::wait_for_state($node, 'sent');
ok(1, 'topics that take turns are sent, if to open a channel takes longer than a turn');
$proxy->command('pass');
set('max_channels', 256);

# ---- a full window while the broker does not read ----

set('max_in_flight', 100);
$broker->suspend_queue('well_g');
sql(q(select count(fanout.publish('well', to_jsonb(i), 'k' || i)) from generate_series(1, 5000) i));
PgFanout::poll(sub { sql('select in_flight from fanout.stat_publisher') == 100 }, 'a full window');
ok(1, 'a topic has its whole window once others are silent');
$broker->ctl('set_vm_memory_high_watermark', '0.00001');
# the broker blocks who publishes
sql(q(select fanout.publish('other', '1')));
PgFanout::wait_for_publisher($node, 'blocked');
sleep 1;
cmp_ok(sql('select in_flight from fanout.stat_publisher'), '>=', 100, 'a window is full while the broker is blocked');
my $cpu = cpu();
sleep 5;
$cpu = cpu() - $cpu;
note "$cpu s";
cmp_ok($cpu, '<', 0.5, 'and that takes no processor time');
$broker->ctl('set_vm_memory_high_watermark', '0.4');
$broker->resume_queue('well_g');
PgFanout::wait_for_state($node, 'sent');
ok(1, 'everything is sent in the end');

done_testing();
