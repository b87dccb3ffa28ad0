"""``lbq eval``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lbq.cli.display import note, plain, print_json, steps, table

if TYPE_CHECKING:
    from lbq.formats.quality import Divergence, Estimate, Evaluation


@click.command("eval")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--against", required=True, metavar="MODEL", help="The original: a folder, a Hub id or another artifact.")
@click.option("--text", required=True, type=click.Path(path_type=Path), help="A UTF-8 text, best one nobody tuned on.")
@click.option("--context", type=int, help="Tokens of a window.  [512, or what the model was made for]")
@click.option("--max-tokens", type=int, help="The most tokens of the text.  [all]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(artifact: Path, against: str, text: Path, as_json: bool, **options: Any) -> None:
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
    scores, text = found.scores, found.text
    kl, perplexity = scores.kl, scores.perplexity
    rows = [
        ("KL divergence, nats", _with_error(kl, "{:.5f}")),
        ("  50%, 90%, 99%, max", f"{kl.p50:.5f}, {kl.p90:.5f}, {kl.p99:.5f}, {kl.max:.5f}"),
        ("same top-1 token", _with_error(scores.same_top1, "{:.2%}")),
        ("perplexity", f"{_shown(perplexity.artifact)}, reference {_shown(perplexity.reference)}"),
        ("  ln(ratio)", _with_error(perplexity.log_ratio, "{:+.5f}")),
        ("logit cosine", f"{scores.logit_cosine.mean:.6f}, least {scores.logit_cosine.least:.6f}"),
        ("weight cosine", f"{found.weights.cosine:.6f} at {found.weights.bits_per_weight:.2f} bits"),
    ]
    click.echo(plain(f"{found.artifact} against {found.reference}"))
    table("", ("measure", "value"), rows)
    click.echo(
        plain(
            f"{text.positions} positions in {text.windows} windows of {text.context} tokens of {text.path}; "
            + ("± is the standard error over windows" if text.windows > 1 else "one window gives no standard errors")
        )
    )


def _shown(perplexity: float | None) -> str:
    return "past 1e308" if perplexity is None else f"{perplexity:.3f}"


def _with_error(value: Estimate | Divergence, form: str) -> str:
    """``0.12345 ± 0.00678``"""
    mean = form.format(value.mean)
    return mean if value.standard_error is None else f"{mean} ± {form.format(value.standard_error).removeprefix('+')}"
