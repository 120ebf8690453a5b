# The ring of segments: emptied when everything in it was sent long enough ago,
# never a row too early; and the memory of a publisher that reads a transaction
# of very many rows.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $large = 300000;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
pg_fanout.retention = 4s
max_prepared_transactions = 5
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub current { return sql('select current from fanout.rotation'); }

sub wait_for_rotation
{
	my ($from) = @_;

	# something must be written for a segment to become old
	for (1 .. 300)
	{
		sql(q(insert into t (v) values ('filler')));
		return if current() != $from;
		select(undef, undef, undef, 0.2);
	}
	die "no rotation\n" . PgFanout::status($node, 'postgres');
}

sub rows_in { return sql("select count(*) from fanout.outbox_$_[0]"); }

sql( q(select fanout.declare_binding('t', 'g', 'classic');
	   select fanout.declare_binding('paused', 'g', 'classic');
	   create table t (id bigserial primary key, v text);
	   select fanout.capture('t', 't', '{insert}');
	   select fanout.publish('paused', '"first"', 'k') from fanout.pause('paused');
	   insert into t (v) values ('first')));

# ---- transactions that outlive a rotation ----

my $first = current();
my $repeatable = PgFanout::session($node);
PgFanout::run_in($repeatable, 'begin isolation level repeatable read; select count(*) from t');
my $writer = PgFanout::session($node);
PgFanout::run_in($writer, q(begin; insert into t (v) values ('open writer')));
sql(q(begin; insert into t (v) values ('prepared'); prepare transaction 'p'));

wait_for_rotation($first);
isnt(current(), $first, 'new rows go to the next segment');
PgFanout::run_in($repeatable, q(insert into t (v) values ('repeatable read')));
sleep 6;
cmp_ok(rows_in($first), '>', 0, 'a segment with undecided transactions is not emptied, however old');
is( sql(q(select count(*) from fanout.outbox_status where topic = 'paused' and state = 'held')),
	1, 'a paused topic holds its message');

PgFanout::run_in($writer, 'commit');
PgFanout::run_in($repeatable, q(insert into t (v) values ('repeatable read 2'); commit));
sql(q(commit prepared 'p'));
PgFanout::wait_for_state($node, 'sent', where => q(topic = 't'));
ok(1, 'what they wrote is sent');

# ---- a lock held by somebody is not waited for ----

my $reader = PgFanout::session($node);
PgFanout::run_in($reader, "begin; lock table fanout.outbox_$first in access share mode");
sleep 6;
cmp_ok(rows_in($first), '>', 0, 'a segment that somebody has locked is left alone');
sql(q(insert into t (v) values ('while locked')));
PgFanout::wait_for_state($node, 'sent', where => q(topic = 't'));
ok(1, 'and nothing waits for that');
PgFanout::run_in($reader, 'commit');

# A lock of the whole table takes the segments in order.  Rotation looks at them in another
# one, and must hold none of the later ones while it waits for the first.
wait_for_rotation(current()) while current() == 2;
PgFanout::run_in($reader, 'begin; lock table fanout.outbox_0 in access exclusive mode');
$node->poll_query_until('postgres',
	q(select count(*) > 0 from pg_locks where relation = 'fanout.outbox_0'::regclass and not granted and pid = (select pid from fanout.stat_publisher)))
  or die 'the publisher does not wait';
PgFanout::run_in($reader, "lock table fanout.outbox_$_ in access exclusive mode nowait") foreach 1, 2;
PgFanout::run_in($reader, 'commit');
ok(1, 'while it waits for the first segment, the publisher has no lock of another one');

# ---- around the ring ----

$node->poll_query_until('postgres', "select count(*) = 0 from fanout.outbox_$first where key is not null")
  or die PgFanout::status($node, 'postgres');
ok(1, 'then it is emptied');
my $came_round = 0;
for (1 .. 10)
{
	wait_for_rotation(current());
	last if $came_round = (current() == $first);
}
ok($came_round, 'and becomes the current one again, in its turn');

sql(q(select fanout.resume('paused')));
PgFanout::flush($node);
is_deeply([ map { $_->{body} } $broker->collect('paused_g', expect => 1) ],
	['first'], 'a message held longer than the retention is still there, and sent');

my $inserted = sql('select count(*) from t');
my @received = $broker->collect('t_g', expect => $inserted);
my %ids = map { $_->{body}->{after}->{id} => 1 } @received;
is(scalar(keys %ids), $inserted, 'over all rotations, every row arrived');
is(scalar(@received), $inserted, 'once');
foreach my $v ('open writer', 'prepared', 'repeatable read', 'repeatable read 2')
{
	is(scalar(grep { $_->{body}->{after}->{v} eq $v } @received), 1, "among them: $v");
}
is(sql(q(select coalesce(sum(n_dead_tup + n_tup_del), 0) from pg_stat_user_tables where relname ~ '^(outbox|sent)_')),
	0, 'no dead tuple was left in a segment, nor in one of the ledger');
# while something is written: the newest stays, and those in its segment
PgFanout::poll(
	sub {
		sql(q(insert into t (v) values ('filler')));
		PgFanout::flush($node);
		return sql(q(select count(*) from fanout.sent where sent_at < now() - interval '20 s')) == 0;
	},
	'the end of old entries');
pass('entries of the ledger go with the rows they tell of');
$_->{harness}->kill_kill foreach ($repeatable, $writer, $reader);

# ---- the ledger of single messages ----

my $entries = sql('select last_value from fanout.sent_id_seq');
my $file = PostgreSQL::Test::Utils::tempdir() . '/single.sql';
PostgreSQL::Test::Utils::append_to_file($file, "insert into t (v) values ('single');\n");
$node->command_ok([ 'pgbench', '-n', '-c', '1', '-t', '300', '-f', $file, $node->connstr('postgres') ],
	'300 transactions one after the other');
PgFanout::wait_for_state($node, 'sent');
cmp_ok(sql('select last_value from fanout.sent_id_seq') - $entries,
	'<', 200, 'messages that come one by one share entries of the ledger');
$broker->collect('t_g', expect => 300);

# ---- memory ----

sql('alter system set pg_fanout.retention = 3600');
$node->reload;
my $pid = PgFanout::publisher_pid($node);
sql(qq(insert into t (v) select repeat('x', 200) from generate_series(1, $large)));
PgFanout::flush($node, timeout => '180 s');
my ($peak) = slurp_file("/proc/$pid/status") =~ /VmHWM:\s+(\d+) kB/;
my ($shared) = slurp_file("/proc/$pid/status") =~ /RssShmem:\s+(\d+) kB/;
note "publisher: peak $peak kB, of which shared buffers $shared kB";
cmp_ok($peak - $shared, '<', 100 * 1024, "a transaction of $large rows takes the publisher less than 100 MB of its own");
is($broker->count('t_g'), $large, 'and all of it arrives');

# ---- a segment rewritten in the middle of a batch ----

# Bodies of more than 1000 bytes are read with each chunk of a batch.  With the
# broker's answers held back, and the socket's buffers full, most are not yet.
# They move, since what was rolled back before them goes.
$broker->amqp('purge', '--queue', 't_g');
my $proxy = $broker->proxy;
my $uri = $proxy->uri;
sql("alter system set pg_fanout.uri = '$uri'");
$node->reload;
PgFanout::poll(sub { sql('select connected_to from fanout.stat_publisher') =~ /:@{[ $proxy->port ]}\b/ },
	'a connection through the proxy');
sql(q(insert into t (v) values ('so that its topic has a channel')));
PgFanout::flush($node);
$broker->amqp('purge', '--queue', 't_g');
$proxy->command('freeze');
sql(q(begin; insert into t (v) select 'not to stay' from generate_series(1, 100); rollback;
	insert into t (v) select repeat(md5(i::text), 60) from generate_series(1, 20000) i));
PgFanout::poll(sub { sql('select in_flight from fanout.stat_publisher') > 0 }, 'the beginning of a batch');
sql("vacuum full fanout.outbox_$_") foreach 0 .. 2;
$proxy->command('pass');
PgFanout::flush($node, timeout => '180 s');
my %seen;
$seen{ $_->{message_id} }++ foreach $broker->collect('t_g', expect => 20000);
is(scalar keys %seen, 20000, 'VACUUM FULL in the middle of a batch: all of it is published');

done_testing();
