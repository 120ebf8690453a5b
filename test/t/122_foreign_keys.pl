# Foreign keys between copies: their messages come in two queues, in whatever order.
# What waits for a row that is gone by now at the source, or for one to go that has come
# again, waits no longer once a later message of its own row is there.

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
max_worker_processes = 20
));
my $options = "retry_delay => '100 ms', max_retry_delay => '200 ms', max_attempts => 1";

$node->safe_psql('postgres', 'create database copy');
copy('create extension pg_fanout');
source(q(
create table p (id int primary key, x int);
create table c (id int primary key, p int references p on update cascade, x int);
select fanout.declare_binding(t, 'g'), fanout.capture(t::regclass, t) from unnest('{p,c}'::text[]) t));
copy(qq(
create table p (id int primary key, x int, note text);
create table c (id int primary key, p int references p on update cascade, x int);
select fanout.sync_table(t, 'g', t::regclass, $options) from unnest('{p,c}'::text[]) t));
source('insert into p values (1, 1), (2, 1); insert into c values (10, 2, 1)');
equal('first rows');
copy(q(update p set note = 'local'));

# the row it refers to has another key by now

copy(q(select fanout.pause('c', 'g')));
source('insert into c values (1, 1, 1), (3, 1, 1); update p set id = 8 where id = 1; update c set x = 2 where id = 1; update c set id = 4 where id = 3');
wait_for('(select count(*) from p where id = 8) = 1', 'the parent');
copy(q(select fanout.resume('c', 'g')));
equal('a row that refers to one whose key was changed since');
is(copy('select note from p where id = 8'), 'local', 'the other row is the same');

# it refers to a row that is gone

copy(q(select fanout.pause('c', 'g')));
source('insert into p values (3, 1); insert into c values (5, 3, 1), (6, 3, 1); update c set p = null where id = 5; delete from c where id = 6; delete from p where id = 3; insert into p values (4, 1)');
wait_for('(select array_agg(id order by id) from p) = array[2, 4, 8]', 'the parents');
copy(q(select fanout.resume('c', 'g')));
equal('rows that referred to one that was deleted since');

# all are gone by now

source('delete from c');
equal('no rows');
copy(q(select fanout.pause('c', 'g')));
source('insert into p values (30, 1), (31, 1); insert into c values (30, 30, 1), (31, 31, 1); update c set id = 32 where id = 31; truncate p, c; insert into p values (2, 1), (32, 1); insert into c values (10, 2, 1)');
wait_for('(select array_agg(id order by id) from p) = array[2, 32]', 'the parents after a TRUNCATE');
copy(q(select fanout.resume('c', 'g')));
equal('rows that were there before a TRUNCATE');

# another table of the topic has the same key

source(q(create table other (id int primary key); select fanout.capture('other', 'c')));
copy(q(select fanout.pause('p', 'g')));
source('insert into p values (40, 1); insert into c values (40, 40, 1); insert into other values (40); truncate other; insert into c values (41, 2, 1)');
wait_for('exists (select from c where id = 41) or (select waiting >= 3 from fanout.stat_subscriptions where topic = $$c$$)', 'the others');
wait_for(q(exists (select from fanout.delivery_failure where key = '40' and attempts = 0)), 'a message that waits');
copy(q(select fanout.resume('p', 'g')));
equal('a row behind which another table of the topic has a message');

# a row that is referred to goes, and comes again

copy(q(select fanout.pause('p', 'g')));
source('delete from c where p = 2; delete from p where id = 2; insert into p values (2, 7); insert into c values (11, 2, 1)');
wait_for('exists (select from c where id = 11)', 'the child');
copy(q(select fanout.resume('p', 'g')));
equal('a row that was deleted and came again, while others refer to it');

# one that has no later message waits for what is to come

copy(q(select fanout.pause('p', 'g')));
source('insert into p values (20, 1); insert into c values (20, 20, 1); update c set x = 2 where id = 11');
wait_for('exists (select from c where id = 11 and x = 2)', 'other rows');
wait_for(q(exists (select from fanout.delivery_failure where key = '20')), 'a message that waits');
copy(q(select fanout.resume('p', 'g')));
equal('a row that is there before the one that it refers to');

# one that refuses for another reason is not passed over

copy('alter table c add check (x <> 99)');
source('update c set x = 99 where id = 11; update c set x = 3 where id = 11');
wait_for('(select count(*) from fanout.dead_letter) = 1', 'a dead letter');
equal('what came behind a message that was given up');
is(copy('select sqlstate from fanout.dead_letter'), '23514', 'a message that fails for another reason is given up, and told');

$node->stop('fast');
done_testing();

sub source { return $node->safe_psql('postgres', $_[0]); }
sub copy { return $node->safe_psql('copy', $_[0]); }

sub wait_for
{
	my ($condition, $what) = @_;

	PgFanout::poll(sub { copy("select $condition") eq 't' }, sub { "$what: " . told() });
	return;
}

sub told
{
	return join "\n", copy('select * from fanout.stat_subscriptions'), copy('select topic, key, attempts, postponed, next_try, error from fanout.waiting join fanout.subscription using (subscription_id)');
}

sub equal
{
	my ($what) = @_;
	my $p = q(select coalesce(string_agg(row(id, x)::text, ' ' order by id), '') from p);
	my $c = q(select coalesce(string_agg(row(id, p, x)::text, ' ' order by id), '') from c);
	my $there = source($p) . ' / ' . source($c);

	PgFanout::poll(sub { copy($p) . ' / ' . copy($c) eq $there }, sub { "$what: $there, here " . copy($p) . ' / ' . copy($c) . told() });
	PgFanout::poll(sub { copy('select count(*) from fanout.waiting') == 0 }, sub { "$what, nothing waits: " . told() });
	pass($what);
	return;
}
