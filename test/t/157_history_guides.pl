# The guides of README to its history, run as they are written there: a service that
# joins late, a queue that was lost, a database that was restored, and a comparison.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster_with_copy($broker);
my $readme = slurp_file("$FindBin::RealBin/../../README.md");
my $rows = 'select md5(string_agg(u::text, $$ $$ order by id)), count(*) from users u';

sub sql { return $node->safe_psql($_[1] || 'postgres', $_[0]); }

# The statements of a guide, with what README says of each: where to run it.
sub statements
{
	my ($title) = @_;
	my ($chapter) = $readme =~ /^#### \Q$title\E\n(.*?)^###/ms or die "README has no guide \"$title\"";
	my @found = map { /^(.*;)\s*(?:-- (.*))?$/mg } $chapter =~ /```sql\n(.*?)```/gs;

	return pairs(@found);
}

sub pairs
{
	my @pairs;

	push @pairs, [ splice @_, 0, 2 ] while @_;
	return @pairs;
}

# Runs it at the copy if its comment says so.  Returns what it returns.
sub run
{
	my ($statement, $source) = @_;
	my ($text, $where) = @$statement;

	return sql($text, ($where // '') =~ /^at the copy/ ? 'copy' : $source);
}

sub settled
{
	my ($group, $source) = @_;

	PgFanout::poll(sub { sql(q(select count(*) from fanout.backfills where state not in ('done', 'cancelled')), $source) == 0 }, 'the end of what runs');
	PgFanout::flush($node, dbname => $source || 'postgres');
	PgFanout::poll(sub { $broker->left("exchange_user_$group") == 0 }, 'an empty queue');
	$node->poll_query_until('copy', q(select bool_and(waiting = 0 and state = 'idle') from fanout.stat_subscriptions)) or die 'not idle';
	return;
}

sub equal
{
	my ($name, $source) = @_;

	is(sql($rows, 'copy'), sql($rows, $source), $name);
	return;
}

sql(q(create table users (id int primary key, name text); insert into users select i, 'of before' from generate_series(1, 1000) i;
	select fanout.declare_topic('exchange_user'), fanout.capture('users', 'exchange_user')));
sql('create table users (id int primary key, name text)', 'copy');

# ---- A new service joins ----

my ($declare, $backfill, $look) = statements('A new service joins');
run($declare);
sql(q(update users set name = 'changed' where id % 3 = 0; delete from users where id % 7 = 0));
my $id = run($backfill);
sql(q(insert into users values (2000, 'new'); delete from users where id = 1));
like(run($look), qr/^(?:waiting|running|done)\|\d+\|\d*\|$/, 'a new service: the view tells how far it is');
sql(q(select fanout.sync_table('exchange_user', 'consumer_new', 'users')), 'copy');
settled('consumer_new');
equal('a new service has every row');
sql(q(select fanout.unsubscribe('exchange_user', 'consumer_new'); truncate users), 'copy');
sql(q(select fanout.drop_binding('exchange_user', 'consumer_new', if_empty => false); select fanout.declare_binding('exchange_user', 'consumer_org_rpc'); select fanout.backfill('users', 'exchange_user', 'consumer_org_rpc')));
sql(q(select fanout.sync_table('exchange_user', 'consumer_org_rpc', 'users')), 'copy');
settled('consumer_org_rpc');

# ---- A queue was lost ----

sub lose_queue
{
	my ($first) = @_;

	sql(q(select fanout.pause('exchange_user', 'consumer_org_rpc')), 'copy');
	$node->poll_query_until('copy', 'select pid is null from fanout.stat_subscriptions') or die 'still consumes';
	sql("insert into users select i, 'lost' from generate_series($first, $first + 99) i; update users set name = 'lost $first' where id < 50; delete from users where id between $first / 10 and $first / 10 + 20");
	PgFanout::flush($node);
	$broker->ctl('delete_queue', '-p', $broker->vhost, 'exchange_user_consumer_org_rpc');
	return;
}

my ($replay, $truncate, $again) = statements('A queue was lost');
lose_queue(3000);
sql(q(select fanout.resume('exchange_user', 'consumer_org_rpc')), 'copy');
run($replay);
settled('consumer_org_rpc');
equal('a queue that was lost: what it had is sent again');
lose_queue(4000);
run($truncate);
run($again);
PgFanout::flush($node);
sql(q(select fanout.resume('exchange_user', 'consumer_org_rpc')), 'copy');
settled('consumer_org_rpc');
equal('or all rows');

# ---- Is the copy right? ----

my ($compare, $result, $differences, $repair) = statements('Is the copy right?');
my $finished = q(select count(*) from fanout.sync_comparisons where finished_at is not null);
my $runs = 0;

sub compared
{
	my ($statement, $source) = @_;

	run($statement, $source);
	$runs++;
	PgFanout::poll(sub { sql($finished, 'copy') == $runs }, "end of comparison $runs");
	return sql('select state from fanout.sync_comparisons order by run desc limit 1', 'copy');
}

is(compared($compare), 'equal', 'the copy is right');
sql(q(update users set name = 'wrong' where id = 2; delete from users where id = 3; insert into users values (-1, 'too much')), 'copy');
is(compared($compare), 'different', 'or is not');
like(run($result), qr/^.*\bdifferent\b.*$/m, 'which the view says');
is(join(', ', sort split /\n/, run($differences)), 'different|{"id": 2}|{name}, extra|{"id": -1}|{}, missing|{"id": 3}|{}', 'with the rows, and what is in them');
compared($repair);
equal('and it is mended');
is(compared($compare), 'equal', 'as another comparison says');

# ---- A database was restored ----

my $dump = PostgreSQL::Test::Utils::tempdir() . '/dump.sql';
my ($activate, $mend) = statements('A database was restored');
$node->command_ok([ 'pg_dump', '-f', $dump, '-d', $node->connstr('postgres') ], 'a dump of the source');
sql(q(update users set name = 'not in the dump' where id < 20; insert into users values (5000, 'not in the dump')));
settled('consumer_org_rpc');
sql(q(select fanout.pause('exchange_user')));
sql('create database restored');
$node->command_ok([ 'psql', '-X', '-q', '-o', "$dump.out", '-f', $dump, '-d', $node->connstr('restored') ], 'is restored');
PgFanout::wait_for_publisher($node, 'passive', dbname => 'restored');
run($activate, 'restored');
compared($mend, 'restored');
settled('consumer_org_rpc', 'restored');
equal('a database that was restored: its copy has what it has', 'restored');

$node->stop;
done_testing();
