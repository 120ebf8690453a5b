# The planner takes the extension's own tables for large ones, and nobody else's: not
# those of the same names where the extension is not, nor in other schemas.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PgFanout::cluster('main', undef, extension => 0, conf => "autovacuum = off\nmax_parallel_workers_per_gather = 0");
my $session;

# The rows that the planner expects of a table, and of those with a value that one in three has.
sub rows_of
{
	my ($table) = @_;
	my @rows;

	foreach my $query ("select from $table", "select from $table where b = 1")
	{
		my ($rows) = $session->query_safe("explain $query") =~ /rows=(\d+)/;
		push @rows, $rows;
	}
	return join(' ', @rows);
}

sub make_own
{
	my ($table) = @_;

	$session->query_safe("create table $table (a int primary key, b int); insert into $table select i, i % 3 from generate_series(1, 30) i; analyze $table");
	return;
}

sub is_as_analyzed
{
	my ($table, $name) = @_;

	is(rows_of($table), '30 10', $name);
	return;
}

# Of a table of the extension, which is empty or nearly.
sub is_large
{
	my ($name) = @_;
	my ($rows) = $session->query_safe('explain select from fanout.held') =~ /rows=(\d+)/;
	my ($found) = $session->query_safe('explain select from fanout.held where topic_id = 1 order by id limit 1') =~ /(Index .*Scan using held_topic_id_idx)/;

	cmp_ok($rows, '>=', 100_000, $name);
	ok($found, "$name: it is read by its index");
	return;
}

$node->safe_psql('postgres', 'create database alone');
$session = $node->background_psql('alone');
$session->query_safe('set client_min_messages = error; create schema fanout; create schema other');
make_own("fanout.$_") foreach 'waiting', 'held', 'dead_letter', 'inbox_0';
make_own('other.held');
is_as_analyzed("fanout.$_", "where the extension is not, a table fanout.$_ is anybody's") foreach 'waiting', 'held', 'dead_letter', 'inbox_0';
$session->query_safe('drop schema fanout cascade; create extension pg_fanout');
is_large('once the extension is created, in the same session');
is_as_analyzed('other.held', 'a table of another schema is not');
$session->query_safe('create temp table held (a int primary key, b int); insert into held select i, i % 3 from generate_series(1, 30) i; analyze held');
is_as_analyzed('held', 'nor a temporary one');
$session->query_safe('set plan_cache_mode = force_generic_plan; prepare p as select from fanout.held where topic_id = $1');
like($session->query_safe('explain execute p (1)'), qr/held_topic_id_idx/, 'nor is another plan made of a prepared statement');
$session->query_safe('drop extension pg_fanout; create schema fanout');
make_own("fanout.held");
is_as_analyzed('fanout.held', 'once it is dropped, all is as before');
$session->query_safe('alter table fanout.held rename b to topic_id');
unlike($session->query_safe('explain execute p (1)'), qr/held_topic_id_idx/, 'a statement that was prepared is planned anew');
$session->query_safe('drop schema fanout cascade; create extension pg_fanout');
is_large('created again');
like($session->query_safe('explain execute p (1)'), qr/held_topic_id_idx/, 'and the prepared statement knows');
$session->query_safe(q(begin; insert into fanout.held (id, xid, topic_id, message_id, payload, created_at)
	select i, pg_current_xact_id(), 1, gen_random_uuid(), '{}', now() from generate_series(1, 5) i; commit; analyze fanout.held));
is_large('analyzed when it was nearly empty');
$session->query_safe('begin; drop extension pg_fanout');
$session->query_safe('rollback');
is_large('a DROP EXTENSION that is rolled back changes nothing');

$session->quit;
$node->stop;
done_testing();
