# pg_dump carries topics, bindings and captures, and no messages.  What it is
# restored into captures, and does nothing else until it is activated.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $node = PgFanout::cluster('main', $proxy);
my $dir = PostgreSQL::Test::Utils::tempdir();

$node->safe_psql(
	'postgres', q(
create table users (id integer primary key, name text, secret text);
create table parts (id integer, day date, primary key (id, day)) partition by range (day);
create table parts_2020 partition of parts for values from ('2020-01-01') to ('2021-01-01');
select fanout.declare_topic('exchange_row', format => 'row', on_exhausted => 'dead_letter');
select fanout.declare_binding('exchange_row', 'c', arguments => '{"x-max-length": 100000}');
select fanout.declare_bindings('{"exchange_user": ["a", "b"]}');
select fanout.declare_topic('exchange_none');
select fanout.drop_topic('exchange_none');
select fanout.capture('users', 'exchange_user', exclude => '{secret}', old_row => true);
select fanout.capture('users', 'exchange_row', operations => '{insert}', "when" => 'new.id > 10');
select fanout.capture('parts', 'exchange_row', key => '{id}');
insert into users select i, 'user ' || i, 'x' from generate_series(1, 20) i;
insert into parts values (1, '2020-05-05')));
PgFanout::flush($node);
# the broker has to forget it first
$node->poll_query_until('postgres', q(select not exists (select from fanout.topic where topic = 'exchange_none'))) or die 'not dropped';

# The publisher is busy while all dumps are made.
$proxy->command('throttle 100000');
$node->safe_psql('postgres',
	q(insert into users select i, repeat('x', 500), 'x' from generate_series(1001, 5000) i));
PgFanout::wait_for_publisher($node, 'publishing');
$node->command_ok(
	[ 'pg_dump', '-f', "$dir/plain.sql", $node->connstr('postgres') ],
	'pg_dump works while the publisher is busy');
$node->command_ok(
	[ 'pg_dump', '-Fc', '-f', "$dir/custom", $node->connstr('postgres') ],
	'pg_dump -Fc, too');
foreach my $section ('pre-data', 'data', 'post-data')
{
	$node->command_ok(
		[
			'pg_dump', "--section=$section", '-f',
			"$dir/$section.sql", $node->connstr('postgres')
		],
		"pg_dump --section=$section, too");
}
is(PgFanout::wait_for_publisher($node, 'publishing'),
	PgFanout::publisher_pid($node), 'and it still is');
$proxy->command('pass');
PgFanout::flush($node);
$broker->amqp('purge', map { ('--queue', $_) }
	  'exchange_user_a', 'exchange_user_b', 'exchange_row_c');

my $dump = PostgreSQL::Test::Utils::slurp_file("$dir/plain.sql");
unlike($dump, qr/^COPY fanout\.(outbox|sent|held|dead_letter|stall|rotation)/m,
	'a dump has no messages and no ledger');

# psql

$node->safe_psql('postgres', 'create database plain');
$node->command_ok(
	[
		'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-f',
		"$dir/plain.sql", $node->connstr('plain')
	],
	'psql restores it');
check_copy('plain');

# pg_restore, in parallel.  In three steps: in one, it may create the trigger of
# a partitioned table, which has no data itself, before it loads the partitions.

$node->safe_psql('postgres', 'create database parallel');
foreach my $section ('pre-data', 'data', 'post-data')
{
	$node->command_ok(
		[
			'pg_restore', '--exit-on-error', "--section=$section", '-j', '3',
			'-d', $node->connstr('parallel'), "$dir/custom"
		],
		"pg_restore -j restores section $section");
}
check_copy('parallel');

# By section

$node->safe_psql('postgres', 'create database sections');
foreach my $section ('pre-data', 'data', 'post-data')
{
	$node->command_ok(
		[
			'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-f',
			"$dir/$section.sql", $node->connstr('sections')
		],
		"psql restores section $section");
}
check_copy('sections');

# The schema alone, as for tests, and then the data, with triggers disabled

$node->safe_psql('postgres', 'create database apart');
$node->command_ok(
	[ 'pg_dump', '-s', '-f', "$dir/schema.sql", $node->connstr('postgres') ],
	'pg_dump -s');
$node->command_ok(
	[ 'pg_dump', '-a', '--disable-triggers', '-f', "$dir/data.sql", $node->connstr('postgres') ],
	'pg_dump -a --disable-triggers');
restore('apart', 'schema');
check_state('apart', 'schema alone');
is( $node->safe_psql('apart',
		'select (select count(*) from fanout.topic) + (select count(*) from fanout.binding) + (select count(*) from fanout.subscription)'),
	0, 'the schema alone brings no topics');
PgFanout::publisher_pid($node, dbname => 'apart');
restore('apart', 'data');
check_state('apart', 'data with triggers disabled');
cmp_ok($node->safe_psql('apart', 'select count(*) from fanout.check_guards()'), '>', 0, 'apart: check() says that guards are not enabled always');
$node->safe_psql('apart', $_)
  foreach map { /^Use (.*)\.$/ } split /\n/, $node->safe_psql('apart', 'select hint from fanout.check_guards()');
is($node->safe_psql('apart', 'select count(*) from fanout.check_guards()'), 0, 'apart: and how to put that right');
$node->safe_psql('apart', q(insert into users values (5555, 'at once', 'x')));
check_passive('apart');
PgFanout::flush($node, dbname => 'apart');
is($node->safe_psql('apart', 'select state from fanout.outbox_status'), "sent\nsent",
	'apart: the publisher knows the topics that came without their triggers');
is_deeply(
	[ map { $_->{body}->{after}->{name} } $broker->collect('exchange_user_a', expect => 1, idle => 0.3) ],
	['at once'], 'apart: captures work');
$node->stop('fast');

done_testing();

sub restore
{
	my ($database, $file) = @_;

	$node->command_ok(
		[
			'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-f',
			"$dir/$file.sql", $node->connstr($database)
		],
		"$database: psql restores $file.sql");
	return;
}

# What is true of one database only is as CREATE EXTENSION makes it.
sub check_state
{
	my ($database, $what) = @_;

	is( $node->safe_psql(
			$database, q(
		select concat_ws(' ', relname, (xpath('/row/c/text()', query_to_xml('select count(*) as c from ' || oid::regclass, false, true, '')))[1])
		from pg_class where relnamespace = 'fanout'::regnamespace and relkind = 'r'
		  and oid not in (select unnest(extconfig) from pg_extension where extname = 'pg_fanout')
		  and relname not in ('capture', 'captured_column', 'topic_stat', 'topology_change')
		  and (xpath('/row/c/text()', query_to_xml('select count(*) as c from ' || oid::regclass, false, true, '')))[1]::text <> '0'
		order by 1)),
		"inbox_rotation 1\nrotation 1\nsent_0 1",
		"$database, $what: rotations and ledger are new, and there is nothing else");
	is($node->safe_psql($database, 'select fanout.ledger_problem() is null'),
		't', "$database, $what: the ledger is usable");
	return;
}

# Nothing is published, everything says so, and activate() changes it.
sub check_passive
{
	my ($database) = @_;
	my $reason = 'it is a copy of database "postgres"';

	PgFanout::wait_for_publisher($node, 'passive', dbname => $database);
	is($node->safe_psql($database, 'select last_error from fanout.stat_publisher'), $reason,
		"$database: stat_publisher says that it is a copy");
	is($node->safe_psql($database, q(select ok, detail from fanout.check() where item = 'database active')), "f|$reason",
		"$database: so does check()");
	is($node->safe_psql($database, q(select count(*) from fanout.outbox_status where state <> 'pending')), 0,
		"$database: nothing is published");
	like($node->safe_psql($database, 'select fanout.activate()'), qr/^\Q$reason\E; [1-9]\d* messages will be published$/,
		"$database: it is activated");
	return;
}

sub check_copy
{
	my ($database) = @_;
	my @messages;

	foreach my $view ('captures', 'topics', 'bindings')
	{
		my $query = "select to_jsonb(v) - array['declared_at', 'state', 'last_error']
					 from fanout.$view v order by 1";

		is( $node->safe_psql($database, $query),
			$node->safe_psql('postgres', $query),
			"$database: has the same $view");
	}
	is($node->safe_psql($database, q(
		select (select count(*) from fanout.outbox) + (select count(*) from fanout.held)
			   + (select count(*) from fanout.dead_letter), (select sum(count) from fanout.sent))),
		'0|0', "$database: has no messages, and nothing was captured by the restore");
	is( $node->safe_psql($database, q(
		select fanout.declare_topic('another');
		select topic_id - (select max(topic_id) from fanout.topic where topic <> 'another')
		from fanout.topic where topic = 'another')),
		"\n2", "$database: topic ids go on behind those used, the dropped one included");

	$node->safe_psql($database, q(
		update users set name = 'renamed' where id = 11;
		insert into users values (7777, 'new', 'x');
		insert into parts values (2, '2020-06-06')));
	check_passive($database);
	PgFanout::flush($node, dbname => $database);
	foreach my $queue ('exchange_user_a', 'exchange_user_b')
	{
		@messages = $broker->collect($queue, expect => 2, idle => 0.3, timeout => 30);
		is_deeply(
			[ map { [ @{ $_->{body} }{qw(op before after)} ] } @messages ],
			[
				[
					'u',
					{ id => 11, name => 'user 11' },
					{ id => 11, name => 'renamed' }
				],
				[ 'c', undef, { id => 7777, name => 'new' } ]
			],
			"$database: captures work, into $queue");
	}
	@messages = $broker->collect('exchange_row_c', expect => 2, idle => 0.3, timeout => 30);
	is_deeply(
		[ map { $_->{body}->{id} } @messages ],
		[ 7777, 2 ],
		"$database: captures work, with a condition and of a partitioned table");
	return;
}
