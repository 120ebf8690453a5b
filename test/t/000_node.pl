# Statements that PgFanout::Node asks through libpq have the answers that psql has.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Cluster;
use Test::More;

my $node = PgFanout::cluster('main', undef, extension => 0);

sub is_same
{
	my ($dbname, $sql, %params) = @_;
	my @answer = $node->psql($dbname, $sql, %params);
	my @expected = $node->PostgreSQL::Test::Cluster::psql($dbname, $sql, %params);

	ok(PgFanout::Node::is_plain($dbname, $sql, %params), "without psql: $sql");
	is_deeply(\@answer, \@expected, "the same: $sql");
	return;
}

is_same('postgres', $_) foreach (
	'select',
	'  select 7 -- comment',
	q(select null, 'a', true, false, '{1,2}'::int[], '{a,NULL,t}'::text[], '{t}'::bool[], (1, null)),
	q(select convert_to('abc', 'utf8'), 'x  '::char(5), 'n'::name, 'c'::"char", 1::smallint, 3::oid),
	'select 1.50::numeric, 1.5::float8, 1e100::float8, 9223372036854775807',
	"values (1, 'a' || chr(10) || 'b'), (2, '\n')",
	'select 1 where false',
	q(select '{"a":1}'::jsonb ? 'a', ':x', ':y'::text),
	"select current_setting('application_name')",
	'create temporary table t (a int)',
	'drop table if exists nosuch',
	"drop\ntable\nnosuch",
	'select 1/0',
	'select $1',
	'begin',
	'vacuum pg_am;');
is_same('nosuch', 'select 1');
is_same('postgres', 'select current_user', extra_params => [ '-U', 'nobody' ]);
ok(!PgFanout::Node::is_plain('postgres', $_), "for psql: $_")
  foreach ('', 'select 1; select 2', '\echo', 'copy t from stdin', "select 'ü'");

# ---- polls ----

my $end = time + 3;
my $restarts = fork;
if (!$restarts)
{
	exec('pg_ctl', '-w', '-D', $node->data_dir, '-l', $node->logfile, '-m', 'immediate', 'restart');
}
ok($node->poll_query_until('postgres', "select extract(epoch from clock_timestamp()) > $end"), 'a poll survives a restart of the server');
waitpid($restarts, 0);
is($?, 0, 'which was restarted');
is(eval { $node->safe_psql('postgres', 'select 1/0') }, undef, 'what fails dies');
like($@, qr/error running SQL: .*division by zero/, 'with the reason');

# the class knows the process that it has started
$node->_update_pid(1);
$node->stop;
is_same('postgres', 'select 1');

done_testing();
