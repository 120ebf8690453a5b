# The judge of the experiments is not blind: each defect is counted as what it
# is, and as nothing else.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use JSON::XS ();
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $dir = PostgreSQL::Test::Utils::tempdir();
my @ledger = (
	[ 1, 1, 'k', 'c', 'a' ],
	[ 2, 1, 'k', 'u', 'b' ],
	[ 3, 1, 'other', 'c', 'c' ],
	[ 4, 1, 'k', 'd', 'b' ]);
# time, queue, message id, redelivered, sequence, op, key, token
my @all = (
	[ 0, 'load_1_g', 'm1', 0, 1, 'c', 'k', 'a' ],
	[ 0, 'load_1_g', 'm2', 0, 2, 'u', 'k', 'b' ],
	[ 0, 'load_1_g', 'm3', 0, 3, 'c', 'other', 'c' ],
	[ 0, 'load_1_g', 'm4', 0, 4, 'd', 'k', 'b' ]);
my @again = @{ $all[1] };
my @redelivered = (@again[ 0 .. 2 ], 1, @again[ 4 .. 7 ]);
my @renamed = (@again[ 0 .. 1 ], 'm9', @again[ 3 .. 7 ]);
my @one_id = (@{ $all[3] }[ 0 .. 1 ], 'm1', @{ $all[3] }[ 3 .. 7 ]);
my @unknown = (@again[ 0 .. 6 ], 'z');

is_deeply(judge(@all), {}, 'all is well');
is_deeply(judge(@all[ 0 .. 2 ]), { missing => 1 }, 'one is missing');
is_deeply(judge(), { missing => 4 }, 'all are missing');
is_deeply(judge(@all, \@unknown), { invented => 1 }, 'one is invented');
is_deeply(judge(@all[ 1, 0, 2, 3 ]),
	{ disordered => 1 }, 'one was overtaken by a later one of its key');
is_deeply(judge(@all[ 2, 0, 1, 3 ]), {}, 'other keys may come in any order');
is_deeply(judge(@all[ 0, 3 ], \@redelivered, $all[2]),
	{}, 'one was given back late by the broker, which had delivered it before');
is_deeply(judge(@all, \@again), { repeated => 1 }, 'one is repeated, late');
is_deeply(judge(@all, \@redelivered),
	{ redelivered => 1 }, 'one is redelivered by the broker');
is_deeply(judge(@all, \@renamed),
	{ renamed => 1 }, 'one is repeated under another message id');
is_deeply(judge(@all[ 0 .. 2 ], \@one_id),
	{ renamed => 1 }, 'two have one message id');

done_testing();

# What is not 0, of a queue that is due 4 messages.
sub judge
{
	my (@received) = @_;
	my %result;

	write_rows('ledger', @ledger);
	write_rows('received', @received);
	%result = %{
		JSON::XS::decode_json(
			PgFanout::run_command_ok(
				"$PgFanout::lib/verdict",
				'--ledger', "$dir/ledger",
				'--received', "$dir/received",
				'--queue', 'load_1_g')) };
	delete $result{messages};
	delete $result{examples};
	return { map { $_ => $result{$_} } grep { $result{$_} } keys %result };
}

sub write_rows
{
	my ($name, @rows) = @_;

	open my $out, '>', "$dir/$name" or die "$name: $!";
	print $out join("\t", @$_), "\n" foreach @rows;
	close $out;
	return;
}
