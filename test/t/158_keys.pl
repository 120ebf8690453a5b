# A table is walked, compared and mended by keys of any type: domains over enums, ranges
# and types with a length, values without an order among numbers, infinite times, texts
# that are equal and look different.

use strict;
use warnings;
use utf8;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, extension => 0, conf => q(
log_statement = none
max_worker_processes = 60
));
my %keys = (
	domain_enum => [ 'of_enum', 'z', 'a', 'Mid "x"' ],
	domain_range => [ 'of_range', 'empty', '[1.0,5)', '(,)', '(1,3]' ],
	domain_pair => [ 'of_pair', '(1,x)', '(1,)', '(,x)', '(2,"a,""b")', '(2,)' ],
	domain_char => [ 'of_char', 'a', 'ab', '', 'abcde' ],
	domain_bit => [ 'of_bit', '000', '001', '010', '101', '111' ],
	number => [ 'numeric', 'NaN', 'Infinity', '-Infinity', '0', '1.0', '1.50', '-0.000001' ],
	float => [ 'float8', 'NaN', '-Infinity', '-0', '0.1', '0.30000000000000004', '5e-324' ],
	stamp => [ 'timestamptz', 'infinity', '-infinity', '2000-01-01 00:00:00.000001+00', '4713-01-01 00:00 BC' ],
	span => [ 'interval', '1 day', '25 hours', '-1 mon', '1 year -1 day', '-00:00:01' ],
	folded => [ 'text collate folded', 'a', 'b', 'C', 'd' ],
	list => [ 'int[]', '{}', '{1}', '{1,NULL}', '[0:1]={1,2}', '{{1},{2}}' ],
	document => [ 'jsonb', '1', '"a"', '{"a": 1.0}', '[]', '"1"', 'true' ]);
my @names = sort keys %keys;

sub sql { return $node->safe_psql('source', $_[0]); }
sub copy { return $node->safe_psql('copy', $_[0]); }

foreach my $database ('source', 'copy')
{
	$node->safe_psql('postgres', "create database $database encoding utf8 locale 'C.UTF-8' template template0");
	$node->safe_psql($database, q(
create extension pg_fanout;
create type mood as enum ('z', 'a', 'Mid "x"');
create domain of_enum as mood;
create domain of_range as numrange;
create type pair as (a int, b text);
create domain of_pair as pair;
create domain of_char as char(5);
create domain of_bit as bit(3);
create collation folded (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
));
}
sql("alter database source set $_") foreach q(datestyle = 'SQL, DMY'), 'intervalstyle = sql_standard', q(timezone = 'Asia/Kolkata'), 'extra_float_digits = 0';
copy("alter database copy set $_") foreach q(datestyle = 'German'), 'intervalstyle = iso_8601', q(timezone = 'America/St_Johns');
foreach my $name (@names)
{
	my ($type, @values) = @{ $keys{$name} };

	# a third of the keys is free for others to move to
	sql("create table $name (k $type primary key, v int default 0); create table values_$name (i serial, k $type);"
		  . join('', map { "insert into values_$name (k) values (\$v\$$_\$v\$);" } @values)
		  . "insert into $name select k from values_$name where i % 3 <> 2; select fanout.declare_binding('$name', 'g'), fanout.capture('$name', '$name')");
	copy("create table $name (k $type primary key, v int); select fanout.sync_table('$name', 'g', '$name', max_attempts => 3, retry_delay => '100 ms')");
	sql("select fanout.backfill('$name', '$name', 'g', rate => 4)");
}

# some keys change to others, rows go and come, while the table is walked
foreach my $round (0 .. 3)
{
	foreach my $name (@names)
	{
		my ($from, $to, $gone) = map { 1 + ($round * $_ + $_) % (@{ $keys{$name} } - 1) } 1, 2, 3;
		my $key = "(select k::text from values_$name where i = %d)";

		sql(sprintf("update $name set v = v + 1 where k::text = $key; update $name x set k = n.k, v = v + 10 from values_$name n where n.i = %d and x.k::text = $key
				and not exists (select from $name y where y.k::text = n.k::text); delete from $name where k::text = $key;
				insert into $name select k, $round from values_$name where i = %d on conflict do nothing;", $from, $to, $from, $gone, $round + 1));
	}
}
PgFanout::poll(sub { sql(q(select count(*) from fanout.backfills where state in ('waiting', 'running'))) == 0 }, 'the backfills');
is(sql(q(select string_agg(entity || ' ' || state || ': ' || error, ', ') from fanout.backfills where state <> 'done')), '', 'all tables are walked');
equal('the copy is equal');
is(join(', ', compared('false')), join(', ', map { "$_ equal 0 0 0 0" } @names), 'and compared as equal');
copy(join('', map { "delete from $_ where k::text = (select k::text from $_ order by k limit 1); update $_ set v = v + 1000 where k::text = (select k::text from $_ order by k desc limit 1);" } @names));
is(join(', ', compared('true')), join(', ', map { "$_ different 1 1 0 2" } @names), 'a row that is missing and another that differs are found');
equal('and mended');
is(copy('select count(*) from fanout.dead_letter'), '0', 'no message was given up');

$node->stop;
done_testing();

sub equal
{
	my ($what) = @_;
	my $set = q(set timezone = 'UTC'; set datestyle = iso; set intervalstyle = postgres; set extra_float_digits = 1;);

	PgFanout::flush($node, dbname => 'source');
	PgFanout::poll(sub { $broker->left("${_}_g") == 0 }, "an empty queue of $_") foreach @names;
	$node->poll_query_until('copy', q(select bool_and(waiting = 0 and state = 'idle') from fanout.stat_subscriptions)) or die 'not idle';
	foreach my $name (@names)
	{
		my $rows = "$set select k::text, v from $name order by 1, 2";

		is(copy($rows), sql($rows), "$what: $name");
	}
	return;
}

# What comparisons of all tables say in the end.
sub compared
{
	my ($repair) = @_;
	my %runs = map { $_ => sql("select fanout.compare('$_', '$_', 'g', $repair)") } @names;

	foreach my $name (@names)
	{
		PgFanout::poll(sub { copy("select count(*) from fanout.sync_comparisons where run = $runs{$name} and finished_at is not null") == 1 }, "the comparison of $name");
	}
	return map { "$_ " . copy("select concat_ws(' ', state, missing, different, extra, mended) from fanout.sync_comparisons where run = $runs{$_}") } @names;
}
