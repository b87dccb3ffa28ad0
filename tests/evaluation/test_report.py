"""Artifacts that carry what was measured on a text: the same numbers as `lbq eval`, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lbq.conversion import convert
from lbq.evaluation import evaluate
from lbq.evaluation.report import Measurement, ReportRequest
from lbq.evaluation.windows import BUNDLED_TOKENS, bundled_text
from lbq.formats.artifact import open_artifact, verify
from lbq.formats.errors import DataError, DeviceError, UsageError
from lbq.formats.quality import Quality
from lbq.formats.report import read_report
from lbq.quantizer.convert import write_artifact
from lbq.quantizer.prepare import prepare
from lbq.quantizer.request import make_request
from lbq.quantizer.source import resolve
from lbq.runtime.devices import CpuDevice

pytestmark = pytest.mark.usefixtures("one_thread")

Lbq = Callable[..., Any]
TEXT = "The lighthouse keeper climbed the stairs each evening at the same hour, carrying oil and a brass lamp. " * 4
SETTINGS = ("--gs", "32", "--device", "cpu", "--report", "kl")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_report_has_the_scores_of_lbq_eval(
    checkpoints: Mapping[str, Path], family: str, text: Path, tmp_path: Path, lbq: Lbq
) -> None:
    source, out = checkpoints[family], tmp_path / "out"
    done = lbq("convert", source, *SETTINGS, "--text", text, "--out", out, "--json")
    assert (done.code, done.err) == (0, "")
    found = evaluate(out, source, text, device="cpu")
    quality = read_report(out).quality
    assert quality is not None
    assert (quality.scores, quality.device) == (found.scores, "cpu")
    assert quality.text.path == "text.txt"  # and not where it lies
    assert (quality.text.sha256, quality.text.tokens) == (found.text.sha256, found.text.tokens)
    assert json.loads(done.out)["quality"]["scores"]["kl"]["mean"] == found.scores.kl.mean
    with open_artifact(out) as artifact:
        summary = artifact.manifest.summary
        assert (summary.kl, summary.same_top1) == (found.scores.kl.mean, found.scores.same_top1.mean)
        assert summary.kl is not None
        assert summary.kl > 1e-3
        assert not [problem for _, problem in verify(out, artifact.manifest) if problem]


def test_same_input_same_bytes(checkpoints: Mapping[str, Path], text: Path, tmp_path: Path, lbq: Lbq) -> None:
    outs = [tmp_path / name for name in ("one", "two", "plain")]
    for out in outs[:2]:
        assert lbq("convert", checkpoints["llama"], *SETTINGS, "--text", text, "--out", out).code == 0
    assert lbq("convert", checkpoints["llama"], *SETTINGS[:4], "--out", outs[2]).code == 0
    one, two, plain = ({path.name: path.read_bytes() for path in out.iterdir()} for out in outs)
    assert one == two
    assert {name for name in one if one[name] != plain.get(name)} == {"report.json", "report.html", "lbq.json"}


def test_what_is_printed(checkpoints: Mapping[str, Path], text: Path, tmp_path: Path, lbq: Lbq) -> None:
    source, out = checkpoints["llama"], tmp_path / "out"
    done = lbq("convert", source, *SETTINGS, "--text", text, "--out", out)
    quality = read_report(out).quality
    assert quality is not None
    kl = quality.scores.kl
    line = f"{kl.mean:.5f} ± {kl.standard_error:.5f}"
    assert line in done.out
    assert "windows of 128 tokens of text.txt; ± is the standard error" in done.out
    assert "lbq eval" not in done.out
    shown = lbq("inspect", out).out
    assert f"KL divergence {line}, same top-1 token {quality.scores.same_top1.mean:.2%}" in shown
    plain = lbq("convert", source, *SETTINGS[:4], "--out", tmp_path / "plain")
    assert f"What it cost: lbq eval {tmp_path / 'plain'} --against {source}" in plain.out
    assert "KL" not in lbq("inspect", tmp_path / "plain").out


def test_the_text_that_ships_with_lbq(checkpoints: Mapping[str, Path], tmp_path: Path, lbq: Lbq) -> None:
    source, out = checkpoints["llama"], tmp_path / "out"
    assert lbq("convert", source, *SETTINGS, "--report-tokens", "300", "--out", out).code == 0
    quality = read_report(out).quality
    assert quality is not None
    assert (quality.text.path, quality.text.tokens) == ("lbq:english.txt", 256)
    found = evaluate(out, source, device="cpu", max_tokens=300)
    assert found.scores == quality.scores
    assert len(bundled_text().text) > 4 * BUNDLED_TOKENS
    assert evaluate(out, out, device="cpu").text.tokens == BUNDLED_TOKENS


def test_manifests_from_before(kept_artifact: Path, artifact: Path, reseal: Callable[[Path], None]) -> None:
    manifest = json.loads((artifact / "lbq.json").read_text())
    assert manifest["summary"].pop("kl") is manifest["summary"].pop("same_top1") is None
    report = json.loads((artifact / "report.json").read_text())
    assert report.pop("quality") is None
    (artifact / "lbq.json").write_text(json.dumps(manifest))
    (artifact / "report.json").write_text(json.dumps(report))
    reseal(artifact)
    assert read_report(artifact) == read_report(kept_artifact)
    with open_artifact(artifact) as opened, open_artifact(kept_artifact) as kept:
        assert opened.manifest.summary == kept.manifest.summary


def test_in_python(checkpoints: Mapping[str, Path], text: Path, tmp_path: Path, lbq: Lbq) -> None:
    """The same bytes as the command's, and everybody hears of progress, in order."""
    told: list[str] = []

    def hear(what: str) -> Callable[..., None]:
        return lambda *_: None if told and told[-1] == what else told.append(what)

    done = convert(
        checkpoints["llama"],
        tmp_path / "python",
        group=32,
        device="cpu",
        report="full",
        text=text,
        on_units=hear("units"),
        on_tuned=hear("tuned"),
        on_progress=hear("tensors"),
        on_measured=hear("measured"),
    )
    assert told == ["units", "tensors", "measured"]
    assert done.report.quality is not None
    assert done.report.quality.frontier
    command = ("convert", checkpoints["llama"], *SETTINGS[:-1], "full", "--text", text, "--out", tmp_path / "command")
    assert lbq(*command).code == 0
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("python", "command"))
    assert one == other


# ------------------------------------------------------------------------ what goes wrong


FAULTS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "text without a measure": (("--report", "weights", "--text", "text.txt"), 2, "are for --report kl"),
    "tokens without a measure": (("--report", "weights", "--report-tokens", "9"), 2, "are for --report kl"),
    "no tokens": (("--report-tokens", "0"), 2, "--report-tokens 0: a positive number is needed"),
    "too few tokens": (("--report-tokens", "9"), 2, "9 tokens at most: a window has 128"),
    "another report": (("--report", "all"), 2, "all"),
    "no such text": (("--text", "absent.txt"), 4, "absent.txt: No such file"),
    "short text": (("--text", "short.txt"), 3, "short.txt: 5 tokens, and a window takes 128; give a longer text"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_before_any_work(
    checkpoints: Mapping[str, Path], text: Path, lbq: Lbq, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.chdir(text.parent)
    Path("short.txt").write_text("hello")
    monkeypatch.setattr("lbq.quantizer.convert.StagedFolder", None)
    options, code, message = FAULTS[fault]
    done = lbq("convert", checkpoints["llama"], *SETTINGS, "--out", "out", *options)
    assert (done.code, done.out) == (code, "")
    assert message in done.error
    assert sorted(os.listdir()) == ["short.txt", "text.txt"]


def test_no_tokenizer(make_checkpoint: Callable[..., Path], tmp_path: Path, lbq: Lbq) -> None:
    source = make_checkpoint("llama")
    (source / "tokenizer.json").unlink()
    done = lbq("convert", source, *SETTINGS, "--out", tmp_path / "out")
    assert done.code in (3, 4)
    assert "tokenizer.json" in done.error
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_used(checkpoints: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = CpuDevice(exact=True, note="the GPU is not used: it is old")
    monkeypatch.setattr("lbq.evaluation.report.find_device", lambda *_, **__: found)
    for strict in (False, True):
        prepared = prepare(resolve(checkpoints["llama"]), make_request(4, 32, strict=strict))
        if strict:
            with pytest.raises(DeviceError, match="the GPU is not used: it is old; refused under --strict"):
                Measurement(ReportRequest("kl"), prepared)
        else:
            assert Measurement(ReportRequest("kl"), prepared).device == found


@pytest.mark.parametrize("error", [DataError("broken"), KeyboardInterrupt()])
def test_a_failed_measurement_leaves_what_was_there(
    checkpoints: Mapping[str, Path], artifact: Path, error: BaseException
) -> None:
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    prepared = prepare(resolve(checkpoints["llama"]), make_request(8))
    seen: list[Path] = []

    def measure(folder: Path) -> Quality:
        with open_artifact(folder) as opened:
            assert not [problem for _, problem in verify(folder, opened.manifest) if problem]
        seen.append(folder)
        raise error

    with pytest.raises(type(error)):
        write_artifact(prepared, artifact, overwrite=True, device="cpu", measure=measure)
    assert seen
    assert before == {path.name: path.read_bytes() for path in artifact.iterdir()}
    assert [path.name for path in artifact.parent.iterdir() if path.name.startswith(".")] == []


def test_killed_while_measuring(checkpoints: Mapping[str, Path], text: Path, tmp_path: Path, lbq: Lbq) -> None:
    source, out = checkpoints["llama"], tmp_path / "out"
    program = (
        "import os, signal, sys\n"
        "from lbq.evaluation import report\n"
        "report.stream = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from lbq import cli\n"
        "cli._run()\n"
    )
    command = ("convert", source, *SETTINGS, "--text", text, "--out", out)
    done = subprocess.run([sys.executable, "-c", program, *map(str, command)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert lbq(*command).code == 0
    assert lbq("verify", out).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


def test_requests() -> None:
    with pytest.raises(UsageError, match="--report graphs: weights, kl"):
        ReportRequest("graphs")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--report-tokens '9'"):
        ReportRequest("kl", tokens="9")  # type: ignore[arg-type]
