# pg_fanout.enabled: off for a server or a database, changes are captured, and
# nothing is published or consumed.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => 'max_worker_processes = 20');
my $other = 'other';

sub sql { return $node->safe_psql($_[0], $_[1]); }

sql('postgres', "create database $other");
sql($other, 'create extension pg_fanout');
foreach my $database ('postgres', $other)
{
	sql($database, qq(
		create table got (n int);
		create function handle(m fanout.message) returns void language sql as 'insert into public.got values (1)';
		select fanout.declare_bindings('{"$database": ["g"], "in_$database": ["c"]}');
		select fanout.subscribe('in_$database', 'c', 'handle(fanout.message)')));
	PgFanout::flush($node, dbname => $database);
	PgFanout::poll(sub { sql($database, 'select count(*) from fanout.stat_subscriptions where connected_to is not null') == 1 }, 'a consumer');
}

is_switched('by a reload', ['postgres', $other], [],
	sub { $node->append_conf('postgresql.conf', 'pg_fanout.enabled = off'); $node->reload; },
	sub { $node->append_conf('postgresql.conf', 'pg_fanout.enabled = on'); $node->reload; });
is_switched('by ALTER DATABASE', [$other], ['postgres'],
	sub { sql('postgres', "alter database $other set pg_fanout.enabled = off"); },
	sub { sql('postgres', "alter database $other reset pg_fanout.enabled"); });
is_switched('by ALTER DATABASE, of all but one', ['postgres'], [$other],
	sub {
		sql('postgres', "alter database $other set pg_fanout.enabled = on");
		$node->append_conf('postgresql.conf', 'pg_fanout.enabled = off');
		$node->restart;
	},
	sub { $node->append_conf('postgresql.conf', 'pg_fanout.enabled = on'); $node->reload; });

my ($stdout, $stderr);
$node->psql('postgres', q(create role nobody; set role nobody; set pg_fanout.enabled = off), stderr => \$stderr);
like($stderr, qr/permission denied to set parameter "pg_fanout.enabled"/, 'only a superuser may set it');
$node->stop('fast');
done_testing();

# off: databases in which nothing must flow meanwhile; on: those that go on.
sub is_switched
{
	my ($how, $off, $on, $switch_off, $switch_on) = @_;
	my $offset = -s $node->logfile;
	my $log;

	$switch_off->();
	foreach my $database (@$off)
	{
		PgFanout::wait_for_publisher($node, 'passive', dbname => $database);
		# it may see that later than the publisher
		$node->poll_query_until($database, 'select bool_and(pid is null) from fanout.stat_subscriptions') or die 'a consumer is left';
	}
	foreach my $database (@$off, @$on)
	{
		sql($database, qq(truncate got;
			select fanout.publish('$database', '1', '$how');
			select fanout.publish('in_$database', '1')));
	}
	foreach my $database (@$on)
	{
		PgFanout::flush($node, dbname => $database);
		PgFanout::poll(sub { sql($database, 'select count(*) from got') == 1 }, 'the consumer');
		pass("$how: database $database goes on");
	}
	# from elsewhere
	$broker->amqp('publish', '--exchange', "in_$_", qq({"how": "$how"})) foreach @$off;
	foreach my $database (@$off)
	{
		is(sql($database, 'select last_error from fanout.stat_publisher'), 'pg_fanout.enabled is off', "$how: stat_publisher of $database says so");
		is(sql($database, 'select state, last_error, pid from fanout.stat_subscriptions'), 'passive|pg_fanout.enabled is off|',
			"$how: so does stat_subscriptions, and there is no consumer");
		is(sql($database, q(select detail, hint from fanout.check() where item = 'database active' and not ok)),
			'pg_fanout.enabled is off|Set pg_fanout.enabled to on.', "$how: so does check()");
		is(sql($database, 'select string_agg(distinct state, $$ $$) from fanout.outbox_status where created_at > (select max(sent_at) from fanout.sent)'),
			'pending', "$how: what is written in $database waits");
		is(sql($database, 'select count(*) from got'), 0, "$how: nothing is consumed in $database");
	}
	$log = slurp_file($node->logfile, $offset);
	is(() = $log =~ /LOG:  pg_fanout neither publishes nor consumes in database .*\n.*DETAIL:  pg_fanout.enabled is off/g, scalar(@$off),
		"$how: the log says so, once for each database");

	$switch_on->();
	foreach my $database (@$off)
	{
		PgFanout::flush($node, dbname => $database);
		PgFanout::poll(sub { sql($database, 'select count(*) from got') == 2 }, 'the consumer');
		pass("$how: database $database goes on when it is enabled again");
	}
	is_deeply([ map { $_->{headers}->{key} } $broker->collect("$_\_g", expect => 1, idle => 0.3) ], [$how],
		"$how: each message of $_ is published once")
	  foreach @$off, @$on;
	return;
}
