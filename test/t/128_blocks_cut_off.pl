# The publisher finds messages by where they were written.  Segments of the outbox
# become shorter at any time: VACUUM cuts off what was rolled back, or deleted by hand,
# and they may grow again before the publisher looks.  And a session may put a row into a
# block that others have left behind long ago.  Every committed message arrives, and no
# publisher ends for that.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $dir = PostgreSQL::Test::Utils::tempdir();
PgFanout::run_command_ok('cc', '-Wall', '-shared', '-fPIC', '-o', "$dir/blocks.so", "$PgFanout::lib/blocks.c");
$ENV{BLOCKS_DIR} = $dir;
my $node = with_blocks(sub {
	PgFanout::cluster(
		'main', $broker,
		conf => q(
autovacuum = off
pg_fanout.retry_interval = 1s
));
});

# The server's processes can be stopped, see blocks.c.
sub with_blocks
{
	my ($start) = @_;

	local $ENV{LD_PRELOAD} = "$dir/blocks.so";
	return $start->();
}

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub blocks { return sql("select pg_relation_size('fanout.outbox_$_[0]') / 8192"); }

# What the table t has had since the last call has arrived, and once.
sub all_arrived
{
	my ($name, %params) = @_;
	my %times;

	PgFanout::flush($node, timeout => '120 s');
	my @expected = split /\n/, sql('select id from t where not seen');
	sql('update t set seen = true where not seen');
	$times{ $_->{body}->{after}->{id} }++ foreach $broker->collect('t_g', idle => 0.2);
	my $missing = grep { !$times{$_} } @expected;
	my $repeated = $params{repeats} ? 0 : grep { $_ > 1 } values %times;
	is("$missing missing, $repeated twice", '0 missing, 0 twice', "$name (" . @expected . ' messages)');
	return;
}

sub write_rows
{
	my ($rows) = @_;

	sql("insert into t (v) select repeat('x', 300) from generate_series(1, $rows)");
	return;
}

sub waits_for_lock
{
	my ($backend_type, $name) = @_;

	PgFanout::poll(
		sub {
			sql(qq(select count(*) from pg_locks l join pg_stat_activity a using (pid)
				where not granted and l.relation = 'fanout.outbox_0'::regclass and backend_type = '$backend_type')) > 0;
		},
		$name);
	return;
}

sql( q(select fanout.declare_binding('t', 'g', 'classic');
	   create table t (id bigserial primary key, v text, seen boolean not null default false);
	   select fanout.capture('t', 't', '{insert}')));

# ---- a segment that a crash empties ----

sql('alter table fanout.outbox_0 set unlogged');
write_rows(3000);
all_arrived('an unlogged segment');
my $before = blocks(0);
sql('alter system set pg_fanout.enabled = off');
$node->stop('immediate');
with_blocks(sub { $node->start });
is(blocks(0), 0, 'a crash empties it');
write_rows(6000);
cmp_ok(blocks(0), '>', $before, 'and it grows again');
sql('alter system reset pg_fanout.enabled');
$node->reload;
all_arrived('what is written after the crash', repeats => 1);
sql('alter table fanout.outbox_0 set logged');
write_rows(10);
all_arrived('a segment that is logged again');

# ---- a segment that is read after another one that can be locked meanwhile ----

my $lock = PgFanout::session($node);
# outbox_1 becomes the current one; again if outbox_2 does before the retention is long again
foreach (1 .. 5)
{
	sql(q(alter system set pg_fanout.retention = '4s'));
	$node->reload;
	PgFanout::poll(
		sub {
			write_rows(1);
			PgFanout::flush($node);
			return sql('select current from fanout.rotation') == 1;
		},
		'rotation');
	sql('alter system reset pg_fanout.retention');
	$node->reload;
	# the publisher knows by then
	write_rows(1);
	PgFanout::flush($node);
	last if sql('select current from fanout.rotation') == 1;
}
write_rows(1) while sql('select count(*) from fanout.outbox_1') == 0;
all_arrived('the first messages');
my $pid = PgFanout::publisher_pid($node);

# Stops the publisher before it opens outbox_1, and lets it go on.
sub stop_reading
{
	PgFanout::run_in($lock, 'begin; lock table fanout.outbox_0 in access exclusive mode');
	return;
}

sub go_on { PgFanout::run_in($lock, 'commit'); return; }

# ---- while it is read ----

# Rows of which the last ones were committed, or none; then something is done to the
# segment when the publisher has read some of its blocks.
sub in_the_midst
{
	my ($name, $committed, $sql) = @_;
	my $second = PgFanout::session($node);

	stop_reading();
	sql(q(begin; insert into t (v) select repeat('r', 300) from generate_series(1, 30000); rollback));
	write_rows($committed) if $committed;
	my $long = blocks(1);
	sql("select fanout.declare_topic('wakes_the_publisher_$committed')");
	waits_for_lock('pg_fanout publisher', 'the publisher to begin a batch');
	$second->{in} = "begin; lock table fanout.outbox_0 in access exclusive mode;\n\\echo locked\n";
	$second->{harness}->pump_nb;
	waits_for_lock('client backend', 'another lock to queue behind it');
	go_on();
	$second->{harness}->pump until $second->{out} =~ /locked/;
	waits_for_lock('pg_fanout publisher', 'the publisher to have read some blocks');
	sql($sql);
	cmp_ok(blocks(1), '<', $long - 1000, "$name: it is shorter");
	PgFanout::run_in($second, 'commit');
	$second->{harness}->kill_kill;
	write_rows(10);
	all_arrived("$name while it is read", repeats => $committed);
	return;
}

in_the_midst('a segment of which VACUUM cuts off blocks', 0, 'vacuum (truncate) fanout.outbox_1');
is(PgFanout::publisher_pid($node), $pid, 'the publisher goes on');
in_the_midst('a segment that VACUUM FULL writes anew', 500, 'vacuum full fanout.outbox_1');

# ---- between two batches ----

# What is written when rows at the end have gone one way or another: before the publisher
# has seen that, or after.
sub rows_go
{
	my ($name, $sql, $meanwhile, %params) = @_;

	write_rows(3000);
	all_arrived("$name: before");
	my $before = blocks(1);
	stop_reading() unless $params{seen};
	sql($sql);
	if ($params{seen})
	{
		PgFanout::flush($node);
		stop_reading();
	}
	sql('vacuum (truncate) fanout.outbox_1');
	cmp_ok(blocks(1), '<', $before - 50, "$name: the segment is shorter");
	$meanwhile->() if $meanwhile;
	write_rows(3000) until blocks(1) > $before;
	go_on();
	# what a publisher had in flight at its end comes again
	all_arrived($name, repeats => $meanwhile || $sql =~ /^update/);
	return;
}

sub new_publisher { sql('select pg_terminate_backend(pid) from fanout.stat_publisher'); return; }

my $delete = 'delete from fanout.outbox_1 where id > (select max(id) - 2000 from fanout.outbox_1)';
my $update = 'update fanout.outbox_1 set xid = pg_current_xact_id() where id > (select max(id) - 2000 from fanout.outbox_1)';
rows_go('rows deleted by hand', $delete);
rows_go('rows deleted by hand and forgotten by the publisher', $delete, undef, seen => 1);
rows_go('rows deleted while publishers change', $delete, \&new_publisher);
rows_go('rows deleted and forgotten while publishers change', $delete, \&new_publisher, seen => 1);
rows_go('all rows deleted', 'delete from fanout.outbox_1', undef, seen => 1);
sql('delete from fanout.outbox_1 where id < (select max(id) - 2500 from fanout.outbox_1); vacuum (truncate off) fanout.outbox_1');
rows_go('rows that an update moves', "$update; $delete", undef, seen => 1);

# Nobody is told of that, but it shows.
write_rows(3000);
all_arrived('before');
sql("alter table fanout.outbox_1 disable trigger pg_fanout_guard; $delete; alter table fanout.outbox_1 enable always trigger pg_fanout_guard");
sql('vacuum (truncate) fanout.outbox_1');
write_rows(10);
all_arrived('a segment that is shorter than what was read, without notice');

# ---- rows that come late to their block ----

# A session has looked for the last block so often, and others write before it goes on.
sub comes_late
{
	my ($name, $looks) = @_;
	my $large = q(insert into t (v) select repeat('l', 1400) from generate_series(1, %d));
	my $session = PgFanout::session($node);
	my $pid;

	PgFanout::run_in($session, 'select pg_backend_pid()');
	($pid) = $session->{out} =~ /^(\d+)$/m;
	PgFanout::run_in($session, q(insert into t (v) values ('first')));
	sql(sprintf($large, 41));
	append_to_file("$dir/stop", "$pid " . sql(q(select pg_relation_filepath('fanout.outbox_1'))) . " $looks\n");
	$session->{in} = "insert into t (v) values ('late');\n";
	$session->{harness}->pump_nb;
	PgFanout::poll(sub { -e "$dir/stopped" }, 'the session to look');
	my $last = blocks(1) - 1;
	sql(sprintf($large, 400));
	PgFanout::flush($node);
	sql(sprintf($large, 1));
	PgFanout::flush($node);
	unlink "$dir/stop", "$dir/stopped";
	PgFanout::run_in($session, 'select 1');
	my $block = sql(q(select (ctid::text::point)[0] from fanout.outbox_1 where payload like '%"late"%' order by id desc limit 1));
	cmp_ok($block, $looks ? '==' : '>', $last, "$name: where the row is");
	all_arrived($name);
	$session->{harness}->kill_kill;
	return;
}

comes_late('a session that is stopped before it announces that it writes', 0);
comes_late('a session that has chosen its block', 1);

# ---- rows that go to where there is room ----

sql(q(begin; insert into t (v) select repeat('r', 300) from generate_series(1, 1000); rollback));
write_rows(1000);
all_arrived('before');
sql('vacuum fanout.outbox_1');
sql('create index segment_index on fanout.outbox_1 using hash (id)');
my $last = blocks(1) - 1;
write_rows(100);
cmp_ok(
	sql(q(select min((ctid::text::point)[0]) from (select ctid from fanout.outbox_1 order by id desc limit 100) r)),
	'<', $last - 50, 'with an index of another kind, rows go to where there is room');
all_arrived('rows among others');
sql('drop index fanout.segment_index');

$lock->{harness}->kill_kill;
$node->stop;
done_testing();
