# A standby that takes over, a server that goes back in time, a disk that is
# full: under load from several clients.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Experiment;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker();
my $wal_segment = 1024 * 1024;

my $node = PgFanout::cluster(
	'primary', $broker,
	init => {
		allows_streaming => 1,
		has_archiving => 1,
		extra => ['--wal-segsize=1']
	});
my $experiment = PgFanout::Experiment->new(
	node => $node, broker => $broker, file => __FILE__);
my $standby = PgFanout::Node->new('standby');
my $restored = PgFanout::Node->new('restored');

$node->backup('backup');

# A standby is promoted.  What the primary published before it died is on the
# standby: it is visible only once the standby has it.

$standby->init_from_backup($node, 'backup', has_streaming => 1);
$standby->enable_archiving;    # for what comes later
$standby->start;
$node->append_conf('postgresql.conf', "synchronous_standby_names = '*'");
$node->reload;
$node->poll_query_until('postgres',
	q(select exists (select from pg_stat_replication where sync_state = 'sync')))
  or die 'the standby does not stream';
$experiment->run(
	'a synchronous standby takes over from a primary that crashed',
	sub {
		$node->stop('immediate');
		$experiment->end_program('load');
		$standby->append_conf('postgresql.conf', "synchronous_standby_names = ''");
		$standby->promote;
		$experiment->{node} = $node = $standby;
		$experiment->start_load;
	},
	repeats => 1);

# A full disk: no file of the server can grow much beyond the size that the
# current segment of the outbox has now.

sql('select fanout.declare_binding($$filler$$, $$g$$, $$classic$$)');
sql('select count(fanout.publish($$filler$$, to_jsonb(repeat($$x$$, 400)))) from generate_series(1, 8000)');
my $changes;
$experiment->run(
	'no room for the outbox on the disk',
	sub {
		my $offset = -s $node->logfile;
		my $segment = sql('select current from fanout.rotation');
		my $lock = $node->background_psql('postgres');
		my $size;

		# it must not grow until all processes have the limit
		$lock->query_safe("begin; lock table fanout.outbox_$segment in exclusive mode");
		$size = sql("select pg_relation_size('fanout.outbox_$segment')") + 32 * 8192;
		cmp_ok($size, '>', 2 * $wal_segment, 'the segment is larger than a file of WAL');
		limit_files($size);
		$lock->query_safe('commit');
		$lock->quit;
		$node->wait_for_log(qr/ERROR:  could not extend file .*: File too large/, $offset);
		PgFanout::poll(
			sub { sql("select pg_relation_size('fanout.outbox_$segment')") == $size
				&& unchanged_for(1) },
			'nothing to be committed any more');
		isnt($node->psql('postgres', insert_rows(1000)), 0, 'a statement that writes messages fails');
		is(sql('select count(*) from item_1 where id < 0'), 0, 'and does nothing');
		limit_files('unlimited');
	});
is(unmatched(), 0, 'every row is as its last change in the ledger says');

# Back to a moment in the middle of the load.  What was committed and published
# since then is taken back: it is in no ledger any more, and must be all that is.

$node->backup('later');
my %taken_back;
$experiment->run(
	'point-in-time recovery',
	sub {
		sql(q(select pg_create_restore_point('then')));
		$experiment->wait_for_commits(200);
		$experiment->stop_load;
		PgFanout::flush($node);
		restore();
		$experiment->start_load;
	},
	repeats => 1,
	after => sub { forget(%taken_back) });
cmp_ok(scalar(keys %taken_back), '>=', 200, 'the recovery took back changes that had been published');

done_testing();

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub insert_rows
{
	my ($count) = @_;

	return qq(with c as (insert into item_1 (id) select -i from generate_series(1, $count) i returning id, token)
	insert into ledger (topic, key, op, token) select 1, id, 'c', token from c);
}

# Of all processes of the server, those that will be started included.
sub limit_files
{
	my ($bytes) = @_;
	my $postmaster = slurp_file($node->data_dir . '/postmaster.pid') =~ s/\n.*//sr;
	my @pids = split(' ', PgFanout::run_command_ok('pgrep', '-P', $postmaster));

	foreach my $pid ($postmaster, @pids)
	{
		eval { PgFanout::run_command_ok('prlimit', '--pid', $pid, "--fsize=$bytes:") };
	}
	return;
}

sub unchanged_for
{
	my ($seconds) = @_;
	my $before = $experiment->committed;

	sleep $seconds;
	return $experiment->committed == $before;
}

# Rows that are not what the ledger says, either way.
sub unmatched
{
	return sql(
		q(
with last as (
	select distinct on (topic, key) topic, key::bigint, op, token from ledger order by topic, key, n desc),
item as (
	select 1 as topic, id, token from item_1 union all select 2, id, token from item_2)
select count(*) from item i full join last l on l.topic = i.topic and l.key = i.id
where l.key is null or (case when l.op = 'd' then i.id is not null else i.token is distinct from l.token end)));
}

# The server as it was at the restore point takes the place of the other.
sub restore
{
	my %changes = changes();

	sql('select pg_switch_wal()');
	$restored->init_from_backup($node, 'later', has_restoring => 1, standby => 0);
	$restored->append_conf('postgresql.conf', "recovery_target_name = 'then'\nrecovery_target_action = 'promote'");
	$node->stop('fast');
	$restored->start;
	$restored->poll_query_until('postgres', 'select not pg_is_in_recovery()');
	$experiment->{node} = $node = $restored;
	PgFanout::flush($node);
	%taken_back = %changes;
	delete @taken_back{ keys %{ { changes() } } };
	return;
}

# Operation and token of each in the ledger.
sub changes
{
	return map { $_ => 1 } split(/\n/, sql(q(select op || ' ' || token from ledger)));
}

# Strikes out from what was received.
sub forget
{
	my (%taken) = @_;
	my $received = $experiment->received;
	my @lines;

	$experiment->end_program('collector');
	@lines = grep {
		my @fields = split /[\t\n]/;
		!$taken{"$fields[5] $fields[7]"};
	} split(/^/, slurp_file($received));
	unlink $received;
	append_to_file($received, join('', @lines));
	$experiment->start_collector;
	return;
}
