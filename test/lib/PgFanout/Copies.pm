
=pod

=head1 NAME

PgFanout::Copies - tables and their copies in one database

=head1 SYNOPSIS

  PgFanout::Copies::of($node, $broker);
  copied('t', 'id int primary key, x int');         # t, captured, and t_copy
  copied('u', $columns, 'row', q("where" => 'x > 1'), q(source => 'public.u'));
  sql('insert into t values (1, 1)');
  equal('t', 'a row');

=cut

package PgFanout::Copies;

use strict;
use warnings;

use Exporter 'import';
use PgFanout;
use Test::More;

our @EXPORT = qw(sql copied rows equal stat_of dead settled);

my ($node, $broker);

# Says which server and broker all the others are about.
sub of
{
	($node, $broker) = @_;
	return;
}

sub sql
{
	my ($sql) = @_;

	return $node->safe_psql('postgres', $sql);
}

# A table and its copy.
sub copied
{
	my ($table, $columns, $format, $capture, $sync) = @_;

	$format ||= 'debezium';
	$capture = $capture ? ", $capture" : '';
	$sync = $sync ? ", $sync" : '';
	sql(qq(
create table $table ($columns);
create table ${table}_copy (like $table including all);
select fanout.declare_topic('$table', '$format'); select fanout.declare_binding('$table', 'g');
select fanout.capture('$table', '$table'$capture);
select fanout.sync_table('$table', 'g', '${table}_copy'$sync);
));
	return;
}

sub rows
{
	my ($table) = @_;

	return sql("select string_agg(t::text, ' ' order by t) from $table t");
}

# Waits until the copy is equal to the table.
sub equal
{
	my ($table, $name, $columns) = @_;
	my $list = 'select ' . ($columns || '*') . ' from %s order by 1, 2';
	my ($there, $here) = (sql(sprintf($list, $table)), '');

	PgFanout::flush($node);
	eval {
		PgFanout::poll(sub { $here = sql(sprintf($list, "${table}_copy")); return $here eq $there; }, $name);
	};
	is($here, $there, "$name: equal")
	  or diag(sql('select * from fanout.delivery_failure limit 3'), "\n", sql('select topic, reason from fanout.dead_letter limit 3'));
	return;
}

sub stat_of
{
	my ($topic, $group, $column) = @_;

	return sql("select $column from fanout.stat_subscriptions where topic = '$topic' and consumer_group = '$group'");
}

sub dead
{
	my ($topic) = @_;

	return sql("select count(*) from fanout.dead_letter where topic = '$topic' and consumer_group is not null");
}

# Waits until all that was published has been handled.
sub settled
{
	my ($topic, $group) = @_;

	PgFanout::flush($node);
	PgFanout::poll(
		sub {
			$broker->left("${topic}_$group") == 0
			  && stat_of($topic, $group, 'delivered = applied + skipped + dead and waiting = 0 and applied > 0') eq 't';
		},
		"the end of ${topic}_$group");
	return;
}

1;
