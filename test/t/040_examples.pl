# The consumers of the README, in Python and Node, keep true copies of a table
# that is written to meanwhile.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use IPC::Run ();
use JSON::PP ();
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $examples = "$FindBin::RealBin/../examples";
my $json = JSON::PP->new->canonical;
my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker);

$node->safe_psql(
	'postgres', q(
select fanout.declare_bindings('{"exchange_user": "python, python_failing, node, node_failing"}');
create table users (id int primary key, name text);
select fanout.capture('users', 'exchange_user')));

my %consumers = map { $_ => start($_) } qw(python python_failing node node_failing);
foreach my $round (1 .. 5)
{
	$node->safe_psql(
		'postgres', qq(
insert into users select i, 'new' from generate_series($round * 100, $round * 100 + 99) i;
update users set name = 'round $round' where id % 5 = $round % 5;
update users set name = name || ' again' where id % 7 = 0;
delete from users where id % 9 = $round));
}
PgFanout::flush($node);

my $users = $json->decode(
	$node->safe_psql('postgres',
		'select json_object_agg(id, users order by id) from users'));
my $messages =
  $node->safe_psql('postgres', 'select count(*) from fanout.outbox');
foreach my $name (sort keys %consumers)
{
	my $result = finish($name);

	is_deeply($result->{rows}, $users, "$name: the copy is equal to the table");
	is($result->{processed}, $messages, "$name: each message processed once");
	is($result->{failed}, $name =~ /failing/ ? $messages : 0,
		"$name: what failed was given back, and came again");
	is($broker->count("exchange_user_$name"), 0, "$name: all acked");
}

done_testing();

sub start
{
	my ($name) = @_;
	my $consumer = { out => '', err => '', copy => PostgreSQL::Test::Utils::tempdir() . '/copy.db' };
	my @command =
	  $name =~ /python/
	  ? ("$examples/consumer.py", $broker->uri, "exchange_user_$name", $consumer->{copy})
	  : ('node', "$examples/consumer.mjs", $broker->uri, "exchange_user_$name");

	push @command, '--idle', 5;
	push @command, '--fail-once' if $name =~ /failing/;
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
	$result->{rows} = rows_of($consumer->{copy}) if $name =~ /python/;
	delete @{ $result->{rows} }{ grep { !$result->{rows}{$_} } keys %{ $result->{rows} } };
	return $result;
}

sub rows_of
{
	my ($copy) = @_;
	my $select = q(
import json, sqlite3, sys
rows = sqlite3.connect(sys.argv[1]).execute('select key, row from entity')
print(json.dumps({key: row and json.loads(row) for key, row in rows})));

	return $json->decode(
		PgFanout::run_command_ok('python3', '-c', $select, $copy));
}
