# Topics that leave the main cursor and join it again, all the time and while their
# publisher is ended: no message is missing, each key's last message comes last.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $seconds = 8;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster(
	'main', $broker,
	conf => q(
pg_fanout.retry_interval = 100ms
pg_fanout.max_in_flight = 200
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

foreach my $topic (qw(flapping paused quiet))
{
	sql( qq(select fanout.declare_binding('$topic', 'g', 'classic');
		create table $topic (id int primary key, n int);
		insert into $topic select i, 0 from generate_series(1, 20) i;
		select fanout.capture('$topic', '$topic')));
}
PgFanout::flush($node);

# Writes the same to all three tables.
sub write_meanwhile
{
	my ($disturb) = @_;
	my $file = PostgreSQL::Test::Utils::tempdir() . '/write.sql';

	append_to_file($file, join('', "\\set id random(1, 20)\nbegin;\n",
			map({ "update $_ set n = n + 1 where id = :id;\n" } qw(flapping paused quiet)), "commit;\n"));
	my $bench = IPC::Run::start([ 'pgbench', '-n', '-c', 4, '-R', 400, '-T', $seconds, '-f', $file, $node->connstr('postgres') ],
		'>', \my $out, '2>', \my $err, IPC::Run::timeout(180));
	my $end = Time::HiRes::time() + $seconds;

	$disturb->() while Time::HiRes::time() < $end;
	$bench->finish;
	return;
}

sub start_flapping
{
	return IPC::Run::start(
		[
			"$PgFanout::lib/amqp", 'flap', '--uri', $broker->uri, '--exchange', 'flapping', '--queue', 'flapping_g',
			'--interval', '0.02', '--count', 100000
		],
		'<', \undef, '>', \my $out, '2>', \my $err);
}

# Everything arrives, and of each key the last change last.  What a queue has got twice
# counts where it came last.
my %arrived;

sub all_in_order
{
	my ($name, $topic) = @_;
	my @messages = $broker->collect("${topic}_g", idle => 0.2);
	my %ids = map { $_->{message_id} => 1 } @messages;

	$arrived{$_} = 1 foreach keys %ids;
	my $missing = sql("select count(*) from fanout.outbox o join fanout.topic t using (topic_id)"
		  . " where topic = '$topic' and message_id <> all ('{" . join(',', keys %arrived) . "}')");

	my $other = sql("select count(*) from unnest('{" . join(',', keys %ids) . "}'::uuid[]) id where id not in (select message_id from fanout.outbox)");

	note sprintf('%s: %s: %d messages, %d of them again', $name, $topic, scalar(@messages), @messages - keys %ids);
	is($missing, 0, "$name: no message of topic \"$topic\" is missing");
	is($other, 0, "$name: none comes again with another id");
	is(PgFanout::overtaken(@messages), 0, "$name: a key's messages end in order");
	return;
}

sub settle
{
	my ($name) = @_;

	sql(q(select fanout.resume('paused'); select fanout.resume('flapping')));
	PgFanout::poll(sub { sql(q(select fanout.flush('5 s'))) eq 't' }, 'everything to be sent');
	ok(1, "$name: everything is sent");
	PgFanout::poll(sub { sql('select count(*) from fanout.detached') == 0 }, 'all topics to join');
	all_in_order($name, $_) foreach qw(flapping paused quiet);
	return;
}

sub pause_and_resume
{
	sql(q(select fanout.pause('paused')));
	Time::HiRes::sleep(rand(0.3));
	sql(q(select fanout.resume('paused')));
	Time::HiRes::sleep(rand(0.3));
	return;
}

my $flapping = start_flapping();
write_meanwhile(\&pause_and_resume);
$flapping->kill_kill;
settle('a queue that comes and goes, and a pause, again and again');
like(slurp_file($node->logfile), qr/topic "flapping" is stalled/, 'its messages were returned meanwhile');

$flapping = start_flapping();
write_meanwhile(
	sub
	{
		pause_and_resume();
		sql('select pg_terminate_backend(pid) from fanout.stat_publisher') if rand() < 0.5;
	});
$flapping->kill_kill;
settle('the same while publishers end');

# ---- the server crashes while a topic is in a state ----

sub wait_until
{
	my ($condition, $what) = @_;

	PgFanout::poll(sub { sql("select $condition") eq 't' }, $what);
	return;
}

my $updates = 'update flapping set n = n + 1; update paused set n = n + 1; update quiet set n = n + 1;';
my $is_detached = q(exists (select from fanout.detached join fanout.topic using (topic_id) where topic = '%s'));

# A topic joins as soon as it has read as far as the main cursor, unless its oldest message
# has been in flight for 200 ms.  It has no more to read than one step takes, so that it
# joins before its first message is published, or in the moment after.  Its queue
# does not confirm, so that it goes on joining until others wait for it.
sub join_hanging
{
	sql("select fanout.pause('paused'); $updates");
	wait_until(sprintf($is_detached, 'paused'), 'it to be detached');
	$broker->suspend_queue('paused_g');
	sql(q(select fanout.resume('paused')));
	wait_until(q((select in_flight > 0 from fanout.stat_publisher)), 'messages in flight');
	return;
}

# What is done until the topic is in that state, and after the crash.
my @states = (
	[
		'detached, since it is paused',
		sub { sql("select fanout.pause('paused'); $updates"); wait_until(sprintf($is_detached, 'paused'), 'it to be detached') },
		sub { }
	],
	[
		'detached, since it was refused',
		sub
		{
			sql(q(select fanout.drop_binding('flapping', 'g', false, false)));
			wait_until(q(not exists (select from fanout.bindings where topic = 'flapping')), 'the queue to be dropped');
			sql($updates);
			wait_until(q(exists (select from fanout.stat_topics where topic = 'flapping' and stalled_since is not null)), 'it to be stalled');
		},
		sub { sql(q(select fanout.declare_binding('flapping', 'g', 'classic'))) }
	],
	[
		'leaving, with messages in flight',
		sub { $broker->suspend_queue('paused_g'); sql($updates); wait_until(q((select in_flight > 0 from fanout.stat_publisher)), 'messages in flight');
			sql(q(select fanout.pause('paused'))); Time::HiRes::sleep(0.3) },
		sub { $broker->resume_queue('paused_g') }
	],
	[
		'probing, with its probe in flight',
		sub
		{
			sql(q(alter system set pg_fanout.confirm_timeout = '5s'));
			sql('select pg_reload_conf()');
			$broker->message_store('suspend');
			sql("select fanout.publish('paused', to_jsonb(repeat('x', 10000)), 'large') from generate_series(1, 10)");
			wait_until(q((select attempts >= 1 from fanout.stat_topics where topic = 'paused')
				and (select in_flight = 1 from fanout.stat_publisher)), 'it to be tried again');
		},
		sub { $broker->message_store('resume'); sql('alter system reset pg_fanout.confirm_timeout'); sql('select pg_reload_conf()') }
	],
	[
		'catching up',
		sub
		{
			sql(q(select fanout.pause('paused')));
			sql($updates x 500);
			sql(q(select fanout.resume('paused')));
			wait_until(q((select pending < 9900 from fanout.stat_topics where topic = 'paused')), 'a part to be sent');
		},
		sub { }
	],
	[
		'joining, what it has read by itself being in flight',
		sub { join_hanging() },
		sub { $broker->resume_queue('paused_g') }
	],
	[
		'joining, with messages of the main cursor behind these',
		sub { join_hanging(); sql($updates) },
		sub { $broker->resume_queue('paused_g') }
	],
	(
		# at whatever point of it
		map {
			[
				'joining, or soon',
				sub
				{
					sql("select fanout.pause('paused'); $updates");
					sql("select fanout.resume('paused'); $updates");
					Time::HiRes::sleep(rand(0.15));
				},
				sub { }
			]
		} 1 .. 2
	));

foreach my $each (@states)
{
	my ($name, $begin, $end) = @$each;

	$begin->();
	$node->stop('immediate');
	$node->start;
	sql($updates);
	$end->();
	settle("a crash while a topic is $name");
}

# ---- held messages in flight, while others are declared and held ----

sql(q(select fanout.declare_binding('held', 'g', 'classic')));
PgFanout::flush($node);

# So many dead letters of a topic, as if they had been refused; they are redriven.
sub hold
{
	my ($topic, $first, $last) = @_;

	sql(qq(insert into fanout.dead_letter (id, topic, message_id, type, payload, xid, created_at, reason, attempts)
		select nextval('fanout.outbox_id_seq'), '$topic', gen_random_uuid(), 't', to_jsonb(i), pg_current_xact_id(), now(), 'refused', 1
		from generate_series($first, $last) i;
		select fanout.redrive('$topic')));
	return;
}

# more than are read at once; the queue confirms some of them now and then, so that there are
# always some in flight, however long anything else takes
$broker->suspend_queue('held_g');
hold('held', 1, 20_000);
foreach my $i (1 .. 3)
{
	wait_until('(select in_flight > 0 from fanout.stat_publisher)', 'messages in flight');
	$broker->eval_queue('held_g', 'P = amqqueue:get_pid(Q), sys:resume(P), timer:sleep(50), sys:suspend(P)');
	wait_until('(select in_flight > 0 from fanout.stat_publisher)', 'more messages in flight');
	sql("select fanout.declare_binding('other$i', 'g', 'classic'); select fanout.publish('other$i', '1')");
	PgFanout::poll(sub { $broker->count("other${i}_g") == 1 }, 'its message');
	hold('held', 20_000 + 50 * $i - 49, 20_000 + 50 * $i);
}
$broker->resume_queue('held_g');
PgFanout::flush($node);
is_deeply([ map { $_->{body} } $broker->collect('held_g', expect => 20_150) ], [ 1 .. 20_150 ], 'held messages arrive once, in order');

done_testing();
