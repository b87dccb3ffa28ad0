"""What each scale rule costs: KL divergence to the unquantised model, over real models and held-out text.

    python scripts/measure_scale_rules.py models/SmolLM2-135M-Instruct models/Qwen2.5-Coder-0.5B-Instruct \\
        --text models/wikipedia/heldout.json --results results.jsonl

Every linear layer but the head is replaced by what its codes and scales dequantise to (or, for the measure ``head``,
the head alone, at 8 bits and one scale a row), and the model runs in float32 on both sides, so that nothing but the
quantisation differs. The divergence is KL(unquantised ‖ quantised) of the next-token distributions in nats, averaged
over all positions. Measures already in the results file are not repeated (but absmax is, where a rule that is missing
is compared with it). Ends with docs/scale-rules.md's table.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lbq.formats.scheme import effective_group
from lbq.quantizer.rtn import ScaleRule, quantize

HEAD = "lm_head"
ROW = "row"
GROUPS = {4: ("32", "64", "128", "256", ROW), 3: ("32", "64", "128", "256", ROW), 8: ("128", ROW)}


@dataclass(frozen=True)
class Case:
    """One configuration of one model; ``part`` is ``body`` (all linears but the head) or ``head``."""

    model: str
    part: str
    bits: int
    group: str
    rule: str


@dataclass(frozen=True)
class Measure:
    """``kl`` in nats a token; ``over_absmax`` its excess over the rule absmax, and that excess' standard error."""

    case: Case
    kl: float
    over_absmax: float
    standard_error: float


class Bench:
    """A model in float32, its text, and what it answers unquantised."""

    def __init__(self, folder: Path, text: Path, sequences: int, length: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        output = self.model.get_output_embeddings()
        output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)  # untied
        self.originals = {
            name: module.weight.detach().to(torch.bfloat16)  # exact: the checkpoint is BF16
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        length = min(length, self.model.config.max_position_embeddings)
        self.tokens = held_out_tokens(folder, text, sequences, length)
        self.reference = [self._log_probabilities(row) for row in self.tokens]

    @torch.inference_mode()
    def _log_probabilities(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.model(tokens[None]).logits[0], dim=-1)

    def divergence(self, part: str, bits: int, group: int | None, rule: ScaleRule) -> torch.Tensor:
        """KL divergence at every position, in nats, float64 [positions]."""
        for name, original in self.originals.items():
            weight = self.model.get_submodule(name).weight
            if (name == HEAD) == (part == "head"):
                chosen = effective_group(original.shape[1], group)
                weight.data.copy_(quantize(original, bits, chosen, rule).dequantize())
            else:
                weight.data.copy_(original)
        pairs = zip(self.tokens, self.reference, strict=True)
        return torch.cat([kl(reference, self._log_probabilities(row)) for row, reference in pairs])


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of every row. Σ p·(q/p − 1 − log(q/p)): no negative term, so that small values are not rounding."""
    rows = []
    for p, q in zip(log_p.split(64), log_q.split(64), strict=True):
        ratio = q - p
        rows.append((p.exp() * (ratio.expm1() - ratio)).sum(-1, dtype=torch.float64))
    return torch.cat(rows)


def held_out_tokens(folder: Path, text: Path, sequences: int, length: int) -> torch.Tensor:
    """The first ``length`` tokens of evenly spaced articles that have as many, int64 [sequences, length]."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    articles = [article["text"] for article in json.loads(text.read_text(encoding="utf-8"))]
    rows = []
    for start in range(0, len(articles), len(articles) // sequences):
        for article in articles[start:]:
            ids = tokenizer(article[: 16 * length])["input_ids"]
            if len(ids) >= length:
                rows.append(ids[:length])
                break
    return torch.tensor(rows[:sequences])


def configurations(smallest_group: int) -> list[tuple[str, int, str]]:
    """Part, bits and group of everything that is measured."""
    body = [
        ("body", bits, group)
        for bits, groups in GROUPS.items()
        for group in groups
        if group == ROW or int(group) >= smallest_group
    ]
    return [*body, ("head", 8, ROW)]


def measure(bench: Bench, todo: list[Case], results: Path) -> None:
    """Add ``todo``, all rules of one configuration after its absmax, to ``results``."""
    for case in todo:
        group = None if case.group == ROW else int(case.group)
        values = bench.divergence(case.part, case.bits, group, ScaleRule(case.rule))
        if case.rule == ScaleRule.ABSMAX:
            absmax = values
        excess = values - absmax
        error = float(excess.std()) / len(excess) ** 0.5
        row = Measure(case, float(values.mean()), float(excess.mean()), error)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        click.echo(f"{case}: {row.kl:.5f} ({row.over_absmax:+.5f} ± {error:.5f})", err=True)


def read(results: Path) -> list[Measure]:
    if not results.is_file():
        return []
    rows = (json.loads(line) for line in results.read_text(encoding="utf-8").splitlines())
    return [Measure(**(row | {"case": Case(**row["case"])})) for row in rows]


def table(measures: list[Measure]) -> str:
    """Markdown: one line a configuration, and one a width with geometric means over it; the lowest of each bold."""
    rules = [rule.value for rule in ScaleRule]
    lines = [f"| model | part | bits | group | {' | '.join(rules)} |", "|---|---|---:|---:|" + "---:|" * len(rules)]
    by_case = {m.case: m.kl for m in measures}
    models = list(dict.fromkeys(m.case.model for m in measures))
    found = {(models.index(c.model), c.part, c.bits, GROUPS[c.bits].index(c.group)) for c in by_case}
    means: dict[tuple[str, int], list[list[float]]] = {}
    for at, part, bits, group_at in sorted(found):
        model, group = models[at], GROUPS[bits][group_at]
        row = [by_case.get(Case(model, part, bits, group, rule), math.nan) for rule in rules]
        lines.append(f"| {model} | {part} | {bits} | {group} | {cells(row)} |")
        means.setdefault((part, bits), []).append([value / row[0] for value in row])
    for (part, bits), ratios in means.items():
        mean = [statistics.geometric_mean(column) for column in zip(*ratios, strict=True)]
        lines.append(f"| geometric mean, absmax = 1 | {part} | {bits} | all | {cells(mean)} |")
    return "\n".join(lines)


def cells(values: list[float]) -> str:
    return " | ".join(f"**{value:.3g}**" if value == min(values) else f"{value:.3g}" for value in values)


@click.command()
@click.argument("models", type=click.Path(path_type=Path, exists=True, file_okay=False), nargs=-1, required=True)
@click.option("--text", type=click.Path(path_type=Path, exists=True), required=True, help="JSON list of {text}.")
@click.option("--results", type=click.Path(path_type=Path), required=True, help="File of measures, added to.")
@click.option("--sequences", default=4, show_default=True, help="Articles.")
@click.option("--length", default=256, show_default=True, help="Tokens of each; at most the model's context.")
@click.option("--smallest-group", default=64, show_default=True, help="32 only for a model that never was on a grid.")
def main(models: tuple[Path, ...], text: Path, results: Path, sequences: int, length: int, smallest_group: int) -> None:
    """Measure MODELS and print the tables."""
    for folder in models:
        done = {m.case for m in read(results)}
        todo = []
        for configuration in configurations(smallest_group):
            absmax, *others = (Case(folder.name, *configuration, rule.value) for rule in ScaleRule)
            missing = [case for case in others if case not in done]
            todo += [absmax, *missing] if missing else []
        if todo:
            measure(Bench(folder, text, sequences, length), todo, results)
    click.echo(table(read(results)))


if __name__ == "__main__":
    main()
