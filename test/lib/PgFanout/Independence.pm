
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

my ($session, $collector, $arrivals, $alone);
my $token = 0;

=pod

=over

=item PgFanout::Independence::of(node, broker)

Declares the topic "healthy", and measures how quick it is.

=cut

sub of
{
	my ($node, $broker) = @_;
	my @ms;

	$node->safe_psql('postgres', q(
		select fanout.declare_binding('healthy', 'g', 'classic');
		create table beat (id serial primary key, token text);
		select fanout.capture('beat', 'healthy');
		insert into beat (token) values ('first')));
	PgFanout::flush($node);
	$session = PgFanout::session($node);
	$arrivals = PostgreSQL::Test::Utils::tempdir() . '/arrivals';
	$collector = IPC::Run::start(
		[ "$PgFanout::lib/collector", '--uri', $broker->uri, '--out', $arrivals, '--queue', 'healthy_g' ],
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

# How long single messages of the healthy topic take from their commit to the client:
# in milliseconds, in order.
sub latencies
{
	my ($count) = @_;
	my %committed;
	my %arrived;

	for (1 .. $count)
	{
		$token++;
		PgFanout::run_in($session, "insert into beat (token) values ('t$token')");
		$committed{"t$token"} = Time::HiRes::time();
		Time::HiRes::sleep(0.03);
	}
	for (1 .. 200)
	{
		%arrived = arrived();
		last unless grep { !defined $arrived{$_} } keys %committed;
		Time::HiRes::sleep(0.1);
	}
	return sort { $a <=> $b } map { (($arrived{$_} || 1e12) - $committed{$_}) * 1000 } keys %committed;
}

=pod

=item is_independent(name, count => messages, within => 300, longest => 2000)

Tests that the healthy topic's messages arrive as soon as when nothing else happened: but
for a few, within so many milliseconds more, and none takes longer than the longest.

=cut

sub is_independent
{
	my ($name, %params) = @_;
	my @ms = latencies($params{count} || 60);
	my $most = $alone + ($params{within} || 300);
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
	$session->{harness}->kill_kill;
	$collector->kill_kill;
	$session = $collector = undef;
	return;
}

# Also when the test dies.
END
{
	local ($?, $@);

	eval { end() } if $collector;
}

1;
