# A backfill reads a table while its entry in the server's cache of relations is built
# anew: by ANALYZE, GRANT, or anything else that changes the catalogs.
#
# The type is that of busy_type.c, whose output function runs a command.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $library = PostgreSQL::Test::Utils::tempdir() . '/busy_type.so';
my $pg_config = $ENV{PG_CONFIG} || 'pg_config';
my $headers = PgFanout::run_command_ok($pg_config, '--includedir-server') =~ s/\n//r;
PgFanout::run_command_ok('cc', '-Wall', '-shared', '-fPIC', "-I$headers", '-o', $library, "$PgFanout::lib/busy_type.c");

my $node = PgFanout::cluster('main', PgFanout::broker());

sub sql { return $node->safe_psql('postgres', $_[0]); }

# What is freed of the entry is written over by those of other tables, whose parts are as large.
sql(qq(
create function busy_in(cstring) returns busy language c immutable strict as '$library';
create function busy_out(busy) returns cstring language c stable strict as '$library';
create type busy (input = busy_in, output = busy_out, like = text);
) . q(
create function nothing() returns trigger language plpgsql as 'begin return new; end';
create procedure change_catalogs() language plpgsql as $$
begin
	grant select on public.items to public;
	for i in 1 .. 100 loop
		execute format('select from public.another_table_%s', i);
	end loop;
end $$;
create procedure make_tables() language plpgsql as $$
begin
	for i in 1 .. 100 loop
		execute format('create table another_table_%s (id int primary key)', i);
	end loop;
end $$;
call make_tables();
alter database postgres set "busy.command" = 'call public.change_catalogs()';
));
foreach my $triggers (0 .. 5)
{
	sql(q(drop table if exists items; create table items (id int primary key, b busy);
		insert into items select i, busy_in(textout('value ' || i)) from generate_series(1, 20) i;));
	sql("create trigger t$_ before update on items for each row execute function nothing()") foreach 1 .. $triggers;
	sql(qq(select fanout.declare_binding('item_$triggers', 'g'); select fanout.capture('items', 'item_$triggers');
		select fanout.backfill('items', 'item_$triggers', 'g')));
	ok( $node->poll_query_until('postgres', q(select bool_and(state = 'done') from fanout.backfills)),
		"a table with $triggers triggers of others is read to its end");
	is( sql(qq(select count(distinct o.key), count(*) filter (where o.payload::jsonb #>> '{after,b}' = 'value ' || o.key)
			from fanout.outbox o join fanout.topic t using (topic_id) where t.topic = 'item_$triggers' and o.headers ->> 'op' = 'r')),
		'20|20', 'each row is sent as it is');
	# the command runs once in a process
	sql(q(select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'pg_fanout history'));
}
$node->stop('fast');

done_testing();
