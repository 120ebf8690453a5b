# A message with which the connection ends whenever it is sent: somebody on the way to the
# broker resets it, or the broker closes it.  It holds up its own topic, and nobody else's.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PgFanout::Independence;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker(private => 1);
my $proxy = $broker->proxy;
my $node = PgFanout::cluster('main', $proxy, conf => q(
pg_fanout.retry_interval = 200ms
pg_fanout.retry_limit = 3
));

sub sql { return $node->safe_psql('postgres', $_[0]); }

my @good = qw(good_1 good_2 good_3);
my @more = map { "bad_$_" } 1 .. 12;
sql("select fanout.declare_binding('$_', 'g', 'classic')") foreach @good, qw(bad worse), @more;
sql(q(select fanout.alter_topic('worse', on_exhausted => 'dead_letter')));
PgFanout::flush($node);

PgFanout::Independence::of($node, $broker);

# Messages of good topics, written all the time.
my $script = PostgreSQL::Test::Utils::tempdir() . '/good.sql';
append_to_file($script, join('', map { "select fanout.publish('$_', to_jsonb(nextval('n')), 'k' || :client_id);\n" } @good));
sql('create sequence n');
my $load = IPC::Run::start(
	[ 'pgbench', '-n', '-c', 3, '-R', 150, '-T', 600, '-f', $script, $node->connstr('postgres') ],
	'>', \my $out, '2>', \my $err, IPC::Run::timeout(600));

# Messages that were written after this call are sent.
sub good_flow
{
	my ($name) = @_;
	my $id = sql('select max(id) from fanout.outbox');

	ok($node->poll_query_until('postgres', qq(
		select count(distinct topic) = 3 from fanout.outbox_status where id > $id and topic ~ 'good' and state = 'sent')), $name)
	  or diag(PgFanout::status($node, 'postgres'));
	return;
}

# What others wait for is the next connection.
my %reconnecting = (within => 1000, longest => 5000);

# Its 1000 messages are written in one transaction, as many of each topic, the bad one in
# the middle.
sub publish_poison
{
	my (@topics) = @_;

	sql(join(';', map { qq(select fanout.publish('$_', case when i = 500 then '"POISON"' else to_jsonb(i) end, 'k' || i % 20) from generate_series(1, 1000) i) } @topics));
	return;
}

sub stalled
{
	my ($topic, $reason, $name) = @_;

	ok($node->poll_query_until('postgres',
		"select held = 501 and attempts >= 2 and reason ~ '$reason' from fanout.stat_topics where topic = '$topic'"), $name)
	  or diag(PgFanout::status($node, 'postgres'));
	return;
}

# What a queue has: a message that it has again counts where it came last.
sub in_order
{
	my ($topic, $expected, $name) = @_;
	my @messages = $broker->collect("${topic}_g", idle => 0.2);
	my %ids = map { $_->{message_id} => 1 } @messages;

	note "$topic: " . @messages . ' messages, ' . (@messages - keys %ids) . ' of them again';
	is(keys %ids, $expected, "$name: all messages are there");
	is(PgFanout::overtaken(@messages), 0, "$name: in order");
	return;
}

# ---- a connection that is reset ----

$proxy->command('cut-at POISON');
publish_poison('bad');
stalled('bad', 'connection was lost again and again', 'a topic with a message that ends the connection is stalled, and what comes before it is sent');
is_independent('a connection that is lost for a message', %reconnecting);
like(sql(q(select detail from fanout.check() where item = 'topic "bad" flows')), qr/connection was lost/, 'check() says why');
my $attempts = sql(q(select attempts from fanout.stat_topics where topic = 'bad'));
$node->poll_query_until('postgres', "select attempts > $attempts + 2 from fanout.stat_topics where topic = 'bad'") or die;
good_flow('other topics flow while it is tried again');
$proxy->command('pass');
sql(q(select fanout.resume('bad')));
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'bad'));
in_order('bad', 1000, 'once nobody minds the message any more');

# ---- a connection that the broker closes ----

$proxy->command('close-at 541 POISON');
publish_poison('bad', 'worse');
sql("select fanout.publish('$_', '\"POISON\"')") foreach @more;
PgFanout::poll(sub { sql(q(select count(*) = 13 from fanout.stat_topics where topic ~ 'bad' and reason ~ '541 refused')) eq 't' }, 'all of them to be found');
stalled('bad', '541 refused', 'a topic with a message for which the broker closes the connection is stalled');
is_independent('a connection that the broker closes for several messages', %reconnecting);
ok($node->poll_query_until('postgres', q(select count(*) = 1 from fanout.dead_letter)), 'with on_exhausted = dead_letter the message becomes a dead letter');
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'worse' and state <> 'dead'));
is(sql(q(select topic, payload, reason ~ '541 refused' from fanout.dead_letter)), 'worse|"POISON"|t', 'this one, and no other');
good_flow('other topics still go on');
in_order('worse', 999, 'all others of that topic arrive');
$proxy->command('pass');
sql(q(select fanout.resume(topic) from fanout.stat_topics where topic ~ 'bad'; select fanout.redrive()));
PgFanout::wait_for_state($node, 'sent', where => q(topic ~ 'bad|worse'));
in_order('bad', 1000, 'once the broker takes it');
# beside what may have come again
ok((grep { $_->{body} =~ /POISON/ } $broker->collect('worse_g', expect => 1)), 'so is the dead letter when it is redriven');

# ---- a declaration with which the connection is reset ----

$proxy->command('cut-at bad_nasty');
sql(q(select fanout.declare_binding('bad', 'nasty', 'classic')));
ok($node->poll_query_until('postgres', q(select last_error ~ 'declare queue "bad_nasty": the connection was lost each time' from fanout.bindings where queue = 'bad_nasty')),
	'a queue whose declaration ends the connection is an error of its binding');
$attempts = sql(q(select attempts from fanout.stat_topics where topic = 'bad'));
$node->poll_query_until('postgres', "select attempts > $attempts from fanout.stat_topics where topic = 'bad'") or die;
good_flow('other topics go on');
$proxy->command('pass');
$node->poll_query_until('postgres', q(select state = 'declared' from fanout.bindings where queue = 'bad_nasty')) or die;
ok(1, 'it is declared once nobody minds');

# ---- the same, while messages of another topic are not confirmed ----

# They are in flight whenever the connection is lost, and on trial for it in the end.  The
# queue is the last of many to be declared, so that they are published before.
sql(q(select fanout.declare_binding('mute', 'g', 'classic'); select fanout.declare_binding('sick', 'g' || i, 'classic') from generate_series(10, 29) i));
PgFanout::flush($node);
$broker->message_store('suspend');
sql(q(select fanout.publish('mute', to_jsonb(repeat('x', 10000)))));
$node->poll_query_until('postgres', q(select in_flight > 0 from fanout.stat_publisher)) or die;
$proxy->command('cut-at sick_nasty');
sql(q(select fanout.declare_binding('sick', 'nasty', 'classic')));
ok($node->poll_query_until('postgres', q(select last_error ~ 'declare queue "sick_nasty": the connection was lost each time' from fanout.bindings where queue = 'sick_nasty')),
	'messages that are not confirmed: a queue whose declaration ends the connection is an error of its binding')
  or diag(PgFanout::status($node, 'postgres'));
good_flow('messages that are not confirmed: other topics go on');
$proxy->command('pass');
$broker->message_store('resume');
$node->poll_query_until('postgres', q(select state = 'declared' from fanout.bindings where queue = 'sick_nasty')) or die;
unlike(slurp_file($node->logfile), qr/topic "mute" is stalled/, 'messages that are not confirmed: they are not blamed');
PgFanout::Independence::end();

# ---- connections that are lost for other reasons ----

unlike(slurp_file($node->logfile), qr/topic "good_\d" is stalled/, 'no other topic was stalled meanwhile, not for a moment');
my $offset = -s $node->logfile;
foreach my $how (qw(reset kill restart reset stop))
{
	$how eq 'reset' ? $proxy->command($how) : $broker->$how;
	$broker->start if $how =~ /kill|stop/;
	# one that is lost before anything else is confirmed may be the fault of what was sent
	my $confirmed = sql('select confirmed from fanout.stat_publisher');
	$node->poll_query_until('postgres', "select confirmed > $confirmed + 50 from fanout.stat_publisher") or die;
}
$proxy->command('pass');
good_flow('after losses of the connection that are no message\'s fault');
unlike(slurp_file($node->logfile, $offset), qr/lost again and again/, 'no topic is blamed for them');

$load->signal('TERM');
$load->finish;
PgFanout::flush($node);
foreach my $topic (@good)
{
	in_order($topic, sql("select count(*) from fanout.outbox_status where topic = '$topic'"), $topic);
}

# ---- a declaration that is refused while the topic is being tried again ----

# A message is refused, so that its topic is stalled; tried again it is not confirmed,
# because the broker does not write it.  Then the connection is lost.
sql(q(select fanout.declare_binding('probed', 'g', 'classic')));
PgFanout::flush($node);
$broker->ctl('set_policy', '-p', $broker->vhost, '--apply-to', 'queues', 'full', '^probed_g$', '{"max-length": 0, "overflow": "reject-publish"}');
sql(q(select fanout.publish('probed', to_jsonb(repeat('x', 10000)))));
$node->poll_query_until('postgres', q(select reason ~ '^nacked' from fanout.stat_topics where topic = 'probed')) or die;
$broker->message_store('suspend');
$broker->ctl('clear_policy', '-p', $broker->vhost, 'full');
ok($node->poll_query_until('postgres', q(select reason ~ '^nacked' and in_flight = 1 from fanout.stat_topics, fanout.stat_publisher where topic = 'probed')), 'a topic is tried again');
$broker->permit('guest', '^(?!probed)');
$proxy->command('reset');
ok($node->poll_query_until('postgres', q(select reason ~ '403' from fanout.stat_topics where topic = 'probed')),
	'a topic that was being tried again is refused when its declaration is');
$broker->permit('guest');
$broker->message_store('resume');
PgFanout::wait_for_state($node, 'sent', where => q(topic = 'probed'));
ok(1, 'and goes on by itself when it is not any more');

is(sql(q(select count(*) from fanout.dead_letter)), 0, 'nothing else was given up');

done_testing();
