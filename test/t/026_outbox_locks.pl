# What sessions and administrators do with the outbox while it is written, read
# and rotated every second: transactions that stay open, locks, VACUUM FULL and
# its like.  Under load from several clients.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Experiment;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker();
my $node = PgFanout::cluster(
	'main', $broker,
	conf => q(
pg_fanout.retention = 1s
max_prepared_transactions = 5
autovacuum_naptime = 1s
autovacuum_vacuum_insert_threshold = 1
autovacuum_vacuum_insert_scale_factor = 0
log_autovacuum_min_duration = 0
deadlock_timeout = 100ms
));
my $experiment = PgFanout::Experiment->new(
	node => $node, broker => $broker, file => __FILE__);
my $key = -1;    # of rows that the load does not touch

sub sql { return $node->safe_psql('postgres', $_[0]); }

# Transactions that stay open

my $usual;
$experiment->run('rotation every second, with autovacuum',
	sub {
		wait_for_rotations(2);
		$node->wait_for_log(qr/automatic vacuum of table "postgres\.fanout\.outbox_/);
		pass('autovacuum looked at a segment');
		$usual = latency();
	});

my $writer = $node->background_psql('postgres');
my $snapshot = $node->background_psql('postgres');
$writer->query_safe('begin; ' . insert_row());
$snapshot->query_safe('begin isolation level repeatable read; select count(*) from ledger');
$experiment->run(
	'an idle writer and an idle snapshot, open for the whole run',
	sub { wait_for_seconds(3); as_fast_as($usual) },
	after => sub { $writer->query_safe('commit') });
is(sql(q(select coalesce(sum(n_tup_upd + n_tup_del), 0) from pg_stat_user_tables where relname ~ '^(outbox|sent)_')),
	0, 'no tuple of outbox and ledger dies but those that were rolled back');
$_->quit foreach ($writer, $snapshot);

$experiment->run(
	'transactions prepared, later committed and rolled back',
	sub {
		sql('begin; ' . insert_row() . "; prepare transaction 'kept'");
		sql('begin; ' . insert_row() . "; prepare transaction 'undone'");
		wait_for_seconds(2);
		sql("rollback prepared 'undone'");
		sql("commit prepared 'kept'");
	});

$experiment->run(
	'a REPEATABLE READ session across rotations',
	sub {
		my $session = $node->background_psql('postgres');

		$session->query_safe('begin isolation level repeatable read; select count(*) from ledger');
		wait_for_rotations(3);
		$session->query_safe(insert_row());
		wait_for_seconds(2);
		$session->query_safe(insert_row() . '; commit');
		$session->quit;
	});

# Locks

$experiment->run(
	'LOCK TABLE fanout.outbox, in every mode that conflicts',
	sub {
		foreach my $mode ('share', 'exclusive', 'access exclusive')
		{
			sql("begin; lock table fanout.outbox in $mode mode; select pg_sleep(0.5)");
			$experiment->wait_for_commits(50);
		}
	});

$experiment->run(
	'pg_dump, twice',
	sub {
		foreach (1 .. 2)
		{
			PgFanout::run_command_ok('pg_dump', '-f', '/dev/null', $node->connstr('postgres'));
			wait_for_rotations(1);
		}
	});

# What an administrator does to tables that grow

my $place = PostgreSQL::Test::Utils::tempdir_short();
sql("create tablespace place location '$place'");
to_each_segment(
	'VACUUM FULL, CLUSTER',
	'vacuum full fanout.%s',
	'create index %s_id_idx on fanout.%s (id)',
	'cluster fanout.%s using %s_id_idx',
	'drop index fanout.%s_id_idx');
to_each_segment(
	'VACUUM FREEZE, REINDEX, REINDEX CONCURRENTLY',
	'vacuum (freeze, analyze) fanout.%s',
	'reindex table fanout.%s',
	'reindex table concurrently fanout.%s');
to_each_segment(
	'ALTER TABLE SET TABLESPACE, there and back',
	'alter table fanout.%s set tablespace place',
	'alter table fanout.%s set tablespace pg_default');

unlike(slurp_file($node->logfile), qr/deadlock detected|PANIC|TRAP/, 'no deadlock in all this');
unlike(slurp_file($node->logfile), qr/terminated|exited with exit code [12]/, 'and no worker failed');

done_testing();

# A change of a row of its own, and its line in the ledger.
sub insert_row
{
	my $id = $key--;

	return qq(with c as (insert into item_1 (id) values ($id) returning id, token)
	insert into ledger (topic, key, op, token) select 1, id, 'c', token from c);
}

sub current { return sql('select rotated_at from fanout.rotation'); }

sub wait_for_rotations
{
	my ($count) = @_;

	foreach (1 .. $count)
	{
		my $last = current();

		PgFanout::poll(sub { current() ne $last }, 'a rotation');
	}
	return;
}

# While the load goes on.
sub wait_for_seconds
{
	my ($seconds) = @_;
	my $until = time + $seconds;

	PgFanout::poll(sub { time >= $until }, 'time to pass');
	$experiment->wait_for_commits(50);
	return;
}

# The median time in ms that flush() takes.
sub latency
{
	my $timed = q(with start as materialized (select clock_timestamp() as at),
		flush as materialized (select fanout.flush() from start)
		select extract(epoch from clock_timestamp() - at) * 1000 from start, flush);
	my @times = sort { $a <=> $b } split(/\n/, sql(join(';', ($timed) x 25)));

	return $times[12];
}

# Timings are noisy; what an open transaction must not do is to hold messages
# back until it ends.
sub as_fast_as
{
	my ($before) = @_;
	my $now = latency();

	cmp_ok($now, '<', 500 + 3 * $before,
		sprintf('a flush takes %.1f ms then (%.1f before)', $now, $before));
	return;
}

sub to_each_segment
{
	my ($name, @commands) = @_;

	$experiment->run(
		"$name of each segment",
		sub {
			foreach my $command (@commands)
			{
				foreach my $segment (map { "outbox_$_" } 0 .. 2)
				{
					sql($command =~ s/%s/$segment/gr);
					$experiment->wait_for_commits(10);
				}
			}
		});
	return;
}
