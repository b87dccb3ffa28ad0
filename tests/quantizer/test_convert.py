"""Whole conversions of tiny checkpoints: what is written, what it is worth, and what other tools make of it."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lbq.conversion import convert
from lbq.formats.artifact import open_artifact, verify
from lbq.formats.disk import hash_file
from lbq.formats.errors import BusyError, DataError, DeviceError, StorageError, UsageError
from lbq.formats.manifest import License, read_manifest
from lbq.formats.safetensors_file import open_checkpoint
from lbq.formats.scheme import Scheme
from lbq.formats.staging import StagedFolder
from lbq.quantizer import tensors
from lbq.quantizer.convert import write_artifact
from lbq.quantizer.prepare import prepare
from lbq.quantizer.request import MixedBits, make_request
from lbq.quantizer.rtn import quantize
from lbq.quantizer.source import resolve

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, torch.Tensor]
HARNESS = Path(__file__).with_name("convert_harness.py")
COMPANIONS = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def dequantized(folder: Path) -> Tensors:
    """The float32 weights that an artifact stands for, by the names of the source."""
    with open_artifact(folder) as opened:
        tensors = {name: opened.dense(name).float() for name in opened.manifest.dense}
        tensors |= {f"{name}.weight": opened.packed(name).dequantize() for name in opened.manifest.quantized}
    return tensors


def test_the_same_input_gives_the_same_bytes(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        for i, count in enumerate((1, 2)):
            torch.set_num_threads(count)
            convert(checkpoints["qwen2"], tmp_path / str(i), group=32, max_shard_bytes=30_000)
    finally:
        torch.set_num_threads(threads)
    first = content(tmp_path / "0")
    assert first == content(tmp_path / "1")
    assert len([name for name in first if name.endswith(".safetensors")]) > 3
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]


def test_what_an_artifact_holds(checkpoints: Mapping[str, Path], kept_artifact: Path) -> None:
    source, files = checkpoints["llama"], content(kept_artifact)
    shards = {name for name in files if name.endswith(".safetensors")}
    index = "model.safetensors.index.json"
    assert set(files) == {"config.json", "lbq.json", "report.json", index} | COMPANIONS | shards
    for name in COMPANIONS:
        assert files[name] == (source / name).read_bytes()
    manifest = json.loads(files["lbq.json"])
    assert manifest["lbq_format"] == 1
    assert manifest["method"] == {
        "name": "rtn",
        "scale_rules": {"3": "signed-l4", "4": "signed", "8": "signed"},
        "bits": 4,
        "group": 32,
        "lm_head": 8,
        "keep": [],
        "set": [],
        "readers": [],
        "target_bpw": None,
    }
    assert manifest["notes"] == []
    assert set(manifest["tools"]) == {"lbq", "torch"}
    assert set(manifest["files"]) == set(files) - {"lbq.json"}
    for name, entry in manifest["files"].items():
        assert entry == msgspec.to_builtins(hash_file(kept_artifact / name))
    assert manifest["source"]["name"] == "llama"
    assert set(manifest["source"]["files"]) == COMPANIONS | {"config.json", "model.safetensors"}
    for name, entry in manifest["source"]["files"].items():
        assert entry == msgspec.to_builtins(hash_file(source / name))
    assert list(verify(kept_artifact, read_manifest(kept_artifact))) == [(name, None) for name in manifest["files"]]


def test_bits_that_were_chosen(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    request = make_request(4, 32, keep=["layers.0.mlp.down_proj"])
    prepared = prepare(
        resolve(checkpoints["llama"]), replace(request, mixed=MixedBits(4.75, (3, 8, 4, 3, 8, 4, 3, 4, 4)))
    )
    made = write_artifact(prepared, tmp_path / "out", device="cpu")
    method = made.manifest.method
    assert (method.bits, method.group, method.lm_head, method.target_bpw) == (None, 32, None, 4.75)
    assert method.keep == ("layers.0.mlp.down_proj",)
    stored = made.manifest.quantized
    assert [stored[f"model.layers.{i}.self_attn.q_proj"].bits for i in (0, 1)] == [3, 8]
    assert stored["lm_head"].scheme == Scheme(4, 32)
    path = made.path / "lbq.json"
    path.write_text(path.read_text().replace('"target_bpw": 4.75', '"target_bpw": null'))
    with pytest.raises(DataError, match="either bits or target_bpw"):
        read_manifest(made.path)


def test_config_for_other_readers(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    made = convert(checkpoints["smollm2"], tmp_path / "out", group=32, keep=["layers.0.mlp"])
    before = json.loads((checkpoints["smollm2"] / "config.json").read_text())
    after = json.loads((made.path / "config.json").read_text())
    quantization = after.pop("quantization_config")
    assert after == before | {"tie_word_embeddings": False, "dtype": "bfloat16"}
    assert sorted(quantization["ignore"]) == [
        f"model.layers.0.mlp.{name}" for name in ("down_proj", "gate_proj", "gate_up_proj", "up_proj")
    ]
    assert {(g["weights"]["num_bits"], g["weights"]["group_size"]) for g in quantization["config_groups"].values()} == {
        (4, 32),
        (8, None),
    }


def test_private_keys_stay_behind(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    private = {"_name_or_path": "/home/me/secret", "_attn_implementation_internal": "evil/kernels"}
    made = convert(make_checkpoint(**private), tmp_path / "out", group=32)
    assert not private.keys() & json.loads((made.path / "config.json").read_text()).keys()
    assert made.manifest.notes == ("config.json: unknown keys are ignored: _attn_implementation_internal",)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_codes_are_those_of_rtn_in_any_sharding(
    bits: int, make_checkpoint: Callable[..., Path], resave: Callable[..., None], tmp_path: Path
) -> None:
    source = make_checkpoint()
    whole = convert(source, tmp_path / "whole", bits=bits, group=32)
    resave(source, lambda _: None, 4)
    cut = convert(source, tmp_path / "cut", bits=bits, group=32, max_shard_bytes=1)
    assert (whole.manifest.quantized, whole.report) == (cut.manifest.quantized, cut.report)
    with open_checkpoint(source) as weights, open_artifact(whole.path) as one, open_artifact(cut.path) as other:
        for name, entry in whole.manifest.quantized.items():
            expected = quantize(weights.tensor(f"{name}.weight"), entry.bits, entry.group)
            for packed in (one.packed(name), other.packed(name)):
                assert torch.equal(packed.words, expected.words)
                assert torch.equal(packed.scales, expected.scales)
        for name in whole.manifest.dense:
            assert torch.equal(one.dense(name), weights.tensor(name))
            assert torch.equal(other.dense(name), weights.tensor(name))


def test_many_shards_do_not_need_many_files(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 12, limits[1]))
    try:
        made = convert(checkpoints["llama"], tmp_path / "out", group=32, max_shard_bytes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len([name for name in made.manifest.files if name.endswith(".safetensors")]) > 40


def test_blocks_of_rows(checkpoints: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(checkpoints["llama"], tmp_path / "whole", group=32)
    monkeypatch.setattr(tensors, "CPU_BLOCK", 640)
    blocks = convert(checkpoints["llama"], tmp_path / "blocks", group=32)
    weights = [name for name in whole.manifest.files if name.endswith(".safetensors")]
    assert [whole.manifest.files[name] for name in weights] == [blocks.manifest.files[name] for name in weights]
    for one, other in zip(whole.report.modules, blocks.report.modules, strict=True):
        assert one.worst_row == other.worst_row
        assert one.cosine == pytest.approx(other.cosine, rel=1e-12)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_report_against_float64(bits: int, checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    made = convert(checkpoints["qwen3"], tmp_path / "out", bits=bits, group=32)
    after = dequantized(made.path)
    error = source = result = dot = 0.0
    assert json.loads((made.path / "report.json").read_text())["modules"][0]["name"] == "lm_head"
    with open_checkpoint(checkpoints["qwen3"]) as checkpoint:
        for module in made.report.modules:
            entry = made.manifest.quantized[module.name]
            assert (module.n, module.k, module.bits, module.group) == (entry.n, entry.k, entry.bits, entry.group)
            w, q = checkpoint.tensor(f"{module.name}.weight").double(), after[f"{module.name}.weight"].double()
            assert module.cosine == pytest.approx(float((w * q).sum() / w.norm() / q.norm()), abs=1e-6)
            assert module.relative_error == pytest.approx(float((w - q).norm() / w.norm()), rel=1e-5)
            rows = (w - q).norm(dim=1) / w.norm(dim=1)
            assert module.worst_row == int(rows.argmax())
            assert module.worst_row_error == pytest.approx(float(rows.max()), rel=1e-5)
            error, dot = error + float((w - q).square().sum()), dot + float((w * q).sum())
            source, result = source + float(w.square().sum()), result + float(q.square().sum())
    summary = made.manifest.summary
    assert summary.weights == sum(m.n * m.k for m in made.report.modules)
    assert summary.cosine == pytest.approx(dot / math.sqrt(source * result), abs=1e-6)
    assert summary.relative_error == pytest.approx(math.sqrt(error / source), rel=1e-5)
    assert summary.worst_cosine == min(m.cosine for m in made.report.modules)
    # One step of INT8, 4, 3 is 1/128, 1/8, 1/4 of the largest weight of 32: errors of that order and no other.
    low, high = {8: (0.003, 0.01), 4: (0.05, 0.15), 3: (0.12, 0.3)}[bits]
    layers = [m.relative_error for m in made.report.modules if m.name != "lm_head"]
    assert all(low < e < high for e in layers)


def reference(folder: Path, weights: Tensors) -> torch.nn.Module:
    """transformers' model in float32 with these weights."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 40).unsqueeze(0) * 7 % 256
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits[0]
    return found


def load_elsewhere(folder: Path) -> torch.nn.Module:
    """The artifact as transformers and compressed-tensors load it, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_transformers_loads_it(bits: int, family: str, checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    made = convert(checkpoints[family], tmp_path / "out", bits=bits, group=32, max_shard_bytes=50_000)
    expected = logits(reference(made.path, dequantized(made.path)))
    torch.testing.assert_close(logits(load_elsewhere(made.path)), expected, rtol=1e-4, atol=1e-4)


def both(tensors: Tensors, factor: float) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor


@pytest.mark.parametrize("lm_head", [4, 8, 16])
@pytest.mark.parametrize("saved", ["untied", "tied", "both, equal", "both, different"])
def test_embeddings(lm_head: int, saved: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The head is the one that transformers takes from the source, and the artifact says the same to its readers."""
    edits = {"both, equal": lambda t: both(t, 1.0), "both, different": lambda t: both(t, -0.5)}
    source = make_checkpoint("llama" if saved == "untied" else "smollm2", edit=edits.get(saved, lambda _: None))
    made = convert(source, tmp_path / "out", bits=8, group=32, lm_head=lm_head)
    weights = dequantized(made.path)
    head = "model.embed_tokens.weight" if made.manifest.spec.tied else "lm_head.weight"
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    wanted = original.lm_head.weight
    error = (weights[head] - wanted).norm() / wanted.norm()
    assert error < {4: 0.15, 8: 0.01, 16: 1e-9}[lm_head]
    assert torch.equal(weights["model.embed_tokens.weight"], original.model.embed_tokens.weight)
    expected = logits(reference(made.path, weights))
    torch.testing.assert_close(logits(load_elsewhere(made.path)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [3, 4])
def test_groups_for_other_readers_change_no_value(
    bits: int, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_checkpoint(hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    own = convert(source, tmp_path / "own", bits=bits, group=256)
    theirs = convert(source, tmp_path / "theirs", bits=bits, group=256, readers=["vllm", "sglang"])
    down = "model.layers.0.mlp.down_proj"
    assert (own.manifest.quantized[down].group, theirs.manifest.quantized[down].group) == (256, 128)
    assert (own.manifest.method.group, theirs.manifest.method.group) == (256, 256)
    one, other = dequantized(own.path), dequantized(theirs.path)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert theirs.manifest.summary.bits_per_weight > own.manifest.summary.bits_per_weight
    assert [m.cosine for m in own.report.modules] == [m.cosine for m in theirs.report.modules]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_sources(dtype: torch.dtype, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint(dtype=dtype)
    made = convert(source, tmp_path / "out", group=32)
    with open_checkpoint(source) as weights, open_artifact(made.path) as opened:
        name = "model.layers.0.mlp.up_proj"
        expected = quantize(weights.tensor(f"{name}.weight"), 4, 32)  # from all its digits, not from BF16
        assert torch.equal(opened.packed(name).words, expected.words)
        norm = "model.norm.weight"
        assert torch.equal(opened.dense(norm), weights.tensor(norm).bfloat16())
    assert json.loads((made.path / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("width", [1, 67, 192, 576, 4304])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_odd_widths(width: int, bits: int, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint(intermediate_size=width, num_hidden_layers=1)
    made = convert(source, tmp_path / "out", bits=bits, group=64)
    with open_checkpoint(source) as weights:
        after = dequantized(made.path)
        for name in made.manifest.quantized:
            w = weights.tensor(f"{name}.weight").float()
            error = float((after[f"{name}.weight"] - w).norm() / w.norm())
            assert error < {8: 0.03, 4: 0.3, 3: 0.6}[bits], name


def test_one_row(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    # The vocabulary of one token: no tokenizer of ours fits it.
    source = make_checkpoint(num_hidden_layers=1, intermediate_size=1, vocab_size=1)
    (source / "tokenizer.json").unlink()
    made = convert(source, tmp_path / "out", group=32)
    assert made.manifest.quantized["lm_head"].n == 1
    assert made.manifest.quantized["model.layers.0.mlp.gate_proj"].n == 1


def test_groups_without_a_scale(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Zero, constant, single-sign and subnormal groups; scales that BF16 or FP16 would lose."""
    name = "model.layers.0.mlp.up_proj.weight"

    def edit(tensors: Tensors) -> None:
        w = tensors[name] = tensors[name].float()
        w[0], w[1], w[2] = 0.0, 0.25, w[2].abs()
        w[3], w[4], w[5] = w[3] * 1e-40, w[4] * 5e5, w[5] * 1e-7
        w[6] = w[6] * 1e37

    source = make_checkpoint(edit=edit)
    for bits in (3, 4, 8):
        made = convert(source, tmp_path / str(bits), bits=bits, group=32)
        with open_checkpoint(source) as weights, open_artifact(made.path) as opened:
            w = weights.tensor(name).double()
            packed = opened.packed(name.removesuffix(".weight"))
            q = packed.dequantize().double()
        assert torch.isfinite(packed.scales).all()
        assert (packed.scales != 0).all()
        assert torch.equal(q[0], w[0])
        errors = (q - w).norm(dim=1)[1:] / w.norm(dim=1)[1:]
        limit = {8: 0.02, 4: 0.2, 3: 0.4}[bits]
        assert (errors[[0, 1, 3, 4, 5]] < limit).all()
        assert (q[3] - w[3]).abs().max() <= torch.finfo(torch.bfloat16).tiny
        assert all(math.isfinite(m.cosine) and math.isfinite(m.worst_row_error) for m in made.report.modules)


BAD = [
    ("model.layers.1.self_attn.k_proj.weight", (5, 33), float("nan")),
    ("model.layers.0.mlp.down_proj.weight", (63, 95), float("inf")),
    ("model.embed_tokens.weight", (200, 1), float("-inf")),
    ("model.layers.1.input_layernorm.weight", (63,), float("nan")),
    ("lm_head.weight", (263, 0), float("nan")),
]


@pytest.mark.parametrize(("name", "place", "value"), BAD)
def test_weights_that_are_no_numbers(
    name: str,
    place: tuple[int, ...],
    value: float,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensors, "CPU_BLOCK", 640)  # the index counts from the start of the tensor, not of a block
    source = make_checkpoint(edit=lambda t: t[name].__setitem__(place, value))
    with pytest.raises(DataError) as caught:
        convert(source, tmp_path / "out", group=32)
    assert f"{source}: {name} has {value} at {list(place)}" in str(caught.value)
    assert os.listdir(tmp_path) == ["source"]


def test_numbers_beyond_bf16(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    largest = torch.finfo(torch.float32).max
    source = make_checkpoint(dtype=torch.float32, edit=lambda t: t["model.norm.weight"].__setitem__(7, largest))
    with pytest.raises(DataError, match=r"model\.norm\.weight has 3\.4.*e\+38 at \[7\]"):
        convert(source, tmp_path / "out")


def test_a_tokenizer_of_another_model(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"tokenizer\.json: token ids go up to 257 but the model has 200 embedding rows"
    ):
        convert(make_checkpoint(vocab_size=200), tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{}", "[" * 100_000, '{"model": {"type": "BPE"}}', "\x00"])
def test_a_broken_tokenizer(text: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint()
    (source / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer\.json: ") as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_devices(checkpoints: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no CUDA device"):
        convert(checkpoints["llama"], tmp_path / "out", device="cuda")
    with pytest.raises(UsageError, match="device 'tpu'"):
        convert(checkpoints["llama"], tmp_path / "out", device="tpu")
    assert not os.listdir(tmp_path)


def test_progress_adds_up(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    seen: dict[str, int] = {}
    made = convert(
        checkpoints["smollm2"],
        tmp_path / "out",
        group=32,
        on_progress=lambda name, n: seen.__setitem__(name, seen.get(name, 0) + n),
    )
    assert set(seen) == set(made.manifest.quantized) | set(made.manifest.dense)
    with open_checkpoint(checkpoints["smollm2"]) as checkpoint:
        total = sum(checkpoint.info(name).nbytes for name in checkpoint.names())
        total += checkpoint.info("model.embed_tokens.weight").nbytes  # read once more, for the head
    assert sum(seen.values()) == total


def test_default_output(checkpoints: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert convert(checkpoints["llama"], group=32).path == Path("llama-int4-g32")
    assert (tmp_path / "llama-int4-g32" / "lbq.json").is_file()
    assert convert(checkpoints["llama"], bits=8).path == Path("llama-int8-row")


def test_a_name_that_is_not_utf8(write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / os.fsdecode(b"mod\xffel"))
    made = convert(source, tmp_path / "out", group=32)
    assert made.manifest.source.name == "mod\ufffdel"


# ------------------------------------------------------------------------------------------------------ disks, signals


def test_a_disk_without_room(checkpoints: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbq.formats.disk.free_bytes", lambda _: 1000)
    with pytest.raises(StorageError, match=r"disk too full: \d+ bytes needed, 1000 bytes free"):
        convert(checkpoints["llama"], tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_a_disk_that_fills_up_at_any_write(
    checkpoints: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, left = os.pwrite, 0

    def filling(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", filling)
    target = tmp_path / "out"

    def work() -> None:
        convert(checkpoints["llama"], target, group=32, max_shard_bytes=60_000)

    left = writes = 10_000
    work()
    writes -= left
    whole = content(target)
    shutil.rmtree(target)
    assert writes > 30
    for room in range(writes):
        left = room
        with pytest.raises(
            StorageError, match=r"No space left on device \(\d+ bytes needed, \d+ bytes free\); free some"
        ):
            work()
        assert os.listdir(tmp_path) == []
    left = writes
    work()
    assert content(target) == whole


def test_two_converters(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "out"), pytest.raises(BusyError, match="another lbq is writing it"):
        convert(checkpoints["llama"], tmp_path / "out")
    assert convert(checkpoints["llama"], tmp_path / "out", group=32).path.is_dir()


def test_killed_at_every_write(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint(num_hidden_layers=1)
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run([sys.executable, HARNESS, source, work], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60


@pytest.mark.parametrize(("number", "code", "says"), [("SIGINT", 130, "lbq: interrupted\n"), ("SIGTERM", 143, "")])
def test_signals(number: str, code: int, says: str, checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    """A command that is stopped in the middle of its work leaves nothing behind."""
    program = (
        "import os, signal, sys, time\n"
        "from lbq import cli\n"
        "from lbq.quantizer import measure\n"
        "def stop(*_):\n"
        "    staged = os.listdir('.out.staging')\n"
        "    print(staged, flush=True)\n"
        f"    os.kill(os.getpid(), signal.{number})\n"
        "    time.sleep(60)\n"
        "measure.Meter.report = stop\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "convert", checkpoints["llama"], "--gs", "32", "--out", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == "['model.safetensors.part']\n" or done.stdout == "[]\n"
    assert done.stderr == says
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        ("---\nlicense: other\nlicense_name: tiny\n---\n# Tiny\n", License("other", "tiny")),
        ("# Tiny\n", None),
        ("---\nlicense: [\n---\n", None),
    ],
)
def test_the_licence_is_carried_over(
    make_checkpoint: Callable[..., Path], tmp_path: Path, readme: str, found: License | None
) -> None:
    source = make_checkpoint()
    (source / "README.md").write_text(readme)
    done = convert(source, tmp_path / "out", group=32, device="cpu")
    assert done.manifest.source.license == read_manifest(tmp_path / "out").source.license == found
