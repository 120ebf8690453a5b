# A broker that lies to a consumer: it may connect again, it may never crash,
# hang, fill the memory, or apply a message twice; and with an honest broker
# everything goes on.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

# Those that are no reason to hang up: what is said to be a message is taken
# for one, and an answer that says who is meant is not asked for more.
my %harmless = map { $_ => 1 } (
	'delivery before consume-ok',
	'consume-ok of another',
	'tags with gaps',
	'delivery for an unknown consumer',
	'message twice',
	'body of 500 MB, of which nothing comes',
	'headers of 60 kB, beyond the prefetch',
	'headers nested 9,000 times',
	'an id of NULs',
	'return to a consumer');

my $liar = PgFanout::Liar->new;
my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
pg_fanout.connect_timeout = 1s
pg_fanout.retry_interval = 100ms
pg_fanout.consumer_memory = 8MB
));
my $messages = 500;

$node->safe_psql('postgres', q(
create table applied (message_id uuid, body jsonb);
create function apply(m fanout.message) returns void language plpgsql as $$
begin
	if m.body ? 'fail' then raise exception 'fails'; end if;
	insert into applied values (m.message_id, m.body);
end $$;
select fanout.declare_binding('t', 'g')));
sql(qq(select fanout.publish('t', jsonb_build_object('n', i)) from generate_series(1, $messages) i));
PgFanout::flush($node);
set_uri($liar->uri('nowhere'));
$node->safe_psql('postgres', q(
select fanout.subscribe('t', 'g', 'apply(fanout.message)', retry_delay => '1 min')));

my @lies = split(/\|/, $liar->command('list consumers'));
PgFanout::poll(sub { sql('select pid from fanout.stat_subscriptions') }, 'a worker');
my $pid = sql('select pid from fanout.stat_subscriptions');
foreach my $lie (@lies)
{
	$liar->command("lie $lie");
	# by a vhost of its own, so that the pauses between connections begin anew
	my $vhost = lc $lie =~ s/\W+/_/gr;
	my $offset = -s $node->logfile;
	set_uri($liar->uri($vhost));
	PgFanout::poll(sub { told() >= 1 }, "a chance to tell: $lie");
	if ($harmless{$lie})
	{
		# it may have been told to the connection before, too
		my $connections = sub { scalar(() = slurp_file($node->logfile, $offset) =~ m{consumer of t_g connected to the broker at \S+/$vhost$}mg) };

		PgFanout::poll(sub { $connections->() > 0 }, "a connection for: $lie");
		sleep 1.5;
		is($connections->(), 1, "$lie: it goes on");
	}
	else
	{
		PgFanout::poll(sub { told() >= 2 }, "a new connection after: $lie");
		pass("$lie: it connects again");
	}
}
is(sql('select pid from fanout.stat_subscriptions'), $pid, 'the consumer is the one that it was before ' . @lies . ' lies');
cmp_ok(peak_memory(), '<', 200, 'memory stays bounded');
my $given = sql('select count(*) from applied');
cmp_ok($given, '>', 0, 'what was given as a whole is applied');

# Then somebody honest

set_uri($broker->uri);
$node->poll_query_until('postgres', "select count(*) = $messages from applied where body ? 'n'") or die sql('select * from fanout.stat_subscriptions');
is(sql('select count(*) - count(distinct message_id) from applied'), '0', 'with an honest broker nothing is missing, and nothing was applied twice');
is(sql(q(select count(*) from applied where not body ? 'n' and message_id::text !~ '^[0-9]{8}-0000-4000-8000-000000000000$')), '0',
	'of the liar only what it gave as a whole');
unlike(slurp_file($node->logfile), qr/terminated by signal|PANIC|crash of another/, 'nothing has crashed');
note(sprintf('%d lies, %d messages of theirs applied, %d MB', scalar(@lies), $given, peak_memory()));

done_testing();

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub told { return (split(/ /, $liar->command('told')))[0]; }

sub set_uri
{
	$node->append_conf('postgresql.conf', "pg_fanout.uri = '$_[0]'");
	$node->reload;
	return;
}

# The most that the consumer had, in MB.
sub peak_memory
{
	my $pid = sql('select pid from fanout.stat_subscriptions');

	return slurp_file("/proc/$pid/status") =~ /^VmHWM:\s+(\d+)/m ? int($1 / 1024) : die "no VmHWM";
}
