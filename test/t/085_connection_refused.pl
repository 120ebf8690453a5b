# A broker that closes the whole connection with 403, as one whose rights or tokens
# are checked by a plugin may: the workers log in again, and nothing is given up.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $liar = PgFanout::Liar->new;
my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', undef,
	conf => "pg_fanout.connect_timeout = 1s\npg_fanout.retry_interval = 200ms\npg_fanout.retry_limit = 1000");

$node->safe_psql('postgres', q(
	create table got (n int);
	create function handle(m fanout.message) returns void language sql as 'insert into public.got values (1)';
	select fanout.declare_topic('t', on_exhausted => 'dead_letter');
	select fanout.declare_bindings('{"t": ["g"]}');
	select fanout.subscribe('t', 'g', 'handle(fanout.message)')));
my $pid = PgFanout::publisher_pid($node);

foreach my $lie ('connection closed for a declaration (403)', 'connection closed for a publish (403)')
{
	is_met($lie, q(fanout.stat_publisher));
}
is_met('connection closed for consume-ok (403)', q(fanout.stat_subscriptions));

set_uri($broker->uri);
PgFanout::flush($node);
is(PgFanout::publisher_pid($node), $pid, 'the publisher did not end');
is($node->safe_psql('postgres', 'select count(*) from fanout.dead_letter'), 0, 'no message was given up');
is($node->safe_psql('postgres', q(select string_agg(distinct state, ' ') from fanout.outbox_status)), 'sent', 'all are sent to an honest broker');
$node->safe_psql('postgres', q(truncate got; select fanout.publish('t', '1')));
ok($node->poll_query_until('postgres', 'select exists (select from got)'), 'and the consumer goes on');
$node->stop('fast');
done_testing();

# The lie is told more than once, since the worker comes back, and named.
sub is_met
{
	my ($lie, $view) = @_;

	$liar->command("lie $lie");
	set_uri($liar->uri(lc $lie =~ s/\W+/_/gr));
	$node->safe_psql('postgres', q(select fanout.publish('t', '1')));
	PgFanout::poll(sub { ($liar->command('told'))[0] =~ /^[2-9]|^\d\d/ }, "$lie, twice");
	ok($node->poll_query_until('postgres', "select last_error = 'no reason' from $view"), "$lie: last_error has the broker's words")
	  or diag $node->safe_psql('postgres', "select last_error from $view");
	return;
}

sub set_uri
{
	my ($uri) = @_;

	$node->append_conf('postgresql.conf', "pg_fanout.uri = '$uri'");
	$node->reload;
	return;
}
