# A backlog costs the same per message from its first to its last, also with a
# snapshot open that is 100,000 transactions old: buffers touched by the
# statements that read it are counted by the server itself.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $messages = 100000;

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $node = PgFanout::cluster(
	'main', $proxy,
	conf => q(
shared_preload_libraries = 'pg_fanout, auto_explain'
auto_explain.log_min_duration = 0
auto_explain.log_analyze = on
auto_explain.log_buffers = on
auto_explain.log_timing = off
auto_explain.log_nested_statements = on
log_line_prefix = '%b: '
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

# Buffers touched by each read of the outbox since that place in the log.
sub reads
{
	my ($offset) = @_;
	my $log = slurp_file($node->logfile, $offset);
	my @reads;

	while ($log =~ /pg_fanout publisher: LOG:  duration: .*?plan:\n(.*?)(?=\n\S|\z)/gs)
	{
		my $plan = $1;

		next unless $plan =~ /Query Text: select id, xid, topic_id/;
		my ($hit) = $plan =~ /Buffers: shared hit=(\d+)/;
		my ($read) = $plan =~ /Buffers: shared (?:hit=\d+ )?read=(\d+)/;
		my ($rows) = $plan =~ /\(actual rows=(\d+)/;
		push @reads, { buffers => ($hit || 0) + ($read || 0), rows => $rows || 0 };
	}
	return @reads;
}

sql( q(select fanout.declare_binding('t', 'g', 'classic');
	   create table t (id int primary key, v int);
	   select fanout.capture('t', 't')));
PgFanout::flush($node);

# A snapshot that stays open, and 100,000 transactions after it, most of which
# write messages.
my ($in, $out, $err) = ('', '', '');
my $holder = IPC::Run::start(
	[ 'psql', '-XAtq', '-d', $node->connstr('postgres') ],
	'<', \$in, '>', \$out, '2>', \$err, IPC::Run::timeout(600));
$in .= "begin isolation level repeatable read; select 'open', count(*) from t;\n";
$holder->pump until $out =~ /open/;

$proxy->command('cut');
my $script = "$PostgreSQL::Test::Utils::tmp_check/insert.sql";
append_to_file($script, "\\set i random(1, 1000000000)\ninsert into t values (:i, 1) on conflict (id) do update set v = t.v + 1;\n");
sql('alter system set auto_explain.log_min_duration = -1');
sql('alter system set synchronous_commit = off');
$node->reload;
$node->command_ok(
	[ 'pgbench', '-n', '-f', $script, '-c', 4, '-j', 2, '-t', $messages / 4, '-M', 'prepared', 'postgres' ],
	"$messages transactions while the broker is away");
is(sql(q(select pending from fanout.stat_topics where topic = 't')), $messages, 'they are pending');

sql('alter system set auto_explain.log_min_duration = 0');
sql('alter system reset synchronous_commit');
$node->reload;
my $offset = -s $node->logfile;
$proxy->command('pass');
PgFanout::flush($node, timeout => '120 s');
is($broker->count('t_g'), $messages, 'and arrive');

# One transaction of as many rows, walked through the same cursor, and then
# single transactions again, each a batch of its own.
my @backlog = grep { $_->{rows} > 0 } reads($offset);
my $rows = 0;
my $buffers = 0;
foreach (@backlog) { $rows += $_->{rows}; $buffers += $_->{buffers}; }
cmp_ok($rows, '>=', $messages, 'the log shows the reading of all of them');
cmp_ok($buffers / $rows, '<', 3, sprintf('%.2f buffers per message for the backlog', $buffers / $rows));

# Batches that come one by one, as the snapshot grows older and the outbox
# fuller: the first tenth against the last.
$offset = -s $node->logfile;
for (1 .. 100)
{
	sql('insert into t select 2000000000 + ' . $_ * 10 . ' + i, 0 from generate_series(0, 9) i');
	PgFanout::flush($node);
}
my @batches = grep { $_->{rows} >= 10 } reads($offset);
cmp_ok(scalar(@batches), '>=', 90, 'a batch for each transaction');
my $tenth = int(@batches / 10);
my ($first, $last) = (0, 0);
$first += $_->{buffers} / $_->{rows} foreach @batches[ 0 .. $tenth - 1 ];
$last += $_->{buffers} / $_->{rows} foreach @batches[ -$tenth .. -1 ];
cmp_ok($last, '<=', $first * 1.2,
	sprintf('per message, the last tenth touches no more buffers than the first (%.2f, %.2f)',
		$last / $tenth, $first / $tenth));

$in .= "select count(*) from t; commit; \\q\n";
$holder->finish;
like($out, qr/^0$/m, 'the old snapshot was open all the time');
is(sql(q(select coalesce(sum(n_dead_tup), 0) from pg_stat_user_tables where relname ~ '^outbox_')),
	0, 'and no dead tuple is in the outbox');

done_testing();
