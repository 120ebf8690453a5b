# What the tables of pg_fanout say is true of one server only.  Logical
# replication brings nothing into them, a ledger that is not this server's own is
# refused until it is repaired, and the schema keeps its name.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $source = PgFanout::cluster('source', $broker,
	conf => "wal_level = logical\nmax_wal_senders = 10");
my $target = PgFanout::cluster('target', undef,
	conf => "max_logical_replication_workers = 8\nmax_worker_processes = 20\nmax_prepared_transactions = 2");
my $declare = q(
	create table users (id int primary key, name text);
	select fanout.declare_bindings('{"exchange_user": ["g"]}');
	select fanout.capture('users', 'exchange_user'););
my $connection = $source->connstr . ' dbname=postgres';

# ---- a publication FOR ALL TABLES ----

# The source is ahead, as is any server that is replaced.
$source->safe_psql('postgres', join('', map { 'select pg_current_xact_id();' } 1 .. 1000));
$source->safe_psql('postgres', "$declare
	insert into users select i, 'source' from generate_series(1, 5) i;
	create publication everything for all tables;");
PgFanout::flush($source);
$target->safe_psql('postgres', "$declare
	select fanout.publish('exchange_user', '1', 'unsent');");

my $before = settled_state($target);
my ($stdout, $stderr);
$target->psql('postgres',
	"create subscription s connection '$connection' publication everything",
	stderr => \$stderr);
like($stderr, qr/NOTICE:.*the tables of pg_fanout are not replicated/,
	'CREATE SUBSCRIPTION says that the tables of pg_fanout are left out');
change_source(1);
is(own_state($target), $before, 'neither the initial copy nor changes of the source touch the tables of pg_fanout');
is(query($target, q(select count(*) from pg_subscription_rel r join pg_class c on c.oid = srrelid
					where relnamespace = 'fanout'::regnamespace)),
	0, 'they are not in the subscription');

query($source, 'alter publication everything set (publish_via_partition_root = true)');
query($target, 'alter subscription s refresh publication');
change_source(2);
is(own_state($target), $before, 'nor if it publishes by way of the partitioned tables');

# What a trigger does that the apply worker fires is the target's own.
query($target, q(
	create function on_apply() returns trigger language plpgsql as $$
	begin
		perform fanout.declare_topic('from_' || new.id);
		perform fanout.publish('from_' || new.id, '1');
		return null;
	end $$;
	create trigger on_apply after insert on users for each row when (new.id = 777) execute function on_apply();
	alter table users enable always trigger on_apply));
query($source, q(insert into users values (777, 'fires')));
$source->wait_for_catchup('s');
is( query($target, q(select topic, state from fanout.outbox_status where topic = 'from_777')),
	'from_777|pending', 'a trigger in an apply worker may use pg_fanout');
$before = settled_state($target);

# ---- the same with event triggers off ----

query($target, 'alter event trigger pg_fanout_leave_subscriptions disable');
query($target, 'alter subscription s refresh publication');
$target->wait_for_subscription_sync($source, 's');
cmp_ok(
	query($target, q(select count(*) from pg_subscription_rel r join pg_class c on c.oid = srrelid
					 where relnamespace = 'fanout'::regnamespace)),
	'>', 5, 'with event triggers off, they are in the subscription');
change_source(3);
is(own_state($target), $before, 'even so, neither copy nor changes touch them');
query($source, 'alter publication everything set (publish_via_partition_root = false)');
query($target, 'alter subscription s refresh publication');
$target->wait_for_subscription_sync($source, 's');
change_source(4);
is(own_state($target), $before, 'by way of the partitions, too');
is( query($target, q(select count(*) > 0 from fanout.check_guards() where item = 'subscription s leaves pg_fanout alone')),
	't', 'check() tells of the subscription');
is( query($target, q(select hint from fanout.check_guards() where item ~ 'event trigger')),
	'Use ALTER EVENT TRIGGER pg_fanout_leave_subscriptions ENABLE ALWAYS.', 'and of the event trigger');

query($source, 'truncate fanout.held');
change_source(5);
is(own_state($target), $before, 'TRUNCATE of an empty table is harmless');
my $offset = -s $target->logfile;
query($source, 'truncate fanout.outbox');
$target->wait_for_log(qr/logical replication cannot truncate table "fanout.outbox_0"/, $offset);
is(own_state($target), $before, 'TRUNCATE of a table with messages is refused');
query($target, q(
	alter event trigger pg_fanout_leave_subscriptions enable always;
	alter subscription s disable));
query($target, q(
	alter subscription s enable;
	alter subscription s refresh publication));
change_source(6);
is(own_state($target), $before, 'the subscription goes on once they are taken out');
is(query($target, 'select count(*) from fanout.check_guards()'), 0, 'and check() is content');

# ---- the switch ----

my $applied = query($target, 'select count(*) from users');
query($target, $_) foreach 'alter subscription s disable', 'alter subscription s set (slot_name = none)', 'drop subscription s';
query($source, q(select pg_drop_replication_slot('s')));
$source->stop('fast');
$broker->amqp('purge', '--queue', 'exchange_user_g');
$target->append_conf('postgresql.conf', "pg_fanout.uri = '" . $broker->uri . "'");
$target->reload;
query($target, q(insert into users select i, 'target' from generate_series(100001, 100005) i));
query($target, q(select fanout.declare_binding('from_777', 'g')));
PgFanout::flush($target);
is_deeply(
	[ map { $_->{headers}->{key} } $broker->collect('exchange_user_g', expect => 6, idle => 0.5) ],
	[ 'unsent', 100001 .. 100005 ],
	'after the switch, all that was committed on the target is published');
is(query($target, 'select count(*) from users'), $applied + 5, 'nothing was lost of the tables that are replicated');

# ---- a ledger that cannot be used ----

my $node = $target;
my $future = q(select '99999999:99999999:'::pg_snapshot);
my $next = 10000;

refused('the ledger "fanout.sent" is empty', 'truncate fanout.sent', 'an empty ledger');
refused('the ledger "fanout.sent" was not written by this server',
	"insert into fanout.sent (segment, base, target, last_id, count) select current, ($future), ($future), 0, 0 from fanout.rotation",
	'an entry of another server');
refused('the ledger "fanout.sent" was not written by this server',
	"insert into fanout.sent (segment, base, target, last_id, count) select current, '3:3:', ($future), 0, 0 from fanout.rotation",
	'an entry whose batch is of another server');
refused('table "fanout.rotation" must have one row', 'delete from fanout.rotation', 'no current segment');
refused('table "fanout.inbox_rotation" must have one row', 'truncate fanout.inbox_rotation', 'no current segment of the inbox');
refused('table "fanout.outbox" has rows that this server did not write', q(
	alter table fanout.outbox_1 disable trigger pg_fanout_guard;
	insert into fanout.outbox select 1, 0, nextval('fanout.outbox_id_seq') + 1000000, '99999999', topic_id, gen_random_uuid(),
		null, 'foreign', null, '1', null, now() from fanout.topic where topic = 'exchange_user';
	alter table fanout.outbox_1 enable always trigger pg_fanout_guard),
	'rows of another server', 'foreign');

# all tables, as test suites do it, while the publisher runs
wait_until('idle');
query($node, q(
	do $$
	declare t regclass;
	begin
		for t in select oid from pg_class where relnamespace = 'fanout'::regnamespace and relkind = 'r' loop
			execute format('truncate %s cascade', t);
		end loop;
	end $$;
	select fanout.declare_bindings('{"exchange_user": ["g"]}')));
query($node, q(insert into users values (200001, 'after truncate')));
wait_until('passive');
like(query($node, 'select last_error from fanout.stat_publisher'), qr/must have one row/, 'TRUNCATE of all tables: the publisher waits');
query($node, 'select fanout.activate()');
PgFanout::flush($node);
ok((grep { $_ eq '200001' } keys_in_queue(1)), 'and goes on once the ledger is repaired');

# repaired by hand
wait_until('idle');
query($node, q(delete from fanout.rotation; select pg_terminate_backend(pid) from fanout.stat_publisher));
wait_until('passive');
query($node, 'insert into fanout.rotation values (0, now())');
wait_until('idle');
pass('it goes on by itself if somebody else puts it right');
isnt($node->psql('postgres', 'insert into fanout.rotation values (1, now())'), 0, 'there is never a second current segment');
isnt($node->psql('postgres', 'insert into fanout.inbox_rotation values (1, now())'), 0, 'nor one of the inbox');

# from some time on
PgFanout::flush($node);
query($node, q(insert into users select i, 'before' from generate_series(300001, 300003) i));
PgFanout::flush($node);
my $since = query($node, 'select clock_timestamp()');
query($node, q(insert into users select i, 'after' from generate_series(300004, 300006) i));
PgFanout::flush($node);
keys_in_queue(6);
is(query($node, 'select fanout.activate()'), 'it was active already; 0 messages will be published', 'activate() changes nothing where nothing is wrong');
query($node, 'truncate fanout.sent');
$node->psql('postgres', "select fanout.activate(since => '$since')", stdout => \$stdout, stderr => \$stderr);
is($stdout, 'the ledger "fanout.sent" is empty; 3 messages will be published', 'activate() says what it does');
like($stderr, qr/it is not known which messages were sent.*\d+ older messages count as sent/s, 'and what may repeat');
PgFanout::flush($node);
is_deeply([ keys_in_queue(3) ], [ 300004 .. 300006 ], 'with "since", what is older counts as sent');

# a transaction that is open meanwhile
my $open = $node->background_psql('postgres');
$open->query_until(qr/written/, q(begin; insert into users values (400001, 'open'); \echo written
));
query($node, q(insert into users values (400002, 'closed'); truncate fanout.sent; select fanout.activate(since => 'infinity')));
$open->query_until(qr/committed/, q(commit; \echo committed
));
$open->quit;
PgFanout::flush($node);
ok((grep { $_ eq '400001' } keys_in_queue(1)), 'a transaction that is open during the repair is published');

# ---- rows by hand ----

($stdout, $stderr) = ('', '');
$node->psql('postgres', q(
	insert into fanout.outbox select 0, 0, nextval('fanout.outbox_id_seq'), '7', topic_id, gen_random_uuid(),
		null, 'by hand', null, '1', null, now() from fanout.topic where topic = 'exchange_user'),
	stderr => \$stderr);
like($stderr, qr/row for table "fanout.outbox_0" is not of this transaction.*HINT:  Use fanout.publish\(\)/s,
	'a row of another transaction cannot be put into the outbox');
($stdout, $stderr) = ('', '');
$node->psql('postgres', q(update fanout.outbox set payload = '2'), stderr => \$stderr);
like($stderr, qr/row for table "fanout.outbox_0" is not of this transaction/, 'nor is a message changed that was written');
query($node, q(
	insert into fanout.outbox select 0, 0, nextval('fanout.outbox_id_seq'), pg_current_xact_id(), topic_id, gen_random_uuid(),
		null, 'by hand', null, '1', null, now() from fanout.topic where topic = 'exchange_user'));
query($node, q(select fanout.publish('exchange_user', '1', 'wakes')));
PgFanout::flush($node);
is_deeply([ keys_in_queue(2) ], [ 'by hand', 'wakes' ], 'one of the own transaction is a message as any other');

# ---- a transaction that keeps a segment from being emptied ----

$node->append_conf('postgresql.conf', 'pg_fanout.retention = 2s');
$node->reload;
my $segment = query($node, 'select current from fanout.rotation');
is(query($node, 'select count(*) from fanout.check_rings()'), 0, 'check() has nothing to say of a ring that turns');
my $reader = $node->background_psql('postgres');
my $pid = $reader->query_safe('begin; select pg_backend_pid(); lock table fanout.outbox in access share mode');
PgFanout::poll(
	sub {
		query($node, q(select fanout.publish('exchange_user', '1', 'turns')));
		query($node, 'select count(*) from fanout.check_rings()') > 0;
	}, 'a segment that cannot be emptied');
like(query($node, 'select * from fanout.check_rings()'),
	qr/^fanout.outbox_\d is emptied\|f\|due since .*, but process $pid uses it/, 'check() says which transaction is in the way, and since when');
$reader->query_safe("prepare transaction 'in the way'");
like(query($node, 'select * from fanout.check_rings()'),
	qr/but a prepared transaction uses it, in a transaction that began at 2/, 'also if it is a prepared one');
query($node, q(rollback prepared 'in the way'));
PgFanout::poll(sub { query($node, 'select count(*) from fanout.check_rings()') == 0 }, 'a ring that turns');
pass('and the ring turns when it has ended');
$reader->quit;
$node->append_conf('postgresql.conf', 'pg_fanout.retention = 1d');
$node->reload;
$broker->amqp('purge', '--queue', 'exchange_user_g');

# ---- sessions that replicate ----

query($node, q(set session_replication_role = replica; select fanout.pause('exchange_user')));
query($node, q(select fanout.publish('exchange_user', '1', 'paused')));
PgFanout::wait_for_state($node, 'held', count => 1, where => "key = 'paused'");
pass('a pause counts with session_replication_role = replica, too');
query($node, q(set session_replication_role = replica; select fanout.resume('exchange_user')));
PgFanout::flush($node);
keys_in_queue(1);

# ---- the name of the schema ----

foreach my $role ('origin', 'replica')
{
	$node->psql('postgres', "set session_replication_role = $role; alter schema fanout rename to outbox", stderr => \$stderr);
	like($stderr, qr/ERROR:  cannot rename schema fanout/, "ALTER SCHEMA RENAME is refused, with session_replication_role $role");
}
query($node, 'create schema plain; alter schema plain rename to plainer; alter schema fanout owner to current_user');
pass('other schemas, and other changes, are not');
$node->psql('postgres', 'alter extension pg_fanout set schema public', stderr => \$stderr);
like($stderr, qr/extension "pg_fanout" does not support SET SCHEMA/, 'ALTER EXTENSION SET SCHEMA is refused');
event_triggers('disable');
query($node, 'alter schema fanout rename to outbox');
$node->psql('postgres', q(insert into users values (500001, 'x')), stderr => \$stderr);
like($stderr, qr/HINT:  The extension pg_fanout is there, but its schema "fanout" or a part of it was renamed/,
	'if it was renamed all the same, the hint says so');
event_triggers('enable always');
query($node, 'create table while_renamed (a int); alter table while_renamed add b int; drop table while_renamed');
query($node, 'alter schema outbox rename to fanout; alter schema plainer rename to plainest');
query($node, q(insert into users values (500002, 'x')));
PgFanout::flush($node);
is_deeply([ keys_in_queue(1) ], [500002], 'and it can have its name back');
$node->stop('fast');

done_testing();

sub query
{
	my ($server, $sql) = @_;

	return $server->safe_psql('postgres', $sql);
}

# All rows of all tables of pg_fanout but those that only say whether and what the
# publisher has to count anew.
sub own_state
{
	my ($server) = @_;
	my $tables = query($server, q(
		select string_agg(format('select %L, r::text from %s r', c.oid::regclass, c.oid::regclass), ' union all ')
		from pg_class c where relnamespace = 'fanout'::regnamespace and relkind = 'r' and relname not in ('counted', 'tally')));

	return query($server, "$tables order by 1, 2");
}

# The same once the publisher has taken in what was declared, of which the note is removed.
sub settled_state
{
	my ($server) = @_;

	$server->poll_query_until('postgres', 'select count(*) = 0 from fanout.topology_change')
	  or die 'the publisher does not look at the topics';
	return own_state($server);
}

# Changes all kinds of tables of pg_fanout on the source, waits until the target
# has applied what was changed meanwhile, and sees to it that no apply worker failed.
sub change_source
{
	my ($round) = @_;
	my $worker = q(select pid from pg_stat_subscription where subname = 's' and relid is null and pid is not null);
	my ($pid, $topic) = (undef, "topic_$round");

	$target->poll_query_until('postgres', "select exists ($worker)") or die 'no apply worker';
	$pid = query($target, $worker);
	query($source, qq(
		insert into users select $round * 1000 + i, 'source' from generate_series(1, 3) i;
		select fanout.declare_binding('$topic', 'g');
		select fanout.pause('$topic');
		select fanout.publish('$topic', to_jsonb(i), 'k') from generate_series(1, 3) i;));
	PgFanout::wait_for_state($source, 'held', count => 3, where => "topic = '$topic'");
	query($source, qq(
		select fanout.resume('$topic');
		update fanout.topic set last_error = 'x' where topic = '$topic';
		select fanout.drop_binding('$topic', 'g', if_empty => false)));
	PgFanout::wait_for_state($source, 'sent', where => "topic = 'exchange_user'");
	query($source, qq(
		delete from fanout.topic_stat;
		insert into users values ($round * 1000 + 10, 'last')));
	$target->poll_query_until('postgres', "select exists (select from users where id = $round * 1000 + 10)")
	  or die 'not applied';
	is(query($target, $worker), $pid, "round $round: the apply worker goes on") if $round < 6;
	return;
}

# Those of pg_fanout, all.
sub event_triggers
{
	my ($action) = @_;

	foreach my $trigger (split /\n/, query($node, q(select evtname from pg_event_trigger where evtname like 'pg\_fanout%')))
	{
		query($node, "alter event trigger $trigger $action");
	}
	return;
}

sub wait_until
{
	return PgFanout::wait_for_publisher($node, $_[0]);
}

# Keys of the messages in the queue, at least so many.
sub keys_in_queue
{
	my ($expect) = @_;

	return map { $_->{headers}->{key} } $broker->collect('exchange_user_g', expect => $expect, idle => 0.5);
}

# Breaks the state; then nothing is published, everything says so, and after the
# repair everything is there.
sub refused
{
	my ($problem, $sql, $what, @also) = @_;
	my $log = -s $node->logfile;
	my $id = $next++;
	my %found;

	query($node, "insert into users values ($id, 'sent before')");
	PgFanout::flush($node);
	query($node, "$sql; select pg_terminate_backend(pid) from fanout.stat_publisher");
	query($node, "insert into users values (-$id, 'meanwhile')");
	$node->wait_for_log(qr/pg_fanout neither publishes nor consumes in database "postgres"\n.*DETAIL:  \Q$problem\E.*\n.*HINT:  Use fanout.activate/, $log);
	like(query($node, 'select last_error from fanout.stat_publisher'), qr/^\Q$problem\E/, "$what: last_error says so");
	like(
		query($node, q(select detail, hint from fanout.check_server() where item = 'database active' and not ok)),
		qr/^\Q$problem\E.*\|.*fanout.activate/, "$what: check() says so");
	is(query($node, q(select fanout.flush('1 s'))), 'f', "$what: nothing is published");
	is(query($node, "select state from fanout.outbox_status where key = '-$id'"), 'pending', "$what: outbox_status shows what waits");
	ok(!(grep { $_ eq "-$id" } keys_in_queue(0)), "$what: and nothing has arrived");

	query($node, 'select fanout.activate()');
	PgFanout::flush($node);
	$found{$_} = 1 foreach keys_in_queue(1);
	ok(!(grep { !$found{$_} } "-$id", @also), "$what: everything is published once it is repaired");
	is(query($node, 'select fanout.ledger_problem() is null'), 't', "$what: nothing is wrong any more");
	return;
}
