# TLS: the broker's certificate is verified unless that is switched off, what is
# wrong is said, and under load nothing is lost by any of it.  The load runs on
# while the broker cannot be reached; everything must arrive once it can, by
# itself.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use File::Copy ();
use PgFanout;
use PgFanout::Experiment;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $certs = PostgreSQL::Test::Utils::tempdir('certs');
PgFanout::run_command_ok("$PgFanout::lib/certificates", $certs);
copy_file("$certs/server.$_", "$certs/shown.$_") foreach qw(pem key);

# What the operating system trusts, for OpenSSL, in the server that is started.
$ENV{SSL_CERT_FILE} = "$certs/system.pem";
$ENV{SSL_CERT_DIR} = "$certs/no_directory";
copy_file("$certs/foreign.pem", "$certs/system.pem");

my $tls = qq(
ssl_options.cacertfile = $certs/ca.pem
ssl_options.certfile = $certs/shown.pem
ssl_options.keyfile = $certs/shown.key
);
my $broker = PgFanout::broker(private => 1, tls => $tls);
my $proxy = $broker->proxy(to => $broker->tls_port);
my $node = PgFanout::cluster(
	'main', $broker,
	conf => qq(
log_statement = none
pg_fanout.uri = '@{[ $proxy->tls_uri ]}'
pg_fanout.tls_ca_file = '$certs/ca.pem'
pg_fanout.connect_timeout = 1500ms
pg_fanout.heartbeat = 1s
pg_fanout.retry_limit = 1
pg_fanout.retry_interval = 200ms
));
my $experiment = PgFanout::Experiment->new(
	node => $node, broker => $broker, file => __FILE__);
my $key = 5_000_000;    # of rows that the load does not touch
my $not_verified = "the server's certificate could not be verified: ";

# Certificates

tls(
	'certificate expired, then renewed',
	sub {
		show('expired');
		refused("${not_verified}certificate has expired");
		show('server');
	});
tls(
	'certificate of another host, then the right one',
	sub {
		show('other');
		refused("${not_verified}it does not match the host name");
		set_conf(uri => $proxy->tls_uri(host => '127.0.0.1'));
		refused("${not_verified}it does not match the host name");
		show('server');
		connected('an address in the certificate is as good as a name');
		set_conf(uri => $proxy->tls_uri);
	});
tls(
	'certificate of an unknown authority, then a known one',
	sub {
		show('rogue');
		refused("${not_verified}it is not from a trusted authority");
		set_conf(tls_verify => 'off');
		connected('with tls_verify = off any certificate will do');
		set_conf(tls_verify => 'on');
		refused("${not_verified}it is not from a trusted authority");
		show('server');
	});

# Settings

tls(
	'TLS settings wrong, one after the other',
	sub {
		copy_file("$certs/ca.pem", "$certs/unreadable.pem");
		chmod 0, "$certs/unreadable.pem";
		PostgreSQL::Test::Utils::append_to_file("$certs/garbage.pem", "certificate\n");

		foreach my $file (
			[ missing => 'No such file or directory' ],
			[ unreadable => 'Permission denied' ],
			[ garbage => '.+' ])
		{
			set_conf(tls_ca_file => "$certs/$file->[0].pem");
			refused(qq(could not load CA certificate file "$certs/$file->[0].pem": $file->[1]));
		}
		set_conf(tls_ca_file => '');
		refused("${not_verified}it is not from a trusted authority");
		copy_file("$certs/ca.pem", "$certs/system.pem");
		connected('with no tls_ca_file the authorities of the system are trusted');

		set_conf(tls_cert_file => "$certs/client.pem", tls_key_file => '');
		refused('certificate file and key file must be set together');
		set_conf(tls_key_file => "$certs/missing.key");
		refused(qq(could not load private key file "$certs/missing.key": No such file or directory));
		set_conf(tls_key_file => "$certs/server.key");
		refused(qq(could not load private key file "$certs/server.key": key values mismatch));
		set_conf(tls_key_file => "$certs/locked.key");
		refused(qq(could not load private key file "$certs/locked.key": it needs a passphrase));
		set_conf(tls_key_file => "$certs/client.key", tls_cert_file => "$certs/garbage.pem");
		refused(qq(could not load certificate file "$certs/garbage.pem": .+));
		set_conf(tls_ca_file => "$certs/ca.pem", tls_cert_file => '', tls_key_file => '');
	});
tls(
	'amqps to a port without TLS, amqp to one with it',
	sub {
		set_conf(uri => $broker->tls_uri(port => $broker->port));
		refused('TLS handshake failed: .*');
		set_conf(uri => $broker->uri(port => $broker->tls_port));
		refused('.*does the port expect TLS.*');
		set_conf(uri => $proxy->tls_uri);
	});

# The network

my @positions = (1, 100, 400, 600, 900, 1500, 3000, 9000);
tls(
	'TLS connection cut after a number of bytes, ' . @positions . ' times',
	sub {
		foreach my $bytes (@positions)
		{
			$proxy->command("cut-after $bytes");
			$proxy->command('reset');
			PgFanout::poll(sub { $proxy->command('mode') eq 'pass' },
				"a cut after $bytes bytes");
			wait_for_confirms();
		}
		$experiment->audit($proxy, 'TLS connection cut');
	});
tls(
	'TLS connection frozen',
	sub {
		$proxy->command('freeze');
		wait_for_error('no heartbeat from .*');
		$proxy->command('pass');
	});
tls(
	'TLS handshake frozen, publisher ended in it',
	sub {
		set_conf(connect_timeout => '30s');
		$proxy->command('freeze');
		$proxy->command('reset');
		# the first look at the port is answered by the proxy
		end_publisher('a frozen TLS handshake',
			sub { wait_until(q(state = 'connecting' and since < now() - interval '0.5 s')) });
		set_conf(connect_timeout => '1500ms');
		wait_for_error('.*TLS handshake timed out');
		drop_database('a frozen TLS handshake');
		$proxy->command('pass');
	});
tls(
	'TLS connection frozen in a send, publisher ended in it',
	sub {
		set_conf(heartbeat => '30s');
		end_publisher(
			'a frozen TLS send',
			sub {
				$proxy->command('pass');
				connected('before the send');
				$proxy->command('freeze');
				write_rows(800, 20_000);
				wait_until('in_flight > 0');
				Time::HiRes::sleep(0.5);
				drop_database('a frozen TLS send');
			});
		$proxy->command('pass');
		set_conf(heartbeat => '1s');
	});

# Certificates of clients

tls(
	'client certificate missing, then of an unknown authority, then good',
	sub {
		# not through the proxy, where a reset overtakes what was said before
		set_conf(uri => $broker->tls_uri);
		$broker->configure_tls("${tls}ssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true\n");
		$broker->restart;
		refused('.*(certificate required|handshake failure).*');
		set_conf(tls_cert_file => "$certs/rogue.pem", tls_key_file => "$certs/rogue.key");
		refused('.*(unknown ca|bad certificate|certificate unknown).*');
		set_conf(tls_cert_file => "$certs/client.pem", tls_key_file => "$certs/client.key");
		connected('a client certificate is shown');
	});

is( $node->safe_psql(
		'postgres', q(
		select count(*) from fanout.stat_topics
		where stalled_since is not null or attempts is not null or dead > 0 or held > 0)
	),
	0,
	'no attempt was used up by any of this');
ok( PostgreSQL::Test::Utils::slurp_file($node->logfile) !~
	  /is stalled|goes to fanout.dead_letter|PANIC|terminated by signal|DETAIL:.*guest:guest/,
	'the log tells of no stall and no crash, and no password');

done_testing();

sub tls
{
	my ($name, $what) = @_;

	return $experiment->run($name, $what, changes => 100, repeats => 1);
}

sub copy_file
{
	my ($from, $to) = @_;

	File::Copy::copy($from, $to) or die "could not copy $from to $to: $!";
	return;
}

# Lets the broker show another certificate to whoever connects from now on.
sub show
{
	my ($name) = @_;

	copy_file("$certs/$name.$_", "$certs/shown.$_") foreach qw(pem key);
	$proxy->command('reset');
	return;
}

sub value
{
	my ($expression) = @_;

	return $node->safe_psql('postgres',
		"select $expression from fanout.stat_publisher");
}

sub wait_until
{
	my ($condition) = @_;

	PgFanout::poll(
		sub {
			# none while the publisher is started again
			return value("coalesce($condition, false)") eq 't';
		},
		$condition . "\n" . value('stat_publisher'));
	return;
}

sub set_conf
{
	my (%settings) = @_;

	$node->append_conf('postgresql.conf', "pg_fanout.$_ = '$settings{$_}'\n")
	  foreach keys %settings;
	$node->reload;
	return;
}

# An error that came after this call.
sub wait_for_error
{
	my ($pattern) = @_;
	my $before = value('now()');

	$pattern =~ s/'/''/g;
	wait_until(
		"last_error ~ '^$pattern\$' and last_error_at > '$before' and connected_to is null");
	return;
}

sub refused
{
	my ($pattern) = @_;
	my $error;

	eval { wait_for_error("(could not connect to localhost:\\d+: |could not connect to 127.0.0.1:\\d+: |)$pattern"); };
	is($@, '', "refused: $pattern");
	$error = value('last_error');
	note($error);
	ok(index(PostgreSQL::Test::Utils::slurp_file($node->logfile), $error) >= 0,
		'and the log says so');
	return;
}

sub connected
{
	my ($name) = @_;

	eval { wait_for_confirms() };
	is($@, '', $name);
	return;
}

sub wait_for_confirms
{
	my $confirmed = value('confirmed');

	# one that is lost before anything else is confirmed may be the fault of what was sent
	wait_until("confirmed > $confirmed + 50");
	return;
}

# $enter: what brings it there.  Once, a machine that stands still may be what takes so long;
# each time it is not.
sub end_publisher
{
	my ($where, $enter) = @_;
	my $took = PgFanout::again_if_slow(2, sub {
		my ($pid, $start);

		$enter->();
		$pid = PgFanout::publisher_pid($node);
		$start = Time::HiRes::time();
		$node->safe_psql('postgres', "select pg_terminate_backend($pid)");
		PgFanout::poll(sub { !kill 0, $pid }, 'end of the publisher', 60);
		return Time::HiRes::time() - $start;
	});

	cmp_ok($took, '<', 2, "$where: pg_terminate_backend in under 2 s");
	return;
}

# Likewise.
sub drop_database
{
	my ($where) = @_;
	my $took = PgFanout::again_if_slow(3, sub {
		my $start;

		$node->safe_psql('postgres', 'create database another');
		$start = Time::HiRes::time();
		$node->safe_psql('postgres', 'drop database another');
		return Time::HiRes::time() - $start;
	});

	cmp_ok($took, '<', 3, "$where: DROP DATABASE of another database in under 3 s");
	return;
}

# New rows, in one transaction.
sub write_rows
{
	my ($count, $size) = @_;
	my $first = $key + 1;

	$key += $count;
	$experiment->sql(qq(
		with c as (insert into item_1 (id, pad)
			select i, repeat('x', $size) from generate_series($first, $key) i
			returning id, token)
		insert into ledger (topic, key, op, token) select 1, id, 'c', token from c));
	return;
}
