"""``lbq compare``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lbq.cli.display import note, plain, print_json, size, steps, table
from lbq.cli.quality import perplexity, stored_as, text_line, with_error

if TYPE_CHECKING:
    from lbq.formats.comparison import Compared, Comparison
    from lbq.formats.quality import Estimate, Scores


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL…")
@click.option("--against", metavar="ORIGINAL", help="What they were made from: a folder, a Hub id or an artifact.")
@click.option(
    "--text", type=click.Path(path_type=Path), help="A UTF-8 text, best one nobody tuned on.  [English prose]"
)
@click.option("--context", type=int, help="Tokens of a window.  [512, or what the model was made for]")
@click.option("--max-tokens", type=int, help="The most tokens of the text.  [all; 4096 without --text]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def compare(models: tuple[str, ...], against: str | None, as_json: bool, **options: Any) -> None:
    """Put models side by side: artifacts, and what GPTQ, AWQ, AutoRound, compressed-tensors, MLX and GGUF make.

    With --against, all read the same text in one pass, layer by layer; the difference of each from the first is taken
    window by window, and so is its error. Without it nothing is run: settings and sizes are shown.
    """
    from lbq.evaluation import compare as measure

    with steps("Comparing") as advance:
        found = measure(models, against, on_progress=advance, on_note=note, **options)
    if as_json:
        print_json(found)
        return
    _print(found)


def _print(found: Comparison) -> None:
    about = ("model", "made by", "linear layers", "bits/weight", "size", "weight cosine")
    table("", about, [_settings(model) for model in found.models])
    if found.reference is None or found.text is None:
        return
    measured = ("model", "KL divergence", "less the first's", "KL 99%", "same top-1", "perplexity", "logit cosine")
    scores = [model.scores for model in found.models if model.scores]
    best = min(score.kl.mean for score in scores)
    click.echo()
    rows = zip(found.models, scores, strict=True)
    table("", measured, [_scores(model.model, score, model.difference, best) for model, score in rows])
    reference = perplexity(scores[0].perplexity.reference)
    click.echo(plain(f"against {found.reference}, perplexity {reference}; * the least divergence"))
    click.echo(plain(text_line(found.text)))


def _settings(model: Compared) -> tuple[str, ...]:
    storage = model.storage
    cosine = "" if model.weight_cosine is None else f"{model.weight_cosine:.6f}"
    return (
        model.model,
        storage.tool,
        stored_as(storage.shares),
        f"{storage.bits_per_weight:.2f}",
        size(storage.nbytes),
        cosine,
    )


def _scores(name: str, scores: Scores, difference: Estimate | None, best: float) -> tuple[str, ...]:
    return (
        name,
        ("* " if scores.kl.mean == best else "") + with_error(scores.kl, "{:.5f}"),
        "" if difference is None else with_error(difference, "{:+.5f}"),
        f"{scores.kl.p99:.3f}",
        with_error(scores.same_top1, "{:.2%}"),
        perplexity(scores.perplexity.artifact),
        f"{scores.logit_cosine.mean:.6f}",
    )
