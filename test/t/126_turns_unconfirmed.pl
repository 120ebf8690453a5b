# A topic whose queue never confirms, while more topics than channels have something to
# publish: it gives its channel up after some seconds, again and again, and is found ill by
# its own clock all the same.  Topics that only wait for a channel are not.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $messages = 20;
my @ill = map { "ill_$_" } 1 .. 8;
my @well = map { "well_$_" } 1 .. 5;

# All take turns with four channels.  A turn without a confirm takes 3 s, so that each waits
# for longer than confirm_timeout, and none has its channel for so long.
my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
pg_fanout.max_channels = 4
pg_fanout.confirm_timeout = 8s
pg_fanout.retry_interval = 20s
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

sql("select fanout.declare_binding('$_', 'g', 'classic')") foreach @ill, @well;
PgFanout::flush($node);

my $offset = -s $node->logfile;
$broker->message_store('suspend');
sql(join(';', map { "select count(fanout.publish('$_', to_jsonb(i || repeat('x', 10000)), 'k' || i)) from generate_series(1, $messages) i" } @ill));

# Each of the healthy topics has something to publish until all of the others are found ill.
my $script = PostgreSQL::Test::Utils::tempdir() . '/well.sql';
append_to_file($script, join('', map { "select fanout.publish('$_', '1', 'k');\n" } @well));
my $load = IPC::Run::start(
	[ 'pgbench', '-n', '-c', 1, '-R', 10, '-T', 600, '-f', $script, $node->connstr('postgres') ],
	'<', \undef, '>', \my $out, '2>', \my $err, IPC::Run::timeout(700));

ok($node->poll_query_until('postgres',
	q(select count(*) = 8 from fanout.stat_topics where topic ~ '^ill' and reason ~ 'did not confirm')),
	'topics that take turns with a channel are found ill when their queues do not confirm')
  or diag(PgFanout::status($node, 'postgres'));
is(sql(q(select count(*) from fanout.check() where item ~ '^topic "ill_\d" flows' and detail ~ 'did not confirm')), 8, 'check() says so');

my $id = sql('select max(id) from fanout.outbox');
ok($node->poll_query_until('postgres', qq(
	select count(distinct topic) = 5 from fanout.outbox_status where id > $id and topic ~ '^well' and state = 'sent')),
	'healthy topics are sent meanwhile')
  or diag(PgFanout::status($node, 'postgres'));
unlike(slurp_file($node->logfile, $offset), qr/topic "well_\d" is stalled/, 'none of them is found ill, however long it waits for a channel');
is(sql('select reconnects from fanout.stat_publisher'), 0, 'the connection is kept');

# ---- the queues confirm again ----

$broker->message_store('resume');
sql("select fanout.resume('$_')") foreach @ill;
PgFanout::wait_for_state($node, 'sent', where => q(topic ~ '^ill'));
$load->signal('TERM');
$load->finish;
foreach my $topic (@ill)
{
	my @got = $broker->collect("${topic}_g", expect => $messages);
	my %times;

	$times{ $_->{body} =~ s/x+//r }++ foreach @got;
	is(keys %times, $messages, "$topic: all messages arrive once its queue confirms");
	is(PgFanout::overtaken(@got), 0, "$topic: in order");
	# in its first turn, and in the end
	is(scalar(grep { $times{$_} > 2 } 2 .. $messages), 0, "$topic: further turns repeat no more than its first message");
}

done_testing();
