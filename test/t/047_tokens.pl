# A password that is a token of OAuth 2: it expires, and another one is in the
# password file by then.  Workers log in anew, and no topic notices; a right that
# is really missing is its topic's failure all the same, and costs no more than
# a login now and then.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use Digest::SHA ();
use JSON::XS ();
use MIME::Base64 ();
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

my $key = 'a key of the tests, of 32 bytes.';
my $broker = PgFanout::broker(
	private => 1,
	plugins => ['rabbitmq_auth_backend_oauth2'],
	terms => terms());
my $token_file = PostgreSQL::Test::Utils::tempdir() . '/token';
my $published = 0;

# RabbitMQ remembers of twelve exchanges that a channel may publish to them, and
# asks again of others.
my @others = map { "other_$_" } 1 .. 13;

write_token(3600);
my $node = PgFanout::cluster(
	'main', $broker,
	conf => qq(
pg_fanout.uri = '@{[ $broker->uri(user => 'fan') ]}'
pg_fanout.password_file = '$token_file'
pg_fanout.retry_interval = 300ms
pg_fanout.retry_limit = 1
));

$node->safe_psql(
	'postgres', q(
create table got (n int primary key);
create function handle(m fanout.message) returns void language sql
as 'insert into got values ((m.body->>''n'')::int)';
select fanout.declare_binding('held', 'g');
select fanout.declare_topic('dead', on_exhausted => 'dead_letter');
select fanout.declare_binding('dead', 'g');
select fanout.declare_binding('consumed', 'g');
select fanout.subscribe('consumed', 'g', 'handle(fanout.message)')));
$node->safe_psql('postgres', "select fanout.declare_binding('$_', 'g', 'classic')") foreach @others;
PgFanout::flush($node);

token_expires_under_load();
token_expires_before_a_declaration();
token_expires_before_a_queue_is_dropped();
token_expires_and_there_is_no_other();
right_to_write_is_missing();
right_to_declare_is_missing();
rights_of_many_are_missing();
rights_of_others_are_missing();
right_to_read_is_missing();

$node->stop;
done_testing();

# ---------------------------------------------------------------------------
# Tokens that expire
# ---------------------------------------------------------------------------

sub token_expires_under_load
{
	my $before = reconnects();
	my $renew = renewal(4);
	my $end;

	log_in_anew(4);
	$end = time + 16;
	while (time < $end)
	{
		# before each, since all of them may take longer than a token lasts
		foreach my $topic (qw(held dead consumed), @others)
		{
			$renew->();
			publish($topic);
		}
		is_untouched('while tokens expire') or last;
		Time::HiRes::sleep(0.25);
	}
	write_token(3600);
	PgFanout::flush($node);
	# RabbitMQ asks for a channel's right to publish once, and again after a minute
	# (channel_tick_interval), and topics keep their channels: so not each expiry is noticed
	cmp_ok(reconnects() - $before, '>=', 1, 'the publisher logged in anew') or diag reconnects();
	cmp_ok(reconnects() - $before, '<=', 10, 'but not more often than tokens expired');
	is($node->safe_psql('postgres', 'select count(*) from fanout.dead_letter'), 0, 'nothing is given up');
	$node->poll_query_until('postgres', "select count(*) = $published from got");
	pass('a consumer whose token expires goes on');
	is(scalar(keys %{ { map { $_->{message_id} => 1 } $broker->collect("$_\_g", expect => $published) } }), $published,
		"all messages of topic \"$_\" arrive")
	  foreach qw(held dead);
	ok(!log_has(qr/is stalled/), 'no topic was stalled');
	return;
}

sub token_expires_before_a_declaration
{
	expire();
	write_token(3600);
	$node->safe_psql('postgres', q(select fanout.declare_binding('later', 'g')));
	PgFanout::flush($node);
	is($node->safe_psql('postgres', q(select state, last_error from fanout.bindings where topic = 'later')),
		'declared|', 'a queue is declared after a token has expired');
	is_untouched('after a token has expired before a declaration');
	return;
}

sub token_expires_before_a_queue_is_dropped
{
	expire();
	write_token(3600);
	$node->safe_psql('postgres', q(select fanout.drop_binding('later', 'g')));
	$node->poll_query_until('postgres', q(select not exists (select from fanout.bindings where topic = 'later')))
	  or die PgFanout::status($node, 'postgres');
	pass('a queue is dropped after a token has expired');
	$node->safe_psql('postgres', q(select fanout.drop_topic('later')));
	return;
}

# Then it is the login that fails, and nothing is known of any topic.
sub token_expires_and_there_is_no_other
{
	expire();
	$node->safe_psql('postgres', q(select fanout.declare_binding('last', 'g')));
	publish('last');
	PgFanout::wait_for_publisher($node, 'disconnected');
	is_untouched('while there is no valid token');
	like($node->safe_psql('postgres', 'select last_error from fanout.stat_publisher'),
		qr/authentication failed for user "fan"/, 'last_error says that the login failed');
	write_token(3600);
	PgFanout::flush($node);
	is_untouched('after there was no valid token');
	return;
}

# ---------------------------------------------------------------------------
# Rights that are missing
# ---------------------------------------------------------------------------

sub right_to_write_is_missing
{
	$node->safe_psql('postgres', q(select fanout.declare_binding('secret', 'g')));
	PgFanout::flush($node);
	write_token(3600, write => 'held', also => [ map { "rabbitmq.write:*/$_" } qw(dead consumed last other_* *_g) ]);
	log_in_anew();
	stalls_alone('secret', 'write');
	return;
}

sub right_to_declare_is_missing
{
	write_token(3600, configure => 'held*', also => [ map { "rabbitmq.configure:*/$_*" } qw(dead consumed last secret other) ]);
	log_in_anew();
	$node->safe_psql('postgres', q(select fanout.declare_binding('hidden', 'g')));
	stalls_alone('hidden', 'configure');
	return;
}

sub rights_of_many_are_missing
{
	my $before;

	write_token(3600, write => 'held', also => [ map { "rabbitmq.write:*/$_" } qw(dead consumed last secret hidden *_g) ]);
	log_in_anew();
	$before = reconnects();
	publish_to(@others);
	$node->poll_query_until('postgres',
		"select count(*) = 13 from fanout.stat_topics where reason ~ '403' and topic like 'other%'")
	  or die PgFanout::status($node, 'postgres');
	cmp_ok(reconnects() - $before, '<=', 2, 'many topics without a right do not cost a login each');
	write_token(3600);
	$node->safe_psql('postgres', "select fanout.resume('$_')") foreach @others;
	PgFanout::flush($node);
	is_untouched('with all rights again');
	return;
}

# The new login is made for a topic that has its right then, so that it proves nothing; what
# is refused on it soon after is believed nevertheless.
sub rights_of_others_are_missing
{
	my @also = map { "rabbitmq.write:*/$_" } qw(dead consumed last secret hidden *_g);
	my ($before, $began);

	for (1 .. 5)
	{
		write_token(3600, write => 'held', also => \@also);
		log_in_anew();
		$before = reconnects();
		$began = Time::HiRes::time();
		write_token(3600, write => 'held', also => [ @also, "rabbitmq.write:*/$others[0]" ]);
		publish($others[0]);
		$node->poll_query_until('postgres', "select pending + held = 0 from fanout.stat_topics where topic = '$others[0]'");
		publish_to(@others[ 1 .. $#others ]);
		$node->poll_query_until('postgres',
			"select count(*) = 12 from fanout.stat_topics where reason ~ '403' and topic like 'other%'")
		  or die PgFanout::status($node, 'postgres');
		$began = Time::HiRes::time() - $began;
		last if $began < 5;
		write_token(3600);
		$node->safe_psql('postgres', "select fanout.resume('$_')") foreach @others;
		PgFanout::flush($node);
	}
	note sprintf('%.1f s', $began);
	is(reconnects() - $before, 1, 'what is refused soon after a new login costs no other one');
	write_token(3600);
	$node->safe_psql('postgres', "select fanout.resume('$_')") foreach @others;
	PgFanout::flush($node);
	is_untouched('with all rights once more');
	return;
}

# A topic that is refused is stalled; others flow; it is not the connection that
# is made again and again; and a token with the right is used.
sub stalls_alone
{
	my ($topic, $right) = @_;
	my $before = reconnects();

	publish($topic);
	$node->poll_query_until('postgres', "select attempts > 3 and reason ~ '403' from fanout.stat_topics where topic = '$topic'")
	  or die PgFanout::status($node, 'postgres');
	pass("a topic without the right to $right is stalled");
	publish('held');
	$node->poll_query_until('postgres', q(select pending + held = 0 from fanout.stat_topics where topic = 'held'));
	is_untouched('while another one is refused', $topic);
	cmp_ok(reconnects() - $before, '<=', 1, 'for which there was at most one login');

	write_token(3600);
	$node->safe_psql('postgres', "select fanout.resume('$topic')");
	PgFanout::flush($node);
	is_untouched("with the right to $right in a new token");
	return;
}

sub right_to_read_is_missing
{
	my $reconnects = q(select reconnects from fanout.stat_subscriptions);
	my $before;

	# that of a queue is needed to consume it, that of an exchange to bind
	write_token(3600, read => 'held', also => [ map { "rabbitmq.read:*/$_" } qw(dead consumed last secret hidden other_*) ]);
	log_in_anew();
	$node->safe_psql('postgres', 'select pg_terminate_backend(pid, 10000) from fanout.stat_subscriptions');
	$node->poll_query_until('postgres', q(select state = 'refused' and last_error ~ '403' from fanout.stat_subscriptions))
	  or die PgFanout::status($node, 'postgres');
	pass('a consumer without the right to read is refused');
	$before = $node->safe_psql('postgres', $reconnects);
	Time::HiRes::sleep(4);
	cmp_ok($node->safe_psql('postgres', $reconnects) - $before, '<=', 3, 'and does not try again and again');
	write_token(3600);
	publish('consumed');
	$node->poll_query_until('postgres', "select exists (select from got where n = $published)")
	  or die PgFanout::status($node, 'postgres');
	pass('it goes on with a token that has the right');
	return;
}

# ---------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------

sub terms
{
	my $encoded = base64($key);

	return qq([
 {rabbit, [{auth_backends, [rabbit_auth_backend_internal, rabbit_auth_backend_oauth2]}]},
 {rabbitmq_auth_backend_oauth2, [
  {resource_server_id, <<"rabbitmq">>},
  {key_config, [
   {default_key, <<"k">>},
   {signing_keys, #{<<"k">> => {map, #{<<"kty">> => <<"oct">>, <<"alg">> => <<"HS256">>, <<"k">> => <<"$encoded">>}}}}]}]}
].
);
}

sub base64
{
	return MIME::Base64::encode_base64url($_[0]);
}

# A token that is valid for so many seconds, with the rights given, else all.
sub write_token
{
	my ($seconds, %params) = @_;
	my %rights = (configure => '*', write => '*', read => '*', %params);
	my $also = delete $rights{also} || [];
	my @scope = ((map { "rabbitmq.$_:*/$rights{$_}" } keys %rights), ref $also ? @$also : $also);
	my $json = JSON::XS->new->canonical;
	my $signed = join '.', map { base64($json->encode($_)) } (
		{ alg => 'HS256', kid => 'k', typ => 'JWT' },
		{ aud => ['rabbitmq'], scope => \@scope, exp => int(time + $seconds), sub => 'fan' });

	unlink "$token_file.new";
	PostgreSQL::Test::Utils::append_to_file("$token_file.new",
		"$signed." . base64(Digest::SHA::hmac_sha256($signed, $key)) . "\n");
	chmod 0600, "$token_file.new" or die;
	rename "$token_file.new", $token_file or die;
	return;
}

# The workers' next logins are with the token that is in the file; or, with seconds, with
# one that lasts as long, and is written anew until then: else it may expire before.
sub log_in_anew
{
	my ($seconds) = @_;
	my $before = reconnects();
	my $renew = $seconds ? renewal($seconds) : sub { };

	$renew->();
	# rabbitmqctl may take longer to start than a token is valid
	$broker->evaluate('[rabbit_networking:close_connection(C, "the test wants it") || C <- rabbit_networking:connections()]');
	PgFanout::poll(
		sub {
			$renew->();
			return $node->safe_psql('postgres', "select reconnects > $before and state = 'idle' from fanout.stat_publisher") eq 't';
		},
		'another login');
	# the consumer may log in later than the publisher
	eval {
		PgFanout::poll(
			sub {
				$renew->();
				return $node->safe_psql('postgres', 'select connected_to is not null from fanout.stat_subscriptions') eq 't';
			},
			'the login of the consumer');
	};
	return;
}

# Writes a token that lasts for so many seconds, whenever it is called a second or more
# after the last one was written.
sub renewal
{
	my ($seconds) = @_;
	my $written = 0;

	return sub {
		return if Time::HiRes::time() - $written < 1;
		write_token($seconds);
		$written = Time::HiRes::time();
	};
}

# The publisher is logged in with a token that has expired.
sub expire
{
	log_in_anew(5);
	Time::HiRes::sleep(6);
	return;
}

sub publish
{
	my ($topic) = @_;

	$published++ if $topic eq 'consumed';
	$node->safe_psql('postgres', qq(select fanout.publish('$topic', '{"n": $published}')));
	return;
}

# To other topics, at once: 403 that come soon after each other are those of one login.
sub publish_to
{
	my (@topics) = @_;

	$node->safe_psql('postgres', "select fanout.publish(t, '{}') from unnest('{" . join(',', @topics) . "}'::text[]) t");
	return;
}

sub reconnects
{
	return $node->safe_psql('postgres', 'select reconnects from fanout.stat_publisher');
}

# No topic has failed, but for one.
sub is_untouched
{
	my ($when, $but) = @_;
	my $topics = $node->safe_psql('postgres',
		q(select topic, reason from fanout.stat_topics where stalled_since is not null or attempts > 0 or dead > 0));

	$topics = join "\n", grep { !defined $but || !/^$but\|/ } split /\n/, $topics;
	return is($topics, '', "no topic fails $when");
}

sub log_has
{
	my ($pattern) = @_;

	return PostgreSQL::Test::Utils::slurp_file($node->logfile) =~ $pattern;
}
