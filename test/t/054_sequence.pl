# Tests that ids of messages never go back: not by a dump that is restored, a
# recovery to a point in time, a promotion, or by creating the extension anew.
#
# No broker is needed: what is judged are the ids in the outbox.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";
use PgFanout;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $node = PgFanout::Node->new('main');
$node->init(has_archiving => 1, allows_streaming => 1);
$node->append_conf('postgresql.conf', <<'END');
shared_preload_libraries = 'pg_fanout'
pg_fanout.uri = 'amqp://guest:guest@127.0.0.1:1/'
max_connections = 60
END
$node->start;

# Draws an id in a session of its own, as a role without rights on pg_fanout.
sub draw
{
	my ($where, $database) = @_;

	return $where->safe_psql($database || 'postgres', <<'END');
set client_min_messages = warning;
set role writer;
insert into entity (a) values (1);
reset role;
select id from fanout.outbox order by created_at desc limit 1;
END
}

my $setup = <<'END';
create extension pg_fanout;
select fanout.declare_topic('t');
create table entity (id serial primary key, a int);
grant all on entity, entity_id_seq to writer;
select fanout.capture('entity', 't');
END
$node->safe_psql('postgres', "create role writer; $setup");

my $before = time;
my $id = draw($node);
cmp_ok($id, '>', ($before - 60) * 1e6, 'ids begin at the microseconds since 1970');
cmp_ok($id, '<', (time + 1) * 1e6, 'and lie below the clock');
cmp_ok($id * 1.0, '<', 2**53, 'so that double precision has them exactly');
is(draw($node), $id + 1, 'they count up one by one, in any session');

# What was drawn long ago, in effect: the sequence is behind the clock

$node->poll_query_until('postgres', q(select state = 'disconnected' from fanout.stat_publisher)) or die 'no publisher';
draw($node);
$node->safe_psql('postgres', q(select setval('fanout.outbox_id_seq', 1000)));
is(draw($node), 1001, 'a running server does not look at the clock again');
$node->restart;
$before = time;
$id = draw($node);
cmp_ok($id, '>=', int($before * 1e6), 'after a restart ids go on at the clock');
$node->stop('immediate');
$node->start;
cmp_ok(draw($node), '>', $id, 'and after a crash');

# Many sessions that begin at the same time, of which one moves the sequence

$node->safe_psql('postgres', q(select setval('fanout.outbox_id_seq', 1000); truncate fanout.outbox));
$node->restart;
$node->pgbench('--no-vacuum --client=30 --jobs=2 --transactions=20 --connect', 0, [qr/processed: 600/],
	[qr/^$/], 'sessions that begin with a write', { '054_update' => 'update entity set a = a + 1 where id = 1' });
is($node->safe_psql('postgres', q(select count(*), count(distinct id) from fanout.outbox)), '600|600',
	'each draws ids of its own');
is($node->safe_psql('postgres', q(select count(*) from (
	select (payload::json -> 'after' ->> 'a')::int - lag((payload::json -> 'after' ->> 'a')::int) over (order by id) as step
	from fanout.outbox) s where step <> 1)), 0, 'which order the changes of a row as they were made');

# Whatever its options are, and the rights of its owner

$node->safe_psql('postgres', <<'END');
create role owner;
select setval('fanout.outbox_id_seq', 1000);
alter sequence fanout.outbox_id_seq maxvalue 2000;
alter sequence fanout.outbox_id_seq owner to owner;
revoke all on sequence fanout.outbox_id_seq from owner;
END
$node->restart;
$before = time;
cmp_ok(draw($node), '>=', int($before * 1e6), 'ids follow the clock whatever options the sequence has');

# DROP EXTENSION, pg_dump

$id = draw($node);
$node->safe_psql('postgres', "drop extension pg_fanout cascade; drop table entity; $setup");
my $anew = draw($node);
cmp_ok($anew, '>', $id, 'ids go on after the extension was dropped and created again');
$node->command_ok(['pg_dump', '-f', "$PostgreSQL::Test::Utils::tmp_check/dump.sql", $node->connstr('postgres')], 'dump');
$id = draw($node);
$node->safe_psql('postgres', 'create database restored');
$node->command_ok(['psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('restored'), '-f',
		"$PostgreSQL::Test::Utils::tmp_check/dump.sql"], 'restore');
cmp_ok(draw($node, 'restored'), '>', $id, 'ids go on in a database that was restored from a dump');
$node->safe_psql('postgres', 'drop database restored');
$node->safe_psql('template1', 'create database templated template postgres');
cmp_ok(draw($node, 'templated'), '>', $id, 'and in one that was made from a template');

# A recovery to a point in time: what was drawn after it is lost

$node->backup('backup');
$id = draw($node);
$node->safe_psql('postgres', q(select pg_create_restore_point('here')));
my $standby = PgFanout::Node->new('standby');
$standby->init_from_backup($node, 'backup', has_streaming => 1);
$standby->start;
$node->wait_for_catchup($standby);
$standby->safe_psql('postgres', q(alter system set primary_conninfo = ''));
$standby->reload;
$standby->poll_query_until('postgres', 'select count(*) = 0 from pg_stat_wal_receiver') or die 'the standby receives';
draw($node) for 1 .. 40;	# the server logs 32 numbers ahead
$id = draw($node);
my $wal = $node->safe_psql('postgres', 'select pg_walfile_name(pg_switch_wal())');
$node->poll_query_until('postgres', "select last_archived_wal >= '$wal' from pg_stat_archiver") or die 'not archived';
$node->stop('immediate');
my $recovered = PgFanout::Node->new('recovered');
$recovered->init_from_backup($node, 'backup', has_restoring => 1);
$recovered->append_conf('postgresql.conf', "recovery_target_name = 'here'\nrecovery_target_action = promote");
$recovered->start;
$recovered->poll_query_until('postgres', 'select not pg_is_in_recovery()') or die 'no recovery';
cmp_ok(draw($recovered), '>', $id, 'ids go on after a recovery to a point in time');
$recovered->stop;

# A standby that has not got all of them, with a session that was there before

my $session = $standby->background_psql('postgres', on_error_stop => 0);
$session->query_until(qr/waits/, "select count(*) from fanout.outbox;\n\\echo waits\n");
$standby->promote;
$standby->poll_query_until('postgres', 'select not pg_is_in_recovery()') or die 'no promotion';
$session->query_until(qr/done/, "insert into entity (a) values (1);\n\\echo done\n");
$session->quit;
cmp_ok($standby->safe_psql('postgres', 'select max(id) from fanout.outbox'), '>', $id,
	'ids go on after a standby was promoted');
$standby->stop;

done_testing();
