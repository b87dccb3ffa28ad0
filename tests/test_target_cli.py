"""lbq convert --target-bpw and --report full: what is chosen, written, printed and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hub_stub import Hub
from tokenizers import Tokenizer, processors

from lbq.formats import json_file
from lbq.formats.manifest import read_manifest
from lbq.formats.report import read_report

pytestmark = pytest.mark.usefixtures("one_thread")

Lbq = Callable[..., Any]


@pytest.fixture(scope="module")
def source(checkpoints: Mapping[str, Path]) -> Path:
    return checkpoints["smollm2"]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbq.evaluation.study.TOKENS", 256)
    monkeypatch.setattr("lbq.evaluation.report.BUNDLED_TOKENS", 512)


@pytest.fixture
def chosen(source: Path, lbq: Lbq, tmp_path: Path) -> Path:
    """An artifact of 4.2 bits a weight."""
    done = lbq("convert", source, "--target-bpw", "4.2", "--gs", "32", "--out", tmp_path / "chosen")
    assert (done.code, done.err) == (0, "")
    return tmp_path / "chosen"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_choose_convert_and_say_so(source: Path, lbq: Lbq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = lbq("convert", source, "--target-bpw", "4.2", "--gs", "32", "--keep", "layers.0.mlp.down_proj")
    assert (done.code, done.err) == (0, "")
    target = Path("smollm2-4.2bpw-g32")
    manifest, report = read_manifest(target), read_report(target)
    assert (manifest.method.bits, manifest.method.target_bpw) == (None, 4.2)
    assert 4.0 < manifest.summary.bits_per_weight <= 4.2
    bits = {entry.bits for entry in manifest.quantized.values()}
    assert len(bits) > 1

    quality = report.quality
    assert quality is not None
    assert [s.bits for s in quality.sensitivity] == [8, 4, 3] * 8  # one unit is kept
    assert quality.sensitivity_text is not None
    assert quality.sensitivity_text.sha256 == quality.text.sha256  # its second half
    (point,) = (p for p in quality.frontier if p.measured_kl is not None)
    assert point.bits_per_weight == manifest.summary.bits_per_weight
    assert point.measured_kl.mean == quality.scores.kl.mean == manifest.summary.kl
    assert 0.3 < point.measured_kl.mean / point.predicted_kl < 3
    units = list(dict.fromkeys(s.modules for s in quality.sensitivity))
    for modules, chosen_bits in zip(units, point.bits, strict=True):
        assert {manifest.quantized[module].bits for module in modules} == {chosen_bits}

    rows = [line.split() for line in done.out.partition("divergences at a size")[2].splitlines()]
    row = next(row for row in rows if f"{point.measured_kl.mean:.5f}" in row)
    assert (row[0], row[3]) == (f"{point.bits_per_weight:.2f}", f"{point.predicted_kl:.5f}")
    kinds = [line.split()[0] for line in done.out.partition("Chosen")[2].splitlines()[2:7]]
    assert kinds == [
        "model.layers.*.self_attn.{q_proj,k_proj,v_proj}",
        "model.layers.*.self_attn.o_proj",
        "model.layers.*.mlp.{gate_proj,up_proj}",
        "model.layers.*.mlp.down_proj",
        "lm_head",
    ]
    assert "rtn, at most 4.2 bits a weight, group 32, by" in lbq("inspect", target).out
    assert lbq("verify", target).code == 0


def test_the_same_again_and_from_a_report(source: Path, chosen: Path, lbq: Lbq, tmp_path: Path) -> None:
    """The same bytes; and choices for other sizes without measuring."""
    options = ("--target-bpw", "4.2", "--gs", "32")
    for more in ((), ("--sensitivity", chosen)):
        done = lbq("convert", source, *options, *more, "--out", tmp_path / "again", "--overwrite")
        assert done.code == 0
        assert content(tmp_path / "again") == content(chosen)
    more = ("--sensitivity", chosen, "--target-bpw", "6", "--gs", "32", "--lm-head", "8", "--set", "layers.0.mlp=4")
    plan = json.loads(lbq("convert", source, *more, "--dry-run", "--json").out)
    done = lbq("convert", source, *more, "--json", "--out", tmp_path / "six")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert len(result["quality"]["sensitivity"]) == 3 * 6
    assert 5 < result["summary"]["bits_per_weight"] == plan["bits_per_weight"] <= 6
    written = read_manifest(tmp_path / "six").quantized
    assert msgspec.to_builtins(written) == plan["quantized"]
    assert {entry.bits for name, entry in written.items() if "layers.0.mlp" in name} == {4}
    assert written["lm_head"].bits == 8


def test_a_report_of_another_config(source: Path, chosen: Path, lbq: Lbq, tmp_path: Path) -> None:
    """The same weights are another model with it."""
    other = shutil.copytree(source, tmp_path / "other")
    config = json_file.read(other / "config.json", dict[str, Any])
    (other / "config.json").write_bytes(json_file.encode(config | {"rms_norm_eps": 1e-2}))
    options = ("--target-bpw", "5", "--gs", "32", "--sensitivity", chosen, "--out", tmp_path / "out")
    assert "config.json is not what it read" in lbq("convert", other, *options).error


def test_a_full_report_of_one_number_of_bits(source: Path, lbq: Lbq, tmp_path: Path) -> None:
    done = lbq("convert", source, "--report", "full", "--gs", "32", "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    manifest, quality = read_manifest(tmp_path / "out"), read_report(tmp_path / "out").quality
    assert manifest.method.bits == 4
    assert quality is not None
    assert len(quality.sensitivity) == 3 * 9
    assert {p.measured_kl for p in quality.frontier} == {None}
    sums = [p.predicted_kl for p in quality.frontier]
    assert sums == sorted(sums, reverse=True)
    assert "Least sum of the units' divergences at a size" in done.out
    assert "Chosen" not in done.out


@pytest.mark.parametrize("method", [[], ["--method", "autoround", "--iters", "0"]])
def test_a_calibration_text(source: Path, method: list[str], lbq: Lbq, tmp_path: Path) -> None:
    """Layers are measured on it, whatever the method; the artifact is scored on another text."""
    texts = [{"text": f"Document {i} is about ships, brass lamps and the weather of that day. " * 3} for i in range(9)]
    calib = tmp_path / "texts.json"
    calib.write_text(json.dumps(texts))
    options = ("--target-bpw", "4.5", "--gs", "32", *method, "--out", tmp_path / "out")
    done = lbq("convert", source, *options, "--calib", calib)
    assert done.code == 0, done.err
    manifest, quality = read_manifest(tmp_path / "out"), read_report(tmp_path / "out").quality
    assert (manifest.method.name, manifest.method.target_bpw) == (method[1] if method else "rtn", 4.5)
    assert 4.2 < manifest.summary.bits_per_weight <= 4.5
    assert quality is not None
    assert quality.sensitivity_text is not None
    text = quality.sensitivity_text
    assert (text.path, text.tokens, text.context, text.windows, text.positions) == ("texts.json", 256, 128, 2, 128)
    assert quality.text.path == "lbq:english.txt"
    assert "Each unit alone: 128 positions in 2 windows of 128 tokens of texts.json\n" in done.out
    done = lbq("convert", source, "--calib", calib, "--gs", "32")
    assert "--calib has no effect on --method rtn" in done.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--target-bpw 3.4 --gs 32", "--target-bpw 3.4: this model takes 3.5 to 8.236 bits a weight with these"),
        ("--target-bpw 9", "--target-bpw 9: this model takes"),
        ("--target-bpw nan", "--target-bpw nan: this model takes"),
        ("--target-bpw 3.6 --gs 32 --lm-head 8", "--target-bpw 3.6: this model takes 4."),
        ("--target-bpw 5 --bits 4", "--bits and --target-bpw: give one of them"),
        ("--target-bpw 5 --report kl", "--report kl: --target-bpw measures all that a full report has; leave"),
        ("--target-bpw 5 --dry-run", "--dry-run reads headers, and --target-bpw measures weights; give"),
        ("--sensitivity x", "--sensitivity is for --target-bpw and --report full"),
        ("--target-bpw 5 --set layers=8 --lm-head 4", "--target-bpw: --set, --keep and --lm-head leave nothing"),
        ("--target-bpw 5 --calib nowhere.txt", "nowhere.txt: "),
        ("--target-bpw 5 --calib x.txt --sensitivity y", "--calib has no effect on --method rtn"),
        ("--target-bpw 5 --sensitivity nowhere", "nowhere: no such folder"),
    ],
)
def test_refusals(options: str, message: str, source: Path, lbq: Lbq, tmp_path: Path) -> None:
    done = lbq("convert", source, *options.split(), "--out", tmp_path / "out")
    assert done.code in (2, 4)
    assert done.error.startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def on_the_hub(source: Path, hub: Hub) -> str:
    hub.add_folder("user/model", source)
    return "user/model"


def weights_fetched(hub: Hub) -> bool:
    """But for headers."""
    return any(r.storage and r.method == "GET" and not r.headers.get("range", "") for r in hub.requests)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--calib nowhere.txt", "nowhere.txt: "),
        ("--calib short.txt", "short.txt: does not fill one sample"),
        ("--sensitivity nowhere", "nowhere: no such folder"),
        ("--sensitivity chosen --gs 64", "chosen: its report does not have model.layers.0.self_attn.q_proj at 4 bits"),
        ("--sensitivity chosen --gs 32 --target-bpw 99", "--target-bpw 99: this model takes"),
    ],
)
def test_what_is_wrong_is_said_before_weights_are_fetched(
    on_the_hub: str,
    chosen: Path,
    options: str,
    message: str,
    hub: Hub,
    lbq: Lbq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del chosen
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a")
    done = lbq("convert", on_the_hub, "--target-bpw", "5", *options.split(), "--out", tmp_path / "out")
    assert (done.code in (2, 3, 4), done.error.startswith(message)) == (True, True), done
    assert not weights_fetched(hub)
    assert not list((tmp_path / "hf-home").rglob("*.safetensors"))


@pytest.mark.usefixtures("no_waiting")
def test_a_dry_run_of_a_model_on_the_hub(
    on_the_hub: str, source: Path, chosen: Path, hub: Hub, lbq: Lbq, tmp_path: Path
) -> None:
    """Its weights are not here, and the Hub knows their hashes."""
    options = ("--target-bpw", "4.2", "--gs", "32", "--sensitivity", chosen)
    done = lbq("convert", on_the_hub, *options, "--dry-run", "--json")
    assert done.code == 0, done
    assert not weights_fetched(hub)
    assert json.loads(done.out)["quantized"] == msgspec.to_builtins(read_manifest(chosen).quantized)
    assert lbq("convert", on_the_hub, *options, "--out", tmp_path / "out").code == 0
    assert weights_fetched(hub)
    assert read_manifest(tmp_path / "out").quantized == read_manifest(chosen).quantized
    data = (source / "model.safetensors").read_bytes()
    hub.put("user/model", "model.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    done = lbq("convert", on_the_hub, *options, "--dry-run")
    assert (done.code, "made from another source" in done.error) == (3, True), done


def test_notes_are_those_of_the_chosen_bits(source: Path, lbq: Lbq, tmp_path: Path) -> None:
    """What is said is what the manifest has: 8 bits have a scale a row, whatever group the others have."""
    done = lbq("convert", source, "--target-bpw", "6", "--gs", "256", "--out", tmp_path / "out")
    assert done.code == 0, done
    manifest = read_manifest(tmp_path / "out")
    assert {8} < {entry.bits for entry in manifest.quantized.values()}
    said = [line.removeprefix("note: ") for line in done.err.splitlines()]
    assert said
    assert said == list(manifest.notes)


def test_special_tokens_are_not_of_the_text(make_checkpoint: Callable[..., Path], lbq: Lbq, tmp_path: Path) -> None:
    """Which begin every window, whoever cuts it."""
    folder = make_checkpoint("smollm2")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 256)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a few words " * 100)
    counts = []
    for more in (("--calib", tmp_path / "text.txt"), ()):
        done = lbq("convert", folder, "--report", "full", "--gs", "32", *more, "--out", tmp_path / "out", "--overwrite")
        assert done.code == 0, done
        quality = read_report(tmp_path / "out").quality
        assert quality is not None
        text = quality.sensitivity_text
        assert text is not None
        counts.append((text.tokens, text.context, text.windows, text.positions))
    assert counts == [(2 * 127, 128, 2, 128), (2 * 127, 128, 2, 128)]


def test_nothing_is_measured_for_a_folder_that_is_taken(
    source: Path, artifact: Path, lbq: Lbq, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("lbq.evaluation.study.measure", refuse)
    monkeypatch.chdir(artifact.parent)
    artifact.rename("smollm2-5bpw-g32")
    done = lbq("convert", source, "--target-bpw", "5", "--gs", "32")
    assert done.code == 4
    assert done.error.startswith("smollm2-5bpw-g32: exists")


def test_reports_that_do_not_fit(
    source: Path, chosen: Path, kept_artifact: Path, checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path
) -> None:
    def refusal(model: Path, *options: object) -> str:
        done = lbq("convert", model, "--target-bpw", "5", *options, "--out", tmp_path / "out")
        assert done.code in (2, 3)
        assert not (tmp_path / "out").exists()
        return str(done.error)

    assert "no sensitivities in its report" in refusal(checkpoints["llama"], "--sensitivity", kept_artifact)
    assert "made from another source" in refusal(checkpoints["llama"], "--gs", 32, "--sensitivity", chosen)
    assert "does not have model.layers.0.self_attn.q_proj at 4 bits" in refusal(source, "--sensitivity", chosen)
    path = chosen / "report.json"
    report = json_file.read(path, dict[str, Any])
    report["quality"]["sensitivity"] = report["quality"]["sensitivity"][:-1]
    path.write_bytes(json_file.encode(report))
    assert "report.json: " in refusal(source, "--gs", 32, "--sensitivity", chosen)
