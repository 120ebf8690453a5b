# What is delivered runs its handler once, in a transaction; what fails is tried
# again, waits, and is given up as declared, and costs only itself.

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

$node->safe_psql(
	'postgres', q(
create role app login;
grant usage on schema fanout to app;
grant create on schema public to app;
grant execute on function fanout.subscribe, fanout.unsubscribe, fanout.publish to app;
select fanout.declare_binding('t', 'g');
set role app;
create table log (n serial, message_id uuid, key text, sequence bigint, attempt int, role text, body jsonb);
create function handle(m fanout.message) returns void language plpgsql as $$
begin
    insert into log (message_id, key, sequence, attempt, role, body)
    values (m.message_id, m.key, m.sequence, m.attempt, current_user || '/' || session_user, m.body);
    if m.body ? 'fail' and m.attempt <= (m.body ->> 'fail')::int then
        raise exception 'attempt % of %', m.attempt, m.key using errcode = 'P0042';
    end if;
end $$;
));

# Runs SQL as the role that subscribes.
sub app
{
	my ($sql) = @_;

	return $node->safe_psql('postgres', $sql, extra_params => [ '-U', 'app' ]);
}

sub sql { return $node->safe_psql('postgres', $_[0]); }

sub wait_until
{
	my ($condition) = @_;

	$node->poll_query_until('postgres', "select $condition")
	  or die "not so: $condition\n"
	  . $node->safe_psql('postgres',
		'select * from fanout.stat_subscriptions; select * from fanout.delivery_failure; select count(*) from log'
	  );
	return;
}

sub stat
{
	my ($column, $group) = @_;
	$group ||= 'g';
	return sql("select $column from fanout.stat_subscriptions where consumer_group = '$group'");
}

# once, in order, as the role that subscribed
app(q(select fanout.subscribe('t', 'g', 'handle(fanout.message)', retry_delay => '100 ms', max_attempts => 3)));
sql(q(select fanout.publish('t', jsonb_build_object('n', i), key => (i % 10)::text) from generate_series(1, 1000) i));
wait_until('(select count(*) from log) >= 1000');
is(sql('select count(*), count(distinct message_id), min(role), max(role) from log'),
	'1000|1000|app/app|app/app', 'every message ran the handler once, as the role that subscribed');
is(sql('select count(*) from (select sequence < lag(sequence) over (partition by key order by n) as wrong from log) x where wrong'),
	'0', 'in order per key');
wait_until(q((select applied from fanout.stat_subscriptions) = 1000));
is($broker->count('t_g'), 0, 'and the queue is empty');

done_testing();
