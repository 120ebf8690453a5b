# A message's body is as jsonb exactly what the server makes of its bytes, and NULL
# where the server refuses them: random JSON texts, and those with a byte or two
# changed, through a broker.  And headers are what was sent, of whatever type (null: a
# decimal, and text that the encoding does not have).
#
# PGF_BODY_SEED: repeats a run.  The long form takes more texts.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $seed = $ENV{PGF_BODY_SEED} || time;
my @encodings = qw(utf8 latin1 win1252 sql_ascii euc_jp euc_tw);
my $count = $ENV{PG_FANOUT_LONG} ? 100000 : 4000;

note("PGF_BODY_SEED=$seed");
srand($seed);

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 30
));

$node->safe_psql('postgres', "create database $_ encoding '$_' locale 'C' template template0") foreach @encodings;
prepare($_) foreach @encodings;

my %seen;
my @texts = grep { !$seen{$_}++ } fixed(), map { rand() < 0.4 ? damaged(document(0)) : document(0) } 1 .. $count;
my $file = PostgreSQL::Test::Utils::tempdir() . '/bodies';

open(my $out, '>:raw', $file) or die $!;
print $out join("\n", @texts);
close($out);
PgFanout::run_command_ok("$PgFanout::lib/amqp", 'publish', '--uri', $broker->uri, '--exchange', 'bodies', '--lines', $file, '--confirm',
	'--headers', '{"b": true, "i": -9223372036854775808, "d": {"!decimal": "1.5"}, "s": "\\u00fc\\"", "n": null, "t": {"b": [1, "x", {}], "a": 2}, "bb": "", "aa": 7}');
check($_) foreach @encodings;
done_testing();

sub prepare
{
	my ($dbname) = @_;

	$node->safe_psql($dbname, qq(
create extension pg_fanout;
create table got (id uuid primary key, body jsonb, raw bytea, headers jsonb);
create function note(m fanout.message[]) returns void language sql as \$\$
	insert into got select e.message_id, e.body, e.raw, e.headers from unnest(m) e;
\$\$;
-- what the server says
create function as_jsonb(raw bytea) returns jsonb language plpgsql as \$\$
begin
	return convert_from(raw, 'UTF8')::jsonb;
exception when data_exception or program_limit_exceeded or feature_not_supported or statement_too_complex then
	return null;
end \$\$;
select fanout.subscribe('bodies', '$dbname', 'note(fanout.message[])');
));
	$node->poll_query_until($dbname, q(select state in ('idle', 'consuming') from fanout.stat_subscriptions)) or die 'does not consume';
	return;
}

sub check
{
	my ($dbname) = @_;

	$node->poll_query_until($dbname, 'select count(*) = ' . @texts . ' from got') or die 'not all came: ' . $node->safe_psql($dbname, 'select count(*) from got') .
		$node->safe_psql($dbname, 'select * from fanout.stat_subscriptions; select attempts, error from fanout.delivery_failure limit 5');
	is($node->safe_psql($dbname, q(select encode(raw, 'escape') from got
		where record_image_ne(row(body), row(as_jsonb(raw))) limit 5)), '', "in $dbname, each body is what the server makes of it");
	note($node->safe_psql($dbname, q(select count(*) || ' texts, jsonb ' || count(body) from got)));
	cmp_ok($node->safe_psql($dbname, q(select count(*) from got where body is null)), '>', 100, 'of many texts nothing can be made');
	# as bytes, since not every encoding has an escape for the character; EUC_TW has none of it
	my $string = $dbname eq 'euc_tw' ? 'null' : "\"\xc3\xbc\\\"\"";
	my $headers = unpack('H*', qq({"b": true, "i": -9223372036854775808, "d": null, "s": $string, "n": null, "t": {"b": [1, "x", {}], "a": 2}, "bb": "", "aa": 7}));
	is($node->safe_psql($dbname, qq(select distinct headers from got where record_image_ne(row(headers), row(as_jsonb('\\x$headers'))))),
		'', 'and the headers are those that were sent');
	return;
}

# What is at the edges of the grammar, and of what numbers can be.
sub fixed
{
	my $digits = '9' x 18;

	return (
		'', ' ', 'null', 'true', ' false ', 'tru', 'truex', 'nul', '"', '""', "\t[\r] ", '[,]', '[1,]', '{,}', '{"a":1,}', '{"a"}',
		'{"a":}', '{1:2}', '{"a":1 "b":2}', '[1 2]', '[] []', '{}{}', '{} x', '0', '-0', '-', '--1', '+1', '00', '01', '-01', '1.', '.1', '1.0',
		'-0.0', '0.10', '1e5', '1E+5', '1e', '1.5e-3', '1e999999', '1.e1', '0x1', "$digits", "-$digits", "9$digits", "${digits}99",
		'9223372036854775807', '9223372036854775808', '-9223372036854775808', '1' x 70, '0.' . '1' x 70, '1.' . '0' x 50,
		'{"a":1,"a":2}', '{"bb":1,"a":2,"bb":3,"c":4}', '{"":0,"":1}', '"\\u0000"', '"\\u00e4"', '"\\ud83d\\ude00"', '"\\ud83d"', '"\\x"', "\"a\tb\"", "\"\x7f\"",
		"\"\xc3\xa4\"", "\"\xe2\x82\xac\"", "\"\xff\"", "{\"\xc3\xa4\": 1}", '[' x 70 . ']' x 70, '[' x 64 . ']' x 64, '[' x 63 . ']' x 64,
		'{"a":' x 65 . '1' . '}' x 65, '[' x 20000, '{' . join(',', map { "\"k$_\":$_" } 1 .. 40, 1 .. 5) . '}',
		'1e400', '-1e400', '1E-400', '0e99999', '-0.00', '-0e1', '1e131071', '1e131072', '1e-16383', '1e-16384', '1e99999999999', '9' x 130000,
		'0.' . '0' x 16000 . '1', '1' . '0' x 64, '-1' . '0' x 63, '1e', '1e+', '1E', '0.e1', '- 1', 'NaN', 'Infinity', '-Infinity', "1\0", "\0", "{}\0",
		'"\\ud83d\\u0041"', '"\\ude00"', '"\\ude00\\ud83d"', '"\\ud83d\\ud83d\\ude00"', '"\\u00"', '"\\u00g0"', '"\\U00e4"', '"\\', '"\\"', '{"\\u0000":1}', '{"\\u0061":1,"a":2}',
		'"\\u2028\\uffff\\ufffe"', '"\\u4e04\\u00a6\\u20ac"', "\"\xe4\xb8\x84\"", "\"\xc2\xa6\xef\xbf\xa4\"", "\"\xe3\x81\x82\"", "{\"\xe3\x81\x82\":1,\"\xc2\xa6\":2,\"\xef\xbf\xa4\":3}",
		"\xef\xbb\xbf{}", "\xef\xbb\xbf", "\xc2\xa0{}", "{}\x0b", "\x0c[]", "\xe2\x80\xa8[]", "[1,\xc2\xa02]", "\"\x1f\"", "\"\xc2\x80\"",
		(map { "\"$_\"" } "\xc0\x80", "\xc1\xbf", "\xe0\x80\x80", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xed\xbf\xbf", "\xf0\x8f\xbf\xbf", "\xf4\x8f\xbf\xbf", "\xf4\x90\x80\x80",
			"\xf8\x88\x80\x80\x80", "\xfe", "\xc3", "\xe2\x82", "\xf0\x9f\x98", "\x80", "\xf0\x9f\x98\x80"),
		(map { my $n = $_; '{' . join(',', map { '"' . $_ x $n . "\":\"" . $_ x $n . '"' } qw(b a B), "\x7f", '', 'a') . '}' } 1, 31, 63, 64, 65, 127, 128, 129, 255, 256, 65535),
		'{' . join(',', map { '"' . 'k' x (40 - $_) . "\":{\"$_\":[]}" } 0 .. 40) . '}', '[[],{},"",[[]],{"":{}}]', '{"":{"":{"":""}}}', '{"a":{"a":1},"a":{}}',
		'{"a":[1,2],"b":"x","a":null}', '[' x 5000 . ']' x 5000, '{"a":' x 3000 . '[]' . '}' x 3000, '[' x 100000 . ']' x 100000, '[' . '[' x 63 . ']' x 63 . ',1]',
		'[' . join(',', map { "{\"$_\":-$_.5}" } 1 .. 9000) . ']', ' ' x 262144 . '1', ' ' x 262143 . '1', '"' . 'x' x 262142 . '"', '"' . 'x' x 262143 . '"',
		'[' . join(',', map { "\"$_\"" } 1 .. 1000) . ']', '"' . 'x' x 300000 . '"', '[' . join(',', (7) x 100000) . ']');
}

sub document
{
	my ($depth) = @_;
	my $kind = $depth > 4 ? rand(5) : rand(8);
	my $blank = (' ', '', '', '', "\t")[ rand 5 ];

	return $blank . (qw(null true false))[ rand 3 ] . $blank if $kind < 1;
	return number() if $kind < 3;
	return string() if $kind < 5;
	return "[$blank" . join(",$blank", map { document($depth + 1) } 1 .. rand(5)) . ']' if $kind < 6;
	return "{$blank" . join(',', map { string() . "$blank:" . document($depth + 1) } 1 .. rand($kind < 7.9 ? 8 : 60)) . "$blank}";
}

sub number
{
	my $number = (rand() < 0.3 ? '-' : '') . int(10**rand(rand() < 0.1 ? 25 : 6));

	$number .= '.' . int(rand(1000)) if rand() < 0.2;
	$number .= 'e' . int(rand(20)) if rand() < 0.05;
	return $number;
}

sub string
{
	my @pieces = ('a' .. 'z', 'A', ' ', "\xc3\xa4", "\xe2\x82\xac", '\\n', '\\u00e4', '\\"', '/', '\\\\');

	return '"' . join('', map { $pieces[ rand(rand() < 0.9 ? 28 : scalar @pieces) ] } 1 .. rand(rand() < 0.1 ? 40 : 3)) . '"';
}

# With a byte or two changed, added or removed.
sub damaged
{
	my ($text) = @_;

	foreach (0 .. rand(2))
	{
		my $at = int(rand(length($text) + 1));
		my $with = rand() < 0.3 ? '' : ('"', '{', '}', '[', ']', ',', ':', '0', '-', '.', 'e', '\\', ' ', "\xff", "\xc3", "\x01", 'x')[ rand 17 ];

		substr($text, $at, $at < length($text) && rand() < 0.7 ? 1 : 0, $with);
	}
	return $text;
}
