# The inbox: what was applied is recognised, whoever wrote it and however many there
# are, and to look that up costs the same in an inbox that nobody has analyzed.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../lib";

use List::Util qw(shuffle);
use PgFanout;
use PostgreSQL::Test::Utils;
use Test::More;

my $broker = PgFanout::broker();
my $node = PgFanout::cluster('main', $broker, conf => "log_statement = none\nautovacuum = off");

sql(q(
create table log (message_id uuid, n int);
create function note(m fanout.message) returns void language sql as
	$$ insert into public.log values (m.message_id, (m.body ->> 'n')::int) $$;
select fanout.declare_binding(t, 'g') from unnest('{many,foreign}'::text[]) t));

# ---- messages of a publisher of pg_fanout ----

my ($many, $few) = (20000, 300);
sql(q(select count(fanout.publish('many', jsonb_build_object('n', 0))) from generate_series(1, 600) i));
PgFanout::flush($node);
sql(q(select fanout.subscribe('many', 'g', 'note(fanout.message)', prefetch => 200)));
applied('many', 600);
sql(q(select fanout.publish('many', '{"n": 0}')));
applied('many', 601);
sql(qq(select count(fanout.publish('many', jsonb_build_object('n', i))) from generate_series(1, $many) i));
$many += 601;
applied('many', $many);
sql(qq(do \$\$ begin
	for i in 1 .. $few loop
		perform fanout.publish('many', jsonb_build_object('n', i));
		commit;
		perform pg_sleep(0.003);
	end loop; end \$\$));
$many += $few;
applied('many', $many);
sql(q(select fanout.unsubscribe('many', 'g')));		# its worker reports what it has read when it ends
PgFanout::poll(sub { sql("select count(*) from pg_stat_activity where backend_type ~ 'consumer'") == 0 }, 'the end of the worker');
my ($read, $scanned) = split(/\|/, sql(q(select coalesce(sum(idx_tup_read), 0), coalesce(sum(seq_tup_read), 0)
	from pg_stat_all_tables t join pg_stat_all_indexes using (relid) where t.relname ~ '^inbox_[0-9]$')));
cmp_ok($read + $scanned, '<', $many, "an inbox that was never analyzed is not read again and again: $read rows by index, $scanned by scans");

# ---- messages of others: their ids are in no order ----

my $foreign = 5000;
my $file = "$PostgreSQL::Test::Utils::tmp_check/lines";
PostgreSQL::Test::Utils::append_to_file($file, join("\n", shuffle map { (qq({"n": $_})) x 2 } 1 .. $foreign));
sql(q(select fanout.subscribe('foreign', 'g', 'note(fanout.message)', prefetch => 1000)));
$broker->amqp('publish', '--exchange', 'foreign', '--confirm', '--line-ids', '--lines', $file);
PgFanout::poll(sub { sql(q(select applied + skipped from fanout.stat_subscriptions where topic = 'foreign')) == 2 * $foreign },
	'all that others have published');
is(sql(q(select applied, skipped from fanout.stat_subscriptions where topic = 'foreign')), "$foreign|$foreign",
	'a message that others publish twice is applied once');
is(sql(qq(select count(*), count(distinct message_id) from log where message_id in (select message_id from fanout.inbox))),
	($many + $foreign) . '|' . ($many + $foreign), 'and all were applied');

# ---- an inbox that cannot be looked into ----

sql(q(alter table fanout.inbox drop constraint inbox_pkey));
my $known = sql('select count(*) from log where n = 1');
$broker->amqp('publish', '--exchange', 'foreign', '--confirm', '--line-ids', '{"n": 1}');
$broker->amqp('publish', '--exchange', 'foreign', '--confirm', '--line-ids', '{"n": -1}');
PgFanout::poll(sub { slurp_file($node->logfile) =~ /the primary key of table "fanout\.inbox_\d" was altered/ },
	'a line in the log');
pass('without its primary key the log says what was altered');
is(sql(q(select count(*) from log where n = -1)), 0, 'and nothing is applied');
sql(q(alter table fanout.inbox add primary key (message_id, inbox_id, segment)));
is(sql(q(select count(*) from log where n = -1)), 0, 'nor with one in another order');
sql(q(alter table fanout.inbox drop constraint inbox_pkey; alter table fanout.inbox add primary key (inbox_id, message_id, segment)));
PgFanout::poll(sub { sql('select count(*) from log where n = -1') == 1 }, 'what waited');
is(sql(q(select count(*) from log where n = 1)), $known, 'once it is there again, all goes on, and what was applied is known');

done_testing();

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

sub applied
{
	my ($topic, $n) = @_;

	PgFanout::poll(sub { sql("select count(*) from fanout.stat_subscriptions where topic = '$topic' and connected_to is not null and applied = $n") == 1 },
		"$n messages of $topic");
	return;
}
