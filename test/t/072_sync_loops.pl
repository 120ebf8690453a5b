# Changes that sync_table() makes, and that are captured, end where they have been:
# two databases that keep each other's table, rings, a table kept from itself.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use IPC::Run ();
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 60
pg_fanout.max_subscriptions = 40
));

# Two databases

link_all('users', 'a', 'b');
sql('a', 'insert into users values (1, 1), (2, 1)');
quiet('users', 'a', 'b');
is(sql('b', 'select count(*) from users'), 2, 'rows of one database come to the other');
is(messages('users', 'a', 'b'), '2 2', 'each change is one message each way');
is(own('users', 'a', 'b'), '2 0', 'and is left out where it was made');
sql('b', 'update users set x = 2 where id = 1; delete from users where id = 2; update users set id = 3');
quiet('users', 'a', 'b');
is(sql('a', q(select string_agg(users::text, ' ') from users)), '(3,2)', 'and those of the other come to the one');
is(messages('users', 'a', 'b'), '5 5', 'in one message each way');
is(own('users', 'a', 'b'), '2 3', 'counted as its own');

# Both sides change one row before they have heard of each other, as README says

sql('a', q(select fanout.pause('users_b', 'g')));
sql('b', q(select fanout.pause('users_a', 'g')));
# the workers count anew when they begin again, and so must have ended
foreach my $paused ([ 'a', 'users_b' ], [ 'b', 'users_a' ])
{
	$node->poll_query_until($paused->[0], "select state = 'paused' and pid is null from fanout.stat_subscriptions where topic = '$paused->[1]'")
	  or die "$paused->[1] is not paused";
}
sql('a', 'update users set x = 10');
sql('b', 'update users set x = 20');
PgFanout::flush($node, dbname => $_) for 'a', 'b';
sql('a', q(select fanout.resume('users_b', 'g')));
sql('b', q(select fanout.resume('users_a', 'g')));
quiet('users', 'a', 'b') for 1, 2;
is(messages('users', 'a', 'b'), '7 7', 'a row that is changed at both sides at once: each change is one message each way, and then it is quiet');
is(own('users', 'a', 'b'), '1 1', 'each is left out where it was made');
is(join(' ', map { sql($_, 'select x from users') } 'a', 'b'), '20 10', 'and the two differ from then on');

# A ring of three

link_all('ring', 'a', 'b', 'c');
sql('b', 'insert into ring values (1, 1)');
quiet('ring', 'a', 'b', 'c');
is(join(' ', map { sql($_, 'select x from ring') } 'a', 'b', 'c'), '1 1 1', 'a row goes through a ring of three');
is(messages('ring', 'a', 'b', 'c'), '1 1 1', 'once');
sql('a', 'truncate ring');
quiet('ring', 'a', 'b', 'c');
is(join(' ', map { sql($_, 'select count(*) from ring') } 'a', 'b', 'c'), '0 0 0', 'so does a TRUNCATE');

# A table kept from itself

sql('a', q(
create table self (id int primary key, x int);
select fanout.declare_binding('self', 'g');
select fanout.capture('self', 'self');
select fanout.sync_table('self', 'g', 'self');
insert into self values (1, 1);
));
quiet('self', 'a');
is(messages('self', 'a') . ' ' . own('self', 'a'), '1 1', 'a table that is kept from itself is left alone');

# What comes back to another table is a change like any other

sql('a', q(
create table first (id int primary key, x int);
create table second (like first including all);
create table third (like first including all);
select fanout.declare_binding(t, 'g'), fanout.capture(t::regclass, t) from unnest('{first,second,third}'::text[]) t;
select fanout.sync_table('first', 'g', 'second');
select fanout.sync_table('second', 'g', 'third');
select fanout.sync_table('third', 'g', 'first');
insert into first values (1, 1);
));
quiet($_, 'a') for qw(first second third);
is(sql('a', q(select (select x from second) || ' ' || (select x from third))), '1 1', 'a chain of tables in one database');
is(messages('first', 'a') . messages('third', 'a') . own('third', 'a'), '111', 'that comes back to its begin ends there');

# README's way to write at both sides: each row at one side only

sql($_, q(create table homes (id int, home text, name text, primary key (home, id)))) for 'a', 'b';
sql('a', q(select fanout.declare_binding('homes_a', 'b'), fanout.capture('homes', 'homes_a', "where" => $$home = 'a'$$)));
sql('b', q(select fanout.declare_binding('homes_b', 'a'), fanout.capture('homes', 'homes_b', "where" => $$home = 'b'$$)));
sql('a', q(select fanout.sync_table('homes_b', 'a', 'homes')));
sql('b', q(select fanout.sync_table('homes_a', 'b', 'homes')));
my @writers = map {
	my $home = $_;

	IPC::Run::start(
		[ 'psql', '-XqAt', '-d', $node->connstr($home), '-c', qq(
do \$\$
begin
    for i in 1 .. 500 loop
        insert into homes values (i % 50, '$home', 'v' || i) on conflict (home, id) do update set name = excluded.name;
        delete from homes where home = '$home' and id = (i * 7) % 50 and i % 3 = 0;
        commit;
    end loop;
end \$\$;
) ], '<', \undef)
} 'a', 'b';
$_->finish or die 'a writer failed' for @writers;
settled('homes_a', 'b', 'b');
settled('homes_b', 'a', 'a');
is(sql('a', 'select string_agg(h::text, chr(10) order by h) from homes h'), sql('b', 'select string_agg(h::text, chr(10) order by h) from homes h'),
	'two databases that write at once, each its own rows, are equal');

# By way of a handler that writes the table itself

sql($_, q(create table "an odd, /name" (id int primary key, x int))) for 'a', 'b';
sql('b', q(
create function copy_odd(m fanout.message) returns void language plpgsql as $$
begin
    insert into "an odd, /name" values ((m.body #>> '{after,id}')::int, (m.body #>> '{after,x}')::int)
    on conflict (id) do update set x = excluded.x;
end $$;
create function copy_all(m fanout.message[]) returns void language plpgsql as $$
begin
    perform copy_odd(n) from unnest(m) n;
end $$;
));
foreach my $handler ('copy_odd(fanout.message)', 'copy_all(fanout.message[])')
{
	sql('a', q(select fanout.declare_binding('odd_a', 'b'), fanout.declare_binding('odd_b', 'a'), fanout.capture('"an odd, /name"', 'odd_a'), fanout.sync_table('odd_b', 'a', '"an odd, /name"')));
	sql('b', qq(select fanout.declare_binding('odd_b', 'a'), fanout.capture('"an odd, /name"', 'odd_b'), fanout.subscribe('odd_a', 'b', '$handler')));
	sql('a', q(insert into "an odd, /name" values (1, 1), (2, 1)));
	settled('odd_a', 'b', 'b');
	settled('odd_b', 'a', 'a');
	settled('odd_a', 'b', 'b');
	is(sql('b', 'select count(*) from "an odd, /name"'), 2, "a handler, $handler, writes rows");
	is(sql('a', q(select own || ' ' || applied from fanout.stat_subscriptions where topic = 'odd_b')), '2 2', 'which are left out where they came from');
	is(sql('a', q(select count(*) from fanout.outbox join fanout.topic using (topic_id) where topic = 'odd_a')), 2, 'and cause no more');
	sql('a', q(select fanout.unsubscribe('odd_b', 'a'); select fanout.uncapture('"an odd, /name"'); delete from "an odd, /name"));
	sql('b', q(select fanout.unsubscribe('odd_a', 'b'); select fanout.uncapture('"an odd, /name"'); delete from "an odd, /name"));
	sql('a', q(delete from fanout.outbox));
}

# An error ends what is being handled: what is written afterwards is nobody's

sql('a', q(
create table failing (id int primary key, x int check (x < 10));
create table after_it (id int primary key);
select fanout.declare_topic('after_it');
select fanout.capture('after_it', 'after_it');
select fanout.sync_table('failing', 'g', 'failing', source => 's.failing');
do $$
declare
    m fanout.message := row(gen_random_uuid(), 'failing', 'g', null, '1', 1, '{"op": "c", "schema": "s", "table": "failing", "format": "row", "via": "x.1"}',
                            '{"id": 1, "x": 10}', '', now(), false, 1, null)::fanout.message;
begin
    begin
        perform fanout.sync_messages(array[m]);
    exception when check_violation then
        insert into after_it values (1);
    end;
end $$;
));
is(sql('a', q(select headers ? 'via' from fanout.outbox join fanout.topic using (topic_id) where topic = 'after_it')), 'f', 'an error ends it');

done_testing();

sub sql
{
	my ($database, $sql) = @_;

	return $node->safe_psql($database, $sql);
}

# A table in each database, which the next one keeps; the last one's, the first.
sub link_all
{
	my ($table, @databases) = @_;

	foreach my $database (@databases)
	{
		sql('postgres', "create database $database") if sql('postgres', "select count(*) from pg_database where datname = '$database'") == 0;
		sql($database, qq(
create extension if not exists pg_fanout;
create table $table (id int primary key, x int);
select fanout.declare_binding('${table}_$database', 'g');
select fanout.capture('$table', '${table}_$database', '{insert,update,delete,truncate}');
));
	}
	foreach my $i (0 .. $#databases)
	{
		sql($databases[$i], "select fanout.sync_table('${table}_$databases[$i - 1]', 'g', '$table')");
	}
	return;
}

# Waits until all that was published into a topic has been handled.
sub settled
{
	my ($topic, $group, $database) = @_;

	foreach my $d (map { split } sql('postgres', q(select string_agg(datname, ' ') from pg_database where datname ~ '^[abc]$')))
	{
		$node->safe_psql($d, q(select fanout.flush()));
	}
	PgFanout::poll(
		sub {
			$broker->left("${topic}_$group") == 0
			  && sql($database, "select delivered = applied + skipped from fanout.stat_subscriptions where topic = '$topic'") eq 't';
		},
		"the end of ${topic}_$group");
	return;
}

# Waits until nothing more comes of it.
sub quiet
{
	my ($table, @databases) = @_;

	# as often as a change can go round, and once more
	foreach my $round (0 .. @databases)
	{
		foreach my $i (0 .. $#databases)
		{
			my $topic = @databases > 1 ? "${table}_$databases[$i - 1]" : $table;

			settled($topic, 'g', $databases[$i]);
		}
	}
	return;
}

sub messages
{
	my ($table, @databases) = @_;

	return join ' ', map {
		sql($_, qq(select count(*) from fanout.outbox join fanout.topic using (topic_id) where topic in ('$table', '${table}_$_')))
	} @databases;
}

sub own
{
	my ($table, @databases) = @_;

	return join ' ', map {
		sql($_, qq(select sum(own) from fanout.stat_subscriptions where topic ~ '^${table}(_.)?\$'))
	} @databases;
}
