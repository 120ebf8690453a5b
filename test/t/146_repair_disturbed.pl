# fanout.compare() with repair, disturbed in the middle of writing rows: cancelled, or kept by
# locks until its time is over, at once and row by row.  It is tried again, and neither it nor
# any message after it is lost.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster_with_copy($broker);

sub source { return $node->safe_psql('postgres', $_[0]); }
sub copy { return $node->safe_psql('copy', $_[0]); }

# What is written there does not come to the copy.
sub unnoticed
{
	source("set session_replication_role = replica; $_[0]");
	return;
}

sub replicate
{
	my ($table) = @_;

	source("create table $table (id int primary key, x int unique); select fanout.declare_binding('$table', 'k'), fanout.capture('$table', '$table')");
	copy("create table $table (id int primary key, x int unique); select fanout.sync_table('$table', 'k', '$table',
		retry_delay => '50 ms', max_retry_delay => '200 ms', handler_timeout => '2 s', max_attempts => 1000)");
	source("insert into $table select i, i from generate_series(1, 20) i");
	PgFanout::poll(sub { copy("select count(*) from $table") eq '20' }, "rows of $table");
	return;
}

# Disturbs a repair while it waits for a row that a session has locked.
sub disturb
{
	my ($table, $how) = @_;
	my $session = $node->background_psql('copy');

	$session->query_safe("begin; select from $table where id = 15 for update");
	my $run = source("select fanout.compare('$table', '$table', 'k', true)");
	my $waiting = q(select pid from pg_stat_activity where datname = 'copy' and wait_event_type = 'Lock');

	$node->poll_query_until('copy', "select exists ($waiting)") or die 'the repair does not wait';
	if ($how eq 'cancelled')
	{
		copy("select pg_cancel_backend(pid) from ($waiting) w");
	}
	$node->poll_query_until('copy', "select error is not null from fanout.delivery_failure where topic = '$table'")
	  or die 'no failure is recorded';
	ok(1, "$table, $how: the failure is recorded");
	$session->query_safe('commit');
	$session->quit;
	return $run;
}

foreach my $how ('cancelled', 'late')
{
	foreach my $way ('at_once', 'row_by_row')
	{
		my $t = "${how}_$way";

		replicate($t);
		unnoticed("update $t set x = 100 where id = 15");
		# two that change places are refused, until one of them is gone
		unnoticed("update $t set x = -1 where id = 3; update $t set x = 3 where id = 4; update $t set x = 4 where id = 3") if $way eq 'row_by_row';
		my $run = disturb($t, $how);

		copy("delete from $t where id = 3") if $way eq 'row_by_row';
		$node->poll_query_until('copy', "select count(*) = 1 from fanout.sync_comparisons where run = $run and topic = '$t' and state = 'different'")
		  or die copy('select topic, attempts, error from fanout.delivery_failure');
		is(copy("select x from $t where id = 15"), '100', "$t: the repair is tried again");
		source("insert into $t select i, i from generate_series(21, 30) i");
		PgFanout::poll(sub { copy("select count(*), sum(x) from $t") eq source("select count(*), sum(x) from $t") }, "$t: what comes afterwards is applied");
		ok($node->poll_query_until('copy', "select waiting = 0 and state = 'idle' from fanout.stat_subscriptions where topic = '$t'"), "$t: nothing is left");
	}
}

# ---- a repair that waits, and TRUNCATE ----

source("create table child (id int primary key, parent int, x int); select fanout.declare_binding('child', 'k'), fanout.capture('child', 'child')");
copy(q(
create table parent (id int primary key);
create table child (id int primary key, parent int references parent, x int);
create function picky() returns trigger language plpgsql as $$ begin
	if new.x = 13 then raise 'not this one'; end if;
	return new;
end $$;
create trigger picky before insert on child for each row execute function picky();
select fanout.sync_table('child', 'k', 'child', retry_delay => '1 h', max_retry_delay => '1 h')));

sub same
{
	my ($name) = @_;
	my $rows = q(select coalesce(string_agg(c::text, ' ' order by id), '') from child c);
	my $there = source($rows);

	PgFanout::poll(sub { copy($rows) eq $there }, sub { "$name: " . copy('select key, headers, attempts, postponed, error, next_try from fanout.waiting order by place') });
	ok(1, $name);
	return;
}

sub repair_waits
{
	my ($id) = @_;

	unnoticed("insert into child values ($id, $id, 0)");
	my $run;

	# refused while the one before is under way
	PgFanout::poll(sub { return $node->psql('postgres', "select fanout.compare('child', 'child', 'k', true)", stdout => \$run, stderr => \my $stderr) == 0 }, 'a comparison begins');
	$node->poll_query_until('copy', "select exists (select from fanout.waiting where headers ->> 'compare' = '$run' and error is not null)")
	  or die 'the repair does not wait';
	return;
}

source('insert into child values (1, null, 0)');
same('a row');
repair_waits(5);
source('truncate child; insert into child values (2, null, 0)');
same('TRUNCATE does not wait for a repair that waits');
copy(q(select fanout.retry('child', 'k')));
$node->poll_query_until('copy', q(select waiting = 0 from fanout.stat_subscriptions where topic = 'child')) or die 'something waits';

# the repair may have come later than TRUNCATE, which waits for another message
source('insert into child values (3, null, 13); truncate child; insert into child values (4, null, 0)');
$node->poll_query_until('copy', q(select count(*) = 2 from fanout.waiting where next_try is null)) or die 'TRUNCATE does not wait';
repair_waits(6);
copy(q(drop trigger picky on child; select fanout.retry('child', 'k', message_id) from fanout.waiting where key = '3'));
PgFanout::poll(sub { copy('select count(*) from child where id in (2, 3)') eq '0' },
	sub { copy('select key, headers, attempts, postponed, error, next_try from fanout.waiting order by place') });
ok(1, 'nor when what it waited for is applied meanwhile');
copy(q(insert into parent values (6); select fanout.retry('child', 'k')));
same('and the repair is made');

done_testing();
