"""``lbq eval``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lbq.cli.display import note, plain, print_json, steps, table
from lbq.cli.quality import score_rows, text_line

if TYPE_CHECKING:
    from lbq.formats.quality import Evaluation


@click.command("eval")
@click.argument("artifact")
@click.option(
    "--against", required=True, metavar="MODEL", help="The original: a folder or a Hub id; or another artifact."
)
@click.option(
    "--text", type=click.Path(path_type=Path), help="A UTF-8 text, best one nobody tuned on.  [English prose]"
)
@click.option("--context", type=int, help="Tokens of a window.  [512, or what the model was made for]")
@click.option("--max-tokens", type=int, help="The most tokens of the text.  [all; 4096 without --text]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(artifact: str, against: str, text: Path | None, as_json: bool, **options: Any) -> None:
    """Say what quantization cost: next-token distributions of ARTIFACT against those of its original, on a text.

    The text is cut into windows; in each, the second half is predicted. Models are read layer by layer: memory is that
    of a few layers, whatever their size.
    """
    from lbq.evaluation import evaluate as compare

    with steps("Evaluating") as advance:
        found = compare(artifact, against, text, on_progress=advance, on_note=note, **options)
    if as_json:
        print_json(found)
        return
    _print(found)


def _print(found: Evaluation) -> None:
    weights = ("weight cosine", f"{found.weights.cosine:.6f} at {found.weights.bits_per_weight:.2f} bits")
    click.echo(plain(f"{found.artifact} against {found.reference}"))
    table("", ("measure", "value"), [*score_rows(found.scores), weights])
    click.echo(plain(text_line(found.text)))
