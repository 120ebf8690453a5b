# Hostile input on its way to a real broker: names at their limits in several
# encodings, values that are too large or no text, traps in the search path,
# many topics.  What needs no broker is in test/sql/hostile_*.sql.
#
# PG_FANOUT_LONG=1: 2,000 topics in place of 500.

use strict;
use warnings;
use utf8;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use Encode qw(encode_utf8);
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $broker = PgFanout::broker();
my $node = PgFanout::cluster(
	'main', $broker,
	extension => 0,
	conf => q(
pg_fanout.retry_interval = 200ms
max_worker_processes = 32
));

my %arrived;    # how often, by queue and message id

sub sql
{
	my ($dbname, $sql) = @_;

	return $node->safe_psql($dbname, encode_utf8($sql));
}

sub make_database
{
	my ($name, $encoding) = @_;

	sql('postgres',
		qq(create database "$name" encoding '$encoding' locale 'C' template template0)
	);
	sql($name, 'create extension pg_fanout');
	return;
}

sub wait_until
{
	my ($dbname, $query) = @_;

	$node->poll_query_until($dbname, $query)
	  or die PgFanout::status($node, $dbname);
	return;
}

# A line of the table in test/README.md.  What was repeated was counted by
# collect(), unless the messages stayed in their queues.
sub record
{
	my ($name, $load, $messages, $missing, $uncounted) = @_;
	my $repeated = $uncounted ? 'not counted' : grep { $_ > 1 } values %arrived;

	%arrived = ();

	is($missing, 0, "$name: nothing is missing of $messages");
	PostgreSQL::Test::Utils::append_to_file(
		"$PostgreSQL::Test::Utils::tmp_check/experiments",
		"| $name | 017_hostile | $load | $messages | $missing | $repeated |\n");
	return;
}

# The messages that are in a queue, and an end to them.
sub collect
{
	my ($queue, $expect) = @_;
	my @messages =
	  $broker->collect(encode_utf8($queue), expect => $expect, idle => 0.3);

	$arrived{"$queue $_->{message_id}"}++ foreach @messages;
	return @messages;
}

# Their bodies.
sub bodies
{
	return map { $_->{body} } collect(@_);
}

# ---- names at the limit, in three encodings ----

# 255 bytes in UTF-8, and less in LATIN1; a queue's name has its group, too
my %text = (UTF8 => '😀é', LATIN1 => 'éü', SQL_ASCII => 'é€');
my $arrived = 0;

foreach my $encoding (sort keys %text)
{
	my $database = "017 \"$encoding\" %s .";
	my $name = $text{$encoding} x 200;
	my $long = 252;
	my @expected;

	$database =~ s/"//g;
	make_database($database, $encoding);
	chop $name while length(encode_utf8($name)) > $long;
	$name .= 'x' while length(encode_utf8($name)) < $long;

	# a table's names have 63 bytes in the server's encoding
	my $table = $text{$encoding} x 63;
	chop $table
	  while ($encoding eq 'LATIN1' ? length($table) : length(encode_utf8($table))) > 63;
	sql( $database, qq(
		set client_encoding = '@{[ $encoding eq 'SQL_ASCII' ? 'SQL_ASCII' : 'UTF8' ]}';
		select fanout.declare_binding('$name', 'é', 'quorum');
		select fanout.declare_binding('$name', 'c', 'classic');
		create schema "$table";
		create table "$table"."$table" ("$table" text primary key);
		select fanout.capture('"$table"."$table"', '$name');
		insert into "$table"."$table" values ('$table');
		select fanout.publish('$name', '"é"', '$table', '$table', '{"é": "ü", "big": 1e308}');));
	PgFanout::flush($node, dbname => $database);
	foreach my $queue ("${name}_é", "${name}_c")
	{
		my @messages = collect($queue, 2);

		$arrived += @messages;
		is_deeply(
			[
				$messages[0]->{body}->{after}, $messages[0]->{headers}->{table},
				$messages[0]->{headers}->{schema}, $messages[0]->{headers}->{key}
			],
			[ { $table => $table }, $table, $table, $table ],
			"$encoding: names of 63 bytes reach a queue whose name has "
			  . length(encode_utf8($queue)) . ' bytes');
		is_deeply(
			[ $messages[1]->{body}, $messages[1]->{type}, $messages[1]->{headers}->{'é'} ],
			[ 'é', $table, 'ü' ],
			"$encoding: so does a message by hand");
		like("$table.$table.insert", qr/^\Q$messages[0]->{type}\E/,
			"$encoding: with the type, or what of it fits 255 bytes");
	}
	is( sql($database, 'select count(*) from fanout.dead_letter'),
		0, "$encoding: nothing is given up");
}
record('names of 63 and 255 bytes in UTF8, LATIN1, SQL_ASCII; quorum and classic queues',
	'3 databases', 12, 12 - $arrived);

# ---- SQL_ASCII: what is no UTF-8 ----

my $ascii = '017 SQL_ASCII %s .';
sql( $ascii, q(
	select fanout.declare_binding('bytes', 'g', 'classic');
	create table bytes (id int primary key, t text);
	create table keys (t text primary key);
	select fanout.capture('bytes', 'bytes'), fanout.capture('keys', 'bytes');
	insert into bytes select i, case when i % 10 = 0 then e'\xff\xfe' else 'x' end from generate_series(1, 100) i;
	insert into keys values (e'\xc3'), ('good');
	select fanout.publish('bytes', '1', 'k', headers => (e'{"h": "\xe9"}')::jsonb);
	insert into bytes values (101, 'last');));
wait_until($ascii, q(select count(*) = 0 from fanout.outbox_status where state not in ('sent', 'dead')));
is( sql($ascii, q(select count(*), count(*) filter (where reason ~ 'UTF-8' and attempts = 0) from fanout.dead_letter)),
	'12|12', 'SQL_ASCII: rows, keys and headers that are no UTF-8 are dead letters, with the reason');
my @bytes = bodies('bytes_g', 92);
record('invalid UTF-8 in every tenth row, in a key, in a header', '1 transaction', 92, 92 - @bytes);
is(sql($ascii, 'select reconnects from fanout.stat_publisher'), 0, 'and the connection was never lost');

# ---- headers and keys that are too large, numbers that are ----

make_database('large', 'UTF8');
sql( 'large', q(
	select fanout.declare_binding('large', 'g', 'classic');
	create table long_key (id text, n int);
	select fanout.capture('long_key', 'large', key => '{id}');));
PgFanout::flush($node, dbname => 'large');
sql( 'large', q(
	begin;
	select fanout.publish('large', to_jsonb(i), 'k' || i) from generate_series(1, 50) i;
	select fanout.publish('large', '0', 'dead', headers => jsonb_build_object('h', repeat('x', 200000)));
	select fanout.publish('large', '0', 'dead', headers => (select jsonb_object_agg('h' || i, i) from generate_series(1, 20000) i));
	select fanout.publish('large', '0', repeat('k', 200000));
	insert into long_key values (repeat('k', 200000), 1);
	insert into long_key values ('short', 51);
	update long_key set id = repeat('k', 40000) where n = 51;
	-- written by an earlier version: publish() refuses it
	insert into fanout.outbox_0 (segment, database, id, xid, topic_id, message_id, headers, payload, created_at)
	select 0, 0, nextval('fanout.outbox_id_seq'), pg_current_xact_id(), topic_id, gen_random_uuid(), '{"h": 1e400}', '0', now()
	from fanout.topic where topic = 'large';
	select fanout.publish('large', to_jsonb(i), 'k' || i) from generate_series(52, 100) i;
	commit;));
wait_until('large', q(select count(*) = 0 from fanout.outbox_status where state not in ('sent', 'dead')));
is( sql('large', q(select count(*), count(*) filter (where attempts = 0 and reason <> '') from fanout.dead_letter)),
	'5|5', 'headers and keys of 200 kB, and a number that is no double, are dead letters at once');
my @large = bodies('large_g', 101);
record('headers of 200 kB, 20,000 headers, keys of 200 kB, a number no double holds', '1 transaction', 101, 101 - @large);
is(sql('large', 'select reconnects from fanout.stat_publisher'), 0, 'and the connection was never lost');

# ---- traps in everybody's search path ----

make_database('traps', 'UTF8');
my $traps = "declare f record; begin\n" . q(
	for f in
		select p.proname, pg_catalog.pg_get_function_identity_arguments(p.oid) as args, pg_catalog.format_type(p.prorettype, null) as result, p.proretset
		from pg_catalog.pg_proc p
		where p.pronamespace = 'pg_catalog'::regnamespace and p.prokind = 'f'
		  and p.proname in ('to_json', 'row_to_json', 'json_build_object', 'octet_length', 'pg_current_snapshot', 'pg_visible_in_snapshot',
							'pg_snapshot_xmin', 'pg_snapshot_xmax', 'pg_snapshot_xip', 'clock_timestamp', 'now', 'left', 'array_in',
							'nextval', 'texteq', 'jsonb_typeof', 'convert_to', 'gen_random_uuid', 'current_setting')
		  and pg_catalog.pg_get_function_identity_arguments(p.oid) !~ 'VARIADIC|OUT |internal|cstring|any'
	loop
		execute pg_catalog.format('create function public.%I(%s) returns %s%s language plpgsql as %L', f.proname, f.args,
			case when f.proretset then 'setof ' else '' end, f.result,
			'begin raise warning ''trapped''; return' || case when f.proretset then '' else ' null' end || '; end');
	end loop;) . "\nend";
sql( 'traps', qq(
	create function public.to_json(anyelement) returns json language plpgsql as 'begin raise warning ''trapped''; return null; end';
	create function public.trap(text, text) returns boolean language plpgsql as 'begin raise warning ''trapped''; return false; end';
	create function public.trap(int, int) returns boolean language plpgsql as 'begin raise warning ''trapped''; return false; end';
	create function public.trap(bigint, bigint) returns boolean language plpgsql as 'begin raise warning ''trapped''; return false; end';
	create function public.trap(xid8, xid8) returns boolean language plpgsql as 'begin raise warning ''trapped''; return false; end';
	create function public.trap(json, text) returns text language plpgsql as 'begin raise warning ''trapped''; return null; end';
	create function public.trap(jsonb, text) returns text language plpgsql as 'begin raise warning ''trapped''; return null; end';
	do \$\$$traps\$\$;
	create operator public.->> (leftarg = json, rightarg = text, procedure = public.trap);
	create operator public.->> (leftarg = jsonb, rightarg = text, procedure = public.trap);
	create domain public.text as pg_catalog.text check (false);
	create domain public.xid8 as pg_catalog.xid8 check (false);
	create domain public.pg_snapshot as pg_catalog.pg_snapshot check (false);
	create table public.outbox (id int);
	create table public.sent (id int);
	create table public.pg_extension (extname name);
	create table public.pg_namespace (nspname name);
	@{[ map { my $type = $_; map { "create operator public.$_ (leftarg = pg_catalog.$type, rightarg = pg_catalog.$type, procedure = public.trap);\n" } qw(= <> >= <= > <) } qw(text int4 int8 xid8) ]}
	alter database traps set search_path = public, pg_catalog;
	alter role all set search_path = public, pg_catalog;));
my $postmaster_user = sql('postgres', 'select current_user');
sql( 'traps', qq(alter role "$postmaster_user" in database traps set search_path = public, pg_catalog));
is( sql('traps', q(set client_min_messages = error; select pg_catalog.count(*) from pg_catalog.pg_proc where proname operator(pg_catalog.=) 'to_json' and 'a'::pg_catalog.text = 'a')),
	0, 'the traps are in the search path, and work');
my $offset = -s $node->logfile;
my $publisher = PgFanout::publisher_pid($node, dbname => 'traps');
sql('traps', "select pg_terminate_backend($publisher)");
$node->poll_query_until('traps',
	"select exists (select 1 from fanout.stat_publisher where pid operator(pg_catalog.<>) $publisher and connected_to is not null)");
my @steps = (
	q(select fanout.declare_binding('traps', 'g', 'classic')),
	q(select fanout.declare_bindings('{"traps": "h"}')),
	q(create table trapped (id int primary key, t pg_catalog.text, j json, a int[], ts timestamptz)),
	q(select fanout.capture('trapped', 'traps', "when" => 'new.t is not null and new.t operator(pg_catalog.<>) ''unseen''', key => '{id,ts}')),
	q(insert into trapped select i, 'x', '{"a": 1}', '{1}', '2024-01-01' from generate_series(1, 20) i),
	q(select fanout.publish('traps', '1', 'k', 't', '{"h": 1}')),
	q(select fanout.pause('traps')),
	q(insert into trapped select i, 'x', '{"a": 1}', '{1}', '2024-01-01' from generate_series(21, 40) i),
	q(select fanout.resume('traps')),
	q(alter table trapped rename t to u),
	q(select fanout.verify('20 s')),
	q(select * from fanout.check()),
	q(select * from fanout.outbox_status),
	q(select * from fanout.stat_topics),
	q(select fanout.redrive()),
	q(select fanout.purge()));
sql('traps', $_) foreach @steps;
PgFanout::flush($node, dbname => 'traps');
my @trapped = bodies('traps_g', 41);
unlike(
	slurp_file($node->logfile, $offset) =~ s/^.*STATEMENT.*$//mgr,
	qr/trapped'?$/m,
	'operators, functions, types and tables of public trap neither functions, nor captures, nor the publisher');
record('traps in public, first in the search path of database and roles', '1 client', 41, 41 - @trapped);
sql('postgres', "alter role all reset search_path");

# ---- many topics ----

my $topics = $ENV{PG_FANOUT_LONG} ? 2000 : 500;

make_database('many', 'UTF8');
my $start = time;
sql( 'many', qq(
	select fanout.declare_binding('topic ' || i, 'g', 'classic') from generate_series(1, $topics) i;
	select fanout.declare_topic('stalled');));
PgFanout::flush($node, dbname => 'many', timeout => '150 s');
note(sprintf '%d topics and bindings declared in %.1f s', $topics, time - $start);
is( sql('many', q(select count(*) from fanout.bindings where state = 'declared')),
	$topics, "$topics bindings are declared");

$start = time;
sql( 'many', qq(
	select fanout.publish('stalled', to_jsonb(i), 'k') from generate_series(1, 10) i;
	select fanout.publish('topic ' || i, to_jsonb(n), 'k' || n) from generate_series(1, $topics) i, generate_series(1, 2) n));
wait_until('many', q(select count(*) = 10 from fanout.outbox_status where state <> 'sent'));
note(sprintf '%d messages to %d topics sent in %.1f s', 2 * $topics, $topics, time - $start);
is( sql('many', q(select string_agg(distinct topic || ' ' || state, ',') from fanout.outbox_status where state <> 'sent')),
	'stalled held', 'a topic among them that is stalled disturbs no other');

$publisher = PgFanout::publisher_pid($node, dbname => 'many');
$start = time;
sql( 'many', qq(
	select pg_terminate_backend($publisher);
	select fanout.publish('topic ' || $topics, '3', 'k')));
wait_until('many', q(select count(*) = 10 from fanout.outbox_status where state <> 'sent'));
note(sprintf 'sent again %.1f s after the publisher was terminated', time - $start);
my $list = $broker->ctl('-q', 'list_queues', '-p', $broker->vhost, 'name', 'messages');
# some may have been sent twice
my %in_queue = $list =~ /^topic (\d+)_g\t(\d+)$/mg;
my $missing = 0;
foreach my $i (1 .. $topics)
{
	my $lack = ($i == $topics ? 3 : 2) - ($in_queue{$i} || 0);

	$missing += $lack if $lack > 0;
}
record("$topics topics on classic queues, one stalled, publisher terminated",
	'1 client', 2 * $topics + 1, $missing, 'uncounted');
sql('many', q(select fanout.declare_binding('stalled', 'g', 'classic')));
# the pauses between its attempts have grown
PgFanout::flush($node, dbname => 'many', timeout => '150 s');
is_deeply([ bodies('stalled_g', 10) ], [ 1 .. 10 ], 'bound at last, the stalled one flows, in order');

# ---- values of hundreds of megabytes ----

SKIP:
{
	my ($available) = slurp_file('/proc/meminfo') =~ /^MemAvailable: +(\d+)/m;

	skip 'too little memory', 1 if $available < 8 * 1024 * 1024;

	make_database('huge', 'UTF8');
	sql( 'huge', q(
		select fanout.declare_binding('huge', 'g', 'classic');
		create table huge (id int primary key, a json, b json, c json, d json);
		select fanout.capture('huge', 'huge');
		create table value as select ('"' || repeat(repeat('x', 1000), 300000) || '"')::json as v;));
	PgFanout::flush($node, dbname => 'huge');
	my ($ret, $stdout, $stderr) = $node->psql('huge',
		q(begin; insert into huge values (1, '"before"'); savepoint s; insert into huge select 2, v, v, v, v from value; commit;));
	is($ret, 0, 'a row whose rendering is over 1 GB is written');
	is(sql('huge', q(select count(*) from huge)), 2, 'and so is what its transaction wrote before');

	sql( 'huge', q(
		insert into huge values (3, '"small"');
		insert into huge select 4, v from value;
		insert into huge select 5, v, v from value;
		insert into huge values (6, '"small"');));
	wait_until('huge', q(select count(*) = 0 from fanout.outbox_status where state not in ('sent', 'dead')));
	is( sql('huge', q(select string_agg(coalesce(key, 'too large'), ',' order by key), bool_and(reason <> '') from fanout.dead_letter)),
		'4,5,too large|t', 'bodies of 300 and 600 MB are dead letters, with the reason, and so is that of the row over 1 GB');
	note(sql('huge', q(select key, left(reason, 200) from fanout.dead_letter)));
	is(sql('huge', q(select count(*) from fanout.outbox_status where state = 'sent')), 3, 'their neighbours are sent');
	my $pid = PgFanout::publisher_pid($node, dbname => 'huge');
	my ($anon) = slurp_file("/proc/$pid/status") =~ /^RssAnon:\s+(\d+)/m;
	note("the publisher has $anon kB of memory of its own");
	cmp_ok($anon, '<', 64 * 1024, 'and the publisher gives the memory back');
	record('bodies of 300 and 600 MB, a row over 1 GB', '1 client', 3, 3 - scalar bodies('huge_g', 3));
}

done_testing();
