# What is held of a topic may still be in the outbox, too.  After fanout.activate() had to
# forget what was sent, it is published from there, and is held no more.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
pg_fanout.retention = 3s
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

my $n = 0;

sub write_until
{
	my ($condition, $what) = @_;

	PgFanout::poll(
		sub {
			$n++;
			sql(qq(begin; select fanout.publish('waiting', '$n', 'k'); select fanout.publish('other', '$n'); commit));
			return sql("select $condition") eq 't';
		},
		$what, 120);
	return;
}

sub set_retention
{
	sql("alter system set pg_fanout.retention = '$_[0]'");
	$node->reload;
	return;
}

sql(q(select fanout.declare_binding(t, 'g', 'classic') from unnest('{waiting,other}'::text[]) t; select fanout.pause('waiting')));
write_until(q(exists (select from fanout.held join fanout.outbox using (id))), 'messages that are held, and in the outbox');
set_retention('1h');
# at once, or the publisher may write an entry in between
like(sql('begin; truncate fanout.sent; select fanout.activate(); commit'), qr/is empty/, 'what was sent is forgotten');
PgFanout::wait_for_publisher($node, 'idle');

my $log = -s $node->logfile;
my $first = sql(q(select 'outbox_' || o.segment from fanout.outbox o join fanout.topic using (topic_id) where topic = 'waiting' order by id limit 1));
set_retention('3s');
write_until("pg_relation_size('fanout.$first') = 0", 'a segment that is emptied');
sql(q(select fanout.resume('waiting')));
PgFanout::flush($node);
my %seen;
my @bodies = grep { !$seen{$_}++ } map { $_->{body} } $broker->collect('waiting_g', idle => 1);
is_deeply(\@bodies, [ 1 .. $n ], 'all that waited is sent, in order');
unlike(slurp_file($node->logfile, $log), qr/ERROR/, 'and the publisher did not fail');

done_testing();
