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

my $seconds = 12;

my $broker = PgFanout::broker(private => 1);
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
	my @messages = $broker->collect("${topic}_g", idle => 2);
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
	PgFanout::poll(sub { sql(q(select fanout.flush('5 s'))) eq 't' }, 'everything to be sent', 120);
	ok(1, "$name: everything is sent");
	PgFanout::poll(sub { sql('select count(*) from fanout.detached') == 0 }, 'all topics to join', 30);
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

# A topic that waits for a queue that does not answer keeps what it does.
sub hang
{
	my ($topic, $what) = @_;
	my $vhost = $broker->vhost;

	$broker->ctl('eval', qq({ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"$vhost">>, queue, <<"${topic}_g">>)), sys:$what(amqqueue:get_pid(Q)).));
	return;
}

sub wait_until
{
	my ($condition, $what) = @_;

	PgFanout::poll(sub { sql("select $condition") eq 't' }, $what, 60);
	return;
}

my $updates = 'update flapping set n = n + 1; update paused set n = n + 1; update quiet set n = n + 1;';
my $is_detached = q(exists (select from fanout.detached join fanout.topic using (topic_id) where topic = '%s'));

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
		sub { hang('paused', 'suspend'); sql($updates); wait_until(q((select in_flight > 0 from fanout.stat_publisher)), 'messages in flight');
			sql(q(select fanout.pause('paused'))); Time::HiRes::sleep(0.3) },
		sub { hang('paused', 'resume') }
	],
	[
		'probing',
		sub
		{
			hang('paused', 'suspend');
			sql(q(alter system set pg_fanout.confirm_timeout = '1s'));
			sql('select pg_reload_conf()');
			sql($updates);
			wait_until(q((select attempts >= 2 from fanout.stat_topics where topic = 'paused')), 'it to be tried again');
		},
		sub { hang('paused', 'resume'); sql('alter system reset pg_fanout.confirm_timeout'); sql('select pg_reload_conf()') }
	],
	[
		'catching up',
		sub
		{
			sql(q(select fanout.pause('paused')));
			sql($updates x 500);
			sql(q(select fanout.resume('paused')));
			wait_until(q((select pending < 490 from fanout.stat_topics where topic = 'paused')), 'a part to be sent');
		},
		sub { }
	],
	(
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
		} 1 .. 4
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

done_testing();
