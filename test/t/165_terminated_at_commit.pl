# Workers that are told to end while they commit: what was committed is acked all the same,
# so no other database of the group gets it.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use Test::More;
use Time::HiRes ();

my $broker = PgFanout::broker();

# Each commit takes a tenth of a second.
my $node = PgFanout::cluster('main', $broker, conf => q(
fsync = on
commit_delay = 100000
commit_siblings = 0
));
my ($messages, $ended) = (0, 0);

sub publish
{
	$node->safe_psql('postgres', "select fanout.publish('t', to_jsonb(i)) from generate_series($messages + 1, $messages + 400) i");
	PgFanout::flush($node);
	$messages += 400;
	return;
}

$node->safe_psql('postgres', q(select fanout.declare_binding('t', 'g')));
foreach my $database (qw(a b))
{
	$node->safe_psql('postgres', "create database $database");
	$node->safe_psql($database, q(create extension pg_fanout;
		create table applied (id int);
		create function apply(m fanout.message) returns void language sql as
			'insert into public.applied values ((m.body #>> array[]::text[])::int)';
		select fanout.subscribe('t', 'g', 'apply(fanout.message)', prefetch => 4)));
}
publish();
PgFanout::poll(
	sub {
		foreach my $database (qw(a b))
		{
			Time::HiRes::sleep(rand(0.4));
			$ended += $node->safe_psql($database, q(select count(pg_terminate_backend(pid)) from fanout.stat_subscriptions where state = 'consuming'));
		}
		return 0 if $broker->left('t_g') > 0;
		return 1 if $ended > 5;
		# there was no time to end as many
		publish();
		return 0;
	},
	'the end of the queue');
foreach my $database (qw(a b))
{
	$node->poll_query_until($database, 'select not exists (select from fanout.waiting)') or die 'messages wait';
}
my @applied = map { split /\n/, $node->safe_psql($_, 'select id from applied') } qw(a b);
my %times;
$times{$_}++ foreach @applied;
note "$ended workers ended";
cmp_ok($ended, '>', 5, 'workers were told to end');
is(scalar(keys %times), $messages, 'each message was applied');
is_deeply([ grep { $times{$_} > 1 } sort keys %times ], [], 'and by one of two databases');
$node->stop('fast');

done_testing();
