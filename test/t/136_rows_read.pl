# What a worker does for one message, or one call of a function, reads the rows that it is
# about, and few others, however many wait, and however many other subscriptions keep.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

# so many messages wait, or rows are kept, that are to be left alone
my $n = 10_000;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
autovacuum = off
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub wait_until
{
	my ($condition, $what) = @_;

	PgFanout::poll(sub { sql("select $condition") eq 't' }, $what, 300);
	return;
}

# Rows that have been read of one of our tables since the last call, or blocks of its indexes.
sub count_reads
{
	my ($counter) = @_;
	my ($now, $before) = ('', '');

	# workers report it when transactions end, but not more often than once a second
	PgFanout::poll(
		sub {
			$before = $now;
			Time::HiRes::sleep(1.5);
			$now = sql($counter);
			return $now eq $before;
		},
		'a counter that stands still');
	sql('select pg_stat_reset()');
	return $now;
}

sub rows_read
{
	my ($table) = @_;

	return count_reads(
		qq(select t.seq_tup_read + coalesce((select sum(i.idx_tup_read) from pg_stat_all_indexes i where i.relid = t.relid), 0)
			from pg_stat_all_tables t where t.relid = 'fanout.$table'::regclass));
}

sub blocks_read
{
	my ($table) = @_;

	return count_reads(
		qq(select sum(idx_blks_read + idx_blks_hit) from pg_statio_all_indexes where relid = 'fanout.$table'::regclass));
}

sub reads_fewer
{
	my ($table, $limit, $name) = @_;
	my $read = rows_read($table);

	cmp_ok($read, '<', $limit, $name);
	note("$read rows read");
	return;
}

# Waits until all is applied, or waits.
sub settled
{
	my ($topic) = @_;

	PgFanout::flush($node, timeout => '180 s');
	PgFanout::poll(
		sub {
			$broker->left("${topic}_g") == 0
			  && sql(qq(select delivered = applied + skipped + waiting from fanout.stat_subscriptions where topic = '$topic')) eq 't';
		},
		"$topic to be applied", 300);
	return;
}

sql(qq(
-- not always for the same reason, at which a subscription would stop
create function refuse(id int) returns void language plpgsql as \$\$
begin
	raise exception 'not now' using errcode = 'X000' || id % 10;
end \$\$;
create function fail(m fanout.message) returns void language plpgsql as \$\$
begin
	perform refuse((m.sequence % 10)::int);
end \$\$;
create function hold() returns trigger language plpgsql as \$\$
begin
	if new.id > $n then perform refuse(new.id); end if;
	return new;
end \$\$;
create table goods (id int primary key, name text);
create table goods_copy (id int primary key, name text);
create table others (like goods including all);
create table others_copy (like goods including all);
create trigger hold before insert or update on goods_copy for each row execute function hold();
select fanout.declare_binding(t, 'g', 'classic') from unnest('{failing,goods,others}'::text[]) t;
select fanout.capture('goods', 'goods', '{insert,update,delete,truncate}');
select fanout.capture('others', 'others');
select fanout.subscribe('failing', 'g', 'fail(fanout.message)', max_attempts => 1000, retry_delay => '1 h', max_retry_delay => '1 h');
select fanout.sync_table('goods', 'g', 'goods_copy', max_attempts => 1000, retry_delay => '1 h', max_retry_delay => '1 h');
select fanout.sync_table('others', 'g', 'others_copy');
));

# A TRUNCATE of a copy with a few rows: how many blocks of the index does it read?
sub truncate_goods
{
	sql('insert into goods select i, 1 from generate_series(1, 20) i');
	settled('goods');
	blocks_read('sync_row');
	sql('truncate goods');
	settled('goods');
	is(sql('select count(*) from goods_copy'), '0', 'a TRUNCATE has emptied the copy');
	return blocks_read('sync_row');
}

my $alone = truncate_goods();
sql(q(insert into others select i, 'x' from generate_series(1, 60000) i));
settled('others');
my $beside = truncate_goods();
cmp_ok($beside, '<', 3 * $alone, 'a TRUNCATE does not look through what other subscriptions keep');
note("$alone blocks alone, $beside beside another subscription");

# many messages wait
my $calls = 300;
sql(qq(select count(fanout.publish('failing', '{}', key => i::text)) from generate_series(1, $n) i));
settled('failing');
is(sql(q(select waiting from fanout.stat_subscriptions where topic = 'failing')), $n, 'all messages wait');
rows_read('waiting');
my $session = $node->background_psql('postgres');
$session->query_safe(qq(do \$\$
	declare id uuid;
	begin
		for id in select message_id from fanout.waiting order by message_id limit $calls loop
			perform fanout.retry('failing', 'g', id);
			commit;
			perform pg_sleep(0.02);
		end loop;
	end \$\$));
$session->quit;
wait_until("(select count(*) from fanout.waiting where attempts = 2) = $calls", 'messages that are tried again');
reads_fewer('waiting', $calls * $n / 2, 'a call of retry() has a worker read few of the messages that wait');
sql(qq(select fanout.skip('failing', 'g', message_id) from (select message_id from fanout.waiting limit 100) w));
wait_until("(select waiting from fanout.stat_subscriptions where topic = 'failing') = $n - 100", 'messages that are skipped');
pass('what waits is counted again');
sql(q(select fanout.skip('failing', 'g', message_id) from fanout.waiting));
wait_until("(select waiting from fanout.stat_subscriptions where topic = 'failing') = 0", 'no message that waits');
pass('once none waits, that is known');

# a comparison finds many rows that differ, of a copy that messages wait for
sql(qq(insert into goods select i, 'x' from generate_series(1, $n / 2) i; insert into goods select $n + i, 'x' from generate_series(1, $n / 2) i));
settled('goods');
sql(qq(update goods set id = 2 * $n where id = 1));
settled('goods');
my $waiting = sql(q(select waiting from fanout.stat_subscriptions where topic = 'goods'));
sql(q(update goods_copy set name = 'y' where id > 1));
rows_read('waiting');
my $run = sql(q(select fanout.compare('goods', 'goods', 'g')));
wait_until("exists (select from fanout.sync_comparisons where run = $run and finished_at is not null)", 'the comparison');
is(sql("select different, missing, extra, left_out from fanout.sync_comparisons where run = $run"),
	join('|', $n / 2 - 1, 0, 0, $waiting + 1), 'rows with messages that wait are left out, by their old key, too');
reads_fewer('waiting', 20 * $n, 'a comparison looks for the messages of each row that differs, and reads no others');

sql(q(select fanout.unsubscribe(topic, 'g') from fanout.subscriptions));
$node->stop;
done_testing();
