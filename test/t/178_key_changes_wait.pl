# A change of a key may wait for a parent that is gone by now at the source.  Once later
# messages tell of its row, the row is not written as the change says.  Unless they tell of
# the old key, too, it is still removed from there.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster_with_copy($broker);

source(q(
create table parent (id int primary key);
create table child (id int primary key, parent int references parent, x text);
create table pair (a int, b int, parent int references parent, primary key (a, b));
select fanout.declare_binding(t, 'g'), fanout.capture(t::regclass, t) from unnest('{parent, child, pair}'::text[]) t;
insert into parent values (0);
insert into child select i, 0, 'first' from generate_series(1, 9) i;
insert into pair select i, i, 0 from generate_series(1, 3) i;
));
copy(q(
create table parent (id int primary key);
create table child (id int primary key, parent int references parent, x text);
create table pair (a int, b int, parent int references parent, primary key (a, b));
select fanout.sync_table(t, 'g', t::regclass, max_attempts => 3, retry_delay => '100 ms', max_retry_delay => '200 ms')
	from unnest('{parent, child, pair}'::text[]) t;
));
equal('child', 'first');
equal('pair', 'first');

change('child', 10, 'the key stays', 'update child set parent = 10 where id = 1', q(update child set parent = 0, x = 'later' where id = 1));
change('child', 11, 'a later message of the new key', 'update child set id = 102, parent = 11 where id = 2', q(update child set parent = 0, x = 'later' where id = 102));
change('child', 12, 'changed and back', 'update child set id = 103, parent = 12 where id = 3', q(update child set id = 3, parent = 0, x = 'back' where id = 103));
change('child', 13, 'later messages of both keys', 'update child set id = 104, parent = 13 where id = 4', q(insert into child values (4, 0, 'another')),
	q(update child set parent = 0, x = 'later' where id = 104));
change('child', 14, 'then deleted', 'update child set id = 105, parent = 14 where id = 5', 'delete from child where id = 105');
change('child', 15, 'changed twice', 'update child set id = 106, parent = 15 where id = 6', 'update child set id = 206 where id = 106', q(update child set parent = 0 where id = 206));
change('child', 16, 'and another row comes to the old key', 'update child set id = 107, parent = 16 where id = 7', 'delete from child where id = 107', q(insert into child values (7, 0, 'new')));
change('pair', 17, 'a key of two columns', 'update pair set a = 10, parent = 17 where a = 1', 'delete from pair where a = 10');
change('pair', 18, 'a key of two columns, back', 'update pair set b = 20, parent = 18 where a = 2', 'update pair set b = 2, parent = 0 where a = 2');
is(copy('select coalesce(sum(dead), 0) from fanout.stat_subscriptions'), 0, 'no message was given up');

# the row is still referred to at the copy: it goes when it is not
copy('create table refers (id int references child); insert into refers values (8)');
change('child', 19, undef, 'update child set id = 108, parent = 19 where id = 8', 'delete from child where id = 108');
PgFanout::poll(sub { copy(q(select string_agg(error, ' ') from fanout.waiting)) =~ /refers/ }, 'it waits for what refers to it');
copy('delete from refers');
equal('child', 'the row was referred to');

# not told: the parent may come yet
source('insert into parent values (20)');
copy(q(select fanout.pause('parent', 'g')));
PgFanout::poll(sub { copy(q(select state from fanout.stat_subscriptions where topic = 'parent')) eq 'paused' }, 'the parents are paused');
source('insert into parent values (21)');
source('update child set id = 109, parent = 21 where id = 9');
PgFanout::poll(sub { copy(q(select count(*) from fanout.waiting where sqlstate = '23503')) == 1 }, 'it waits for its parent');
is(copy('select count(*) from child where id = 9'), 1, 'the row is where it was');
copy(q(select fanout.resume('parent', 'g')));
equal('child', 'the parent has come');
done_testing();

sub source
{
	return $node->safe_psql('postgres', $_[0]);
}

sub copy
{
	return $node->safe_psql('copy', $_[0]);
}

sub rows
{
	my ($where, $table) = @_;

	return $where->("select string_agg(t::text, ' ' order by t) from $table t");
}

sub equal
{
	my ($table, $what) = @_;
	my $source = rows(\&source, $table);

	PgFanout::flush($node);
	PgFanout::poll(sub { rows(\&copy, $table) eq $source && copy('select count(*) from fanout.waiting') == 0 },
		sub { "$table: $what" . "\n" . copy(q(select key, headers, attempts, postponed, error from fanout.waiting)) });
	pass("$table: $what");
	return;
}

# Changes a table while its copy is paused, so that the parent comes and goes before.
sub change
{
	my ($table, $parent, $what, @changes) = @_;

	copy(qq(select fanout.pause('$table', 'g')));
	PgFanout::poll(sub { copy("select state from fanout.stat_subscriptions where topic = '$table'") eq 'paused' }, 'paused');
	source($_) foreach "insert into parent values ($parent)", @changes, "delete from parent where id = $parent";
	PgFanout::flush($node);
	PgFanout::poll(sub { rows(\&copy, 'parent') eq rows(\&source, 'parent') && $broker->left('parent_g') == 0 }, 'the parent has come and gone');
	copy(qq(select fanout.resume('$table', 'g')));
	equal($table, $what) if defined $what;
	return;
}
