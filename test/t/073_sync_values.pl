# Values of every type of the server and of its extensions come to the copy as they
# are, through the broker: alone, in arrays with all sorts of bounds, in composite
# values and in domains, whatever the settings of who writes them.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

# Types that take no values from anybody.
my %without_input = map { $_ => 1 } qw(
  pg_node_tree pg_ndistinct pg_dependencies pg_mcv_list pg_brin_bloom_summary pg_brin_minmax_multi_summary gtsvector ghstore ltree_gist gtrgm
  intbig_gkey);

my $digits = '7' x 400;
my %values = (
	bool => [qw(t f)],
	bytea => [ '\x', '\x00ff5c27', '\x' . '00ff' x 5000 ],
	char => [ 'a', '', "\\001" ],
	name => [ 'n', '', 'x' x 63 ],
	int8 => [qw(9223372036854775807 -9223372036854775808 9007199254740993 0)],
	int2 => [qw(32767 -32768)],
	int2vector => [ '1 2 3', '' ],
	int4 => [qw(2147483647 -2147483648)],
	regproc => [qw(pg_catalog.now)],
	text => [ 'it', '', " \t\n\r\b\f\"\\/{}[],'ü€\x{1F600}", 'null', '{"a": 1}', 'x' x 100000 ],
	oid => [qw(0 4294967295)],
	tid => ['(4294967295,65535)'],
	xid => [qw(3 4294967295)],
	xid8 => [qw(18446744073709551615)],
	cid => [qw(1)],
	oidvector => [ '4294967295 1', '' ],
	json => [ '{"b":1, "a":1.0,  "a":2}', '1.10e3', '"\u0000"', '"\ud800"', '[null, {"x" : [] }]', '1e200000', '"a\"\\\\b"', ' 7 ', '{"u": "\u00fc"}' ],
	jsonb => [ '{"b": 1, "a": [null, "x\"\\\\"]}', '"s"', '1.10', '[]', '{}', 'true', $digits ],
	jsonpath => ['$."a"[*]?(@ > 1.5)'],
	xml => [ '<a b="c">d</a>', 'text', '' ],
	point => [ '(1,2)', '(0.1,1e300)', '(NaN,Infinity)', '(-0,0.30000000000000004)' ],
	lseg => ['[(1,2),(3,0.30000000000000004)]'],
	path => [ '((1,2),(3,4))', '[(1,2),(3,4)]' ],
	box => ['(3,4),(1,2)'],
	polygon => ['((1,2),(3,4),(0.1,6))'],
	line => ['{1,2,0.30000000000000004}'],
	circle => ['<(1,2),0.30000000000000004>'],
	float4 => [qw(0.1 1e38 -1e-37 NaN Infinity -Infinity -0)],
	float8 => [qw(0.30000000000000004 1e308 4.9e-324 NaN -Infinity -0 123456789012345680)],
	money => [qw(-92233720368547758.08 92233720368547758.07 1234.56 0)],
	macaddr => ['08:00:2b:01:02:03'],
	inet => [qw(192.168.1.5/24 ::1 10.0.0.1)],
	cidr => [qw(192.168.1.0/24 ::/0)],
	macaddr8 => ['08:00:2b:01:02:03:04:05'],
	aclitem => ['postgres=r/postgres'],
	bpchar => [ 'ab ', '' ],
	varchar => [ 'ab ', '' ],
	date => [qw(2024-02-29 infinity -infinity), '0044-03-15 BC', '5874897-12-31' ],
	time => [qw(24:00:00 00:00:00.000001)],
	timestamp => [ '2024-02-29 12:34:56.789', 'infinity', '-infinity', '4713-01-01 00:00:00 BC', '294276-12-31 23:59:59.999999' ],
	timestamptz => [ '2024-02-29 12:34:56.789+05:30', 'infinity', '-infinity', '0044-03-15 01:02:03 BC' ],
	interval => [ '1 year -2 mons +3 days -04:05:06.7', '-1 day -2:00', '0', '178000000 years' ],
	timetz => [ '12:34:56.789+05:30', '24:00:00-15:59' ],
	bit => [ '1', '0' ],
	varbit => [ '', '1011' ],
	numeric => [ '1.50', '0.00', 'NaN', 'Infinity', '-Infinity', '-' . $digits . '.' . $digits, '9' x 131072, '1e-16383' ],
	refcursor => ['c'],
	regprocedure => ['pg_catalog.abs(integer)'],
	regoper => ['pg_catalog.|/'],
	regoperator => ['pg_catalog.=(integer,integer)'],
	regclass => [qw(pg_catalog.pg_class here.pg_class)],
	regcollation => ['pg_catalog."C"'],
	regtype => [qw(integer here.mood)],
	regrole => ['postgres'],
	regnamespace => [qw(pg_catalog here)],
	uuid => ['a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'],
	pg_lsn => ['FFFFFFFF/FFFFFFFF'],
	tsvector => [ q('a':1A,2 'it''s':3), '' ],
	tsquery => [ q('a' & !'b' <-> 'it''s':*A), '' ],
	regconfig => ['pg_catalog.english'],
	regdictionary => ['pg_catalog.simple'],
	txid_snapshot => ['10:20:10,14,15'],
	pg_snapshot => ['10:20:10,14,15'],
	int4range => [ '[1,5)', 'empty', '(,)', '[1,)' ],
	numrange => [ '[0.10,1e10]', '(,0)' ],
	tsrange => ['["2024-01-01 00:00:00.5",infinity]'],
	tstzrange => ['("2024-01-01 00:00:00+05:30",)'],
	daterange => [ '[2024-05-01,2024-12-01)', '[-infinity,infinity]' ],
	int8range => ['[9007199254740993,)'],
	int4multirange => [ '{}', '{[1,2),[5,)}' ],
	nummultirange => ['{[0.10,1)}'],
	tsmultirange => ['{[2024-01-01,2024-02-01)}'],
	tstzmultirange => ['{["2024-01-01 00:00+00",)}'],
	datemultirange => ['{[2024-01-01,2024-02-01),[2025-01-01,)}'],
	int8multirange => ['{[1,9223372036854775807)}'],
	# of extensions, and our own
	hstore => [ 'a=>1, b=>NULL, "c \"d"=>"e\\\\f"', '' ],
	citext => [ 'Ann', 'ANN' ],
	ltree => [ 'a.b.c', '' ],
	lquery => ['a.*{1,2}.!b'],
	ltxtquery => ['a & !b*'],
	cube => ['(1,0.30000000000000004),(3,4)'],
	seg => [ '1.50 .. 2.0', '<3' ],
	query_int => ['1&(2|!3)'],
	ean13 => ['978-0-306-40615-7'],
	isbn13 => ['978-0-306-40615-7'],
	ismn13 => ['979-0-060-11561-5'],
	issn13 => ['977-0-31-782500-9'],
	isbn => ['0-306-40615-2'],
	ismn => ['M-060-11561-5'],
	issn => ['0317-8471'],
	upc => ['220356483481'],
	earth => ['(6378168,0,0)'],
	'here.mood' => [ 'sad', q(it's "great" \o/) ],
	'here.floats' => [ '[0.1,0.30000000000000004)', 'empty' ],
);

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 60
pg_fanout.max_subscriptions = 40
));

# JSON has characters that SQL_ASCII does not know
$node->safe_psql('postgres', q(create database utf8 encoding utf8 locale 'C' template template0));
sql('create extension pg_fanout');
sql(q(
create schema here;
create table here.pg_class (id int);
create type here.mood as enum ('sad', 'it''s "great" \o/');
create type here.floats as range (subtype = float8);
create extension cube;
create extension earthdistance;
) . join(' ', map { "create extension $_;" } qw(hstore citext ltree seg intarray isn)));

my @types = split /\n/, sql(q(
select case when n.nspname = 'here' then 'here.' else '' end || t.typname from pg_type t join pg_namespace n on n.oid = t.typnamespace
where n.nspname in ('pg_catalog', 'public', 'here') and t.typtype in ('b', 'r', 'm', 'e')
  and not (t.typname like '\_%' and t.typelem <> 0) and not t.typname like 'pg\_toast%' and t.typname <> 'floats_multirange' and t.typname <> 'floatmultirange'
order by 1));
my @unknown = grep { !$values{$_} && !$without_input{$_} } @types;
is("@unknown", '', 'every type of the server and its extensions is tried');
my @known = grep { $values{$_} } sort @types;
cmp_ok(scalar @known, '>', 75, scalar(@known) . ' types');

# One table for each type: its values alone, and in whatever can hold them

my (%tables, @create);
foreach my $type (@known)
{
	my $table = $type =~ s/\W/_/gr;
	my $quoted = $type eq 'char' ? '"char"' : $type;
	my $element = $type eq 'bit' ? 'bit(1)' : $quoted;

	$tables{$table} = $type;
	push @create, qq(
create domain here.d_$table as $quoted;
create type here.c_$table as (v $quoted, a $quoted\[], d here.d_$table);
create table here.t_$table (id int primary key, v $quoted, d here.d_$table, a $quoted\[], da here.d_$table\[], c here.c_$table, ca here.c_$table\[]);
create table here.copy_$table (like here.t_$table including all);
);
}
sql(join '', @create);

my $settings = q(
set datestyle = 'sql, dmy'; set intervalstyle = 'sql_standard'; set timezone = 'America/St_Johns'; set extra_float_digits = -15;
set bytea_output = 'escape'; set quote_all_identifiers = on; set search_path = here, pg_catalog, public;
);
my @names = sort keys %tables;
foreach my $table (@names)
{
	my $type = $tables{$table};
	my $quoted = $type eq 'char' ? '"char"' : $type;
	my @rows;
	my @list = map { "(" . literal($_) . ")::$quoted" } @{ $values{$type} };
	my $id = 0;

	foreach my $value (@list, "null::$quoted")
	{
		my $array = "array[$value, null, $value]::$quoted\[]";

		push @rows, "(" . join(', ', ++$id, $value, $value, $array, 'null', "row($value, $array, $value)::here.c_$table", "array[row($value, $array, $value), null, row(null, null, null)]::here.c_$table\[]") . ")";
	}
	push @rows, "(" . ++$id . ", null, null, '{}', null, null, '{}')";
	push @rows, "(" . ++$id . ", null, null, ('[0:1][-1:0]=' || array[array[$list[0], null], array[null, $list[-1]]]::text)::$quoted\[], array[$list[0], null]::here.d_$table\[], null, null)";
	# what the table holds now is what has to arrive
	sql("insert into here.t_$table values " . join(",\n", @rows));
}
pass('values were made');

# One subscription after the other: the messages are made by a session with other settings

my @different;
sql(join '', map { qq(
select fanout.declare_binding('v_$_', 'g');
select fanout.capture('here.t_$_', 'v_$_');
) } @names);
while (my @some = splice @names, 0, 8)
{
	sql(join '', map { "select fanout.sync_table('v_$_', 'g', 'here.copy_$_', max_attempts => 1);\n" } @some);
	sql($settings . join '', map { "update here.t_$_ set id = id;\n" } @some);
	sql('select fanout.flush()');
	foreach my $table (@some)
	{
		my $compare = qq(
select string_agg(id || case when src::text is distinct from dst::text then ' text' else ' bytes' end, ', ' order by id)
from here.t_$table src full join here.copy_$table dst using (id)
where src::text is distinct from dst::text or record_image_eq(src, dst) is not true);

		PgFanout::poll(
			sub {
				sql("select (select count(*) from here.t_$table) = (select count(*) from here.copy_$table) + (select count(*) from fanout.dead_letter where topic = 'v_$table')") eq 't'
				  && sql("select delivered = applied + dead from fanout.stat_subscriptions where topic = 'v_$table'") eq 't';
			},
			"the values of $table");
		my $wrong = sql($compare);
		push @different, "$tables{$table}: $wrong " . sql("select string_agg(key || ': ' || left(reason, 200), E'\n') from fanout.dead_letter where topic = 'v_$table'") if $wrong ne '';
	}
	sql(join '', map { "select fanout.unsubscribe('v_$_', 'g');\n" } @some);
}
is(join("\n", @different), '', 'every value of every type is the same at the copy, in text and in bytes');

# What README lists as an exception

sql(q(
create table exceptions (id int primary key, j json, jb jsonb);
create table exceptions_copy (like exceptions including all);
select fanout.declare_binding('exceptions', 'g');
select fanout.capture('exceptions', 'exceptions');
select fanout.sync_table('exceptions', 'g', 'exceptions_copy');
insert into exceptions values (1, 'null', 'null');
));
PgFanout::poll(sub { sql('select count(*) from exceptions_copy') == 1 }, 'the exception');
is(sql('select j is null and jb is null from exceptions_copy'), 't', 'a JSON null in a column of json becomes an SQL NULL');

# A body that is no jsonb, for a table that does not have the column

sql(q(
create table narrow_copy (id int primary key);
create table narrow (id int primary key, j json);
select fanout.declare_binding('narrow', 'g');
select fanout.capture('narrow', 'narrow');
select fanout.sync_table('narrow', 'g', 'narrow_copy');
insert into narrow values (1, '"\u0000"');
));
PgFanout::poll(sub { sql('select count(*) from narrow_copy') == 1 }, 'the row');
pass('a column that the copy does not have may have any JSON');

done_testing();

sub sql
{
	my ($sql) = @_;

	utf8::encode($sql) if utf8::is_utf8($sql);
	return $node->safe_psql('utf8', $sql);
}

sub literal
{
	my ($value) = @_;

	$value =~ s/'/''/g;
	$value =~ s/\\/\\\\/g;
	return "E'$value'";
}
