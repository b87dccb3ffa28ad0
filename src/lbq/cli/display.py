"""What commands share in what they print: sizes, tables, progress. Results go to stdout, all else to stderr."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lbq.formats.wording import pattern as pattern
from lbq.formats.wording import plain as plain
from lbq.formats.wording import size as size

if TYPE_CHECKING:
    from lbq.quantizer.autoround.run import Progress as Tuned

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    click.echo(msgspec.json.format(msgspec.json.encode(value)))


class Size(click.ParamType[int]):
    """A number of bytes on the command line: ``5GB``, ``500 MB``, ``4GiB``."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(value))
        if not found or found[2].upper() not in _UNITS:
            self.fail(f"{value!r} is not a size such as 5GB", param, ctx)
        return int(Decimal(found[1]) * _UNITS[found[2].upper()])


def note(text: str) -> None:
    """Say something that differs from what was asked for."""
    click.echo(f"note: {plain(text)}", err=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; all columns but the first are right-aligned. Piped output is not cut to a screen's width."""
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right", no_wrap=True, overflow="fold")
    for row in rows:
        shown.add_row(*map(plain, row))
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    with console.capture() as text:  # rich ends the process with 1 when the reader of a pipe has gone
        console.print(shown)
    click.echo(text.get(), nl=False)


def markdown(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table as Markdown; all columns but the first are right-aligned."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    click.echo(f"### {plain(title)}\n")
    for line in lines:
        click.echo(f"| {' | '.join(plain(cell).replace('|', '&#124;') for cell in line)} |")


class Bar:
    """A progress bar over bytes that counts items beside them."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._seen: set[str] = set()

    def advance(self, name: str, nbytes: int) -> None:
        """``nbytes`` of the item ``name`` are done."""
        self._progress.start()  # with the first bytes: something else may be shown before
        self._seen.add(name)
        self._progress.update(self._task, advance=nbytes, name=name, seen=len(self._seen))
        if self._progress.finished:
            self._progress.stop()  # something else may be shown behind

    def waits(self, name: str, done: int, total: int) -> None:
        """A file is on its way."""
        self._progress.start()
        self._progress.update(self._task, name=f"fetching {name} ({size(done)} of {size(total)})")


@contextmanager
def progress(what: str, items: int, nbytes: int) -> Iterator[Bar]:
    """A bar on stderr with items, bytes and the time left; nothing where stderr is not a terminal."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.fields[seen]}}/{items}"),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    try:
        yield Bar(shown, shown.add_task(what, total=nbytes, seen=0, name=""))
    finally:
        shown.stop()


@contextmanager
def blocks() -> Iterator[Callable[[Tuned], None]]:
    """A line on stderr about blocks that are tuned, which takes hours: renewed in place on a terminal, one a block
    elsewhere."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("Tuning"), BarColumn(), MofNCompleteColumn(), TextColumn("blocks, {task.description}"))
    shown = Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal)
    task = shown.add_task("loss not known yet")
    spent: list[float] = []

    def advance(tuned: Tuned) -> None:
        shown.update(task, completed=tuned.finished, total=tuned.blocks)
        if tuned.seconds is None:
            shown.start()
            if not console.is_terminal:
                click.echo(f"tuning {tuned.blocks} blocks, {tuned.finished} of them finished before", err=True)
            return
        spent.append(tuned.seconds)
        left = duration((tuned.blocks - tuned.finished) * sum(spent) / len(spent))
        loss = "" if tuned.loss is None else f"loss {tuned.loss[0]:.2e} → {tuned.loss[1]:.2e}, "
        text = f"{loss}{left} left"
        shown.update(task, description=text)
        if not console.is_terminal:
            click.echo(f"block {tuned.finished}/{tuned.blocks}: {text}", err=True)
        elif tuned.finished == tuned.blocks:
            shown.stop()

    try:
        yield advance
    finally:
        shown.stop()


def duration(seconds: float) -> str:
    """``2 h 05 min``, ``7 min``, ``40 s``"""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if seconds >= 60 else f"{seconds:.0f} s"


@contextmanager
def steps(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for a function that is told (steps done, steps in all); nothing without a terminal."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("to go"),
    )
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = shown.add_task(what, total=None)

    def advance(done: int, total: int) -> None:
        shown.start()  # with the first step: something else may be shown before
        shown.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        shown.stop()
