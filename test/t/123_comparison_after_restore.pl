# A copy knows a comparison by its number.  Those of a source that was restored in its
# place are others than those that it had, and what the copy has found before says
# nothing of them.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, extension => 0, conf => q(
log_statement = none
max_worker_processes = 20
));
my $dump = PostgreSQL::Test::Utils::tempdir() . '/dump.sql';

sql('postgres', "create database $_") foreach 'source', 'copy';
sql($_, 'create extension pg_fanout; create table t (id int primary key, x int)') foreach 'source', 'copy';
sql('source', q(select fanout.declare_binding('t', 'g'), fanout.capture('t', 't')));
sql('copy', q(select fanout.sync_table('t', 'g', 't')));
sql('source', 'insert into t select i, 1 from generate_series(1, 10) i');
$node->command_ok([ 'pg_dump', '-f', $dump, $node->connstr('source') ], 'a dump of the source');
PgFanout::poll(sub { sql('copy', 'select count(*) from t') == 10 }, 'the copy');
sql('copy', 'update t set x = 2 where id <= 3');
like(compared(0), qr/^different 3 0$/, 'a comparison finds what differs');
like(compared(1), qr/^different 3 3$/, 'and mends it');
sql('source', 'insert into t values (11, 1); update t set x = 5 where id = 5');
PgFanout::flush($node, dbname => 'source');
PgFanout::poll(sub { sql('copy', 'select count(*) from t where x = 5') == 1 }, 'the copy');

sql('postgres', 'drop database source with (force)');
sql('postgres', 'create database source');
$node->command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-f', $dump, $node->connstr('source') ], 'it is restored');
sql('source', 'select fanout.activate()');
like(compared(1), qr/^different 2 2$/, 'a comparison with repair finds what a restored source does not have any more');
like(compared(0), qr/^equal 0 0$/, 'and has mended it');
is(sql('copy', 'select count(*) from fanout.sync_comparisons'), '4', 'the comparisons before the restore stay what they were');
is(sql('copy', 'select sum(x) || \' \' || count(*) from t'), '10 10', 'the copy is as the restored source');

$node->stop('fast');
done_testing();

sub sql { return $node->safe_psql($_[0], $_[1]); }

sub compared
{
	my ($repair) = @_;
	my $run = sql('source', "select fanout.compare('t', 't', 'g', " . ($repair ? 'true' : 'false') . ')');
	my $result = '';

	PgFanout::poll(
		sub {
			$result = sql('copy', "select state || ' ' || missing + different + extra || ' ' || mended from fanout.sync_comparisons where run = $run and finished_at is not null");
			return $result ne '';
		},
		sub { "comparison $run: " . sql('copy', 'select * from fanout.sync_comparisons') });
	return $result;
}
