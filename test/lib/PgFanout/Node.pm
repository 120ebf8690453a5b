
=pod

=head1 NAME

PgFanout::Node - a PostgreSQL node whose queries cost little

=head1 SYNOPSIS

  my $node = PgFanout::Node->new('standby');        # PgFanout::cluster() makes them, too

=head1 DESCRIPTION

A L<PostgreSQL::Test::Cluster> with the same methods.  A test has hundreds of queries and
more polls, and to start a psql takes three times what a new session takes the server.  So
psql(), and with it safe_psql(), asks a single statement through libpq, in a session of its
own as psql's would be, and returns what psql would: rows as lines, columns between "|",
messages in the form of psql's.  Whatever else psql is given, psql gets.  A poll keeps its
session until it ends.

=cut

package PgFanout::Node;

use strict;
use warnings;

use DBI ();
use PostgreSQL::Test::Cluster;
# its functions would be taken for methods
use PostgreSQL::Test::Utils ();
use Test::More ();

our @ISA = ('PostgreSQL::Test::Cluster');

# What psql does not read: more than one statement, its commands, COPY's lines.
my $plain_statement = qr/\A (?! \s* copy \b) (?= .* \S) [^;\\]* ;? \s* \z/xsi;

# The parameters of psql() that are understood here, and what they may be.
my %understood = (
	stdout => sub { 1 },
	stderr => sub { 1 },
	on_error_die => sub { 1 },
	on_error_stop => sub { $_[0] },
	extra_params => sub { @{ $_[0] } == 2 && $_[0]->[0] eq '-U' });

sub is_plain
{
	my ($dbname, $sql, %params) = @_;

	return
	     defined $sql
	  && $dbname =~ /\A\w+\z/
	  && $sql =~ $plain_statement
	  && $sql !~ /[^\x01-\x7f]/
	  && !grep { !$understood{$_} || !$understood{$_}->($params{$_}) } keys %params;
}

# A new session, or undef with the reason in $@.
sub connect_plainly
{
	my ($self, $dbname, $user) = @_;

	return eval {
		# PGOPTIONS and so on are those of psql
		local %ENV = $self->_get_env();

		DBI->connect(
			'dbi:Pg:' . join(';', "port=$ENV{PGPORT}", "host=$ENV{PGHOST}", "dbname=$dbname"),
			$user || '', '',
			{
				RaiseError => 1,
				PrintError => 0,
				PrintWarn => 1,
				AutoInactiveDestroy => 1,
				pg_enable_utf8 => 0,
				pg_expand_array => 0,
				pg_bool_tf => 1
			});
	};
}

# The answer to a statement, as psql -XAt prints it, and notices; dies of an error.
sub answer
{
	my ($session, $sql) = @_;
	my $notices = '';
	local $SIG{__WARN__} = sub { $notices .= in_form_of_psql($sql, $_[0]); };
	my $statement = $session->prepare($sql, { pg_direct => 1 });

	$statement->execute;
	return ('', $notices) unless $statement->{NUM_OF_FIELDS};

	my @binary = map { $_ eq 'bytea' } @{ $statement->{pg_type} };
	my @lines;
	while (my $row = $statement->fetchrow_arrayref)
	{
		push @lines, join('|', map { text_of($row->[$_], $binary[$_]) } 0 .. $#$row);
	}
	return (join("\n", @lines), $notices);
}

sub text_of
{
	my ($value, $is_binary) = @_;

	return '' unless defined $value;
	return $is_binary ? '\x' . unpack('H*', $value) : $value;
}

# "ERROR:  message" and the lines below it, with what psql puts in front.
sub in_form_of_psql
{
	my ($sql, $message) = @_;
	my $line = 1 + ($sql =~ tr/\n//);

	$message =~ s/ at \S+ line \d+\.?\n\z//;
	return "psql:<stdin>:$line: $message" . ($message =~ /\n\z/ ? '' : "\n");
}

=pod

=head1 METHODS

=over

=item $node->psql(dbname, sql, parameters)

See L<PostgreSQL::Test::Cluster>.

=cut

sub psql
{
	my ($self, $dbname, $sql, %params) = @_;

	return $self->SUPER::psql($dbname, $sql, %params) unless is_plain($dbname, $sql, %params);

	my $session = $self->connect_plainly($dbname, $params{extra_params} && $params{extra_params}->[1]);
	my ($status, $stdout, $stderr) = (0, '', '');

	if (!$session)
	{
		($status, $stderr) = (2, 'psql: error: ' . (DBI->errstr || $@));
	}
	elsif (!eval { ($stdout, $stderr) = answer($session, $sql); 1 })
	{
		$stderr = in_form_of_psql($sql, $session->errstr || $@);
		# a session that is lost is told apart from a statement that failed
		$status = $session->ping ? 3 : 2;
	}
	$session->disconnect if $session;
	chomp $stderr;
	${ $params{stdout} } = $stdout if $params{stdout};
	${ $params{stderr} } = $stderr if $params{stderr};
	die(($status == 2 ? 'connection error' : 'error running SQL') . ": '$stderr'\nin $dbname with sql '$sql'")
	  if $status && $params{on_error_die};
	return wantarray ? ($status, $stdout, $stderr) : $status;
}

=pod

=item $node->poll_query_until(dbname, query, expected)

See L<PostgreSQL::Test::Cluster>.  The query runs in one session until it has the answer, or
the session is lost, and in no transaction but its own.

=cut

sub poll_query_until
{
	my ($self, $dbname, $query, $expected) = @_;

	return $self->SUPER::poll_query_until($dbname, $query, $expected) unless is_plain($dbname, $query);
	$expected = 't' unless defined $expected;

	my ($session, $stdout, $stderr);
	my $reached = eval {
		PgFanout::poll(
			sub {
				$session ||= $self->connect_plainly($dbname);
				($stdout, $stderr) = ('', $@);
				return 0 unless $session;
				eval { ($stdout, $stderr) = answer($session, $query); 1 } or $stderr = $@;
				return 1 if $stdout eq $expected && $stderr eq '';
				$session = undef unless $session->ping;
				return 0;
			},
			$query);
		1;
	};
	my $error = $@;

	$session->disconnect if $session;
	Test::More::diag("$error\nexpecting this output:\n$expected\nlast actual query output:\n$stdout\nwith stderr:\n$stderr")
	  unless $reached;
	return $reached || 0;
}

=pod

=item $node->init(parameters)

See L<PostgreSQL::Test::Cluster>.  The data directory of a test's first node is a copy of one
that initdb has made for all tests.  Others are made anew, since pg_fanout takes servers with
one system identifier to be one.

=back

=cut

my $is_copied;

sub init
{
	my ($self, %params) = @_;

	return $self->SUPER::init(%params) if $is_copied++;

	my $run = \&PostgreSQL::Test::Utils::system_or_bail;
	no warnings 'redefine';
	local *PostgreSQL::Test::Utils::system_or_bail = sub {
		return $run->(@_) unless $_[0] eq 'initdb';
		return copy_template($self->data_dir, @_);
	};
	return $self->SUPER::init(%params);
}

# Does what initdb with these arguments would do, by a copy of what it has done before.
sub copy_template
{
	my ($data_dir, @initdb) = @_;
	my $name = join('_', map { s/\W//gr } grep { $_ ne $data_dir } @initdb);
	my $template = "$PostgreSQL::Test::Utils::tmp_check/$name";

	open my $lock, '>>', "$template.lock" or die "could not open $template.lock: $!";
	flock($lock, 2) or die "could not lock $template.lock: $!";
	if (!-d $template)
	{
		PgFanout::run_command_ok(map { $_ eq $data_dir ? "$template.new" : $_ } @initdb);
		rename("$template.new", $template) or die "could not rename $template.new: $!";
	}
	close $lock;
	PgFanout::run_command_ok('cp', '-RPp', $template, $data_dir);
	return;
}

1;
