# fanout.declarations(): what it prints makes the same again elsewhere, and changes
# nothing where it is already.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PgFanout::cluster('main', undef, extension => 0);
my $file = PostgreSQL::Test::Utils::tempdir() . '/declarations.sql';

# what an application brings by itself
my $application = q(
	create schema "a schema";
	create table users (id int primary key, name text, secret text, plan text);
	create table "a schema"."it's" (a int, "B c" text, primary key (a, "B c"));
	create table parts (id int, day date, primary key (id, day)) partition by range (day);
	create table parts_1 partition of parts for values from ('2020-01-01') to ('2021-01-01');
	create table keyless (n int, m int);
	create table copy_of_users (id int primary key, full_name text);
	create type plan as enum ('free', 'paid');
	create function f() returns int language sql immutable as 'select 1';
	alter table copy_of_users owner to "a role";
	grant usage on schema public to "a role";);
my $handlers = q(
	create function handle(m fanout.message) returns void language sql as '';
	create function "handle's"(m fanout.message[]) returns void language sql as '';);

$node->safe_psql('postgres', q(create role "a role" login; create role reader; create role capturer));
sql('postgres', "create database $_") foreach 'original', 'empty', 'again';
sql($_, $application) foreach 'original', 'empty';

sql('original', "create extension pg_fanout; $handlers");
sql('original', q(
	select fanout.declare_topic('plain');
	select fanout.declare_topic('rows', format => 'row', on_exhausted => 'dead_letter');
	select fanout.declare_topic('it''s "odd" \\ é');
	select fanout.declare_topic('dropped');
	select fanout.declare_bindings('{"plain": ["a", "b"]}');
	select fanout.declare_binding('rows', 'it''s', queue_type => 'classic', arguments => '{"x-max-length": 7, "x-overflow": "reject-publish", "x-none": null}');
	select fanout.declare_binding('rows', 'rejects', arguments => '{"x-delivery-limit": 3}', dead_letter => true);
	select fanout.declare_binding('it''s "odd" \\ é', 'g');
	select fanout.drop_topic('dropped');
	select fanout.pause('rows');
	select fanout.capture('users', 'plain');
	select fanout.capture('users', 'rows', operations => '{insert,update}', exclude => '{secret}', old_row => true,
		"where" => 'plan = ''paid'' and f() = 1', "when" => 'new.name is distinct from ''it''''s''');
	select fanout.capture('"a schema"."it''s"', 'it''s "odd" \\ é', columns => '{a,"B c"}', key => '{"B c"}');
	select fanout.capture('parts', 'plain', key => '{id}', operations => '{truncate,insert}');
	select fanout.capture('keyless', 'plain', key => '{m,n}');
	select fanout.capture('keyless', 'rows', "when" => 'old is null');
	alter table users rename secret to "a secret";
	alter table keyless disable trigger pg_fanout_row_plain;
	alter table parts enable always trigger pg_fanout_row_plain;
	select fanout.subscribe('in', 'c', 'handle(fanout.message)');
	grant usage on schema fanout to "a role", reader, capturer with grant option;
	grant execute on function fanout.subscribe(text, text, regprocedure, integer, integer, interval, interval, boolean, interval, text, text[], interval, text),
		fanout.sync_table(text, text, regclass, text[], jsonb, text, text, integer, integer, interval, interval, interval, text), fanout.sync_messages(fanout.message[]) to "a role";
	select fanout.grant_topic('in', '"a role"'), fanout.grant_topic('users', '"a role"', consumer_group => 'copy');
	grant execute on function fanout.capture(regclass, text, text[], text[], text[], text[], text, text, boolean, boolean) to capturer with grant option;
	grant select on fanout.topics to reader;
	grant select (topic, pending) on fanout.stat_topics to reader, public;
	revoke select on fanout.captures from pg_monitor;
	set role "a role";
	select fanout.subscribe('in', 'it''s', '"handle''s"(fanout.message[])', prefetch => 7, max_attempts => 3, retry_delay => '1.5 s',
		max_retry_delay => '1 day', ordered => false, handler_timeout => '2 min');
	select fanout.sync_table('users', 'copy', 'copy_of_users', columns => '{"name": "full_name"}', max_attempts => 5);
	reset role;
	select fanout.subscribe('in', 'ended', 'handle(fanout.message)');
	select fanout.unsubscribe('in', 'ended')));

# the same table as it is now
sql('empty', q(alter table users rename secret to "a secret"));
append_to_file($file, sql('original', q(set datestyle = 'sql, dmy'; set intervalstyle = 'iso_8601'; select fanout.declarations())) . "\n");
note(slurp_file($file));
unlike(slurp_file($file), qr/dropped|ended/, 'what is dropped or ended is not printed');

# ---- into a database without the extension ----

$node->command_fails([ run_with('empty', 'a') ], 'without the functions that it names, it fails');
sql('empty', $handlers);
$node->command_ok([ run_with('empty', 'a') ], 'it can go on where it failed');
same_as_original('empty', 'run in a database that had nothing');

# ---- where everything is there already ----

my $before = state_of('original');
$node->command_ok([ run_with('original', '1') ], 'it runs where everything is declared');
is(state_of('original'), $before, 'and changes nothing');
is(sql('empty', 'select fanout.declarations()') . "\n", slurp_file($file), 'the other database prints the same');

# ---- nothing declared ----

sql('again', 'create extension pg_fanout');
is(sql('again', 'select fanout.declarations()'), 'create extension if not exists pg_fanout;', 'where nothing is declared, there is nothing but the extension');
$node->stop('fast');
done_testing();

sub sql { return $node->safe_psql($_[0], $_[1]); }

# psql; 1: stops at the first error, and is one transaction
sub run_with
{
	my ($database, $stop) = @_;

	return ('psql', '-Xq', '-v', 'ON_ERROR_STOP=1', ($stop eq '1' ? '-1' : ()), '-f', $file, $node->connstr($database));
}

sub state_of
{
	my ($database) = @_;
	my %views = (
		topics => "'declared_at', 'state', 'last_error'",
		bindings => "'declared_at', 'state', 'last_error', 'dead_letters'",
		captures => "'none'",
		subscriptions => "'subscribed_at'",
		sync_target => "'subscription_id'");
	my @states = map { "$_\n" . sql($database, "select to_jsonb(v) - array[$views{$_}] from fanout.$_ v where not to_jsonb(v) @> '{\"state\": \"dropping\"}' order by 1") } sort keys %views;

	# rights, of all objects, with the names of roles
	push @states, sql($database, q(
		select object, a.grantee::regrole, a.privilege_type, a.is_grantable
		from fanout.rights() r, aclexplode(r.now) a order by 1, 2, 3, 4));
	push @states, sql($database, q(select l.name, tgenabled from fanout.capture_trigger_list l join pg_trigger t on t.oid = l.trigger order by 1, 2));
	return join("\n", @states);
}

sub same_as_original
{
	my ($database, $what) = @_;

	is(state_of($database), state_of('original'), "$what, it makes the same topics, bindings, captures, subscriptions and rights");
	return;
}
