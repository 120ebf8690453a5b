# A replay sends what the outbox still has once more, to one queue, in order and as
# it was; a subscription takes it anew only if it is asked to.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('a', $broker, conf => 'restart_after_crash = on');

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub ask { return PgFanout::ask($node, @_); }

sub wait_for_end
{
	my ($id) = @_;

	PgFanout::poll(sub { ask("select state in ('done', 'failed', 'cancelled') from fanout.backfills where id = $id") eq 't' }, "end of replay $id");
	return sql("select state || coalesce(': ' || error, '') from fanout.backfills where id = $id");
}

sql(q(
create table items (id int primary key, v int);
select fanout.declare_binding('item', 'one'), fanout.declare_binding('item', 'two'), fanout.declare_binding('other', 'one');
select fanout.capture('items', 'item');
));
sql(qq(insert into items select i, 0 from generate_series(1, 1500) i));
my $since = sql('select clock_timestamp()');
foreach my $i (1 .. 20)
{
	sql("update items set v = $i where id % 10 = 0; select fanout.publish('other', '1')");
}
sql(q(select fanout.publish('item', '{"by": "hand"}', key => 'k', type => 't', headers => '{"mine": 1}')));
my $until = sql('select clock_timestamp()');
sql('delete from items where id = 7');
PgFanout::flush($node);
my $count = 150 * 20 + 1;
# what is of that time, 1500 rows before it and one change after it
my @original = $broker->collect('item_one', expect => 1500 + $count + 1);
$broker->collect('item_two', expect => 1500 + $count + 1);
my @expected = @original[ 1500 .. 1500 + $count - 1 ];

my $id = sql("select fanout.replay('item', 'two', '$since', '$until')");
is(wait_for_end($id), 'done', 'a replay is done');
PgFanout::flush($node);
my @again = $broker->collect('item_two', expect => $count + 1);
my $last = pop @again;
is($broker->count('item_one'), 0, 'another group gets nothing');
is_deeply([ $last->{headers}->{replay}, $last->{headers}->{last}, $last->{body}, $last->{headers}->{op} ],
	[ $id, JSON::XS::true, { replay => $id, messages => $count }, undef ], 'the last message says so');
# Messages of different keys may pass each other, those of one may not.
sub disorder
{
	my %last;

	return scalar(grep { my $before = $last{ $_->{headers}->{key} } // 0; $last{ $_->{headers}->{key} } = $_->{headers}->{sequence}; $before > $_->{headers}->{sequence} } @_);
}

sub by_sequence { return sort { $a->{headers}->{sequence} <=> $b->{headers}->{sequence} } @_; }

is(disorder(@again), 0, 'each key in its order');
@expected = by_sequence(@expected);
@again = by_sequence(@again);
my @differences = grep {
	my ($x, $y) = ($expected[$_], $again[$_]);
	my %x = %{ $x->{headers} };
	my %y = %{ $y->{headers} };
	my $replay = delete $y{replay};

	$x->{message_id} ne $y->{message_id} || $x->{raw} ne $y->{raw} || ($x->{type} // '') ne ($y->{type} // '') || $x->{timestamp} != $y->{timestamp}
	  || join(' ', map { "$_=$x{$_}" } sort keys %x) ne join(' ', map { "$_=$y{$_}" } sort keys %y) || $replay != $id
} 0 .. $count - 1;
is(scalar(@again), $count, 'what is of that time, and nothing else');
is("@differences", '', 'with the same ids, headers, sequences, times and bodies, and the header replay');
is(sql("select rows_sent, kind, entity is null, since, until from fanout.backfills where id = $id"), "$count|replay|t|$since|$until", 'the view shows it');
is(sql('select count(*) from fanout.replay_message'), '0', 'nothing is left of its list');

$id = sql("select fanout.replay('item', 'two', '$since', '$until')");
is(wait_for_end($id), 'done', 'once more');
PgFanout::flush($node);
is(scalar($broker->collect('item_two', expect => $count + 1)), $count + 1, 'a replay does not send what a replay has sent');

sql(q(create function suppress() returns trigger language plpgsql as 'begin return null; end';
	create trigger suppress before insert on fanout.replay_message for each row when (new.id % 2 = 0) execute function suppress()));
$id = sql("select fanout.replay('item', 'two', '$since', '$until')");
like(wait_for_end($id), qr/^failed: a statement of pg_fanout changed \d+ rows instead of $count$/, 'nor does it pass over messages that it cannot list');
sql(q(drop trigger suppress on fanout.replay_message));

# ---- what is gone, and what is refused ----

my ($stdout, $stderr) = ('', '');
$node->psql('postgres', q(set client_min_messages = notice; select fanout.cancel_backfill(fanout.replay('item', 'two', '2000-01-01'))), stdout => \$stdout, stderr => \$stderr);
like($stderr, qr/NOTICE:  the oldest message of topic "item" in the outbox is of 20/, 'a NOTICE tells what is there');
foreach my $case (
	[ q('nosuch', 'two', now()), '42704' ], [ q('item', 'nosuch', now()), '42704' ], [ q('item', null, now()), '22004' ],
	[ q('item', 'two', null), '22004' ], [ q('item', 'two', now(), now()), '22023' ])
{
	$node->psql('postgres', "\\set VERBOSITY verbose\nselect fanout.replay($case->[0])", stdout => \$stdout, stderr => \$stderr);
	like($stderr, qr/ERROR:  $case->[1]/, "replay($case->[0]) is refused");
}
sql('create role somebody; grant usage on schema fanout to somebody;');
$node->psql('postgres', q(set role somebody; select fanout.replay('item', 'two', now())), stdout => \$stdout, stderr => \$stderr);
like($stderr, qr/permission denied for function replay/, 'it takes a right');

# ---- a subscription ----

sql(q(
create table log (id int, v int, sequence bigint);
create function note(m fanout.message) returns void language sql as $$
	insert into log select (m.body #>> '{after,id}')::int, (m.body #>> '{after,v}')::int, m.sequence where m.headers ? 'op' $$;
select fanout.declare_binding('item', 'local'), fanout.subscribe('item', 'local', 'note(fanout.message)');
));
PgFanout::flush($node);
my $of_time = "'local', '$since', '$until'";
is(wait_for_end(sql("select fanout.replay('item', $of_time)")), 'done', 'to a subscription');
$node->poll_query_until('postgres', 'select count(*) = 3000 from log') or die 'not consumed';
is(wait_for_end(sql("select fanout.replay('item', $of_time)")), 'done', 'and again');
PgFanout::flush($node);
PgFanout::poll(sub { $broker->left('item_local') == 0 }, 'the queue is empty');
$node->poll_query_until('postgres', q(select skipped >= 3000 from fanout.stat_subscriptions)) or die 'not skipped';
is(sql('select count(*) from log'), '3000', 'which skips ids that it knows');
is(wait_for_end(sql("select fanout.replay('item', $of_time, again => true)")), 'done', 'with again');
$node->poll_query_until('postgres', 'select count(*) = 6000 from log') or die 'not consumed';
is(sql('select count(distinct sequence), count(*) from log'), '3000|6000', 'it takes them anew, with the same sequences');

# ---- failures in the midst ----

$id = sql("select fanout.replay('item', 'two', '$since', '$until')");
foreach my $i (1 .. 3)
{
	PgFanout::poll(sub { ask("select rows_sent > 0 or state = 'done' from fanout.backfills where id = $id") eq 't' }, 'some messages');
	my $pid = ask(q(select pid from pg_stat_activity where backend_type = 'pg_fanout history'));
	next if $pid !~ /^\d+$/;
	$i == 2 ? PgFanout::kill_process($node, $pid) : kill('TERM', $pid);
	sleep 1;
}
is(wait_for_end($id), 'done', 'a replay goes on after its worker was killed');
PgFanout::flush($node);
my %seen;
my @sent = grep { $_->{headers}->{replay} == $id && !$_->{headers}->{last} && !$seen{ $_->{message_id} }++ }
  $broker->collect('item_two', expect => $count);
is(disorder(@sent), 0, 'each key in its order');
is_deeply([ map { $_->{headers}->{sequence} } by_sequence(@sent) ], [ map { $_->{headers}->{sequence} } @expected ], 'and nothing is missing');

done_testing();
