# A row has the same bytes from every session, and its values are read back
# equal: random values of every type that a column can have, alone and within
# arrays, ranges, composites and domains, written by sessions with random
# settings into two tables, and read by one with others.
#
# PG_FANOUT_TEST_SEED repeats a run's choice.  PG_FANOUT_LONG=1: 40 rounds in
# place of 2, and the text of every column as a key.

use strict;
use warnings;
use utf8;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use Encode qw(encode_utf8);
use JSON::XS ();
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $long = $ENV{PG_FANOUT_LONG};
my $seed = $ENV{PG_FANOUT_TEST_SEED} || int(rand(1_000_000));
my ($rounds, $rows, $keys) = $long ? (40, 40, 1000) : (2, 20, 10);

srand($seed);
note("seed $seed");

# Locales that write money in other ways: 1,5 and a sign behind it, no fractions.
my @locales = ('de_DE.UTF-8', 'ja_JP.UTF-8');
my $dir = PostgreSQL::Test::Utils::tempdir();
PgFanout::run_command_ok('localedef', '-f', 'UTF-8', '-i', s/\..*//r, "$dir/$_") foreach @locales;
$ENV{LOCPATH} = $dir;

my $node = PgFanout::cluster('main', undef,
	init => { extra => [ '--encoding', 'UTF8', '--locale', 'C' ] });
my $user = sql('select current_user');

# The settings under which literals are written here, and texts compared.
my $neutral = q(
set datestyle = 'ISO, MDY'; set intervalstyle = postgres; set timezone = 'UTC'; set extra_float_digits = 3;
set search_path = fz, pg_catalog; set client_min_messages = error; set lc_monetary = 'C'; set xmloption = content;
);

# Types: a name, and a function that gives the text of a random value.  Within
# an array the delimiter is a comma, but of box.
my %delimiter = ('box' => ';');
my %scalar = scalar_types();
my %types = %scalar;
add_contrib_types();
make_types();
my @columns = make_tables();

foreach my $round (1 .. $rounds)
{
	round($round);
}
write_money();
done_testing();

# ---------------------------------------------------------------------------
# Random choices
# ---------------------------------------------------------------------------

sub one_of
{
	return $_[ int(rand(@_)) ];
}

sub chance
{
	return rand() < $_[0];
}

sub integer
{
	my ($bits) = @_;
	my $magnitude = int(rand(2**int(rand($bits))));

	return sprintf('%s%.0f', $magnitude > 0 && chance(0.5) ? '-' : '', $magnitude);
}

sub float
{
	my ($digits, $exponent) = @_;
	my $number = one_of(1, 0.1, 0.1 + 0.2, 1 / 3, rand(), rand(1e6), int(rand(1000)) + 1);

	return one_of('0', '-0') if chance(0.05);
	return one_of('NaN', 'Infinity', '-Infinity') if chance(0.15);
	return sprintf("%s%.${digits}g", chance(0.5) ? '-' : '', $number * 10**int(rand(2 * $exponent) - $exponent));
}

sub finite
{
	my $number = chance(0.1) ? '-0' : float(17, 300);

	return $number =~ /[NI]/ ? '1.5' : $number;
}

sub numeric
{
	return one_of('NaN', 'Infinity', '-Infinity', '0.000', '-0') if chance(0.15);
	return join '', chance(0.5) ? '-' : '', 1 + int(rand(9)), digits(int(rand(40))),
	  chance(0.6) ? '.' . digits(1 + int(rand(30))) : '';
}

sub digits
{
	return join '', map { int(rand(10)) } 1 .. $_[0];
}

# Characters that mean something somewhere.
sub text
{
	my ($most, @alphabet) = @_;

	@alphabet = (
		'a' .. 'e', 'Z', ' ', ' ', '"', '"', '\\', '\\', q('), ',', ';', ':', '{', '}', '[', ']', '(', ')', '<', '>',
		'=', '/', '%', '$', '&', '-', '+', '.', '0', '1', '2', "\t", "\n", "\r", "\b", "\x01", "\x1f", "\x7f",
		'é', 'ü', '€', "\x{1f600}", "\x{2028}", 'NULL', 'null', 'true', '\u0000', '""', '\\\\')
	  unless @alphabet;
	return join '', map { one_of(@alphabet) } 1 .. int(rand($most + 1));
}

sub name
{
	my $name = text(20);

	chop $name while length(encode_utf8($name)) > 63;
	return $name;
}

sub hex_bytes
{
	return join '', map { sprintf '%02x', int(rand(256)) } 1 .. $_[0];
}

sub bits
{
	return join '', map { int(rand(2)) } 1 .. $_[0];
}

# ---------------------------------------------------------------------------
# Times
# ---------------------------------------------------------------------------

sub day
{
	return one_of('infinity', '-infinity') if chance(0.1);
	return one_of('4714-11-24 BC', '0001-01-01 BC', '0001-01-01', '1900-02-28', '9999-12-31', '10000-01-01') if chance(0.2);
	return sprintf('%04d-%02d-%02d', 1 + int(rand(4000)), 1 + int(rand(12)), 1 + int(rand(28)));
}

sub clock
{
	my $clock = sprintf('%02d:%02d:%02d', int(rand(24)), int(rand(60)), int(rand(60)));

	return chance(0.5) ? $clock : "$clock." . digits(1 + int(rand(6)));
}

sub zone
{
	return one_of('+00', '-00', '+01', '-08', '+05:30', '-12:45', '+15:59:59', '-15:59', '+00:00:01');
}

sub moment
{
	my ($zone) = @_;
	my $day = day();

	return $day if $day =~ /inf/;
	$zone = '-08' if $zone && $day =~ /^4714/;
	return $day =~ /^(.*) BC$/ ? "$1 " . clock() . "$zone BC" : "$day " . clock() . $zone;
}

sub interval
{
	my @parts;

	push @parts, integer(20) . ' years' if chance(0.4);
	push @parts, integer(5) . ' mons' if chance(0.4);
	push @parts, integer(20) . ' days' if chance(0.5);
	push @parts, (chance(0.5) ? '-' : '') . clock() if chance(0.6);
	return @parts ? join(' ', @parts) : '0';
}

# ---------------------------------------------------------------------------
# Types
# ---------------------------------------------------------------------------

sub point
{
	return '(' . (chance(0.1) ? one_of('NaN', 'Infinity') : finite()) . ',' . finite() . ')';
}

sub points
{
	return join ',', map { '(' . int(rand(1000)) / 7 . ',' . finite() . ')' } 1 .. $_[0];
}

sub json
{
	my ($depth) = @_;
	my $kind = int(rand($depth > 0 ? 7 : 5));

	return one_of('true', 'false') if $kind == 0;
	return integer(60) if $kind == 1;
	return integer(20) . '.' . digits(5) if $kind == 2;
	return json_string(text(8)) if $kind == 3;
	return $depth == 3 ? '"x"' : 'null' if $kind == 4;
	return '[' . join(', ', map { json($depth - 1) } 1 .. int(rand(4))) . ']' if $kind == 5;
	return '{' . join(', ', map { "\"k$_\": " . json($depth - 1) } 1 .. int(rand(4))) . '}';
}

sub json_string
{
	my ($string) = @_;

	my %short = ("\b" => '\\b', "\f" => '\\f', "\n" => '\\n', "\r" => '\\r', "\t" => '\\t');

	$string =~ s/(["\\])/\\$1/g;
	$string =~ s/([\x00-\x1f])/$short{$1} || sprintf('\\u%04x', ord($1))/ge;
	return qq("$string");
}

sub xml
{
	# without a newline at the start, which xml_out() leaves out
	my $text = 'x' . text(6, 'a', 'b', ' ', 'é', '"', q('), '&lt;', '&amp;', "\n");

	return one_of($text, "<a b=\"1\">$text</a>", "<a/>$text<b>$text</b>", "<!-- c --><a>$text</a>", "<![CDATA[<$text]]>");
}

sub inet
{
	return join('.', map { int(rand(256)) } 1 .. 4) . (chance(0.5) ? '/' . int(rand(33)) : '') if chance(0.5);
	return one_of('::', '::1', '2001:db8::ff00:42:8329', '::ffff:1.2.3.4') . (chance(0.5) ? '/' . int(rand(129)) : '');
}

sub range
{
	my ($make, $order) = @_;
	my @bounds = map { $make->() } 1 .. 2;

	return 'empty' if chance(0.1);
	@bounds = sort { $order->($a, $b) } @bounds;
	foreach my $bound (@bounds)
	{
		$bound = chance(0.15) ? '' : quoted($bound);
	}
	return one_of('[', '(') . join(',', @bounds) . one_of(']', ')');
}

sub quoted
{
	my ($text) = @_;

	$text =~ s/(["\\])/\\$1/g;
	return qq("$text");
}

sub by_number
{
	return $_[0] <=> $_[1];
}

sub by_text
{
	return $_[0] cmp $_[1];
}

# Moments of four-digit years, whose texts are in their order.
sub plain_day
{
	return sprintf('%04d-%02d-%02d', 1000 + int(rand(4000)), 1 + int(rand(12)), 1 + int(rand(28)));
}

sub plain_moment
{
	return plain_day() . ' ' . clock();
}

sub scalar_types
{
	return (
		'bool' => sub { one_of('t', 'f') },
		'int2' => sub { integer(15) },
		'int4' => sub { integer(31) },
		'int8' => sub { integer(52) . one_of('', '', '123') },
		'float4' => sub { float(9, 20) },
		'float8' => sub { float(17, 300) },
		'numeric' => \&numeric,
		'numeric(12,3)' => sub { integer(29) . '.' . digits(3) },
		'money' => sub { integer(45) . '.' . digits(2) },
		'text' => sub { text(20) },
		'varchar(30)' => sub { text(7) },
		'char(5)' => sub { substr(text(3, 'a', 'é', '"', '\\', ' '), 0, 5) },
		'"char"' => sub { one_of('', 'a', '"', '\\', ' ', ',') },
		'name' => \&name,
		'bytea' => sub { '\\x' . hex_bytes(int(rand(20))) },
		'uuid' => sub { hex_bytes(16) },
		'date' => \&day,
		'time' => \&clock,
		'timetz' => sub { clock() . zone() },
		'timestamp' => sub { moment('') },
		'timestamptz' => sub { moment(zone()) },
		'timestamptz(2)' => sub { moment(zone()) },
		'interval' => \&interval,
		# a null would be an SQL NULL
		'json' => sub { one_of(' {"a": 1,"a":2} ', '1e200000', json(3)) =~ s/^null$/1/r },
		'jsonb' => sub { json(3) =~ s/^null$/1/r },
		'jsonpath' => sub { one_of('$', '$.a[*] ? (@ > 1.50)', 'strict $."b c"', '$.a.type()', '$[0 to last]') },
		'xml' => \&xml,
		'oid' => sub { int(rand(2**32)) },
		'xid' => sub { int(rand(2**32)) },
		'cid' => sub { int(rand(2**32)) },
		'xid8' => sub { integer(52) =~ s/-//r },
		'tid' => sub { '(' . int(rand(2**32)) . ',' . int(rand(2**16)) . ')' },
		'pg_lsn' => sub { sprintf('%X/%X', rand(2**32), rand(2**32)) },
		'pg_snapshot' => sub { one_of('10:20:', '10:20:10,14,15') },
		'txid_snapshot' => sub { one_of('10:20:', '10:20:10,14,15') },
		'bit(7)' => sub { bits(7) },
		'varbit' => sub { bits(int(rand(70))) },
		'inet' => \&inet,
		'cidr' => sub { one_of('10.0.0.0/8', '192.168.1.0/24', '::/0', '2001:db8::/32', '1.2.3.4/32') },
		'macaddr' => sub { hex_bytes(6) },
		'macaddr8' => sub { hex_bytes(8) },
		'point' => \&point,
		'line' => sub { sprintf('{%s,%s,%s}', one_of(1, -1, 0.1), finite(), finite()) },
		'lseg' => sub { '[' . points(2) . ']' },
		'box' => sub { points(2) },
		'path' => sub { chance(0.5) ? '[' . points(1 + int(rand(4))) . ']' : '(' . points(1 + int(rand(4))) . ')' },
		'polygon' => sub { '(' . points(1 + int(rand(4))) . ')' },
		'circle' => sub { '<' . points(1) . ',' . int(rand(1000)) / 7 . '>' },
		'tsvector' => sub { join ' ', map { "'" . text(4, 'a' .. 'f', q(''), '\\\\', 'é', ' ') . "x'" . one_of('', ':1', ':2A,3') } 1 .. int(rand(4)) },
		'tsquery' => sub { one_of('', 'a', '!a & (b | c:AB)', 'a <-> b', "'x''y' <3> 'z':*", 'a & !b') },
		'int2vector' => sub { join ' ', map { integer(15) } 1 .. int(rand(4)) },
		'oidvector' => sub { join ' ', map { int(rand(2**32)) } 1 .. int(rand(4)) },
		'refcursor' => sub { text(10) },
		'aclitem' => sub { one_of("$user=r/$user", "=arwd/$user", "$user=r*w*/$user") },
		'regproc' => sub { one_of('now', 'pg_catalog.version', 'fz.only', '-', '4294967290') },
		'regprocedure' => sub { one_of('now()', 'fz.only(pg_catalog.int4,fz.pg_class)', 'pg_catalog.abs(numeric)', 'fz.now()') },
		'regoper' => sub { one_of('||/', 'pg_catalog.|/', 'fz.|+|', '0') },
		'regoperator' => sub { one_of('pg_catalog.+(int4,int4)', 'fz.|+|(int4,int4)', 'pg_catalog.-(none,int8)') },
		'regclass' => sub { one_of('pg_catalog.pg_class', 'fz.pg_class', 'information_schema.tables', 'fz."we""ird\\ é"', 'pg_catalog.pg_proc', '4294967290', '-') },
		'regtype' => sub { one_of('int4', 'int4[]', 'timestamp with time zone', 'fz.pg_class', 'fz.mood', 'fz.mood[]', 'pg_catalog.pg_class', '"char"') },
		'regnamespace' => sub { one_of('fz', 'pg_catalog', '"We ird"') },
		'regrole' => sub { $user },
		'regcollation' => sub { one_of('"C"', 'pg_catalog."POSIX"', 'fz."C"') },
		'regconfig' => sub { one_of('english', 'pg_catalog.simple', 'fz.simple') },
		'regdictionary' => sub { one_of('simple', 'fz.simple') },
		'int4range' => sub { range(sub { integer(31) }, \&by_number) },
		'int8range' => sub { range(sub { integer(52) }, \&by_number) },
		'numrange' => sub { range(sub { integer(30) . '.' . digits(3) }, \&by_number) },
		'daterange' => sub { range(\&plain_day, \&by_text) },
		'tsrange' => sub { range(\&plain_moment, \&by_text) },
		'tstzrange' => sub { range(sub { plain_moment() . '+00' }, \&by_text) },
	);
}

sub add_contrib_types
{
	my %contrib = (
		hstore => { hstore => sub { join ',', map { quoted("k$_" . text(3)) . '=>' . (chance(0.2) ? 'NULL' : quoted(text(6))) } 1 .. int(rand(4)) } },
		citext => { citext => sub { text(15) } },
		ltree => {
			ltree => sub { join '.', map { one_of('a', 'B', 'c_1', 'Top') } 1 .. int(rand(4)) },
			lquery => sub { one_of('a.*.b', 'Top.*{0,2}.x@*%', '!a|b.c') },
			ltxtquery => sub { one_of('a & b', 'a* & !b@') }
		},
		cube => { cube => sub { one_of('(' . finite() . ')', '(' . finite() . ',' . finite() . ')', '(1,2),(' . finite() . ',-0)') } },
		seg => { seg => sub { one_of('1.50', '1.5 .. 2.250', '~3', '<1 .. 2', '1 ..', '.. 1e7') } },
		isn => {
			ean13 => sub { '4006381333931' },
			isbn13 => sub { '978-0-393-04002-9' },
			isbn => sub { '0-393-04002-X' },
			issn => sub { '1436-4522' },
			ismn => sub { 'M-2600-0043-8' }
		},
		intarray => { query_int => sub { one_of('1', '1&(2|!3)', '1|2') } });

	foreach my $extension (sort keys %contrib)
	{
		next unless sql("select count(*) from pg_available_extensions where name = '$extension'");
		sql("create schema if not exists fz; create extension $extension schema fz");
		foreach my $type (keys %{ $contrib{$extension} })
		{
			$types{$type} = $scalar{$type} = $contrib{$extension}->{$type};
		}
	}
	return;
}

# ---------------------------------------------------------------------------
# Types made of others
# ---------------------------------------------------------------------------

sub or_null
{
	my ($make) = @_;

	return chance(0.1) ? undef : $make->();
}

# The text of an array, now and then with bounds of its own.
sub array
{
	my ($make, $delimiter) = @_;
	my @dims = chance(0.1) ? () : map { 1 + int(rand(3)) } 1 .. one_of(1, 1, 1, 2, 3);
	my $bounds = '';

	return '{}' unless @dims;
	if (chance(0.25))
	{
		foreach my $length (@dims)
		{
			my $lower = one_of(1, 0, -3, 7);

			$bounds .= "[$lower:" . ($lower + $length - 1) . ']';
		}
		$bounds .= '=';
	}
	return $bounds . dimension($make, $delimiter, @dims);
}

sub dimension
{
	my ($make, $delimiter, $length, @inner) = @_;
	my @elements;

	foreach (1 .. $length)
	{
		my $value = @inner ? dimension($make, $delimiter, @inner) : or_null($make);

		push @elements, !defined $value ? 'NULL' : @inner ? $value : quoted($value);
	}
	return '{' . join($delimiter, @elements) . '}';
}

sub record
{
	my (@fields) = @_;

	return '(' . join(',', map { my $value = or_null($types{$_}); defined $value ? quoted($value) : '' } @fields) . ')';
}

sub multirange
{
	my ($make) = @_;

	return '{' . join(',', grep { $_ ne 'empty' } map { $make->() } 1 .. int(rand(4))) . '}';
}

# Types are what a column may be declared as; some have no array of their own.
sub add_array
{
	my ($type) = @_;
	my ($element, $delimiter) = ($types{$type}, $delimiter{$type} || ',');

	# what becomes a text within an array keeps its nulls
	$element = sub { one_of('null', $types{$type}->()) } if $type =~ /^jsonb?$/;
	$types{"$type\[]"} = sub { array($element, $delimiter) };
	return;
}

sub make_types
{
	sql(q(
create schema if not exists fz;
create schema "We ird";
create type fz.mood as enum ('sad', 'it''s "great" \o/', 'ünï, {}', ' ');
-- what hides others where search_path has it first
create table fz.pg_class (id int);
create table fz."we""ird\ é" (id int);
create function fz.now() returns timestamptz language sql return pg_catalog.now();
create function fz.only(int, fz.pg_class) returns int language sql return 1;
create operator fz.|+| (leftarg = int, rightarg = int, procedure = int4pl);
create collation fz."C" from "C";
create text search configuration fz.simple (copy = pg_catalog.simple);
create text search dictionary fz.simple (template = simple);
-- types whose output functions are the server's
create type fz.span;
create function fz.span_in(cstring) returns fz.span language internal immutable strict as 'interval_in';
create function fz.span_out(fz.span) returns cstring language internal immutable strict as 'interval_out';
create type fz.span (input = fz.span_in, output = fz.span_out, internallength = 16, alignment = double);
create type fz.named;
create function fz.named_in(cstring) returns fz.named language internal stable strict as 'regclassin';
create function fz.named_out(fz.named) returns cstring language internal stable strict as 'regclassout';
create type fz.named (input = fz.named_in, output = fz.named_out, like = oid);
create type fz.compared as (a int, t timestamptz, i interval, b bytea, m money);
create type fz.float8s as range (subtype = float8);
create type fz.moneys as range (subtype = money);
create type fz.texts as range (subtype = text, collation = "C");
create type fz.compareds as range (subtype = fz.compared);
));
	$types{'mood'} = sub { one_of('sad', q(it's "great" \o/), 'ünï, {}', ' ') };
	$types{'span'} = \&interval;
	$types{'named'} = $scalar{'regclass'};
	$types{'float8s'} = sub { range(\&finite, \&by_number) };
	$types{'moneys'} = sub { range($scalar{'money'}, \&by_number) };
	$types{'texts'} = sub { range(sub { text(5, 'a' .. 'c', '"', '\\', ',') }, \&by_text) };
	$types{'compareds'} = sub {
		range(sub { '(' . int(rand(9)) . ',2024-02-03 04:05:06+00,-1 day -2:00,\\\\x00,$1.50)' }, \&by_text);
	};
	foreach my $subtype (qw(int4 int8 num date ts tstz))
	{
		my $make = $scalar{"${subtype}range"};

		$types{"${subtype}multirange"} = sub { multirange($make) };
	}
	add_array($_) foreach sort keys %types;
	make_composites(3);
	return;
}

# Composites of random types, each of those before among them, and domains and
# arrays of both.
sub make_composites
{
	my ($count) = @_;

	my @choice = sort keys %types;

	foreach my $n (1 .. $count)
	{
		my @fields = map { one_of(@choice) } 1 .. 2 + int(rand(6));
		my ($composite, $domain, $plain) = ("composite$n", "domain$n", "plain$n");
		my $base = one_of(@choice);
		my $i = 0;

		push @fields, 'composite' . ($n - 1), 'composite' . ($n - 1) . '[]' if $n > 1;
		sql("create type $composite as (" . join(', ', map { 'f' . $i++ . " $_" } @fields) . "); create domain $domain as $composite; create domain $plain as $base");
		$types{$composite} = $types{$domain} = sub { record(@fields) };
		$types{$plain} = $types{$base};
		$delimiter{$plain} = $delimiter{box} if $base =~ /^box/;
		add_array($_) foreach ($composite, $domain);
		# an array of domains over json is that of json
		add_array($plain) if $base !~ /^json/;
	}
	return;
}

# ---------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------

# Makes a table with a column of each type, and two with the same columns that
# are captured; returns the types.
sub make_tables
{
	my @of = sort keys %types;
	my $list = join ",\n", map { "c$_ $of[$_]" } 0 .. $#of;
	my @keys = map { [ rand(), $_ ] } 0 .. $#of;

	@keys = map { $_->[1] } sort { $a->[0] <=> $b->[0] } @keys;
	splice @keys, $keys if @keys > $keys;
	sql("create table rows (id int primary key, $list);
		create table a (like rows including all); create table b (like rows including all); create table copy (like rows including all);");
	foreach my $table ('a', 'b')
	{
		sql("select fanout.declare_topic('$table', 'row'); select fanout.capture('$table', '$table');"
			  . "select fanout.declare_topic('$table keys', 'row');"
			  . "select fanout.capture('$table', '$table keys', key => '{"
			  . join(',', map { "c$_" } @keys[ 0 .. ($#keys > 30 ? 30 : $#keys) ])
			  . "}', columns => '{id}');"
			  . join('', map { "select fanout.declare_topic('$table c$_', 'row');
				select fanout.capture('$table', '$table c$_', key => '{c$_}', columns => '{id}');" } @keys));
	}
	sql("select fanout.sync_table('a', 'g', 'copy')");
	make_functions(@of);
	note(scalar(@of) . ' types');
	return @of;
}

sub make_functions
{
	my (@of) = @_;
	my $each = join ",\n", map { "($_, r.c$_\::text, c.c$_\::text)" } 0 .. $#of;

	sql(q(
-- what a consumer does with the messages
create function feed() returns void language plpgsql as $$
declare
    m fanout.message;
begin
    for m in
        select o.message_id, 'a', 'g', o.type, o.key, o.id, o.headers, null, convert_to(o.payload, 'UTF8'), o.created_at, false, 1, 'application/json'
        from fanout.outbox o join fanout.topic using (topic_id) where topic = 'a' order by o.id
    loop
        begin
            perform fanout.sync_messages(array[m]);
        exception when others then
            raise warning 'row %: % %', m.key, sqlstate, sqlerrm;
        end;
    end loop;
end $$;
) . qq(
create function unlike() returns table (id int, n int, was text, became text) language sql
begin atomic
    select r.id, v.* from fz.rows r left join fz.copy c on c.id = r.id, lateral (values $each) v(n, was, became)
    where v.was is distinct from v.became;
end;
create function messages(tab text) returns table (row_id text, topic text, key text, payload text) language sql
begin atomic
    select o.payload::json ->> 'id', substr(t.topic, 2), o.key, o.payload
    from fanout.outbox o join fanout.topic t using (topic_id) where t.topic ~ ('^' || tab || '( |\$)');
end;
));
	return;
}

# ---------------------------------------------------------------------------
# Rounds
# ---------------------------------------------------------------------------

sub literal
{
	my ($text) = @_;

	return 'null' unless defined $text;
	$text =~ s/'/''/g;
	return "'$text'";
}

sub sql
{
	my ($sql, $settings) = @_;

	$settings = 'set search_path = fz, pg_catalog; set client_min_messages = error;' . ($neutral || '') unless defined $settings;
	return Encode::decode('UTF-8', $node->safe_psql('postgres', encode_utf8("$settings\n$sql")));
}

sub locales
{
	return ('C', 'POSIX', @locales);
}

sub random_settings
{
	my %values = (
		datestyle => one_of('ISO', 'SQL', 'German', 'Postgres') . ', ' . one_of('MDY', 'DMY', 'YMD'),
		intervalstyle => one_of('postgres', 'postgres_verbose', 'sql_standard', 'iso_8601'),
		timezone => one_of('UTC', 'Europe/Berlin', 'America/St_Johns', 'Asia/Kathmandu', 'Pacific/Apia', '<+12>-12'),
		extra_float_digits => int(rand(19)) - 15,
		bytea_output => one_of('hex', 'escape'),
		quote_all_identifiers => one_of('on', 'off'),
		array_nulls => one_of('on', 'off'),
		xmloption => one_of('content', 'document'),
		xmlbinary => one_of('base64', 'hex'),
		lc_monetary => one_of(locales()),
		lc_numeric => one_of(locales()),
		search_path => one_of('', 'fz', 'fz, pg_catalog', 'pg_catalog, fz', '"We ird", public', 'pg_catalog', 'pg_catalog, pg_temp'),
		standard_conforming_strings => one_of('on', 'off'),
		default_text_search_config => one_of('pg_catalog.simple', 'pg_catalog.english'),
		enable_hashjoin => one_of('on', 'off'));

	return join '', map { "set $_ = " . ($_ eq 'search_path' && $values{$_} ne '' ? $values{$_} : "'$values{$_}'") . ";\n" } sort keys %values;
}

# Random rows, written twice and read once.
sub round
{
	my ($round) = @_;
	my ($first, $second, $reader) = map { random_settings() } 1 .. 3;

	sql('truncate rows, copy, a, b; delete from fanout.outbox; delete from fanout.sync_row');
	fill();
	sql('insert into fz.a select * from fz.rows order by id', $first);
	sql('insert into fz.b select * from fz.rows order by id', $second);
	is(sql(q(select count(*), count(payload::json) from messages('a'))),
		sql(q(select count(*), count(payload::json) from messages('b'))), "round $round: messages of both tables");
	my $settings = "# seed $seed; settings:\n$first# and\n$second";
	my $unlike = differences();
	is($unlike, '', 'the same bytes from both sessions') or diag($settings);

	my ($status, $stdout, $stderr) = $node->psql('postgres', encode_utf8("$reader set client_min_messages = warning; select fz.feed()"));
	is($stderr, '', 'the messages can be applied') or diag("# seed $seed");
	$unlike = join "\n", map { where_unlike(@{ JSON::XS->new->decode($_) }) }
	  split /\n/, sql('select json_build_array(id, n, was, became) from unlike() order by n, id limit 10');
	is($unlike, '', 'every value is read back equal') or diag("# seed $seed; settings:\n$reader");
	return;
}

# Money in body and key, of whatever type it is part of, under each locale.
sub write_money
{
	sql(q(
create type paid;
create function paid_in(cstring) returns paid language internal stable strict as 'cash_in';
create function paid_out(paid) returns cstring language internal stable strict as 'cash_out';
create type paid (input = paid_in, output = paid_out, like = money);
create table prices (m money, r moneys, p paid, c compared, x int);
select fanout.declare_topic(t, 'row') from unnest('{prices,"prices m","prices r","prices p","prices c"}'::text[]) t;
select fanout.capture('prices', 'prices', '{update}', key => '{m,r,p,c}');
select fanout.capture('prices', 'prices ' || k, '{update}', key => array[k], columns => '{m}') from unnest('{m,r,p,c}'::text[]) k;
insert into prices values (1234.5, '[1.50,2000]', '-1234.50', '(1,,,,-0.05)', 0);));
	foreach my $locale (locales())
	{
		my $own = sql("update fz.prices set x = 0; select '1234.5'::numeric::money", "set lc_monetary = '$locale';");

		isnt($own, '$1,234.50', "a session writes money as in $locale") if $locale =~ /UTF/;
	}
	is( sql(q(select string_agg(distinct concat_ws(' ', topic, key, payload), E'\n' order by concat_ws(' ', topic, key, payload))
		from fanout.outbox join fanout.topic using (topic_id) where topic ~ '^prices')),
		join("\n",
			'prices ["$1,234.50","[$1.50,\"$2,000.00\"]","-$1,234.50",{"a":1,"t":null,"i":null,"b":null,"m":"-$0.05"}]'
			  . ' {"m":"$1,234.50","r":"[$1.50,\"$2,000.00\"]","p":"-$1,234.50","c":{"a":1,"t":null,"i":null,"b":null,"m":"-$0.05"},"x":0}',
			'prices c {"a":1,"t":null,"i":null,"b":null,"m":"-$0.05"} {"m":"$1,234.50"}',
			'prices m $1,234.50 {"m":"$1,234.50"}',
			'prices p -$1,234.50 {"m":"$1,234.50"}',
			'prices r [$1.50,"$2,000.00"] {"m":"$1,234.50"}'),
		'money is the same in body and key under every locale');
	return;
}

# Where two long texts begin to differ.
sub where_unlike
{
	my ($row, $n, $was, $became) = @_;
	my $at = 0;

	return "row $row, $columns[$n]: one is null" unless defined $was && defined $became;
	$at++ while substr($was, $at, 1) eq substr($became, $at, 1);
	$at = $at > 30 ? $at - 30 : 0;
	return "row $row, $columns[$n]: " . substr($was, $at, 80) . ' became ' . substr($became, $at, 80);
}

sub fill
{
	my @values;

	foreach my $row (1 .. $rows)
	{
		push @values, "($row, " . join(', ', map { literal(or_null($types{$_})) } @columns) . ')';
	}
	sql('insert into rows values ' . join(",\n", @values));
	return;
}

sub differences
{
	my $found = sql(q(
select topic, row_id, x.key, x.a, x.b
from messages('a') a full join messages('b') b using (row_id, topic),
     lateral (select 'key' as key, a.key as a, b.key as b where a.key is distinct from b.key
              union all
              select ea.key, ea.value::text, eb.value::text from json_each(a.payload::json) ea full join json_each(b.payload::json) eb using (key)
              where ea.value::text is distinct from eb.value::text
              union all
              select 'payload', a.payload, b.payload where a.payload is distinct from b.payload and a.payload is null or b.payload is null) x
limit 10));

	$found =~ s/\bc(\d+)\b/"c$1 ($columns[$1])"/ge;
	return $found;
}
