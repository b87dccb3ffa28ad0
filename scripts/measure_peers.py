"""Other tools' quantisation of a checkpoint beside lbq's, on the same text: AutoRound, GPTQ and HQQ.

    python scripts/measure_peers.py CHECKPOINT --out FOLDER --text HELDOUT.txt --calib TRAIN.json [--bits 4] [--gs 64]

Each tool writes a checkpoint of its own into FOLDER, which is kept and used again; all are then read in one pass, as
``lbq compare`` does. A tool that is not installed is left out, and said. In an environment with lbq:

    pip install --no-deps hqq termcolor
    pip install --no-deps gptqmodel tokenicer device-smi logbar pypcre defuser threadpoolctl torchao pillow

GPTQModel 7.7.0 asks for a newer torch than 2.13 and runs on it all the same; ``--no-deps`` leaves torch as it is. On a
machine with few cores it wants GPTQMODEL_CPU_WORKERS=2 in the environment.

Tools leave the output head in 16 bits, and so does lbq here. All that calibrate are given the same samples, one
stretch of a document each, and symmetric codes in groups of the same sizes: where a group does not divide a layer's
inputs, that layer has the smaller one of lbq's conversion. All else is each tool's default.

HQQ has a float16 scale and a float16 zero point for every group, in a format which lbq does not read: its weights are
dequantised to float32 and compared as they are, at the bits that its codes, scales and zero points take. Twice the
group gives it the bits of the others: both are measured. Its groups are of the flattened matrix and need not divide a
row.

At 2 bits, which lbq does not write, the others are measured among themselves.
"""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

from lbq import compare, convert
from lbq.formats.comparison import Compared
from lbq.formats.packing import BITS
from lbq.formats.scheme import effective_group
from lbq.quantizer.families import read_spec

COMPANIONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Job:
    """What every tool is asked for."""

    source: Path
    bits: int
    group: int
    calibration: list[str]  # texts of about ``seqlen`` tokens
    iters: int
    seqlen: int

    def linears(self) -> dict[str, int]:
        """The inputs of every linear layer but the head."""
        spec = read_spec(self.source).spec
        return {p.name: p.in_features for p in spec.projections() if p.name != spec.head.name}

    def smaller_groups(self) -> dict[str, int]:
        """Layers with another group than was asked for."""
        groups = {name: effective_group(inputs, self.group) or inputs for name, inputs in self.linears().items()}
        return {name: group for name, group in groups.items() if group != self.group}


@dataclass(frozen=True)
class Tool:
    """Makes a checkpoint; ``package`` is what it takes. ``bits``: of a weight, where the checkpoint does not say."""

    package: str
    make: Callable[[Job, Path], object]
    bits: float | None = None


def lbq_rtn(job: Job, out: Path) -> None:
    convert(job.source, out, bits=job.bits, group=job.group, lm_head=16)


def lbq_autoround(job: Job, out: Path) -> None:
    convert(
        job.source, out, bits=job.bits, group=job.group, lm_head=16, method="autoround", device="cpu",
        iters=job.iters, nsamples=len(job.calibration), seqlen=job.seqlen,
        calib=str(_dataset(job, out.with_suffix(".json"))),
    )  # fmt: skip


def autoround(job: Job, out: Path, iters: int | None = None) -> None:
    from auto_round import AutoRound

    tool = AutoRound(
        str(job.source),
        bits=job.bits,
        group_size=job.group,
        sym=True,
        iters=job.iters if iters is None else iters,
        nsamples=len(job.calibration),
        seqlen=job.seqlen,
        dataset=str(_dataset(job, out.with_suffix(".json"))),
        device_map="cpu",
        disable_model_free=True,
        layer_config={name: {"bits": job.bits, "group_size": g} for name, g in job.smaller_groups().items()} or None,
    )
    made = out.with_suffix(".made")
    tool.quantize_and_save(str(made), format="auto_round")
    next(path.parent for path in made.rglob("config.json")).rename(out)


def gptq(job: Job, out: Path) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    smaller = {f"+:^{re.escape(name)}$": {"group_size": g} for name, g in job.smaller_groups().items()}
    settings = QuantizeConfig(
        bits=job.bits, group_size=job.group, sym=True, dynamic=smaller or None, offload_to_disk=False
    )
    model = GPTQModel.load(str(job.source), settings, device="cpu")
    model.quantize(job.calibration, batch_size=8)
    model.save(str(out))


def hqq(job: Job, out: Path, widen: int = 1) -> None:
    """HQQ's own search at its defaults, along the inputs; scales and zero points as the float16 it stores."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    tensors = load_file(job.source / "model.safetensors")
    settings = BaseQuantizeConfig(nbits=job.bits, group_size=widen * job.group, axis=1)
    for name in [f"{module}.weight" for module in job.linears()]:
        linear = torch.nn.Linear(*reversed(tensors[name].shape), bias=False)
        linear.weight = torch.nn.Parameter(tensors[name].float(), requires_grad=False)
        made = HQQLinear(linear, settings, compute_dtype=torch.float16, device="cpu")
        codes = Quantizer.unpack[made.meta["packing"]](made.W_q, dtype=torch.float32)
        if job.bits == 3:  # padded to words of ten
            codes = codes[: tensors[name].numel() // (widen * job.group)]
        zero, scale = made.meta["zero"].float(), made.meta["scale"].float()
        tensors[name] = ((codes - zero) * scale).reshape(tensors[name].shape).contiguous()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for name in COMPANIONS:
        (out / name).write_bytes((job.source / name).read_bytes())


def _dataset(job: Job, path: Path) -> Path:
    path.write_text(json.dumps([{"text": text} for text in job.calibration]))
    return path


def tools(job: Job) -> dict[str, Tool]:
    """By the name of the checkpoint."""
    pair = 32  # bits of a float16 scale and a float16 zero point
    own = {"lbq-rtn": Tool("lbq", lbq_rtn), "lbq-autoround": Tool("auto_round", lbq_autoround)}
    return {
        **(own if job.bits in BITS else {}),
        "autoround-rtn": Tool("auto_round", lambda job, out: autoround(job, out, iters=0)),
        "autoround": Tool("auto_round", autoround),
        "gptq": Tool("gptqmodel", gptq),
        f"hqq-g{job.group}": Tool("hqq", hqq, job.bits + pair / job.group),
        f"hqq-g{2 * job.group}": Tool("hqq", lambda job, out: hqq(job, out, 2), job.bits + pair / (2 * job.group)),
    }


def calibration(path: Path, tokenizer_folder: Path, samples: int, seqlen: int) -> list[str]:
    """The first ``seqlen`` tokens of ``samples`` documents that have as many, evenly spaced in the file, as text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    documents = [document["text"] for document in json.loads(path.read_text()) if len(document["text"]) > 8 * seqlen]
    assert len(documents) >= samples, f"{path} is too short"
    found = []
    for start in range(0, samples * (len(documents) // samples), len(documents) // samples):
        ids = tokenizer(documents[start][: 16 * seqlen], add_special_tokens=False)["input_ids"]
        assert len(ids) >= seqlen, f"{path}: a document with more than 8 characters a token"
        found.append(tokenizer.decode(ids[:seqlen]))
    return found


def row(model: Compared, bits: float | None, linear_share: float) -> str:
    """A line of a Markdown table; ``bits`` are those of layers but the head, which keeps 16."""
    scores = model.scores
    assert scores is not None
    assert model.weight_cosine is not None
    whole = model.storage.bits_per_weight
    blocks = bits if bits is not None else (whole - 16 * (1 - linear_share)) / linear_share
    less = model.difference
    cells = (
        Path(model.model).name,
        f"{blocks:.2f}",
        f"{scores.kl.mean:.4f} ± {scores.kl.standard_error or 0:.4f}",
        "" if less is None else f"{less.mean:+.4f} ± {less.standard_error or 0:.4f}",
        f"{scores.kl.p99:.2f}",
        f"{scores.same_top1.mean:.1%}",
        f"{scores.perplexity.artifact:.2f}",
        f"{scores.logit_cosine.mean:.4f}",
        f"{model.weight_cosine:.5f}",
    )
    return f"| {' | '.join(cells)} |"


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the tools' checkpoints are kept.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), required=True, help="What they are measured on.")
@click.option(
    "--calib", type=click.Path(path_type=Path, exists=True), required=True, help="JSON list of {text} to tune on."
)
@click.option("--bits", default=4, show_default=True)
@click.option("--gs", "group", default=64, show_default=True)
@click.option("--tools", "names", help="Some of them, as lbq-rtn,gptq.  [all]")
@click.option("--nsamples", default=128, show_default=True)
@click.option("--seqlen", default=256, show_default=True)
@click.option("--iters", default=50, show_default=True, help="AutoRound's.")
@click.option("--max-tokens", default=4096, show_default=True, help="Of the text that is measured.")
@click.option("--threads", default=2, show_default=True)
def main(
    checkpoint: Path,
    out: Path,
    text: Path,
    calib: Path,
    bits: int,
    group: int,
    names: str | None,
    nsamples: int,
    seqlen: int,
    iters: int,
    max_tokens: int,
    threads: int,
) -> None:
    """Quantise CHECKPOINT with every tool and print a Markdown table of what each costs."""
    torch.set_num_threads(threads)
    job = Job(checkpoint, bits, group, calibration(calib, checkpoint, nsamples, seqlen), iters, seqlen)
    out.mkdir(exist_ok=True)
    made: dict[str, Tool] = {}
    for name, tool in tools(job).items():
        folder = out / f"{name}-int{bits}"
        if names is not None and name not in names.split(","):
            continue
        if find_spec(tool.package) is None:
            print(f"{name}: {tool.package} is not installed")
            continue
        if not folder.exists():
            print(f"{name}: making {folder}", flush=True)
            began = time.monotonic()
            tool.make(job, folder)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
            gc.collect()
        made[str(folder)] = tool
    found = compare(list(made), checkpoint, text, max_tokens=max_tokens, device="cpu", threads=threads)
    spec = read_spec(checkpoint).spec
    sizes = {p.name: p.in_features * p.out_features for p in spec.projections()}
    share = 1 - sizes[spec.head.name] / sum(sizes.values())
    print("\n| | bits | KL divergence | less the first's | KL 99% | same top-1 | perplexity | logit cos | weight cos |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for model in found.models:
        print(row(model, made[model.model].bits, share))
    assert found.text is not None
    print(f"\n{found.text.positions} positions in {found.text.windows} windows of {found.text.context} tokens")


if __name__ == "__main__":
    main()
