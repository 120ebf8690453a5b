# Sessions write in all the ways there are, at random, while their backends are killed,
# the server crashes, segments are rewritten, cut off, locked and rotated, and
# publishers come and go.  Every committed row becomes one message, and nothing that
# was rolled back becomes any.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $rounds = $ENV{PG_FANOUT_LONG} ? 60 : 3;
my $seed = $ENV{PG_FANOUT_SEED} || int(rand(1 << 30));
srand($seed);
note "PG_FANOUT_SEED=$seed";

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $node = PgFanout::cluster(
	'main', $proxy,
	init => { allows_streaming => 1 },
	conf => q(
autovacuum_naptime = 1s
autovacuum_vacuum_threshold = 50
autovacuum_vacuum_scale_factor = 0
max_prepared_transactions = 100
max_connections = 40
restart_after_crash = on
pg_fanout.retention = 4s
pg_fanout.retry_interval = 1s
));
my $dir = PostgreSQL::Test::Utils::tempdir();

sub sql { return $node->safe_psql('postgres', $_[0]); }

# What may fail, because of a lock or a crash.
sub try { $node->psql('postgres', "set lock_timeout = '2s'; $_[0]", on_error_die => 0, stderr => \my $err); return; }

sql( q(select fanout.declare_binding('t', 'g', 'classic');
	   create table t (id bigserial primary key, v text);
	   select fanout.capture('t', 't', '{insert}');
	   create table u (id bigint primary key default -nextval('t_id_seq'), v text);
	   create function nested(n integer) returns void language plpgsql as $$
	   begin
	   	for i in 1 .. n loop
	   		begin
	   			insert into t (v) values ('nested ' || i);
	   			if i % 3 = 0 then raise 'rolled back'; end if;
	   		exception when raise_exception then null;
	   		end;
	   	end loop;
	   end $$;
	   create function by_hand() returns void language sql as $$
	   	with r as (insert into u (v) values ('by hand') returning id)
	   	insert into fanout.outbox
	   	select (random() * 2)::int, (select oid from pg_database where datname = current_database()),
	   		nextval('fanout.outbox_id_seq'), pg_current_xact_id(), topic_id, gen_random_uuid(), 'by hand', null, null,
	   		json_build_object('after', json_build_object('id', r.id)), null, now()
	   	from fanout.topic, r where topic = 't' $$;
	));

# ---- what sessions do ----

my $prepared = 0;

sub bulk { return "insert into t (v) select repeat('b', 250) from generate_series(1, " . (1 + int(rand($_[0]))) . ') i'; }
sub pause { return sprintf('select pg_sleep(%.3f)', rand(0.4)); }

my @transactions = (
	sub { q(insert into t (v) values ('one')); },
	sub { q(insert into t (v) values ('one')); },
	sub { bulk(1500); },
	sub { 'begin; ' . bulk(5) . '; ' . pause() . '; ' . bulk(50) . '; ' . pause() . '; ' . bulk(3) . '; commit'; },
	sub {
		'begin; savepoint a; ' . bulk(200) . '; ' . pause() . '; rollback to a; ' . bulk(20) . '; release a; savepoint b; '
		  . bulk(5) . '; commit';
	},
	sub { 'begin; ' . bulk(3000) . '; ' . pause() . '; rollback'; },
	sub { 'begin; select nested(' . int(rand(150)) . '); ' . pause() . '; select nested(5); commit'; },
	sub { 'begin isolation level repeatable read; ' . bulk(5) . '; ' . pause() . '; ' . bulk(100) . '; commit'; },
	sub {
		my $name = 'p' . ++$prepared;

		"begin; " . bulk(20) . "; select nested(4); prepare transaction '$name'; " . pause() . '; '
		  . ("commit prepared '$name'", "rollback prepared '$name'", 'select 1')[ rand(3) ];
	},
	sub { "copy t (v) from stdin;\n" . join('', map { "copied $_\n" } 1 .. 1 + rand(400)) . '\\.' . "\nselect 1"; },
	sub { "set statement_timeout = '" . (1 + int(rand(30))) . "ms'; " . bulk(3000) . '; reset statement_timeout'; },
	sub { 'insert into t (v) select (1 / (i - 400))::text from generate_series(1, ' . int(rand(800)) . ') i'; },
	sub { 'begin; select by_hand(); ' . bulk(10) . '; ' . pause() . '; ' . (qw(commit rollback))[ rand(2) ]; },
	sub { q(insert into t (v) values (repeat(md5(random()::text), 400))); },
);

sub start_writer
{
	my ($number) = @_;
	my $file = "$dir/writer_$number.sql";

	unlink $file;
	append_to_file($file, join(";\n", map { $transactions[ rand @transactions ]->() } 1 .. 25) . ";\n");
	return IPC::Run::start([ 'psql', '-XAtq', '-f', $file, '-d', $node->connstr('postgres') ],
		'>', \my $out, '2>', \my $err, IPC::Run::timeout(300));
}

# ---- what happens to them ----

my $crashes = 0;

sub up { PgFanout::poll(sub { PgFanout::ask($node, 'select 1') eq '1' }, 'the server to be back'); return; }

sub kill_backend
{
	my $pid = PgFanout::ask($node, q(select pid from pg_stat_activity
		where backend_type = 'client backend' and pid <> pg_backend_pid() and state <> 'idle' order by random() limit 1));

	return if $pid eq '';
	$crashes++;
	PgFanout::kill_process($node, $pid);
	return;
}

my @disturbances = (
	sub { try("vacuum (truncate) fanout.outbox_$_") foreach 0 .. 2; },
	sub { try('vacuum full fanout.outbox_' . int(rand(3))); },
	sub { try('begin; lock table fanout.outbox_' . int(rand(3)) . ' in access exclusive mode; select pg_sleep(0.2); commit'); },
	sub { try('select pg_terminate_backend(pid) from fanout.stat_publisher'); },
	sub { try(q(select pg_cancel_backend(pid) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid())); },
	sub { $proxy->command('cut'); Time::HiRes::sleep(rand(1)); $proxy->command('pass'); },
	sub { try(q(delete from fanout.outbox where id in (select id from fanout.outbox_status where state = 'sent' order by random() limit 500))); },
	sub { try('create index hash_index on fanout.outbox_1 using hash (id)'); Time::HiRes::sleep(0.5); try('drop index fanout.hash_index'); },
	sub { try('select fanout.pause($$t$$)'); Time::HiRes::sleep(rand(2)); try('select fanout.resume($$t$$)'); },
	\&kill_backend,
);

# ---- what has arrived ----

sub arrived
{
	my ($name) = @_;

	sql('select fanout.resume($$t$$)');
	foreach my $gid (split /\n/, sql('select gid from pg_prepared_xacts'))
	{
		sql((rand(2) < 1 ? 'commit' : 'rollback') . " prepared '$gid'");
	}
	PgFanout::flush($node, timeout => '120 s');
	my %expected = map { $_ => 1 } split /\n/, sql('select id from t union all select id from u');
	sql('truncate t, u');
	my %message_ids;
	$message_ids{ $_->{body}->{after}->{id} }->{ $_->{message_id} } = 1 foreach $broker->collect('t_g', idle => 0.2);
	my $missing = grep { !$message_ids{$_} } keys %expected;
	my $invented = grep { !$expected{$_} } keys %message_ids;
	my $several = grep { keys %{ $message_ids{$_} } > 1 } keys %message_ids;

	is("$missing missing, $invented invented, $several several times", '0 missing, 0 invented, 0 several times',
		"$name: " . keys(%expected) . ' rows');
	return;
}

foreach my $round (1 .. $rounds)
{
	my @writers = map { start_writer($_) } 1 .. 6;

	while (grep { $_->pumpable } @writers)
	{
		$disturbances[ rand @disturbances ]->();
		Time::HiRes::sleep(rand(0.5));
		$_->pump_nb foreach grep { $_->pumpable } @writers;
	}
	$_->finish foreach @writers;
	up();
	if ($round % 3 == 0)
	{
		$node->stop('immediate');
		$node->start;
	}
	arrived("round $round");
}
note "$crashes crashes";

# ---- a standby takes over, with transactions prepared on its primary ----

$node->backup('backup');
my $standby = PgFanout::Node->new('standby');
$standby->init_from_backup($node, 'backup', has_streaming => 1);
$standby->start;
sql('begin; ' . bulk(3000) . "; prepare transaction 'first'");
sql(bulk(3000));
PgFanout::flush($node);
sql("begin; select nested(90); select by_hand(); prepare transaction 'second'");
sql(bulk(3000));
PgFanout::flush($node);
$node->wait_for_catchup($standby, 'replay', $node->lsn('insert'));
$node->stop('immediate');
$standby->promote;
$node = $standby;
sql("commit prepared 'first'");
sql(bulk(3000));
PgFanout::flush($node);
sql("commit prepared 'second'");
arrived('after the promotion of a standby');

$node->stop;
done_testing();
