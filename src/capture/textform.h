/*-------------------------------------------------------------------------
 *
 * textform.h
 *		The text of a value, the same to and from every session.
 *
 *-------------------------------------------------------------------------
 */
#ifndef PGF_TEXTFORM_H
#define PGF_TEXTFORM_H

#include "postgres.h"

#include "fmgr.h"

/* Settings on which the text of a type's values may depend; a set of these. */
#define TEXTFORM_VARIABLES	0x01	/* DateStyle, TimeZone and the like */
#define TEXTFORM_NAMES		0x02	/* search_path: it has names of objects */
#define TEXTFORM_MONEY		0x04	/* lc_monetary */
#define TEXTFORM_ALL		0x07

/* How one type's values become text; made once, used for many values. */
typedef struct TextForm
{
	FmgrInfo	output;			/* the type's output function */
	int			settings;		/* on which its result depends */
} TextForm;

/*
 * Looks up what textform_output() needs for values of the type, in context.
 * It holds as long as the type exists.
 */
extern void textform_prepare(TextForm *form, Oid type, MemoryContext context);

/*
 * What the type's output function gives for the value, with the settings that
 * matter at their fixed values.  palloc'd in the current context.
 */
extern char *textform_output(TextForm *form, Datum value);

/* The settings on which the text of the type's values depends. */
extern int	textform_settings(Oid type);

/*
 * From begin to end, all input functions read what textform_output() gave; of
 * search_path and lc_monetary only those that are among settings are fixed.
 * begin returns what end needs; after an error, the end of the (sub)transaction
 * does without.
 */
extern int	textform_begin_input(int settings);
extern void textform_end_input(int level);

#endif							/* PGF_TEXTFORM_H */
