/*-------------------------------------------------------------------------
 *
 * textform.c
 *		The text of a value, the same to and from every session.
 *
 * Calls types' output functions under fixed settings, whatever those of the
 * session are: ISO dates, UTC, postgres intervals, shortest exact floats, hex
 * bytea, the C locale's money, and names of objects with their schema unless
 * that is pg_catalog.  Also fixes the settings under which input functions read
 * these texts back to the equal value.
 *
 * It knows which built-in output functions depend on which settings.  They are
 * recognised by their address, not by their type, so that a user's type made
 * of such a function (language internal as 'regclassout', citext's textout) is
 * treated as what it is.  Functions that are not listed here, those of
 * extensions among them, are called under the settings that cost little to fix:
 * all but search_path and lc_monetary.  An extension's own settings are not
 * known here.
 *
 * Where the session has the fixed values already, and for types whose text
 * depends on none of the settings, calling an output function by way of this
 * file costs a few comparisons.  Else most settings are plain variables, which
 * are swapped for the time of the call.  The two that are more than that,
 * search_path and lc_monetary, go through the server's machinery, and only for
 * types that need them.
 *
 * It must never leave a setting changed.  After an error the variables are put
 * back here, and the others by the end of the (sub)transaction.  A setting
 * that an output function itself changes with SET is not kept.
 *
 * No locks.  Nothing is kept between calls, but whether the last time zone was
 * UTC.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "miscadmin.h"
#include "pgtime.h"
#include "utils/builtins.h"
#include "utils/bytea.h"
#include "utils/float.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"

#include "capture/textform.h"

/*
 * pg_temp last, so that nothing in it hides what is in pg_catalog.  Names of the
 * session's own temporary objects come without a schema; no other session has
 * such names.
 */
#define SEARCH_PATH		"pg_catalog, pg_temp"

/*
 * What TEXTFORM_VARIABLES stands for.  Not DateOrder: ISO dates have only one.
 */
typedef struct Variables
{
	int			date_style;
	int			interval_style;
	pg_tz	   *timezone;
	int			float_digits;
	int			bytea_format;
	bool		quote_all;
} Variables;

/* How the text of a type comes about, if not by its output function alone. */
typedef enum Container
{
	NOT_A_CONTAINER,
	ARRAY_TEXT,
	RANGE_TEXT,
	MULTIRANGE_TEXT,
} Container;

/*
 * Built-in output functions that depend on other settings than the variables,
 * or on none.  All others are taken to depend on the variables.
 */
static const struct
{
	PGFunction	function;
	int			settings;
	Container	container;
}			output_functions[] =

{
	{textout, 0, NOT_A_CONTAINER},
	{varcharout, 0, NOT_A_CONTAINER},
	{bpcharout, 0, NOT_A_CONTAINER},
	{nameout, 0, NOT_A_CONTAINER},
	{charout, 0, NOT_A_CONTAINER},
	{boolout, 0, NOT_A_CONTAINER},
	{int2out, 0, NOT_A_CONTAINER},
	{int4out, 0, NOT_A_CONTAINER},
	{int8out, 0, NOT_A_CONTAINER},
	{numeric_out, 0, NOT_A_CONTAINER},
	{int2vectorout, 0, NOT_A_CONTAINER},
	{oidout, 0, NOT_A_CONTAINER},
	{oidvectorout, 0, NOT_A_CONTAINER},
	{uuid_out, 0, NOT_A_CONTAINER},
	{enum_out, 0, NOT_A_CONTAINER},
	{time_out, 0, NOT_A_CONTAINER},
	{timetz_out, 0, NOT_A_CONTAINER},
	{json_out, 0, NOT_A_CONTAINER},
	{jsonb_out, 0, NOT_A_CONTAINER},
	{xml_out, 0, NOT_A_CONTAINER},
	{bit_out, 0, NOT_A_CONTAINER},
	{varbit_out, 0, NOT_A_CONTAINER},
	{inet_out, 0, NOT_A_CONTAINER},
	{cidr_out, 0, NOT_A_CONTAINER},
	{macaddr_out, 0, NOT_A_CONTAINER},
	{macaddr8_out, 0, NOT_A_CONTAINER},
	{tsvectorout, 0, NOT_A_CONTAINER},
	{tsqueryout, 0, NOT_A_CONTAINER},
	{pg_lsn_out, 0, NOT_A_CONTAINER},

	{cash_out, TEXTFORM_MONEY, NOT_A_CONTAINER},

	{regprocout, TEXTFORM_VARIABLES | TEXTFORM_NAMES, NOT_A_CONTAINER},
	{regprocedureout, TEXTFORM_VARIABLES | TEXTFORM_NAMES, NOT_A_CONTAINER},
	{regoperout, TEXTFORM_VARIABLES | TEXTFORM_NAMES, NOT_A_CONTAINER},
	{regoperatorout, TEXTFORM_VARIABLES | TEXTFORM_NAMES, NOT_A_CONTAINER},
	{regclassout, TEXTFORM_VARIABLES | TEXTFORM_NAMES, NOT_A_CONTAINER},
	{regcollationout, TEXTFORM_VARIABLES | TEXTFORM_NAMES, NOT_A_CONTAINER},
	{regtypeout, TEXTFORM_VARIABLES | TEXTFORM_NAMES, NOT_A_CONTAINER},
	{regconfigout, TEXTFORM_VARIABLES | TEXTFORM_NAMES, NOT_A_CONTAINER},
	{regdictionaryout, TEXTFORM_VARIABLES | TEXTFORM_NAMES, NOT_A_CONTAINER},

	{array_out, 0, ARRAY_TEXT},
	{range_out, 0, RANGE_TEXT},
	{multirange_out, 0, MULTIRANGE_TEXT},
	/* a composite type may get other attributes at any time */
	{record_out, TEXTFORM_ALL, NOT_A_CONTAINER},
};

/* ----------
 * Which settings matter
 * ----------
 */

/* The type of the values whose texts a container's is made of. */
static Oid
contained_type(Container container, Oid type)
{
	switch (container)
	{
		case NOT_A_CONTAINER:
			break;
		case ARRAY_TEXT:
			return get_element_type(type);
		case RANGE_TEXT:
			return get_range_subtype(type);
		case MULTIRANGE_TEXT:
			return get_multirange_range(type);
	}
	return InvalidOid;
}

/*
 * Finds the settings on which the text of values depends that the output
 * function makes of them.  type is the one of the values, no domain.
 */
static int
function_settings(PGFunction function, Oid type)
{
	Oid			contained;

	for (int i = 0; i < lengthof(output_functions); i++)
	{
		if (function != output_functions[i].function)
			continue;
		if (output_functions[i].container == NOT_A_CONTAINER)
			return output_functions[i].settings;
		contained = contained_type(output_functions[i].container, type);
		return OidIsValid(contained) ? textform_settings(contained) : TEXTFORM_ALL;
	}
	return TEXTFORM_VARIABLES;
}

/*
 * textform_prepare
 *		Looks up the output function of a type and the settings it depends on;
 *		see textform.h.  Raises an error if there is no such type.
 */
void
textform_prepare(TextForm *form, Oid type, MemoryContext context)
{
	Oid			base = getBaseType(type);
	Oid			output;
	bool		isvarlena;

	check_stack_depth();
	getTypeOutputInfo(base, &output, &isvarlena);
	fmgr_info_cxt(output, &form->output, context);
	form->settings = function_settings(form->output.fn_addr, base);
}

/*
 * textform_settings
 *		Finds the settings on which the text of a type's values depends.
 *
 * Looks into arrays, ranges and domains, whose contents never change; of a
 * composite type all settings matter.  The result holds as long as the type
 * exists.  Raises an error if it does not.
 */
int
textform_settings(Oid type)
{
	TextForm	form;

	textform_prepare(&form, type, CurrentMemoryContext);
	return form.settings;
}

/* ----------
 * Fixing them
 * ----------
 */

/*
 * Tells whether ISO texts in a time zone are those of UTC, which has more names
 * than one.  The answer for the zone asked for last is kept: zones are never
 * freed.
 */
static bool
is_utc(pg_tz *timezone)
{
	static pg_tz *known = NULL;
	static bool answer;
	long		offset;

	if (timezone != known)
	{
		answer = pg_get_timezone_offset(timezone, &offset) && offset == 0;
		known = timezone;
	}
	return answer;
}

static bool
variables_are_fixed(void)
{
	return is_utc(session_timezone) && DateStyle == USE_ISO_DATES &&
		IntervalStyle == INTSTYLE_POSTGRES && extra_float_digits > 0 &&
		bytea_output == BYTEA_OUTPUT_HEX && !quote_all_identifiers;
}

/* Which of the settings the session has at other values than the fixed ones. */
static int
settings_to_fix(int settings)
{
	if ((settings & TEXTFORM_VARIABLES) != 0 && variables_are_fixed())
		settings &= ~TEXTFORM_VARIABLES;
	if ((settings & TEXTFORM_NAMES) != 0 && strcmp(namespace_search_path, SEARCH_PATH) == 0)
		settings &= ~TEXTFORM_NAMES;
	if ((settings & TEXTFORM_MONEY) != 0 && strcmp(GetConfigOption("lc_monetary", false, false), "C") == 0)
		settings &= ~TEXTFORM_MONEY;
	return settings;
}

static void
fix_option(const char *name, const char *value)
{
	(void) set_config_option(name, value, PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
}

static void
save_variables(Variables *saved)
{
	saved->date_style = DateStyle;
	saved->interval_style = IntervalStyle;
	saved->timezone = session_timezone;
	saved->float_digits = extra_float_digits;
	saved->bytea_format = bytea_output;
	saved->quote_all = quote_all_identifiers;
}

static void
set_variables(const Variables *values)
{
	DateStyle = values->date_style;
	IntervalStyle = values->interval_style;
	session_timezone = values->timezone;
	extra_float_digits = values->float_digits;
	bytea_output = values->bytea_format;
	quote_all_identifiers = values->quote_all;
}

/*
 * Calls the output function with the variables at their fixed values, and puts
 * them back however it ends.
 */
static char *
output_under_fixed_variables(FmgrInfo *output, Datum value)
{
	const Variables fixed = {
		.date_style = USE_ISO_DATES,
		.interval_style = INTSTYLE_POSTGRES,
		.timezone = pg_tzset("GMT"),	/* the name that needs no file */
		.float_digits = 1,
		.bytea_format = BYTEA_OUTPUT_HEX,
		.quote_all = false
	};
	Variables	saved;
	char	   *text = NULL;

	save_variables(&saved);
	PG_TRY();
	{
		set_variables(&fixed);
		text = OutputFunctionCall(output, value);
	}
	PG_FINALLY();
	{
		set_variables(&saved);
	}
	PG_END_TRY();
	return text;
}

/*
 * Calls the output function with the settings at their fixed values, some of
 * which the session has at others.
 */
static char *
output_under_fixed_settings(FmgrInfo *output, int settings, Datum value)
{
	int			nestlevel = 0;
	char	   *text;

	if ((settings & (TEXTFORM_NAMES | TEXTFORM_MONEY)) != 0)
		nestlevel = NewGUCNestLevel();
	if ((settings & TEXTFORM_NAMES) != 0)
		fix_option("search_path", SEARCH_PATH);
	if ((settings & TEXTFORM_MONEY) != 0)
		fix_option("lc_monetary", "C");

	text = (settings & TEXTFORM_VARIABLES) != 0 ?
		output_under_fixed_variables(output, value) : OutputFunctionCall(output, value);

	/* after an error, the end of the (sub)transaction does that */
	if (nestlevel != 0)
		AtEOXact_GUC(false, nestlevel);
	return text;
}

/*
 * textform_output
 *		Gives the text of a value, the same from every session; see
 *		textform.h.  Raises what the output function raises.
 */
char *
textform_output(TextForm *form, Datum value)
{
	int			unlike = settings_to_fix(form->settings);

	if (unlike == 0)
		return OutputFunctionCall(&form->output, value);
	return output_under_fixed_settings(&form->output, unlike, value);
}

/* ----------
 * Reading texts
 * ----------
 */

/*
 * textform_begin_input
 *		Fixes the settings that input functions depend on; see textform.h.
 *
 * Those of textform_output(), and those that only matter to input.  search_path
 * is not touched without need, since constraints of domains may call functions
 * that look for others in it.
 */
int
textform_begin_input(int settings)
{
	int			level = NewGUCNestLevel();

	fix_option("datestyle", "ISO, MDY");
	fix_option("intervalstyle", "postgres");
	fix_option("timezone", "GMT");
	fix_option("array_nulls", "on");
	fix_option("xmloption", "content");
	if ((settings & TEXTFORM_NAMES) != 0)
		fix_option("search_path", SEARCH_PATH);
	if ((settings & TEXTFORM_MONEY) != 0)
		fix_option("lc_monetary", "C");
	return level;
}

void
textform_end_input(int level)
{
	AtEOXact_GUC(false, level);
}
