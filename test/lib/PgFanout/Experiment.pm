
=pod

=head1 NAME

PgFanout::Experiment - counted messages, and a verdict

=head1 SYNOPSIS

  my $broker = PgFanout::broker(private => 1);
  my $node = PgFanout::cluster('main', $broker);
  my $experiment = PgFanout::Experiment->new(
	node => $node, broker => $broker, file => __FILE__);

  $experiment->run('broker killed and started', sub {
	$broker->kill;
	sleep 1;
	$broker->start;
  });
  $experiment->run('publisher killed', sub { ... }, repeats => 1);

=head1 DESCRIPTION

Several clients write to captured tables; each transaction records in a ledger
table which changes it made.  Some transactions are rolled back, some roll back
to a savepoint, some change one row several times.  An independent AMQP client
(test/lib/collector) writes down what arrives in the queues.  test/lib/verdict
compares the two.

B<run> does something to the system under that load and then wants to see:
nothing missing, nothing invented, nothing out of order, no message under
another message id, and nothing repeated, unless the caller says what explains
repeats.  Each adds a line to tmp_check/experiments; test/check shows them.

=cut

package PgFanout::Experiment;

use strict;
use warnings;

use File::Basename qw(basename);
use File::Copy ();
use IPC::Run ();
use JSON::XS ();
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

our @running;

=pod

=head1 METHODS

=over

=item PgFanout::Experiment->new(node, broker, file, ...)

Makes tables, topics and bindings, and starts the collector.  Parameters:

  node        where the load writes
  broker      what the collector reads from
  proxy       between publisher and broker, for faults that need one
  uris        its URIs instead, for a cluster: reference to an array
  file        of the test, for the table
  dbname      default postgres
  topics      how many, default 2
  groups      consumer groups of each topic, default ['a']
  queue_type  default quorum
  arguments   of the queues, JSON
  keys        rows of each topic's table, default 50
  clients     default 4
  rate        transactions a second, default 300
  pad         bytes added to each row, default 20
  init        SQL to run first in each session of the load: SET ...

=cut

sub new
{
	my ($class, %params) = @_;
	my $self = bless {
		dbname => 'postgres',
		topics => 2,
		groups => ['a'],
		queue_type => 'quorum',
		arguments => '{}',
		keys => 50,
		clients => 4,
		rate => 300,
		pad => 20,
		init => '',
		%params }, $class;

	$self->{dir} = PostgreSQL::Test::Utils::tempdir('experiment');
	$self->{uris} ||= [ $self->{broker}->uri ];
	$self->{queues} = [
		map {
			my $topic = $_;
			map { "load_${topic}_$_" } @{ $self->{groups} }
		} 1 .. $self->{topics} ];
	push @running, $self;
	$self->make_tables;
	PgFanout::flush($self->{node}, dbname => $self->{dbname});
	$self->start_collector;
	return $self;
}

sub sql
{
	my ($self, $sql) = @_;

	return $self->{node}->safe_psql($self->{dbname}, $sql);
}

sub make_tables
{
	my ($self) = @_;

	$self->sql(
		q(
create table ledger (n bigserial, topic int, key text, op text, token uuid);
create sequence item_id start 1000000;));
	foreach my $topic (1 .. $self->{topics})
	{
		$self->sql("select fanout.declare_topic('load_$topic')");
		$self->sql(
			"select fanout.declare_binding('load_$topic', '$_', '$self->{queue_type}', '$self->{arguments}')"
		) foreach @{ $self->{groups} };
		$self->sql(
			qq(
create table item_$topic (id bigint primary key, token uuid not null default gen_random_uuid(), pad text);
select fanout.capture('item_$topic', 'load_$topic');
with c as (
	insert into item_$topic (id, pad) select i, repeat('x', $self->{pad}) from generate_series(1, $self->{keys}) i
	returning id, token)
insert into ledger (topic, key, op, token) select $topic, id, 'c', token from c));
	}
	PostgreSQL::Test::Utils::append_to_file($self->script, $self->load_script);
	return;
}

sub script { return "$_[0]->{dir}/load.sql"; }
sub received { return "$_[0]->{dir}/received"; }

# A change of a row and its line in the ledger, in one statement: the line gets
# its number while the row is locked.
sub load_script
{
	my ($self) = @_;
	my $update = q(with c as (update item_:t set token = gen_random_uuid() where id = :id returning id, token)
	insert into ledger (topic, key, op, token) select :t, id, 'u', token from c;);
	my $insert = qq(with c as (insert into item_:t (id, pad) values (:id, repeat('x', $self->{pad})) returning id, token)
	insert into ledger (topic, key, op, token) select :t, id, 'c', token from c;);
	my $delete = q(with c as (delete from item_:t where id = :id returning id, token)
	insert into ledger (topic, key, op, token) select :t, id, 'd', token from c;);

	return qq($self->{init}
\\set t random(1, $self->{topics})
\\set id random(1, $self->{keys})
\\set kind random(1, 20)
\\if :kind <= 13
$update
\\elif :kind <= 15
begin;
$update
rollback;
\\elif :kind <= 17
begin;
savepoint s;
$update
rollback to s;
\\set id random(1, $self->{keys})
$update
$update
commit;
\\elif :kind <= 18
select nextval('item_id') as id \\gset
$insert
$update
$delete
\\else
begin;
select nextval('item_id') as id \\gset
$insert
$update
$update
$delete
commit;
\\endif
);
}

# A program of ours in the background, with no pipe to us: a server that is
# started meanwhile would inherit it.
sub start_program
{
	my ($self, $name, @args) = @_;
	my $log = "$PostgreSQL::Test::Utils::log_path/"
	  . basename($0, '.pl') . "_$name.log";

	return IPC::Run::start([ "$PgFanout::lib/$name", @args ],
		'<', '/dev/null', '>>', $log, '2>>', $log);
}

sub end_program
{
	my ($self, $name) = @_;
	my $harness = delete $self->{$name} or return;

	$harness->signal('TERM');
	$harness->finish;
	return;
}

sub start_collector
{
	my ($self) = @_;

	$self->{collector} = $self->start_program(
		'collector',
		(map { ('--uri', $_) } @{ $self->{uris} }),
		'--out', $self->received,
		map { ('--queue', $_) } @{ $self->{queues} });
	return 1;
}

=pod

=item $experiment->drain

Takes all there is out of the queues and ends the collector, so that nothing is
lost with the broker.  The publisher's way to it must be cut.  start_collector
goes on.

=cut

sub drain
{
	my ($self) = @_;

	PgFanout::poll(sub { !$self->waiting(@{ $self->{queues} }) }, 'empty queues');
	# it writes down and acks what it has got; what came meanwhile is next
	$self->end_program('collector');
	$self->start_collector && return $self->drain
	  if $self->waiting(@{ $self->{queues} });
	return;
}

# How many messages are ready in queues.
sub waiting
{
	my ($self, @queues) = @_;
	my $total = 0;

	$total += $_
	  foreach split /\n/,
	  $self->{broker}->amqp('count', map { ('--queue', $_) } @queues);
	return $total;
}

=pod

=item $experiment->start_load, stop_load

Stopped means that no transaction of the load is left in the server.

=cut

sub start_load
{
	my ($self) = @_;
	my $log = "$PostgreSQL::Test::Utils::log_path/"
	  . basename($0, '.pl') . '_pgbench.log';

	$self->{load} = $self->start_program(
		'load', $self->{node}->connstr($self->{dbname}),
		$self->script, $log, '-c', $self->{clients}, '-R', $self->{rate});
	return;
}

sub stop_load
{
	my ($self) = @_;

	$self->end_program('load');
	PgFanout::poll(
		sub {
			$self->try_sql(
				q(select count(*) = 0 from pg_stat_activity where application_name = 'pgbench')
			) eq 't';
		},
		'end of the load');
	return;
}

# '' if there is no answer, as while the server restarts.
sub try_sql
{
	my ($self, $sql) = @_;
	my $stdout = '';

	# psql() would die of a pipe that psql has closed without reading it, as it
	# does when it cannot connect
	IPC::Run::run([ 'psql', '-XAtq', '-d', $self->{node}->connstr($self->{dbname}), '-c', $sql ],
		'>', \$stdout, '2>', '/dev/null') or return '';
	chomp $stdout;
	return $stdout;
}

=pod

=item $experiment->committed, $experiment->wait_for_commits(N)

Lines in the ledger; waits until there are N more than now.

=cut

sub committed
{
	my ($self) = @_;

	return $self->try_sql('select count(*) from ledger') || 0;
}

sub wait_for_commits
{
	my ($self, $count) = @_;
	my $goal = $self->committed + $count;

	PgFanout::poll(sub { $self->committed >= $goal }, "$count more changes");
	return;
}

=pod

=item $experiment->wait_for_confirms(N)

Waits until the broker has confirmed N messages more than now.

=cut

sub wait_for_confirms
{
	my ($self, $count) = @_;
	my $confirmed = q(select confirmed from fanout.stat_publisher);
	my $goal = $self->sql($confirmed) + $count;

	PgFanout::poll(sub { ($self->try_sql($confirmed) || 0) >= $goal },
		"$count more confirms");
	return;
}

=pod

=item $experiment->run(name, sub { what happens }, ...)

Starts the load, does it after a few hundred changes, lets as many more pass,
stops the load, and gives the verdict.  Parameters:

  repeats   messages may come again: because something crashed or broke, so
            that it is not known what the broker had taken
  changes   before and after, default 200 each
  after     sub to call when the load has ended, before everything must arrive
  timeout   for everything to arrive, default '60 s'

=cut

sub run
{
	my ($self, $name, $what, %params) = @_;
	my $changes = $params{changes} || 200;

	$self->start_load;
	$self->wait_for_commits($changes);
	$what->($self);
	$self->wait_for_commits($changes);
	$self->stop_load;
	$params{after}->($self) if $params{after};
	return $self->verdict($name, %params);
}

=pod

=item $experiment->verdict(name, repeats => 1, timeout => '60 s')

Waits until everything is acknowledged and has arrived, and tests that the
verdict is as it should be.  The load must have been stopped.

=cut

sub verdict
{
	my ($self, $name, %params) = @_;
	my $result;

	PgFanout::flush($self->{node},
		dbname => $self->{dbname},
		timeout => $params{timeout} || '60 s');
	$self->write_ledger;
	eval {
		PgFanout::poll(
			sub {
				$result = $self->judge;
				return $result->{missing} == 0;
			},
			'all messages');
	};
	# one too many may still be on its way
	Time::HiRes::sleep(0.5);
	$result = $self->judge;
	$self->report($name, $result, %params);
	return $result;
}

sub write_ledger
{
	my ($self) = @_;
	my $ledger = "$self->{dir}/ledger";

	unlink $ledger;
	$self->sql(
		"copy (select n, topic, key, op, token from ledger order by n) to '$ledger'"
	);
	return;
}

sub judge
{
	my ($self) = @_;
	my $json = PgFanout::run_command_ok(
		"$PgFanout::lib/verdict",
		'--ledger', "$self->{dir}/ledger",
		'--received', $self->received,
		map { ('--queue', $_) } @{ $self->{queues} });

	return JSON::XS::decode_json($json);
}

sub report
{
	my ($self, $name, $result, %params) = @_;
	my %bad = map { $_ => $result->{$_} }
	  grep { $result->{$_} } qw(missing invented disordered renamed);
	my $messages = $result->{messages} - ($self->{judged} || 0);
	my $repeated = $result->{repeated} - ($self->{repeated} || 0);

	$bad{repeated} = $repeated if $repeated && !$params{repeats};
	$self->{judged} = $result->{messages};
	$self->{repeated} = $result->{repeated};
	is_deeply(\%bad, {},
		"$name: nothing missing, invented, out of order or renamed"
		  . ($params{repeats} ? '' : ', nothing repeated'))
	  or $self->keep_evidence($result);
	$self->record($name, $messages, $result->{missing}, $repeated);
	return;
}

# What the verdict was made from, beside the logs.
sub keep_evidence
{
	my ($self, $result) = @_;

	diag(JSON::XS->new->canonical->encode($result));
	foreach my $file (qw(ledger received))
	{
		File::Copy::copy("$self->{dir}/$file",
			"$PostgreSQL::Test::Utils::log_path/" . basename($0, '.pl') . "_$file");
	}
	return;
}

# A line of the table in test/README.md.
sub record
{
	my ($self, $name, $messages, $missing, $repeated) = @_;
	my $load = "$self->{clients} clients, $self->{topics} topics, $self->{rate}/s";

	note("$messages messages, $missing missing, $repeated repeated");
	PostgreSQL::Test::Utils::append_to_file(
		"$PostgreSQL::Test::Utils::tmp_check/experiments",
		sprintf("| %s | %s | %s | %d | %d | %d |\n",
			$name, basename($self->{file} || $0, '.pl'),
			$load, $messages, $missing, $repeated));
	return;
}

=pod

=item $experiment->audit(proxy)

Tests that what is shown as sent has arrived.  The publisher must go through
the proxy and the collector must not: its way is cut, what was sent until then
is read, the queues are emptied, and then all of it must have arrived.

=cut

sub audit
{
	my ($self, $proxy, $name) = @_;
	my %arrived;
	my @sent;
	my @early;

	$proxy->command('cut');
	@sent = split /\n/,
	  $self->sql("select message_id from fanout.outbox_status where state = 'sent'");
	@sent = grep { !$self->{given_up}->{$_} } @sent;
	eval {
		PgFanout::poll(
			sub {
				%arrived = $self->arrived;
				@early = grep { !$arrived{$_} } @sent;
				return !@early;
			},
			'all that was sent');
	} if @sent;
	is(scalar(@early), 0,
		"$name: none of the " . @sent . ' messages shown as sent is on its way');
	$proxy->command('pass');
	return;
}

# message id => times received
sub arrived
{
	my ($self) = @_;
	my %arrived;

	open my $in, '<', $self->received or return;
	while (my $line = <$in>)
	{
		$arrived{ (split /\t/, $line)[2] }++;
	}
	close $in;
	return %arrived;
}

=pod

=item $experiment->end

Ends load and collector; done for all experiments when the test ends.

=cut

sub end
{
	my ($self) = @_;

	$self->end_program($_) foreach qw(load collector);
	return;
}

END
{
	local ($?, $@);

	foreach my $experiment (@running)
	{
		eval { $experiment->end };
	}
}

=pod

=back

=cut

1;
