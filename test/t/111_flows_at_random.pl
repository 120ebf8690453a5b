# While clients commit and roll back transactions of all sizes, somebody pauses, resumes,
# alters, declares, drops, purges and redrives topics at random, leaves such transactions
# open or rolls them back, and broker, network, publisher and server fail.  At each rest
# the queues have what was committed and not purged, and of each key the last change last.
#
# PG_FANOUT_LONG makes it long, PG_FANOUT_SEED repeats what the tester does.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $rounds = $ENV{PG_FANOUT_LONG} ? 20 : 2;
my $seconds = $ENV{PG_FANOUT_LONG} ? 20 : 7;
my $seed = $ENV{PG_FANOUT_SEED} || int(rand(2**31));
my $rows = "$PostgreSQL::Test::Utils::tmp_check/experiments";
my $dir = PostgreSQL::Test::Utils::tempdir();
my $writers = 3;

my @written = map { "written_$_" } 1 .. 5;
my @captured = qw(captured_1 captured_2);
my @topics = (@written, @captured, 'full');

# Topics whose messages may become dead letters: redriven ones come late.
my @loose = qw(written_5 captured_2 full);
my %loose = map { $_ => 1 } @loose;

my $broker = PgFanout::broker(private => 1);
my $proxy = $broker->proxy;
my $node = PgFanout::cluster('main', $proxy, conf => q(
log_statement = none
restart_after_crash = on
pg_fanout.max_channels = 5
pg_fanout.max_in_flight = 100
pg_fanout.retry_interval = 100ms
pg_fanout.retry_limit = 3
pg_fanout.confirm_timeout = 2s
pg_fanout.connect_timeout = 2s
pg_fanout.heartbeat = 2s
pg_fanout.retention = 2s
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

note "seed $seed";
srand($seed);

# What was committed, by message id; what was given up by purge().
sql(q(
create table committed (message_id uuid, topic text, dead boolean);
create table purged (message_id uuid, state text);
create procedure write(writer int, duration interval) language plpgsql as $$
declare
	last timestamptz := clock_timestamp() + duration;
	name text;
	size int;
begin
	while clock_timestamp() < last loop
		for i in 1 .. (array[1, 1, 1, 3])[1 + floor(random() * 4)] loop
			size := (array[1, 1, 1, 1, 1, 1, 2, 2, 5, 5, 20, 20, 100, 800])[1 + floor(random() * 14)] * (1 + random());
			if random() < 0.7 then
				name := (array['written_1', 'written_2', 'written_3', 'written_4', 'written_5', 'full'])[1 + floor(random() * 6)];
				insert into committed select fanout.publish(name, to_jsonb(n), writer || '-' || (random() * 9)::int), name
				from generate_series(1, size) n;
			elsif random() < 0.03 then
				-- no frame has room for such headers
				insert into committed select fanout.publish('written_1', '1', headers => jsonb_build_object('h', repeat('x', 100000))), 'written_1', true;
			else
				name := 'captured_' || 1 + floor(random() * 2);
				execute format('insert into %I select $1 * 1000 + (random() * 20)::int, n from generate_series(1, $2) n'
					' on conflict (id) do nothing', name) using writer, least(size, 20);
				execute format('update %I set n = n + 1 where id / 1000 = $1', name) using writer;
				if random() < 0.2 then
					execute format('update %I t set id = id + 100 where id / 1000 = $1 and id %% 1000 < 3'
						' and not exists (select from %1$I o where o.id = t.id + 100)', name) using writer;
				elsif random() < 0.2 then
					execute format('delete from %I where id / 1000 = $1 and random() < 0.5', name) using writer;
				elsif random() < 0.03 then
					execute format('truncate %I', name);
				end if;
			end if;
		end loop;
		insert into committed select o.message_id, t.topic from fanout.outbox o join fanout.topic t using (topic_id)
		where o.xid = pg_current_xact_id() and t.topic ~ 'captured';
		if random() < 0.1 then
			rollback;
		else
			commit;
		end if;
		perform pg_sleep(random() * 0.3);
	end loop;
end $$
));
sql("select fanout.declare_binding('$_', 'g', " . ($_ eq 'written_2' ? q('quorum') : q('classic')) . ')') foreach @written, @captured;
sql(q(select fanout.declare_binding('full', 'g', 'classic', '{"x-max-length": 500, "x-overflow": "reject-publish"}')));
sql("create table $_ (id int primary key, n int); select fanout.capture('$_', '$_')") foreach @captured;
PgFanout::flush($node);

# ---- what is done at random ----

sub any { return $_[ rand @_ ]; }

# What of a topic waits, or is dead, is noted by the same snapshot that purge() goes by.
sub purge
{
	my ($topic, $held, $states) = @_;

	return "set transaction isolation level repeatable read; insert into purged select message_id, state from fanout.outbox_status where topic = '$topic' and state in ($states);"
	  . " select fanout.purge('$topic', held => $held)";
}

my $temporary = 0;
my @control = (
	[ 6, 'pause', sub { return "select fanout.pause('" . any(@topics) . "')" } ],
	[ 8, 'resume', sub { return "select fanout.resume('" . any(@topics) . "')" } ],
	[ 2, 'alter_topic', sub { return "select fanout.alter_topic('" . any(@loose) . "', on_exhausted => '" . any('hold', 'dead_letter') . "')" } ],
	[ 1, 'alter_topic format', sub { return "select fanout.alter_topic('" . any(@captured) . "', format => '" . any('debezium', 'row', 'cloudevents') . "')" } ],
	[ 2, 'declare_binding', sub { return "select fanout.declare_binding('" . any(@written) . "', 'other', 'classic')" } ],
	[ 2, 'drop_binding', sub { return "select fanout.drop_binding(topic, 'other', false, false) from fanout.bindings where consumer_group = 'other' and state <> 'dropping' order by random() limit 1" } ],
	[ 2, 'declare and write', sub { return "select fanout.declare_binding('temporary_" . ++$temporary . "', 'g', 'classic'), fanout.publish('temporary_$temporary', to_jsonb(i), 'k') from generate_series(1, 500) i" } ],
	[ 2, 'drop_topic', sub { return "select fanout.drop_binding(topic, 'g', false, false) from fanout.bindings where topic ~ 'temporary' and state <> 'dropping'; select fanout.purge(topic, held => true), fanout.drop_topic(topic) from fanout.topics where topic ~ 'temporary' and state <> 'dropping'" } ],
	[ 2, 'purge(held)', sub { return purge(any(@topics), 'true', q('held', 'pending')) } ],
	[ 1, 'purge', sub { return purge(any(@topics), 'false', q('dead')) } ],
	[ 3, 'redrive', sub { return 'select fanout.redrive(' . any('', map { "'$_'" } @loose) . ')' } ],
	[ 1, 'flush', sub { return q(select fanout.flush('100 ms')) } ],
	[ 1, 'verify', sub { return q(select fanout.verify('100 ms')) } ],
	[ 1, 'publisher terminated', sub { return 'select pg_terminate_backend(pid) from fanout.stat_publisher' } ],
);
# And what is done to broker, network and publisher.
my @trouble = (
	[ 4, 'unbound', sub { $broker->amqp('unbind', '--exchange', $_, '--queue', "${_}_g") foreach any(@written, @captured) } ],
	[ 2, 'unbound and deleted', sub { $broker->amqp('delete', '--exchange', $_) foreach any(@written, @captured) } ],
	[ 3, 'queue full no more', sub { take('full') } ],
	[ 3, 'reset', sub { $proxy->command('reset') } ],
	[ 3, 'frozen', sub { $proxy->command(any('freeze', 'freeze-to-server', 'freeze-to-client', 'freeze-open')); sleep rand(any(0.5, 3)); $proxy->command('pass') } ],
	[ 2, 'slow', sub { $proxy->command(any('delay 30', 'throttle 200000')); sleep rand(1); $proxy->command('pass') } ],
	[ 2, 'cut', sub { $proxy->command(any('cut-in body', 'cut-in basic.ack', 'cut-in queue.declare-ok', 'cut-after 20000')); sleep rand(1); $proxy->command('pass') } ],
	[ 2, 'settings', sub { sql('alter system set pg_fanout.max_in_flight = ' . any(1, 20, 100, 2000)); sql('alter system set pg_fanout.max_channels = ' . any(4, 5, 20)); sql('select pg_reload_conf()') } ],
);

my @crashes = (
	[ 'server, immediately', sub { $node->stop('immediate'); $node->start } ],
	[ 'publisher, SIGKILL', sub { PgFanout::kill_process($node, PgFanout::publisher_pid($node)) } ],
	[ 'broker, SIGKILL', sub { $broker->kill; sleep rand(1); $broker->start } ],
	[ 'broker, stopped', sub { $broker->stop; $broker->start } ]);

sub chosen
{
	my $n = rand(eval { my $sum = 0; $sum += $_->[0] foreach @_; $sum });

	foreach my $each (@_)
	{
		return $each if ($n -= $each->[0]) < 0;
	}
	return $_[-1];
}

my (%done, %refused);

sub control
{
	my $each = chosen(@control);
	my $hold = rand() < 0.2 ? rand(1) : 0;
	my $how = rand() < 0.15 ? 'rollback' : 'commit';
	my $stderr = '';

	# the server may end at any moment
	eval { $node->psql('postgres', "set lock_timeout = '3s'; begin; " . $each->[2]->() . "; select pg_sleep($hold); $how", stderr => \$stderr) };
	$done{"$each->[1]"}++;
	$refused{$1}++ if $stderr =~ /ERROR:  (.*)/;
	return;
}

sub trouble
{
	my $each = chosen(@trouble);

	eval { $each->[2]->() };
	$done{"$each->[1]"}++;
	return;
}

sub write_meanwhile
{
	my ($for, $disturb) = @_;
	my $stop = "$dir/stop";
	my $connstr = $node->connstr('postgres');
	my @running = map {
		IPC::Run::start([ 'bash', '-c', qq(while [ -d $dir ] && [ ! -e $stop ]; do psql -XAtq -d "$connstr" -c "call write($_, '1 s')" || sleep 0.3; done) ],
			'<', \undef, '>', \my $out, '2>', \my $err)
	} 1 .. $writers;
	my $end = time + $for;

	$disturb->() while time < $end;
	append_to_file($stop, '');
	$_->finish foreach @running;
	unlink $stop;
	return;
}

# ---- at rest ----

my %arrived;	# topic => message id => 1

sub take
{
	my ($topic) = @_;
	my @messages = $broker->collect("${topic}_g", expect => $broker->count("${topic}_g"), idle => 0.2);

	$arrived{$topic}->{ $_->{message_id} } = 1 foreach @messages;
	return @messages;
}

sub settle
{
	$proxy->command('pass');
	sql($_) foreach 'alter system reset pg_fanout.max_in_flight', 'alter system reset pg_fanout.max_channels', 'select pg_reload_conf()';
	my $deadline = time + 400;
	my $flushed = '';
	while ($flushed ne 't' && time < $deadline)
	{
		sql("select fanout.resume('$_')") foreach @topics;
		take('full');
		$flushed = sql(q(select fanout.flush('3 s')));
	}
	is($flushed, 't', 'everything is sent') or diag(PgFanout::status($node, 'postgres'), sql('select * from fanout.check() where not ok'));
	ok($node->poll_query_until('postgres', 'select count(*) = 0 from fanout.detached'), 'all topics join again');
	ok($node->poll_query_until('postgres', q(select (select count(*) from fanout.held) + (select count(*) from fanout.purged) + (select count(*) from fanout.stall) = 0)),
		'nothing is left behind');
	ok($node->poll_query_until('postgres', 'select count(*) = 0 from fanout.stat_topics where pending + held > 0'), 'and nothing is shown to wait');
	return;
}

sub check_queue
{
	my ($topic) = @_;
	my @messages = take($topic);
	my %ids = map { $_->{message_id} => 1 } @messages;
	my %committed = map { $_ => 1 } split /\n/, sql("select message_id from committed where topic = '$topic'");
	my %purged = map { $_ => 1 } split /\n/, sql('select message_id from purged');
	my %dead = map { $_ => 1 } split /\n/, sql("select message_id from fanout.dead_letter where topic = '$topic'");
	my @missing = grep { !$arrived{$topic}->{$_} && !$purged{$_} && !$dead{$_} } keys %committed;
	my @invented = grep { !$committed{$_} } keys %ids;

	note sprintf('%s: %d messages, %d of them again', $topic, scalar(@messages), @messages - keys %ids);
	is(scalar(@missing), 0, "$topic: what was committed is there")
	  or diag(sql("select o.*, null as payload from fanout.outbox o where message_id = '$missing[0]'"));
	is(scalar(@invented), 0, "$topic: what was rolled back is not");
	# what was purged while it was to be sent again came before what was sent again
	is(PgFanout::overtaken(grep { !$purged{ $_->{message_id} } } @messages), 0, "$topic: in order per key") unless $loose{$topic};
	return;
}

foreach my $round (1 .. $rounds)
{
	my $crash_at = time + rand($seconds);
	my $large_at = $round % 2 ? time + rand($seconds) : 0;

	write_meanwhile($seconds, sub
	{
		if (time > $crash_at)
		{
			my $crash = any(@crashes);

			$crash->[1]->();
			$done{ $crash->[0] }++;
			$crash_at += 3600;
		}
		if ($large_at && time > $large_at)
		{
			eval { $node->psql('postgres', q(insert into committed select fanout.publish('written_3', to_jsonb(i), 'l' || i % 50), 'written_3' from generate_series(1, 21000) i)) };
			$large_at = 0;
		}
		rand() < 0.7 ? control() : trouble();
		sleep rand(0.1);
	});
	settle();
	check_queue($_) foreach @topics;
}
note join(', ', map { "$done{$_} x $_" } sort keys %done);
note join(', ', map { "$refused{$_} x $_" } sort keys %refused);
# the publisher may have given up a message that purge() still saw waiting
is(sql(q(select count(*) from committed where dead and message_id not in (select message_id from purged union select message_id from fanout.dead_letter))), 0,
	'messages that no frame has room for are dead letters');
is(sql(q(select count(*) from fanout.dead_letter join purged using (message_id) where purged.state = 'dead')), 0, 'and no dead letter that was purged is there');
my $total = sql('select count(*) from committed');
append_to_file($rows, "| pause(), resume(), purge(), declare, drop, redrive() at random, with failures of everything | 111_flows_at_random | $writers clients | $total | 0 | 0 |\n");

done_testing();
