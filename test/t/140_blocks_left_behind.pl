# Messages that lie in blocks which the publisher has left behind are not forgotten before
# they are sent: those of transactions that commit late, and those that went to where
# there was room; whatever their topic does, and if publishers change in the midst of them.
# And what the ledger says of them last is the newest, also after a crash.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('main', $broker, conf => q(
wal_level = minimal
max_wal_senders = 0
autovacuum = off
pg_fanout.confirm_timeout = 60s
pg_fanout.retry_interval = 1s
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

# So many messages of a topic, of a few hundred bytes each; tag: what tells them from others.
sub messages
{
	my ($topic, $tag, $n) = @_;

	return "select count(fanout.publish('$topic', jsonb_build_object('tag', '$tag', 'n', i, 'v', repeat('x', 300)), key => i::text)) from generate_series(1, $n) i";
}

# A message that INSERT brings goes wherever there is room.
sub by_hand
{
	my ($topic, $tag, $segment) = @_;

	return qq(insert into fanout.outbox select $segment, (select oid from pg_database where datname = current_database()),
		nextval('fanout.outbox_id_seq'), pg_current_xact_id(), topic_id, gen_random_uuid(), 't', null, null, '{"tag": "$tag"}', null, now()
		from fanout.topic where topic = '$topic');
}

sub block { return sql(qq(select max((ctid::text::point)[0])::int from fanout.outbox where topic_id = (select topic_id from fanout.topic where topic = '$_[0]') and payload ~ '$_[1]')); }

# All messages with that tag have come, each of them.
sub arrived
{
	my ($topic, $tag, $n, $name) = @_;
	my %numbers;

	foreach my $message ($broker->collect("${topic}_g", idle => 2))
	{
		$numbers{ $message->{body}->{n} // 1 } = 1 if $message->{body}->{tag} eq $tag;
	}
	is(scalar(keys %numbers), $n, $name);
	return;
}

# Makes room in the first blocks of the current segment, and leaves them behind.
sub make_room
{
	sql('begin; ' . messages('others', 'none', 500) . '; rollback');
	sql(messages('others', 'other', 2000));
	PgFanout::flush($node);
	sql('vacuum fanout.outbox_' . sql('select current from fanout.rotation'));
	return;
}

# Others write so many, and all of that is sent, whatever waits for a topic that is paused.
sub others_flow
{
	sql(messages('others', 'other', $_[0]));
	PgFanout::wait_for_state($node, 'sent', where => "topic = 'others'");
	return;
}

# The ledger's main entry is in the midst of a batch.
sub in_a_batch { return sql('select base::text <> target::text from fanout.sent where topic_id is null order by sent_id desc limit 1') eq 't'; }

sql(q(select fanout.declare_binding(t, 'g', 'classic') from unnest('{first,second,others,waits}'::text[]) t));
PgFanout::flush($node);

# ---- a crash before the first checkpoint ----

sub newest
{
	my ($by) = @_;

	return sql("select sent_at from fanout.sent where topic_id is null order by $by desc limit 1");
}

foreach my $time ('before', 'after')
{
	foreach my $i (1 .. ($time eq 'before' ? 8 : 1))
	{
		sql(messages('others', $time, 1));
		PgFanout::flush($node);
	}
	is(newest('sent_id'), newest('sent_at'), "$time a crash, the ledger's newest entry is the one with the highest number");
	last if $time eq 'after';
	$node->stop('immediate');
	$node->start;
}

# ---- a transaction that commits late, and publishers that end in the midst of its batch ----

my $long = PgFanout::session($node);
foreach my $round ('one publisher', 'another publisher', 'the publisher after a crash')
{
	PgFanout::run_in($long, 'begin; ' . messages('first', $round, 1500) . '; ' . messages('second', $round, 1500));
	PgFanout::flush($node);
	sql(messages('others', 'other', 3000));
	PgFanout::flush($node);
	$broker->suspend_queue('second_g');
	PgFanout::run_in($long, 'commit');
	PgFanout::poll(sub { in_a_batch() || sql('select count(*) from fanout.detached') > 0 }, 'the first of its messages to be recorded');
	PgFanout::new_publisher($node) if $round =~ /another/;
	if ($round =~ /crash/)
	{
		$long->{harness}->kill_kill;
		$node->stop('immediate');
		$node->start;
	}
	$broker->resume_queue('second_g');
	PgFanout::flush($node, timeout => '120 s');
	arrived($_, $round, 1500, "a transaction that commits late, its messages of the $_ topic, by $round") foreach 'first', 'second';
}

# ---- messages where there was room, of a topic that is paused ----

foreach my $round ('one publisher', 'another publisher')
{
	make_room();
	sql(q(select fanout.pause('waits')));
	PgFanout::flush($node);
	sql(by_hand('waits', $round, '(select current from fanout.rotation)'));
	cmp_ok(block('waits', $round), '<', block('others', 'other') - 20, 'a message goes to where there is room');
	others_flow(100);
	PgFanout::new_publisher($node) if $round =~ /another/;
	others_flow(100);
	sql(q(select fanout.resume('waits')));
	PgFanout::flush($node);
	arrived('waits', $round, 1, "it is sent once its topic is resumed, by $round");
}

# ---- the same, for longer than the retention, in a segment that stays the current one ----

make_room();
my $current = sql('select current from fanout.rotation');
my $next = ($current + 1) % 3;
my $keeper = PgFanout::session($node);
my $known = sql('begin; ' . by_hand('others', 'known', $next) . '; select pg_current_xact_id(); commit');
PgFanout::run_in($keeper, "begin; lock table fanout.outbox_$next in access share mode");
PgFanout::flush($node);
sql(q(select fanout.pause('waits')));
PgFanout::flush($node);
my $unknown = sql('begin; ' . by_hand('waits', 'kept', $current) . '; select pg_current_xact_id(); commit');
others_flow(1);
sql(q(alter system set pg_fanout.retention = '4s'; select pg_reload_conf()));
PgFanout::poll(
	sub {
		sql("select exists (select from fanout.sent where topic_id is null and sent_at < now() - interval '7 s' and pg_visible_in_snapshot('$unknown', base))
			and not exists (select from fanout.scattered where xid = '$known')") eq 't';
	},
	'where a message went that all have read to be forgotten');
is(sql('select current from fanout.rotation'), $current, 'the segment is the current one still');
sql(q(alter system reset pg_fanout.retention; select pg_reload_conf()));
PgFanout::new_publisher($node);
sql(q(select fanout.resume('waits')));
PgFanout::flush($node);
arrived('waits', 'kept', 1, 'a message where there was room is sent once its topic is resumed, after the retention');
$keeper->{harness}->kill_kill;

# ---- the same, and the segment is emptied ----

make_room();
sql(q(select fanout.pause('waits')));
PgFanout::flush($node);
my $xid = sql('begin; ' . by_hand('waits', 'long', '(select current from fanout.rotation)') . '; select pg_current_xact_id(); commit');
sql(q(alter system set pg_fanout.retention = '4s'; select pg_reload_conf()));
PgFanout::poll(
	sub {
		sql(messages('others', 'other', 1));
		return sql("select (select count(*) from fanout.outbox where xid = '$xid'), (select count(*) from fanout.held where xid = '$xid')") eq '0|1';
	},
	'the segment to be emptied');
pass('it is kept when its segment is emptied');
PgFanout::new_publisher($node);
sql(q(select fanout.resume('waits')));
PgFanout::flush($node);
arrived('waits', 'long', 1, 'it is sent once its topic is resumed, however late that is');

$node->stop;
done_testing();
