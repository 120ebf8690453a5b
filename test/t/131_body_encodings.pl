# A message that has to wait, or that was given up and is tried again, comes with the
# very bytes that were sent, whatever the encoding of the database makes of them; and a
# body that is too much for jsonb costs no more than its jsonb.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, extension => 0, conf => q(
log_statement = none
max_worker_processes = 30
));
my $dir = PostgreSQL::Test::Utils::tempdir();

# With characters that become others, or none, on their way to an encoding and back.
my @bodies = (
	'{"ascii": 1}', "\"\xc3\xa4\xe2\x82\xac\"", "\"\xc2\xa6\"", "\"\xef\xbf\xa4\"", "\"\xe4\xb8\x84\"", "\"\xe4\xb8\x80\"", "\"\xe3\x81\x82\"",
	"\"\xc2\x85\"", "\"\xe3\x80\x9c\xef\xbd\x9e\"", "no json \xff\xfe", "\"\xed\xa0\x80\"", "\"a\0b\"", ' ');

write_lines('bodies', @bodies);
my @encodings = qw(utf8 latin1 win1252 sql_ascii euc_jp euc_tw euc_jis_2004);
foreach my $encoding (@encodings)
{
	prepare($encoding);
	publish("first $encoding");
	wait_for($encoding, q(select count(*) from got where attempt = 2));
	is(differing($encoding), '', "in $encoding, messages that waited have the bytes that were sent");
	is($node->safe_psql($encoding, q(select count(*) from fanout.waiting)), 0, 'and none is left behind');
	$node->safe_psql($encoding, q(truncate got; select fanout.alter_subscription('bodies', current_database(), max_attempts => 1)));
	publish("second $encoding");
	wait_for($encoding, q(select count(*) from fanout.dead_letter));
	is($node->safe_psql($encoding, 'insert into allowed values (1); select fanout.redrive()'), scalar @bodies, "in $encoding, all dead letters are tried again");
	wait_for($encoding, 'select count(*) from got');
	is(differing($encoding), '', 'with the bytes that were sent');
}
large();
too_large() if $ENV{PG_FANOUT_LONG};
$node->stop;
done_testing();

sub write_lines
{
	my ($name, @lines) = @_;

	open(my $out, '>:raw', "$dir/$name") or die $!;
	print $out join("\n", @lines);
	close($out);
	return;
}

sub prepare
{
	my ($dbname) = @_;

	$node->safe_psql('postgres', "create database $dbname encoding '$dbname' locale 'C' template template0");
	$node->safe_psql($dbname, q(
create extension pg_fanout;
create table sent (raw bytea);
create table got (raw bytea, attempt int, body jsonb);
create table allowed (n int);
create function note(m fanout.message) returns void language plpgsql as $$
begin
	if m.attempt < 2 and not exists (select from allowed) then
		raise exception 'not yet' using errcode = 'X000' || (random() * 9)::int;
	end if;
	insert into got values (m.raw, m.attempt, m.body);
end $$;
select fanout.subscribe('bodies', current_database(), 'note(fanout.message)', retry_delay => '100 ms', ordered => false);
) . join('', map { 'insert into sent values (\'\x' . unpack('H*', $_) . '\');' } @bodies));
	$node->poll_query_until($dbname, q(select state in ('idle', 'consuming') from fanout.stat_subscriptions)) or die 'does not consume';
	return;
}

# The header tells messages with the same body apart.
sub publish
{
	my ($round) = @_;

	PgFanout::run_command_ok("$PgFanout::lib/amqp", 'publish', '--uri', $broker->uri, '--exchange', 'bodies',
		'--lines', "$dir/bodies", '--confirm', '--headers', qq({"round": "$round"}));
	return;
}

sub wait_for
{
	my ($dbname, $count) = @_;

	PgFanout::poll(sub { $node->safe_psql($dbname, $count) == @bodies },
		sub { $node->safe_psql($dbname, 'select attempts, error from fanout.delivery_failure limit 3') });
	return;
}

sub differing
{
	my ($dbname) = @_;

	return $node->safe_psql($dbname, q((select raw from got except all select raw from sent) union all (select raw from sent except all select raw from got)));
}

# A body of 48 MB that fails once, for one database alone, since each call takes seconds.
sub large
{
	$node->safe_psql($_, q(select fanout.unsubscribe('bodies', current_database(), drop_queue => true))) foreach @encodings[1 .. $#encodings];
	$node->safe_psql('utf8', q(truncate got; truncate allowed; select fanout.alter_subscription('bodies', 'utf8', max_attempts => 5, handler_timeout => '3 min')));
	write_lines('large', '["' . join('', map { sprintf('%08x', rand(2**32)) } 1 .. 6_000_000) . '"]');
	PgFanout::run_command_ok("$PgFanout::lib/amqp", 'publish', '--uri', $broker->uri, '--exchange', 'bodies', '--body-file', "$dir/large", '--confirm');
	PgFanout::poll(sub { $node->safe_psql('utf8', 'select count(*) from got') == 1 }, 'the large body', 300);
	my ($md5) = PgFanout::run_command_ok('md5sum', "$dir/large") =~ /^(\w+)/;
	is($node->safe_psql('utf8', 'select md5(raw), attempt from got'), "$md5|2", 'a body of 48 MB that waited has the bytes that were sent');
	return;
}

# An array of more elements than one allocation holds.
sub too_large
{
	write_lines('large', '[' . join(',', (0) x 17_000_000) . ']');
	$node->safe_psql('utf8', 'truncate got; truncate allowed; insert into allowed values (1)');
	PgFanout::run_command_ok("$PgFanout::lib/amqp", 'publish', '--uri', $broker->uri, '--exchange', 'bodies', '--body-file', "$dir/large", '--confirm');
	PgFanout::poll(sub { $node->safe_psql('utf8', q(select count(*) from got where length(raw) > 30000000)) == 1 }, 'the large body', 300);
	is($node->safe_psql('utf8', 'select body is null, attempt from got'), 't|1', 'a body that jsonb cannot hold is NULL, at the first attempt');
	return;
}
