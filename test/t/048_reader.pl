# What the publisher reads, and what reading it costs: the messages of the
# transaction that creates the extension, and large messages one at a time.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
shared_buffers = 16MB
max_prepared_transactions = 5
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

# ---- the transaction that creates the extension ----

# Runs one transaction in a new database, after one that began later has ended
# in another database of the cluster.
sub first_transaction
{
	my ($database, $sql, $begin) = @_;

	$begin = 'begin' unless defined $begin;
	$node->safe_psql('postgres', "create database $database");
	$node->safe_psql($database, 'create table users (id int primary key, name text)');
	$node->safe_psql(
		$database, qq(
		$begin;
		select pg_current_xact_id();
		\\! psql -XAtq -d "@{[ $node->connstr('postgres') ]}" -c "create table of_$database ()"
		$sql));
	return;
}

sub arrive
{
	my ($database, $count) = @_;

	PgFanout::flush($node, dbname => $database);
	return join ',', sort map { $_->{body}->{after}->{id} } $broker->collect("${database}_g", expect => $count);
}

sub declare
{
	my ($database) = @_;

	return qq(
		create extension pg_fanout;
		select fanout.declare_binding('$database', 'g', 'classic');
		select fanout.capture('users', '$database');
	);
}

first_transaction('whole', declare('whole') . q(insert into users values (1), (2); commit));
is(arrive('whole', 2), '1,2', 'what the transaction that creates the extension writes is published');

first_transaction('parts', q(savepoint a;) . declare('parts') . q(
	insert into users values (1); savepoint b; insert into users values (2); rollback to b;
	savepoint c; insert into users values (3); release c; release a; insert into users values (4); commit));
is(arrive('parts', 3), '1,3,4', 'also in its subtransactions');

first_transaction('twice', declare('twice') . q(
	insert into users values (1);
	drop extension pg_fanout cascade;) . declare('twice') . q(
	insert into users values (2); commit));
is(arrive('twice', 1), '2', 'also if it drops the extension and creates it again');

first_transaction('prepared', declare('prepared') . q(insert into users values (1); prepare transaction 'first'));
sql('create table between_ ()');
$node->safe_psql('prepared', q(commit prepared 'first'));
is(arrive('prepared', 1), '1', 'also if it is prepared first');

first_transaction('repeatable', declare('repeatable') . q(insert into users values (1); commit),
	'begin isolation level repeatable read');
is(arrive('repeatable', 1), '1', 'also under REPEATABLE READ');

done_testing();
