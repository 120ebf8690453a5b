# What the publisher has in memory is bounded over all topics, also when the queues of all
# of them confirm nothing for a while, and each has more than its window: and all arrives.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('main', $broker, conf => "shared_buffers = 16MB\n");
my $topics = 60;

# The publisher's own, in kB.
sub memory
{
	my ($kB) = slurp_file('/proc/' . PgFanout::publisher_pid($node) . '/status') =~ /^RssAnon:\s+(\d+)/m;

	return $kB;
}

sub sql { return $node->safe_psql('postgres', $_[0]); }

sql("select fanout.declare_binding('t' || n, 'g', 'classic') from generate_series(1, $topics) n");
PgFanout::flush($node);

# Writes 5 MB to each topic while no queue confirms anything.
sub is_bounded
{
	my ($name, @statements) = @_;
	my $before = memory();
	my $most = 0;

	$broker->slow_queues(600_000, map { "t${_}_g" } 1 .. $topics);
	sql($_) foreach @statements;
	foreach (1 .. 50)
	{
		my $now = memory() - $before;

		$most = $now if $now > $most;
		select(undef, undef, undef, 0.2);
	}
	is(sql('select count(*) from fanout.stat_topics where pending >= 40') > $topics / 2, 1, "$name: they wait");
	cmp_ok($most, '<', 150_000, "$name: the publisher takes $most kB");
	$broker->slow_queues(0);
	PgFanout::wait_for_state($node, 'sent');
	is($broker->count("t${_}_g"), 50, "$name: all of topic $_ arrives") foreach 1, $topics;
	$broker->amqp('purge', '--queue', "t${_}_g") foreach 1, $topics;
	return;
}

my $body = "to_jsonb(repeat(md5(random()::text), 3000))";

is_bounded("$topics topics with 5 MB each, together",
	("select count(fanout.publish('t' || n, $body)) from generate_series(1, $topics) n, generate_series(1, 10) i") x 5);
is_bounded('one after the other', map { "select count(fanout.publish('t$_', $body)) from generate_series(1, 50) i" } 1 .. $topics);

done_testing();
