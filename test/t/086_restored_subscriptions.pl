# What a subscription names is known by oid as long as the database is the same,
# and by name in one that was restored from a dump: renames are followed, whatever
# is missing makes that subscription refused alone, and nothing is ever taken for
# what it is not.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
max_worker_processes = 40
pg_fanout.max_subscriptions = 20
pg_fanout.inbox_retention = 8s
));
my $dir = PostgreSQL::Test::Utils::tempdir();

sql('postgres', 'create database original');
sql('original', q(
	create extension pg_fanout;
	create role keeper login;
	create role extra login;
	grant all on schema public to keeper, extra;
	grant usage on schema fanout to keeper, extra;
	grant execute on function fanout.sync_table, fanout.sync_messages, fanout.subscribe to keeper, extra;
	create table source (id int primary key, name text, x int);
	select fanout.declare_binding(t, 'g'), fanout.capture('source', t) from unnest('{users,big,mine,got}'::text[]) t;
	select fanout.grant_topic(t, r) from unnest('{users,big,mine,got}'::text[]) t, unnest('{keeper,extra}'::regrole[]) r;
	set role keeper;
	-- attribute numbers are others once it is restored
	create table users (gone int, x int, name text, id int primary key);
	alter table users drop gone;
	create table big (id int primary key, name text, x int);
	create table seen (id int);
	create function handle(m fanout.message) returns void language sql as 'insert into public.seen select (m.body->''after''->>''id'')::int where m.body->''after''->>''id'' is not null';
	select fanout.sync_table('users', 'g', 'users', columns => '{"name": "name"}'), fanout.sync_table('big', 'g', 'big'), fanout.subscribe('got', 'g', 'handle(fanout.message)');
	set role extra;
	create table mine (id int primary key, name text, x int);
	select fanout.sync_table('mine', 'g', 'mine');
	reset role;
	insert into source values (1, 'a', 1)));
arrives('original', 1, qw(users big mine seen));

# In the same database

sql('original', q(
	create schema elsewhere; grant all on schema elsewhere to keeper;
	begin;
	alter table users rename to people; alter table people set schema elsewhere; alter table elsewhere.people rename name to called;
	create table users (id int primary key, name text, x int); alter table users owner to keeper;
	create table noted as select target, array_agg(local order by local) as columns from fanout.sync_target join fanout.sync_column using (subscription_id) where target like '%people' group by 1;
	commit;
	alter role keeper rename to warden;
	create role keeper login;
	insert into source values (2, 'b', 2)));
arrives('original', 2, qw(elsewhere.people big mine seen));
is(sql('original', 'select count(*) from users'), 0, 'a table that was renamed is written, not the one that has its name now');
is(sql('original', q(select string_agg(distinct role::text, ' ' order by role::text) from fanout.subscriptions)), 'extra warden', 'a role that was renamed is known by its new name');
is(sql('original', q(select target from fanout.subscriptions where topic = 'users')), 'elsewhere.people', 'so is a table');
PgFanout::poll(sub { sql('original', q(select string_agg(distinct role || handler_owner, ' ' order by role || handler_owner) from fanout.subscription)) eq 'extrapostgres wardenpostgres wardenwarden' }, 'names to be noted');
is(sql('original', 'select * from noted'), 'elsewhere.people|{called,id,x}', 'a dump has the names of table and columns as soon as they are renamed');

# Restored, a table and a role are missing

$node->command_ok([ 'pg_dump', '-f', "$dir/dump.sql", '--exclude-table=big', $node->connstr('original') ], 'a dump without one of the targets');
sql('original', q(select fanout.flush()));
sql('postgres', 'drop database original with (force)');
sql('postgres', 'alter role extra rename to another');
my ($result, $out, $error) = (0, '', '');
sql('postgres', 'create database copy');
$node->run_log([ 'psql', '-Xq', '-f', "$dir/dump.sql", $node->connstr('copy') ], '2>', \$error);
unlike($error, qr/sync_target|fanout\.subscription /, 'what names the missing ones is restored');
is(sql('copy', 'select count(*) from fanout.subscription where active') . ' ' . sql('copy', 'select count(*) from fanout.sync_target'), '4 3', 'all of it');
sql('copy', 'select fanout.activate()');
sql('copy', q(insert into source values (3, 'c', 3)));
PgFanout::flush($node, dbname => 'copy');
arrives('copy', 3, qw(elsewhere.people seen));
is(sql('copy', 'select id, called, x from elsewhere.people where id = 3'), '3|c|3', 'columns are those of the same names, whatever their numbers');
my $refused = qq(big|refused|table public.big does not exist\nmine|refused|role "extra", which subscribed, does not exist);
my $states = '';
# their workers need not have come as far as those of the others
eval {
	PgFanout::poll(sub { $states = sql('copy', q(select topic, state, last_error from fanout.stat_subscriptions where topic in ('big', 'mine') order by 1)); return $states eq $refused },
		'both to be refused');
};
is($states, $refused, 'what is missing makes that subscription refused, and no other');
is(sql('copy', q(select count(*) from fanout.dead_letter)), 0, 'nothing is given up');
is(sql('copy', q(select count(*) from fanout.check() where not ok and item = 'subscription of "g" to "mine"')), 1, 'check() tells');

# They come

sql('copy', q(create table big (id int primary key, name text, x int); alter table big owner to warden));
arrives('copy', 3, 'big');
sql('copy', q(create role extra login; grant usage on schema public, fanout to extra; grant execute on function fanout.sync_messages to extra; alter table mine owner to extra));
arrives('copy', 3, 'mine');
pass('it goes on by itself once they are there');
sql('copy', q(alter table big rename to large; create table big (like large including all); alter table big owner to warden; insert into source values (4, 'd', 4)));
arrives('copy', 4, 'large', 'mine');
is(sql('copy', 'select count(*) from big'), 0, 'from then on it is followed when it is renamed');

# From a template all is the same

sql('postgres', 'alter database copy connection limit 0');
sql('template1', q(select pg_terminate_backend(pid) from pg_stat_activity where datname = 'copy'));
sql('template1', 'create database twin template copy');
is(sql('twin', q(select string_agg(target::text, ' ' order by target::text) from fanout.subscriptions)), 'elsewhere.people large mine', 'a database made from a template knows them by oid');

# What was dropped just before a dump is not what has its name where the dump is restored

sql('postgres', 'create database before');
sql('before', q(
	create extension pg_fanout;
	create table kept (id int primary key, x int);
	create table dropped (id int primary key, x int);
	create table narrowed (a int, id int unique, x int, primary key (a, id));
	create table replaced (a int, id int, x int, primary key (a, id));
	select fanout.sync_table(t, 'g', t::regclass) from unnest('{kept,dropped,narrowed,replaced}'::text[]) t));
PgFanout::poll(sub { sql('before', q(select count(*) from fanout.stat_subscriptions where connected_to is not null)) == 4 }, 'the workers');
sql('before', q(
	begin;
	drop table dropped;
	create table dropped (id int primary key, x int);
	alter table narrowed drop column a;
	alter table replaced drop column a;
	alter table replaced add a int default 0, add primary key (a, id);
	commit));
$node->command_ok([ 'pg_dump', '-f', "$dir/before.sql", $node->connstr('before') ], 'a dump after some were dropped');
sql('postgres', 'create database after');
$node->command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-f', "$dir/before.sql", $node->connstr('after') ], 'it is restored');
is(sql('after', q(select topic, fanout.sync_problem(subscription_id) from fanout.subscription order by topic)), join("\n",
	'dropped|the table of this subscription does not exist any more', 'kept|',
	'narrowed|table public.narrowed lacks a column of the key', 'replaced|table public.replaced lacks a column of the key'),
	'neither tables nor columns of keys that have the names now are taken for those');

$node->stop('fast');
done_testing();

sub sql { return $node->safe_psql($_[0], $_[1]); }

# Waits until all these tables have the row.
sub arrives
{
	my ($database, $id, @tables) = @_;

	foreach my $table (@tables)
	{
		PgFanout::poll(sub { sql($database, "select count(*) from $table where id = $id") == 1 }, "row $id in $table of $database: "
			  . sql($database, 'select topic, state, last_error from fanout.stat_subscriptions'));
	}
	return;
}
