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
my $checked = 0;
my $written = 0;
my $node = start_node();

silent_names();
slow_names();
name_told_to_the_server();
$node->stop;

$node = node_with_subscription();
wrong_in_postgresql_conf();
wrong_elsewhere();
wrong_on_the_command_line();
wrong_in_the_catalog();
wrong_at_a_reload();
$node->stop;

done_testing();

# ---------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------

sub silent_names
{
	configure('pg_fanout.connect_timeout' => '200ms', 'pg_fanout.uri' => uri('broker.silent.test'));
	create($_) foreach qw(one two);
	$node->poll_query_until('two', q(select state = 'disconnected' from fanout.stat_subscriptions));

	# so that each of the following happens while a name is looked up
	configure('pg_fanout.connect_timeout' => '60s');
	within(2, 'a publisher ends while its broker is looked up',
		sub { $node->safe_psql('one', 'select pg_terminate_backend(pid, 10000) from fanout.stat_publisher') },
		sub { is_looked_up('one', 'stat_publisher') });
	within(2, 'a consumer ends while its broker is looked up',
		sub { $node->safe_psql('two', 'select pg_terminate_backend(pid, 10000) from fanout.stat_subscriptions') },
		sub { is_looked_up('two', 'stat_subscriptions') });
	within(3, 'a database is dropped while its broker is looked up',
		sub { $node->safe_psql('postgres', 'drop database one') },
		sub { create('one'); is_looked_up('one', 'stat_publisher') });
	within(3, 'a database is dropped while a consumer looks its broker up',
		sub { $node->safe_psql('postgres', 'drop database two') },
		sub { create('two'); is_looked_up('two', $_) foreach qw(stat_publisher stat_subscriptions) });
	$node->safe_psql('postgres', q(alter system set pg_fanout.connect_timeout = '200ms'));
	within(5, 'the server stops while a broker is looked up', sub { $node->stop('fast') });
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
# Settings
# ---------------------------------------------------------------------------

sub node_with_subscription
{
	my $other = PgFanout::cluster('settings', $broker);

	$other->safe_psql(
		'postgres', q(
create role app login;
grant create on schema public to app;
grant usage on schema fanout to app;
grant execute on function fanout.subscribe to app;
select fanout.grant_topic(null, 'app');
select fanout.declare_binding('settings', 'g');
set role app;
create table got (n int);
create function handle(m fanout.message) returns void language sql as 'insert into got values ((m.body->>''n'')::int)';
select fanout.subscribe('settings', 'g', 'handle(fanout.message)')));
	PgFanout::flush($other);
	return $other;
}

# Each is put right by a reload.
sub wrong_in_postgresql_conf
{
	my @cases = (
		[ 'uri', "'amqp://app:p#sec\@127.0.0.1:$port/'", 'unescaped "#"' ],
		[ 'uri', "'amqp://app:sec\@ret\@127.0.0.1/'", 'unescaped "@"' ],
		[ 'uri', "'amqp://app:sec\@127.0.0.1/?heartbeat=10'", 'query parameters' ],
		[ 'heartbeat', 99999, 'pg_fanout.heartbeat' ],
		[ 'connect_timeout', "'soon'", 'pg_fanout.connect_timeout' ],
		[ 'tls_verify', 'perhaps', 'pg_fanout.tls_verify' ],
		[ 'retention', "'30 dayz'", 'pg_fanout.retention' ],
		[ 'max_databases', 0, 'pg_fanout.max_databases' ]);
	my %right = (uri => "'" . $broker->uri . "'", heartbeat => 30, connect_timeout => "'2 s'",
		tls_verify => 'on', retention => "'30 d'", max_databases => 64);

	foreach my $case (@cases)
	{
		my ($setting, $value, $reason) = @$case;

		$node->append_conf('postgresql.conf', "pg_fanout.$setting = $value");
		$node->restart;
		does_not_connect("pg_fanout.$setting = $value at the start", qr/configuration files.*\Q$reason\E/);
		$node->append_conf('postgresql.conf', "pg_fanout.$setting = $right{$setting}");
		$node->reload;
		goes_on("pg_fanout.$setting is right, and reloaded");
	}
	unlike(PostgreSQL::Test::Utils::slurp_file($node->logfile), qr/\bsec\b|sec@|#sec/,
		'a password in a URI that is wrong is not in the log');
	return;
}

sub wrong_elsewhere
{
	my $included = $node->data_dir . '/included.conf';

	$node->append_conf('postgresql.conf', "include_if_exists = 'included.conf'");
	PostgreSQL::Test::Utils::append_to_file($included, 'pg_fanout.heartbeat = -1');
	$node->restart;
	does_not_connect('a wrong setting in an included file', qr/configuration files.*pg_fanout.heartbeat/);
	unlink $included or die;
	$node->reload;
	goes_on('a wrong setting is taken out, and reloaded');

	$node->append_conf('postgresql.auto.conf', 'pg_fanout.heartbeat = -1');
	$node->restart;
	does_not_connect('a wrong setting in postgresql.auto.conf', qr/configuration files.*pg_fanout.heartbeat/);
	$node->safe_psql('postgres', 'alter system set pg_fanout.heartbeat = 20');
	$node->reload;
	goes_on('ALTER SYSTEM puts it right');

	return if $node->pg_version < 15;
	$node->append_conf('postgresql.conf', "pg_fanout.url = 'amqp://elsewhere'");
	$node->restart;
	does_not_connect('a setting that there is not', qr/configuration files.*pg_fanout.url/);
	$node->adjust_conf('postgresql.conf', 'pg_fanout.url', undef);
	$node->reload;
	goes_on('it is taken out, and reloaded');
	return;
}

sub wrong_on_the_command_line
{
	$node->stop;
	PgFanout::run_command_ok('pg_ctl', '-w', '-D', $node->data_dir, '-l', $node->logfile,
		'-o', "--cluster-name=main -c pg_fanout.heartbeat=-1", 'start');
	$node->_update_pid(1);
	does_not_connect('a wrong setting on the command line', qr/command line.*pg_fanout.heartbeat/);
	$node->reload;
	does_not_connect('and after a reload, which leaves the command line as it is', qr/command line.*pg_fanout.heartbeat/);
	$node->stop;
	$node->start;
	goes_on('started without');
	return;
}

sub wrong_in_the_catalog
{
	# each session would warn of what is stored, and poll_query_until() takes no warnings
	local $ENV{PGOPTIONS} = '-c client_min_messages=error';
	my $stored = sub {
		my ($reset, $reason, @stored) = @_;

		$node->append_conf('postgresql.conf', "shared_preload_libraries = ''");
		$node->restart;
		$node->safe_psql('postgres', $_) foreach @stored;
		$node->append_conf('postgresql.conf', "shared_preload_libraries = 'pg_fanout'");
		$node->restart;
		does_not_connect("$stored[0], without the library", qr/ALTER DATABASE or ALTER ROLE.*$reason/,
			$stored[0] =~ /role app/ ? 'subscriptions' : ('publisher', 'subscriptions'));
		$node->safe_psql('postgres', $reset);
		goes_on($reset);
	};

	$stored->('alter database postgres reset pg_fanout.uri', 'unescaped "/"',
		q(alter database postgres set pg_fanout.uri = 'amqp://app:s/c@127.0.0.1:1/'));
	$stored->('alter role all reset pg_fanout.heartbeat', 'pg_fanout.heartbeat',
		'alter role all set pg_fanout.heartbeat = 99999');
	$stored->('alter database postgres set pg_fanout.heartbeat = 10', 'pg_fanout.heartbeat',
		'alter database postgres set pg_fanout.heartbeat = never',
		'alter role all set pg_fanout.heartbeat = 11');
	$stored->('alter database postgres reset pg_fanout.tls_verify', 'pg_fanout.tls_verify',
		'alter database postgres set pg_fanout.tls_verify = perhaps',
		'alter role all set pg_fanout.heartbeat = 99999');
	pass('a wrong value that another one overrides is no matter');
	$node->safe_psql('postgres', $_) foreach 'alter database postgres reset all', 'alter role all reset all';

	$stored->('alter role app reset pg_fanout.heartbeat', 'pg_fanout.heartbeat',
		'alter role app set pg_fanout.heartbeat = 99999');
	$node->safe_psql('postgres', $_) foreach 'alter database postgres reset all', 'alter role all reset all';
	return;
}

sub wrong_at_a_reload
{
	my $pid = PgFanout::publisher_pid($node);

	$node->append_conf('postgresql.conf', 'pg_fanout.connect_timeout = 1');
	$node->reload;
	$node->append_conf('postgresql.conf', 'pg_fanout.retry_limit = 7');
	$node->reload;
	$node->poll_query_until('postgres', q(select current_setting('pg_fanout.retry_limit') = '7'));
	goes_on('a wrong value that a reload brings changes nothing');
	$node->safe_psql('postgres', 'select pg_terminate_backend(pid, 10000) from fanout.stat_publisher');
	goes_on('nor when the publisher is started again');
	return;
}

# A message is written, and stays where it is.
sub does_not_connect
{
	my ($name, $reason, @workers) = @_;

	write_message();
	foreach my $worker (@workers ? @workers : ('publisher', 'subscriptions'))
	{
		$node->poll_query_until('postgres', "select state = 'disconnected' from fanout.stat_$worker")
		  or die PgFanout::status($node, 'postgres');
		like($node->safe_psql('postgres', "select connected_to, last_error from fanout.stat_$worker"),
			qr/\A\|.*$reason/, "$name: $worker");
	}
	# that takes 5 s each time
	like($node->safe_psql('postgres', q(select detail from fanout.check() where not ok and item = 'broker connected')),
		$reason, 'check() says so')
	  unless $checked++;
	like(PostgreSQL::Test::Utils::slurp_file($node->logfile), qr/is not connected to the broker\n.*DETAIL:.*$reason/, 'and so does the log');
	is($node->safe_psql('postgres', "select count(*) from got where n = $written"), 0, 'the message waits');
	return;
}

# What was written arrives.
sub goes_on
{
	my ($name) = @_;

	write_message();
	$node->poll_query_until('postgres', "select count(*) = $written from got")
	  or die PgFanout::status($node, 'postgres');
	PgFanout::wait_for_state($node, 'sent');
	pass("$name: it goes on");
	return;
}

sub write_message
{
	$written++;
	$node->safe_psql('postgres', qq(select fanout.publish('settings', '{"n": $written}')));
	return;
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

# Does it in less than so many seconds?
# A database with a publisher, "two" with a consumer as well, unless it is there already.
sub create
{
	my ($database) = @_;

	return if $node->safe_psql('postgres', "select count(*) from pg_database where datname = '$database'");
	$node->safe_psql('postgres', "create database $database");
	$node->safe_psql($database, 'create extension pg_fanout');
	$node->safe_psql(
		$database, q(
create function handle(m fanout.message) returns void language sql as '';
select fanout.declare_binding('t', 'g');
select fanout.subscribe('t', 'g', 'handle(fanout.message)'))) if $database eq 'two';
	return;
}

# The worker waits for the broker's name.
sub is_looked_up
{
	my ($database, $view) = @_;

	$node->poll_query_until($database,
		"select bool_and(state = 'connecting' and since < clock_timestamp() - interval '0.5 s') from fanout.$view")
	  or die "$database: no look-up";
	return;
}

# $enter: brings that about in which it is to take less, again if it is slow.
sub within
{
	my ($limit, $name, $do, $enter) = @_;
	my $measure = sub {
		my $begin;

		$enter->() if $enter;
		$begin = Time::HiRes::time();
		$do->();
		return Time::HiRes::time() - $begin;
	};
	my $seconds = $enter ? PgFanout::again_if_slow($limit, $measure) : $measure->();

	ok($seconds < $limit, sprintf('%s: %.2f s', $name, $seconds));
	return;
}
