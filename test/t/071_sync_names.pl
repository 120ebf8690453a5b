# sync_table() goes on with the table, columns and types that it was given, whatever
# becomes of their names; what keeps it from writing stops it, and uses up nobody's
# attempts; and what a copy lacks is told.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
autovacuum = off
log_statement = none
max_worker_processes = 60
pg_fanout.max_subscriptions = 40
));

# Names of the table

copied('renamed', 'id int primary key, x int', '', 'max_attempts => 1');
sql('insert into renamed values (1, 1)');
equal('renamed', 'renamed_copy', 'a table');
sql('alter table renamed_copy rename to other_name; update renamed set x = 2');
equal('renamed', 'other_name', 'it was renamed');
sql('create schema elsewhere; alter table other_name set schema elsewhere; update renamed set x = 3');
equal('renamed', 'elsewhere.other_name', 'it was moved to another schema');
sql('alter schema elsewhere rename to anywhere; create schema elsewhere; create table elsewhere.other_name (like renamed including all); update renamed set x = 4');
equal('renamed', 'anywhere.other_name', 'the schema was renamed, and another took its name');
is(sql('select count(*) from elsewhere.other_name'), 0, 'what is in that one stays');
sql('begin; alter table anywhere.other_name rename to old_name; create table anywhere.other_name (like renamed including all); commit; update renamed set x = 5; insert into renamed values (2, 5)');
equal('renamed', 'anywhere.old_name', 'another table took its name');
is(sql('select count(*) from anywhere.other_name'), 0, 'which stays as it is');
is(sql(q(select target from fanout.subscriptions where topic = 'renamed')), 'anywhere.old_name', 'the view says which it is');
sql('grant usage on schema anywhere to pg_database_owner; alter table anywhere.old_name owner to pg_database_owner; update renamed set x = 6');
equal('renamed', 'anywhere.old_name', 'it got another owner');
is(stat_of('renamed', 'failed'), 0, 'nothing failed meanwhile');

# Names of columns and types

sql(q(
create type mood as enum ('sad', 'glad');
create domain positive as int check (value > 0);
create type pair as (a int, b text);
create table wide (id int primary key, name text, m mood, p positive, q pair, gone int, mail text);
create table wide_copy (id int primary key, full_name text, name text default 'local', m mood, p positive, q pair, gone int, mail text);
select fanout.declare_binding('wide', 'g');
select fanout.capture('wide', 'wide');
select fanout.sync_table('wide', 'g', 'wide_copy', columns => '{"name": "full_name"}');
insert into wide values (1, 'Ann', 'sad', 1, '(1,x)', 7, 'a@b');
));
wide('full_name', 'id', 'a column that is mapped while another has its name');
is(sql('select name from wide_copy'), 'local', 'and that other one stays the copy\'s own');
sql(q(
alter table wide_copy rename full_name to whole_name;
alter table wide_copy rename id to number;
alter table wide_copy rename mail to post;
alter type mood rename to temper;
alter domain positive rename to above_zero; alter type pair rename to couple; create schema types; alter type couple set schema types;
update wide set name = 'Bob', m = 'glad', p = 2, q = '(2,y)', mail = 'b@c'));
wide('whole_name', 'number', 'columns and types were renamed here', 'post');
is(sql(q(select key::text || ' ' || columns::text from fanout.subscriptions where topic = 'wide')),
	'{number} {"name": "whole_name"}', 'the view shows their names');
sql(q(alter table wide_copy rename post to e_mail; alter table wide rename mail to e_mail; update wide set e_mail = 'c@d'));
PgFanout::poll(sub { sql('select e_mail from wide_copy') eq 'c@d' }, 'a column that was renamed at both ends');
pass('a column may be renamed at both ends');
is(missing('wide'), '{} {}', 'nothing is ignored, nothing missing');
sql(q(alter table wide rename gone to went; update wide set went = 8));
PgFanout::poll(sub { missing('wide') eq '{went} {gone}' }, 'the columns that are missing');
pass('a column that was renamed at the source alone is shown as ignored, and as missing');
sql(q(alter table wide_copy rename gone to went; update wide set went = 9));
PgFanout::poll(sub { sql('select went from wide_copy') eq '9' && missing('wide') eq '{} {}' }, 'the renamed column');
pass('until it is renamed here, too');
sql(q(alter table wide_copy drop column went; update wide set name = 'Cy'));
PgFanout::poll(sub { missing('wide') eq '{went} {}' }, 'the dropped column');
is(sql('select whole_name from wide_copy'), 'Cy', 'a column that is dropped here is ignored');
sql(q(alter table wide drop column went; update wide set name = 'Di'));
PgFanout::poll(sub { missing('wide') eq '{} {}' }, 'no column');
is(stat_of('wide', 'failed'), 0, 'nothing failed meanwhile');

# Statements name the type of a key whose equal values may look different.  They are read again
# when all plans are invalid, as after CREATE FOREIGN DATA WRAPPER.

sql('create extension citext');
copied('inexact', 'k citext primary key, x int', '', 'max_attempts => 1');
sql(q(insert into inexact values ('a', 1); update inexact set x = 2));
equal('inexact', 'inexact_copy', 'a key of citext');
sql(q(alter type citext rename to ci; create foreign data wrapper one; update inexact set x = 3));
equal('inexact', 'inexact_copy', 'its type was renamed');
sql(q(create schema moved; alter extension citext set schema moved; create foreign data wrapper two; update inexact set x = 4, k = 'A'));
equal('inexact', 'inexact_copy', 'its extension was moved to another schema');
sql(q(alter schema moved rename to moved_again; create foreign data wrapper three; update inexact set x = 5; insert into inexact values ('b', 1)));
equal('inexact', 'inexact_copy', 'that schema was renamed');
is(stat_of('inexact', 'failed'), 0, 'nothing failed meanwhile');

copied('strict', 'id int primary key, x int', '', q(unknown_columns => 'error', max_attempts => 2, retry_delay => '100 ms'));
sql('insert into strict values (1, 1)');
equal('strict', 'strict_copy', 'a copy that takes no unknown columns');
sql('alter table strict add more int; update strict set more = 1');
PgFanout::poll(sub { dead('strict') == 1 }, 'a dead letter');
like(sql(q(select sqlstate || reason from fanout.dead_letter where topic = 'strict')), qr/^42703.*has no column for "more"/, 'refuses a message that has one');
sql('alter table strict_copy add more int; select fanout.redrive()');
equal('strict', 'strict_copy', 'until there is one');
sql(q(select fanout.pause('strict', 'g'); alter table strict_copy rename x to y; insert into strict values (2, 7)));
sql(q(alter table strict rename x to y; alter table strict add yet_more int; update strict set y = 8 where id = 1; select fanout.flush(); select fanout.resume('strict', 'g')));
PgFanout::poll(sub { dead('strict') >= 1 }, 'a dead letter');
is(sql('select y from strict_copy where id = 2'), 7, 'a message from before a column was renamed is applied, whatever became of one from after');
sql('alter table strict_copy add yet_more int; select fanout.redrive()');
equal('strict', 'strict_copy', 'and both in the end');

# What keeps the table from being written

copied('stopped', 'id int primary key, x int', '', q(max_attempts => 1));
sql('insert into stopped values (0, 0)');
equal('stopped', 'stopped_copy', 'a table');
my $n = 0;
foreach my $case (
	[ 'alter table stopped_copy drop constraint stopped_copy_pkey', qr/no unique index/, 'alter table stopped_copy add primary key (id)', 'its primary key dropped' ],
	[ 'alter table stopped_copy set unlogged', qr/is unlogged/, 'alter table stopped_copy set logged', 'made unlogged' ],
	[ 'alter table stopped_copy add unique (x) deferrable', qr/unique and deferrable/, 'alter table stopped_copy drop constraint stopped_copy_x_key', 'with a unique constraint that is deferrable' ],
	[ 'create role somebody; grant usage on schema public to somebody; alter table stopped_copy owner to somebody; alter table stopped_copy enable row level security, force row level security', qr/row security applies/, 'alter table stopped_copy disable row level security', 'with row security for its owner' ],
	[ 'revoke insert on stopped_copy from somebody', qr/lacks INSERT/, 'grant insert on stopped_copy to somebody', 'its owner without rights' ],
	[ 'alter table stopped_copy drop column id', qr/no unique index/, undef, 'its key column dropped' ])
{
	my ($break, $reason, $mend, $name) = @$case;

	sql($break);
	sql("insert into stopped values (" . ++$n . ", $n)");
	PgFanout::poll(sub { stat_of('stopped', 'state') eq 'refused' }, 'the state refused');
	PgFanout::flush($node);
	like(stat_of('stopped', 'last_error'), $reason, "a table, $name, is not written");
	like(sql(q(select detail from fanout.check() where not ok and item like 'subscription%')), $reason, 'check() says so, too');
	is(stat_of('stopped', 'failed + dead'), 0, 'and no attempt is counted');
	next unless defined $mend;
	sql($mend);
	equal('stopped', 'stopped_copy', 'it goes on when that is put right');
}
sql('drop table stopped_copy; insert into stopped values (100, 100)');
PgFanout::poll(sub { stat_of('stopped', 'last_error') =~ /does not exist any more/ }, 'the reason');
is(stat_of('stopped', 'failed + dead'), 0, 'nor if the table is dropped');
sql(q(create table stopped_copy (id int primary key, x int);
begin; select fanout.unsubscribe('stopped', 'g'); select fanout.sync_table('stopped', 'g', 'stopped_copy'); commit));
PgFanout::poll(sub { sql('select max(id) from stopped_copy') eq '100' }, 'the rows that waited');
is(sql('select count(*) from stopped_copy'), 2, 'messages that waited are applied to another table');

# TRUNCATE

foreach my $case (
	[ 'plain', '', 'a table that nothing hangs on' ],
	[ 'referred', 'create table child (id int references referred_copy on delete set null); insert into child values (1)', 'a table that another one refers to' ],
	[ 'watched', q(create function look() returns trigger language plpgsql as 'begin return old; end'; create trigger look before delete on watched_copy for each row execute function look()), 'a table with a trigger that looks at deleted rows' ])
{
	my ($table, $more, $name) = @$case;

	copied($table, 'id int primary key, x int', q(, operations => '{insert,update,delete,truncate}'), q(handler_timeout => '2 s', prefetch => 1000));
	sql("insert into $table select i, i from generate_series(1, 3000) i");
	equal($table, "${table}_copy", $name);
	sql($more) if $more;
	my $node_before = sql("select pg_relation_filenode('${table}_copy')");
	sql("truncate $table; insert into $table values (1, 5)");
	equal($table, "${table}_copy", "$name: after TRUNCATE");
	is(sql("select pg_relation_filenode('${table}_copy')") ne $node_before ? 'truncated' : 'deleted',
		$more ? 'deleted' : 'truncated', 'rows are removed as they have to be');
	is(sql(qq(select count(*) from fanout.sync_row join fanout.subscription s using (subscription_id) where s.topic = '$table')), 1,
		'nothing is remembered of rows that are gone');
}
is(sql('select count(*) from child where id is null'), 1, 'what refers to a deleted row is told');

# More rows than can be deleted within the time that a handler has, by pieces that can

copied('slow', 'id int primary key, x int', q(, operations => '{insert,update,delete,truncate}'), q(handler_timeout => '15 s', max_attempts => 1, prefetch => 5000));
sql(q(insert into slow select i, i from generate_series(1, 9000) i));
equal('slow', 'slow_copy', 'a table');
# a few long pauses: many short ones take much longer on a busy machine, and so would a piece
sql(q(
create function linger() returns trigger language plpgsql as 'begin if old.id % 100 = 0 then perform pg_sleep(0.18); end if; return old; end';
create trigger linger before delete on slow_copy for each row execute function linger();
truncate slow;
insert into slow values (1, 1);
));
equal('slow', 'slow_copy', 'a TRUNCATE that takes longer than handler_timeout');
is(stat_of('slow', 'failed'), 0, 'does not fail');

done_testing();

sub sql
{
	my ($sql) = @_;

	return $node->safe_psql('postgres', $sql);
}

sub copied
{
	my ($table, $columns, $capture, $sync) = @_;

	sql(qq(
create table $table ($columns);
create table ${table}_copy (like $table including all);
select fanout.declare_binding('$table', 'g');
select fanout.capture('$table', '$table'$capture);
select fanout.sync_table('$table', 'g', '${table}_copy', $sync);
));
	return;
}

sub stat_of
{
	my ($topic, $column) = @_;

	return sql("select $column from fanout.stat_subscriptions where topic = '$topic'");
}

sub dead
{
	my ($topic) = @_;

	return sql("select count(*) from fanout.dead_letter where topic = '$topic' and consumer_group is not null");
}

sub missing
{
	my ($topic) = @_;

	return sql("select ignored_columns::text || ' ' || missing_columns::text from fanout.subscriptions where topic = '$topic'");
}

# The table with all sorts of types, by the names that its columns have here.
sub wide
{
	my ($name, $id, $what, $mail) = @_;

	$mail ||= 'mail';
	return equal('wide', 'wide_copy', $what, 'id, name, m::text, p, q::text, gone, mail', "$id, $name, m::text, p, q::text, gone, $mail");
}

# Waits until the copy is equal to the table.
sub equal
{
	my ($table, $copy, $name, $theirs, $ours) = @_;
	my ($there, $here) = ('', '');

	$theirs ||= '*';
	PgFanout::flush($node);
	# whoever looks at a table keeps it from being truncated
	PgFanout::poll(sub { $broker->left("${table}_g") == 0 }, "$name: an empty queue");
	$there = sql("select $theirs from $table order by 1");
	eval {
		PgFanout::poll(sub { $here = sql('select ' . ($ours || $theirs) . " from $copy order by 1"); return $here eq $there; }, $name);
	};
	ok($here eq $there, "$name: equal")
	  or diag(substr($here, 0, 500), "\n", substr($there, 0, 500), "\n", sql("select * from fanout.stat_subscriptions where topic = '$table'"), "\n",
		sql('select * from fanout.delivery_failure limit 3'), "\n", sql('select topic, reason from fanout.dead_letter limit 3'));
	return;
}
