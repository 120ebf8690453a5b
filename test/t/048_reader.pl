# What the publisher reads, and what reading it costs: the messages of the
# transaction that creates the extension, and large messages one at a time.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
shared_buffers = 16MB
max_prepared_transactions = 5
max_worker_processes = 20
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

# ---- the transaction that creates the extension ----

# Runs one transaction in a new database, after one that began later has ended
# in another database of the cluster.
sub first_transaction
{
	my ($database, $sql, $begin) = @_;

	$begin = 'begin' unless defined $begin;
	$node->safe_psql('postgres', "create database $database");
	$node->safe_psql($database, 'create table users (id int primary key, name text)');
	$node->safe_psql(
		$database, qq(
		$begin;
		select pg_current_xact_id();
		\\! psql -XAtq -d "@{[ $node->connstr('postgres') ]}" -c "create table of_$database ()"
		$sql));
	return;
}

sub arrive
{
	my ($database, $count) = @_;

	PgFanout::flush($node, dbname => $database);
	return join ',', sort map { $_->{body}->{after}->{id} } $broker->collect("${database}_g", expect => $count);
}

sub declare
{
	my ($database) = @_;

	return qq(
		create extension pg_fanout;
		select fanout.declare_binding('$database', 'g', 'classic');
		select fanout.capture('users', '$database');
	);
}

first_transaction('whole', declare('whole') . q(insert into users values (1), (2); commit));
is(arrive('whole', 2), '1,2', 'what the transaction that creates the extension writes is published');

first_transaction('parts', q(savepoint a;) . declare('parts') . q(
	insert into users values (1); savepoint b; insert into users values (2); rollback to b;
	savepoint c; insert into users values (3); release c; release a; insert into users values (4); commit));
is(arrive('parts', 3), '1,3,4', 'also in its subtransactions');

first_transaction('twice', declare('twice') . q(
	insert into users values (1);
	drop extension pg_fanout cascade;) . declare('twice') . q(
	insert into users values (2); commit));
is(arrive('twice', 1), '2', 'also if it drops the extension and creates it again');

first_transaction('prepared', declare('prepared') . q(insert into users values (1); prepare transaction 'first'));
sql('create table between_ ()');
$node->safe_psql('prepared', q(commit prepared 'first'));
is(arrive('prepared', 1), '1', 'also if it is prepared first');

first_transaction('repeatable', declare('repeatable') . q(insert into users values (1); commit),
	'begin isolation level repeatable read');
is(arrive('repeatable', 1), '1', 'also under REPEATABLE READ');

# ---- large messages ----

# Runs it with a new publisher, and says how much memory that has used.
sub uses_less_than
{
	my ($megabytes, $what, $run) = @_;
	# it has not read anything yet
	my $pid = PgFanout::new_publisher($node);

	$node->poll_query_until('postgres', 'select connected_to is not null from fanout.stat_publisher') or die;
	$run->();
	my ($peak) = slurp_file("/proc/$pid/status") =~ /VmHWM:\s+(\d+) kB/;
	cmp_ok($peak, '<', $megabytes * 1024, "$what: less than $megabytes MB");
	note "$what: $peak kB";
	return;
}

sub sequences { return map { $_->{headers}->{sequence} } @_; }

sub is_in_order
{
	my ($name, @messages) = @_;
	my @sequences = sequences(@messages);

	is_deeply(\@sequences, [ sort { $a <=> $b } @sequences ], $name);
	return;
}

# The queue keeps the last message alone; there is no room for more.
my $one = q('classic', '{"x-max-length": 1}');
my $large = q(to_jsonb(repeat('x', 20000000)));
sql(qq(
	select fanout.declare_binding('large', 'g', $one);
	select fanout.declare_binding('held', 'g', $one);
	select fanout.declare_binding('mixed', 'g', 'classic');
	create table incompressible as
		select to_jsonb(string_agg(md5(i::text), '')) as body from generate_series(1, 625000) i));
PgFanout::flush($node);

uses_less_than(100, '30 messages of 20 MB', sub {
	sql("select fanout.publish('large', $large) from generate_series(1, 30)");
	PgFanout::flush($node, timeout => '180 s');
});
is(sql(q(select count(*) from fanout.outbox_status where topic = 'large' and state = 'sent')), 30, 'all are sent');

# The same by a capture; the row's writer keeps what a statement captures until it is inserted.
my ($before, $after) = sql(q(
	create table captured (id int, v text);
	select from fanout.capture('captured', 'large', '{insert}', key => '{id}');
	select pg_backend_pid() as pid \gset
	\setenv BACKEND :pid
	\! grep VmHWM /proc/$BACKEND/status
	insert into captured select i, repeat('x', 20000000) from generate_series(1, 15) i;
	\! grep VmHWM /proc/$BACKEND/status
)) =~ /VmHWM:\s+(\d+) kB/g;
cmp_ok($after - $before, '<', 200 * 1024, 'a statement that writes 15 captured rows of 20 MB: less than 200 MB for its session');
note 'the writer: ' . ($after - $before) . ' kB';

uses_less_than(100, '10 messages of 20 MB that cannot be compressed', sub {
	sql("select fanout.publish('large', body) from incompressible, generate_series(1, 10)");
	PgFanout::flush($node, timeout => '180 s');
});

sql(q(select fanout.pause('held')));
uses_less_than(100, 'pausing with 20 large messages behind many small ones', sub {
	sql(qq(
		begin;
		select count(fanout.publish('held', to_jsonb(i))) from generate_series(1, 1000) i;
		select count(fanout.publish('held', $large)) from generate_series(1, 20);
		commit));
	PgFanout::wait_for_state($node, 'held', where => q(topic = 'held'), count => 1020);
});
is(sql('select count(*) from fanout.held'), 0, 'no message is copied for that');
uses_less_than(100, 'sending them at last', sub {
	sql(q(select fanout.resume('held')));
	PgFanout::flush($node, timeout => '180 s');
});
is(sql(q(select count(*) from fanout.outbox_status where topic = 'held' and state = 'sent')), 1020, 'all are sent');

uses_less_than(100, 'small and large messages by turns', sub {
	sql(qq(select count(fanout.publish('mixed', case when i % 150 = 0 then to_jsonb(repeat('x', 5000000)) else to_jsonb(i) end))
		from generate_series(1, 500) i));
	PgFanout::flush($node, timeout => '180 s');
});
my @mixed = $broker->collect('mixed_g', expect => 500);
is_in_order('they arrive in order', @mixed);

# ---- large keys and headers ----

uses_less_than(60, 'keys of 20 MB', sub {
	sql(q(
		create table keyed (id int, k text);
		select fanout.declare_binding('keyed', 'g', 'classic');
		select fanout.capture('keyed', 'keyed', key => '{k}');
		insert into keyed select i, repeat(i::text, 20000000) from generate_series(1, 5) i;
		insert into keyed values (6, 'short');
		delete from keyed));
	PgFanout::flush($node);
});
is(sql(q(select count(*) from fanout.dead_letter where topic = 'keyed' and reason like 'headers and key of % bytes do not fit into a frame')),
	10, 'messages with keys that no broker takes become dead letters');
is(sql(q(select count(*) from fanout.dead_letter where topic = 'keyed' and octet_length(key) = 20000000)),
	10, 'with their keys');
is($broker->collect('keyed_g', expect => 2), 2, 'others of the topic flow');

sql(q(select fanout.publish('mixed', '1', headers => jsonb_build_object('large', repeat('x', 3000000)));
	select fanout.publish('mixed', '2', headers => jsonb_build_object('small', repeat('x', 30000)))));
PgFanout::flush($node);
like(sql(q(select reason from fanout.dead_letter where topic = 'mixed')), qr/^headers and key of 30\d* bytes do not fit into a frame$/,
	'so do those with such headers');
my ($headers) = $broker->collect('mixed_g', expect => 1);
is(length($headers->{headers}->{small}), 30000, 'headers that do fit are sent');

# ---- moving messages between tables ----

# Runs it and waits for a publisher to fail with that in the server's log.
sub fails_with
{
	my ($pattern, $sql) = @_;
	my $offset = -s $node->logfile;

	sql($sql);
	PgFanout::poll(sub { slurp_file($node->logfile, $offset) =~ $pattern }, "$pattern in the log");
	return;
}

# Runs it and has the publisher started again at once, which waits longer after each failure.
sub mend { sql("$_[0]; select fanout.restart_workers()"); return; }

# Writes until the rotation of segments, which moves what a paused topic has, has failed.
sub cannot_rotate
{
	my ($offset, $name) = @_;

	for (1 .. 300)
	{
		sql(q(select fanout.publish('large', '"filler"')));
		last if slurp_file($node->logfile, $offset) =~ /changed 0 rows instead of 1/;
		select(undef, undef, undef, 0.2);
	}
	like(slurp_file($node->logfile, $offset), qr/changed 0 rows instead of 1/, $name);
	return;
}

sql(q(alter system set pg_fanout.retention = '4s'));
$node->reload;
for (1 .. 300)
{
	sql(q(select fanout.publish('large', '"filler"')));
	last if sql('select count(*) from fanout.outbox o join fanout.topic t using (topic_id) where topic = $$keyed$$') == 0;
	select(undef, undef, undef, 0.2);
}
is(sql('select count(*) from fanout.outbox o join fanout.topic t using (topic_id) where topic = $$keyed$$'),
	0, 'the outbox has forgotten the messages that became dead letters');
is(sql(q(select fanout.redrive('keyed'))), 10, 'they can be redriven');
PgFanout::poll(sub { sql('select count(*) from fanout.held') == 0 }, 'all to be tried');
is(sql(q(select count(*) from fanout.dead_letter where topic = 'keyed' and octet_length(key) = 20000000)),
	10, 'and are dead letters again: none was lost');

sql(q(create function suppress() returns trigger language plpgsql as 'begin return null; end';
	create trigger suppress before insert on fanout.held for each row execute function suppress()));
my ($code, $out, $err) = $node->psql('postgres', q(select fanout.redrive('keyed')));
like($err, qr/changed 0 rows instead of 10/, 'redrive() fails that cannot put messages where the publisher finds them');
is(sql(q(select count(*) from fanout.dead_letter where topic = 'keyed')), 10, 'they stay dead letters');
sql(q(drop trigger suppress on fanout.held));
foreach my $obstacle (
	[ 'trigger', 'create trigger away before insert on fanout.dead_letter for each row execute function suppress()', 'drop trigger away on fanout.dead_letter' ],
	[ 'rule', 'create rule away as on insert to fanout.dead_letter do instead nothing', 'drop rule away on fanout.dead_letter' ])
{
	my ($what, $add, $remove) = @$obstacle;

	fails_with(qr/changed 0 rows instead of 1/, qq($add; select fanout.redrive('keyed')));
	is(sql(q(select count(*) from fanout.held)), 10, "a publisher fails that a $what keeps from making a dead letter of a held message, which stays held");
	mend($remove);
	PgFanout::wait_for_state($node, 'dead', where => q(topic = 'keyed'), count => 10);
}

# One that is purged while the publisher has it in memory is not missing.
sql(q(select fanout.pause('keyed'); select fanout.redrive('keyed')));
my $purger = $node->background_psql('postgres');
$purger->query_safe(q(begin; select fanout.purge('keyed', (select min(message_id::text)::uuid from fanout.held), held => true)));
my $log = -s $node->logfile;
sql(q(select fanout.resume('keyed')));
PgFanout::poll(sub { sql(q(select count(*) from fanout.held where xmax::text <> '0')) == 10 }, 'the publisher to lock the others');
is(sql(q(select count(*) from fanout.dead_letter where topic = 'keyed')), 0, 'a message that a transaction is about to purge is waited for');
$purger->query_safe('commit');
$purger->quit;
PgFanout::wait_for_state($node, 'dead', where => q(topic = 'keyed'), count => 9);
PgFanout::poll(sub { sql('select count(*) from fanout.held') == 0 }, 'all to be moved');
unlike(slurp_file($node->logfile, $log), qr/rows instead of/, 'and is not missed once it is purged');

sql(q(create trigger suppress before insert on fanout.held for each row execute function suppress();
	select fanout.pause('mixed');
	select fanout.publish('mixed', '"not to be lost"')));
my $offset = -s $node->logfile;
cannot_rotate($offset, 'a publisher fails that cannot move what a paused topic has in an old segment');
mend(q(drop trigger suppress on fanout.held));
PgFanout::poll(sub { sql('select count(*) from fanout.held') == 1 }, 'the message to be moved');
is(sql(q(select state from fanout.outbox_status where topic = 'mixed' order by id desc limit 1)),
	'held', 'then it is moved');
mend(q(create trigger suppress before delete on fanout.held for each row execute function suppress()));
fails_with(qr/changed 0 rows instead of 1/, q(select fanout.resume('mixed')));
is(sql('select count(*) from fanout.held'), 1, 'so does one that cannot remove a held message that was sent');
mend(q(drop trigger suppress on fanout.held));
PgFanout::poll(sub { sql('select count(*) from fanout.held') == 0 }, 'the message to be sent');
sql(q(create trigger suppress before insert on fanout.dead_letter for each row execute function suppress()));
fails_with(qr/changed 0 rows instead of 1/, q(select fanout.publish('mixed', '1', 'k', headers => jsonb_build_object('large', repeat('x', 3000000)))));
is(sql(q(select state from fanout.outbox_status where topic = 'mixed' order by id desc limit 1)),
	'pending', 'nor is one that cannot become a dead letter');
mend(q(drop trigger suppress on fanout.dead_letter));
PgFanout::wait_for_state($node, 'dead', where => q(topic = 'mixed' and key = 'k'), count => 1);
PgFanout::flush($node);
ok(1, 'they are, once that is possible');

# the message is to be there when it is looked at, and the row that is saved is to be the
# one that is deleted
sql(q(alter system reset pg_fanout.retention));
$node->reload;
sql('create table saved (like fanout.rotation)');
fails_with(qr/"fanout\.rotation" must have one row/, q(with gone as (delete from fanout.rotation returning *) insert into saved select * from gone;
	select fanout.publish('mixed', '"unrecorded"', 'rotation')));
is(sql(q(select state from fanout.outbox_status where key = 'rotation')), 'pending',
	'without the row that says which segment is current nothing is recorded');
sql('insert into fanout.rotation table saved');
PgFanout::wait_for_state($node, 'sent', where => q(key = 'rotation'), count => 1);
ok(1, 'with it, it is');
sql(q(alter system set pg_fanout.retention = '4s'));
$node->reload;

# ---- what a superuser adds to the tables that are written without the executor ----

sql(q(select fanout.declare_binding('handled', 'g', 'classic');
	create table handled (id int);
	create table inboxed (message_id uuid);
	create function handle(m fanout.message) returns void language sql as
		'insert into public.handled values ((m.body #>> array[]::text[])::int)';
	create function note_inbox() returns trigger language plpgsql as
		'begin insert into public.inboxed values (new.message_id); return null; end';
	create index on fanout.inbox using hash (message_id);
	create index on fanout.inbox (message_id) where inbox_id < 0;
	create index on fanout.inbox ((message_id::text));
	alter table fanout.inbox add constraint positive check (inbox_id > 0)));
sql("create trigger note after insert on fanout.inbox_$_ for each row execute function note_inbox()") foreach 0 .. 3;
sql(q(select fanout.subscribe('handled', 'g', 'handle(fanout.message)');
	select count(fanout.publish('handled', to_jsonb(i))) from generate_series(1, 100) i));
PgFanout::poll(sub { sql('select count(*) from handled') == 100 }, 'all to be handled');
is(sql(q(set enable_seqscan = off; select count(distinct h.message_id) from inboxed h
	where exists (select from fanout.inbox i where i.message_id::text = h.message_id::text)
	and exists (select from fanout.inbox i where i.message_id = h.message_id))),
	100, 'the inbox has all that was handled, and so have its indexes of other kinds and its triggers');
is(sql(q(set enable_seqscan = off; select count(*) from fanout.inbox where message_id is not null and inbox_id < 0)),
	0, 'a partial index has only what belongs there');

# Indexes that are built meanwhile, by CREATE INDEX CONCURRENTLY.
my $script = PostgreSQL::Test::Utils::tempdir() . '/write.sql';
PostgreSQL::Test::Utils::append_to_file($script,
	q(select count(fanout.publish('mixed', to_jsonb(i), :client_id || ' ' || i, headers => '{"h": 1}')) from generate_series(1, 3) i;) . "\n");
my ($bench_out, $bench_err) = ('', '');
my $bench = IPC::Run::start(
	[ 'pgbench', '-n', '-c', 4, '-T', 8, '-f', $script, $node->connstr('postgres') ],
	'>', \$bench_out, '2>', \$bench_err, IPC::Run::timeout(600));
foreach my $segment (0 .. 2)
{
	sql("create index concurrently concurrent_btree_$segment on fanout.outbox_$segment (key)");
	sql("create index concurrently concurrent_gin_$segment on fanout.outbox_$segment using gin (headers)");
	sql("create index concurrently concurrent_expression_$segment on fanout.outbox_$segment (lower(key))");
}
$bench->finish;
unlike($bench_err, qr/ERROR/, 'no write fails while indexes are built concurrently');
# rotation must not empty a segment between two looks at it
my $keeper = PgFanout::session($node);
PgFanout::run_in($keeper, 'begin; lock table fanout.outbox in access share mode');
foreach my $segment (0 .. 2)
{
	my $outbox = "fanout.outbox_$segment";
	# one transaction, whose lock keeps the segment from being emptied in between
	my $counts = sub {
		return sql(qq(begin;
			set local enable_seqscan = off;
			select count(*) from $outbox where $_[0];
			set local enable_seqscan = on; set local enable_indexscan = off; set local enable_bitmapscan = off;
			select count(*) from $outbox where $_[0];
			commit));
	};

	like($counts->($_), qr/\A(\d+)\n\1\z/, "$outbox where $_: all rows are in the index")
	  foreach ("key > ''", "lower(key) > ''", q(headers @> '{"h": 1}'));
}

done_testing();
