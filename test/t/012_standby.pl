# A standby publishes nothing before its promotion, and after it all that was
# pending.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker();
my $proxy = $broker->proxy;
my $primary =
  PgFanout::cluster('primary', $proxy, init => { allows_streaming => 1 });
my $standby = PgFanout::Node->new('standby');
my %received;

$primary->safe_psql('postgres', q(
create table users (id integer primary key);
select fanout.declare_binding('exchange_user', 'c');
select fanout.capture('users', 'exchange_user');
insert into users select generate_series(1, 100)));
PgFanout::flush($primary);

$primary->backup('backup');
$standby->init_from_backup($primary, 'backup', has_streaming => 1);
$standby->start;
$primary->append_conf('postgresql.conf', "synchronous_standby_names = '*'");
$primary->reload;
$primary->poll_query_until('postgres',
	q(select exists (select from pg_stat_replication where sync_state = 'sync')))
  or die 'the standby does not stream';

# Both run

is(workers($standby), 0, 'neither launcher nor publisher runs on the standby');
is($standby->safe_psql('postgres', 'select count(*) from fanout.stat_publisher'),
	0, 'and the status view of the standby says so');
$primary->safe_psql('postgres',
	'insert into users select generate_series(101, 200)');
PgFanout::flush($primary);
receive(200);
is(scalar(keys %received), 200, 'the primary publishes');
is((grep { $_ != 1 } values %received), 0, 'each message once');

# A commit that the standby does not have yet

$standby->stop('fast');
my $session = $primary->background_psql('postgres');
$session->query_until(qr/waiting/, "\\echo waiting\ninsert into users values (1000);\n");
$primary->poll_query_until('postgres',
	q(select exists (select from pg_stat_activity where wait_event = 'SyncRep')))
  or die 'the insert does not wait';
PgFanout::flush($primary);
is($broker->count('exchange_user_c'), 0,
	'nothing is published before the synchronous standby has it');
$standby->start;
$session->quit;
PgFanout::flush($primary);
receive(1);
is(scalar(keys %received), 201, 'but as soon as it has');

# Failover, in the middle of a backlog

$proxy->command('throttle 200000');
$primary->safe_psql('postgres',
	'insert into users select generate_series(2001, 12000)');
PgFanout::poll(
	sub {
		$primary->safe_psql('postgres',
			'select confirmed > 1000 and in_flight > 0 from fanout.stat_publisher') eq
		  't';
	},
	'a busy publisher');
$primary->stop('immediate');
is(workers($standby), 0, 'still nothing runs on the standby');
Time::HiRes::sleep(0.5);
receive();
my $before = keys %received;
cmp_ok($before, '<', 10_201, 'there are messages pending');

$proxy->command('pass');
$standby->append_conf('postgresql.conf', "synchronous_standby_names = ''");
$standby->promote;
PgFanout::publisher_pid($standby);
pass('after the promotion there is a publisher');
PgFanout::flush($standby);
receive(10_201 - $before);
is(missing($standby), 0, 'what was pending is published, nothing is lost');
is(scalar(keys %received), 10_201, 'and nothing is there that is not in the outbox');

$standby->safe_psql('postgres', 'insert into users values (3000000)');
PgFanout::flush($standby);
receive(1);
is(missing($standby), 0, 'what is written after the promotion, too');
$standby->stop('fast');

done_testing();

sub workers
{
	my ($node) = @_;

	return $node->safe_psql('postgres',
		q(select count(*) from pg_stat_activity where backend_type like 'pg\_fanout%')
	);
}

sub receive
{
	my ($count) = @_;

	$received{ $_->{message_id} }++
	  foreach $broker->collect('exchange_user_c', expect => $count || 0, idle => 0.5);
	return;
}

sub missing
{
	my ($node) = @_;

	return scalar(
		grep { !$received{$_} }
		  split(/\n/,
			$node->safe_psql('postgres', 'select message_id from fanout.outbox')));
}
