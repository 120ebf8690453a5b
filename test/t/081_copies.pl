# A copy of a database is passive: it captures, and neither publishes nor consumes
# until it is activated.  Then what was written in it is published, and what its
# original has, too, is not.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $node = PgFanout::cluster('main', $proxy, conf => 'max_worker_processes = 20');
my $dir = PostgreSQL::Test::Utils::tempdir();
my $passive = 'pg_fanout neither publishes nor consumes in database';

# a database that publishes, consumes, and has a message that is held
sql('postgres', q(
	create table users (id int primary key, name text);
	create table got (n int);
	create function handle(m fanout.message) returns void language sql
	as 'insert into public.got values ((m.body->>''n'')::int)';
	select fanout.declare_binding('users', 'g');
	select fanout.declare_topic('rows', format => 'row', on_exhausted => 'dead_letter');
	select fanout.declare_bindings('{"rows": ["g"], "paused": ["g"], "in": ["c"]}');
	select fanout.capture('users', 'users');
	select fanout.capture('users', 'rows', operations => '{insert}');
	select fanout.subscribe('in', 'c', 'handle(fanout.message)');
	insert into users values (1, 'sent');
	select fanout.pause('paused')));
PgFanout::wait_for_state($node, 'sent');
sql('postgres', q(select fanout.publish('paused', '1', 'held')));
PgFanout::wait_for_state($node, 'held', where => "topic = 'paused'");
keys_in('users_g', 1);
keys_in('rows_g', 1);

made_from_a_template();
original_is_gone();
waiting_room();
template_with_nothing_declared();
restored_from_a_dump();
restored_with_the_schema_alone();
one_table_restored_beside_others();

$node->stop('fast');
done_testing();

sub made_from_a_template
{
	my $offset = -s $node->logfile;

	# with messages that are not sent
	$proxy->command('cut');
	sql('postgres', q(insert into users values (2, 'unsent')));
	sql('template1', 'create database copy template postgres');
	sql('copy', q(insert into users values (3, 'of the copy')));
	$proxy->command('pass');
	PgFanout::wait_for_publisher($node, 'passive', dbname => 'copy');
	$node->wait_for_log(qr/WARNING:  $passive "copy"\n.*DETAIL:  it is a copy of database "postgres"\.\n.*HINT:  Use fanout.activate/, $offset);
	PgFanout::wait_for_state($node, 'sent', where => "topic <> 'paused'");
	is_deeply([ keys_in('users_g', 1) ], [2], 'template: what was not sent is published once, by the original');

	consumes_nothing('copy', 'template');
	is(sql('copy', q(select state, last_error from fanout.stat_subscriptions)), 'passive|it is a copy of database "postgres"',
		'template: stat_subscriptions says so');
	is(sql('copy', q(select string_agg(key || ' ' || state, ' ' order by key) from fanout.outbox_status where topic = 'users' and key <> '1')),
		'2 pending 3 pending', 'template: the copy captures');
	is(() = slurp_file($node->logfile, $offset) =~ /$passive "copy"/g, 1, 'template: the log says so once');

	my ($stdout, $stderr);
	$node->psql('copy', 'select fanout.activate()', stdout => \$stdout, stderr => \$stderr);
	like($stdout, qr/^it is a copy of database "postgres"; 2 messages will be published/, 'template: activate() says how many messages there are');
	like($stderr, qr/3 messages that came with the copy are forgotten/, 'template: and which there are no more');
	PgFanout::flush($node, dbname => 'copy');
	is_deeply([ keys_in('users_g', 1) ], [3], 'template: what was written in the copy is published once it is activated');
	is_deeply([ keys_in('rows_g', 2) ], [ 2, 3 ], 'template: to each topic');
	is_deeply([ keys_in('paused_g', 0) ], [], 'template: what the original holds is not');
	PgFanout::poll(sub { sql('copy', 'select count(*) from fanout.stat_subscriptions where connected_to is not null') == 1 },
		'a consumer in the copy');
	pass('template: its subscriptions begin');
	is(sql('copy', 'select fanout.activate()'), 'it was active already; 0 messages will be published', 'template: activate() is idempotent');
	is(sql('copy', q(select ok from fanout.check() where item = 'database active')), 't', 'template: check() is content');
	sql('postgres', 'drop database copy');
	return;
}

# Then nobody else would publish what it had not sent.
sub original_is_gone
{
	sql('postgres', 'create database first');
	sql('first', q(create extension pg_fanout; select fanout.declare_binding('first', 'g'); select fanout.pause('first')));
	PgFanout::flush($node, dbname => 'first');
	sql('first', q(select fanout.publish('first', '1', 'held')));
	PgFanout::wait_for_state($node, 'held', dbname => 'first');
	$proxy->command('cut');
	sql('first', q(select fanout.publish('first', '1', 'unsent')));
	sql('postgres', 'create database second template first');
	sql('postgres', 'drop database first');
	sql('second', q(select fanout.publish('first', '1', 'of the copy')));
	$proxy->command('pass');
	PgFanout::wait_for_publisher($node, 'passive', dbname => 'second');
	sql('second', q(select fanout.activate(publish_copied => true); select fanout.resume('first')));
	PgFanout::flush($node, dbname => 'second');
	is_deeply([ keys_in('first_g', 3) ], [ 'held', 'unsent', 'of the copy' ], 'with publish_copied, a copy publishes what its original had not sent');
	sql('postgres', 'drop database second');
	return;
}

# What waits was acked by the original, which applies it.  The copies are made once that is
# so: what the original's workers have not noted and acked when they are ended, the queue
# has again, and gives to the copy, which consumes for the same group, or the original.
sub waiting_room
{
	sql('postgres', 'create database first');
	sql('first', q(create extension pg_fanout; create table ready (x int); create table got (n int);
		create function handle(m fanout.message) returns void language plpgsql
		as $$ begin if not exists (select from public.ready) then raise 'not ready'; end if; insert into public.got values ((m.body->>'n')::int); end $$;
		select fanout.declare_binding('waits', 'g', 'classic'); select fanout.subscribe('waits', 'g', 'handle(fanout.message)', max_attempts => 1000, retry_delay => '100 ms', max_retry_delay => '200 ms');
		select fanout.publish('waits', '{"n": 1}', 'key'); select fanout.publish('waits', '{"n": 2}', 'key')));
	PgFanout::poll(sub { sql('first', q(select count(*) from fanout.waiting)) == 2 }, 'messages that wait');
	PgFanout::flush($node, dbname => 'first');
	PgFanout::poll(sub { $broker->eval_queue('waits_g', '[{_, N}] = rabbit_amqqueue:info(Q, [messages]), N') eq '0' }, 'their acks');
	foreach my $copy ('keeps', 'forgets')
	{
		sql('template1', "select pg_terminate_backend(pid) from pg_stat_activity where datname = 'first'");
		sql('template1', "create database $copy template first");
		PgFanout::wait_for_publisher($node, 'passive', dbname => $copy);
	}
	my ($stdout, $stderr);
	$node->psql('forgets', 'select fanout.activate()', stdout => \$stdout, stderr => \$stderr);
	like($stderr, qr/2 deliveries that waited when the copy was made are forgotten/, 'template: what waits in the original is forgotten in the copy, with a notice');
	is(sql('forgets', 'select count(*) from fanout.waiting'), 0, 'template: it does not wait there any more');
	sql('forgets', q(insert into ready values (1)));
	sql('first', q(insert into ready values (1)));
	PgFanout::poll(sub { sql('first', q(select string_agg(n::text, ' ' order by n) from got)) eq '1 2' }, 'both in the original');
	is(sql('forgets', 'select count(*) from got'), 0, 'template: the original alone applies it');
	sql('forgets', q(select fanout.unsubscribe('waits', 'g')));
	sql('postgres', 'drop database first with (force)');
	sql('keeps', q(insert into ready values (1); select fanout.activate(publish_copied => true)));
	PgFanout::poll(sub { sql('keeps', q(select string_agg(n::text, ' ' order by n) from got)) eq '1 2' }, 'both in the copy');
	pass('with publish_copied, a copy applies what waited in its original');
	sql('postgres', "drop database $_ with (force)") foreach 'keeps', 'forgets';
	return;
}

sub template_with_nothing_declared
{
	sql('postgres', 'create database template_1 is_template true');
	sql('template_1', 'create extension pg_fanout');
	sql('postgres', 'create database from_template template template_1');
	sql('from_template', q(select fanout.declare_binding('new', 'g'); select fanout.publish('new', '1', 'new')));
	PgFanout::flush($node, dbname => 'from_template');
	is_deeply([ keys_in('new_g', 1) ], ['new'], 'a database made from a template in which nothing was declared is its own');
	sql('postgres', $_) foreach 'drop database from_template', 'alter database template_1 is_template false', 'drop database template_1';
	return;
}

sub restored_from_a_dump
{
	my $next = 100;

	dump_to('whole');
	dump_to('partial', '--exclude-table=users', '--exclude-table=got');
	foreach my $what ('whole', 'partial')
	{
		restore($what, $what);
		consumes_nothing($what, "$what dump");
		is(sql($what, q(select last_error from fanout.stat_publisher)), 'it is a copy of database "postgres"', "$what dump: the copy is passive");
		sql($what, q(select fanout.publish('users', '1', 'of the copy')));
		sql($what, q(delete from got; drop function handle)) if $what eq 'whole';
		sql($what, 'select fanout.unsubscribe($$in$$, $$c$$)');
		sql($what, 'select fanout.activate()');
		PgFanout::flush($node, dbname => $what);
		is_deeply([ keys_in('users_g', 1) ], ['of the copy'], "$what dump: what was written in it is published once it is activated");
		sql('postgres', "drop database $what");
	}

	# into the same database again: it is what it was
	sql('postgres', 'create database restored');
	sql('restored', q(create extension pg_fanout; select fanout.declare_binding('restored', 'g')));
	PgFanout::flush($node, dbname => 'restored');
	dump_to('restored', '--clean', '--if-exists', '-d', $node->connstr('restored'));
	$node->command_ok([ 'psql', '-X', '-q', '-f', "$dir/restored.sql", $node->connstr('restored') ], 'a dump is restored into its own database');
	sql('restored', q(select fanout.publish('restored', '1', 'again')));
	PgFanout::flush($node, dbname => 'restored');
	is_deeply([ keys_in('restored_g', 1) ], ['again'], 'then that is no copy');
	sql('postgres', 'drop database restored');
	return;
}

# As for tests: topics do not come along, and applications must be able to write.
sub restored_with_the_schema_alone
{
	dump_to('schema', '--schema-only');
	restore('schema', 'schema');
	PgFanout::wait_for_publisher($node, 'passive', dbname => 'schema');
	sql('schema', "create role writer; grant insert on users to writer");
	sql('schema', q(set role writer; insert into users values (1, 'a'); insert into users values (2, 'b')));
	is(sql('schema', q(select topic, format, on_exhausted from fanout.topics order by 1)), "rows|row|dead_letter\nusers|debezium|hold",
		'schema alone: a write declares the topics as the original has them');
	is(sql('schema', q(select topic, state, count(*) from fanout.outbox_status group by 1, 2 order by 1)), "rows|pending|2\nusers|pending|2",
		'schema alone: writes are captured');
	is(sql('schema', q(select last_error from fanout.stat_publisher)), 'it is a copy, restored from a dump of the schema alone',
		'schema alone: and not published');
	sql('schema', q(begin isolation level repeatable read; insert into users values (3, 'c'); commit));
	sql('schema', q(select fanout.declare_topic('rows', format => 'row', on_exhausted => 'dead_letter')));
	pass('schema alone: topics can be declared as they were afterwards');
	sql("schema", q(drop owned by writer; drop role writer));
	sql('postgres', 'drop database schema');

	# a schema that is declared before anything is written is a database of its own
	restore('declared', 'schema');
	PgFanout::wait_for_publisher($node, 'passive', dbname => 'declared');
	sql('declared', q(select fanout.declare_bindings('{"users": ["g"]}');
		select fanout.declare_topic('rows', format => 'row', on_exhausted => 'dead_letter'); select fanout.declare_bindings('{"rows": ["g"]}');
		insert into users values (7, 'x')));
	PgFanout::flush($node, dbname => 'declared');
	is_deeply([ keys_in('users_g', 1) ], [7], 'schema alone: with its topics declared first, it publishes');
	keys_in('rows_g', 1);
	sql('postgres', 'drop database declared');
	return;
}

# Nobody who restores a single table stops a database that publishes.
sub one_table_restored_beside_others
{
	dump_to('table', '--schema-only', '--table=users');
	sql('postgres', 'create database beside');
	sql('beside', q(create extension pg_fanout; select fanout.declare_binding('beside', 'g')));
	$node->command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-f', "$dir/table.sql", $node->connstr('beside') ], 'a table is restored beside others');
	sql('beside', q(insert into users values (1, 'a'); select fanout.publish('beside', '1', 'flows')));
	PgFanout::wait_for_state($node, 'sent', dbname => 'beside', where => "topic = 'beside'");
	is_deeply([ keys_in('beside_g', 1) ], ['flows'], 'a table restored alone does not make its new database passive');
	sql('postgres', 'drop database beside');
	return;
}

# ---------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------

sub sql { return $node->safe_psql($_[0], $_[1]); }

sub dump_to
{
	my ($file, @options) = @_;

	push @options, '-d', $node->connstr('postgres') unless grep { $_ eq '-d' } @options;
	$node->command_ok([ 'pg_dump', '-f', "$dir/$file.sql", @options ], "pg_dump: $file");
	return;
}

sub restore
{
	my ($database, $file) = @_;

	sql('postgres', "create database $database");
	# a partial dump lacks what functions and triggers need
	$node->command_ok([ 'psql', '-X', '-q', '-f', "$dir/$file.sql", $node->connstr($database) ], "$file is restored");
	return;
}

# The original alone gets what comes for both.
sub consumes_nothing
{
	my ($database, $what) = @_;

	PgFanout::wait_for_publisher($node, 'passive', dbname => $database);
	sql('postgres', q(truncate got; select fanout.publish('in', jsonb_build_object('n', i)) from generate_series(1, 50) i));
	PgFanout::poll(sub { sql('postgres', 'select count(*) from got') == 50 }, 'all messages in the original');
	is(sql($database, 'select count(*) from fanout.inbox'), 0, "$what: the copy takes no message of the original's") if $what ne 'template';
	is(sql('postgres', "select count(*) from pg_stat_activity where datname = '$database' and backend_type = 'pg_fanout consumer'"),
		0, "$what: it has no consumer");
	return;
}

# Keys of the messages in the queue, at least so many.
sub keys_in
{
	my ($queue, $expect) = @_;

	return map { $_->{headers}->{key} } $broker->collect($queue, expect => $expect, idle => 0.5);
}
