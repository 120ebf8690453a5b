# The consumers of the README, in Python, Node and Go, keep true copies of a table
# that is written to meanwhile: keys change, it is truncated, numbers are larger than
# a double, and there are messages that are no changes, and one that is no JSON.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use IPC::Run ();
use JSON::XS ();
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $examples = "$FindBin::RealBin/../examples";
my $json = JSON::XS->new->canonical;
my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker);

my @languages = qw(python python_failing node node_failing go go_failing);

# as programs are built with Debian's packages
my $go = PostgreSQL::Test::Utils::tempdir() . '/consumer';
{
	local %ENV = (%ENV, GO111MODULE => 'off', GOPATH => '/usr/share/gocode', GOCACHE => "$go.cache", GOFLAGS => '-p=1');

	PgFanout::run_command_ok('go', 'build', '-o', $go, "$examples/consumer.go");
}

$node->safe_psql(
	'postgres', qq(
select fanout.declare_binding('exchange_user', g) from unnest('{@{[join ',', @languages]}}'::text[]) g;
create table users (id bigint primary key, name text, amount numeric);
select fanout.capture('users', 'exchange_user', '{insert,update,delete,truncate}')));

my %consumers = map { $_ => start($_) } @languages;
$node->safe_psql('postgres', q(insert into users select i, 'gone' from generate_series(1, 50) i; truncate users));
foreach my $round (1 .. 5)
{
	$node->safe_psql(
		'postgres', qq(
insert into users select i, 'new', i * 12345678901234567890.1 from generate_series($round * 100, $round * 100 + 99) i;
update users set name = 'round $round' where id % 5 = $round % 5;
update users set name = name || ' again' where id % 7 = 0;
update users set id = id + 9007199254740993 where id % 11 = $round and id < 1000;
delete from users where id % 9 = $round;
select fanout.publish('exchange_user', '{"after": null}');
select fanout.publish('exchange_user', '[]', key => '$round')));
}
PgFanout::flush($node);
# one for each of them
$broker->amqp('publish', '--exchange', 'exchange_user', '--headers', '{"op": "c", "key": "1", "sequence": 9000000000000000000}',
	'--message-id', "bad", '{"after": ');

my $users = $node->safe_psql('postgres', q(select string_agg(concat_ws(' ', id, id, name, amount), E'\n' order by id) from users));
my $messages = $node->safe_psql('postgres', 'select count(*) from fanout.outbox');
foreach my $name (sort keys %consumers)
{
	my $result = finish($name);

	is($result->{rows}, $users, "$name: the copy is equal to the table, by key");
	is($result->{processed}, $messages, "$name: each message processed once");
	is($result->{bad}, 1, "$name: one that is no JSON is put aside");
	is($result->{failed}, $name =~ /failing/ ? $messages + 1 : 0,
		"$name: what failed was given back, and came again");
	is($broker->count("exchange_user_$name"), 0, "$name: all acked");
}

done_testing();

sub start
{
	my ($name) = @_;
	my $consumer = { out => '', err => '', copy => PostgreSQL::Test::Utils::tempdir() . '/copy.db' };
	my @arguments = ($broker->uri, "exchange_user_$name");
	my @options = ('--idle', 15, $name =~ /failing/ ? '--fail-once' : ());
	my @command =
	    $name =~ /python/ ? ("$examples/consumer.py", @arguments, $consumer->{copy}, @options)
	  : $name =~ /node/ ? ('node', "$examples/consumer.mjs", @arguments, @options)
	  :                   ($go, @options, @arguments);

	PgFanout::flush($node);
	$consumer->{harness} =
	  IPC::Run::start(\@command, '<', \undef, '>', \$consumer->{out}, '2>',
		\$consumer->{err});
	return $consumer;
}

# What it printed at its end, and the rows of its copy.
sub finish
{
	my ($name) = @_;
	my $consumer = $consumers{$name};
	my $result;

	$consumer->{harness}->finish or die "$name failed: $consumer->{err}";
	$result = $json->decode($consumer->{out});
	$result->{rows} = list($name =~ /python/ ? rows_of($consumer->{copy}) : $consumer->{out} =~ s/^.*"rows":(\{.*\})[^}]*\}$/$1/sr);
	return $result;
}

# The rows of a copy, given as a JSON object; the server reads numbers as they are.
sub list
{
	my ($rows) = @_;

	return $node->safe_psql('postgres', qq(
select string_agg(concat_ws(' ', key, value ->> 'id', value ->> 'name', value ->> 'amount'), E'\\n' order by key::bigint)
from json_each(\$rows\$$rows\$rows\$) where json_typeof(value) <> 'null'));
}

sub rows_of
{
	my ($copy) = @_;
	my $select = q(
import json, sqlite3, sys
rows = sqlite3.connect(sys.argv[1]).execute('select key, row from entity')
print('{' + ','.join(json.dumps(key) + ':' + (row or 'null') for key, row in rows) + '}'));

	return PgFanout::run_command_ok('python3', '-c', $select, $copy);
}
