# What fanout.grant_topic() gave follows its role, and nobody else: a role that is
# renamed keeps it, one that is dropped loses it for good, and a dump has it by name,
# so that it is restored where a role is missing, and is there once that role comes.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PgFanout::cluster('main', undef, conf => q(
wal_level = logical
pg_fanout.max_databases = 10
max_worker_processes = 20
pg_fanout.inbox_retention = 4s
));
my $dir = PostgreSQL::Test::Utils::tempdir();
my $odd = q("it's ""odd"" \\ é");
my @roles = ('keeper', 'before', 'goes', 'missing', '"123"', '"-"', '"Keeper"', '"with blank"', $odd);

sql('postgres', 'create database original');
sql('original', q(create extension pg_fanout; select fanout.declare_topic('t'); select fanout.declare_topic('other')));
make_role('original', $_) foreach @roles;
sql('original', "select fanout.grant_topic('t', " . literal($_) . ", '{publish}')") foreach @roles, @roles;
is(sql('original', 'select count(*) from fanout.topic_grant'), scalar(@roles), 'a grant that is there is not made twice');

# In the same database

may('original', $_, 1) foreach @roles;
sql('original', 'alter role before rename to after');
make_role('original', 'before');
may('original', 'after', 1, 'a role that was renamed keeps its grants');
may('original', 'before', 0, 'a new role that has the former name of one gets none of its grants');
sql('original', q(drop owned by goes; drop role goes));
make_role('original', 'goes');
may('original', 'goes', 0, 'a new role that has the name of one that was dropped gets none of its grants');
like(sql('original', 'select fanout.declarations()'), qr/grant_topic\('t', 'after'/, 'declarations() prints the name that a role has now');
unlike(sql('original', 'select fanout.declarations()'), qr/grant_topic\('t', '(before|goes)'/, 'and nothing of a role that was dropped');
is(error('original', q(select fanout.grant_topic('t', 4000000000::oid::regrole))), 'ERROR:  role with OID 4000000000 does not exist', 'nothing is granted to a role that does not exist');

# Dumps, with a role that was renamed, and one that was dropped, which the publisher notes

$node->poll_query_until('original', q(select count(*) filter (where role = 'after') = 1 and count(*) filter (where role in ('before', 'goes')) = 0
	from fanout.topic_grant)) or die 'the names are old';

dump_to('plain.sql');
dump_to('inserts.sql', '--inserts');
dump_to('custom', '-Fc');
sql('postgres', $_) foreach 'drop owned by missing', 'alter role missing rename to elsewhere';
sql('original', $_) foreach 'drop owned by elsewhere', 'drop role elsewhere';

foreach my $kind ('plain', 'inserts', 'custom')
{
	my $error = restore($kind);

	unlike($error, qr/topic_grant|COPY|INSERT/, "$kind: all grants are restored where a role is missing");
	is(sql($kind, 'select count(*) from fanout.topic_grant'), scalar(@roles) - 1, "$kind: but for that of a role that was dropped");
	may($kind, $_, 1, "$kind: role $_ has its grant") foreach grep { !/^(before|goes|missing)$/ } @roles, 'after';
	may($kind, $_, 0, "$kind: role $_ has none") foreach 'before', 'goes';
	unlike(sql($kind, 'select fanout.declarations()'), qr/'missing'/, "$kind: declarations() leaves out a role that is missing");
}

# The role comes, in one of the copies

make_role('plain', 'missing');
may('plain', 'missing', 1, 'a role that was missing has its grant once it is there');
like(sql('plain', 'select fanout.declarations()'), qr/grant_topic\('t', 'missing'/, 'and declarations() prints it');
sql('plain', q(select fanout.revoke_topic('t', 'missing', '{publish}')));
may('plain', 'missing', 0, 'and it can be revoked');

# A dump of the copy, in which a role is only a name

sql('inserts', q(select fanout.grant_topic('other', 'keeper')));
dump_to('again.sql', '-d', $node->connstr('inserts'));
restore('again');
is(sql('again', qq(select string_agg(quote_ident(role::text), ' ' order by role::text collate "C") from fanout.topic_grant where topic = 't')),
	sql('inserts', qq(select string_agg(quote_ident(role::text), ' ' order by role::text collate "C") from fanout.topic_grant where topic = 't')),
	'a dump of a restored database has the same grants');

# The table is published with all others

sql('original', 'create publication everything for all tables');
sql('original', q(select fanout.revoke_topic('t', 'keeper', '{publish}'); select fanout.grant_topic('t', 'before', '{publish}')));
may('original', 'keeper', 0, 'with a publication of all tables, grants can be revoked');
may('original', 'before', 1, 'and given');

$node->stop('fast');
done_testing();

sub sql { return $node->safe_psql($_[0], $_[1]); }

sub error
{
	my ($database, $sql) = @_;
	my ($stdout, $stderr) = ('', '');

	$node->psql($database, $sql, stdout => \$stdout, stderr => \$stderr);
	$stderr =~ s/^psql:<stdin>:\d+: //;
	$stderr =~ s/\n.*//s;
	return $stderr;
}

sub literal
{
	my ($text) = @_;

	$text =~ s/'/''/g;
	return "E'" . ($text =~ s/\\/\\\\/gr) . "'";
}

# A role that may call publish(), in that database.
sub make_role
{
	my ($database, $role) = @_;

	sql($database, "create role $role; grant usage on schema fanout to $role; grant execute on function fanout.publish to $role");
	return;
}

# May the role publish to the topic?
sub may
{
	my ($database, $role, $may, $what) = @_;

	sql($database, "grant usage on schema fanout to $role; grant execute on function fanout.publish to $role");
	my $error = error($database, "set role $role; select fanout.publish('t', '1')");
	is($error, $may ? '' : 'ERROR:  permission denied for topic "t"', $what || "$role may publish");
	return;
}

sub dump_to
{
	my ($file, @options) = @_;

	push @options, '-d', $node->connstr('original') unless grep { $_ eq '-d' } @options;
	$node->command_ok([ 'pg_dump', '-f', "$dir/$file", @options ], "pg_dump: $file");
	return;
}

# Rights of the missing role fail, which is the server's; returns what was said.
sub restore
{
	my ($database) = @_;
	my $error = '';

	sql('postgres', "create database $database");
	IPC::Run::run(
		$database eq 'custom' ? [ 'pg_restore', '-d', $node->connstr($database), "$dir/custom" ] :
		  [ 'psql', '-Xq', '-d', $node->connstr($database), '-f', "$dir/$database.sql" ], '<', \undef, '>', \my $out, '2>', \$error);
	return $error;
}
