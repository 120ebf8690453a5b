# pause() and purge() take effect when they are committed: with the broker away, in
# the middle of a batch, after a restart; and they copy nothing.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $node = PgFanout::cluster('main', $proxy, conf => q(
pg_fanout.max_in_flight = 10
pg_fanout.retry_interval = 1s
));

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub published { return sql('select published from fanout.stat_publisher'); }
sub bodies { return map { $_->{body} } @_; }

sub is_quiet
{
	my ($name) = @_;

	my $before = published();
	select(undef, undef, undef, 1);
	is(published() - $before, 0, $name);
	return;
}

sql( q(select fanout.declare_binding('p', 'g', 'classic');
	   select fanout.declare_binding('other', 'g', 'classic')));
PgFanout::flush($node);

# ---- with the broker away ----

$proxy->command('delay 10');	# some hundred messages a second
sql(q(select count(fanout.publish('p', to_jsonb(i), 'k' || i % 5)) from generate_series(1, 8000) i));
PgFanout::poll(sub { published() > 20 }, 'some messages');
$proxy->command('cut');
PgFanout::wait_for_publisher($node, 'disconnected');
my $before = published();
my $detached = q(select count(*) from fanout.detached join fanout.topic using (topic_id) where topic = 'p');
is(sql($detached), 0, 'a topic that waits for the broker rides with the others');
sql(q(select fanout.pause('p')));
PgFanout::poll(sub { sql($detached) == 1 }, 'pause() with the broker away');
$proxy->command('delay 10');
sql(q(select fanout.publish('other', '1')));
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'other'));
is(published() - $before, 1, 'a topic paused while the broker is away publishes nothing when it is back');
is(sql(q(select count(*) from fanout.held)), 0, 'and nothing is copied');
is(sql(q(select fanout.flush('1 s'))), 'f', 'flush() is false as long as something waits');

# ---- in the middle of a batch ----

sql(q(select fanout.resume('p')));
PgFanout::poll(sub { published() > $before + 100 }, 'it to go on');
# by when pause() is committed: messages go on until then
($before) = sql(q(select fanout.pause('p'); select published from fanout.stat_publisher)) =~ /(\d+)$/;
PgFanout::poll(sub { sql($detached) == 1 }, 'pause() in the middle of its messages');
# at some hundred messages a second
cmp_ok(published() - $before, '<', 2000, 'a topic paused in the middle of its messages stops at once');
is_quiet('and stays so');
my $state = sql(q(select string_agg(distinct state, ',' order by state) from fanout.outbox_status where topic = 'p'));
is($state, 'held,sent', 'what it has not sent is shown as held');

my $pid = PgFanout::publisher_pid($node);
sql("select pg_terminate_backend($pid)");
PgFanout::poll(sub { sql('select coalesce(max(pid), 0) from fanout.stat_publisher where connected_to is not null') !~ /^($pid|0)$/ },
	'a new publisher');
sql(q(select fanout.publish('other', '2')));
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'other'));
is_quiet('also after the publisher is started again');

$proxy->command('pass');
sql('alter system reset pg_fanout.max_in_flight');
$node->reload;
sql(q(select fanout.resume('p')));
PgFanout::flush($node);
my %seen;
my @arrived = grep { !$seen{ $_->{message_id} }++ } $broker->collect('p_g', expect => 8000);
is_deeply([ sort { $a <=> $b } bodies(@arrived) ], [ 1 .. 8000 ], 'resumed, all of it arrives');
cmp_ok(sql(q(select count(*) from fanout.sent where topic_id is not null and attached)), '>=', 1, 'and it rides with the others again');
ok($node->poll_query_until('postgres', 'select count(*) = 0 from fanout.detached'), 'none is left behind');

# ---- purge ----

sql(q(select fanout.pause('p')));
sql(q(select count(fanout.publish('p', to_jsonb(i), 'k')) from generate_series(1, 50000) i));
sql(q(create function suppress() returns trigger language plpgsql as 'begin return null; end';
	create trigger suppress before insert on fanout.purged for each row execute function suppress()));
my ($code, $printed, $error) = $node->psql('postgres', q(select fanout.purge('p', held => true)));
like($error, qr/changed 0 rows instead of 1/, 'purge() does not say that it gave up what it did not');
sql(q(drop trigger suppress on fanout.purged));
is(sql(q(select fanout.purge('p', held => true))), 50000, 'purge() gives up what waits of a paused topic');
is(sql(q(select count(*) from fanout.held)), 0, 'and copies nothing for that');
is(sql(q(select count(*) from fanout.purged)), 1, 'but leaves one mark');
is(sql(q(select count(*) from fanout.outbox o join fanout.topic t using (topic_id) where t.topic = 'p' and o.key = 'k')), 50000, 'without touching the messages');
PgFanout::flush($node);
ok($node->poll_query_until('postgres', q(select held = 0 from fanout.stat_topics where topic = 'p')), 'nothing waits any more');
my ($first, $second) = split /\n/, sql(q(select fanout.publish('p', '"first"'); select fanout.publish('p', '"second"')));
is(sql("select fanout.purge('p', held => true, message_id => '$first')"), 1, 'a single message can be given up, too');
sql(q(select fanout.resume('p'); select fanout.publish('p', '"third"')));
PgFanout::flush($node);
is_deeply([ bodies($broker->collect('p_g', expect => 2)) ], [ 'second', 'third' ], 'resumed, only what was not given up is sent');
ok($node->poll_query_until('postgres', 'select count(*) = 0 from fanout.purged'), 'and no trace is left of that');

# A message that the same transaction writes later is none that purge() has seen, even if
# a transaction that began later has ended by then.
sql(q(select fanout.pause('p'); select fanout.publish('p', '"seen"')));
my $session = $node->background_psql('postgres');
$session->query_safe(q(begin; select fanout.publish('p', '"written before"')));
sql(q(select fanout.publish('other', '3')));
is($session->query_safe(q(select fanout.purge('p', held => true))), 1, 'purge() counts what it gives up');
$session->query_safe(q(select fanout.publish('p', '"written after"'); commit));
$session->quit;
sql(q(select fanout.resume('p')));
PgFanout::flush($node);
is_deeply([ bodies($broker->collect('p_g', expect => 2)) ], [ 'written before', 'written after' ],
	'purge() does not give up what its own transaction writes');

# Two calls of one transaction, the second of which sees more.
sql(q(select fanout.pause('p')));
my $older = $node->background_psql('postgres');
$older->query_safe(q(begin; select fanout.publish('p', '"committed in between"')));
sql(q(select fanout.publish('p', '"committed before"')));
$session = $node->background_psql('postgres');
is($session->query_safe(q(begin; select fanout.purge('p', held => true))), 1, 'the first purge() sees one message');
$older->query_safe('commit');
is($session->query_safe(q(select fanout.purge('p', held => true))), 1, 'the second one that was committed in between');
$session->query_safe('commit');
$_->quit foreach $session, $older;
is(sql(q(select count(*) from fanout.outbox_status where topic = 'p' and state <> 'sent')), 0, 'neither waits any more');
sql(q(select fanout.publish('p', '"not given up"'); select fanout.resume('p')));
PgFanout::flush($node);
is_deeply([ bodies($broker->collect('p_g', expect => 1)) ], ['not given up'], 'neither comes');

# ---- a topic that is dropped ----

sql(q(select fanout.declare_topic('gone'); select fanout.pause('gone'); select fanout.publish('gone', '1')));
my ($ok, $out, $err) = $node->psql('postgres', q(select fanout.drop_topic('gone')));
like($err, qr/cannot drop topic/, 'a topic with messages that wait is not dropped');
sql(q(select fanout.purge('gone', held => true); select fanout.drop_topic('gone')));
$node->poll_query_until('postgres', q(select not exists (select from fanout.topics where topic = 'gone')));
PgFanout::flush($node);
ok(1, 'once they are given up, it is');

done_testing();
