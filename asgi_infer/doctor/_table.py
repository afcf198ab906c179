"""The diagnosis in a terminal, or in a file that its output goes to."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._figures import Column, columns, noise, of_sweep, target, verdicts, where
from ._results import Arm, Diagnosis, Finding
from ._text import code, plain, plural

WORDS = {"problem": "PROBLEM", "advice": "ADVICE", "fine": "FINE"}
STYLES = {"problem": "bold red", "advice": "bold yellow", "fine": "bold green"}
WIDEST_TITLE = 30
GAP = 2


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """Print the figures, and then what they say and which lines to change.

    Wherever it goes, it is to be read: in 80 columns, without colours, in a file.

    :param console: where to; its width decides how many columns stand side by side.
    :param diagnosis: what was measured.
    """
    if diagnosis.machine.noisy:
        console.print(Text(noise(diagnosis.machine), style="bold yellow"), end="\n\n")
    console.print(
        Text(f"{target(diagnosis)}, {plural(diagnosis.clients, 'client')}", style="bold")
    )
    console.print(Text(where(diagnosis.machine), style="dim"), end="\n\n")
    shown = columns(diagnosis)
    titles = [plain(arm.title) for arm in diagnosis.arms]
    _print_arms(console, ["how it was run", *titles], _cells(diagnosis, diagnosis.arms, shown))
    if diagnosis.sweep:
        few = [column for column in shown if column.sweep]
        titles = [of_sweep(arm) for arm in diagnosis.sweep]
        _print_arms(console, ["threads", *titles], _cells(diagnosis, diagnosis.sweep, few))
    for finding in verdicts(diagnosis):
        _print_finding(console, finding)


def _cells(
    diagnosis: Diagnosis, arms: Sequence[Arm], shown: Sequence[Column]
) -> dict[Column, list[str]]:
    return {column: [column.cell(arm, diagnosis) for arm in arms] for column in shown}


def _print_arms(console: Console, titles: Sequence[str], cells: dict[Column, list[str]]) -> None:
    width = min(WIDEST_TITLE, max(map(len, titles)))
    for side_by_side in _fitting(cells, console.width - width):
        console.print(_table(titles, {column: cells[column] for column in side_by_side}))
        console.print()


def _fitting(cells: dict[Column, list[str]], width: int) -> Iterator[list[Column]]:
    """The columns in groups, each of which fits beside the titles."""
    group: list[Column] = []
    left = width
    for column, values in cells.items():
        needed = GAP + max(map(len, (*column.header.splitlines(), *values)))
        if group and needed > left:
            yield group
            group, left = [], width
        group.append(column)
        left -= needed
    yield group


def _table(titles: Sequence[str], cells: dict[Column, list[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, GAP - 1, 0, 0), show_edge=False)
    table.add_column(titles[0], max_width=WIDEST_TITLE, overflow="crop", no_wrap=True)
    for column in cells:
        table.add_column(column.header, justify="right", no_wrap=True)
    for title, *values in zip(titles[1:], *cells.values(), strict=True):
        table.add_row(Text(title), *values)
    return table


def _print_finding(console: Console, finding: Finding) -> None:
    style = STYLES.get(finding.severity, "bold")
    word = WORDS.get(finding.severity, plain(finding.severity).upper())
    console.print(Text.assemble((word, style), ": ", (plain(finding.headline), "bold")))
    if finding.detail:
        lines = textwrap.wrap(plain(finding.detail), max(20, console.width - 2))
        console.print(Text("\n".join(f"  {line}" for line in lines)))
    if finding.lines:
        console.print()
    for line in finding.lines:
        # To be copied: never broken into two, however narrow the terminal is.
        console.print(Text(f"    {code(line)}", style="cyan"), soft_wrap=True)
    console.print()
