-- what holds of every object of the extension; each query lists what breaks the rule
\c postgres
set client_min_messages = warning;
drop database if exists fanout_catalog;
create database fanout_catalog template template0 encoding 'UTF8';
\c fanout_catalog
-- where everybody is granted everything by default, what counts is REVOKE
alter default privileges grant execute on functions to public;
alter default privileges grant all on tables to public;
alter default privileges grant all on sequences to public;
alter default privileges grant all on schemas to public;
create extension pg_fanout;

create temp view member as
select classid, objid, pg_describe_object(classid, objid, 0) as object
from pg_depend
where refclassid = 'pg_extension'::regclass and deptype = 'e'
  and refobjid = (select oid from pg_extension where extname = 'pg_fanout');
-- the queries below would find nothing in an empty list
select count(*) > 40 as functions_are_listed from member where classid = 'pg_proc'::regclass;
select count(*) > 20 as relations_are_listed from member where classid = 'pg_class'::regclass;
-- everything that is in the schema belongs to the extension
select p.oid::regprocedure as not_a_member from pg_proc p
where pronamespace = 'fanout'::regnamespace and not exists (select from member where objid = p.oid);
select c.oid::regclass as not_a_member from pg_class c
where relnamespace = 'fanout'::regnamespace and relkind not in ('i', 'I', 'c')
  and not exists (select from member where objid = c.oid);

-- what becomes of captured tables is seen whatever command does it
select evtname, evtevent, evtenabled, evttags from pg_event_trigger where evtname like 'pg_fanout%' order by 1;

-- No function looks up names as the caller says, above all none that runs as
-- its owner.  C alone needs no search_path: it looks nothing up by name, or
-- sets one itself.
select p.oid::regprocedure as search_path_of_the_caller from pg_proc p
join member on classid = 'pg_proc'::regclass and objid = p.oid
where (prosecdef or prolang not in (select oid from pg_language where lanname = 'c'))
  and prosqlbody is null
  and not coalesce('search_path=pg_catalog, pg_temp' = any (proconfig), false);
select p.oid::regprocedure as of_another_language, lanname from pg_proc p
join member on classid = 'pg_proc'::regclass and objid = p.oid
join pg_language l on l.oid = prolang where lanname not in ('c', 'sql', 'plpgsql');
select p.oid::regprocedure as not_from_our_library, probin from pg_proc p
join member on classid = 'pg_proc'::regclass and objid = p.oid
where probin <> '$libdir/pg_fanout';

-- what views, defaults, constraints and triggers refer to is ours or the
-- server's (which pg_depend does not mention), wherever CREATE EXTENSION was run
select pg_describe_object(d.classid, d.objid, 0) as object,
       pg_describe_object(d.refclassid, d.refobjid, d.refobjsubid) as refers_to_what_is_not_ours
from pg_depend d
where d.deptype in ('n', 'a', 'i')
  and exists (select from pg_depend u join member m on (u.refclassid, u.refobjid) = (m.classid, m.objid)
              where (u.classid, u.objid) = (d.classid, d.objid) and u.deptype in ('n', 'a', 'i')
                and u.classid in ('pg_rewrite'::regclass, 'pg_attrdef'::regclass, 'pg_constraint'::regclass, 'pg_trigger'::regclass))
  and not exists (select from member m where (m.classid, m.objid) = (d.refclassid, d.refobjid))
  and d.refclassid not in ('pg_namespace'::regclass, 'pg_constraint'::regclass);

-- what is updated and deleted can be so while all tables are published; the ledger never is
select c.oid::regclass as without_replica_identity from pg_class c
join member on classid = 'pg_class'::regclass and objid = c.oid
where relkind = 'r' and relreplident = 'd' and relname !~ '^sent_' and not exists (select from pg_index where indrelid = c.oid and indisprimary);

-- what belongs to a subscription ends when that is deleted
select a.attrelid::regclass as stays_without_subscription from pg_attribute a
join member on classid = 'pg_class'::regclass and objid = attrelid
join pg_class c on c.oid = attrelid
where relkind = 'r' and attname = 'subscription_id' and c.relname <> 'subscription'
  and not (select prosrc from pg_proc where oid = 'fanout.forget_subscriptions()'::regprocedure) ~ ('\m' || c.relname || '\M');

-- PUBLIC may do nothing, but what the server asks of whoever writes to a captured table
select 'schema ' || n.oid::regnamespace as open_to_public, privilege_type
from pg_namespace n, aclexplode(coalesce(nspacl, acldefault('n', nspowner))) where n.nspname = 'fanout' and grantee = 0
union all
select 'function ' || p.oid::regprocedure, privilege_type
from pg_proc p join member on classid = 'pg_proc'::regclass and objid = p.oid,
     aclexplode(coalesce(proacl, acldefault('f', proowner))) where grantee = 0
union all
select 'relation ' || c.oid::regclass, privilege_type
from pg_class c join member on classid = 'pg_class'::regclass and objid = c.oid,
     aclexplode(coalesce(relacl, acldefault(case relkind when 'S' then 's' else 'r' end::"char", relowner))) where grantee = 0
union all
select 'column ' || attrelid::regclass || '.' || attname, privilege_type
from pg_attribute join member on classid = 'pg_class'::regclass and objid = attrelid,
     aclexplode(attacl) where grantee = 0;

-- every object has a comment; types of tables and of arrays go with theirs
select object as without_comment from member
where obj_description(objid, classid::regclass::name) is null
  and not (classid = 'pg_type'::regclass and exists (
      select from pg_type t left join pg_class c on c.oid = t.typrelid
      where t.oid = objid and (t.typelem <> 0 or c.relkind <> 'c')))
order by object collate "C";
-- as has every column that others than the owner are meant to read
select attrelid::regclass || '.' || attname as without_comment from pg_attribute
join member on classid = 'pg_class'::regclass and objid = attrelid
join pg_class c on c.oid = attrelid
where attnum > 0 and not attisdropped and relkind = 'v'
  and obj_description(attrelid, 'pg_class') not like 'internal:%'
  and col_description(attrelid, attnum) is null
order by attrelid::regclass::text collate "C", attnum;

-- tables whose rows are changed again and again are cleaned up soon, however many rows they have
select c.oid::regclass as relation, unnest(reloptions) as option from pg_class c
where relnamespace = 'fanout'::regnamespace and exists (select from unnest(reloptions) o where o ~ '^autovacuum') order by 1, 2;

\c postgres
drop database fanout_catalog;
