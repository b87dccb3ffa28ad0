"""``lbq sweep``"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lbq.cli.display import markdown, note, plain, print_json, size, steps, table
from lbq.cli.options import group_list, number_list
from lbq.cli.quality import perplexity, text_line, with_error

if TYPE_CHECKING:
    from lbq.formats.comparison import Cell, Sweep


@click.command()
@click.argument("model")
@click.option("--bits", default="3,4,8", show_default=True, help="Which of 3, 4 and 8.")
@click.option("--gs", "groups", default="32,64,128,256,512,row", show_default=True, help="Which groups.")
@click.option(
    "--text", type=click.Path(path_type=Path), help="A UTF-8 text, best one nobody tuned on.  [English prose]"
)
@click.option("--context", type=int, help="Tokens of a window.  [512, or what the model was made for]")
@click.option("--max-tokens", type=int, help="The most tokens of the text.  [all; 4096 without --text]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--speed/--no-speed", default=True, help="Measure decoding too.  [speed]")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def sweep(model: str, bits: str, groups: str, as_markdown: bool, as_json: bool, **options: Any) -> None:
    """Show what each width and group would cost MODEL, a folder or a Hub id: size, quality, and speed on this machine.

    Every cell is MODEL rounded to nearest as lbq convert does it, read against the original; no artifact is written.
    """
    from lbq.evaluation.sweep import sweep as measure

    widths, sizes = number_list(bits, "--bits", "3,4,8"), group_list(groups)
    with steps("Sweeping") as advance:
        found = measure(model, widths, sizes, on_progress=advance, on_note=note, **options)
    if as_json:
        print_json(found)
    else:
        _print(found, as_markdown)


def _print(found: Sweep, as_markdown: bool) -> None:
    fast = found.original_tokens_per_second
    columns = ("", "bits/weight", "size", "KL divergence", "KL 99%", "same top-1", "perplexity", "weight cosine")
    reference = found.cells[0].scores.perplexity.reference
    whole = ("BF16", "16.00", size(found.original.nbytes), "", "", "", perplexity(reference), "", *_speed(fast, fast))
    rows = [(*_row(cell), *_speed(cell.tokens_per_second, fast)) for cell in found.cells]
    speed = () if fast is None else ("tokens/s", "× BF16")
    show = markdown if as_markdown else table
    show(found.model, (*columns, *speed), [whole, *rows])
    click.echo()
    for line in (*_fallbacks(found.cells), _what(found)):
        click.echo(plain(line) + ("  " if as_markdown else ""))  # two spaces end a line there


def _row(cell: Cell) -> tuple[str, ...]:
    scores = cell.scores
    return (
        f"INT{cell.bits} {_group(cell)}" + ("*" if cell.notes else ""),
        f"{cell.storage.bits_per_weight:.2f}",
        size(cell.storage.nbytes),
        with_error(scores.kl, "{:.5f}"),
        f"{scores.kl.p99:.3f}",
        with_error(scores.same_top1, "{:.1%}"),
        perplexity(scores.perplexity.artifact),
        f"{cell.weight_cosine:.5f}",
    )


def _group(cell: Cell) -> str:
    return "row" if cell.group is None else f"g{cell.group}"


def _speed(found: float | None, whole: float | None) -> tuple[str, ...]:
    return () if found is None or whole is None else (f"{found:.1f}", f"{found / whole:.2f}")


def _fallbacks(cells: Sequence[Cell]) -> Iterable[str]:
    """Each note once, with the groups that it is about."""
    about: dict[str, dict[str, None]] = {}
    for cell in cells:
        for text in cell.notes:
            about.setdefault(text, {})[_group(cell)] = None
    return [f"* {', '.join(groups)}: {text}" for text, groups in about.items()]


def _what(found: Sweep) -> str:
    speed = "" if found.original_tokens_per_second is None else f"; speed of one text at a time on {found.device}"
    return f"the head has 8 bits a row throughout; {text_line(found.text)}{speed}"
