# Consuming lends nobody rights that he has not got: no code that the owner of a
# table has put on it runs as a superuser who keeps it in sync, and a queue is
# consumed by those alone who were told so.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => q(
log_statement = none
max_worker_processes = 24
));

# ---- triggers of a table in sync ----

sql(q(
create role bob login;
create role eve login;
create schema bob authorization bob;
grant usage on schema bob to eve;
grant usage on schema fanout to bob, eve;
create table source (id int primary key, name text);
select fanout.declare_binding('users', 'g');
select fanout.capture('source', 'users')));
as('bob', q(
create table bob.users (id int primary key, name text);
create function bob.escalate() returns trigger language plpgsql as $$
begin
	begin
		execute 'alter role bob superuser';
	exception when insufficient_privilege then null;
	end;
	new.name = new.name || ' by ' || current_user;
	return new;
end $$;
create trigger escalate before insert on bob.users for each row execute function bob.escalate()));
sql(q(select fanout.sync_table('users', 'g', 'bob.users')));
sql(q(insert into source values (0, 'Eva')));
wait_until('(select count(*) = 1 from bob.users)');
is(sql('select name from bob.users') . sql(q(select rolsuper from pg_roles where rolname = 'bob')), 'Eva by bobf',
	'triggers of a table that a superuser keeps in sync run as the table\'s owner');
sql(q(select fanout.unsubscribe('users', 'g')));
sql(q(grant execute on function fanout.sync_table, fanout.sync_messages, fanout.unsubscribe to bob, eve));
like(error('bob', q(select fanout.sync_table('users', 'g', 'bob.users'))), qr/permission denied for queue "users_g".*grant_topic/s,
	'its owner needs to be told that he may consume the queue');
sql(q(select fanout.grant_topic('users', 'bob', consumer_group => 'g')));
as('bob', q(select fanout.sync_table('users', 'g', 'bob.users')));
sql(q(insert into source values (1, 'Ann')));
wait_until('(select count(*) = 2 from bob.users)');
is(sql('select name from bob.users where id = 1'), 'Ann by bob', 'and so they do if he keeps it himself');
as('bob', q(grant select, insert, update, delete, trigger on bob.users to eve));
sql(q(select fanout.grant_topic('users', 'eve')));
like(error('eve', q(select fanout.sync_table('users', 'h', 'bob.users'))), qr/permission denied to act as the owner|must be|owner/,
	'a role with rights on the table that is no member of its owner cannot keep it');

# ---- the chapter of README on a role that consumes ----

my ($block) = slurp_file("$FindBin::RealBin/../../README.md") =~ /^A role that consumes.*?```sql\n(.*?)```/ms;
sql(q(create role service login; create schema service authorization service; select fanout.declare_binding('exchange_user', 'consumer_org_rpc'),
	fanout.declare_binding('exchange_group', 'consumer_org_rpc')));
sql($block);
as('service', q(
create function service.fail(m fanout.message) returns void language plpgsql as $$ begin raise exception 'fails'; end $$;
select fanout.subscribe('exchange_user', 'consumer_org_rpc', 'service.fail(fanout.message)', retry_delay => '1 h', max_retry_delay => '1 h')));
like(error('service', q(select fanout.subscribe('exchange_group', 'consumer_org_rpc', 'service.fail(fanout.message)'))), qr/permission denied for queue/,
	'a role that consumes may consume what it was told, and nothing else');
sql(q(select fanout.publish('exchange_user', '{"secret": 1}')));
wait_until(q((select count(*) = 1 from fanout.delivery_failure where topic = 'exchange_user')));
is(as('service', 'select topic, payload::jsonb from fanout.delivery_failure'), 'exchange_user|{"secret": 1}', 'it sees its own failures');
is(as('service', 'select topic, waiting from fanout.stat_subscriptions order by 1'), "exchange_user|1\nusers|0", 'and what its worker does');
sql('grant select on fanout.delivery_failure to eve; grant execute on function fanout.retry, fanout.skip, fanout.pause, fanout.alter_subscription to eve');
is(as('eve', 'select count(*) from fanout.delivery_failure'), '0', 'another role sees none of them');
like(error('eve', $_), qr/permission denied for subscription/, "nor can it: $_")
  foreach q(select fanout.retry('exchange_user', 'consumer_org_rpc')), q(select fanout.skip('exchange_user', 'consumer_org_rpc', gen_random_uuid())),
  q(select fanout.pause('exchange_user', 'consumer_org_rpc')), q(select fanout.alter_subscription('exchange_user', 'consumer_org_rpc', prefetch => 1)),
  q(select fanout.unsubscribe('exchange_user', 'consumer_org_rpc'));
is(as('service', q(select fanout.retry('exchange_user', 'consumer_org_rpc'))), 1, 'it retries what failed');
as('service', q(select fanout.pause('exchange_user', 'consumer_org_rpc'); select fanout.resume('exchange_user', 'consumer_org_rpc');
	select fanout.unsubscribe('exchange_user', 'consumer_org_rpc')));
is(sql(q(select count(*) from fanout.subscriptions where topic = 'exchange_user')), '0', 'and ends it');

# ---- the blocks for roles that declare, capture and publish ----

my $readme = slurp_file("$FindBin::RealBin/../../README.md");
my ($declares) = $readme =~ /^A role that declares topology.*?```sql\n(.*?)```/ms;
my ($publishes) = $readme =~ /^A role that publishes events by hand.*?```sql\n(.*?)```/ms;
sql('create role developer login; create schema developer authorization developer; create role application login');
sql($declares);
sql($publishes);
as('developer', q(
create table developer.thing (id int primary key);
select fanout.declare_bindings('{"things": ["a", "b"]}');
select fanout.capture('developer.thing', 'things');
insert into developer.thing values (1);
select fanout.uncapture('developer.thing');
select fanout.drop_binding('things', 'a', false, false)));
like(as('application', q(select fanout.publish('exchange_user', '{"by": "hand"}'))), qr/^[0-9a-f-]{36}$/, 'a role that publishes may publish to its topic');
like(error('application', q(select fanout.publish('things', '{}'))), qr/permission denied for topic "things".*grant_topic\('things', 'application', '\{publish\}'\)/s, 'and to no other');
like(error('developer', q(select fanout.publish('things', '{}'))), qr/permission denied for function publish/, 'a role that declares and captures does not publish');
sql(q(grant execute on function fanout.publish to developer));
like(error('developer', q(select fanout.publish('things', '{}'))), qr/permission denied for topic/, 'nor with EXECUTE alone');
sql(q(select fanout.revoke_topic(null, 'developer', '{declare,capture}')));
like(error('developer', q(create trigger t after insert on developer.thing for each row execute function fanout.capture_trigger('things'))),
	qr/permission denied for topic "things"/, 'what was granted is taken back');
is(sql(q(set role developer; create table developer.other (id int); create function developer.f() returns trigger language plpgsql as 'begin return new; end';
	create trigger t before insert on developer.other for each row execute function developer.f(); insert into developer.other values (1) returning id)), 1,
	'other triggers are nobody\'s business');

# ---- the guides of README on rows that exist already ----

$node->safe_psql('postgres', 'create database guides');
guides(q(
create extension pg_fanout;
create table users (id int primary key, name text);
insert into users select i, 'user ' || i from generate_series(1, 10) i;
select fanout.declare_binding('exchange_user', 'consumer_org_rpc'), fanout.capture('users', 'exchange_user');
insert into users values (11, 'user 11')));
PgFanout::flush($node, dbname => 'guides');
my $sent = $broker->count('exchange_user_consumer_org_rpc');
guides(guide('A new service joins'));
$node->poll_query_until('guides', q(select count(*) = 1 from fanout.backfills where state = 'done')) or die 'the backfill is not done';
PgFanout::flush($node, dbname => 'guides');
my %keys = map { $_->{headers}->{op} ? ($_->{headers}->{key} => 1) : () } $broker->collect('exchange_user_consumer_new', expect => 11);
is(join(' ', sort { $a <=> $b } keys %keys), join(' ', 1 .. 11), 'a new service joins, as README says, and gets every row');
is($broker->count('exchange_user_consumer_org_rpc'), $sent, 'others notice nothing');
my ($replay, $rows) = guide('A queue was lost');
guides($replay);
PgFanout::poll(sub { PgFanout::flush($node, dbname => 'guides'); $broker->count('exchange_user_consumer_org_rpc') > $sent }, 'what was sent before is sent again');
pass('a queue was lost: README sends again what it had');
guides($rows =~ s/^truncate users;.*\n//r);
$node->poll_query_until('guides', q(select count(*) = 2 from fanout.backfills where state = 'done' and finished_at is not null and kind = 'backfill')) or die 'the backfill is not done';
pass('or all rows');

done_testing();

sub guides { return $node->safe_psql('guides', $_[0]); }

# The statements that README has in a chapter.
sub guide
{
	my ($title) = @_;
	my ($chapter) = slurp_file("$FindBin::RealBin/../../README.md") =~ /^#### \Q$title\E\n(.*?)^#/ms;
	my @blocks = $chapter =~ /^```sql\n(.*?)^```/gms;

	return wantarray ? @blocks : $blocks[0];
}

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub as { return $node->safe_psql('postgres', $_[1], extra_params => [ '-U', $_[0] ]); }

sub error
{
	my ($role, $sql) = @_;
	my $stderr = '';

	$node->psql('postgres', $sql, stderr => \$stderr, extra_params => [ '-U', $role ]);
	return $stderr;
}

sub wait_until
{
	my ($condition) = @_;

	$node->poll_query_until('postgres', "select coalesce($condition, false)")
	  or die "not so: $condition\n" . sql('select * from fanout.stat_subscriptions; select * from fanout.delivery_failure limit 20');
	return;
}
