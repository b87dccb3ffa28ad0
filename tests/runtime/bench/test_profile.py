"""Where the time of a step goes: the arithmetic of the table, and a step on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lbq.formats.errors import StorageError
from lbq.runtime.bench.profile import Event, Launch, labelled, profile_decode, step_launches, tabulate
from lbq.runtime.bench.shapes import SHAPES
from lbq.runtime.bench.weights import DeviceKernels, RandomWeights
from lbq.runtime.binding import bind
from lbq.runtime.devices import CpuDevice, CudaDevice

SPEC = SHAPES["tiny"].spec()
CPU = CpuDevice(exact=False)


def weights_on(device):
    return RandomWeights(SPEC, 4, 32, torch.device(device))


def launches(weights):
    return step_launches(SPEC, weights.quantized, [7.0] * len(SPEC.layers))


def test_own_times_and_gaps_add_up_to_the_step():
    """A kernel that starts early waits for the one before it: that time is not its own."""
    step = [("copy", 0, 1), ("a", 2, 5), ("b", 4, 7), ("a", 8, 9), ("c", 8, 8.5)]
    events = [Event(name, t + start, t + end) for t in (0, 100) for name, start, end in step]
    found = tabulate(events, [Launch("q", 10), Launch("w"), Launch("q", 30), Launch("r")], steps=2)
    assert found.note is None
    assert {(line.label, line.kernel): (line.count, line.seconds, line.idle, line.nbytes) for line in found.lines} == {
        ("", "copy"): (1, 1, 0, 0),
        ("q", "a"): (2, 4, 2, 40),
        ("w", "b"): (1, 2, 0, 0),
        ("r", "c"): (1, 0, 0, 0),
    }
    assert found.seconds == 9 == sum(line.seconds + line.idle for line in found.lines)


def test_the_median_step_is_shown():
    events = [Event("a", t, t + long) for t, long in ((0, 5), (10, 1), (20, 2))]
    assert tabulate(events, [Launch("x")], steps=3).seconds == 2


def test_kernels_that_nobody_expected():
    found = tabulate([Event("a", 0, 1), Event("b", 1, 2)], [Launch("x")] * 3, steps=1)
    assert [line.label for line in found.lines] == ["", ""]
    assert "2 kernels a step, and 3 were expected" in found.note


def test_bytes_of_launches():
    weights = weights_on("cpu")
    found = launches(weights)
    stored = sum(w.nbytes for name in weights.quantized for w in [weights.packed(name)])
    assert sum(each.nbytes for each in found if each.label not in ("attention", "embedding")) == stored
    assert [each.nbytes for each in found if each.label == "attention"] == [7.0, 7.0]


def test_a_step_on_the_cpu(tmp_path):
    weights, trace = weights_on("cpu"), tmp_path / "trace.json"
    decoder = bind(weights, CPU).decoder
    found = profile_decode(decoder, CPU, weights.quantized, depth=9, steps=3, trace=trace)
    assert [(line.label, line.count) for line in found.lines] == [
        ("q/k/v", 2),
        ("attention", 2),
        ("output", 2),
        ("gate/up", 2),
        ("down", 2),
        ("head", 1),
    ]
    assert found.lines[0].kernel == decoder.layers[0].mixer.qkv.kernel
    assert found.lines[1].kernel == "attention (torch)"
    assert found.lines[1].nbytes == decoder.new_state(10, fixed=True).nbytes
    assert 0 < sum(line.seconds for line in found.lines) <= found.seconds
    named = [event["name"] for event in json.loads(trace.read_text())["traceEvents"] if "name" in event]
    assert sum(name.startswith("lbq: ") for name in named) == 3 * 11


def test_a_trace_that_was_cut_off(tmp_path, monkeypatch):
    """As a full disk leaves it, of which the profiler does not tell; the trace of an earlier run stays."""
    weights, trace = weights_on("cpu"), tmp_path / "trace.json"
    trace.write_text("{}")
    decoder = bind(weights, CPU).decoder
    for text, suffix in (("", ""), ('{"traceEvents": [{"name": "a', ""), ("{}", ".tmp")):  # renamed at its end, if so
        monkeypatch.setattr(
            "torch.profiler.profile.export_chrome_trace",
            lambda _, path, text=text, suffix=suffix: Path(path + suffix).write_text(text),
        )
        with pytest.raises(StorageError, match=r"trace\.json: not written to its end"):
            profile_decode(decoder, CPU, weights.quantized, depth=9, steps=1, trace=trace)
        assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
        assert trace.read_text() == "{}"


def test_labels_are_taken_off_again():
    from lbq.runtime import attention

    decoder = bind(weights_on("cpu"), CPU).decoder
    kept = decoder.head, decoder.layers[1].mlp.down, attention.attend
    with labelled(decoder):
        assert decoder.head is not kept[0]
    assert (decoder.head, decoder.layers[1].mlp.down, attention.attend) == kept


@pytest.mark.gpu
@pytest.mark.parametrize("apart", [False, True])
def test_launches_of_a_fused_step(apart):
    from lbq.runtime.bench.profile import _with_planes
    from lbq.runtime.fused.engine import FusedEngine
    from lbq.runtime.fused.plan import Plan, Projecting
    from lbq.runtime.kernels.gemv import Tile
    from lbq.runtime.kernels.gemv.triton import INTERPRETED

    device = torch.device("cpu" if INTERPRETED else "cuda")
    weights = weights_on(device)
    down = Projecting(Tile(64, 32, 2), apart=apart)
    engine = FusedEngine(bind(weights, DeviceKernels(device)).decoder, 16, plan=Plan(down=down), graphs=False)
    embedding, *rest = launches(weights)
    found = [embedding, *_with_planes(engine, rest)]
    assert len(found) == engine.launches
    assert sum(each.label == "down, planes" for each in found) == 2 * apart


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_on_a_gpu(fused, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("only a GPU has kernels to watch")
    weights, device = weights_on("cuda"), CudaDevice(exact=False, fused=fused)
    decoder = bind(weights, device).decoder
    found = profile_decode(decoder, device, weights.quantized, 9, 3, tmp_path / "trace.json")
    assert found.seconds > 0
    if fused:
        assert found.note is None
        assert {line.label for line in found.lines} >= {"q/k/v", "attention", "output", "gate/up", "down", "head"}
