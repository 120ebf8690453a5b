
=pod

=head1 NAME

PgFanout - what the TAP tests of pg_fanout share

=head1 SYNOPSIS

  use FindBin;
  use lib "$FindBin::RealBin/../lib";
  use PgFanout;

  my $broker = PgFanout::broker();                  # may be shared: own vhost
  my $broker = PgFanout::broker(private => 1);      # to be killed or frozen
  my $node = PgFanout::cluster('main', $broker);    # started, extension made

  PgFanout::flush($node);
  PgFanout::wait_for_state($node, 'sent');

  my @messages = $broker->collect($queue, expect => 10);
  is($messages[0]->{body}->{op}, 'c');

  $broker->stop; $broker->start; $broker->kill; $broker->restart;
  $broker->freeze; $broker->thaw; $broker->wipe;
  $broker->ctl('list_queues', '-p', $broker->vhost);

  my $proxy = $broker->proxy;                       # then $proxy->uri
  $proxy->command('freeze');

=head1 DESCRIPTION

A broker is a RabbitMQ node of its own, or a virtual host in the node that
PG_FANOUT_TEST_BROKER_DIR names (test/check starts one for all files).  Brokers
and proxies end with the test.  Any failure to set up dies.

=cut

package PgFanout;

use strict;
use warnings;

use Cwd ();
use File::Basename qw(basename dirname);
use File::Copy ();
use IPC::Run ();
use JSON::XS ();
use Test::More;

use PgFanout::Node;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Time::HiRes ();

our $lib = Cwd::abs_path(dirname(__FILE__));
our @brokers;
our @proxies;

# What ends a test is told with its results, not in its log alone.
$SIG{__DIE__} = sub { diag($_[0]) if defined $^S && !$^S; };

=pod

=head1 FUNCTIONS

=over

=item PgFanout::broker(private => 1, vhost => 'name', tls => 'lines of rabbitmq.conf', plugins => ['name'], terms => 'advanced.config')

A broker that accepts connections, with an empty virtual host.  With tls, it
accepts those of TLS, too.  What comes after vhost needs private.

=cut

sub broker
{
	my (%params) = @_;

	return PgFanout::Broker->new(%params);
}

=pod

=item PgFanout::broker_cluster(3)

A cluster of so many nodes: private brokers, see there, that know each other.
Queues declared as quorum queues have a replica on each.

=cut

sub broker_cluster
{
	my ($count) = @_;

	return PgFanout::BrokerCluster->new($count);
}

=pod

=item PgFanout::cluster_with_copy(broker)

A started node for both ends of copies: databases postgres and copy have the extension.

=cut

sub cluster_with_copy
{
	my ($broker) = @_;
	my $node = cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 30
));

	$node->safe_psql('postgres', 'create database copy');
	$node->safe_psql('copy', 'create extension pg_fanout');
	return $node;
}

=item PgFanout::cluster(name, broker or proxy, conf => 'lines', extension => 0)

A started PostgreSQL node that publishes to the broker.  With no broker, it
publishes to a port that nobody listens to.

=cut

sub cluster
{
	my ($name, $broker, %params) = @_;
	my $node = PgFanout::Node->new($name);
	my $uri = $broker ? $broker->uri : 'amqp://guest:guest@127.0.0.1:1/%2F';

	$node->init(%{ $params{init} || {} });
	$node->append_conf('postgresql.conf', qq(
shared_preload_libraries = 'pg_fanout'
pg_fanout.uri = '$uri'
log_min_messages = info
));
	$node->append_conf('postgresql.conf', $params{conf}) if $params{conf};
	$node->start;
	$node->safe_psql('postgres', 'create extension pg_fanout')
	  unless defined $params{extension} && !$params{extension};
	return $node;
}

=pod

=item PgFanout::flush(node, dbname => 'postgres', timeout => '180 s')

Waits until all that was committed is acked, and dies if that does not happen.

=cut

sub flush
{
	my ($node, %params) = @_;
	my $dbname = $params{dbname} || 'postgres';
	my $timeout = $params{timeout} || '180 s';

	my $flushed =
	  $node->safe_psql($dbname, "select fanout.flush('$timeout')");
	die "flush of $dbname timed out\n" . status($node, $dbname)
	  unless $flushed eq 't';
	return;
}

=pod

=item PgFanout::wait_for_state(node, state, count => N, where => 'condition', dbname => 'postgres')

Waits until N messages are in that state, or all of them if there is no count.

=cut

sub wait_for_state
{
	my ($node, $state, %params) = @_;
	my $dbname = $params{dbname} || 'postgres';
	my $where = $params{where} || 'true';
	my $expected = $params{count};
	$expected = 'count(*)' unless defined $expected;

	$node->poll_query_until($dbname,
		"select count(*) filter (where state = '$state') = $expected from fanout.outbox_status where $where"
	  )
	  or die "not in state $state\n" . status($node, $dbname);
	return;
}

=pod

=item PgFanout::wait_for_publisher(node, state, dbname => 'postgres')

Waits until the publisher of a database says that it is in a state, and returns
its process id.

=cut

sub wait_for_publisher
{
	my ($node, $state, %params) = @_;
	my $dbname = $params{dbname} || 'postgres';

	$node->poll_query_until($dbname,
		"select exists (select from fanout.stat_publisher where state = '$state')"
	  )
	  or die "publisher not in state $state\n" . status($node, $dbname);
	return $node->safe_psql($dbname, 'select pid from fanout.stat_publisher');
}

=pod

=item PgFanout::publisher_pid(node, dbname => 'postgres')

The process id of the publisher of a database, once there is one.

=cut

sub publisher_pid
{
	my ($node, %params) = @_;
	my $dbname = $params{dbname} || 'postgres';
	my $query = qq(select pid from fanout.stat_publisher where pid is not null);

	$node->poll_query_until($dbname, "select exists ($query)")
	  or die "no publisher\n" . status($node, $dbname);
	return $node->safe_psql($dbname, $query);
}

=pod

=item PgFanout::new_publisher(node)

Ends the publisher, and returns the process id of the next one.

=cut

sub new_publisher
{
	my ($node) = @_;
	my $pid = publisher_pid($node);

	$node->safe_psql('postgres', "select pg_terminate_backend($pid)");
	poll(sub { ask($node, 'select coalesce(max(pid), 0) from fanout.stat_publisher') !~ /^($pid|0)?$/ }, 'a new publisher');
	return publisher_pid($node);
}

=pod

=item my $is_quick = PgFanout::quick_view(node, view); $is_quick->(name)

Returns a function which tests that looking at the view takes hardly longer than it does now,
5 ms more at most, or as much longer as a view takes that has nothing to do with messages:
then it is the machine that is slower.

=cut

# In ms: the quickest of a few looks, since on a busy machine the others say little.
sub time_of_view
{
	my ($node, $view) = @_;
	my $out = $node->safe_psql('postgres', join("\n", '\timing on', ("select * from $view;") x 15));
	my @times = sort { $a <=> $b } $out =~ /Time: ([\d.]+)/g;

	return $times[0];
}

sub quick_view
{
	my ($node, $view) = @_;
	my ($few, $other) = map { time_of_view($node, $_) } $view, 'pg_settings';

	return sub {
		my ($name) = @_;
		my $time = time_of_view($node, $view);
		my $slower = time_of_view($node, 'pg_settings') / $other;

		cmp_ok($time, '<', ($few + 5) * ($slower > 1 ? $slower : 1),
			sprintf('%s, looking takes %.1f ms, with few %.1f ms, what else takes %.1f times as long', $name, $time, $few, $slower));
		return;
	};
}

=pod

=item my $value = PgFanout::again_if_slow(limit, measure)

Returns what $measure->() does, which is called up to three times, until that is less than the
limit.  Once, a machine that stands still may be what takes so long; what is wrong takes long
each time.  $measure->() gets the number of the try.

=cut

sub again_if_slow
{
	my ($limit, $measure) = @_;
	my $value;

	foreach my $try (1 .. 3)
	{
		$value = $measure->($try);
		last if $value < $limit;
	}
	return $value;
}

=pod

=item PgFanout::ask(node, sql, dbname)

What a query returns in a database ("postgres"), as text; '' if it fails, or the server
is away.

=cut

sub ask
{
	my ($node, $sql, $dbname) = @_;
	my ($stdout, $stderr) = ('', '');

	# psql may have ended before it was told what to ask
	eval { $node->psql($dbname || 'postgres', $sql, stdout => \$stdout, stderr => \$stderr, on_error_die => 0); 1 } or return '';
	return $stdout;
}

=pod

=item PgFanout::soon(node, condition, seconds)

Does a condition become true within so many seconds, though the server may be away
meanwhile?  If not, shows what subscriptions do.

=cut

sub soon
{
	my ($node, $condition, $seconds) = @_;

	return 1 if eval { poll(sub { ask($node, "select coalesce($condition, false)") eq 't' }, $condition, $seconds); 1 };
	diag(ask($node, 'select * from fanout.stat_subscriptions; select * from fanout.subscription;
		select key, attempts, sqlstate, left(error, 200), next_try from fanout.delivery_failure limit 20; select count(*) from fanout.waiting'));
	return 0;
}

=pod

=item PgFanout::kill_process(node, pid)

Kills a process of the server with SIGKILL, and waits until the server, which restarts
itself then, answers again.  For a moment after the signal it still does.

=cut

sub kill_process
{
	my ($node, $pid) = @_;

	kill 'KILL', $pid or return;
	# the postmaster takes no session any more when it has noticed
	poll(sub { !kill(0, $pid) }, "the end of process $pid");
	poll(sub { ask($node, 'select 1') eq '1' }, 'the server to be back');
	return;
}

=pod

=item PgFanout::suspend(node, pid)

Stops a worker with SIGSTOP at a moment at which it is in no transaction, and so keeps
nobody waiting; SIGCONT lets it go on.

=cut

sub suspend
{
	my ($node, $pid) = @_;

	poll(
		sub {
			kill 'STOP', $pid;
			return 1 if ask($node, "select not exists (select from pg_locks where pid = $pid)") eq 't';
			kill 'CONT', $pid;
			return 0;
		},
		"process $pid to be in no transaction");
	return;
}

=pod

=item session($node, $dbname), run_in($session, $sql)

A psql of its own in a database ("postgres"), for transactions that stay open, and
statements in it, which are done when run_in() returns. The session's harness is the
member "harness"; it may be used for ten times as long as a test waits for anything.

=cut

sub session
{
	my ($node, $dbname) = @_;
	my %s = (in => '', out => '', err => '');

	$s{harness} = IPC::Run::start(
		[ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr($dbname || 'postgres') ],
		'<', \$s{in}, '>', \$s{out}, '2>', \$s{err},
		IPC::Run::timeout(10 * $PostgreSQL::Test::Utils::timeout_default));
	return \%s;
}

sub run_in
{
	my ($s, $sql) = @_;

	$s->{in} .= "$sql;\n\\echo done\n";
	$s->{harness}->pump until $s->{out} =~ s/^done\n//m;
	return;
}

=pod

=item PgFanout::poll(sub { condition }, what, seconds)

Waits until the condition is true, and dies if that takes too long.  What is soon true is
soon noticed; a condition that takes long is asked less often.

=cut

sub poll
{
	my ($condition, $what, $seconds) = @_;
	my $deadline =
	  time + ($seconds || $PostgreSQL::Test::Utils::timeout_default);
	my $pause = 0.01;

	while (1)
	{
		my $begin = Time::HiRes::time();

		return if $condition->();
		die 'timed out waiting for: ' . (ref $what ? $what->() : $what) if time > $deadline;

		my $spent = Time::HiRes::time() - $begin;
		Time::HiRes::sleep($pause > $spent ? $pause : $spent > 0.5 ? 0.5 : $spent);
		$pause = $pause * 1.5 < 0.1 ? $pause * 1.5 : 0.1;
	}
	return;
}

=pod

=item PgFanout::overtaken(@messages)

How many of what collect() returned are before one that was written earlier, of the same
key, or of any key if one of them is a TRUNCATE.  A message that came more than once counts
where it came last.

=cut

sub overtaken
{
	my @messages = @_;
	my (%last, %newest);
	my ($highest, $floor, $wrong) = (0, 0, 0);

	$last{ $messages[$_]->{message_id} } = $_ foreach 0 .. $#messages;
	foreach my $message (map { $messages[$_] } sort { $a <=> $b } values %last)
	{
		my ($sequence, $op) = @{ $message->{headers} }{qw(sequence op)};
		my @keys = grep { defined } @{ $message->{headers} }{qw(key old_key)};
		my $truncates = ($op || '') eq 't';

		$wrong++
		  if $sequence < $floor
		  || ($truncates && $sequence < $highest)
		  || grep { $sequence < ($newest{$_} || 0) } @keys;
		$floor = $sequence if $truncates;
		$newest{$_} = $sequence foreach @keys;
		$highest = $sequence if $sequence > $highest;
	}
	return $wrong;
}

# What one wants to see when a wait fails.  Must not die itself.
sub status
{
	my ($node, $dbname) = @_;
	my ($stdout, $stderr) = ('', '');

	$node->psql(
		$dbname,
		q(select topic, state, count(*) from fanout.outbox_status group by 1, 2;
		  select * from fanout.stat_publisher;
		  select * from fanout.stat_topics;),
		extra_params => ['-x'],
		stdout => \$stdout,
		stderr => \$stderr,
		on_error_die => 0);
	return "$stdout\n$stderr\n";
}

# Runs a command and returns its standard output; dies with its standard error.
sub run_command_ok
{
	my (@command) = @_;
	my ($stdout, $stderr) = ('', '');

	IPC::Run::run(\@command, '<', \undef, '>', \$stdout, '2>', \$stderr)
	  or die "failed: @command\n$stdout$stderr";
	return $stdout;
}

# Nothing of ours outlives the test.  Runs before the END block that removes
# temporary directories, because that was compiled earlier.
END
{
	local ($?, $@);

	eval { $_->stop } foreach @proxies;
	eval { $_->end } foreach @brokers;
}

package PgFanout::Broker;

use strict;
use warnings;

sub new
{
	my ($class, %params) = @_;
	my $self = bless {}, $class;
	my $shared = $ENV{PG_FANOUT_TEST_BROKER_DIR};

	$self->{private} = $params{private} || !$shared;
	$self->{dir} = $params{dir}
	  || (
		$self->{private}
		? PostgreSQL::Test::Utils::tempdir('broker')
		: $shared);
	$self->{vhost} =
	  $params{vhost} || File::Basename::basename($0, '.pl') . "_$$";
	$self->{users} = {};

	push @brokers, $self;
	return $self if $params{dir};
	$self->configure_tls($params{tls}) if $params{tls};
	$self->write_file('plugins', map { "$_\n" } @{ $params{plugins} }) if $params{plugins};
	$self->write_file('terms', $params{terms}) if $params{terms};
	$self->rabbit('start') if $self->{private};
	$self->read_env;
	$self->create_vhost;
	return $self;
}

sub vhost { return $_[0]->{vhost}; }
sub port { return $_[0]->{env}->{RABBIT_PORT}; }
sub tls_port { return $_[0]->{env}->{RABBIT_TLS_PORT}; }
sub pid { return $_[0]->{env}->{RABBIT_PID}; }

=pod

=item $broker->uri(port => N, user => 'user:password'), tls_uri(port => N, host => 'name')

=cut

sub uri
{
	my ($self, %params) = @_;
	my $port = $params{port} || $self->port;
	my $user = $params{user} || 'guest:guest';

	return "amqp://$user\@127.0.0.1:$port/$self->{vhost}";
}

sub tls_uri
{
	my ($self, %params) = @_;
	my $port = $params{port} || $self->tls_port;
	my $host = $params{host} || 'localhost';

	return "amqps://guest:guest\@$host:$port/$self->{vhost}";
}

=pod

=item $broker->add_user(user, password)

A user who may do everything in the virtual host.

=cut

sub add_user
{
	my ($self, $user, $password) = @_;

	$self->{users}->{$user} = $password;
	$self->ctl('add_user', $user, $password);
	$self->permit($user);
	return;
}

=pod

=item $broker->permit(user, configure, write, read)

Regular expressions; default '.*'.

=cut

sub permit
{
	my ($self, $user, @rights) = @_;

	$self->obey('rabbit_auth_backend_internal:set_permissions',
		$user, $self->{vhost}, map { defined $rights[$_] ? $rights[$_] : '.*' } 0 .. 2);
	return;
}

=pod

=item $broker->configure_tls('lines of rabbitmq.conf')

In force when the broker has been restarted.

=cut

sub configure_tls
{
	my ($self, $lines) = @_;

	$self->write_file('tls.conf', $lines);
	return;
}

sub write_file
{
	my ($self, $name, @lines) = @_;

	unlink "$self->{dir}/$name";
	PostgreSQL::Test::Utils::append_to_file("$self->{dir}/$name", join('', @lines));
	return;
}

sub create_vhost
{
	my ($self) = @_;

	$self->obey('rabbit_vhost:add', $self->{vhost});
	$self->permit($_) foreach 'guest', keys %{ $self->{users} };
	return;
}

sub create_again
{
	my ($self) = @_;

	$self->ctl('add_user', $_, $self->{users}->{$_})
	  foreach keys %{ $self->{users} };
	$self->create_vhost;
	return;
}

sub read_env
{
	my ($self) = @_;
	my $text = PostgreSQL::Test::Utils::slurp_file("$self->{dir}/env");

	$self->{env} = { $text =~ /^(\w+)=(.*)$/mg };
	return;
}

sub rabbit
{
	my ($self, $command, @args) = @_;

	return PgFanout::run_command_ok("$PgFanout::lib/rabbit", $command,
		$self->{dir}, @args);
}

=pod

=item $broker->stop, start, kill, restart, freeze, thaw, wipe

See test/lib/rabbit.  Only for a private broker.  After wipe, users and the
virtual host exist again, and it is empty.

=cut

foreach my $command (qw(stop start kill restart freeze thaw wipe))
{
	no strict 'refs';    ## no critic (ProhibitNoStrict)
	*{$command} = sub {
		my ($self) = @_;

		die "$command of a shared broker" unless $self->{private};
		$self->rabbit($command);
		$self->read_env;
		$self->create_again if $command eq 'wipe';
		return;
	};
}

=pod

=item $broker->ctl(arguments)

rabbitmqctl; returns what it prints.

=cut

sub ctl
{
	my ($self, @args) = @_;

	return $self->rabbit('ctl', @args);
}

=pod

=item $broker->evaluate(erlang)

Evaluates an expression of Erlang in the broker, and returns its value as text.
rabbitmqctl takes a hundred times as long, most of it to start.

=cut

sub evaluate
{
	my ($self, $erlang) = @_;
	my $value = $self->rabbit('eval', $erlang);

	chomp $value;
	return $value;
}

# Calls a function that takes strings and, at last, who wants it, and returns "ok".
sub obey
{
	my ($self, $function, @arguments) = @_;
	my $list = join(', ', map { qq(<<"$_"/utf8>>) } map { s/(["\\])/\\$1/gr } @arguments, 'test');
	my $answer = $self->evaluate("$function($list)");

	die "$function: $answer" if $answer ne 'ok';
	return;
}

=pod

=item $broker->eval_queue(queue, erlang)

Evaluates an expression of Erlang, in which Q is a queue of the virtual host.

=cut

sub eval_queue
{
	my ($self, $queue, $erlang) = @_;
	my $vhost = $self->vhost;

	return $self->evaluate(
		qq({ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"$vhost">>, queue, <<"$queue">>)), $erlang));
}

=pod

=item $broker->suspend_queue(queue), $broker->resume_queue(queue)

A classic queue's process does nothing meanwhile: it confirms nothing, and no
declaration of it is answered.

=cut

sub suspend_queue { return $_[0]->eval_queue($_[1], 'sys:suspend(amqqueue:get_pid(Q))'); }
sub resume_queue { return $_[0]->eval_queue($_[1], 'sys:resume(amqqueue:get_pid(Q))'); }

=pod

=item $broker->slow_queues(milliseconds, queues), $broker->slow_queues(0)

Has classic queues' processes do what they have to do once in so many milliseconds, in two
of them: they confirm as steadily as ever, but later.  Queues that were slow before are so no
more, from now on.

=cut

sub slow_queues
{
	my ($self, $ms, @queues) = @_;
	my $slow = '{slow, <<"' . $self->vhost . '">>}';

	$self->evaluate(qq(
		[begin M = monitor(process, S), S ! stop, receive {'DOWN', M, _, _, _} -> ok end end
			|| S <- persistent_term:get($slow, [])],
		persistent_term:put($slow, [])));
	$self->eval_queue($_, qq(P = amqqueue:get_pid(Q),
		S = spawn(fun Slow() ->
			sys:suspend(P, infinity),
			Stop = receive stop -> true after $ms -> false end,
			sys:resume(P, infinity),
			Stop orelse begin timer:sleep(2), Slow() end
		end),
		persistent_term:put($slow, [S | persistent_term:get($slow)]))) foreach @queues;
	return;
}

=pod

=item $broker->message_store('suspend'), $broker->message_store('resume')

Messages that are not very small are written by a process of their virtual host's, and
confirmed once it has.  Classic queues answer as ever meanwhile.

=cut

sub message_store
{
	my ($self, $what) = @_;
	my $vhost = $self->vhost;

	return $self->evaluate(qq({ok, S} = rabbit_vhost_sup_sup:get_vhost_sup(<<"$vhost">>),
		{_, P, _, _} = lists:keyfind(msg_store_persistent, 1, supervisor:which_children(S)), sys:$what(P)));
}

=pod

=item $broker->amqp(command, arguments)

See test/lib/amqp; returns what it prints.

=cut

sub amqp
{
	my ($self, $command, @args) = @_;

	return PgFanout::run_command_ok("$PgFanout::lib/amqp", $command, '--uri',
		$self->uri, @args);
}

=pod

=item $broker->collect(queue, expect => N, idle => seconds, timeout => seconds, keep => 1)

Takes the messages out of a queue, or of several (\@queues), or leaves them there, with
keep.  Returns a hash per message: body (decoded from JSON), raw (the body as it came),
message_id, headers, routing_key, exchange, redelivered, delivery_mode,
content_type, type, app_id, timestamp.  Dies if there are fewer than expected.

=cut

sub collect
{
	my ($self, $queue, %params) = @_;
	my @args = map { ('--queue', $_) } ref $queue ? @$queue : $queue;
	my $json = JSON::XS->new->utf8->allow_nonref;
	my $text = JSON::XS->new->allow_nonref;

	foreach my $option (qw(expect idle timeout))
	{
		push @args, "--$option", $params{$option} if defined $params{$option};
	}
	push @args, '--ack' unless $params{keep};

	my @messages =
	  map { $json->decode($_) } split(/\n/, $self->amqp('collect', @args));
	foreach my $message (@messages)
	{
		$message->{raw} = $message->{body};
		$message->{body} =
		  eval { $text->decode($message->{raw}) };
	}
	return @messages;
}

=pod

=item $broker->count(queue)

How many messages are ready in a queue.

=cut

sub count
{
	my ($self, $queue) = @_;

	return $self->amqp('count', '--queue', $queue) + 0;
}

=pod

=item $broker->left(queue)

How many messages a queue has that are not acked, those that are with a consumer as well.
Of what was published before it is 0, a consumer has acked everything: pg_fanout's has
committed it before that, and counted it.  Not for streams.

=cut

sub left
{
	my ($self, $queue) = @_;

	# what is told of a quorum queue in general is some seconds old
	return $self->eval_queue($queue, 'case amqqueue:get_type(Q) of
		rabbit_quorum_queue -> {ok, {_, N}, _} = ra:local_query(amqqueue:get_pid(Q), fun rabbit_fifo:query_messages_total/1), N;
		_ -> [{_, N}] = rabbit_amqqueue:info(Q, [messages]), N end') + 0;
}

=pod

=item $broker->proxy(to => port)

A proxy in front of the broker, with uri, tls_uri, port and command(); see
test/lib/proxy.

=cut

sub proxy
{
	my ($self, %params) = @_;

	return PgFanout::Proxy->new($self, $params{to} || $self->port);
}

# Ends a private node, keeping its log; removes a virtual host of a shared one.
sub end
{
	my ($self) = @_;

	if (!$self->{private})
	{
		$self->obey('rabbit_vhost:delete', $self->{vhost});
		$self->obey('rabbit_auth_backend_internal:delete_user', $_) foreach keys %{ $self->{users} };
		return;
	}
	foreach my $log (glob "$self->{dir}/log/*.log")
	{
		File::Copy::copy($log,
			    "$PostgreSQL::Test::Utils::log_path/"
			  . File::Basename::basename($0, '.pl') . '_'
			  . File::Basename::basename($log));
	}
	# a member of a cluster need not tell the others
	$self->rabbit($self->{env}->{RABBIT_MEMBERS} ? 'kill' : 'stop');
	return;
}

package PgFanout::BrokerCluster;

use strict;
use warnings;

=pod

=item $cluster->member(N), $cluster->members, $cluster->uris

Brokers, from 0; their URIs.  uri() has all of them, separated by commas.

=item $cluster->leader(queue), $cluster->replicas(queue)

The broker that leads a queue, or undef if there is none now; those that have a
replica of it.

=cut

sub new
{
	my ($class, $count) = @_;
	my $self = bless {}, $class;
	my $dir = PostgreSQL::Test::Utils::tempdir('brokers');

	$self->{members} = [
		map {
			mkdir "$dir/$_" or die "could not create $dir/$_: $!";
			PgFanout::Broker->new(private => 1, dir => "$dir/$_")
		} 1 .. $count ];
	PgFanout::run_command_ok("$PgFanout::lib/rabbit", 'cluster',
		map { $_->{dir} } $self->members);
	$_->read_env foreach $self->members;
	PgFanout::poll(sub { $self->online == $count }, 'all members', 60);
	$self->member(0)->create_vhost;
	return $self;
}

sub member { return $_[0]->{members}->[ $_[1] ]; }
sub members { return @{ $_[0]->{members} }; }
sub vhost { return $_[0]->member(0)->vhost; }
sub uris { return map { $_->uri } $_[0]->members; }
sub uri { return join(',', $_[0]->uris); }

# One that is there.
sub alive
{
	my ($self) = @_;
	my ($alive) = grep { $_->pid && kill 0, $_->pid } $self->members;

	return $alive || die "no member is running";
}

sub ctl
{
	my ($self, @args) = @_;

	return $self->alive->ctl(@args);
}

sub evaluate
{
	my ($self, $erlang) = @_;

	return $self->alive->evaluate($erlang);
}

sub amqp
{
	my ($self, @args) = @_;

	return $self->alive->amqp(@args);
}

# How many members know each other.
sub online
{
	my ($self) = @_;
	my $status = JSON::XS::decode_json(
		$self->ctl('cluster_status', '--formatter', 'json'));

	return scalar @{ $status->{running_nodes} };
}

sub leader
{
	my ($self, $queue) = @_;

	return ($self->nodes_of($queue, 'leader'))[0];
}

sub replicas
{
	my ($self, $queue) = @_;

	return $self->nodes_of($queue, 'members');
}

sub nodes_of
{
	my ($self, $queue, $column) = @_;
	my ($line) = grep { /^\Q$queue\E\s/ }
	  split /\n/,
	  $self->ctl('list_queues', '-p', $self->vhost, 'name', $column);

	return grep { ($line || '') =~ /\Q$_->{env}->{RABBIT_NODE}\E\b/ }
	  $self->members;
}

package PgFanout::Proxy;

use strict;
use warnings;

sub new
{
	my ($class, $broker, $target) = @_;
	my $self = bless { broker => $broker, in => '', out => '' }, $class;
	my $timer =
	  IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default);

	$self->{harness} = IPC::Run::start(
		[ "$PgFanout::lib/proxy", '--to', $target ],
		'<', \$self->{in}, '>', \$self->{out}, $timer);
	push @proxies, $self;
	$self->{timer} = $timer;
	$self->{port} = $self->answer;
	return $self;
}

sub port { return $_[0]->{port}; }

sub uri
{
	my ($self, %params) = @_;

	return $self->{broker}->uri(%params, port => $self->{port});
}

sub tls_uri
{
	my ($self, %params) = @_;

	return $self->{broker}->tls_uri(port => $self->{port}, %params);
}

# The next line that the proxy prints.
sub answer
{
	my ($self) = @_;

	$self->{timer}->start;
	$self->{harness}->pump until $self->{out} =~ s/^(.*)\n//;
	$self->{timer}->reset;
	return $1;
}

=pod

=item $proxy->command('throttle 1000')

Returns once the command is in force, with what the proxy answers after "ok".

=cut

sub command
{
	my ($self, $command) = @_;

	$self->{in} .= "$command\n";
	my $answer = $self->answer;
	die "proxy: $answer" unless $answer =~ s/^ok ?//;
	return $answer;
}

sub stop
{
	my ($self) = @_;
	my $harness = delete $self->{harness} or return;

	$self->{timer}->start;
	$self->{in} .= "quit\n";
	$harness->finish;
	return;
}

package PgFanout::Liar;

use strict;
use warnings;

our @ISA = ('PgFanout::Proxy');

=pod

=item PgFanout::Liar->new

A broker that lies, with port, uri(vhost) and command(); see test/lib/liar.
$liar->acked is the file with the message ids that it acked honestly.

=cut

sub new
{
	my ($class) = @_;
	my $self = bless { in => '', out => '' }, $class;

	$self->{acked} = PostgreSQL::Test::Utils::tempdir() . '/acked';
	$self->{timer} =
	  IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default);
	$self->{harness} = IPC::Run::start(
		[ "$PgFanout::lib/liar", '--acked', $self->{acked} ],
		'<', \$self->{in}, '>', \$self->{out}, $self->{timer});
	push @proxies, $self;
	$self->{port} = $self->answer;
	return $self;
}

sub acked { return $_[0]->{acked}; }

sub uri
{
	my ($self, $vhost) = @_;

	return "amqp://guest:guest\@127.0.0.1:$self->{port}/$vhost";
}

=pod

=back

=cut

1;
