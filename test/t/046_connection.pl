# How a worker comes to its connection: names that nobody answers for, and
# settings that the server could not take over when it started.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use IO::Socket::INET;
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker();
my $names = names_library();
my $asked = "$ENV{NAMES_DIR}/asked";
my $port = $broker->port;
my $node = start_node();

silent_names();
slow_names();
name_told_to_the_server();

$node->stop;
done_testing();

# ---------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------

sub silent_names
{
	configure('pg_fanout.connect_timeout' => '200ms', 'pg_fanout.uri' => uri('broker.silent.test'));
	$node->safe_psql('postgres', "create database $_") foreach qw(one two);
	$node->safe_psql($_, 'create extension pg_fanout') foreach qw(one two);
	$node->safe_psql(
		'two', q(
create function handle(m fanout.message) returns void language sql as '';
select fanout.declare_binding('t', 'g');
select fanout.subscribe('t', 'g', 'handle(fanout.message)')));
	$node->poll_query_until('two', q(select state = 'disconnected' from fanout.stat_subscriptions));

	# so that each of the following happens while a name is looked up
	configure('pg_fanout.connect_timeout' => '60s');
	foreach my $worker ([ 'one', 'publisher' ], [ 'two', 'publisher' ], [ 'two', 'subscriptions' ])
	{
		$node->poll_query_until($worker->[0],
			"select state = 'connecting' and since < clock_timestamp() - interval '0.5 s' from fanout.stat_$worker->[1]");
	}

	within_two_seconds('a publisher ends while its broker is looked up',
		sub { $node->safe_psql('one', 'select pg_terminate_backend(pid, 10000) from fanout.stat_publisher') });
	within_two_seconds('a consumer ends while its broker is looked up',
		sub { $node->safe_psql('two', 'select pg_terminate_backend(pid, 10000) from fanout.stat_subscriptions') });
	within_two_seconds('a database is dropped while its broker is looked up',
		sub { $node->safe_psql('postgres', 'drop database one') });
	within_two_seconds('a database is dropped while a consumer looks its broker up',
		sub { $node->safe_psql('postgres', 'drop database two') });
	$node->safe_psql('postgres', q(alter system set pg_fanout.connect_timeout = '200ms'));
	within_two_seconds('the server stops while a broker is looked up', sub { $node->stop('fast') });
	start();
	$node->poll_query_until(
		'postgres',
		q(select last_error = 'could not resolve host name "broker.silent.test": the name service did not answer in time' from fanout.stat_publisher));
	pass('last_error says that the name service does not answer');
	my $pid = PgFanout::publisher_pid($node);
	my $before = failed_at();
	foreach my $attempt (1 .. 4)
	{
		PgFanout::poll(sub { failed_at() ne $before }, 'another attempt');
		$before = failed_at();
	}
	is(PgFanout::publisher_pid($node), $pid, 'a name service that is silent ends no publisher');
	is(scalar(() = glob "/proc/$pid/task/*"), 2, 'attempts do not pile up threads');

	configure('pg_fanout.uri' => uri('other.silent.test') . ',' . uri('broker.test') . ',' . uri('third.silent.test'));
	PgFanout::wait_for_publisher($node, 'idle');
	pass('a host whose name nobody answers for does not keep the next from being tried');
	return;
}

sub slow_names
{
	configure('pg_fanout.uri' => uri('slow.silent.test'));
	PgFanout::wait_for_publisher($node, 'disconnected');
	unlink "$ENV{NAMES_DIR}/silent" or die;
	PgFanout::wait_for_publisher($node, 'idle');
	pass('an answer that comes later than connect_timeout is used');
	return;
}

# A server that is not there yet for TLS: it only looks at the first message.
sub name_told_to_the_server
{
	my $listener = IO::Socket::INET->new(LocalAddr => '127.0.0.1', Listen => 5)
	  or die "could not listen: $!";
	my $tls_port = $listener->sockport;

	unlink $asked;
	configure('pg_fanout.connect_timeout' => '5s', 'pg_fanout.uri' => "amqps://guest:guest\@proxied.test:$tls_port/");
	my $hello = first_message($listener);
	like($hello, qr/proxied\.test/, 'the server is told the name that the URI has');
	is(PostgreSQL::Test::Utils::slurp_file($asked), "proxied.test\n", 'a name is looked up once for a TLS connection');

	configure('pg_fanout.uri' => "amqps://guest:guest\@127.0.0.1:$tls_port/");
	$hello = first_message($listener);
	unlike($hello, qr/proxied\.test|127\.0\.0\.1/, 'the server is not told an address');
	$listener->close;
	return;
}

# What the first connection that sends anything sends; others only try whether
# the port is open.
sub first_message
{
	my ($listener) = @_;

	$listener->timeout($PostgreSQL::Test::Utils::timeout_default);
	while (my $client = $listener->accept)
	{
		my $message = '';

		sysread($client, $message, 65536);
		return $message if $message ne '';
	}
	die 'nobody connected';
}

# ---------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------

sub names_library
{
	my $dir = PostgreSQL::Test::Utils::tempdir();
	my $library = "$dir/names.so";

	PgFanout::run_command_ok('cc', '-Wall', '-shared', '-fPIC', '-o', $library, "$PgFanout::lib/names.c");
	$ENV{NAMES_DIR} = $dir;
	PostgreSQL::Test::Utils::append_to_file("$dir/silent", '');
	return $library;
}

sub start_node
{
	local $ENV{LD_PRELOAD} = $names;

	return PgFanout::cluster('main', $broker);
}

sub start
{
	local $ENV{LD_PRELOAD} = $names;

	$node->start;
	return;
}

sub uri
{
	my ($host) = @_;

	return $broker->uri =~ s/127\.0\.0\.1/$host/r;
}

sub configure
{
	my (%settings) = @_;

	$node->safe_psql('postgres', "alter system set $_ = '$settings{$_}'") foreach keys %settings;
	$node->reload;
	return;
}

sub failed_at
{
	return $node->safe_psql('postgres', 'select last_error_at from fanout.stat_publisher');
}

sub within_two_seconds
{
	my ($name, $do) = @_;
	my $begin = Time::HiRes::time();

	$do->();
	my $seconds = Time::HiRes::time() - $begin;
	ok($seconds < 2, sprintf('%s: %.2f s', $name, $seconds));
	return;
}
