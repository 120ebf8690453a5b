# A worker, or a session of a pool, plans its statements when the tables are empty, or
# were analyzed when they nearly were; the tables grow, nobody analyzes them, and still
# each statement reads the rows that it is about, and not all the others.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

# so many messages and rows of each kind
my $n = $ENV{PG_FANOUT_LONG} ? 200_000 : 6_000;
# calls that concern one message each
my $calls = 100;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, extension => 0, conf => q(
log_statement = none
max_worker_processes = 24
pg_fanout.max_subscriptions = 10
autovacuum = off
));
my ($database, $session, $how);

sub sql { return $node->safe_psql($database, $_[0]); }

sub wait_until
{
	my ($condition, $what) = @_;

	PgFanout::poll(sub { sql("select $condition") eq 't' }, $what, 600);
	return;
}

# What has been read of our tables and of the copy since the last call, by table.
sub reads
{
	my ($now, $before) = ('', '');

	# workers report it when transactions end, but not more often than once a second
	PgFanout::poll(
		sub {
			$before = $now;
			Time::HiRes::sleep(1.5);
			$now = sql(q(
				select t.relname, t.seq_tup_read + coalesce((select sum(i.idx_tup_read) from pg_stat_all_indexes i where i.relid = t.relid), 0)
				from pg_stat_all_tables t
				where t.schemaname = 'fanout' and t.relname !~ '^outbox' or t.relname in ('goods_copy') order by 1));
			return $now eq $before;
		},
		'counters that stand still');
	sql('select pg_stat_reset()');
	return { map { split(/\|/) } split(/\n/, $now) };
}

# So many messages were applied, rows were written or calls made: a table may have been
# read by a few look-ups for each of them, and as a whole by a few statements.  A look-up
# passes entries of rows that are gone, the more the longer another transaction runs; one
# that reads all of the table reads thousands.
sub reads_little
{
	my ($events, $name, $each) = @_;
	my $reads = reads();
	my @read = map { "$_ $reads->{$_}" } grep { $reads->{$_} > 0 } sort keys %$reads;
	my @too_much = grep { $reads->{$_} > ($each // 150) * $events + 10 * $n } sort keys %$reads;

	is(join(' ', map { "$_ $reads->{$_}" } @too_much), '', "$name; $how") or diag(join(', ', @read));
	note join(', ', @read);
	return;
}

sub publish
{
	my ($topic, $count) = @_;

	sql(qq(select count(fanout.publish('$topic', jsonb_build_object('n', i), key => (i % ($count / 4 + 1))::text))
		from generate_series(1, $count) i));
	return;
}

sub waiting { return "(select waiting from fanout.stat_subscriptions where topic = '$_[0]') = $_[1]"; }

# Dead letters of the publisher's, as if the broker had refused the messages.
sub refuse
{
	my ($count) = @_;

	sql(qq(insert into fanout.dead_letter (id, topic, message_id, type, key, payload, xid, created_at, reason, attempts)
		select nextval('fanout.outbox_id_seq'), 'refused', gen_random_uuid(), 't', i::text, '{}', pg_current_xact_id(), now(), 'refused', 1
		from generate_series(1, $count) i));
	return;
}

# Calls a function for so many messages, in a session that keeps its plans.  In one
# transaction: after each that changes it, a worker reads all of the waiting room once.
sub call_for_each
{
	my ($call, $messages) = @_;

	$session->query_safe(qq(do \$\$
		declare id uuid;
		begin
			for id in select message_id from $messages order by message_id limit $calls loop
				perform $call;
			end loop;
		end \$\$));
	return;
}

# Makes everything with so many rows, each statement at least once.
sub wait_for_all
{
	my ($count) = @_;

	sql('truncate log, allowed');
	publish('failing', $count);
	wait_until(waiting('failing', $count), "$count messages that wait");
	return;
}

sub call_waiting
{
	call_for_each(q(fanout.retry('failing', 'g', id)), q(fanout.delivery_failure where topic = 'failing'));
	call_for_each(q(fanout.skip('failing', 'g', id)), q(fanout.waiting));
	return;
}

sub apply_all
{
	sql(q(insert into allowed values (1); select fanout.retry('failing', 'g')));
	wait_until(waiting('failing', 0), 'the waiting messages to be applied');
	return;
}

sub redrive
{
	my ($count) = @_;
	my $dead = q(fanout.dead_letter where topic = 'deadly');
	my $left = q((select count(*) from fanout.dead_letter where topic = 'deadly' and redriven_at is null));

	publish('deadly', $count);
	wait_until("$left = $count", "$count dead letters");
	call_for_each(q(fanout.redrive('deadly', id)), $dead);
	call_for_each(q(fanout.purge('deadly', id)), "$dead and redriven_at is null");
	return;
}

sub redrive_all
{
	sql(q(select fanout.redrive('deadly')));
	wait_until(q(not exists (select from fanout.dead_letter where topic = 'deadly' and redriven_at is not null)), 'dead letters to be tried');
	sql(q(insert into allowed values (1); select fanout.redrive('deadly')));
	wait_until(q(not exists (select from fanout.dead_letter where topic = 'deadly')), 'dead letters to be applied');
	return;
}

sub hold
{
	my ($count) = @_;

	refuse($count);
	call_for_each(q(fanout.redrive('refused', id)), q(fanout.dead_letter where topic = 'refused'));
	sql(q(select fanout.redrive('refused')));
	PgFanout::flush($node, dbname => $database, timeout => '300 s');
	return;
}

# Waits for the messages of the copy without reading it.
sub settled
{
	my ($what) = @_;

	PgFanout::flush($node, dbname => $database, timeout => '300 s');
	PgFanout::poll(
		sub {
			$broker->left('goods_g') == 0
			  && sql(q(select delivered = applied + skipped + dead and waiting = 0 from fanout.stat_subscriptions where topic = 'goods')) eq 't';
		},
		$what, 600);
	return;
}

sub write_goods
{
	my ($count) = @_;

	sql(qq(insert into goods select i, i % 3, 'x' from generate_series(1, $count) i));
	settled('rows inserted');
	sql('update goods set name = name || shop; delete from goods where id % 4 = 0; update goods set id = -id where id % 4 = 1');
	settled('rows changed');
	sql('update goods_copy set name = name || 1 where abs(id) % 100 = 1');
	my $run = sql(q(select fanout.compare('goods', 'goods', 'g', repair => true)));
	wait_until("exists (select from fanout.sync_comparisons where run = $run and finished_at is not null)", 'the comparison');
	settled('rows mended');
	return;
}

sub backfill
{
	my $id = sql(q(select fanout.backfill('goods', 'goods')));

	wait_until("(select state from fanout.backfills where id = $id) = 'done'", 'the backfill');
	settled('rows sent again');
	return;
}

sub replay
{
	my $id = sql(q(select fanout.replay('goods', 'g', '-infinity')));
	wait_until("(select state from fanout.backfills where id = $id) = 'done'", 'the replay');
	settled('messages sent again');
	return;
}

sub create
{
	$node->safe_psql('postgres', "create database $database");
	$session = $node->background_psql($database);
	sql(q(
create extension pg_fanout;
create table log (message_id uuid);
create table allowed (n int);
create function fail(m fanout.message) returns void language plpgsql as $$
begin
	-- not always for the same reason, at which the subscription would stop
	if not exists (select from allowed) then raise exception 'not yet' using errcode = 'X000' || m.sequence % 10; end if;
	insert into log values (m.message_id);
end $$;
create table goods (id int, shop int, name text, primary key (shop, id));
create table goods_copy (like goods);
create index on goods_copy (shop);
create index on goods_copy (name);
alter table goods_copy add primary key (shop, id);
select fanout.declare_binding(t, 'g', 'classic') from unnest('{failing,deadly,refused,goods}'::text[]) t;
select fanout.capture('goods', 'goods', '{insert,update,delete,truncate}');
select fanout.subscribe('failing', 'g', 'fail(fanout.message)', max_attempts => 1000, retry_delay => '1 h', max_retry_delay => '1 h');
select fanout.subscribe('deadly', 'g', 'fail(fanout.message)', max_attempts => 1);
select fanout.sync_table('goods', 'g', 'goods_copy');
));
	return;
}

# Nearly no rows: what plans are made now?
sub plan
{
	$calls = 3;
	wait_for_all(8);
	call_waiting();
	apply_all();
	sql('truncate allowed');
	redrive(8);
	redrive_all();
	hold(8);
	write_goods(8);
	backfill();
	replay();
	sql('truncate allowed; delete from goods; delete from fanout.dead_letter');
	settled('no rows');
	return;
}

sub work
{
	$calls = 100;
	reads();
	wait_for_all($n);
	reads_little($n, 'messages of which each fails');
	call_waiting();
	# each that fails again may have a thousand of those that wait looked at, or twice
	reads_little($calls, 'messages retried and skipped one by one', 2_000);
	apply_all();
	reads_little($n, 'messages that wait and are applied');
	sql('truncate allowed; delete from fanout.dead_letter');
	redrive($n);
	reads_little($n, 'dead letters, and some of them tried again or purged one by one');
	redrive_all();
	reads_little(2 * $n, 'dead letters that are all tried again');
	hold($n);
	reads_little($n, 'messages that were held');
	write_goods($n);
	reads_little(3 * $n, 'rows of a copy, and a comparison');
	backfill();
	reads_little($n, 'a backfill');
	replay();
	reads_little(5 * $n, 'a replay');
	sql('truncate goods');
	settled('truncated rows');
	reads_little($n, 'a TRUNCATE');
	return;
}

foreach my $way ('tables were never analyzed', 'tables were analyzed when they were nearly empty')
{
	$how = $way;
	$database = $way =~ /never/ ? 'never' : 'early';
	create();
	plan();
	sql('vacuum analyze') if $way !~ /never/;
	plan() if $way !~ /never/;
	work();
	$session->quit;
	sql(q(select fanout.unsubscribe(topic, 'g') from fanout.subscriptions));
}

$node->stop;
done_testing();
