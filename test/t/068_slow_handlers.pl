# Two databases on one queue, with handlers that take longer than the heartbeat:
# each message is applied in exactly one of them, and no connection is lost.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $long = $ENV{PG_FANOUT_LONG};
my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, extension => 0, conf => q(
log_statement = none
max_worker_processes = 24
pg_fanout.heartbeat = 2
));
my $rows = "$PostgreSQL::Test::Utils::tmp_check/experiments";

$node->safe_psql('postgres', "create database $_") foreach qw(a b c);
sql($_, 'create extension pg_fanout') foreach qw(a b c);

# A machine that stands still for longer than the heartbeat loses a connection, too, and
# with it acks, so that a message comes to both: then it is all made again.  Handlers that
# lose it do so each time.

# seconds of a call, calls, prefetch
foreach my $case ([ 0.4, 80, 100 ], $long ? ([ 10, 30, 4 ], [ 1, 200, 100 ]) : [ 6, 6, 2 ])
{
	my ($seconds, $count, $prefetch) = @$case;
	my ($topic, @lost);

	foreach my $try (1 .. 3)
	{
		$topic = 't' . ($seconds =~ s/\W/_/r) . "_$try";
		@lost = call_slowly($topic, $seconds, $count, $prefetch);
		last unless grep { $_ } @lost;
		note "$topic: connections lost by b and c: @lost";
		last if $try == 3;
		sql($_, "select fanout.unsubscribe('$topic', 'g')") foreach qw(b c);
	}
	my %times;
	$times{$_}++ foreach map { split(/\n/, sql($_, "select message_id from applied_$topic")) } qw(b c);
	is(join(' ', sort keys %times), join(' ', sort split(/\n/, sql('a', "select id from sent_$topic"))), "calls of $seconds s: all $count messages are applied");
	is(scalar(grep { $_ != 1 } values %times), 0, 'each in exactly one of two databases');
	cmp_ok(sql($_, "select count(*) from applied_$topic"), '>', 0, "$_ has applied some") foreach qw(b c);
	is("@lost", '0 0', 'no connection was ever lost');
	is(sql($_, "select skipped from fanout.stat_subscriptions where topic = '$topic'"), 0, "and nothing came to $_ twice") foreach qw(b c);
	sql($_, "select fanout.unsubscribe('$topic', 'g')") foreach qw(b c);
	append_to_file($rows, "| two databases on one queue, handlers of $seconds s, heartbeat 2 s | 068_slow_handlers | one transaction | $count | 0 | 0 |\n");
}

# More than a worker can do in reach of the broker's consumer_timeout goes back to
# the queue, for others.
sql('a', q(select fanout.declare_binding('much', 'g'); select fanout.publish('much', '{}', key => i::text) from generate_series(1, 300) i));
sql('b', q(set client_min_messages = warning;
create table applied_much (message_id uuid, n serial);
create function handle_much(m fanout.message) returns void language plpgsql as $$ begin perform pg_sleep(2); insert into applied_much (message_id) values (m.message_id); end $$;
select fanout.subscribe('much', 'g', 'handle_much(fanout.message)', prefetch => 1000)));
PgFanout::poll(sub { $broker->ctl('list_queues', '-p', $broker->vhost, 'name', 'messages_ready', 'messages_unacknowledged') =~ /^much_g\t(\d+)\t(\d+)$/m
	&& $1 > 100 && $2 < 190 }, 'most of the messages in the queue');
pass('of more than a worker can do in a few minutes most goes back to the queue');
wait_until('b', '(select count(*) > 3 from applied_much)');
is(sql('b', 'select count(*) - count(distinct message_id) from applied_much'), 0, 'and nothing is applied twice');

done_testing();

sub sql { return $node->safe_psql($_[0], $_[1]); }

# Has two databases apply messages that take so many seconds each, and returns how many
# connections each of them has lost.
sub call_slowly
{
	my ($topic, $seconds, $count, $prefetch) = @_;

	sql('a', "select fanout.declare_binding('$topic', 'g')");
	foreach my $database (qw(b c))
	{
		sql($database, qq(
set client_min_messages = warning;
create table applied_$topic (message_id uuid, key text, n serial, finished boolean not null);
create function handle_$topic(m fanout.message) returns void language plpgsql as \$\$
begin
	perform pg_sleep($seconds);
	insert into applied_$topic (message_id, key, finished) values (m.message_id, m.key, true);
end \$\$;
select fanout.subscribe('$topic', 'g', 'handle_$topic(fanout.message)', prefetch => $prefetch)));
		wait_until($database, "(select state = 'idle' from fanout.stat_subscriptions where topic = '$topic')");
	}
	sql('a', "create table sent_$topic as select fanout.publish('$topic', jsonb_build_object('n', i), key => i::text) as id from generate_series(1, $count) i");
	PgFanout::poll(sub { sum("select count(*) from applied_$topic") >= $count }, "$count messages of $seconds s", 240);
	PgFanout::poll(sub { $broker->count("${topic}_g") == 0 }, 'an empty queue');
	sleep 1;
	return map { sql($_, "select reconnects from fanout.stat_subscriptions where topic = '$topic'") } qw(b c);
}

sub sum
{
	my ($query) = @_;

	return sql('b', $query) + sql('c', $query);
}

sub wait_until
{
	my ($database, $condition) = @_;

	$node->poll_query_until($database, "select coalesce($condition, false)")
	  or die "not so in $database: $condition\n" . sql($database, 'select * from fanout.stat_subscriptions');
	return;
}
