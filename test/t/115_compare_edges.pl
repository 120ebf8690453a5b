# fanout.compare() where it would be easy to be wrong: keys of several columns, keys
# that are equal and look different, columns that are renamed, messages that wait, a
# subscription that is paused or ended in the middle, two sources of one copy, and rows
# that are written while they are mended.

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
sub compare { return sql("select fanout.compare($_[0])"); }

my $found = q(state || ': ' || compared || ' compared, ' || left_out || ' left out, ' || missing || ' missing, ' ||
	different || ' different, ' || extra || ' extra, ' || mended || ' mended');

# What the copy says of a run, once it is in such a state; by default, at its end.
sub result
{
	my ($run, $topic, $state) = @_;
	my $where = "run = $run and topic = '$topic'";
	my $condition = $state ? "state = '$state'" : 'finished_at is not null';

	$node->poll_query_until('copy', "select count(*) = 1 from fanout.sync_comparisons where $where and $condition")
	  or die "run $run is not " . ($state || 'at its end') . ': ' . copy("select $found from fanout.sync_comparisons where $where");
	return copy("select $found from fanout.sync_comparisons where $where");
}

sub compared
{
	my ($table, $topic, $repair) = @_;

	return result(compare("'$table', '$topic', 'k'" . ($repair ? ', true' : '')), $topic);
}

sub settled
{
	my ($topic) = @_;

	PgFanout::flush($node);
	PgFanout::poll(sub { $broker->left("${topic}_k") == 0 }, 'the queue is empty');
	$node->poll_query_until('copy', "select waiting = 0 and state = 'idle' from fanout.stat_subscriptions where topic = '$topic'") or die 'not idle';
	return;
}

# A table that is captured into a topic of its name, and its copy.
sub replicate
{
	my ($table, $source, $target, $options) = @_;

	sql("create table $table ($source); select fanout.declare_binding('$table', 'k'), fanout.capture('$table', '$table')");
	copy("create table $table ($target); select fanout.sync_table('$table', 'k', '$table'" . ($options || '') . ')');
	return;
}

# ---- keys of several columns, in another order at the copy, and messages that wait ----

replicate('pairs', 'a text, b int, v int, c int default 0, primary key (b, a, c)', 'x text, b bigint, v int, c int, primary key (x, b, c)', q(, columns => '{"a": "x"}'));
sql(q(
select fanout.capture('pairs', 'pairs', key => '{c,a,b}', replace => true);
insert into pairs select 'k' || i, i % 7, 0 from generate_series(1, 50) i));
settled('pairs');
copy('alter table pairs add constraint small check (v < 100)');
sql(q(update pairs set v = 100 where a = 'k8'; delete from pairs where a = 'k9'; insert into pairs values ('new', 1, 100);
	update pairs set a = 'moved', v = 100 where a = 'k10'));
$node->poll_query_until('copy', q(select waiting = 3 from fanout.stat_subscriptions where topic = 'pairs')) or die 'nothing waits';
is(compared('pairs', 'pairs'), 'equal: 47 compared, 4 left out, 0 missing, 0 different, 0 extra, 0 mended',
	'rows whose messages wait are left out, whatever order the columns of the key have');
is(compared('pairs', 'pairs', 1), 'equal: 47 compared, 4 left out, 0 missing, 0 different, 0 extra, 0 mended', 'also by a repair');
copy(q(alter table pairs drop constraint small; select fanout.retry('pairs', 'k')));
settled('pairs');
copy(q(update pairs set v = 7 where x = 'k1'; delete from pairs where x = 'k2'; insert into pairs values ('k2', 1000, 0, 0), ('', -1, 0, 0)));
is(compared('pairs', 'pairs', 1), 'different: 52 compared, 0 left out, 1 missing, 1 different, 2 extra, 4 mended', 'differences are found by all columns of the key');
is(compared('pairs', 'pairs'), 'equal: 50 compared, 0 left out, 0 missing, 0 different, 0 extra, 0 mended', 'and mended');

# ---- messages that begin to wait in the very batch that compares ----

replicate('batch', 'id int primary key, v int', 'id int primary key, v int check (v < 100)');
sql('insert into batch select i, 0 from generate_series(1, 50) i');
settled('batch');
foreach my $repair (0, 1)
{
	copy(q(select fanout.pause('batch', 'k')));
	# 1 and 2 are refused; the others are behind them, and are about rows that nothing waited for before
	sql(q(
update batch set v = 100 where id in (1, 2);
update batch set id = 1000 where id = 1;
delete from batch where id = 2;
insert into batch values (2, 0);
update batch set id = 1001 where id = 2));
	my $run = compare("'batch', 'batch', 'k', " . ($repair ? 'true' : 'false'));

	PgFanout::poll(sub { sql("select state from fanout.backfills where id = $run") eq 'done' }, 'the end of the walk');
	PgFanout::flush($node);
	copy(q(select fanout.resume('batch', 'k')));
	like(result($run, 'batch'), qr/^equal: 48 compared, \d left out, 0 missing, 0 different, 0 extra, 0 mended$/,
		'what begins to wait in the same batch is left out' . ($repair ? ', also by a repair' : ''));
	copy(q(alter table batch drop constraint batch_v_check; select fanout.retry('batch', 'k')));
	settled('batch');
	is(compared('batch', 'batch'), 'equal: 50 compared, 0 left out, 0 missing, 0 different, 0 extra, 0 mended', 'and equal once it is applied');
	sql('update batch set id = id - 999, v = 0 where id > 999');
	settled('batch');
	copy('alter table batch add check (v < 100)');
}

# ---- keys that are equal and look different ----

replicate('looks', 'n numeric primary key, v int', 'n numeric primary key, v int');
replicate('blanks', 'c char(5), i interval, primary key (c, i)', 'c char(5), i interval, primary key (c, i)');
sql(q(insert into looks select round(i / 10.0, 1), i from generate_series(1, 20) i; insert into blanks values ('a', '1 day'), ('b', '30 days')));
settled($_) foreach qw(looks blanks);
is(compared($_, $_) =~ s/:.*//r, 'equal', "keys of $_ are equal") foreach qw(looks blanks);
copy(q(update looks set n = 1.00 where n = 1.0; update blanks set i = '1 mon' where c = 'b'));
is(compared('looks', 'looks', 1), 'different: 21 compared, 0 left out, 1 missing, 0 different, 1 extra, 2 mended', 'a number that looks different is another key');
is(compared('blanks', 'blanks', 1), 'different: 3 compared, 0 left out, 1 missing, 0 different, 1 extra, 2 mended', 'so is an interval');
is(copy(q(select count(*) from looks where n::text ~ '00$')) . copy(q(select i from blanks where c = 'b')), '030 days', 'and they look as they should afterwards');

# ---- columns that are renamed, or that only one of both has ----

replicate('columns', 'id int primary key, a int, b int, c int', 'b int, id int primary key, a int, own int default 5');
sql('insert into columns select i, i, i, i from generate_series(1, 10) i');
settled('columns');
sql('alter table columns rename a to aa; alter table columns rename id to number');
copy('alter table columns rename a to aa; alter table columns rename id to number; alter table columns rename b to other');
sql('update columns set b = 100 where number = 1; update columns set c = 100 where number = 2');
settled('columns');
is(compared('columns', 'columns'), 'equal: 10 compared, 0 left out, 0 missing, 0 different, 0 extra, 0 mended', 'columns may be renamed, and be missing at the copy');
copy('update columns set own = 6, other = 7 where number = 3');
is(compared('columns', 'columns', 1) =~ s/:.*//r . copy(q(select own || ' ' || other from columns where number = 3)), 'different6 3',
	'what has another value is mended, and not what the copy alone has');

replicate('made', 'id int generated always as identity primary key, a int, g int generated always as (a * 2) stored',
	'g int generated always as (a * 3) stored, a int, id int generated always as identity primary key) partition by range (id');
copy('create table made_1 partition of made for values from (1) to (6); create table made_2 partition of made default');
sql('insert into made (a) select i from generate_series(1, 10) i');
settled('made');
is(compared('made', 'made'), 'equal: 10 compared, 0 left out, 0 missing, 0 different, 0 extra, 0 mended', 'what a copy generates is its own, and it may be partitioned');
copy('update made set a = 0 where id = 1; delete from made where id in (2, 8); insert into made (id, a) overriding system value values (100, 0)');
is(compared('made', 'made', 1), 'different: 11 compared, 0 left out, 2 missing, 1 different, 1 extra, 4 mended', 'its differences are found in all partitions');
is(copy('select count(*), sum(a), sum(g) from made'), '10|55|165', 'and mended');

# ---- a change while the rows of a range are read ----

# the source waits at row 1 until the gate is open
my $gate = PgFanout::session($node);
PgFanout::run_in($gate, 'select pg_advisory_lock(1)');
sql(q(create function is_open(id int) returns bool immutable language plpgsql as $$
begin
	while id = 1 and (select backend_type from pg_stat_activity where pid = pg_backend_pid()) = 'pg_fanout history' and not pg_try_advisory_xact_lock_shared(1) loop
		perform pg_sleep(0.01);
	end loop;
	return true;
end $$));
replicate('gated', 'id int primary key, v int', 'id int primary key, v int');
sql(q(select fanout.capture('gated', 'gated', "where" => 'is_open(id)', replace => true); insert into gated select i, 0 from generate_series(1, 3) i));
settled('gated');
my $gated = compare(q('gated', 'gated', 'k'));
PgFanout::poll(sub { sql(q(select count(*) from pg_stat_activity where backend_type = 'pg_fanout history' and wait_event = 'PgSleep')) == 1 }, 'the source to read');
sql('update gated set v = 1 where id = 2');
PgFanout::poll(sub { copy('select v from gated where id = 2') == 1 }, 'the change at the copy');
PgFanout::run_in($gate, 'select pg_advisory_unlock(1)');
is(result($gated, 'gated'), 'equal: 2 compared, 1 left out, 0 missing, 0 different, 0 extra, 0 mended',
	'a row that was changed while it was read is left out');

# ---- a subscription that is paused, or ended in the middle ----

replicate('later', 'id int primary key, v int', 'id int primary key, v int');
sql('insert into later select i, 0 from generate_series(1, 1000) i');
settled('later');
copy(q(select fanout.pause('later', 'k')));
copy('update later set v = 1 where id = 500');
sql('update later set v = 2 where id <= 100');
my $run = compare(q('later', 'later', 'k'));
PgFanout::poll(sub { sql("select state from fanout.backfills where id = $run") eq 'done' }, 'the end of the walk');
sql('update later set v = 3 where id between 50 and 150; delete from later where id = 600');
PgFanout::flush($node);
is(copy("select count(*) from fanout.sync_comparisons where run = $run"), '0', 'nothing is compared while the subscription is paused');
copy(q(select fanout.resume('later', 'k')));
like(result($run, 'later'), qr/^different: \d+ compared, \d+ left out, 0 missing, 1 different, 0 extra, 0 mended$/, 'and then each row as it was when it was sent');
settled('later');

copy(q(select fanout.pause('later', 'k')));
$run = compare(q('later', 'later', 'k', true));
PgFanout::poll(sub { sql("select state from fanout.backfills where id = $run") eq 'done' }, 'the end of the walk');
sql('update later set v = 4 where id between 400 and 600');
PgFanout::flush($node);
copy(q(select fanout.unsubscribe('later', 'k')));
copy(q(select fanout.sync_table('later', 'k', 'later')));
is(result($run, 'later'), 'different: 999 compared, 0 left out, 0 missing, 1 different, 0 extra, 1 mended', 'who subscribes again goes on with a comparison');
settled('later');
my $sum = q(select count(*), sum(v), md5(string_agg(l::text, ',' order by id)) from later l);
is(copy($sum), sql($sum), 'and has the table afterwards');

$run = compare(q('later', 'later', 'k'));
$node->poll_query_until('copy', "select count(*) = 1 from fanout.sync_comparisons where run = $run") or die 'no comparison';
copy(q(
select fanout.unsubscribe('later', 'k');
create table later_2 (id int primary key, v int);
select fanout.sync_table('later', 'k', 'later_2')));
settled('later');
unlike(copy("select coalesce(max(state), 'nothing') from fanout.sync_comparisons where run = $run"), qr/^equal/, 'another table is not taken for equal by a part of a comparison');

# ---- a TRUNCATE that waits ----

replicate('emptied', 'id int primary key', 'id int primary key');
sql('insert into emptied select generate_series(1, 10)');
settled('emptied');
copy(q(
create function refuse() returns trigger language plpgsql as $$ begin raise 'not now'; end $$;
create trigger refuse before delete on emptied for each row execute function refuse()));
sql('truncate emptied');
$node->poll_query_until('copy', q(select waiting = 1 from fanout.stat_subscriptions where topic = 'emptied')) or die 'nothing waits';
is(compared('emptied', 'emptied'), 'equal: 0 compared, 0 left out, 0 missing, 0 different, 0 extra, 0 mended', 'while a TRUNCATE waits, a comparison finds no difference');
copy(q(drop trigger refuse on emptied; select fanout.retry('emptied', 'k')));
settled('emptied');
is(copy('select count(*) from emptied'), '0', 'and then there is none');

# the same rows again, of which no message tells, while a TRUNCATE waits
sql('insert into emptied select generate_series(1, 10)');
settled('emptied');
copy('create table refers (id int references emptied); insert into refers values (1)');
sql('truncate emptied');
$node->poll_query_until('copy', q(select waiting = 1 from fanout.stat_subscriptions where topic = 'emptied')) or die 'nothing waits';
sql('set session_replication_role = replica; insert into emptied select generate_series(1, 10)');
is(compared('emptied', 'emptied', 1), 'equal: 10 compared, 0 left out, 0 missing, 0 different, 0 extra, 0 mended', 'a repair finds them equal');
copy(q(drop table refers; select fanout.retry('emptied', 'k')));
settled('emptied');
is(copy('select count(*) from emptied'), '10', 'and the TRUNCATE leaves them, once it is applied');

# ---- two sources of one copy ----

sql(q(
create table north (id int primary key, v text);
create table south (like north including all);
select fanout.declare_binding(t, 'k'), fanout.capture(t::regclass, t) from unnest('{north,south}'::text[]) t;
insert into north select i, 'n' from generate_series(2, 1000, 2) i;
insert into south select i, 's' from generate_series(1, 1000, 2) i;
));
copy(q(
create table both_of_them (id int primary key, v text);
select fanout.sync_table(t, 'k', 'both_of_them') from unnest('{north,south}'::text[]) t;
));
settled($_) foreach qw(north south);
is(compared('north', 'north', 1), 'equal: 500 compared, 500 left out, 0 missing, 0 different, 0 extra, 0 mended', 'rows of another subscription are left out');
copy(q(update both_of_them set v = 'x' where id <= 20; delete from both_of_them where id between 21 and 40; insert into both_of_them values (0, 'own'), (1001, 'own')));
is(compared('north', 'north', 1) =~ s/ \d+ left out,//r, 'different: 502 compared, 10 missing, 10 different, 2 extra, 22 mended', 'a repair mends what its own source has, and takes away what nobody has');
is(compared('south', 'south', 1), 'different: 500 compared, 500 left out, 10 missing, 10 different, 0 extra, 20 mended', 'that of the other source the rest');
is(copy(q(select string_agg(v || n, ' ' order by v) from (select v, count(*) as n from both_of_them group by v) x)), 'n500 s500', 'and both have their rows');

# a row that the other one writes while the batch waits for another row
my $locker = PgFanout::session($node, 'copy');
PgFanout::run_in($locker, 'begin; select from both_of_them where id = 2 for update');
sql(q(begin; update north set v = 'n2' where id = 2; insert into north values (2001, 'n'); delete from north where id = 1000; commit));
$node->poll_query_until('copy', q(select coalesce(wait_event_type = 'Lock', false) from pg_stat_activity
	where pid = (select pid from fanout.stat_subscriptions where topic = 'north'))) or die 'the north does not wait';
sql(q(insert into south values (2001, 's')));
$node->poll_query_until('copy', 'select exists (select from both_of_them where id = 2001)') or die 'the south has not written';
PgFanout::run_in($locker, 'rollback');
$node->poll_query_until('copy', q(select waiting = 1 from fanout.stat_subscriptions where topic = 'north')) or die 'the north does not refuse its row';
is(copy('select v from both_of_them where id = 2001'), 's', 'a row that another subscription writes meanwhile stays');
like(copy(q(select error from fanout.delivery_failure where topic = 'north')), qr/another subscription has a row of this key/, 'and is refused to the others');
sql('delete from north where id = 2001');
is(copy(q(select fanout.skip('north', 'k', message_id) from fanout.delivery_failure where topic = 'north')), '', 'it is given up');
settled('north');
is(copy('select v from both_of_them where id = 2001'), 's', 'nor is it deleted with that of the others');

# ---- two databases that keep each other's rows ----

my $homes = 'id int, home text, v int, primary key (home, id)';
sql("create table homes ($homes); select fanout.declare_binding('homes_a', 'k'), fanout.capture('homes', 'homes_a', \"where\" => \$\$home = 'a'\$\$)");
copy("create table homes ($homes); select fanout.sync_table('homes_a', 'k', 'homes'), fanout.declare_binding('homes_b', 'k'),
	fanout.capture('homes', 'homes_b', \"where\" => \$\$home = 'b'\$\$)");
sql(q(select fanout.sync_table('homes_b', 'k', 'homes'); insert into homes select i, 'a', 0 from generate_series(1, 10) i));
copy(q(insert into homes select i, 'b', 0 from generate_series(1, 10) i));
settled('homes_a');
is(compared('homes', 'homes_a', 1), 'equal: 10 compared, 10 left out, 0 missing, 0 different, 0 extra, 0 mended', 'rows that were made at a copy whose changes are captured are its own');
copy(q(set session_replication_role = replica; update homes set v = 1 where id = 1 and home = 'a'; delete from homes where id = 2 and home = 'a'));
sql(q(set session_replication_role = replica; delete from homes where id = 3 and home = 'a'));
is(compared('homes', 'homes_a', 1), 'different: 10 compared, 10 left out, 1 missing, 1 different, 1 extra, 3 mended', 'others are mended');

# ---- rows that are written while they are mended ----

replicate('locked', 'id int primary key, v int', 'id int primary key, v int');
sql('insert into locked select i, 0 from generate_series(1, 20) i');
settled('locked');
copy('update locked set v = -1 where id in (5, 6); insert into locked values (100, -1)');
my $session = PgFanout::session($node);
PgFanout::run_in($session, 'begin; update locked set v = 1 where id = 5; insert into locked values (100, 1)');
$run = compare(q('locked', 'locked', 'k', true));
PgFanout::poll(sub { sql("select error is not null from fanout.backfills where id = $run") eq 't' }, 'a lock in the way');
PgFanout::run_in($session, 'commit');
like(result($run, 'locked'), qr/^different: .* 0 missing, [12] different, [01] extra/, 'a repair waits for a transaction that has changed a row');
settled('locked');
is(copy('select string_agg(id || \'=\' || v, \' \' order by id) from locked where v <> 0'), '5=1 100=1', 'and puts nothing older over what it has changed');

# an insert cannot be waited for: it comes later, with a lower sequence than the repair
copy('insert into locked values (200, -1)');
PgFanout::run_in($session, 'begin; insert into locked values (200, 1)');
is(compared('locked', 'locked', 1) =~ s/:.*//r, 'different', 'a row too many is taken away');
PgFanout::run_in($session, 'commit');
settled('locked');
is(copy('select v from locked where id = 200'), '1', 'and comes again when the source inserts it, though that began before');

# ---- what the copy refuses ----

replicate('names', 'id int primary key, name text unique', 'id int primary key, name text unique');
sql(q(insert into names select i, 'n' || i from generate_series(1, 1000) i));
settled('names');
copy(q(update names set name = 'x' where id = 1; update names set name = 'n1' where id = 2; update names set name = 'n2' where id = 1; update names set name = 'z' where id = 900));
$run = compare(q('names', 'names', 'k', true));
result($run, 'names');
$node->poll_query_until('copy', "select state = 'incomplete' and different = 1 and mended = 1 from fanout.sync_comparisons where run = $run")
  or die copy("select $found from fanout.sync_comparisons where run = $run");
pass('a range that cannot be mended waits, and the others are');
like(copy(q(select error from fanout.delivery_failure where topic = 'names')), qr/names_name_key/, 'the view of failures says why');
copy(q(delete from names where id = 1; select fanout.retry('names', 'k')));
is(result($run, 'names', 'different') =~ s/ \d+ compared, 0 left out,//r, 'different: 1 missing, 2 different, 0 extra, 3 mended', 'it is mended when somebody has put the copy right');
is(compared('names', 'names'), 'equal: 1000 compared, 0 left out, 0 missing, 0 different, 0 extra, 0 mended', 'and is equal then');

done_testing();
