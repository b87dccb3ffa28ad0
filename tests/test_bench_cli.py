"""``lbq bench`` on a CPU with a tiny shape, and with an artifact."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lbq.formats.errors import DeviceError
from lbq.runtime.bench import sweep
from lbq.runtime.bench.reference import Check
from lbq.runtime.devices import CpuDevice
from lbq.runtime.engine import DecoderEngine

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ("--device", "cpu", "--prompt", "5", "--tokens", "4", "--rounds", "2")


@pytest.fixture
def bench(lbq: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *options: lbq("bench", *SHORT, *options)


def test_a_sweep_of_random_weights(bench: Callable[..., Any], tmp_path: Path) -> None:
    picture = tmp_path / "roof.svg"
    done = bench(
        "--shape", "tiny", "--bits", "3,4", "--gs", "32,row", "--depth", "0,9", "--batch", "1,17", "--picture", picture
    )
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].startswith("tiny (random weights) on ")
    rows = [line for line in done.out.splitlines() if line.startswith("INT")]
    assert [line.split()[:2] for line in rows[::2]] == [[f"INT{b}", f"{g},"] for b in (3, 4) for g in ("g32", "row")]
    assert len(rows) == 8
    assert done.out.count("not run: batch 17: 1 to 16 texts at a time") == 1
    drawn = ET.parse(picture).getroot()
    assert sum(node.tag.endswith("circle") for node in drawn.iter()) == 8


def test_an_artifact_in_json(bench: Callable[..., Any], kept_artifact: Path) -> None:
    done = bench(kept_artifact, "--json", "--depth", "0,5")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["load"] == {"prompt": 5, "new": 4, "rounds": 2, "sampled": False}
    assert found["machine"]["copy"] > 1e8
    assert [row["case"]["depth"] for row in found["rows"]] == [0, 5]
    for row in found["rows"]:
        assert row["case"]["weights"] == "INT4 g32, INT8 row"
        assert row["share"] == pytest.approx(row["decoded"]["speed"]["median"] / row["floor"])
        nbytes = row["weight_bytes"] + row["decoded"]["cache_bytes"]
        assert row["floor"] == pytest.approx(found["machine"]["copy"] / nbytes)
        assert row["decoded"]["check"]["kl"] < 1e-6
    manifest = json.loads((kept_artifact / "lbq.json").read_text())["quantized"]
    stored = sum(m["n"] * (4 * -(-m["k"] * m["bits"] // 32) + 2 * m["k"] // m["group"]) for m in manifest.values())
    assert found["rows"][0]["weight_bytes"] == stored


def test_several_texts(bench: Callable[..., Any], tmp_path: Path) -> None:
    picture = tmp_path / "roof.svg"
    rows = json.loads(bench("--shape", "tiny", "--batch", "1,3", "--json", "--picture", picture).out)["rows"]
    one, three = rows
    assert [row["case"]["batch"] for row in rows] == [1, 3]
    assert three["decoded"]["cache_bytes"] == 3 * one["decoded"]["cache_bytes"]
    assert three["share"] * three["floor"] == pytest.approx(three["decoded"]["speed"]["median"])
    assert three["floor"] == pytest.approx(one["floor"])  # they take turns, with a pass over the weights each
    assert one["over_one"] == 1
    assert three["over_one"] == pytest.approx(
        3 * one["decoded"]["speed"]["median"] / three["decoded"]["speed"]["median"]
    )
    assert three["decoded"]["check"]["kl"] < 1e-6
    assert "INT4 row × 3: " in picture.read_text()
    done = bench("--shape", "tiny", "--batch", "2")
    assert done.out.splitlines()[1].split()[:3] == ["weights", "depth", "texts"]
    assert "2 texts at a time" in done.out
    assert "FALLBACK of several texts, which take turns: on a CPU" in done.out


def test_texts_that_share_a_pass_read_weights_once() -> None:
    speed = sweep.Speed(1.0, 1.0, 1.0)
    together = sweep.Decoded(speed, 0.0, 0.0, 0, 40, "float16", Check(0.0, 0.0, 0.0, True))
    assert sweep._token_bytes(100, together, 4) == 35
    assert sweep._token_bytes(100, replace(together, batch_fallback="they take turns"), 4) == 110


def test_groups_that_rows_do_not_divide_into_are_said(bench: Callable[..., Any]) -> None:
    done = bench("--shape", "tiny", "--gs", "32,512,32", "--batch", "1,1", "--depth", "0,00")
    rows = [line for line in done.out.splitlines() if line.startswith("INT")]
    assert [line.split()[1] for line in rows] == ["g32,", "row,"]  # each once
    notes = [line for line in done.err.splitlines() if line.startswith("note: ")]
    assert notes == ["note: 64 inputs do not divide into groups of 512: one scale a row instead"]
    assert "note:" not in bench("--shape", "tiny").err


def test_markdown(bench: Callable[..., Any]) -> None:
    lines = bench("--shape", "tiny", "--markdown", "--sampled").out.splitlines()
    assert lines[0].startswith("### tiny (random weights) on ")
    assert lines[4].startswith("| INT4 row, INT8 row | 0 |")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_keys_and_values_in_few_bits(bench: Callable[..., Any], lbq: Callable[..., Any], kind: str) -> None:
    """The reference keeps them so too, and what that costs is not taken for a wrong kernel."""
    options = ("--shape", "tiny", "--depth", "0,300", "--kv-cache", kind)
    plain, eight = (json.loads(bench(*shown, "--json").out)["rows"] for shown in (options[:4], options))
    for exact, rounded in zip(plain, eight, strict=True):
        assert rounded["decoded"]["cache_dtype"] == kind
        assert rounded["decoded"]["cache_bytes"] < exact["decoded"]["cache_bytes"] / 3
        assert rounded["decoded"]["check"]["kl"] < 1e-7
    done = bench(*options)
    assert f"keys and values in {kind}" in done.out
    assert done.out.count("FALLBACK keys and values") == 1
    profiled = lbq("profile", *options[:2], "--device", "cpu", "--steps", "2", "--kv-cache", kind)
    assert profiled.code == 0, profiled.err


def test_garbage_is_a_failure(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = DecoderEngine.decode
    monkeypatch.setattr(DecoderEngine, "decode", lambda self, token: plain(self, token).roll(1))
    done = bench("--shape", "tiny", "--json")
    assert done.code == 7
    assert "reference" in done.err
    assert json.loads(done.out)["rows"][0]["decoded"]["check"]["loss"] > 0.1
    done = bench("--shape", "tiny")
    assert (done.code, "WRONG" in done.out) == (7, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk here")
def test_a_full_disk(bench: Callable[..., Any], tmp_path: Path) -> None:
    """The picture of an earlier run stays."""
    picture = tmp_path / "a.svg"
    picture.write_text("<svg/>")
    (tmp_path / "a.svg.part").symlink_to("/dev/full")
    done = bench("--shape", "tiny", "--picture", picture)
    assert (done.code, f"{picture}: No space left" in done.err, "tokens/s" in done.out) == (4, True, True)
    assert picture.read_text() == "<svg/>"


def test_an_interrupt_keeps_what_is_measured(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def decode(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    real = sweep.decode
    monkeypatch.setattr(sweep, "decode", decode)
    picture = tmp_path / "a.svg"
    done = bench("--shape", "tiny", "--depth", "0,9", "--picture", picture, "--json")
    assert (done.code, done.err.splitlines()[-1]) == (130, "lbq: interrupted")
    assert [row["case"]["depth"] for row in json.loads(done.out)["rows"]] == [0]
    assert picture.read_text().count("<circle") == 1

    def peers(*_: object, **__: object) -> Iterator[sweep.Peer]:
        yield sweep.Peer("one", None, None, None, None, "not installed")
        raise KeyboardInterrupt

    monkeypatch.setattr("lbq.peers.run_peers", peers)
    done = bench("--shape", "tiny", "--peers")
    assert (done.code, "one: not installed" in done.out) == (130, True)


def test_a_png_where_something_draws_it(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    picture = tmp_path / "a.png"
    if find_spec("resvg_py") is None:
        done = bench("--shape", "tiny", "--picture", picture)
        assert (done.code, "pip install resvg_py" in done.error) == (2, True)
    (tmp_path / "resvg_py.py").write_text("def svg_to_bytes(svg_string, width): return [137, 80, len(svg_string) > 99]")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "resvg_py", raising=False)
    assert bench("--shape", "tiny", "--picture", picture).code == 0
    assert picture.read_bytes() == b"\x89P\x01"
    monkeypatch.delitem(sys.modules, "resvg_py")


def test_what_does_not_fit(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    picture = tmp_path / "roof.svg"
    done = bench("--shape", "tiny", "--depth", "99999", "--picture", picture)
    assert (done.code, picture.exists()) == (2, False)
    assert "made for 2048" in done.err

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DecoderEngine, "prefill", out_of_memory)
    done = bench("--shape", "tiny", "--depth", "0")
    assert (done.code, "memory does not hold" in done.err) == (2, True)

    def no_memory(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(DecoderEngine, "prefill", no_memory)
    done = bench("--shape", "tiny")
    assert done.code == 7
    assert "error: out of memory: try a smaller --depth or model, or --device cpu\n" in done.err


def test_what_was_measured_before_a_failure_is_shown(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, prefills = DecoderEngine.prefill, 0

    def fail(self: DecoderEngine, ids: list[int]) -> torch.Tensor:
        nonlocal prefills
        prefills += 1
        if prefills > 3:
            raise RuntimeError("CUDA error: an illegal memory access")
        return plain(self, ids)

    monkeypatch.setattr(DecoderEngine, "prefill", fail)
    done = bench("--shape", "tiny", "--depth", "0,7")
    assert (done.code, "the GPU fails" in done.err) == (7, True)
    assert sum(line.startswith("INT4") for line in done.out.splitlines()) == 1
    done = bench("--shape", "tiny", "--depth", "0,7")
    assert (done.code, done.out) == (7, "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--shape"),
        (("nowhere", "--shape", "tiny"), "--shape"),
        (("--shape", "huge"), "huge"),
        (("--shape", "tiny", "--bits", "5"), "bits 5"),
        (("--shape", "tiny", "--bits", ""), "--bits"),
        (("--shape", "tiny", "--gs", ""), "--gs"),
        (("--shape", "tiny", "--peers", "--depth", "9"), "0 in --depth"),
        (("--shape", "tiny", "--peers", "--sampled"), "no --sampled"),
        (("--shape", "tiny", "--peers", "--batch", "2"), "1 in --batch"),
        (("--shape", "tiny", "--peers", "--prompt", "100000"), "nothing was measured"),
        (("--shape", "tiny", "--batch", "2,x"), "1,2,4"),
        (("--shape", "tiny", "--gs", "7"), "group 7"),
        (("--shape", "tiny", "--depth", "-1"), "--depth"),
        (("--shape", "tiny", "--picture", "a.jpg"), "FILE.svg or FILE.png"),
        (("nowhere", "--bits", "4"), "--bits"),
        (("--shape", "tiny", "--tokens", "1"), "--tokens"),
        (("--shape", "tiny", "--fused"), "for a GPU"),
    ],
)
def test_usage(bench: Callable[..., Any], options: tuple[str, ...], said: str) -> None:
    done = bench(*options)
    assert (done.code, said in done.error) == (2, True), done


@pytest.mark.parametrize("command", ["bench", "profile"])
def test_a_cache_that_a_gpu_has_no_room_for(
    lbq: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def refuse(*_: object) -> None:
        raise DeviceError("keys and values in int4: no room")

    monkeypatch.setattr(CpuDevice, "check_cache", refuse)
    monkeypatch.setattr(sweep, "bind", lambda *_: pytest.fail("weights were bound"))
    done = lbq(command, "--device", "cpu", "--shape", "tiny", "--kv-cache", "int4")
    assert (done.code, done.out, done.error) == (7, "", "keys and values in int4: no room")


def test_a_missing_artifact(bench: Callable[..., Any]) -> None:
    assert bench("nowhere").code == 4
    done = bench("--shape", "tiny", "--picture", "nowhere/a.svg")
    assert (done.code, done.error) == (4, "nowhere/a.svg: no such folder")


def test_a_profile(lbq: Callable[..., Any], kept_artifact: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    done = lbq("profile", kept_artifact, "--device", "cpu", "--depth", "9", "--steps", "2", "--trace", trace)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].startswith(f"{kept_artifact}, INT4 g32, INT8 row: one step at depth 9")
    shallow = lbq("profile", kept_artifact, "--device", "cpu", "--steps", "2").out.splitlines()[0]
    assert shallow.rstrip().endswith("one step at depth 126")  # of a context of 128
    labels = [line.split()[0] for line in done.out.splitlines()[2:8]]
    assert labels == ["q/k/v", "attention", "output", "gate/up", "down", "head"]
    assert str(trace) in done.out.splitlines()[-1]
    assert json.loads(trace.read_text())["traceEvents"]
    eight = lbq("profile", "--shape", "tiny", "--device", "cpu", "--steps", "2", "--kv-cache", "int8")
    assert "\nFALLBACK keys and values: no kernel here reads int8" in eight.out
    found = json.loads(lbq("profile", "--shape", "tiny", "--device", "cpu", "--steps", "2", "--json").out)
    assert found["cache_fallback"] is None
    assert found["profile"]["seconds"] > 0
    assert len(found["profile"]["lines"]) == 6


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((), 2, "--shape"),
        (("--shape", "tiny", "--depth", "2047"), 2, "made for 2048"),
        (("--shape", "tiny", "--bits", "3,4"), 2, "one width"),
        (("--shape", "tiny", "--trace", "a.txt"), 2, "FILE.json"),
        (("--shape", "tiny", "--trace", "nowhere/a.json"), 4, "no such folder"),
        (("nowhere",), 4, "nowhere"),
    ],
)
def test_what_cannot_be_profiled(lbq: Callable[..., Any], options: tuple[str, ...], code: int, said: str) -> None:
    done = lbq("profile", "--device", "cpu", *options)
    assert (done.code, said in done.error) == (code, True), done


@pytest.mark.gpu
@pytest.mark.parametrize("step", ["--fused", "--no-fused"])
def test_both_commands_on_a_gpu(lbq: Callable[..., Any], tmp_path: Path, step: str) -> None:
    picture, trace = tmp_path / "a.svg", tmp_path / "a.json"
    shape = ("--shape", "tiny", "--device", "cuda", step)
    done = lbq("bench", *shape, "--bits", "3,4,8", "--depth", "0,500", "--rounds", "2", "--picture", picture, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["machine"]["kind"] == "cuda"
    assert found["machine"]["upload"] > 1e9
    assert [row["fused"] for row in found["rows"]] == 6 * [step == "--fused"]
    assert picture.read_text().count("<circle") == 6
    done = lbq("profile", *shape, "--steps", "3", "--trace", trace)
    assert done.code == 0, done.err
    assert "head" in done.out
    assert json.loads(trace.read_text())["traceEvents"]
