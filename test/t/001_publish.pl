# Every committed change of a captured table is in the queue of every consumer
# group of its topic, once, in order, as the outbox has it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker);

$node->safe_psql(
	'postgres', q(
create table users (id integer primary key, name text);
create table groups (id integer primary key, name text);
select fanout.declare_bindings('{"exchange_user":  ["consumer_user_rpc", "consumer_org_rpc"],
								 "exchange_group": ["consumer_user_rpc", "consumer_org_rpc"]}');
select fanout.capture('users', 'exchange_user');
select fanout.capture('groups', 'exchange_group');

insert into users select i, 'user ' || i from generate_series(1, 100) i;
insert into groups values (1, 'staff'), (2, 'Gäste');
update users set name = 'renamed' where id <= 10;
begin;
insert into users values (1000, 'never was');
rollback;
delete from users where id > 95;
update groups set id = 3 where id = 2;
));
PgFanout::flush($node);

is( $node->safe_psql(
		'postgres',
		q(select topic, state, count(*), count(sent_at)
			from fanout.outbox_status group by 1, 2 order by 1, 2)),
	"exchange_group|sent|3|3\nexchange_user|sent|115|115",
	'every change is in the outbox, marked sent');

foreach my $topic ('exchange_user', 'exchange_group')
{
	my $outbox = $node->safe_psql('postgres',
		qq(select id, message_id from fanout.outbox_status where topic = '$topic' order by id)
	);
	my $count = () = $outbox =~ /^/mg;

	foreach my $group ('consumer_user_rpc', 'consumer_org_rpc')
	{
		my $queue = "${topic}_$group";
		my @messages = $broker->collect($queue, expect => $count);

		my (%last, $wrong);

		is( join("\n",
				map { "$_->{headers}->{sequence}|$_->{message_id}" }
				sort { $a->{headers}->{sequence} <=> $b->{headers}->{sequence} } @messages),
			$outbox,
			"$queue has the message ids and sequences of the outbox");
		foreach my $headers (map { $_->{headers} } @messages)
		{
			foreach my $key (grep { defined } @$headers{qw(key old_key)})
			{
				$wrong++ if ($last{$key} || 0) > $headers->{sequence};
				$last{$key} = $headers->{sequence};
			}
		}
		is($wrong || 0, 0, "$queue: in order per key");
		is(scalar(grep { $_->{redelivered} } @messages),
			0, "$queue: nothing was read before");
		is_deeply(
			[ distinct(map { $_->{exchange} } @messages) ],
			[$topic], "$queue: all came through the exchange");
		is_deeply(
			[
				distinct(
					map { "$_->{delivery_mode} $_->{content_type} $_->{app_id}" }
					  @messages)
			],
			['2 application/json pg_fanout'],
			"$queue: persistent JSON of pg_fanout");
		is( scalar(grep { abs(time - ($_->{timestamp} || 0)) > 3600 } @messages),
			0, "$queue: every message has its time");
		is(scalar(grep { ref $_->{body} ne 'HASH' } @messages),
			0, "$queue: every body is a JSON object");
		is( scalar(
				grep { $_->{headers}->{op} ne $_->{body}->{op} } @messages),
			0,
			"$queue: header and body agree on the operation");
	}
}

# One message in full.
$node->safe_psql('postgres', q(insert into groups values (7, 'é')));
PgFanout::flush($node);
my ($message) =
  $broker->collect('exchange_group_consumer_org_rpc', expect => 1);
my $headers = $message->{headers};
my $body = $message->{body};

is($body->{op}, 'c', 'an insert is op c');
is($body->{before}, undef, 'it has no row before');
is_deeply(
	$body->{after},
	{ id => 7, name => "\x{e9}" },
	'it has the row after, in UTF-8');
ok($body->{ts_ms} > 1_600_000_000_000, 'it has a time in milliseconds');
is(ref $body->{source}, 'HASH', 'it has a source');
is_deeply(
	[ @{$headers}{qw(op schema table)} ],
	[ 'c', 'public', 'groups' ],
	'headers name the operation and the table');
like($headers->{key}, qr/7/, 'the key is a header');
is( "$headers->{sequence}|$headers->{xid}|$message->{message_id}",
	$node->safe_psql(
		'postgres', q(select id, xid, message_id from fanout.outbox
					  order by id desc limit 1)),
	'sequence, xid and message id are those of the outbox');

$node->stop('fast');

sub distinct
{
	my %seen;
	return grep { !$seen{$_}++ } map { defined $_ ? $_ : 'undef' } @_;
}

done_testing();
