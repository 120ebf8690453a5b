#!/usr/bin/python3
"""report - from results to tables and plots

    report.py --merge SUITE FILE     adds a run's results to those that are kept,
                                     then writes tables and plots
    report.py                        writes tables and plots again

The README gets what has a target; RESULTS.md beside this file has all.
"""

import json
import os
import re
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
README = os.path.join(HERE, '..', '..', 'README.md')
BEGIN, END = '<!-- benchmark -->', '<!-- /benchmark -->'
SUITES = ('bookworm', 'trixie')
SCENARIOS = ('drain', 'channels', 'latency', 'beside', 'capture', 'consume', 'consume_limit', 'consume_failing',
             'consume_rows', 'streams', 'cost', 'stability', 'hot row', 'TPC-B', 'resume', 'history')
LIMITS = ('bare C', 'bare C, 8 publishers', 'bare C, acks only', 'floor')  # what does only what cannot be left out


def load(file):
    with open(file) as f:
        return json.load(f)


def kept(suite):
    return os.path.join(HERE, 'results', suite + '.json')


def merge(suite, file):
    """What was run again replaces what was kept of it; each run that is left is told of."""
    results = load(kept(suite)) if os.path.exists(kept(suite)) else {}
    for scenario, entry in load(file).items():
        again = {result['what'] for result in entry['results']}
        old = results.get(scenario, {'results': [], 'runs': []})
        for result in entry['results']:
            result['command'] = entry['facts']['command']
        entry['results'] = [result for result in old['results'] if result['what'] not in again] + entry['results']
        commands = {result['command'] for result in entry['results']}
        entry['runs'] = [run for run in old['runs'] if run['command'] in commands - {entry['facts']['command']}]
        entry['runs'].append(entry['facts'])
        results[scenario] = entry
    os.makedirs(os.path.dirname(kept(suite)), exist_ok=True)
    with open(kept(suite), 'w') as f:
        json.dump(results, f, indent=1)
        f.write('\n')


def middle(result):
    return statistics.median(result['values']) if result['values'] else None


def beside(result, results):
    """All variants of the same setting and unit."""
    return [other for other in results if (other['what'], other['unit']) == (result['what'], result['unit'])]


def base_of(result, results):
    """The values that a result is compared with, or None."""
    for other in beside(result, results):
        if other['variant'] == result['base']:
            return other['values']
    return None


def against(values, base, compare):
    """Ratio to the base, or difference: round by round, since what a machine does
    beside changes with time, and of these the median.  None if there is none."""
    if not values or not base or (compare == 'ratio' and 0 in base):
        return None
    if len(values) != len(base):
        values, base = [statistics.median(values)], [statistics.median(base)]
    return statistics.median(v / b if compare == 'ratio' else v - b for v, b in zip(values, base))


def compared(result, results):
    """The number that the target is about, or None."""
    if result['compare'] == 'value':
        return middle(result)
    return against(result['values'], base_of(result, results), result['compare'])


def verdict(result, number):
    if result['target'] is None or number is None:
        return ''
    met = number >= result['target'] if result['higher'] else number <= result['target']
    sign = '≥' if result['higher'] else '≤'
    return f"{sign} {result['target']:g}, {'met' if met else 'not met'}"


def shown(number):
    if number is None:
        return ''
    return f'{number:,.0f}' if abs(number) >= 100 else f'{number:.3g}'


def ratio(result, results):
    """To the base, or the difference from it, as text."""
    number = compared(result, results)
    if number is None or result['compare'] == 'value':
        return ''
    sign = '+' if result['compare'] == 'difference' and number >= 0 else ''
    return f'{sign}{number:.2f}'


def limit(result, results):
    """The same number of what does only what cannot be left out, as text."""
    for other in beside(result, results):
        if other['variant'] in LIMITS:
            return ratio(other, results)
    return ''


def row(result, results):
    spread = f"{shown(min(result['values']))} to {shown(max(result['values']))}" if len(result['values']) > 1 else ''
    return [result['what'], result['variant'], f"{shown(middle(result))} {result['unit']}", spread,
            ratio(result, results), verdict(result, compared(result, results))]


def table(by_scenario):
    lines = []
    for scenario, entry in by_scenario.items():
        lines += [f'**{scenario}**', '', '| | | median | min to max | to base | target |',
                  '| --- | --- | --- | --- | --- | --- |']
        lines += ['| ' + ' | '.join(row(result, entry['results'])) + ' |' for result in entry['results']]
        lines.append('')
    return '\n'.join(lines)


def measured(suite):
    """The scenarios in the order in which they are shown."""
    results = load(kept(suite)) if os.path.exists(kept(suite)) else {}
    return {scenario: results[scenario] for scenario in SCENARIOS if scenario in results}


def targets():
    """The README's table: what has a target."""
    lines = ['| | RabbitMQ | what | | to the base | target | limit |',
             '| --- | --- | --- | --- | --- | --- | --- |']
    for suite in SUITES:
        for scenario, entry in measured(suite).items():
            for result in entry['results']:
                if result['target'] is not None:
                    what, variant, median, _, to_base, said = row(result, entry['results'])
                    lines.append(f"| {scenario} | {entry['facts']['RabbitMQ']} | {what}: {variant} | {median} "
                                 f"| {to_base} | {said} | {limit(result, entry['results'])} |")
    return '\n'.join(lines)


def about(suite):
    """Where and how, with each command once; what else the machine did shows in its load."""
    facts = [run for entry in measured(suite).values() for run in entry['runs']]
    commands = {each['command']: each for each in facts}
    return (f"Measured on {facts[0]['machine']}, {facts[0]['system']}; PostgreSQL {facts[0]['PostgreSQL']}, RabbitMQ "
            f"{facts[0]['RabbitMQ']} on Erlang {facts[0]['Erlang']}, rabbitmq-c {facts[0]['rabbitmq-c']}:\n\n" +
            '\n'.join(f"- `{command}`, {each['date']}, load average {each['load before']:g} before"
                      for command, each in commands.items()))


def write_tables(suites):
    with open(os.path.join(HERE, 'RESULTS.md'), 'w') as f:
        f.write('# All results\n')
        for suite in suites:
            f.write(f'\n## {suite}\n\n{about(suite)}\n\n{table(measured(suite))}'.rstrip('\n') + '\n')


def write_readme(suites, plots):
    shown_plots = '\n'.join(f'![{name}](test/benchmark/plots/{name}.svg)' for name in plots)
    parts = [targets(), '', shown_plots, '', *(about(suite) + '\n' for suite in suites)]
    with open(README) as f:
        text = f.read()
    text = re.sub(f'{BEGIN}.*{END}', lambda m: BEGIN + '\n' + '\n'.join(parts) + END, text, flags=re.S)
    with open(README, 'w') as f:
        f.write(text)


# Plots

OURS = '#1f5f8b'
OTHERS = ('#9a9a9a', '#d9b44a', '#8fb26b', '#c98b5e', '#b7a5c9', '#6f8f8c', '#cfcfcf')


def settings(results, unit, part):
    """{setting: {variant: result}} of the results in a unit, of settings with such names."""
    found = {}
    for result in results:
        if result['unit'] == unit and part in result['what'] and result['values']:
            found.setdefault(result['what'], {})[result['variant']] = result
    return found


def plot(name, entry, unit, part, title, log=False):
    """A group of bars for each setting, a bar for each variant, from min to max a line."""
    import matplotlib
    matplotlib.use('svg')
    matplotlib.rcParams['svg.hashsalt'] = 'pg_fanout'
    from matplotlib import pyplot

    groups = settings(entry['results'], unit, part)
    variants = list(dict.fromkeys(variant for group in groups.values() for variant in group))
    height = 0.8 / len(variants)
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(groups) * (len(variants) + 1)))
    for number, variant in enumerate(variants):
        bars = [(place + number * height, group[variant]) for place, group in enumerate(groups.values())
                if variant in group]
        middles = [middle(result) for _, result in bars]
        spread = [[m - min(r['values']) for m, (_, r) in zip(middles, bars)],
                  [max(r['values']) - m for m, (_, r) in zip(middles, bars)]]
        axes.barh([place for place, _ in bars], middles, height, xerr=spread, label=variant,
                  color=OURS if variant == 'pg_fanout' else OTHERS[number % len(OTHERS)],
                  error_kw={'linewidth': 0.8})
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(groups))], list(groups))
    axes.invert_yaxis()
    axes.set_xscale('log' if log else 'linear')
    axes.set_xlabel(unit)
    axes.set_title(f"{title} (PostgreSQL {entry['facts']['PostgreSQL']}, RabbitMQ {entry['facts']['RabbitMQ']})")
    axes.legend(fontsize='small')
    figure.tight_layout()
    save(figure, name)
    pyplot.close(figure)


def save(figure, name):
    """Without a date, and without blanks at the ends of lines."""
    file = os.path.join(HERE, 'plots', name + '.svg')
    os.makedirs(os.path.dirname(file), exist_ok=True)
    figure.savefig(file, metadata={'Date': None})
    with open(file) as f:
        text = re.sub(r'[ \t]+$', '', f.read(), flags=re.M)
    with open(file, 'w') as f:
        f.write(text)


PLOTS = (  # name, scenario, unit, part of the settings' names, title, logarithmic
    ('drain', 'drain', 'messages/s', '', 'Draining a backlog', False),
    ('latency', 'latency', 'ms', '', 'From commit to delivery', True),
    ('capture-rows', 'capture', 'tps', 'single-row', 'Single-row updates', False),
    ('capture-bulk', 'capture', 'us of CPU/row', 'capture alone', 'What capture adds to bulk statements', False),
    ('consume', 'consume', 'messages/s', '', 'Consuming', True),
)


def write_plots(suites):
    names = []
    for suite in suites:
        for name, scenario, unit, part, title, log in PLOTS:
            if scenario in measured(suite):
                names.append(f'{name}-{suite}')
                plot(names[-1], measured(suite)[scenario], unit, part, title, log)
    return names


def main():
    if sys.argv[1:2] == ['--merge']:
        merge(*sys.argv[2:4])
    suites = [suite for suite in SUITES if os.path.exists(kept(suite))]
    write_tables(suites)
    write_readme(suites, write_plots(suites))


if __name__ == '__main__':
    main()
