# sync_table() keeps a table equal to the one in another database, whatever is
# done to that one, and never lets something older win.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use JSON::XS ();
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 24
));

$node->safe_psql('postgres', q(
create database b;
create role app login;
));
$node->safe_psql('b', q(
create extension pg_fanout;
create schema copy authorization app;
grant usage on schema fanout to app;
grant execute on function fanout.sync_table, fanout.subscribe, fanout.unsubscribe, fanout.sync_messages to app;
select fanout.grant_topic(null, 'app');
));

# Types, defaults, keys that change, values that change places

a(q(
create table users (
    id int primary key, name text, email text unique, at timestamptz default now(), tags text[], price numeric,
    data bytea, doc jsonb, day date, span interval, ratio float8, flag boolean, twice int generated always as (id * 2) stored);
select fanout.declare_binding('users', 'b');
select fanout.capture('users', 'users');
));
app(q(
create table copy.users (
    id int primary key, full_name text, email text unique, at timestamptz, tags text[], price numeric(20, 5),
    data bytea, doc jsonb, day date, span interval, ratio float8, flag boolean, twice int generated always as (id * 2) stored,
    local text default 'of this database');
select fanout.sync_table('users', 'b', 'copy.users', columns => '{"name": "full_name"}');
));
my $users = 'id, %s, email, at, tags, price::numeric(20, 5), data, doc, day, span, ratio, flag, twice';
a(q(
insert into users select i, 'user "' || i || E'" \\ \n ü', 'e' || i, now() - i * interval '1.5 h', array['a', 'b"c', null], i / 7.0,
    decode(md5(i::text), 'hex'), jsonb_build_object('i', i, 'x', array[1, null]), current_date - i, i * interval '90 min', i / 3.0, i % 2 = 0
from generate_series(1, 5000) i;
update users set name = null, tags = '{}', doc = '[]' where id % 3 = 0;
delete from users where id % 5 = 0;
update users set id = id + 100000 where id % 7 = 0;
insert into users (id, email) select i, 'new' || i from generate_series(1, 5000) i where i % 10 = 0;
update users set ratio = 'nan', price = 'nan' where id = 11;
begin;
update users set email = 'between' where id = 1;
update users set email = 'e1' where id = 2;
update users set email = 'e2' where id = 1;
commit;
));
equal('users', $users, 'name', 'copy.users', 'full_name',
	'rows of all sorts of types, keys that changed, values that changed places');
is(b(q(select count(*) from copy.users where local = 'of this database')),
	a('select count(*) from users'), 'a column that messages do not have keeps its default');
b(q(update copy.users set local = 'changed here' where id = 1));
a(q(update users set name = 'again' where id = 1));
equal('users', $users, 'name', 'copy.users', 'full_name', 'an update');
is(b(q(select local from copy.users where id = 1)),
	'changed here', 'and what is written into it here');
cmp_ok(b(q(select applied from fanout.stat_subscriptions)), '>', 7000, 'messages applied');
is(b(q(select failed from fanout.stat_subscriptions)), 0, 'none of them failed');

# In bulk

a(q(update users set name = 'many'));
equal('users', $users, 'name', 'copy.users', 'full_name', 'an update of all rows');
my $rows = b('select count(*) from copy.users');
my $transactions = b('select count(distinct xmin::text) from copy.users');
cmp_ok($transactions, '<', $rows / 10, "$rows rows were not written in as many transactions, but in $transactions");

# The remote table changes its columns, and is truncated

a(q(
alter table users drop column flag, add column more text default 'm';
insert into users (id, email, more) values (900001, 'x', 'y');
update users set more = 'z' where id = 1;
));
$users = 'id, %s, email, at, tags, price::numeric(20, 5), data, doc, day, span, ratio, twice';
equal('users', $users, 'name', 'copy.users', 'full_name', 'columns come and go');
app('alter table copy.users add column more text');
a(q(update users set more = 'zz' where id in (1, 2)));
equal('users', "$users, more", 'name', 'copy.users', 'full_name',
	'a column that is added here, too', 'where id in (1, 2)');
a(q(
select fanout.uncapture('users');
select fanout.capture('users', 'users', '{insert,update,delete,truncate}');
begin;
update users set name = 'gone in a moment';
truncate users;
insert into users (id, name, email) values (1, 'first after', 'e1');
commit;
insert into users (id, name, email) values (2, 'second after', 'e2');
));
equal('users', $users, 'name', 'copy.users', 'full_name', 'TRUNCATE, and what came after it');

# Never something older

my @delivered;    # message ids
deliver('users', 'u', '1', 1, { id => 1, name => 'older', email => 'older' });
deliver('users', 'd', '2', 1, { id => 2 });
deliver('users', 'c', '77', 1, { id => 77, name => 'before the TRUNCATE' });
deliver('users', 't', undef, 1, undef);
applied(4);
equal('users', $users, 'name', 'copy.users', 'full_name',
	'what is older than what was applied, or than a TRUNCATE, changes nothing');
cmp_ok(b(q(select stale from fanout.stat_subscriptions where topic = 'users')), '>', 0, 'and is counted');
is(b(q(select ok from fanout.check() where item ~ 'gets newer messages')), 'f', 'so that check() tells of a sequence that went back');
a(q(delete from users where id = 2));
equal('users', $users, 'name', 'copy.users', 'full_name', 'a delete');
deliver('users', 'u', '2', 1, { id => 2, name => 'risen', email => 'older' });
applied(1);
equal('users', $users, 'name', 'copy.users', 'full_name', 'a deleted row is not brought back');
my $sequence = a(q(select max(id) from fanout.outbox));
a(q(insert into users (id, name, email) values (3, 'younger', 'e3')));
equal('users', $users, 'name', 'copy.users', 'full_name', 'a row');
deliver('users', 't', undef, $sequence, undef);
applied(1);
is(b(q(select string_agg(id::text, ',') from copy.users)),
	'3', 'a TRUNCATE that comes late leaves what is younger');
# Not before: applied() looks for its messages in the inbox.
$node->append_conf('postgresql.conf', 'pg_fanout.inbox_retention = 1s');
$node->reload;
PgFanout::poll(
	sub {
		b('select count(*) from fanout.sync_row where deleted_at is not null') == 0;
	},
	'an end of deleted rows');
pass('deleted rows are forgotten after the retention');
$node->append_conf('postgresql.conf', 'pg_fanout.inbox_retention = 1d');
$node->reload;

# A message that fails is given up, corrected, and redriven too late

a(q(
create table orders (part int, no text, amount int, primary key (part, no));
select fanout.declare_topic('orders', format => 'row');
select fanout.declare_binding('orders', 'b');
select fanout.capture('orders', 'orders');
));
app(q(
create table copy.orders (part int, no text, amount int check (amount > 0), primary key (part, no));
select fanout.sync_table('orders', 'b', 'copy.orders', max_attempts => 1);
));
a(q(
insert into orders select i % 3, 'n"' || i, i from generate_series(1, 100) i;
update orders set amount = -1 where no = 'n"50';
update orders set part = 9, no = no || 'x' where no like '%7';
));
PgFanout::poll(sub { b('select count(*) from fanout.dead_letter') == 1 },
	'a dead letter');
like(b('select reason from fanout.dead_letter'),
	qr/violates check constraint/, 'a message that the table refuses is given up');
a(q(update orders set amount = 51 where no = 'n"50'));
equal('orders', '%s, no, amount', 'part', 'copy.orders', 'part',
	'format row, a key of two columns that changes; a newer message mends the row');
b('select fanout.redrive()');
PgFanout::poll(sub { b('select count(*) from fanout.dead_letter') == 0 },
	'no dead letter');
equal('orders', '%s, no, amount', 'part', 'copy.orders', 'part',
	'a dead letter that is redriven is not written over something newer');

# CloudEvents, a key other than the primary key, a partitioned table

a(q(
create table events (id int primary key, kind text);
select fanout.declare_topic('events', format => 'cloudevents');
select fanout.declare_binding('events', 'b');
select fanout.capture('events', 'events');
));
app(q(
create table copy.events (local_id serial, id int not null, kind text, unique (id)) partition by range (id);
create table copy.events_1 partition of copy.events for values from (0) to (50);
create table copy.events_2 partition of copy.events for values from (50) to (1000);
select fanout.sync_table('events', 'b', 'copy.events', key => '{id}');
));
a(q(
insert into events select i, 'k' || i from generate_series(1, 99) i;
update events set kind = 'changed' where id < 20;
delete from events where id > 90;
));
equal('events', 'id, %s', 'kind', 'copy.events', 'kind', 'CloudEvents into a partitioned table');

# What cannot be applied says why

app(q(
create table copy.strict (id int primary key, name text);
select fanout.sync_table('strict', 'b', 'copy.strict', max_attempts => 1)));
PgFanout::poll(
	sub {
		b(q(select state = 'idle' from fanout.stat_subscriptions where topic = 'strict')) eq 't';
	},
	'the subscription of strict');
strict('{"id": 1}', sequence => 1, key => undef);
strict('{"id": 1}', sequence => undef);
strict('{"id": 1}', sequence => 1, format => undef);
strict('{"id": 1}', sequence => 1, format => 'avro');
strict('[1]', sequence => 1);
strict('{"id": 1', sequence => 1);
strict('{"name": 1}', sequence => 1);
strict('{"id": null}', sequence => 1);
strict('{"id": "x"}', sequence => 1, key => 'x');
strict('{"id": 2, "name": "other key"}', sequence => 1);
strict('{"id": 1}', sequence => 1, op => 'x');
strict('{"id": 1, "name": "good"}', sequence => 2);
strict('{"id": 1, "name": "no change"}', sequence => 3, op => undef);
strict('{"id": 1, "name": "another table"}', sequence => 4, table => 'lax');
PgFanout::poll(
	sub {
		b(q(select ignored from fanout.stat_subscriptions where topic = 'strict')) == 2
		  && b(q(select count(*) from fanout.dead_letter where topic = 'strict')) == 11;
	},
	'dead letters');
is(b(q(select name from copy.strict)), 'good', 'the message that can be applied is; those of another table, and what is no captured change, are ignored');
is(b(q(select source from fanout.subscriptions where topic = 'strict')), 'public.strict', 'the table of the first one is the source');
is( b(q(select string_agg(sqlstate || ' ' || split_part(reason, E'\n', 1), E'\n' order by sqlstate || ' ' || split_part(reason, E'\n', 1)) from fanout.dead_letter where topic = 'strict')),
	q(22023 message cannot be applied: it has no header "format"
22023 message cannot be applied: it has no header "key"
22023 message cannot be applied: it has no header "sequence"
22023 message cannot be applied: its body has no row
22023 message cannot be applied: its body has no row
22023 message cannot be applied: its format "avro" is not known
22023 message cannot be applied: its header "op" is "x"
22023 message cannot be applied: its key is not made of the columns of the table's key
22023 message cannot be applied: its key is not made of the columns of the table's key
22023 message cannot be applied: its row has no column "id"
22P02 invalid input syntax for type integer: "x"),
	'the others say why not');

done_testing();

sub a
{
	my ($sql) = @_;

	return $node->safe_psql('postgres', $sql);
}

sub b
{
	my ($sql) = @_;

	return $node->safe_psql('b', $sql);
}

# As the role that subscribes.
sub app
{
	my ($sql) = @_;

	return $node->safe_psql('b', $sql, extra_params => [ '-U', 'app' ]);
}

# Waits until the copy is equal to the table, row by row.  In the lists of
# columns, %s is the one that has two names.
sub equal
{
	my ($table, $columns, $theirs, $copy, $ours, $name, $where) = @_;
	my $list = 'select md5(row(%s)::text) from %s %s order by 1';
	my ($there, $here);

	$where ||= '';
	PgFanout::flush($node);
	$there = a(sprintf($list, sprintf($columns, $theirs), $table, $where));
	eval {
		PgFanout::poll(sub { $here = b(sprintf($list, sprintf($columns, $ours), $copy, $where)); return $here eq $there; }, $name);
	};
	ok($here eq $there, "$name: equal")
	  or diag(b('select * from fanout.stat_subscriptions'), "\n",
		b('select * from fanout.delivery_failure limit 3'));
	return;
}

# A message as pg_fanout would send it, straight into the queue.
sub deliver
{
	my ($topic, $op, $key, $sequence, $row) = @_;
	my $json = JSON::XS->new;
	my %headers = (
		op => $op, schema => 'public', table => $topic, format => 'debezium', sequence => $sequence + 0);
	my %body = (
		before => $op eq 'd' ? $row : undef,
		after => $op eq 'd' ? undef : $row,
		source => { connector => 'pg_fanout' },
		op => $op);

	$headers{key} = $key if defined $key;
	push @delivered, a('select gen_random_uuid()');
	$broker->amqp(
		'publish', '--routing-key', "${topic}_b",
		'--headers', $json->encode(\%headers),
		'--message-id', $delivered[-1],
		$json->encode(\%body));
	return;
}

# A message as somebody may make it; undef: without that header.
sub strict
{
	my ($body, %given) = @_;
	my %headers = (op => 'c', schema => 'public', table => 'strict', format => 'row', key => '1', %given);

	delete @headers{ grep { !defined $headers{$_} } keys %headers };
	$broker->amqp('publish', '--routing-key', 'strict_b', '--headers', JSON::XS->new->encode(\%headers), $body);
	return;
}

# Waits until all that deliver() has put into the queue since the last call has been
# applied, and is counted.
sub applied
{
	my ($count) = @_;
	my $ids = join(',', splice(@delivered));

	PgFanout::poll(
		sub {
			b("select count(*) from fanout.inbox where message_id = any ('{$ids}')") == $count
			  && b(q(select delivered = applied + skipped from fanout.stat_subscriptions where topic = 'users')) eq 't';
		},
		"$count messages");
	return;
}
