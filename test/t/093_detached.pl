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
	my %last;
	my %newest;
	my $overtaken = 0;

	$last{ $messages[$_]->{message_id} } = $_ foreach 0 .. $#messages;
	$arrived{$_} = 1 foreach keys %last;
	my $missing = sql("select count(*) from fanout.outbox o join fanout.topic t using (topic_id)"
		  . " where topic = '$topic' and message_id <> all ('{" . join(',', keys %arrived) . "}')");

	foreach my $message (map { $messages[$_] } sort { $a <=> $b } values %last)
	{
		my ($key, $sequence) = @{ $message->{headers} }{qw(key sequence)};

		$overtaken++ if defined $newest{$key} && $newest{$key} > $sequence;
		$newest{$key} = $sequence;
	}
	note sprintf('%s: %s: %d messages, %d of them again', $name, $topic, scalar(@messages), @messages - keys %last);
	is($missing, 0, "$name: no message of topic \"$topic\" is missing");
	is($overtaken, 0, "$name: a key's messages end in order");
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

done_testing();
