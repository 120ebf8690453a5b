#!/usr/bin/python3
"""report - from results to the README's table and plots

    report.py --merge SUITE FILE     adds a run's results to those that are kept,
                                     then writes table and plots
    report.py                        writes table and plots again
"""

import json
import os
import re
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
README = os.path.join(HERE, '..', '..', 'README.md')
BEGIN, END = '<!-- benchmark -->', '<!-- /benchmark -->'


def load(file):
    with open(file) as f:
        return json.load(f)


def kept(suite):
    return os.path.join(HERE, 'results', suite + '.json')


def merge(suite, file):
    """Scenarios that were run replace what was kept of them."""
    results = load(kept(suite)) if os.path.exists(kept(suite)) else {}
    results.update(load(file))
    with open(kept(suite), 'w') as f:
        json.dump(results, f, indent=1)
        f.write('\n')


def middle(result):
    return statistics.median(result['values']) if result['values'] else None


def base_of(result, results):
    """The values that a result is compared with, or None."""
    for other in results:
        if other['variant'] == result['base'] and (other['what'], other['unit']) == (result['what'], result['unit']):
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


def row(result, results):
    number = compared(result, results)
    spread = f"{shown(min(result['values']))} to {shown(max(result['values']))}" if len(result['values']) > 1 else ''
    sign = '+' if result['compare'] == 'difference' and number is not None and number >= 0 else ''
    ratio = '' if number is None or result['compare'] == 'value' else f'{sign}{number:.2f}'
    return [result['what'], result['variant'], f"{shown(middle(result))} {result['unit']}", spread, ratio,
            verdict(result, number)]


def table(by_scenario):
    lines = []
    for scenario, entry in by_scenario.items():
        lines += [f'**{scenario}**', '', '| | | median | min to max | to base | target |',
                  '| --- | --- | --- | --- | --- | --- |']
        lines += ['| ' + ' | '.join(row(result, entry['results'])) + ' |' for result in entry['results']]
        lines.append('')
    return '\n'.join(lines)


def main():
    if sys.argv[1:2] == ['--merge']:
        merge(*sys.argv[2:4])
    with open(README) as f:
        text = f.read()
    if BEGIN not in text or not os.path.exists(kept('bookworm')):
        return
    text = re.sub(f'{BEGIN}.*{END}', lambda m: f"{BEGIN}\n\n{table(load(kept('bookworm')))}\n{END}", text, flags=re.S)
    with open(README, 'w') as f:
        f.write(text)


if __name__ == '__main__':
    main()
