# The library is gone: the package was removed, or the server's image is one
# without it.  What is not captured works as before, and there is a way out.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use File::Basename qw(dirname);
use File::Path qw(make_path);
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker,
	conf => "wal_level = logical\nmax_prepared_transactions = 2");
my $bindir = without_library();

sql(q(
	create table users (id int primary key, name text);
	create table plain (id int primary key);
	create table parted (id int, primary key (id)) partition by list (id);
	select fanout.declare_bindings('{"exchange_user": ["g"]}');
	select fanout.capture('users', 'exchange_user');
	insert into users values (1, 'sent')));
PgFanout::flush($node);
$node->stop('fast');
$node->append_conf('postgresql.conf', q(shared_preload_libraries = ''));
start_without_library();
like(failure('select fanout.library_version()'), qr/could not access file .*pg_fanout/, 'there is no library');

foreach my $role ('origin', 'replica')
{
	is( failure(qq(
		set session_replication_role = $role;
		insert into plain values (1), (2);
		update plain set id = id + 10;
		delete from plain;
		truncate plain;
		alter table plain add column a int, add constraint positive check (a > 0);
		alter table plain rename column a to b;
		alter table plain drop column b;
		alter table plain rename to plainer;
		alter table plainer rename to plain;
		create table another (id int primary key, c text);
		create index on another (c);
		create view seen as select * from another;
		create function f() returns trigger language plpgsql as \$\$ begin return new; end \$\$;
		create trigger t before insert on another for each row execute function f();
		create materialized view kept as select * from another;
		create type mood as enum ('a');
		alter type mood add value 'b';
		create table parted_1 partition of parted for values in (1);
		alter table parted detach partition parted_1;
		alter table parted attach partition parted_1 for values in (1);
		insert into parted values (1);
		create schema some_schema;
		alter schema some_schema rename to other_schema;
		alter table another set schema other_schema;
		drop schema other_schema cascade;
		drop function f cascade;
		drop type mood;
		drop table parted_1;
		create publication p for all tables;
		create subscription s connection 'host=/nowhere' publication p with (connect = false);
		alter subscription s set (slot_name = none);
		drop subscription s;
		drop publication p;
		begin; alter table plain add column a int; prepare transaction 'p';
		rollback prepared 'p';
		vacuum full plain;)),
		'', "tables that are not captured are written and altered, with session_replication_role $role");
}
like(failure(q(insert into users values (2, 'x'))), qr/could not access file .*pg_fanout/,
	'a captured table cannot be written');
is(sql('select count(*) from users'), 1, 'but it can be read');
is(failure('set session_replication_role = replica; update users set name = name'), '',
	'or written without capture');

$node->command_ok([ 'pg_dump', '-f', PostgreSQL::Test::Utils::tempdir() . '/dump', $node->connstr('postgres') ], 'pg_dump works');
is(failure('create table unsent as table fanout.outbox; drop table unsent'), '', 'and messages can be saved');

# The way back

$node->stop('fast');
$node->append_conf('postgresql.conf', q(shared_preload_libraries = 'pg_fanout'));
$node->start;
sql(q(insert into users values (2, 'again')));
PgFanout::flush($node);
is_deeply(
	[ map { $_->{headers}->{key} } $broker->collect('exchange_user_g', expect => 2, idle => 0.5) ],
	[ 1, 2 ], 'once the library is there again, all goes on');

# The way out

$node->stop('fast');
$node->append_conf('postgresql.conf', q(shared_preload_libraries = ''));
start_without_library();
like(failure('drop extension pg_fanout'), qr/other objects depend on it/, 'DROP EXTENSION is refused while tables are captured');
is(failure('drop extension pg_fanout cascade'), '', 'DROP EXTENSION CASCADE works without the library');
is( failure(q(
	insert into users values (3, 'x');
	update users set name = 'y';
	truncate users;
	alter table users add column a int, drop column name;
	alter table users rename to people;
	drop table people, plain, parted;
	create table users (id int))),
	'', 'then all tables can be written, altered and dropped');
is( sql(q(select (select count(*) from pg_event_trigger) + (select count(*) from pg_trigger where not tgisinternal)
				 + (select count(*) from pg_namespace where nspname = 'fanout'))),
	0, 'and nothing is left of it');
$node->stop('fast');

done_testing();

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

# What psql says on standard error until its first failure; nothing if all went well.
sub failure
{
	my ($errors, $output) = ('', '');

	$node->psql('postgres', 'set client_min_messages = error; ' . $_[0],
		stdout => \$output, stderr => \$errors);
	return $errors;
}

# A PostgreSQL that is the one under test, but for our library.  A server finds
# its libraries relative to its own binary: so that one is copied, and all the
# rest are links.
sub without_library
{
	my $copy = PostgreSQL::Test::Utils::tempdir() . '/pg';
	my %dir = map { $_ => pg_config($_) } qw(bindir pkglibdir sharedir);

	foreach my $dir (values %dir)
	{
		make_path(dirname("$copy$dir"));
		system_or_bail('cp', $dir eq $dir{bindir} ? '-rL' : '-rs', $dir, "$copy$dir");
	}
	unlink "$copy$dir{pkglibdir}/pg_fanout.so" or die "no library: $!";
	return "$copy$dir{bindir}";
}

sub pg_config
{
	my ($what) = @_;
	my ($output, $errors) = run_command([ 'pg_config', "--$what" ]);

	die "pg_config --$what: $errors" unless $output;
	return $output;
}

# Stopped as any other.
sub start_without_library
{
	system_or_bail("$bindir/pg_ctl", '-w', '-D', $node->data_dir, '-l', $node->logfile,
		'-o', '--cluster-name=main', 'start');
	$node->_update_pid(1);
	return;
}
