"""Artifacts of every width in many versions of transformers and compressed-tensors: who loads them, and as what.

    python scripts/sweep_versions.py --out FOLDER [--transformers 5.0.0,5.23.0] [--compressed-tensors 0.18.0,0.20.0]

Each version of transformers gets a virtual environment in FOLDER, with all else that this environment has (torch above
all) behind its own packages; each version of compressed-tensors is a folder beside. What was installed is used again.
A pair passes a width if the artifact's logits are those of a plain checkpoint with the weights that the codes stand
for, to the last bit, and both generate the same tokens. Prints the table of docs/interop.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

from lbq import convert
from lbq.formats.artifact import open_artifact
from lbq.formats.packing import BITS

TRANSFORMERS = "4.57.6,5.0.0,5.5.4,5.10.4,5.15.1,5.20.2,5.23.0"
COMPRESSED_TENSORS = "0.15.0.1,0.16.0,0.17.1,0.18.0,0.19.0,0.20.0"
WIDTHS = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 264}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}

LOAD = """
import json, sys, warnings
import torch
from transformers import AutoModelForCausalLM
warnings.simplefilter("ignore")
ids = (torch.arange(3, 40) * 7 % 256).unsqueeze(0)

def answers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(ids).logits
        return logits, model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)

for artifact, plain in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        (found, text), (expected, same) = answers(artifact), answers(plain)
        result = {"difference": float((found - expected).abs().max()), "same": torch.equal(text, same)}
    except Exception as error:
        result = {"error": (str(error).strip() or type(error).__name__).splitlines()[0][:160]}
    print("RESULT", json.dumps(result))
"""


@dataclass(frozen=True)
class Outcome:
    """Of a width in a pair of versions: an error, or how far the logits are and whether the tokens are the same."""

    error: str = ""
    difference: float = 0.0
    same: bool = True

    @property
    def passed(self) -> bool:
        return not self.error and self.same and self.difference == 0

    @property
    def says(self) -> str:
        return self.error or f"logits differ by {self.difference:.1e}, tokens {'the same' if self.same else 'differ'}"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="For models and packages; kept.")
@click.option("--transformers", default=TRANSFORMERS, show_default=True)
@click.option("--compressed-tensors", default=COMPRESSED_TENSORS, show_default=True)
def main(out: Path, transformers: str, compressed_tensors: str) -> None:
    """Make the table."""
    models = make_models(out / "models")
    tools = {version: environment(out / f"transformers-{version}", version) for version in transformers.split(",")}
    packs = {version: package(out / f"ct-{version}", version) for version in compressed_tensors.split(",")}
    click.echo(f"| transformers, compressed-tensors | {' | '.join(packs)} |\n|---|{'---|' * len(packs)}")
    reasons: dict[str, list[str]] = {}
    for version, python in tools.items():
        cells = []
        for pack, folder in packs.items():
            found = load(python, folder, models)
            cells.append(", ".join(str(bits) for bits, outcome in found.items() if outcome.passed) or "none")
            for bits, outcome in found.items():
                if not outcome.passed:
                    reasons.setdefault(f"{bits} bits: {outcome.says}", []).append(f"{version} with {pack}")
        click.echo(f"| {version} | {' | '.join(cells)} |")
    for reason, pairs in reasons.items():
        click.echo(f"\n{reason}\n    {'; '.join(pairs)}")


def make_models(root: Path) -> dict[int, tuple[Path, Path]]:
    """An artifact and its plain counterpart a width: a tied head that becomes a packed one, biases, a row's scale."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    source = root / "source"
    if not source.is_dir():
        torch.manual_seed(0)
        config = Qwen2Config(**WIDTHS, **HEADS, tie_word_embeddings=True, initializer_range=0.2)
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    made = {}
    for bits in BITS:
        artifact, plain = root / f"int{bits}", root / f"int{bits}-plain"
        if not artifact.is_dir():
            convert(source, artifact, bits=bits, group=32, device="cpu")
        if not plain.is_dir():
            write_plain(artifact, plain)
        made[bits] = (artifact, plain)
    return made


def write_plain(artifact: Path, out: Path) -> None:
    """The weights that an artifact stands for, in float32."""
    with open_artifact(artifact) as opened:
        tensors = {f"{n}.weight": opened.packed(n).dequantize(torch.float32) for n in opened.manifest.quantized}
        tensors |= {name: opened.dense(name).float() for name in opened.manifest.dense}
        config = json.loads((artifact / "config.json").read_text())
        del config["quantization_config"]
        out.mkdir()
        (out / "config.json").write_text(json.dumps(config))
        save_file(tensors, out / "model.safetensors", {"format": "pt"})


def environment(folder: Path, version: str) -> Path:
    """The interpreter of an environment with a version of transformers and what that asks for."""
    python = folder / "bin" / "python"
    if not (folder / "done").is_file():
        venv.create(folder, with_pip=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (own / "zz_shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip(python, f"transformers=={version}")
        (folder / "done").touch()
    return python


def package(folder: Path, version: str) -> Path:
    """A folder with a version of compressed-tensors alone."""
    if not folder.is_dir():
        pip(Path(sys.executable), "--no-deps", "--target", str(folder), f"compressed-tensors=={version}")
    return folder


def pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True, stderr=subprocess.DEVNULL)


def load(python: Path, folder: Path, models: dict[int, tuple[Path, Path]]) -> dict[int, Outcome]:
    """What a pair of versions makes of every width."""
    settings = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    paths = [str(path) for pair in models.values() for path in pair]
    done = subprocess.run([python, "-c", LOAD, *paths], env=settings, capture_output=True, text=True, timeout=600)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if len(lines) != len(models):
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return dict.fromkeys(models, Outcome(error=last[:160]))
    return {bits: Outcome(**json.loads(line)) for bits, line in zip(models, lines, strict=True)}


if __name__ == "__main__":
    main()
