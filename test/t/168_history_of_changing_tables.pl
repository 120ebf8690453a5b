# Backfills and comparisons whose table is renamed, dropped or swapped with another one
# meanwhile, or has rows that are very wide.

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

# What the copy says of a run once it is in that state.
sub result
{
	my ($run, $state) = @_;

	return $node->poll_query_until('copy', "select state = '$state' and finished_at is not null from fanout.sync_comparisons where run = $run")
	  ? copy("select coalesce(error, 'no error') from fanout.sync_comparisons where run = $run")
	  : 'it is ' . copy("select state from fanout.sync_comparisons where run = $run");
}

# ---- a comparison that cannot be ended says so at the copy ----

my @tables = qw(renamed dropped released cancelled);
foreach my $table (@tables)
{
	sql(qq(create table $table (id int primary key); insert into $table select generate_series(1, 500);
		select fanout.declare_binding('$table', 'k'), fanout.capture('$table', '$table'), fanout.pause_topic('$table')));
	copy(qq(create table $table (id int primary key); insert into $table select generate_series(1, 500); select fanout.sync_table('$table', 'k', '$table')));
}
my %run = map { $_ => sql("select fanout.compare('$_', '$_', 'k')") } @tables;

# it stands still, for what it has written is not sent
$node->poll_query_until('postgres', q(select bool_and(state = 'running' and rows_sent > 0) from fanout.backfills)) or die 'not begun';
sql(qq(
alter table renamed rename to "New name";
drop table dropped;
select fanout.uncapture('released', 'released');
select fanout.cancel_backfill($run{cancelled});
select fanout.resume_topic(t) from unnest('{renamed,dropped,released,cancelled}'::text[]) t));
is(result($run{renamed}, 'failed'), 'table public.renamed was renamed to public."New name", and its copy takes no messages under that name: ' .
	'use fanout.unsubscribe() and fanout.sync_table() there, with the new name as "source", and compare again', 'of a table that is renamed meanwhile');
is(result($run{dropped}, 'failed'), 'the table was dropped', 'of one that is dropped');
is(result($run{released}, 'failed'), 'the table is not captured into topic "released" any more', 'of one that is not captured any more');
is(result($run{cancelled}, 'failed'), 'it was cancelled at the source', 'and one that is cancelled');
is(sql(q(select string_agg(state, ' ' order by id) from fanout.backfills)), 'failed failed failed cancelled', 'as it does at the source');

sql(qq(alter table "New name" rename to renamed; select fanout.capture('released', 'released');
	select fanout.resume_backfill(id) from unnest('{$run{renamed},$run{released}}'::bigint[]) id));
is(result($run{$_}, 'equal') . ' ' . copy("select compared from fanout.sync_comparisons where run = $run{$_}"), 'no error 500', "the comparison of $_ is resumed and ends")
  foreach qw(renamed released);

# ---- rows that are wide, in a table without a key: many of them have their places in one page ----

sql(q(
create table wide (id int, v text);
alter table wide alter v set storage external;
insert into wide select i, repeat(chr(96 + i), 1000000) from generate_series(1, 20) i;
select fanout.declare_binding('wide', 'k'), fanout.capture('wide', 'wide'), fanout.pause_topic('wide');
select fanout.backfill('wide', 'wide', 'k')));
my $transactions = q(select max(n) from (select count(*) as n from fanout.outbox join fanout.topic using (topic_id) where topic = 'wide' group by xid) x);
$node->poll_query_until('postgres', q(select rows_sent > 0 from fanout.backfills where topic = 'wide')) or die 'not begun';
cmp_ok(sql($transactions), '<=', 4, 'a transaction has rows of few MB');
sql(q(select fanout.resume_topic('wide')));
$node->poll_query_until('postgres', q(select state = 'done' from fanout.backfills where topic = 'wide')) or die 'not done';
cmp_ok(sql($transactions), '<=', 4, 'and so has each');
is(sql(q(select count(*), count(distinct left(payload::jsonb #>> '{after,v}', 1)) from fanout.outbox join fanout.topic using (topic_id)
	where topic = 'wide' and headers ->> 'op' = 'r')), '20|20', 'each row is sent once');

# ---- schemas that swap their names, for which no lock of a table is needed ----

# The worker's statement waits for a partition, and its plan is made anew when the names are swapped.
# The table has rows for minutes, so that this is in the middle of it.
sql(q(
create schema blue;
create schema green;
create table blue.items (id int primary key, v text) partition by range (id);
create table green.items (id int primary key, v text) partition by range (id);
create table blue.part partition of blue.items default;
create table green.part partition of green.items default;
insert into blue.items select i, 'blue' from generate_series(1, 10000) i;
select fanout.declare_binding('swapped', 'k'), fanout.capture('blue.items', 'swapped')));
my $walk = sql(q(select fanout.backfill('blue.items', 'swapped', 'k', rate => 64)));
$node->poll_query_until('postgres', q(select rows_sent >= 48 from fanout.backfills where topic = 'swapped')) or die 'not begun';
sql(q(
begin;
alter schema blue rename to other;
alter schema green rename to blue;
alter schema other rename to green;
lock table green.part in access exclusive mode;
do $$
begin
	while not exists (select from pg_locks where relation = 'green.part'::regclass and not granted) loop
		perform pg_sleep(0.005);
	end loop;
end $$;
commit));
my $sent = sql("select rows_sent from fanout.backfills where id = $walk");
$node->poll_query_until('postgres', "select state <> 'running' or rows_sent >= $sent + 100 from fanout.backfills where id = $walk") or die 'it stands still';
is(sql("select state from fanout.backfills where id = $walk"), 'running', 'a backfill whose table gets another name goes on');
sql("select fanout.cancel_backfill($walk)");
is(sql(qq(select count(distinct o.key) >= $sent + 100, count(distinct o.key) = max(o.key::int), min(payload::jsonb #>> '{after,v}')
	from fanout.outbox o join fanout.topic using (topic_id) where topic = 'swapped' and headers ->> 'op' = 'r')), 't|t|blue', 'a backfill goes on with its own table, not with the one that has its name now');

# ---- a binding that is dropped before the publisher has heard of it ----

sql(q(begin; select fanout.declare_binding('brief', 'k'), fanout.publish('brief', '1'), fanout.drop_binding('brief', 'k'); commit));
PgFanout::poll(sub { sql(q(select last_error from fanout.bindings where topic = 'brief')) eq 'not dropped: the queue has 1 messages' }, 'the answer of the broker');
is($broker->count('brief_k'), 1, 'its queue gets what was written to it, and so is not empty, and stays');
sql(q(begin; select fanout.declare_binding('brief_2', 'k'), fanout.publish('brief_2', '1'), fanout.drop_binding('brief_2', 'k', if_empty => false); commit));
PgFanout::poll(sub { sql(q(select count(*) from fanout.bindings where topic = 'brief_2')) == 0 }, 'the queue to be dropped');
is(sql(q(select pending + coalesce(held, 0) from fanout.stat_topics where topic = 'brief_2')), '0', 'and nothing of the topic waits for one that was dropped');

$node->stop('fast');

done_testing();
