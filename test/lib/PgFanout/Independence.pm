
=pod

=head1 NAME

PgFanout::Independence - is a healthy topic as quick as ever while another is ill?

=head1 SYNOPSIS

  PgFanout::Independence::of($node, $broker);       # while nothing is wrong
  # something happens to another topic
  is_independent('a queue that does not confirm');
  PgFanout::Independence::end();

=head1 DESCRIPTION

The healthy topic has a queue from which an independent client takes messages and notes when
they came.  A message that waited for another topic would have waited for one of its
time-outs or attempts, so that retry_interval should not be below a second.

A message may also wait for the machine, on which other tests run.  So another database, with a
publisher and a connection of its own, publishes at the same pace, and what its messages
take at that moment is taken off.

=cut

package PgFanout::Independence;

use strict;
use warnings;

use Exporter 'import';
use IPC::Run ();
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

our @EXPORT = qw(is_independent);

my ($session, $control, $collector, $arrivals, $alone);
my $token = 0;

=pod

=over

=item PgFanout::Independence::of(node, broker)

Declares the topic "healthy", and measures how quick it is.

=cut

sub of
{
	my ($node, $broker) = @_;
	my $uri = $broker->uri =~ s/guest:guest\@//r;    # with a password it could not be stored
	my @ms;

	$node->safe_psql('postgres', 'create database control');
	# not by way of a proxy
	$node->safe_psql('postgres', "alter database control set pg_fanout.uri = '$uri'");
	$node->safe_psql('control', 'create extension pg_fanout');
	foreach my $each ([ 'postgres', 'healthy' ], [ 'control', 'control' ])
	{
		my ($dbname, $topic) = @$each;

		$node->safe_psql($dbname, qq(
			select fanout.declare_binding('$topic', 'g', 'classic');
			create table beat (id serial primary key, token text);
			select fanout.capture('beat', '$topic');
			insert into beat (token) values ('first')));
		PgFanout::flush($node, dbname => $dbname);
	}
	$session = PgFanout::session($node);
	$control = PgFanout::session($node, 'control');
	$arrivals = PostgreSQL::Test::Utils::tempdir() . '/arrivals';
	$collector = IPC::Run::start(
		[ "$PgFanout::lib/collector", '--uri', $uri, '--out', $arrivals, map { ('--queue', $_) } 'healthy_g', 'control_g' ],
		'<', \undef, '>', \my $out, '2>', \my $err);
	PgFanout::poll(sub { -e $arrivals }, 'the collector');
	@ms = latencies(60);
	note sprintf('alone: p50 %.1f ms, longest %.1f ms', $ms[ @ms / 2 ], $ms[-1]);
	$alone = $ms[ int(@ms * 0.97) ];
	return;
}

# Token => time of arrival.
sub arrived
{
	return map { my @column = split /\t/; chomp @column; ($column[7] => $column[0]) } split /^/, slurp_file($arrivals);
}

sub beat
{
	my ($in, $name) = @_;

	PgFanout::run_in($in, "insert into beat (token) values ('$name')");
	return Time::HiRes::time();
}

# How long single messages of the healthy topic take from their commit to the client, longer
# than those of the other database that were written next to them: in milliseconds, in order.
sub latencies
{
	my ($count) = @_;
	my $first = $token + 1;
	my (%committed, %arrived, %ms);

	for (1 .. $count)
	{
		$token++;
		$committed{"t$token"} = beat($session, "t$token");
		$committed{"c$token"} = beat($control, "c$token");
		Time::HiRes::sleep(0.03);
	}
	for (1 .. 200)
	{
		%arrived = arrived();
		last unless grep { !defined $arrived{$_} } keys %committed;
		Time::HiRes::sleep(0.1);
	}
	die 'a message of the other database has not arrived' if grep { /^c/ && !defined $arrived{$_} } keys %committed;
	%ms = map { $_ => (($arrived{$_} || 1e12) - $committed{$_}) * 1000 } keys %committed;
	return sort { $a <=> $b } map {
		my $n = $_;
		my ($machine) = sort { $b <=> $a } map { $ms{"c$_"} // 0 } $n - 1 .. $n + 1;

		$ms{"t$n"} > $machine ? $ms{"t$n"} - $machine : 0;
	} $first .. $token;
}

=pod

=item is_independent(name, count => messages, within => 1000, longest => 2000)

Tests that the healthy topic's messages arrive as soon as when nothing else happened: but
for a few, within so many milliseconds more, and none takes longer than the longest.

=cut

sub is_independent
{
	my ($name, %params) = @_;
	my @ms = latencies($params{count} || 60);
	my $most = $alone + ($params{within} || 1000);
	my ($median, $slow, $p99) = map { $ms[ int(@ms * $_) ] } 0.5, 0.97, 0.99;

	note sprintf('%s: p50 %.1f ms, p97 %.1f ms, p99 %.1f ms, longest %.1f ms', $name, $median, $slow, $p99, $ms[-1]);
	cmp_ok($slow, '<', $most, "$name: another topic's messages arrive as soon as ever");
	cmp_ok($ms[-1], '<', $params{longest} || 2000, "$name: and none of them waits");
	return;
}

=pod

=item PgFanout::Independence::end()

Ends the client, before the broker.

=back

=cut

sub end
{
	$_->{harness}->kill_kill foreach $session, $control;
	$collector->kill_kill;
	$session = $control = $collector = undef;
	return;
}

# Also when the test dies.
END
{
	local ($?, $@);

	eval { end() } if $collector;
}

1;
