# fanout.compare() with repair, where the table refuses rows: rows that need each other, in
# one table or two, within a range of keys or across ranges, whose constraints are deferred
# or not; values of another unique index; a trigger that raises an error.  Each costs itself
# alone, and what can be mended in any order is.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster_with_copy($broker);

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub copy { return $node->safe_psql('copy', $_[0]); }

# A table and its copy, of the same definition.
sub replicate
{
	my ($table, $columns) = @_;

	sql("create table $table ($columns); select fanout.declare_binding('$table', 'k'), fanout.capture('$table', '$table')");
	copy("create table $table ($columns); select fanout.sync_table('$table', 'k', '$table', retry_delay => '50 ms', max_retry_delay => '200 ms', max_attempts => 4)");
	return;
}

sub settled
{
	my ($topic) = @_;

	PgFanout::flush($node);
	PgFanout::poll(sub { $broker->left("${topic}_k") == 0 }, "the queue of $topic is empty");
	$node->poll_query_until('copy', "select waiting = 0 and state = 'idle' from fanout.stat_subscriptions where topic = '$topic'") or die "$topic is not idle";
	return;
}

# What is written there does not come to the copy.
sub unnoticed
{
	sql("set session_replication_role = replica; $_[0]");
	return;
}

sub begun { return sql("select fanout.compare('$_[0]', '$_[0]', 'k'" . ($_[1] ? ', true)' : ')')); }

# What the copy says of a run, once it has counted all of it, or is in such a state.
sub result
{
	my ($run, $topic, $state) = @_;
	my $where = "run = $run and topic = '$topic'";

	$node->poll_query_until('copy', "select count(*) = 1 from fanout.sync_comparisons where $where and " .
		($state ? "state = '$state'" : q(state in ('equal', 'different'))))
	  or die "run $run of $topic: " . copy("select * from fanout.sync_comparisons where $where") . copy('select topic, error from fanout.delivery_failure');
	return copy(qq(select state || ': ' || compared || ' compared, ' || left_out || ' left out, ' || missing || ' missing, ' ||
		different || ' different, ' || extra || ' extra, ' || mended || ' mended' from fanout.sync_comparisons where $where));
}

sub listed
{
	my ($run, $topic) = @_;

	return copy("select count(*) || ' ' || count(distinct (kind, key)) || ' ' || count(*) filter (where mended) from fanout.sync_differences where run = $run and topic = '$topic'");
}

sub is_equal
{
	my ($name, @topics) = @_;

	foreach my $topic (@topics)
	{
		like(result(begun($topic), $topic), qr/^equal: \d+ compared, 0 left out/, "$name: $topic is equal afterwards");
	}
	return;
}

# ---- rows of one table that refer to each other ----

foreach my $deferred ('', ' deferrable initially deferred')
{
	my $t = $deferred ? 'tree_deferred' : 'tree';
	my $name = $deferred ? 'deferred' : 'immediate';

	# in the order of keys each comes before the one it needs, and the last ones need the first
	replicate($t, "id int primary key, parent int references $t$deferred, x int");
	unnoticed("insert into $t select i, case when i < 3000 then i + 1 end, 0 from generate_series(1, 10) i;
		insert into $t select i, null, 0 from generate_series(11, 3000) i;
		update $t set parent = 3000 where id = 12; update $t set parent = 13 where id = 2999; update $t set parent = 2998 where id = 13");
	my $run = begun($t, 1);
	is(result($run, $t), 'different: 3000 compared, 0 left out, 3000 missing, 0 different, 0 extra, 3000 mended',
		"$name: rows that are missing come, whichever of them needs another one");
	is(listed($run, $t), '3000 3000 3000', "$name: each is listed once");
	is_equal($name, $t);

	unnoticed("delete from $t");
	$run = begun($t, 1);
	is(result($run, $t), 'different: 3000 compared, 0 left out, 0 missing, 0 different, 3000 extra, 3000 mended',
		"$name: and rows that are too many go");
	is(listed($run, $t), '3000 3000 3000', "$name: each is listed once");
}

# ---- rows of two tables that wait for each other ----

foreach my $deferred ('', ' deferrable initially deferred')
{
	my ($p, $c) = $deferred ? ('dp', 'dc') : ('p', 'c');
	my $name = $deferred ? 'two tables, deferred' : 'two tables';

	replicate($p, 'id int primary key, x int');
	replicate($c, "id int primary key, parent int references $p$deferred, x int");
	sql("insert into $p select i, 0 from generate_series(1, 20) i; insert into $c select i, i, 0 from generate_series(1, 20) i");
	settled($_) foreach $p, $c;
	unnoticed("delete from $c where id = 6; delete from $p where id = 6; insert into $p values (100, 0); insert into $c values (100, 100, 0); update $c set parent = 100 where id = 7;
		update $p set x = 1 where id = 8; update $c set x = 1 where id = 8");
	copy("update $c set parent = 6 where id = 9");
	my %runs = map { $_ => begun($_, 1) } $p, $c;
	is(result($runs{$p}, $p), 'different: 21 compared, 0 left out, 1 missing, 1 different, 1 extra, 3 mended', "$name: a row goes once nothing refers to it");
	is(result($runs{$c}, $c), 'different: 21 compared, 0 left out, 1 missing, 3 different, 1 extra, 5 mended', "$name: and one that refers to a new one comes");
	is(listed($runs{$p}, $p) . ', ' . listed($runs{$c}, $c), '3 3 3, 5 5 5', "$name: each is listed once");
	is_equal($name, $p, $c);
}

# ---- values of another unique index ----

replicate('codes', 'id int primary key, code text unique');
sql(q(insert into codes select i, 'c' || i from generate_series(1, 10) i));
settled('codes');
unnoticed(q(update codes set code = 'new' where id = 1; update codes set code = 'c1' where id = 2; update codes set code = 'c2' where id = 3; update codes set code = 'x' where id = 10));
is(result(begun('codes', 1), 'codes'), 'different: 10 compared, 0 left out, 0 missing, 4 different, 0 extra, 4 mended', 'values that move on are mended, in whatever order');
copy(q(select fanout.alter_subscription('codes', 'k', max_attempts => 1000)));
unnoticed(q(update codes set code = 'c7!' where id = 6; update codes set code = 'c6' where id = 7; update codes set code = 'c7' where id = 6; update codes set code = 'y' where id = 10));
my $run = begun('codes', 1);
$node->poll_query_until('copy', q(select count(*) = 1 from fanout.delivery_failure where topic = 'codes' and attempts >= 2)) or die 'nothing is refused';
is(copy('select code from codes where id = 10'), 'y', 'two that have changed places cost no other row');
like(copy(q(select error from fanout.delivery_failure where topic = 'codes')), qr/duplicate key.*codes_code_key/, 'and the error is shown');
copy(q(delete from codes where id = 6; select fanout.retry('codes', 'k')));
is(result($run, 'codes'), 'different: 10 compared, 0 left out, 1 missing, 2 different, 0 extra, 3 mended', 'once one of them is gone, it is mended');
is_equal('unique', 'codes');

# ---- a row that nothing but a repair removes keeps all others waiting ----

replicate('stuck', 'id numeric primary key, x int');
copy(q(select fanout.alter_subscription('stuck', 'k', max_attempts => 1000)));
sql('insert into stuck select i, 0 from generate_series(1, 10) i');
settled('stuck');
unnoticed('delete from stuck where id = 3');
sql('update stuck set id = 3.0 where id = 4; truncate stuck; insert into stuck select i, 1 from generate_series(5, 20) i');
$node->poll_query_until('copy', q(select waiting = 18 from fanout.stat_subscriptions where topic = 'stuck')) or die 'nothing waits';
like(result(begun('stuck'), 'stuck'), qr/^equal: 0 compared, 16 left out/, 'while a TRUNCATE waits a comparison says nothing');
$run = begun('stuck', 1);
like(result($run, 'stuck'), qr/^different: .* [1-9]\d* extra/, 'but a repair does not wait for it');
$node->poll_query_until('copy', q(select waiting = 0 and applied > 20 from fanout.stat_subscriptions where topic = 'stuck')) or die 'what waited is not applied';
is(copy('select count(*), sum(x), min(id) from stuck'), '16|16|5', 'and what waited behind the row is applied');
is_equal('stuck', 'stuck');

# ---- what a trigger refuses, and what one leaves out ----

replicate('picky', 'id int primary key, x int');
copy(q(
create function picky() returns trigger language plpgsql as $$ begin
	if new.x = 13 then raise 'not this one'; end if;
	if new.x = 14 then return null; end if;
	return new;
end $$;
create trigger picky before insert or update on picky for each row execute function picky()));
unnoticed('insert into picky select i, i from generate_series(1, 20) i');
$run = begun('picky', 1);
$node->poll_query_until('copy', q(select count(*) = 1 from fanout.dead_letter where topic = 'picky')) or die 'no dead letter';
is(copy('select count(*) from picky'), '18', 'all rows but those that a trigger refuses or leaves out are there');
like(copy(q(select reason from fanout.dead_letter where topic = 'picky')), qr/not this one/, 'the message becomes a dead letter, which says why');
like(result($run, 'picky', 'incomplete'), qr/18 missing, 0 different, 0 extra, 18 mended/, 'and the comparison is incomplete');
copy(q(drop trigger picky on picky; select fanout.redrive('picky')));
$node->poll_query_until('copy', 'select count(*) = 20 from picky') or die 'not redriven';
is_equal('redriven', 'picky');

# ---- changes meanwhile ----

replicate('live', 'id int primary key, parent int, x int');
copy(q(create table needed (id int primary key); alter table live add foreign key (parent) references needed));
unnoticed('insert into live select i, case when i = 5 then 1 end, 0 from generate_series(1, 10) i');
$run = begun('live', 1);
$node->poll_query_until('copy', q(select count(*) = 1 from fanout.delivery_failure where topic = 'live')) or die 'nothing waits';
sql('update live set parent = null, x = 3 where id = 5');
PgFanout::poll(sub { copy('select sum(x) from live') eq '3' }, 'changes are applied while the rest of a range waits');
is(result($run, 'live'), 'different: 9 compared, 1 left out, 9 missing, 0 different, 0 extra, 9 mended', 'the row that has changed meanwhile is left out');
is_equal('live', 'live');

done_testing();
