# A backfill sends the rows that a table has to a queue that was declared later, in
# the right place among the changes that are made meanwhile, and goes on where it
# was after any failure.
#
# PG_FANOUT_LONG=1: a million rows and 20 kills in place of 100,000 and 5.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $long = $ENV{PG_FANOUT_LONG};
my $rows = $long ? 1_000_000 : 100_000;
my $kills = $long ? 20 : 5;

my $broker = PgFanout::broker(private => 1);
my $node = PgFanout::cluster('a', $broker, conf => q(
log_statement = none
restart_after_crash = on
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub ask { return PgFanout::ask($node, @_); }

sub wait_for_end
{
	my ($id, $seconds) = @_;

	PgFanout::poll(sub { ask("select state in ('done', 'failed', 'cancelled') from fanout.backfills where id = $id") eq 't' },
		"end of backfill $id", $seconds);
	return sql("select state || coalesce(': ' || error, '') from fanout.backfills where id = $id");
}

# Has it begun, and not gone on for a second?
sub stands_still
{
	my ($id) = @_;

	return ask("select rows_done > 0 and updated_at < clock_timestamp() - interval '1 s' from fanout.backfills where id = $id") eq 't';
}

# The messages of a queue, at least so many, apart from the last one, which is returned first.
sub received
{
	my ($queue, $least) = @_;

	PgFanout::flush($node);
	my @messages = $broker->collect($queue, expect => $least);
	my @last = grep { $_->{headers}->{last} } @messages;

	is(scalar(@last), 1, "$queue: one message says that it is the last one");
	is($messages[-1], $last[0], "$queue: and it is the last one");
	return ($last[0], grep { !$_->{headers}->{last} } @messages);
}

sub keys_of { return join ' ', map { $_->{headers}->{key} // '-' } @_; }

# ---- what is sent, where, and in which form ----

sql(q(
create table items (dropped int, a int, b text, secret text, primary key (b, a));
alter table items drop column dropped;
insert into items select i, chr(97 + i % 3), 's' from generate_series(1, 9) i;
select fanout.declare_binding('item', 'old');
select fanout.capture('items', 'item', exclude => '{secret}', "where" => 'a <> 5');
select fanout.declare_binding('item', 'new');
));
PgFanout::flush($node);
my $id = sql(q(select fanout.backfill('items', 'item', 'new', "where" => 'a > 2')));
is(wait_for_end($id), 'done', 'a backfill is done');
is($broker->count('item_old'), 0, 'another group gets nothing');
my ($last, @messages) = received('item_new', 7);
is(keys_of(@messages), '["a",3] ["a",6] ["a",9] ["b",4] ["b",7] ["c",8]', 'rows come in the order of the key, within both conditions');
is_deeply($messages[0]->{body}->{after}, { a => 3, b => 'a' }, 'with the columns of the capture');
is($messages[0]->{body}->{op}, 'r', 'with op r in the body');
is($messages[0]->{headers}->{op}, 'r', 'and in the headers');
is($messages[0]->{headers}->{backfill}, $id, 'with the number of the backfill');
is($messages[0]->{headers}->{format}, 'debezium', 'in the format of the topic');
is($messages[0]->{type}, 'public.items.read', 'and with a type of its own');
is_deeply([ $last->{headers}->{op}, $last->{headers}->{backfill}, $last->{body}->{rows}, $last->{type} ],
	[ undef, $id, 6, 'pg_fanout.backfill' ], 'the last message is about no row');
is(sql("select rows_sent, rows_done, state, error is null, finished_at is not null, last_key from fanout.backfills where id = $id"),
	'6|9|done|t|t|c, 8', 'the view says how far it came');

$id = sql(q(select fanout.backfill('items', 'item')));
is(wait_for_end($id), 'done', 'a backfill to a topic is done');
is(scalar(grep { $_->{headers}->{backfill} == $id } $broker->collect("item_$_", expect => 9)), 9, "group $_ gets it") foreach qw(old new);

# ---- kinds of tables ----

sql(q(
create table empty (id int primary key);
create table pages (v int, filler text);
insert into pages select i, repeat('x', 1000) from generate_series(1, 500) i;
create table parts (id int primary key, v text) partition by range (id);
create table parts_1 partition of parts for values from (0) to (100);
create table parts_2 (v text, x int, id int not null);
alter table parts_2 drop column x;
alter table parts attach partition parts_2 for values from (100) to (200);
insert into parts select i, 'v' from generate_series(1, 199) i;
create table parent (id int primary key);
create table child () inherits (parent);
insert into parent values (1);
insert into child values (2);
create table large (id int primary key, v text);
alter table large alter column v set storage external;
insert into large select i, repeat('x', 400000) from generate_series(1, 40) i;
create domain number as numeric;
create table odd (k number, t timestamptz, f float8, e "char", b bytea, unique (k, t, f, b));
alter table odd alter k set not null, alter t set not null, alter f set not null, alter b set not null;
insert into odd select i, 'epoch'::timestamptz + i * interval '1 hour 1 us', i / 7.0, 'x', int4send(i) from generate_series(1, 2000) i;
alter database postgres set timezone = 'Asia/Tokyo';
select fanout.declare_binding(t, 'new'), fanout.capture(t, t) from unnest('{empty,pages,parts,parent,large,odd}'::text[]) t;
));
my %expected = (empty => 0, pages => 500, parts => 199, parent => 1, large => 40, odd => 2000);
my %ids = map { $_ => sql("select fanout.backfill('$_', '$_', 'new')") } sort keys %expected;
foreach my $table (sort keys %expected)
{
	is(wait_for_end($ids{$table}), 'done', "table $table is sent");
	my ($end, @sent) = received("${table}_new", $expected{$table} + 1);
	my %different = map { $_->{raw} =~ /"after":(\{.*?\})/ ? ($1 => 1) : () } @sent;

	is(scalar(@sent), $expected{$table}, "with $expected{$table} messages");
	is(scalar(keys %different), $expected{$table}, 'of different rows') if $table ne 'large';
	next unless $table eq 'odd';
	my %of;

	$of{ $_->{headers}->{xid} }++ foreach @sent;
	cmp_ok((sort { $b <=> $a } values %of)[0], '<=', 300, 'each transaction writes a few hundred of them at most');
}
sql('alter database postgres reset timezone');

# ---- the order among changes, and rows that somebody has locked ----

sql(q(
create table locked (id int primary key, v int);
insert into locked select i, 0 from generate_series(1, 50) i;
select fanout.declare_binding('locked', 'new'), fanout.capture('locked', 'locked');
));
my $session = PgFanout::session($node);
PgFanout::run_in($session, 'begin; update locked set v = 1 where id = 20;');
$id = sql(q(select fanout.backfill('locked', 'locked', 'new')));
PgFanout::poll(sub { ask("select rows_done >= 15 and error is not null from fanout.backfills where id = $id") eq 't' }, 'a lock in the way');
is(sql("select state, rows_done < 20 from fanout.backfills where id = $id"), 'running|t', 'a row that is locked is waited for, and the view says so');
sql('update locked set v = 2 where id = 21');
PgFanout::run_in($session, 'commit;');
is(wait_for_end($id), 'done', 'and then it goes on');
($last, @messages) = received('locked_new', 53);
my %state;
my $disorder = 0;
foreach my $message (sort { $a->{headers}->{sequence} <=> $b->{headers}->{sequence} } @messages)
{
	my $after = $message->{body}->{after};

	$disorder++ if $after->{v} < ($state{ $after->{id} } // 0);
	$state{ $after->{id} } = $after->{v};
}
is("$disorder $state{20} $state{21}", '0 1 2', 'by sequence, the last message of a row is its last state');

# ---- what refers to rows that are locked by a backfill ----

sql(q(
create table gate ();
create function is_open(id int) returns bool volatile language plpgsql as $$
begin
	while id = 10 and not exists (select from public.gate) loop perform pg_sleep(0.01); end loop;
	return true;
end $$;
create table referred (id int primary key);
create table refers (id int references referred);
insert into referred select generate_series(1, 20);
select fanout.declare_binding('referred', 'new'), fanout.capture('referred', 'referred');
));
$id = sql(q(select fanout.backfill('referred', 'referred', 'new', "where" => 'is_open(id)')));
PgFanout::poll(sub { ask('select count(*) from (select from referred where id < 10 for update skip locked) x') eq '0' }, 'rows that are locked');
like(ask(q(set lock_timeout = '10 s'; insert into refers values (5) returning id)), qr/^5$/m, 'while a backfill has locked a row, another table can come to refer to it');
sql('insert into gate default values');
is(wait_for_end($id), 'done', 'and the backfill goes on');

# ---- pause, resume, cancel, rate ----

$id = sql(q(select fanout.backfill('pages', 'pages', 'new', rate => 50)));
PgFanout::poll(sub { ask("select rows_sent > 0 from fanout.backfills where id = $id") eq 't' }, 'the first rows');
sql("select fanout.pause_backfill($id)");
my $sent = sql("select rows_sent from fanout.backfills where id = $id");
cmp_ok($sent, '<', 400, 'a rate is kept');
sleep 1;
is(sql("select state, rows_sent from fanout.backfills where id = $id"), "paused|$sent", 'a paused backfill stands still');
sql("select fanout.resume_backfill($id)");
PgFanout::poll(sub { ask("select rows_sent > $sent from fanout.backfills where id = $id") eq 't' }, 'more rows');
sql("select fanout.cancel_backfill($id)");
is(sql("select state from fanout.backfills where id = $id"), 'cancelled', 'a backfill can be cancelled');

# ---- the last message waits until all is acknowledged ----

sql(q(create table few (id int primary key); insert into few select generate_series(1, 10);
	select fanout.declare_binding('few', 'new', 'classic'), fanout.capture('few', 'few')));
PgFanout::flush($node);
$broker->suspend_queue('few_new');
$id = sql(q(select fanout.backfill('few', 'few', 'new')));
PgFanout::poll(sub { ask("select walked from fanout.backfill where backfill_id = $id") eq 't' }, 'all rows');
foreach my $again ("select fanout.pause_backfill($id); select fanout.resume_backfill($id)",
	q(select pg_terminate_backend(pid, 10000) from pg_stat_activity where backend_type = 'pg_fanout history'))
{
	sql($again);
	PgFanout::poll(sub { ask(q(select count(*) from pg_stat_activity where backend_type = 'pg_fanout history')) eq '1' }, 'a worker');
	sleep 1;
	is(sql(qq(select state || ' ' || (select count(*) from fanout.outbox where topic_id = b.topic_id and headers ? 'last')
		from fanout.backfill b where backfill_id = $id)), 'running 0', 'whatever happens to it, a backfill waits until its rows have been acknowledged');
}
$broker->resume_queue('few_new');
is(wait_for_end($id), 'done', 'and ends then');
received('few_new', 11);

# ---- a topic that does not flow stops its own backfill, and no other ----

foreach my $case ([ 'backfill', 'odd', 'parts' ], [ 'compare', 'parts', 'odd' ])
{
	my ($call, $paused, $flowing) = @$case;

	sql("select fanout.pause('$paused')");
	$id = sql("select fanout.$call('$paused', '$paused', 'new')");
	my $other = sql("select fanout.backfill('$flowing', '$flowing', 'new')");
	is(wait_for_end($other), 'done', "$call: beside a paused topic, that of another one is done");
	PgFanout::poll(sub { stands_still($id) }, "$call to stand still");
	is(sql("select state, rows_done < $expected{$paused} from fanout.backfills where id = $id"), 'running|t', "$call: that of the paused topic waits until its messages are sent");
	PgFanout::poll(sub { ask(q(select count(*) from pg_stat_activity a where backend_type = 'pg_fanout history' and backend_xmin is null and backend_xid is null
		and not exists (select from pg_locks l where l.pid = a.pid and relation in (select relid from pg_partition_tree('odd') union all select relid from pg_partition_tree('parts'))))) eq '1' }, 'a worker without a snapshot');
	pass("$call: meanwhile it keeps no snapshot, no transaction and no lock on the table");
	sql("select fanout.resume('$paused')");
	is(wait_for_end($id), 'done', "$call: and goes on with its topic");
}

# ---- the table changes ----

sql(q(
create table changing (id int primary key, v int);
insert into changing select i, i from generate_series(1, 400) i;
select fanout.declare_binding('changing', 'new'), fanout.capture('changing', 'changing');
));
$id = sql(q(select fanout.backfill('changing', 'changing', 'new', "where" => 'v > 0', rate => 100)));
PgFanout::poll(sub { ask("select rows_sent > 0 from fanout.backfills where id = $id") eq 't' }, 'the first rows');
sql('alter table changing rename id to number; alter table changing rename to changed; alter table changed add column w int default 7;');
is(wait_for_end($id), 'done', 'a table may be renamed, and columns renamed and added');
$id = sql(q(select fanout.backfill('changed', 'changing', 'new', "where" => '100 / (v - 300) is not null', rate => 200)));
like(wait_for_end($id), qr/^failed: division by zero/, 'an error of the condition ends it');
$id = sql(q(select fanout.backfill('changed', 'changing', 'new', rate => 50)));
sql(q(select fanout.uncapture('changed')));
like(wait_for_end($id), qr/^failed: the table is not captured into topic "changing" any more/, 'the end of the capture ends it');
sql(q(select fanout.capture('changed', 'changing'), fanout.resume_backfill(id) from fanout.backfills where id = ) . $id);
is(wait_for_end($id), 'done', 'and it goes on when the table is captured again');
$id = sql(q(select fanout.backfill('changed', 'changing', 'new', rate => 50)));
sql(q(drop table changed));
like(wait_for_end($id), qr/^failed: the table was dropped/, 'DROP TABLE ends it');

# by a key whose type sorts in another way, what was behind the position may be before it
sql(q(
create table sorted (id int primary key, v int);
insert into sorted select i, i from generate_series(1, 400) i;
select fanout.declare_binding('sorted', 'new'), fanout.capture('sorted', 'sorted');
));
$id = sql(q(select fanout.backfill('sorted', 'sorted', 'new', rate => 200)));
PgFanout::poll(sub { ask("select rows_done >= 50 from fanout.backfills where id = $id") eq 't' }, 'the first rows');
sql('alter table sorted alter id type text');
is(wait_for_end($id), 'done', 'the type of the key may change while a table is walked');
($last, @messages) = received('sorted_new', 401);
my %sent = map { $_->{body}->{after}->{v} => 1 } @messages;
is(scalar(keys %sent), 400, 'and no row is left out');
sql(q(select fanout.pause('sorted')));
$id = sql(q(select fanout.compare('sorted', 'sorted', 'new')));
PgFanout::poll(sub { stands_still($id) }, 'the comparison to stand still');
sql(q(alter table sorted alter id type int using id::int; select fanout.resume('sorted')));
like(wait_for_end($id), qr/^failed: the key sorts in another way than when the comparison began/, 'a comparison ends with that');
$id = sql(q(select fanout.backfill('sorted', 'sorted', 'new', rate => 50)));
sql('alter table sorted drop id, add primary key (v)');
like(wait_for_end($id), qr/^failed: a column of the key was dropped/, 'and a backfill if the column is dropped');

# by a key of a type that sorts alike, it goes on where it was
sql(q(
create table grown (id int primary key);
insert into grown select generate_series(1, 300);
select fanout.declare_binding('grown', 'new'), fanout.capture('grown', 'grown');
));
# not done before its table is altered
$id = sql(q(select fanout.backfill('grown', 'grown', 'new', rate => 40)));
PgFanout::poll(sub { ask("select rows_done >= 50 from fanout.backfills where id = $id") eq 't' }, 'the first rows');
sql('begin; alter table grown alter id type bigint; insert into grown select 3000000000 + i from generate_series(1, 100) i; commit');
is(wait_for_end($id), 'done', 'an integer of the key may grow');
is(sql("select rows_done, rows_sent from fanout.backfills where id = $id"), '400|400', 'and each row is sent once');

# ---- a new copy, while everything fails at random ----

$node->safe_psql('postgres', 'create database copy');
$node->safe_psql('copy', q(
create extension pg_fanout;
create table accounts (id int primary key, balance int, filler text);
));
sql(qq(
create table accounts (id int primary key, balance int, filler text);
insert into accounts select i, 0, repeat('f', 50) from generate_series(1, $rows) i;
analyze accounts;
select fanout.declare_topic('account'), fanout.capture('accounts', 'account');
));
my $directory = PostgreSQL::Test::Utils::tempdir;
append_to_file("$directory/load.sql", "\\set id random(1, $rows)\n\\set kind random(1, 10)\n" . q(\if :kind = 1
delete from accounts where id = :id;
\elif :kind = 2
insert into accounts values (:id, -1) on conflict (id) do nothing;
\elif :kind = 3
update accounts set id = id + 2000000 where id = :id and not exists (select from accounts where id = :id + 2000000);
\else
update accounts set balance = balance + 1 where id between :id and :id + 2;
\endif
));
my ($load, $out, $err);

sub start_load
{
	local $ENV{PGAPPNAME} = 'pgbench';

	$load = IPC::Run::start([ 'pgbench', '-n', '-c', '2', '-R', '100', '-T', '7200', '-f', "$directory/load.sql", $node->connstr('postgres') ],
		'<', \undef, '>', \$out, '2>', \$err);
	return;
}

start_load();
sql(q(select fanout.declare_binding('account', 'copy')));
$id = sql(q(select fanout.backfill('accounts', 'account', 'copy')));
$node->safe_psql('copy', q(select fanout.sync_table('account', 'copy', 'accounts')));
my %ways = (
	worker => sub {
		my $pid = ask(q(select pid from pg_stat_activity where backend_type = 'pg_fanout history'));
		kill 'TERM', $pid if $pid =~ /^\d+$/;
	},
	crash => sub {
		my $pid = ask(q(select pid from pg_stat_activity where backend_type = 'pg_fanout history'));
		PgFanout::kill_process($node, $pid) if $pid =~ /^\d+$/;
	},
	server => sub { $node->stop('immediate'); $node->start; },
	broker => sub { $broker->kill; $broker->start; });
my $before = 0;

foreach my $i (1 .. $kills)
{
	my $way = $i <= 4 ? (qw(worker crash broker server))[ $i - 1 ] : (sort keys %ways)[ int(rand(4)) ];

	PgFanout::poll(sub { my $done = ask("select rows_done from fanout.backfills where id = $id"); $done =~ /^\d+$/ && $done >= $before + $rows / $kills / 3 },
		"progress before $way", 180);
	$ways{$way}->();
	my $now = sql("select rows_done from fanout.backfills where id = $id");
	cmp_ok($now, '>=', $before, "after $way, what was done is not done again");
	$before = $now;
	eval { $load->pump_nb; 1 } or do { eval { $load->finish }; start_load(); };
}
is(wait_for_end($id, $long ? 1800 : 600), 'done', 'the backfill is done');
$load->signal('TERM');
eval { $load->finish };
PgFanout::poll(sub { ask(q(select count(*) from pg_stat_activity where application_name = 'pgbench')) eq '0' }, 'end of the load');
PgFanout::flush($node, timeout => '600 s');
PgFanout::poll(sub { $broker->left('account_copy') == 0 }, 'the queue is empty', $long ? 1800 : 600);
$node->poll_query_until('copy', q(select bool_and(waiting = 0 and state = 'idle') from fanout.stat_subscriptions)) or die 'not idle';
my $sum = q(select count(*), sum(balance), md5(string_agg(a::text, ',' order by id)) from accounts a);
is($node->safe_psql('copy', $sum), sql($sum), 'the new copy equals the table');
is($node->safe_psql('copy', 'select count(*) from fanout.dead_letter'), '0', 'no message was given up');
note sql("select rows_done, rows_sent, finished_at - started_at from fanout.backfills where id = $id");

# ---- a copy of the database ----

$id = sql(q(select fanout.backfill('accounts', 'account', 'copy', rate => 10)));
$node->safe_psql('template1', 'create database second template postgres');
sleep 1;
is($node->safe_psql('second', "select state, rows_sent from fanout.backfills where id = $id and rows_sent > 1000"), '', 'a passive copy sends nothing');
$node->safe_psql('second', 'select fanout.activate()');
is($node->safe_psql('second', "select state, error from fanout.backfills where id = $id"), 'failed|the database is a copy', 'nor does a copy that was activated go on with it');
sql("select fanout.cancel_backfill($id)");
PgFanout::poll(sub { ask(q(select count(*) from pg_stat_activity where backend_type = 'pg_fanout history')) eq '0' }, 'the end of the worker');
pass('without backfills there is no worker');

done_testing();

END
{
	local ($?, $@);

	$load->kill_kill if $load;
}
