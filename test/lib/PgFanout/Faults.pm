
=pod

=head1 NAME

PgFanout::Faults - what can happen to a broker

=head1 SYNOPSIS

  PgFanout::Faults::suffer($experiment, 'broker killed');

  my @faults = PgFanout::Faults::all(private => 1, proxy => 1);
  my $fault = $faults[rand @faults];
  $fault->{begin}->($experiment);
  sleep $fault->{seconds};
  $fault->{end}->($experiment);

=head1 DESCRIPTION

A fault is a hash:

  name      in the words of the table of test/README.md
  begin     sub that does it; its argument is an experiment, under load or not
  end       sub that undoes it.  What a queue has lost by then is nothing:
            begin has emptied it first
  seconds   for how long, at least, to have an effect
  repeats   it explains repeats: a connection or a channel broke
  private   needs a private broker, since it concerns all of it
  proxy     needs a proxy between publisher and broker (Experiment's "proxy")
  cluster   needs a cluster of brokers
  user      needs a user of the publisher's own (own_user())
  topic     it concerns topic load_1, which may be stalled by it.  If not, the
            broker was away, and no topic may be
  redeclared
            that topic need not be stalled: topology is declared again by and
            by, and that may come before the next message
  reason    what stat_topics says of that topic meanwhile: it is stalled, and
            load_2 must flow
  state, error
            what stat_publisher says meanwhile

Those with "proxy" and without "repeats" keep the connection: they stop it for
a second or two, which must not be longer than the heartbeat.

=cut

package PgFanout::Faults;

use strict;
use warnings;

use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

# what they are done to
my $topic = 'load_1';
my $queue = 'load_1_a';
my $user = 'publisher';

my $large = 5;    # messages
my $nothing = sub { };

my @faults = (

	# ---- the broker is away ----

	{
		name => 'broker stopped and started',
		private => 1,
		repeats => 1,
		seconds => 1,
		begin => sub { $_[0]->{broker}->stop },
		end => sub { $_[0]->{broker}->start },
	},
	{
		name => 'broker killed and started',
		private => 1,
		repeats => 1,
		seconds => 1,
		begin => sub { $_[0]->{broker}->kill },
		end => sub { $_[0]->{broker}->start },
	},
	{
		# twice the heartbeat of 2 s, and some
		name => 'broker frozen for longer than the heartbeat, and resumed',
		private => 1,
		repeats => 1,
		seconds => 6,
		begin => sub { $_[0]->{broker}->freeze },
		end => sub { $_[0]->{broker}->thaw },
	},
	{
		name => 'memory alarm set and cleared',
		private => 1,
		seconds => 2,
		state => 'blocked',
		begin => sub { $_[0]->{broker}->ctl('set_vm_memory_high_watermark', '0.00001') },
		end => sub { $_[0]->{broker}->ctl('set_vm_memory_high_watermark', '0.4') },
	},
	{
		name => 'disk alarm set and cleared',
		private => 1,
		seconds => 2,
		state => 'blocked',
		begin => sub { $_[0]->{broker}->ctl('set_disk_free_limit', '1000000GB') },
		end => sub { $_[0]->{broker}->ctl('set_disk_free_limit', '50MB') },
	},
	{
		name => 'broker wiped and started empty',
		private => 1,
		proxy => 1,
		repeats => 1,
		seconds => 0,
		begin => sub {
			my ($experiment) = @_;

			$experiment->{proxy}->command('cut');
			$experiment->drain;
			$experiment->{broker}->wipe;
		},
		end => sub {
			my ($experiment) = @_;

			$experiment->{proxy}->command('pass');
			$experiment->start_collector;
		},
	},
	{
		name => 'virtual host deleted, and created later',
		proxy => 1,
		repeats => 1,
		seconds => 0,
		error => 'does not exist',
		begin => sub {
			my ($experiment) = @_;

			$experiment->{proxy}->command('cut');
			$experiment->drain;
			$experiment->{broker}->ctl('delete_vhost', $experiment->{broker}->vhost);
			$experiment->{proxy}->command('pass');
		},
		end => sub {
			my ($experiment) = @_;

			$experiment->{broker}->create_vhost;
			$experiment->start_collector;
		},
	},
	{
		name => 'all connections closed by an operator',
		repeats => 1,
		seconds => 0,
		begin => sub {
			my ($experiment) = @_;

			$experiment->{broker}->ctl('close_all_connections', '-p',
				$experiment->{broker}->vhost, 'maintenance');
		},
		end => $nothing,
	},
	{
		name => "the publisher's connection closed by an operator",
		repeats => 1,
		seconds => 0,
		begin => \&close_publisher,
		end => $nothing,
	},
	{
		name => 'all channels crashed in the broker',
		private => 1,
		repeats => 1,
		seconds => 0,
		begin => sub {
			$_[0]->{broker}->evaluate('[exit(C, kill) || C <- rabbit_channel:list()]');
		},
		end => $nothing,
	},
	{
		name => "user's password changed, and pg_fanout's later",
		user => 1,
		repeats => 1,
		seconds => 0,
		error => 'authentication failed',
		begin => sub {
			my ($experiment) = @_;
			my $password = 'changed' . int(rand(1_000_000));

			$experiment->{broker}->{users}->{$user} = $password;
			$experiment->{broker}->ctl('change_password', $user, $password);
			close_publisher($experiment);
		},
		end => sub {
			write_password($_[0]->{password_file},
				$_[0]->{broker}->{users}->{$user});
		},
	},

	# ---- the broker refuses a topic ----

	{
		name => 'queue deleted',
		topic => 1,
		redeclared => 1,
		proxy => 1,
		seconds => 0,
		begin => sub {
			my ($experiment) = @_;

			without_traffic(
				$experiment,
				sub {
					$experiment->{broker}->amqp('delete', '--queue', $queue);
				});
		},
		end => $nothing,
	},
	{
		name => 'exchange deleted',
		topic => 1,
		repeats => 1,
		seconds => 0,
		begin => sub { $_[0]->{broker}->amqp('delete', '--exchange', $topic) },
		end => $nothing,
	},
	{
		name => 'binding deleted',
		topic => 1,
		seconds => 0,
		begin => sub {
			$_[0]->{broker}->amqp('unbind', '--exchange', $topic, '--queue', $queue);
		},
		end => $nothing,
	},
	{
		name => 'channel closed by the broker in the middle of a window',
		topic => 1,
		proxy => 1,
		repeats => 1,
		seconds => 0,
		begin => sub {
			my ($experiment) = @_;

			$experiment->{proxy}->command('throttle 20000');
			in_flight($experiment, 30);
			$experiment->{broker}->amqp('delete', '--exchange', $topic);
			Time::HiRes::sleep(1);
			$experiment->{proxy}->command('pass');
		},
		end => $nothing,
	},
	{
		name => 'queue full (reject-publish), and emptied later',
		seconds => 0,
		topic => 1,
		reason => 'nacked',
		begin => sub {
			my ($experiment) = @_;

			# first, for what a queue takes behind a message that it has refused comes again
			$experiment->end_program('collector');
			$experiment->{broker}->ctl('set_policy', '-p', $experiment->{broker}->vhost,
				'--apply-to', 'queues', 'full', "^$queue\$",
				'{"max-length": 20, "overflow": "reject-publish"}');
		},
		end => sub {
			my ($experiment) = @_;

			$experiment->start_collector;
			PgFanout::poll(sub { !$experiment->waiting($queue) }, 'an empty queue');
			# at once, before the topic publishes as before
			$experiment->{broker}->obey('rabbit_policy:delete', $experiment->{broker}->vhost, 'full');
		},
	},
	{
		name => 'exchange exists with another type (406), repaired later',
		proxy => 1,
		repeats => 1,
		seconds => 0,
		topic => 1,
		reason => '406 PRECONDITION_FAILED',
		begin => sub {
			my ($experiment) = @_;

			frozen(
				$experiment,
				sub {
					$experiment->{broker}->amqp('delete', '--exchange', $topic);
					$experiment->{broker}->amqp('declare', '--exchange', $topic, '--type', 'topic');
				});
		},
		end => sub { $_[0]->{broker}->amqp('delete', '--exchange', $topic) },
	},
	{
		name => 'queue exists with other arguments (406), repaired later',
		proxy => 1,
		seconds => 0,
		topic => 1,
		reason => '406 PRECONDITION_FAILED',
		begin => sub {
			my ($experiment) = @_;

			without_traffic(
				$experiment,
				sub {
					$experiment->{broker}->amqp('delete', '--queue', $queue);
					$experiment->{broker}->amqp('declare', '--queue', $queue, '--arguments', '{"x-max-length": 5}');
				});
		},
		end => sub { $_[0]->{broker}->amqp('delete', '--queue', $queue) },
	},
	{
		name => 'permission to publish withdrawn (403), and given back',
		user => 1,
		repeats => 1,
		seconds => 0,
		topic => 1,
		reason => '403 ACCESS_REFUSED',
		begin => sub {
			my ($experiment) = @_;

			$experiment->{broker}->permit($user, '.*', "^(?!$topic\$)");
			close_publisher($experiment);
		},
		end => sub { $_[0]->{broker}->permit($user) },
	},
	{
		name => 'permission to declare withdrawn (403), and given back',
		user => 1,
		repeats => 1,
		seconds => 0,
		topic => 1,
		reason => '403 ACCESS_REFUSED',
		begin => sub {
			my ($experiment) = @_;

			$experiment->{broker}->permit($user, "^(?!$queue\$)");
			close_publisher($experiment);
		},
		end => sub { $_[0]->{broker}->permit($user) },
	},

	# ---- the broker refuses a message ----

	{
		name => "$large messages over max_message_size among others",
		repeats => 1,
		seconds => 0,
		begin => sub {
			my ($experiment) = @_;

			$experiment->{broker}->evaluate('application:set_env(rabbit, max_message_size, 10000)');
			# the broker looks at its limit when a channel is opened
			close_publisher($experiment);
			connected($experiment);
			publish_large($experiment);
		},
		end => sub {
			my ($experiment) = @_;

			# before the limit is lifted, so that none is taken after all
			purge_large($experiment);
			$experiment->{broker}->evaluate('application:set_env(rabbit, max_message_size, 134217728)');
			close_publisher($experiment);
		},
	},

	# ---- a cluster ----

	{
		name => 'leader killed and started',
		cluster => 1,
		private => 1,
		repeats => 1,
		seconds => 1,
		begin => sub {
			my ($experiment) = @_;
			my $leader;

			PgFanout::poll(
				sub {
					$leader = $experiment->{broker}->leader($queue);
					return $leader && kill 0, $leader->pid;
				},
				'a leader', 60);
			$leader->kill;
			$experiment->{killed} = $leader;
		},
		end => sub { (delete $_[0]->{killed})->start },
	});

=pod

=head1 FUNCTIONS

=over

=item PgFanout::Faults::all(private => 1, proxy => 1, user => 1, cluster => 1)

The faults that need nothing else.  Of a cluster, only those of a cluster and
those that concern no single node.

=item PgFanout::Faults::named(name)

=cut

sub all
{
	my (%has) = @_;

	return grep { applies($_, %has) } @faults;
}

sub applies
{
	my ($fault, %has) = @_;

	return 0 if $has{cluster} && $fault->{private} && !$fault->{cluster};
	return !grep { $fault->{$_} && !$has{$_} } qw(private proxy user cluster);
}

sub named
{
	my ($name) = @_;
	my ($fault) = grep { $_->{name} eq $name } @faults;

	return $fault || die "no fault is named \"$name\"";
}

=pod

=item PgFanout::Faults::own_user(broker, proxy, password file)

Makes the publisher's user, and returns the URI of the proxy without the
password.  The experiment's password_file must name the file.

=cut

sub own_user
{
	my ($broker, $proxy, $file) = @_;

	$broker->add_user($user, 'first');
	write_password($file, 'first');
	return $proxy->uri(user => $user);
}

sub write_password
{
	my ($file, $password) = @_;

	unlink $file;
	PostgreSQL::Test::Utils::append_to_file($file, "$password\n");
	chmod 0600, $file or die "could not change mode of $file: $!";
	return;
}

=pod

=item PgFanout::Faults::suffer(experiment, name, audit => 'during' or 'after', ...)

Runs the experiment with the fault, other parameters as those of run().  Tests
also that only the topic concerned was stalled, and the other one flowed; that
no attempt was used up if the broker was away; with audit, that no message
is shown as sent which had not arrived (that breaks the connection).

=cut

sub suffer
{
	my ($experiment, $name, %params) = @_;
	my $fault = named($name);
	my $audit = $params{audit} || '';
	my $log = -s $experiment->{node}->logfile;
	my $result;

	$result = $experiment->run(
		$name,
		sub {
			$fault->{begin}->($experiment);
			wait_for_effect($experiment, $fault, $log);
			Time::HiRes::sleep($fault->{seconds});
			$experiment->audit($experiment->{proxy}, $name) if $audit eq 'during';
			$fault->{end}->($experiment);
			$experiment->audit($experiment->{proxy}, $name) if $audit eq 'after';
		},
		repeats => $fault->{repeats} || $audit,
		%params);
	check_stalls($experiment, $fault, $log);
	return $result;
}

# Topics, by the log.
sub stalled_since
{
	my ($experiment, $from) = @_;
	my $log = PostgreSQL::Test::Utils::slurp_file($experiment->{node}->logfile, $from);
	my %stalled = map { $_ => 1 } $log =~ /topic "(.*?)" is stalled/g;
	my @stalled = sort keys %stalled;

	return @stalled;
}

sub wait_for_effect
{
	my ($experiment, $fault, $log) = @_;

	PgFanout::poll(
		sub {
			stalled_since($experiment, $log)
			  || $fault->{redeclared} && eval { $experiment->waiting($queue); 1 };
		},
		'a topic that is stalled') if $fault->{topic};
	if ($fault->{error})
	{
		$experiment->{node}->poll_query_until('postgres',
			"select last_error ~ '$fault->{error}' from fanout.stat_publisher")
		  or die PgFanout::status($experiment->{node}, 'postgres');
	}
	PgFanout::wait_for_publisher($experiment->{node}, $fault->{state})
	  if $fault->{state};
	return unless $fault->{reason};
	$experiment->{node}->poll_query_until('postgres',
		"select reason ~ '$fault->{reason}' and held > 0 from fanout.stat_topics where topic = '$topic'")
	  or die PgFanout::status($experiment->{node}, 'postgres');
	others_flow($experiment, $fault);
	return;
}

# Of the stalled topic, nothing is confirmed.
sub others_flow
{
	my ($experiment, $fault) = @_;

	$experiment->wait_for_confirms(100);
	pass("$fault->{name}: another topic flows meanwhile");
	return;
}

# Everything is out by now.
sub check_stalls
{
	my ($experiment, $fault, $from) = @_;
	my @stalled = stalled_since($experiment, $from);
	@stalled = ($topic) if !@stalled && $fault->{redeclared};
	my $left = $experiment->sql(
		q(select count(*) from fanout.stat_topics
		  where attempts is not null or stalled_since is not null or held > 0 or dead > 0));

	is($left, 0, "$fault->{name}: no stall, attempt or dead letter is left");
	is_deeply(\@stalled,
		[ $fault->{topic} ? $topic : () ],
		"$fault->{name}: " . ($fault->{topic} ? 'only the topic concerned was stalled' : 'no attempt was used up'));
	return;
}

=pod

=back

=cut

# ---- what faults are made of ----

sub value
{
	my ($experiment, $expression) = @_;

	return $experiment->try_sql("select $expression from fanout.stat_publisher");
}

# The connection stays, and nothing passes.
sub frozen
{
	my ($experiment, $what) = @_;

	$experiment->{proxy}->command('freeze');
	$what->();
	$experiment->{proxy}->command('pass');
	return;
}

# The same, and the queues are empty.
sub without_traffic
{
	my ($experiment, $what) = @_;

	frozen(
		$experiment,
		sub {
			$experiment->drain;
			$what->();
		});
	$experiment->start_collector;
	return;
}

sub in_flight
{
	my ($experiment, $count) = @_;

	PgFanout::poll(sub { (value($experiment, 'in_flight') || 0) >= $count },
		"$count messages in flight");
	return;
}

sub connected
{
	my ($experiment) = @_;

	PgFanout::poll(sub { value($experiment, 'connected_to is not null') eq 't' },
		'a connection');
	return;
}

# By an operator, as rabbitmqctl close_connection does it; returns when the
# publisher has noticed.
sub close_publisher
{
	my ($experiment) = @_;
	my $since = value($experiment, 'connected_at');

	my $vhost = $experiment->{broker}->vhost;

	# of this test alone: others may use the same broker
	$experiment->{broker}->ctl(
		'eval', qq(
[rabbit_networking:close_connection(Pid, "maintenance") ||
	[{pid, Pid}, {vhost, <<"$vhost">>}, {client_properties, Properties}]
		<- rabbit_networking:connection_info_all([pid, vhost, client_properties]),
	is_list(Properties), lists:member({<<"connection_name">>, longstr, <<"pg_fanout publisher">>}, Properties)].));
	PgFanout::poll(sub { value($experiment, 'connected_at') ne $since },
		'end of the connection');
	return;
}

sub publish_large
{
	my ($experiment) = @_;

	$experiment->sql(
		qq(select fanout.publish('$topic', to_jsonb(repeat('x', 20000)), 'large' || i)
		   from generate_series(1, $large) i));
	return;
}

sub purge_large
{
	my ($experiment) = @_;

	$experiment->{node}->poll_query_until('postgres',
		"select count(*) >= $large from fanout.dead_letter")
	  or die PgFanout::status($experiment->{node}, 'postgres');
	is( $experiment->sql(
			q(select string_agg(key || coalesce(substring(reason from '^406'), reason), ' ' order by key) from fanout.dead_letter)),
		join(' ', map { "large${_}406" } 1 .. $large),
		'messages over max_message_size are dead letters at once, and no others are');
	# which outbox_status shows as sent from now on
	$experiment->{given_up}->{$_} = 1
	  foreach split /\n/, $experiment->sql('select message_id from fanout.dead_letter');
	$experiment->sql("select fanout.purge('$topic')");
	return;
}

1;
