"""`lbq convert`, `inspect` and `verify` where all is well: what they print, where, and in which form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from lbq.cli import cli
from lbq.cli.display import Size, plain, size
from lbq.formats.manifest import read_manifest
from lbq.formats.report import Report

Lbq = Callable[..., Any]


def test_help(lbq: Lbq) -> None:
    done = lbq("--help")
    assert (done.code, done.err) == (0, "")
    assert all(name in done.out for name in cli.commands)
    assert set(cli.commands) >= {"convert", "inspect", "verify", "run"}
    for code in (
        "0 done",
        "2 usage",
        "3 bad data",
        "4 input/output",
        "5 busy",
        "6 the Hub",
        "7 the device",
        "130",
        "143",
    ):
        assert code in done.out
    for name, command in cli.commands.items():
        done = lbq(name, "-h")
        assert (done.code, done.err) == (0, "")
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.opts[-1] in done.out
        assert command.help is not None
        assert command.help.strip()


def test_every_option_of_convert_is_explained() -> None:
    for parameter in cli.commands["convert"].params:
        if isinstance(parameter, click.Option) and parameter.name != "max_shard_bytes":
            assert parameter.help or isinstance(parameter.type, click.Choice), parameter.name


def test_version(lbq: Lbq) -> None:
    import lbq as package

    assert lbq("--version").out == f"lbq {package.__version__}\n"


def test_no_command(lbq: Lbq) -> None:
    assert lbq().code == 2
    assert lbq("frobnicate").error == "No such command 'frobnicate'."


def test_convert(checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = lbq("convert", checkpoints["llama"], "--gs", "32")
    assert (done.code, done.err) == (0, "")  # no progress where nobody watches
    target = Path("llama-int4-g32")
    assert os.listdir() == [str(target)]
    report = json.loads((target / "report.json").read_text())["modules"]
    worst = sorted(report, key=lambda module: module["cosine"])[:10]
    listed = [line.split()[0] for line in done.out.splitlines() if line.startswith(("model.", "lm_head"))]
    assert listed == [module["name"] for module in worst]
    assert done.out.endswith(f"Run it: lbq run {target}\n")
    assert f"{read_manifest(target).summary.cosine:.5f}" in done.out
    assert "\x1b" not in done.out


def test_convert_json(checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path) -> None:
    done = lbq("convert", checkpoints["llama"], "--gs", "64", "--out", tmp_path / "out", "--json")
    assert done.code == 0
    result = json.loads(done.out)
    manifest = read_manifest(tmp_path / "out")
    assert set(result) == {"path", "bytes", "summary", "notes"}
    assert result["path"] == str(tmp_path / "out")
    assert result["bytes"] == sum(entry.size for entry in manifest.files.values())
    assert (
        result["notes"]
        == list(manifest.notes)
        == ["96 inputs do not divide into groups of 64: groups of 32 instead (2 layers)"]
    )
    assert done.err == f"note: {manifest.notes[0]}\n"
    assert result["summary"]["cosine"] == manifest.summary.cosine


def test_notes_are_said_and_kept(checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path) -> None:
    done = lbq("convert", checkpoints["llama"], "--gs", "64", "--keep", "q_proj", "--out", tmp_path / "out")
    said = [line.removeprefix("note: ") for line in done.err.splitlines()]
    assert len(said) == 2
    assert said == list(read_manifest(tmp_path / "out").notes)
    assert said == json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert lbq("inspect", tmp_path / "out").err == done.err


def test_overwrite(checkpoints: Mapping[str, Path], artifact: Path, lbq: Lbq) -> None:
    before = (artifact / "lbq.json").read_bytes()
    done = lbq("convert", checkpoints["llama"], "--bits", "3", "--gs", "32", "--out", artifact, "--overwrite")
    assert done.code == 0
    assert read_manifest(artifact).method.bits == 3
    assert (artifact / "lbq.json").read_bytes() != before
    assert lbq("verify", artifact).code == 0
    assert os.listdir(artifact.parent) == ["artifact"]


def test_options_reach_the_manifest(checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path) -> None:
    options = (
        "--bits 3 --gs row --lm-head 4 --keep layers.1 --set down_proj=8:32 --for vllm,sglang --max-shard-size 40KB"
    )
    done = lbq("convert", checkpoints["llama"], *options.split(), "--device", "cpu", "--out", tmp_path / "out")
    assert done.code == 0
    manifest = read_manifest(tmp_path / "out")
    method = manifest.method
    assert (method.bits, method.group, method.lm_head) == (3, None, 4)
    assert (method.keep, method.set, method.readers) == (("layers.1",), ("down_proj=8:32",), ("vllm", "sglang"))
    assert len([name for name in manifest.files if name.endswith(".safetensors")]) > 2
    assert "INT3, group row, head 4 bits" in lbq("inspect", tmp_path / "out").out


def test_inspect(kept_artifact: Path, lbq: Lbq) -> None:
    done = lbq("inspect", kept_artifact)
    assert (done.code, done.err) == (0, "")
    assert "2 layers, hidden 64, vocabulary 264, context 128" in done.out
    rows = {line.split()[0]: line.split()[1:] for line in done.out.splitlines() if "×" in line}
    assert rows["model.layers.*.mlp.down_proj"][:4] == ["64×96", "INT4", "32", "2"]
    assert rows["lm_head"][:4] == ["264×64", "INT8", "row", "1"]
    assert rows["model.embed_tokens.weight"][:3] == ["264×64", "BF16", "1"]
    cosines = [m.cosine for m in json_report(kept_artifact).modules if m.name.endswith("mlp.down_proj")]
    assert rows["model.layers.*.mlp.down_proj"][4] == f"{min(cosines):.5f}"
    layers = lbq("inspect", kept_artifact, "--layers").out
    assert all(name in layers for name in read_manifest(kept_artifact).quantized)


def json_report(folder: Path) -> Report:
    from lbq.formats import json_file

    return json_file.read(folder / "report.json", Report)


def test_inspect_json(kept_artifact: Path, lbq: Lbq) -> None:
    done = lbq("inspect", kept_artifact, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.out == (kept_artifact / "lbq.json").read_text()


def test_inspect_reads_no_weights(kept_artifact: Path, lbq: Lbq, monkeypatch: pytest.MonkeyPatch) -> None:
    from lbq.formats.artifact import Artifact

    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Artifact, "packed", refuse)
    assert lbq("inspect", kept_artifact).code == 0


def test_what_a_manifest_says_does_not_steer_the_terminal(artifact: Path, lbq: Lbq) -> None:
    path = artifact / "lbq.json"
    manifest = json.loads(path.read_text())
    evil = "\x1b]0;owned\x07\nlbq: all is well"
    manifest["notes"] = [evil]
    manifest["source"]["name"] = evil
    manifest["tools"] = {evil: evil}
    path.write_text(json.dumps(manifest))
    done = lbq("inspect", artifact)
    assert done.code == 0
    assert "\x1b" not in done.out + done.err
    assert "\nlbq: all" not in done.out + done.err
    assert "\\x1b]0;owned" in done.out


def test_inspect_wants_the_report_of_this_artifact(artifact: Path, lbq: Lbq) -> None:
    path = artifact / "report.json"
    text = path.read_text()
    path.write_text(text.replace("mlp.up_proj", "mlp.pu_proj"))
    assert "its layers are not those of the manifest" in lbq("inspect", artifact).error
    assert lbq("verify", artifact).code == 3


def test_verify(kept_artifact: Path, lbq: Lbq) -> None:
    done = lbq("verify", kept_artifact)
    assert (done.code, done.err) == (0, "")
    count = len(os.listdir(kept_artifact)) - 1
    assert done.out.startswith(f"{kept_artifact}: {count} files, ")
    done = lbq("verify", kept_artifact, "--json")
    assert json.loads(done.out) == {"path": str(kept_artifact), "ok": True, "problems": {}}


def test_a_bug_is_called_one(lbq: Lbq, kept_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("lbq.formats.artifact.open_artifact", bug)
    done = lbq("inspect", kept_artifact)
    assert done.code == 1
    assert (
        done.err
        == "lbq: error: a bug in lbq, please report it: RuntimeError: two lines (LBQ_TRACEBACK=1 shows where)\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "lbq: interrupted\n"),
        (MemoryError(), 4, "lbq: error: out of memory\n"),
        (OSError(5, "Input/output error", "/disk/file"), 4, "lbq: error: /disk/file: Input/output error\n"),
    ],
)
def test_errors_of_the_system(
    error: BaseException, code: int, says: str, lbq: Lbq, kept_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("lbq.formats.artifact.open_artifact", fail)
    done = lbq("inspect", kept_artifact)
    assert (done.code, done.err) == (code, says)


def test_closed_pipes(kept_artifact: Path) -> None:
    """Whoever reads the output may stop: no traceback, and the exit code of a closed pipe."""
    program = (
        "import os, sys\nfrom lbq import cli\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\ncli.main()\n"
    )
    command = [sys.executable, "-c", program, "inspect", kept_artifact, "--layers"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_pipe_of_messages(tmp_path: Path) -> None:
    """The exit code of an error is told although nobody reads why."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lbq.cli", "verify", tmp_path / "missing"]
    done = subprocess.run(command, stderr=write, check=False)
    os.close(write)
    assert done.returncode == 4


def test_json_of_a_path_that_is_not_utf8(kept_artifact: Path, lbq: Lbq, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"art\xff")
    odd.symlink_to(kept_artifact)
    done = lbq("verify", odd, "--json")
    assert done.code == 0
    assert json.loads(done.out)["path"].endswith("art\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("500 MB", 5 * 10**8),
        ("4GiB", 4 << 30),
        ("1.5kb", 1500),
        ("7", 7),
        ("9" * 25, int("9" * 25)),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert Size().convert(text, None, None) == expected


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5TB", "5 G B", "nan", "1e9", "٥GB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Size().convert(text, None, None)


def test_what_is_shown() -> None:
    assert [size(n) for n in (0, 999, 1000, 140_900_000, 5 * 10**12)] == [
        "0 B",
        "999 B",
        "1.0 KB",
        "140.9 MB",
        "5000.0 GB",
    ]
    assert plain("a\tb\n\x1b[0m\u202e\udcff é×") == r"a\tb\n\x1b[0m\u202e\udcff é×"


def test_a_checkpoint_without_a_tokenizer(make_checkpoint: Callable[..., Path], lbq: Lbq, tmp_path: Path) -> None:
    source = make_checkpoint()
    (source / "tokenizer.json").unlink()
    done = lbq("convert", source, "--gs", "32", "--out", tmp_path / "out")
    assert done.code == 0
    assert done.err.startswith("note: no tokenizer.json")
    assert "Run it" not in done.out
    assert lbq("convert", source, "--gs", "32", "--out", tmp_path / "strict", "--strict").code == 2


@pytest.mark.parametrize("name", ["./typo", "../typo", "a/b/c", "typo"])
def test_names_that_are_no_hub_ids(name: str, lbq: Lbq) -> None:
    done = lbq("convert", name)
    assert (done.code, "no such folder" in done.error) == (4, True)


def test_overrides_take_the_group(checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path) -> None:
    assert (
        lbq("convert", checkpoints["llama"], "--gs", "32", "--set", "down_proj=3", "--out", tmp_path / "out").code == 0
    )
    entry = read_manifest(tmp_path / "out").quantized["model.layers.0.mlp.down_proj"]
    assert (entry.bits, entry.group) == (3, 32)


def test_three_bits_for_sglang_are_said(checkpoints: Mapping[str, Path], lbq: Lbq) -> None:
    done = lbq("convert", checkpoints["llama"], "--bits", "3", "--gs", "32", "--for", "sglang", "--dry-run", "--strict")
    assert (done.code, "SGLang does not read 3-bit" in done.error) == (2, True)


def test_unknown_keys_stay_behind(make_checkpoint: Callable[..., Path], lbq: Lbq, tmp_path: Path) -> None:
    source = make_checkpoint(attn_implementation="someone/kernels")
    done = lbq("convert", source, "--gs", "32", "--out", tmp_path / "out")
    assert "unknown keys are ignored: attn_implementation" in done.err
    assert "attn_implementation" not in json.loads((tmp_path / "out/config.json").read_text())
