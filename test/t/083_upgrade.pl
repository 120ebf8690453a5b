# What is no copy goes on by itself: a server after pg_upgrade, which has another
# system identifier, and one whose data directory was moved.  What was a copy
# before stays one.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use File::Copy ();
use PgFanout;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $conf = 'max_worker_processes = 20';
my $old = PgFanout::cluster('old', $broker, conf => $conf);
my $new = PgFanout::cluster('new', $broker, conf => $conf, extension => 0);
my $bindir = PgFanout::run_command_ok('pg_config', '--bindir') =~ s/\s+$//r;
my $dir = PostgreSQL::Test::Utils::tempdir();

plan skip_all => 'there is no pg_upgrade' unless -x "$bindir/pg_upgrade";

$old->safe_psql('postgres', q(
	create table users (id int primary key);
	create table got (n int);
	create function handle(m fanout.message) returns void language sql as 'insert into public.got values (1)';
	select fanout.declare_bindings('{"users": ["g"], "in": ["c"]}');
	select fanout.capture('users', 'users');
	select fanout.subscribe('in', 'c', 'handle(fanout.message)');
	insert into users values (1)));
PgFanout::flush($old);
keys_in('users_g');
$old->safe_psql('postgres', 'select fanout.publish($$in$$, $$1$$)');
$old->poll_query_until('postgres', 'select exists (select from got)');
$old->safe_psql('template1', 'create database copy template postgres');
$old->command_ok([ 'pg_dump', '-f', "$dir/dump.sql", $old->connstr('postgres') ], 'pg_dump');
$old->safe_psql('postgres', 'create database restored');
$old->command_ok([ 'psql', '-Xq', '-f', "$dir/dump.sql", $old->connstr('restored') ], 'psql');

# The broker is away for messages that are sent after the upgrade.
$old->append_conf('postgresql.conf', "pg_fanout.uri = 'amqp://guest:guest\@127.0.0.1:1/'");
$old->reload;
PgFanout::wait_for_publisher($old, 'disconnected');
$old->safe_psql('postgres', 'insert into users values (2)');

# ---- pg_upgrade ----

my $identifier = $old->safe_psql('postgres', 'select system_identifier from pg_control_system()');
$old->stop;
$new->stop;
chdir $dir or die;
$new->command_ok(
	[
		'pg_upgrade', '--no-sync', '-d', $old->data_dir, '-D', $new->data_dir,
		'-b', $bindir, '-B', $bindir, '-s', $new->host, '-p', $old->port, '-P', $new->port
	],
	'pg_upgrade');
chdir '/';
$new->start;
isnt($new->safe_psql('postgres', 'select system_identifier from pg_control_system()'), $identifier,
	'pg_upgrade makes another system identifier');
goes_on($new, 'an upgraded server', 2);
foreach my $database ('copy', 'restored')
{
	PgFanout::wait_for_publisher($new, 'passive', dbname => $database);
	is($new->safe_psql($database, 'select last_error from fanout.stat_publisher'), 'it is a copy of database "postgres"',
		"database $database is still a copy after an upgrade");
}
$new->safe_psql('copy', 'select fanout.unsubscribe($$in$$, $$c$$)');
is($new->safe_psql('copy', 'select fanout.activate()'), 'it is a copy of database "postgres"; 0 messages will be published',
	'which can be activated then');
$new->safe_psql('copy', 'insert into users values (3)');
PgFanout::flush($new, dbname => 'copy');
is_deeply([ keys_in('users_g') ], [3], 'and publishes');

# ---- a data directory that is moved ----

$new->stop;
PgFanout::run_command_ok('cp', '-a', $new->data_dir, "$dir/moved");
File::Copy::move($new->data_dir, "$dir/away") or die;
File::Copy::move("$dir/moved", $new->data_dir) or die;
$new->start;
$new->safe_psql('postgres', 'insert into users values (4)');
goes_on($new, 'a server whose data directory was copied and moved', 4);
$new->stop('fast');
done_testing();

sub goes_on
{
	my ($node, $what, $key) = @_;
	my $got = $node->safe_psql('postgres', 'select count(*) from got');

	PgFanout::flush($node);
	is_deeply([ keys_in('users_g') ], [$key], "$what publishes");
	$node->safe_psql('postgres', 'select fanout.publish($$in$$, $$1$$)');
	ok($node->poll_query_until('postgres', "select count(*) = $got + 1 from got"), "$what consumes");
	return;
}

# Of what came since the last call.
sub keys_in
{
	my ($queue) = @_;

	return map { $_->{headers}->{key} } $broker->collect($queue, expect => 1, idle => 0.5);
}
