# A handler has the rights of the role that subscribed, and no others; what it
# leaves behind, and what others plant, changes nothing for the next message or
# for the worker; and nobody else sees or ends what is consumed.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $secret = 'Wh1sper3d';
my $broker = PgFanout::broker();
my $user = 'u' . $broker->vhost;
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
log_min_duration_statement = -1
log_min_error_statement = panic
max_worker_processes = 24
));

# a password that stands for itself wherever it turns up
my $uri = $broker->uri;
$broker->ctl('add_user', $user, $secret);
$broker->ctl('set_permissions', '-p', $broker->vhost, $user, '.*', '.*', '.*');
my $password_file = PostgreSQL::Test::Utils::tempdir() . '/password';
append_to_file($password_file, "$secret\n");
chmod 0600, $password_file;
$uri =~ s/guest:guest/$user/;
$node->append_conf('postgresql.conf', "pg_fanout.uri = '$uri'\npg_fanout.password_file = '$password_file'");
$node->reload;

$node->safe_psql(
	'postgres', q(
create role app login;
create role friend;
create role other login;
create role visitor login;
grant friend to app;
revoke create on schema public from public;
grant create, usage on schema public to app;
grant usage on schema fanout to app, other, friend;
grant execute on function fanout.subscribe, fanout.unsubscribe to app, other, friend;
select fanout.grant_topic(null, r) from unnest('{app,other,friend}'::regrole[]) r;
grant execute on function fanout.publish to app;
select fanout.grant_topic('t', 'app', '{publish}');
select fanout.declare_binding('t', 'g');
set role app;
create table log (n serial, name text, users text, result text);
grant all on log, log_n_seq to friend;
create function probe(m fanout.message) returns void language plpgsql as $$
declare
	result text;
begin
	execute m.body ->> 'sql' into result;
	insert into public.log (name, users, result) values (m.body ->> 'name', current_user || '/' || session_user, result);
end $$;
));

# ---- who may subscribe ----

foreach my $case (
	[ 'a role without LOGIN', 'friend', '', qr/42501: role friend cannot subscribe because it may not log in.*HINT:  Subscribe as a role with LOGIN/s ],
	[ 'a role without CONNECT', 'other', 'revoke connect on database postgres from public',
		qr/42501: role other cannot subscribe because it may not connect to database postgres.*HINT:  Grant it CONNECT/s ],
	[ 'a role without EXECUTE on the handler', 'other', 'revoke execute on function public.probe from public',
		qr/42501: permission denied for function \S*probe.*HINT:  Grant EXECUTE on it to other/s ],
	[ 'a role without EXECUTE on subscribe()', 'visitor', 'grant usage on schema fanout to visitor',
		qr/42501: permission denied for function subscribe/ ],
	[ 'a role without USAGE on the schema', 'visitor', '', qr/42501: permission denied for schema fanout/ ])
{
	my ($name, $role, $sql, $error) = @$case;
	my $stderr = '';

	$node->psql('postgres', "\\set VERBOSITY verbose
		begin; $sql; set role $role; select fanout.subscribe('t', 'g', 'probe(fanout.message)')", stderr => \$stderr);
	like($stderr, $error, "$name cannot subscribe: a clear error");
}

app(q(select fanout.subscribe('t', 'g', 'probe(fanout.message)', max_attempts => 1, ordered => false)));

# ---- the rights of the worker, or of pg_fanout's owner ----

my $us = sql('select current_user');
my $same = 'app/app';
attempts(
	[ 'the role', 'select 1', "$same 1" ],
	[ 'RESET ROLE', 'reset role; select current_user', "$same app" ],
	[ 'SET ROLE NONE', 'set role none; select current_user', "$same app" ],
	[ 'RESET SESSION AUTHORIZATION', 'reset session authorization; select current_user', "$same app" ],
	[ 'SET SESSION AUTHORIZATION DEFAULT', 'set session authorization default; select session_user', "$same app" ],
	[ 'SET SESSION AUTHORIZATION', qq(set session authorization "$us"), '42501' ],
	[ 'SET ROLE of the superuser', qq(set role "$us"), '42501' ],
	[ 'set_config(role)', qq(select set_config('role', '$us', false)), '42501' ],
	[ 'set_config(session_authorization)', qq(select set_config('session_authorization', '$us', false)), '42501' ],
	[ 'RESET ALL, DISCARD PLANS', 'reset all; discard plans; select current_user', "$same app" ],
	[ 'SECURITY DEFINER of its own', q(create function mine() returns text language sql security definer as 'select current_user::text';
		select mine()), "$same app" ],
	[ 'superuser setting', 'set session_replication_role = replica', '42501' ],
	[ 'settings of pg_fanout', q(set pg_fanout.uri = 'amqp://evil'), qr/42501|55P02/ ],
	[ 'password in a setting', 'show pg_fanout.uri', '42501' ],
	[ 'password in pg_settings', q(select count(*) from pg_settings where setting ~ 'Wh1sper'), "$same 0" ],
	[ 'password file', 'show pg_fanout.password_file', '42501' ],
	[ 'inbox', 'select count(*) from fanout.inbox', '42501' ],
	[ 'inbox emptied', 'truncate fanout.inbox', '42501' ],
	[ 'subscription of the superuser', qq(update fanout.subscription set role = '$us'), '42501' ],
	[ 'internal function', qq(select fanout.add_subscription('$us', 't', 'h', 'probe(fanout.message)', 1, 1, '1 s', '1 s', true, '1 s')), '42501' ],
	[ 'failures', 'delete from fanout.waiting', '42501' ],
	[ 'dead letters', 'select count(*) from fanout.dead_letter', '42501' ],
	[ 'trigger on the inbox', 'create trigger x after insert on fanout.inbox_0 for each row execute function fanout.subscriptions_changed()', '42501' ],
	[ 'foreign key to the inbox', 'create table x (m uuid, s int, g smallint, foreign key (s, m, g) references fanout.inbox_0)', '42501' ],
	[ 'function in schema fanout', q(create function fanout.f() returns int language sql as 'select 1'), '42501' ],
	[ 'event trigger', 'create event trigger x on ddl_command_start execute function fanout.subscriptions_changed()', '42501' ],
	[ 'superuser', 'alter role app superuser', '42501' ],
	[ 'file', q(select pg_read_file('PG_VERSION')), '42501' ],
	[ 'program', q(copy (select 1) to program 'true'), '42501' ],
	[ 'the role, at last', 'select 1', "$same 1" ]);

# ---- what is left for the next message ----

attempts([ 'SET ROLE of a role it has', 'set role friend; select current_user', 'friend/app friend' ]);
attempts([ 'after it', 'select current_user', "$same app" ]);
attempts([ 'SET', q(select set_config('search_path', 'nowhere', false), set_config('default_transaction_read_only', 'on', false),
	set_config('statement_timeout', '1', false), set_config('lock_timeout', '1', false), set_config('work_mem', '64kB', false),
	set_config('plan_cache_mode', 'force_custom_plan', false)), "$same nowhere" ]);
attempts([ 'after it', q(select current_setting('search_path') || current_setting('statement_timeout') || current_setting('transaction_read_only')),
	"$same \"\$user\", public0off" ]);

attempts(
	[ 'SET LOCAL', q(set local datestyle = 'German'; select current_setting('datestyle')), "$same German, DMY" ],
	[ 'after SET LOCAL', q(select current_setting('datestyle')), "$same ISO, MDY" ],
	[ 'SET TRANSACTION READ ONLY', 'set transaction read only', '25006' ],
	[ 'after SET TRANSACTION', q(select current_setting('transaction_read_only')), "$same off" ]);
app('create table deferred (i int unique deferrable)');
attempts(
	[ 'SET CONSTRAINTS', 'set constraints all deferred; insert into deferred values (1), (1)', '23505' ],
	[ 'in the same transaction', 'insert into deferred values (2)', "$same " ],
	[ 'after SET CONSTRAINTS', 'insert into deferred values (3), (3)', '23505' ]);
is(sql('select count(*), min(i) from public.deferred'), '1|2', 'SET CONSTRAINTS costs only those that it let through');

# a trigger that runs when the transaction is about to commit
app(q(create table late (sql text);
	create function run_late() returns trigger language plpgsql as 'begin execute new.sql; return null; end';
	create constraint trigger run_late after insert on late deferrable initially deferred for each row execute function run_late()));
attempts([ 'deferred trigger', q(insert into late values ($$insert into public.log (name, users) values ('trigger', current_user || '/' || session_user)$$)), "$same " ]);
is(sql(q(select users from public.log where name = 'trigger')), $same, 'a deferred trigger runs as the role that subscribed');
attempts([ 'RESET ROLE in a deferred trigger', q(insert into late values ('reset role'), ('reset session authorization'),
	($$insert into public.log (name, users) values ('trigger again', current_user || '/' || session_user)$$)), "$same " ]);
is(sql(q(select users from public.log where name = 'trigger again')), $same, 'also after RESET ROLE');
attempts([ 'SET ROLE in a deferred trigger', q(insert into late values ('set role friend'), ('set search_path = nowhere'),
	('set default_transaction_read_only = on'), ('set synchronous_commit = off')), "$same " ]);
attempts([ 'after it', q(select current_user || current_setting('search_path') || current_setting('transaction_read_only') || current_setting('synchronous_commit')),
	"$same app\"\$user\", publicoffon" ]);

app(q(select fanout.unsubscribe('t', 'g');
	select fanout.subscribe('t', 'g', 'probe(fanout.message)', max_attempts => 1, ordered => false, handler_timeout => '1 s')));
attempts([ 'deferred trigger that hangs', q(insert into late values ('select pg_sleep(600)')), '57014' ]);
# the other attempts are their messages' only ones, and must not be over because the machine is busy
app(q(select fanout.unsubscribe('t', 'g');
	select fanout.subscribe('t', 'g', 'probe(fanout.message)', max_attempts => 1, ordered => false)));
attempts([ 'cursor that outlives the transaction', 'declare c cursor with hold for select pg_sleep(600)', "$same " ]);
attempts([ 'another of its name', 'declare c cursor with hold for select 1', "$same " ]);
attempts([ 'advisory lock, and an error', 'select pg_advisory_lock(42), 1 / (select 0)', '22012' ]);
ok(is_free(42), 'an advisory lock of a session ends with the attempt that failed');
attempts([ 'advisory lock', 'select pg_advisory_lock(43)', "$same " ]);
ok(is_free(43), 'and with one that succeeded');
attempts([ 'temporary tables', q(create temp table inbox (x int); create temp table waiting (x int); create temp table subscription (x int);
	create temp table inbox_rotation (x int); create temp table pg_extension (x int); create temp table dead_letter (x int);
	create temp view bindings as select 1 as x), "$same " ]);
attempts([ 'prepared statement', 'prepare inbox as select 1', "$same " ]);
attempts([ 'after them', 'select 1', "$same 1" ], [ 'an error after them', 'select 1/0', '22012' ]);

# ---- traps ----

app(q(
create table trapped (users text);
create function public.trap_any() returns boolean language plpgsql as 'begin insert into public.trapped values (current_user); return false; end';
create function public.trap(uuid, uuid) returns boolean language sql as 'select public.trap_any()';
create function public.trap(int, int) returns boolean language sql as 'select public.trap_any()';
create function public.trap(bigint, bigint) returns boolean language sql as 'select public.trap_any()';
create function public.trap(text, text) returns boolean language sql as 'select public.trap_any()';
create function public.trap(oid, oid) returns boolean language sql as 'select public.trap_any()';
create function public.trap(name, name) returns boolean language sql as 'select public.trap_any()';
create function public.unnest(uuid[]) returns setof uuid language sql as 'select null::uuid from public.trap_any()';
create function public.to_regprocedure(text) returns regprocedure language sql as 'select null::regprocedure from public.trap_any()';
create function public.clock_timestamp() returns timestamptz language sql as 'select null::timestamptz from public.trap_any()';
create function public.format(text, text) returns text language sql as 'select null::text from public.trap_any()';
create function public.has_function_privilege(oid, oid, text) returns boolean language sql as 'select public.trap_any()';
create table public.inbox (id int);
create table public.pg_roles (id int);
));
app(join("\n", map { my $type = $_; map { "create operator public.$_ (leftarg = pg_catalog.$type, rightarg = pg_catalog.$type, procedure = public.trap);" } qw(= <> <) }
	qw(uuid int4 int8 text oid name)));
sql(q(alter database postgres set search_path = public, pg_catalog));
sql(q(alter role app set search_path = public, pg_catalog));
sql(q(select pg_terminate_backend(pid) from fanout.stat_subscriptions));
attempts([ 'traps', q(set search_path = pg_catalog; select 1), "$same 1" ], [ 'traps and an error', 'select 1/0', '22012' ]);
app(q(set search_path = public, pg_catalog; select fanout.unsubscribe('t', 'g');
	select fanout.subscribe('t', 'g', 'probe(fanout.message)', max_attempts => 1)));
attempts([ 'traps for subscribe()', q(set search_path = pg_catalog; select 1), "$same 1" ]);
is(sql('select count(*) from public.trapped'),
	'0', 'functions, operators and tables in the search path are not used by the worker, or by subscribe()');
sql('alter database postgres reset search_path; alter role app reset search_path; drop function public.trap_any cascade');

# ---- others ----

my $pid = sql('select pid from fanout.stat_subscriptions');
foreach my $case (
	[ 'end it', q(select fanout.unsubscribe('t', 'g')), qr/42501: permission denied for subscription of consumer group "g" to topic "t".*DETAIL:  Role app subscribed/s ],
	[ 'see bodies', 'select * from fanout.dead_letter', qr/42501/ ],
	[ 'see failures', 'select * from fanout.delivery_failure', qr/42501/ ],
	[ 'see the inbox', 'select * from fanout.inbox', qr/42501/ ],
	[ 'terminate its worker', "select pg_terminate_backend($pid)", qr/42501/ ],
	[ 'cancel its handler', "select pg_cancel_backend($pid)", qr/42501/ ],
	[ 'redrive', q(select fanout.redrive('t', consumer_group => 'g')), qr/42501/ ])
{
	my ($name, $sql, $error) = @$case;
	my $stderr = '';

	$node->psql('postgres', "\\set VERBOSITY verbose\n$sql", stderr => \$stderr, extra_params => [ '-U', 'other' ]);
	like($stderr, $error, "another role cannot $name");
}
is(sql(q(select count(*) from fanout.subscriptions)), '1', 'and the subscription is there');

# ---- the role loses what it needs ----

sql(q(create function public.plain(m fanout.message) returns void language sql as 'select 1';
	create role servant login; grant usage on schema fanout to servant; grant execute on function fanout.subscribe, fanout.unsubscribe to servant; select fanout.grant_topic('s', 'servant');
	select fanout.declare_binding('s', 'g')));
$node->safe_psql('postgres', q(select fanout.subscribe('s', 'g', 'plain(fanout.message)')), extra_params => [ '-U', 'servant' ]);
wait_until(q((select state from fanout.stat_subscriptions where topic = 's') = 'idle'));
my $done = 0;
foreach my $case (
	[ 'NOLOGIN', 'alter role servant nologin', 'alter role servant login', 'role servant may not log in any more' ],
	[ 'REVOKE CONNECT', 'revoke connect on database postgres from public', 'grant connect on database postgres to public',
		'role servant may not connect to this database any more' ],
	[ 'REVOKE EXECUTE', 'revoke execute on function public.plain from public', 'grant execute on function public.plain to public',
		'permission denied for function public.plain' ],
	[ 'REVOKE USAGE', 'revoke usage on schema public from public', 'grant usage on schema public to public', 'permission denied for schema public' ],
	[ 'RENAME', 'alter role servant rename to maid', 'alter role maid rename to servant', undef ])
{
	my ($name, $break, $mend, $error) = @$case;
	my $text = $error ? "'$error'" : 'null';

	sql($break);
	sql(q(select fanout.publish('s', '{}')));
	$done++;
	if ($error)
	{
		wait_until(qq(exists (select from fanout.stat_subscriptions where topic = 's' and state = 'refused' and last_error = '$error')));
		Time::HiRes::sleep(0.3);
		is(applied('s'), $done - 1, "$name: nothing is consumed, and state and last_error say why");
		is(sql(q(select detail from fanout.check() where item = 'subscription of "g" to "s"' and not ok)), "refused: $error", 'so does check()');
		sql($mend);
	}
	wait_until(q((select state from fanout.stat_subscriptions where topic = 's') <> 'refused'));
	wait_until("(select applied from fanout.stat_subscriptions where topic = 's') = $done");
	pass("$name: it goes on" . ($error ? ' once it is put right' : ''));
	sql($mend) unless $error;
}

# with no worker left, and nothing that tells that there may be one again
sql('alter role servant nologin');
sql(q(alter system set pg_fanout.inbox_retention = '8s'; select fanout.publish('s', '{}')));
$node->restart;
wait_until(q((select state = 'idle' from fanout.stat_subscriptions where topic = 't')));
is(sql(q(select state, pid is null, last_error from fanout.stat_subscriptions where topic = 's')),
	'refused|t|role servant may not log in any more', 'NOLOGIN, and a restart: there is no worker');
sql('alter role servant login');
wait_until(q((select applied = 1 from fanout.stat_subscriptions where topic = 's')));
pass('it is there again when the role may log in');

sql(q(drop owned by servant; drop role servant; select fanout.publish('s', '{}')));
wait_until(q((select last_error from fanout.stat_subscriptions where topic = 's') = 'role "servant", which subscribed, does not exist'));
is(sql(q(select state, applied from fanout.stat_subscriptions where topic = 's')), "refused|1", 'DROP ROLE: nothing is consumed');
$node->safe_psql('postgres', q(select fanout.unsubscribe('s', 'g')), extra_params => [ '-U', 'other' ]);
is(sql(q(select count(*) from fanout.stat_subscriptions where topic = 's')), '0', 'what nobody owns anybody with EXECUTE may end');

# ---- passwords ----

$broker->ctl('change_password', $user, 'another');
sql(q(select pg_terminate_backend(pid) from fanout.stat_subscriptions));
wait_until(q(exists (select from fanout.stat_subscriptions where last_error ~ 'authentication failed')));
my $seen = sql(q(
select s::text from fanout.stat_subscriptions s
union all select s::text from fanout.subscriptions s
union all select s::text from fanout.stat_publisher s
union all select s::text from pg_stat_activity s
union all select s::text from pg_settings s
union all select c::text from fanout.check() c
union all select d::text from fanout.delivery_failure d));
unlike($seen, qr/$secret/, 'the password is in no view');
like($seen, qr/authentication failed/, 'which show that the broker refused it');
ok(slurp_file($node->logfile) !~ /$secret/, 'nor in the log');
# any of them may end meanwhile
unlike(join(' ', map { eval { slurp_file($_) } || '' } glob('/proc/[0-9]*/cmdline')), qr/$secret/, 'nor in the title of a process');
$broker->ctl('change_password', $user, $secret);
$broker->ctl('delete_user', $user);

done_testing();

sub app { return $node->safe_psql('postgres', $_[0], extra_params => [ '-U', 'app' ]); }

# With no trap in the way.
sub sql
{
	local $ENV{PGOPTIONS} = '-c search_path=pg_catalog';

	return $node->safe_psql('postgres', $_[0]);
}

# Is an advisory lock free, or soon?  It is released once its transaction has ended.
sub is_free
{
	my ($lock) = @_;

	return eval { PgFanout::poll(sub { sql("select pg_try_advisory_lock($lock)") eq 't' }, "lock $lock", 30); 1 };
}

sub applied { return sql("select applied from fanout.stat_subscriptions where topic = '$_[0]'"); }

sub wait_until
{
	my ($condition) = @_;

	local $ENV{PGOPTIONS} = '-c search_path=pg_catalog';

	$node->poll_query_until('postgres', "select $condition")
	  or die "not so: $condition\n"
	  . sql('select * from fanout.stat_subscriptions; select * from fanout.delivery_failure; select * from public.log order by n desc limit 5;
		select payload, sqlstate, reason from fanout.dead_letter');
	return;
}

# Each is a message whose handler runs SQL: what it is called, the SQL, and as
# whom it has run with which result; or the error's SQLSTATE.
sub attempts
{
	my (@cases) = @_;
	my $n = @cases;

	sql('select fanout.purge(); truncate public.log');
	sql(join(';',
		map { qq(select fanout.publish('t', jsonb_build_object('name', \$n\$$_->[0]\$n\$, 'sql', \$n\$${\ with_result($_->[1])}\$n\$))) } @cases));
	wait_until(qq(((select count(*) from public.log where name !~ '^trigger') + (select count(*) from fanout.dead_letter)) >= $n));
	foreach my $case (@cases)
	{
		my ($name, undef, $expected) = @$case;
		my $got = sql(qq(select users || ' ' || coalesce(result, '') from public.log where name = \$n\$$name\$n\$
			union all select sqlstate from fanout.dead_letter where payload::jsonb ->> 'name' = \$n\$$name\$n\$));

		ref $expected ? like($got, $expected, "handler: $name") : is($got, $expected, "handler: $name");
	}
	return;
}

# EXECUTE ... INTO needs a result.
sub with_result
{
	my ($sql) = @_;

	return $sql =~ /(^|;)\s*(select|show)\b[^;]*$/ ? $sql : "$sql; select null";
}
