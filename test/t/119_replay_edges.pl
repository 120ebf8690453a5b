# A replay sends what was sent, as it was, whatever has happened to its topic since: another
# format, a pause, a rotation, a consumer group that is dropped.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('a', $broker, conf => q(
restart_after_crash = on
pg_fanout.retry_interval = 200ms
));

sub sql { my ($command, $database) = @_; return $node->safe_psql($database // 'postgres', $command); }

sub state_of { my ($id, $database) = @_; return sql("select state || coalesce(': ' || error, '') from fanout.backfills where id = $id", $database); }

sub wait_for_end
{
	my ($id, $database) = @_;

	PgFanout::poll(sub { state_of($id, $database) =~ /^(done|failed|cancelled)/ }, "end of replay $id");
	return state_of($id, $database);
}

# Messages n = first .. last of ten keys.
sub publish
{
	my ($topic, $first, $last) = @_;

	sql("select fanout.publish('$topic', jsonb_build_object('n', n), key => (n % 10)::text) from generate_series($first, $last) n");
	return;
}

sub declare
{
	my ($topic, @groups) = @_;

	sql("select fanout.declare_binding('$topic', '$_')") foreach @groups;
	PgFanout::flush($node);
	return;
}

# How many messages a queue has.  A quorum queue knows of new ones after a moment.
sub settled
{
	my ($queue) = @_;
	my ($before, $count) = (-1, $broker->count($queue));

	while ($count != $before)
	{
		sleep 2;
		($before, $count) = ($count, $broker->count($queue));
	}
	return $count;
}

# The numbers of the rows or messages in a queue; what ends a replay has none.
sub numbers
{
	my ($queue) = @_;
	my $count = settled($queue);

	return $count == 0 ? () : grep { defined } map { $_->{body}->{n} } $broker->collect($queue, expect => $count);
}

sub everything { my ($topic, $group, $more) = @_; return "fanout.replay('$topic', '$group', '-infinity'" . ($more // '') . ')'; }

# ---- another format ----

sql(q(
create table items (n int primary key);
select fanout.declare_topic('format', 'cloudevents'), fanout.declare_binding('format', 'g'), fanout.capture('items', 'format');
insert into items values (1)));
PgFanout::flush($node);
sql(q(select fanout.pause('format'); insert into items values (2)));
sql(q(select fanout.alter_topic('format', format => 'row'); insert into items values (3)));
sql(q(select fanout.resume('format')));
PgFanout::flush($node);
is(wait_for_end(sql('select ' . everything('format', 'g'))), 'done', 'after a change of the format');
PgFanout::flush($node);
my @messages = $broker->collect('format_g', expect => 7);
is( join(' ', map { "$_->{headers}->{format}:$_->{content_type}" } @messages[ 0 .. 5 ]),
	join(' ', (qw(cloudevents:application/cloudevents+json cloudevents:application/cloudevents+json row:application/json)) x 2),
	'each row says in which format it is, also if it was written before and sent after the change');

# ---- names in another encoding ----

$node->safe_psql('postgres', "create database latin encoding 'LATIN1' locale 'C' template template0");
sql(q(
create extension pg_fanout;
set client_encoding = utf8;
create table rows (n int primary key);
select fanout.declare_binding('zürich', 'grün'), fanout.capture('rows', 'zürich');
insert into rows select generate_series(1, 20)), 'latin');
PgFanout::flush($node, dbname => 'latin');
is(settled('zürich_grün'), 20, 'a queue whose name is not ASCII has the rows');
is(wait_for_end(sql(q(set client_encoding = utf8; select fanout.replay('zürich', 'grün', '-infinity')), 'latin'), 'latin'), 'done', 'a replay in a database that is not in UTF-8');
is(wait_for_end(sql(q(set client_encoding = utf8; select fanout.backfill('rows', 'zürich', consumer_group => 'grün')), 'latin'), 'latin'), 'done', 'and a backfill');
PgFanout::flush($node, dbname => 'latin');
is(settled('zürich_grün'), 20 + 21 + 21, 'the messages come to the queue of that name');

# ---- a consumer group that is dropped ----

declare('dropped', 'one', 'two');
publish('dropped', 1, 1000);
PgFanout::flush($node);
sql(q(select fanout.pause('dropped')));
my $id = sql('select ' . everything('dropped', 'two'));
PgFanout::poll(sub { sql("select rows_sent > 0 from fanout.backfills where id = $id") eq 't' }, 'some are in the outbox');
publish('dropped', 1001, 1100);
sql(q(select fanout.drop_binding('dropped', 'two', if_unused => false, if_empty => false)));
sql(q(select fanout.resume('dropped')));
like(wait_for_end($id), qr/^failed: the consumer group is not bound to the topic any more$/, 'a replay to it has failed');
PgFanout::flush($node);
PgFanout::poll(sub { $broker->count('dropped_one') >= 1100 }, 'the other group has its messages');
# one that is returned has later ones of its key sent again
my %of_one = map { $_ => 1 } numbers('dropped_one');
is(scalar(keys %of_one), 1100, 'what is written for it keeps nobody waiting: another group has its messages');
like(sql(q(select string_agg(distinct reason, ' ') from fanout.dead_letter where topic = 'dropped')), qr/^its queue is not bound any more$/, 'the copies are dead letters');
sql(q(select fanout.declare_binding('dropped', 'two'), fanout.redrive('dropped')));
PgFanout::flush($node);
sql("select fanout.resume_backfill($id)");
is(wait_for_end($id), 'done', 'bound again, it goes on');
PgFanout::flush($node);
my %seen = map { $_ => 1 } numbers('dropped_two');
is(scalar(grep { $seen{$_} } 1 .. 1000), 1000, 'and with the dead letters, redriven, all are there');
is(settled('dropped_one'), 0, 'none is for the other group');

# ---- held, dead, pending ones ----

declare('held', 'g', 'late');
publish('held', 1, 50);
PgFanout::flush($node);
sql(q(select fanout.pause('held')));
publish('held', 51, 100);
$id = sql('select ' . everything('held', 'late', ", 'infinity'"));
PgFanout::poll(sub { sql("select rows_sent = 50 from fanout.backfills where id = $id") eq 't' }, 'the sent ones are listed');
publish('held', 101, 150);
sql(q(select fanout.resume('held')));
is(wait_for_end($id), 'done', 'a replay of a paused topic, up to a time in the future, ends once it is resumed');
PgFanout::flush($node);
is(join(' ', sort { $a <=> $b } numbers('held_late')), join(' ', sort { $a <=> $b } 1 .. 150, 1 .. 50), 'what was not sent by then comes once');

# ---- several at once ----

sql('select ' . everything('held', $_) . " from (select fanout.declare_binding('held', '$_')) d") foreach qw(a b c);
PgFanout::poll(sub { sql(q(select bool_and(state = 'done') from fanout.backfills where topic = 'held')) eq 't' }, 'three replays');
PgFanout::flush($node);
foreach my $one (qw(a b c))
{
	my %times;

	$times{$_}++ foreach numbers("held_$one");
	is(scalar(keys %times), 150, "replays to several groups at once: group $one has all");
}

# ---- rotation in the midst ----

sql(q(
alter system set pg_fanout.retention = '2s';
select pg_reload_conf()));
declare('rotated', 'g');
publish('rotated', 1, 2000);
PgFanout::flush($node);
my @original = numbers('rotated_g');
$id = sql('begin; select ' . everything('rotated', 'g') . q(; commit));
$node->psql('postgres', "select fanout.pause_backfill($id)", on_error_die => 0, stderr => \my $done_already);
PgFanout::poll(
	sub {
		sql(q(select fanout.publish('held', '{}')));
		return sql(q(select count(*) = 0 from fanout.outbox o join fanout.topic t using (topic_id)
			where t.topic = 'rotated' and not coalesce(o.headers ? 'replay', false))) eq 't';
	}, 'rotation', 180);
$node->psql('postgres', "select fanout.resume_backfill($id)", on_error_die => 0, stderr => \$done_already);
is(wait_for_end($id), 'done', 'a replay whose messages are removed in the midst ends');
PgFanout::flush($node);
my $sent = sql("select rows_sent from fanout.backfills where id = $id");
my @again = numbers('rotated_g');
is(scalar(@again), $sent, 'the view tells how many were still there');
note "$sent of 2000 messages were there";
cmp_ok($sent, '<=', 2000, 'and not more than there were');
is(sql(q(select count(*) from fanout.replay_message)), '0', 'nothing is left of its list');

done_testing();
