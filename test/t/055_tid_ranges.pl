# The outbox has no index: the publisher finds what became visible by where it
# was written.  Whatever happens to transactions, tables and workers meanwhile,
# every committed message arrives, and once unless a publisher was ended.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $seconds = $ENV{PG_FANOUT_LONG} ? 60 : 8;

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $node = PgFanout::cluster(
	'main', $proxy,
	conf => q(
autovacuum = off
max_prepared_transactions = 5
max_connections = 40
pg_fanout.retry_interval = 1s
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

# What the table t has had since the last call has arrived: once, or at least once.
my $checked = 0;

sub all_arrived
{
	my ($name, %params) = @_;

	PgFanout::flush($node, timeout => '60 s');
	my @expected = split /\n/, sql("select id from t where id > 0 and not seen order by id");
	sql('update t set seen = true where not seen');
	my %times;
	my %message_ids;

	foreach my $message ($broker->collect("t_g", idle => 0.2))
	{
		next if $params{repeats} && $message_ids{ $message->{message_id} }++;
		$times{ $message->{body}->{after}->{id} }++;
	}
	my @missing = grep { !$times{$_} } @expected;
	my @repeated = grep { $times{$_} > 1 } keys %times;
	my %expected = map { $_ => 1 } @expected;
	my @invented = grep { !$expected{$_} } keys %times;

	is(@missing . ' missing, ' . @repeated . ' twice, ' . @invented . ' invented',
		'0 missing, 0 twice, 0 invented', "$name (" . @expected . ' messages)')
	  or diag("missing: @missing[0 .. ($#missing > 20 ? 20 : $#missing)]");
	return;
}

# Others write so many rows of a few hundred bytes, each a transaction in ten.
sub others_write
{
	my ($rows) = @_;

	sql("insert into t (v) select repeat('x', 300) from generate_series(1, $rows) i");
	return;
}

# A batch ends before this returns.
sub boundary
{
	PgFanout::flush($node);
	return;
}

sub blocks { return sql("select pg_relation_size('fanout.outbox_' || current) / 8192 from fanout.rotation"); }
sub current { return sql('select current from fanout.rotation'); }

sql( q(select fanout.declare_binding('t', 'g', 'classic');
	   create table t (id bigserial primary key, v text, seen boolean not null default false);
	   select fanout.capture('t', 't', '{insert}')));

# ---- one transaction among others ----

my $long = PgFanout::session($node);
PgFanout::run_in($long, q(begin; insert into t (v) values ('first')));
boundary();
others_write(2000);
boundary();
PgFanout::run_in($long, q(insert into t (v) values ('second')));
others_write(2000);
boundary();
PgFanout::run_in($long, q(insert into t (v) select 'many' from generate_series(1, 500)));
boundary();
PgFanout::run_in($long, q(insert into t (v) values ('last'); commit));
all_arrived('a transaction that writes now and then while others write megabytes');

PgFanout::run_in($long, q(begin; insert into t (v) select repeat('y', 300) from generate_series(1, 1000)));
boundary();
boundary();
PgFanout::run_in($long, 'commit');
all_arrived('the newest transaction, which no snapshot lists as running');

PgFanout::run_in($long, q(insert into t (v) values ('into a page with room')));
others_write(2000);
boundary();
PgFanout::run_in($long, q(insert into t (v) values ('not into that page')));
all_arrived('a session that writes again after others have');

my @many = map { PgFanout::session($node) } 1 .. 12;
foreach my $round (1 .. 12)
{
	PgFanout::run_in($many[ $round - 1 ], q(begin; insert into t (v) values ('round 1')));
	others_write(200);
	PgFanout::run_in($_, q(insert into t (v) values ('round'))) foreach @many[ 0 .. $round - 1 ];
	boundary() if $round % 2;
}
PgFanout::run_in($_, 'commit') foreach @many;
all_arrived('twelve of them, each writing to more places than are remembered apart');
$_->{harness}->kill_kill foreach @many;

PgFanout::run_in($long, q(begin; savepoint a; insert into t (v) values ('a'); release a; savepoint b;
	insert into t (v) select repeat('z', 300) from generate_series(1, 3000)));
boundary();
PgFanout::run_in($long, q(rollback to b));
sql("vacuum (truncate) fanout.outbox_@{[current()]}");
PgFanout::run_in($long, q(savepoint c; insert into t (v) values ('c'); release c));
boundary();
others_write(500);
PgFanout::run_in($long, q(insert into t (v) values ('d'); commit));
all_arrived('subtransactions, one of which is rolled back and vacuumed away');

PgFanout::run_in($long, q(begin isolation level repeatable read; insert into t (v) values ('of a transaction rolled back')));
boundary();
PgFanout::run_in($long, 'rollback');
others_write(10);
all_arrived('a transaction that is rolled back');

# ---- publishers and servers that start again ----

PgFanout::run_in($long, q(begin; insert into t (v) values ('before the publisher ends')));
boundary();
others_write(1000);
PgFanout::new_publisher($node);
boundary();
others_write(1000);
boundary();
PgFanout::run_in($long, q(insert into t (v) values ('after it has ended'); commit));
all_arrived('a transaction that is older than the publisher', repeats => 1);

sql(q(begin; insert into t (v) values ('prepared 1'); prepare transaction 'p1'));
sql(q(begin; insert into t (v) values ('prepared 2'); prepare transaction 'p2'));
boundary();
others_write(1000);
boundary();
sql(q(commit prepared 'p1'));
others_write(10);
all_arrived('a prepared transaction');
sql(q(begin; insert into t (v) values ('prepared 3'); prepare transaction 'p3'));
$node->restart;
others_write(1000);
boundary();
sql(q(commit prepared 'p2'));
all_arrived('a prepared transaction, after a restart of the server', repeats => 1);
sql(q(begin; insert into t (v) values ('prepared 4'); prepare transaction 'p4'));
$node->stop('immediate');
$node->start;
PgFanout::new_publisher($node);
boundary();
others_write(1000);
boundary();
sql(q(commit prepared 'p3'));
boundary();
sql(q(commit prepared 'p4'));
all_arrived('prepared transactions, after a crash', repeats => 1);

# more of them, one after the other, than there can be at a time
foreach my $i (1 .. 100)
{
	sql("begin; insert into t (v) values ('$i'); prepare transaction 'q'");
	sql("commit prepared 'q'");
}
all_arrived('a hundred prepared transactions');

# ---- tables that are rewritten or cut off ----

sub with_unread
{
	my ($name, $sql) = @_;

	others_write(500);
	boundary();
	$proxy->command('cut');
	others_write(500);
	sql($sql);
	others_write(5);
	$proxy->command('pass');
	all_arrived($name, repeats => 1);

	PgFanout::run_in($long, q(begin; insert into t (v) values ('before')));
	boundary();
	PgFanout::run_in($long, q(commit));
	sql($sql);
	others_write(5);
	all_arrived("$name, while the publisher works");
	return;
}

my $current = current();
$long = PgFanout::session($node);
with_unread('VACUUM', "vacuum fanout.outbox_$current");
with_unread('VACUUM FULL', "vacuum full fanout.outbox_$current");
sql("create index segment_index on fanout.outbox_$current (id desc)");
with_unread('CLUSTER', "cluster fanout.outbox_$current using segment_index");
sql("drop index fanout.segment_index");

# A file that grows with what is rolled back, is cut off, and grows again.
others_write(100);
boundary();
PgFanout::run_in($long, q(begin; insert into t (v) select repeat('r', 300) from generate_series(1, 5000)));
sql(q(insert into fanout.topology_change values (pg_current_xact_id())));
boundary();
my $before = blocks();
PgFanout::run_in($long, 'rollback');
boundary();
PgFanout::new_publisher($node);
boundary();
$proxy->command('cut');
sql("vacuum (truncate) fanout.outbox_$current");
cmp_ok(blocks(), '<', $before, 'VACUUM cuts off what was rolled back');
others_write(6000);
cmp_ok(blocks(), '>', $before, 'and the file grows beyond that');
$proxy->command('pass');
all_arrived('a file that was cut off and has grown again', repeats => 1);

# ---- rows that INSERT brings ----

sub by_hand
{
	my ($n) = @_;

	return qq(
		with r as (insert into t (v, seen) values ('by hand $n', false) returning id)
		insert into fanout.outbox select $current, (select oid from pg_database where datname = current_database()), nextval('fanout.outbox_id_seq'), pg_current_xact_id(), topic_id,
			gen_random_uuid(), 'by hand', null, null, json_build_object('after', json_build_object('id', r.id)), null, now()
		from fanout.topic, r where topic = 't');
}

others_write(100);
sql(q(begin; insert into t (v) select repeat('r', 300) from generate_series(1, 1000); rollback));
others_write(2000);
boundary();
sql("vacuum fanout.outbox_$current");
sql('alter table t disable trigger user');
sql(by_hand(1));
cmp_ok(sql("select (ctid::text::point)[0] from fanout.outbox_$current where type = 'by hand' order by id desc limit 1"),
	'<', blocks() - 50, 'a row by INSERT goes to where there is room');
boundary();
sql(by_hand(2));
PgFanout::run_in($long, 'begin; ' . by_hand(3));
boundary();
PgFanout::run_in($long, 'commit');
all_arrived('rows that INSERT puts among older ones');
$proxy->command('cut');
sql(by_hand(4));
sql('begin; ' . by_hand(5) . q(; prepare transaction 'hand'));
$node->stop('immediate');
$node->start;
$proxy->command('pass');
boundary();
sql(q(commit prepared 'hand'));
all_arrived('also across a crash', repeats => 1);
sql('alter table t enable trigger user');
sql("alter system set pg_fanout.retention = '4s'");
$node->reload;
PgFanout::poll(
	sub {
		others_write(1);
		boundary();
		return sql('select count(*) from fanout.scattered') == 0;
	},
	'the publisher to forget them');
pass('the publisher forgets where they were');

# ---- at random ----

my $dir = PostgreSQL::Test::Utils::tempdir();
append_to_file("$dir/short.sql", "insert into t (v) values ('short');\n");
append_to_file("$dir/bulk.sql", "insert into t (v) select repeat('b', 200) from generate_series(1, 300);\n");
append_to_file("$dir/long.sql", q(
\set wait random(5, 400)
begin;
insert into t (v) values ('long 1');
\sleep :wait ms
insert into t (v) values ('long 2');
savepoint s;
insert into t (v) select 'rolled back' from generate_series(1, 20);
rollback to s;
\sleep :wait ms
insert into t (v) select 'long 3' from generate_series(1, 20);
commit;
));
append_to_file("$dir/none.sql", "begin; insert into t (v) select repeat('n', 200) from generate_series(1, 100); rollback;\n");

sub at_random
{
	my ($name, $disturb, %params) = @_;
	my $pgbench = IPC::Run::start(
		[
			'pgbench', '-n', '-c', 16, '-j', 2, '-T', $seconds, '-f', "$dir/short.sql\@200",
			'-f', "$dir/bulk.sql\@2", '-f', "$dir/long.sql\@20", '-f', "$dir/none.sql\@2", '-R', 600,
			'-d', $node->connstr('postgres')
		],
		'>', \my $out, '2>', \my $err);
	my $end = Time::HiRes::time() + $seconds;

	$disturb->() while Time::HiRes::time() < $end;
	$pgbench->finish or diag($err);
	all_arrived($name, %params);
	return;
}

my $first = current();
foreach my $run (1 .. 5)
{
	at_random('16 clients, one transaction in ten long, with rotations', sub { Time::HiRes::sleep(0.5); });
	last if current() != $first;
}
isnt(current(), $first, 'the outbox was rotated meanwhile');
at_random('the same while publishers end, the broker goes away and segments are vacuumed',
	sub
	{
		my $what = int(rand(5));

		$node->psql('postgres', 'select pg_terminate_backend(pid) from fanout.stat_publisher') if $what == 0;
		sql("vacuum (truncate) fanout.outbox_" . int(rand(3))) if $what == 1;
		if ($what == 2)
		{
			$proxy->command('cut');
			Time::HiRes::sleep(0.5);
			$proxy->command('pass');
		}
		sql(q(begin; insert into t (v) values ('p'); prepare transaction 'random'; commit prepared 'random')) if $what == 3;
		Time::HiRes::sleep(0.3);
	},
	repeats => 1);
ok($node->poll_query_until('postgres', q(select sum(pending) = 0 from fanout.stat_topics)), 'nothing is pending');

$long->{harness}->kill_kill;
$node->stop;
done_testing();
