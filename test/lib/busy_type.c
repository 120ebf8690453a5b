/*-------------------------------------------------------------------------
 *
 * busy_type.c
 *		A type for tests whose output function runs a command.
 *
 * Its values are texts.  The output function runs the setting busy.command, once:
 * it empties the setting before.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "executor/spi.h"
#include "fmgr.h"
#include "utils/builtins.h"
#include "utils/guc.h"

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(busy_in);
PG_FUNCTION_INFO_V1(busy_out);

Datum		busy_in(PG_FUNCTION_ARGS);
Datum		busy_out(PG_FUNCTION_ARGS);

static void
run(const char *command)
{
	SPI_connect();
	if (SPI_execute(command, false, 0) < 0)
		elog(ERROR, "could not run: %s", command);
	SPI_finish();
}

Datum
busy_in(PG_FUNCTION_ARGS)
{
	PG_RETURN_TEXT_P(cstring_to_text(PG_GETARG_CSTRING(0)));
}

Datum
busy_out(PG_FUNCTION_ARGS)
{
	const char *setting = GetConfigOption("busy.command", true, false);

	if (setting != NULL && setting[0] != '\0')
	{
		char	   *command = pstrdup(setting);

		SetConfigOption("busy.command", "", PGC_USERSET, PGC_S_SESSION);
		run(command);
	}
	PG_RETURN_CSTRING(text_to_cstring(PG_GETARG_TEXT_PP(0)));
}
