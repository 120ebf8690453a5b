# Changes that logical replication applies run no statement of the executor;
# what their triggers capture must be in the outbox when they commit, all the
# same: in small transactions, in large ones, and in streamed ones, which are
# applied with subtransactions.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PgFanout::cluster(
	'main', undef,
	init => { allows_streaming => 'logical' },
	conf => 'logical_decoding_work_mem = 64kB');

sub messages
{
	my ($where) = @_;

	return $node->safe_psql('copy',
		"select count(*), count(distinct key) from fanout.outbox where $where");
}

my $table = 'create table t (id int primary key, v text)';
my ($host, $port) = ($node->host, $node->port);

$node->safe_psql('postgres', "$table; create publication p for table t");
$node->safe_psql('postgres',
	q(select pg_create_logical_replication_slot('s', 'pgoutput')));
$node->safe_psql('postgres', 'create database copy');
$node->safe_psql('copy', "create extension pg_fanout; $table");
$node->safe_psql(
	'copy', qq(
	select fanout.declare_topic('t');
	select fanout.capture('t', 't');
	alter table t enable always trigger pg_fanout_row_t;
	create subscription s connection 'port=$port host=$host dbname=postgres' publication p
		with (create_slot = false, slot_name = 's', copy_data = false, streaming = on)));

$node->safe_psql('postgres', q(insert into t values (1, 'one')));
$node->wait_for_catchup('s');
is(messages('true'), '1|1', 'one applied row is captured');

$node->safe_psql('postgres',
	'insert into t select g from generate_series(2, 300) g');
$node->wait_for_catchup('s');
is(messages('true'), '300|300', 'so are all of a transaction');

$node->safe_psql(
	'postgres', q(
	begin;
	insert into t select g, repeat('x', 100) from generate_series(1001, 4000) g;
	savepoint a;
	insert into t select g, repeat('x', 100) from generate_series(4001, 7000) g;
	rollback to a;
	savepoint b;
	insert into t select g, repeat('x', 100) from generate_series(7001, 9000) g;
	release b;
	insert into t values (9001);
	commit));
$node->wait_for_catchup('s');
is(messages('key::int > 1000'), '5001|5001',
	'and those of a streamed one, but for what was rolled back');

# A trigger that somebody has put on the outbox is fired for these, too, though
# the queue is inserted when the server has fired all deferred triggers.
$node->safe_psql(
	'copy', q(
	create table seen (key text);
	create function see() returns trigger language plpgsql as
		'begin insert into public.seen values (new.key); return null; end';
	create constraint trigger see after insert on fanout.outbox_0
		deferrable initially deferred for each row execute function see();
	alter table fanout.outbox_0 enable always trigger see));
$node->safe_psql('postgres', 'insert into t select g from generate_series(10001, 10010) g');
$node->wait_for_catchup('s');
is(messages('key::int > 10000'), '10|10', 'all are captured with a trigger on the outbox');
is($node->safe_psql('copy', 'select count(distinct key) from seen'), 10, 'which is fired for each');

$node->stop;
done_testing();
