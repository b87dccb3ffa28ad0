"""Bad input, command by command: one line on stderr, the right exit code, nothing lost and nothing half written.

Each section is a row of the list of faults that this project tests against.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lbq.formats.artifact import open_artifact
from lbq.formats.errors import DataError, UsageError
from lbq.formats.safetensors_file import open_checkpoint
from lbq.formats.staging import StagedFolder
from lbq.quantizer.families import read_spec

pytestmark = pytest.mark.usefixtures("one_thread")

Lbq = Callable[..., Any]
Tensors = dict[str, torch.Tensor]
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_json(path: Path, edit: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


Breakage = Callable[[bytes, str], bytes]


def edited(edit: Callable[[dict[str, Any], str], object]) -> Breakage:
    """Change the header, whose tensor ``name`` is to be hurt."""

    def apply(before: bytes, name: str) -> bytes:
        header, data = header_of(before)
        edit(header, name)
        return with_header(json.dumps(header).encode(), data)

    return apply


def entry(**changes: object) -> Breakage:
    return edited(lambda header, name: header[name].update(changes))


@pytest.fixture
def refuses_source(lbq: Lbq, tmp_path: Path) -> Callable[..., str]:
    """Convert a broken source: the exit code must be ``code`` and nothing may change. Returns the error."""

    def check(source: Path, code: int = 3, *options: object) -> str:
        before = content(source)
        beside = sorted(os.listdir(tmp_path))
        done = lbq("convert", source, "--gs", "32", "--out", tmp_path / "out", *options)
        assert (done.code, done.out) == (code, ""), done
        assert content(source) == before
        assert sorted(os.listdir(tmp_path)) == beside
        return str(done.error)

    return check


COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect",),
    "verify": ("verify",),
    "run": ("run", "-p", "Hi", "--max-tokens", "2", "--no-chat", "--device", "cpu"),
}


@pytest.fixture
def refuses_artifact(lbq: Lbq) -> Callable[..., list[str]]:
    """All commands on a broken artifact: the exit code must be 3. Returns the errors."""

    def check(folder: Path, commands: tuple[str, ...] = tuple(COMMANDS)) -> list[str]:
        before = content(folder)
        errors = []
        for command in commands:
            name, *options = COMMANDS[command]
            done = lbq(name, folder, *options)
            assert (done.code, done.out) == (3, ""), (command, done)
            errors.append(done.error)
        assert content(folder) == before
        return errors

    return check


# ------------------------------------------------------------------------ 1, 2: headers of safetensors

HEADERS: dict[str, tuple[Breakage, str]] = {
    "0 bytes": (lambda _, __: b"", "too short"),
    "4 bytes": (lambda d, _: d[:4], "too short"),
    "7 bytes": (lambda d, _: d[:7], "too short"),
    "length 0": (lambda d, _: bytes(8) + d[8:], "empty safetensors header"),
    "length 2^63": (lambda d, _: struct.pack("<Q", 1 << 63) + d[8:], "should have 9223372036854775808 bytes"),
    "length past the file": (lambda d, _: struct.pack("<Q", len(d)) + d[8:], "the header should have"),
    "deep JSON": (lambda _, __: with_header(b'{"a":' + b"[" * 100_000), "header"),
    "not UTF-8": (lambda _, __: with_header(b'{"\xff":1}'), "header"),
    "not an object": (lambda _, __: with_header(b"[]"), "not a JSON object"),
    "a git-lfs pointer": (lambda _, __: b"version https://git-lfs.github.com/spec/v1\noid\n", "cut short or not"),
    "trailing bytes": (lambda d, _: d + b"x", "1 bytes after"),
    "cut in the data": (lambda d, _: d[:-1], "cut short inside tensor"),
    "overlap": (edited(lambda h, n: h[n].update(data_offsets=[0, size_of(h[n])])), "overlaps"),
    "reversed": (edited(lambda h, n: h[n]["data_offsets"].reverse()), "NAME"),
    "negative shape": (entry(shape=[-96, -64]), "NAME"),
    "negative zero": (edited(lambda h, n: h[n].update(shape=[-0.0])), "NAME"),
    "float shape": (entry(shape=[96.5, 64]), "NAME"),
    "overflowing shape": (entry(shape=[1 << 62, 1 << 62]), "NAME"),
    "shape of other bytes": (entry(shape=[96, 63]), "NAME"),
    "offset past 2^64": (entry(data_offsets=[0, 1 << 65]), "NAME"),
    "unknown dtype": (entry(dtype="Q4_K"), "NAME"),
    "dtype that is no weight": (entry(dtype="I16"), "NAME"),
    "unknown field": (entry(scale=1), "NAME"),
    "a hole": (edited(lambda h, n: h.pop(n)), "behind"),
}


def size_of(header_entry: dict[str, Any]) -> int:
    start, stop = header_entry["data_offsets"]
    return int(stop - start)


@pytest.mark.parametrize("fault", HEADERS)
def test_headers_of_a_source(fault: str, make_checkpoint: Callable[..., Path], refuses_source: Lbq) -> None:
    source = make_checkpoint()
    breakage, says = HEADERS[fault]
    (source / SINGLE).write_bytes(breakage((source / SINGLE).read_bytes(), UP))
    error = refuses_source(source)
    assert says.replace("NAME", UP) in error
    assert str(source) in error


@pytest.mark.parametrize("fault", HEADERS)
def test_headers_of_an_artifact(
    fault: str, artifact: Path, reseal: Callable[[Path], None], refuses_artifact: Lbq
) -> None:
    breakage, says = HEADERS[fault]
    before = (artifact / SHARD).read_bytes()
    assert EMBEDDING in header_of(before)[0]
    (artifact / SHARD).write_bytes(breakage(before, EMBEDDING))
    for error in refuses_artifact(artifact):  # the manifest's sizes tell
        assert SHARD in error
    reseal(artifact)
    for error in refuses_artifact(artifact):  # and without them, the reader does
        assert says.replace("NAME", EMBEDDING) in error


@pytest.mark.parametrize("fault", [fault for fault in HEADERS if fault != "dtype that is no weight"])
def test_hostile_headers_cost_no_memory(fault: str, make_checkpoint: Callable[..., Path]) -> None:
    path = make_checkpoint() / SINGLE
    path.write_bytes(HEADERS[fault][0](path.read_bytes(), UP))
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            open_checkpoint(path.parent)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


# -------------------------------------------------------- 3, 4: shapes, dtypes, versions, bits, groups


def test_packed_bytes_that_do_not_fit(
    artifact: Path, resave: Callable[..., None], reseal: Callable[[Path], None], refuses_artifact: Lbq
) -> None:
    name = "model.layers.0.mlp.up_proj.weight_packed"
    resave(artifact, lambda t: t.update({name: t[name][:, :-1].contiguous()}))
    reseal(artifact)
    edit_json(artifact / "lbq.json", lambda m: m["files"].setdefault(SINGLE, {"size": 0, "sha256": "0" * 64}))
    reseal(artifact)
    for error in refuses_artifact(artifact):
        assert f"{name} is torch.int32 [96, 7], the manifest says torch.int32 [96, 8]" in error


@pytest.mark.parametrize("command", ["inspect", "verify", "run"])
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("bits", 5, "bits must be one of 3, 4, 8, not 5"),
        ("bits", 3, "weight_packed"),
        ("group", 0, "group"),
        ("group", -7, "group"),
        ("group", 16, "group must be one of"),
        ("group", 7, "group 7 does not divide 64"),
        ("k", 63, "group 32 does not divide 63"),
        ("n", 1 << 40, "n`"),
        ("n", 97, "weight_packed"),
        ("layout", "awq", "layout"),
        ("zero_point", True, "zero_point"),
    ],
)
def test_modules_of_a_manifest(
    command: str, field: str, value: object, says: str, artifact: Path, refuses_artifact: Lbq
) -> None:
    module = "model.layers.0.mlp.up_proj"
    edit_json(artifact / "lbq.json", lambda m: m["quantized"][module].update({field: value}))
    (error,) = refuses_artifact(artifact, (command,))
    assert says in error or says.strip("`") in error
    assert "lbq.json" in error or module in error


def test_a_future_format(artifact: Path, refuses_artifact: Lbq) -> None:
    edit_json(artifact / "lbq.json", lambda m: (m.clear(), m.update(lbq_format=2, everything="else")))
    for error in refuses_artifact(artifact):
        assert error == f"{artifact}/lbq.json: format version 2; this lbq reads version 1: upgrade lbq"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--bits 5", "5 bits are not supported"),
        ("--bits x", "'--bits': 'x' is not a valid integer"),
        ("--gs 0", "group size 0"),
        ("--gs -7", "group size -7"),
        ("--gs 100", "group size 100"),
        ("--gs x", "group size x"),
        ("--lm-head 5", "--lm-head 5"),
        ("--set up_proj=5", "--set up_proj=5: 5 bits are not supported"),
        ("--set up_proj=4:0", "--set up_proj=4:0: group size 0"),
        ("--set up_proj", "--set up_proj: expected"),
        ("--for ollama", "--for ollama"),
        ("--max-shard-size 0", "--max-shard-size must be positive"),
        ("--max-shard-size 5parsecs", "'5parsecs' is not a size such as 5GB"),
        ("--keep nothing", "pattern 'nothing' names no linear layer"),
        ("--device tpu", "'tpu' is not one of"),
        ("--frob", "No such option '--frob'"),
        ("more", "unexpected extra argument"),
    ],
)
def test_options_that_make_no_sense(
    options: str, says: str, checkpoints: Mapping[str, Path], refuses_source: Lbq
) -> None:
    assert says in refuses_source(checkpoints["llama"], 2, *options.split())


# -------------------------------------------------------------------- 5, 6: names of tensors and files


def test_tensors_of_a_source(
    make_checkpoint: Callable[..., Path], resave: Callable[..., None], refuses_source: Lbq
) -> None:
    source = make_checkpoint(shards=3)
    resave(source, lambda t: t.pop(UP), 3)
    assert f"tensors missing: '{UP}'" in refuses_source(source)
    resave(source, lambda t: t.update({UP: torch.ones(96, 64), "extra\n\x1b[31m": torch.ones(1)}), 3)
    error = refuses_source(source)
    assert r"does not have: 'extra\n\x1b[31m'" in error


def test_shards_against_their_index(make_checkpoint: Callable[..., Path], refuses_source: Lbq) -> None:
    source = make_checkpoint(shards=3)
    index = source / INDEX
    before = index.read_bytes()
    edit_json(index, lambda i: i["weight_map"].pop(UP))
    assert f"tensors in shards but not in the index: '{UP}'" in refuses_source(source)
    index.write_bytes(before)
    edit_json(index, lambda i: i["weight_map"].update({"x": SHARD}))
    assert "tensors missing from their shards: 'x'" in refuses_source(source)
    index.write_bytes(before)
    shards = sorted(source.glob("*.safetensors"))
    twice = next(iter(set(header_of(shards[0].read_bytes())[0]) - {"__metadata__"}))
    header, data = header_of(shards[1].read_bytes())
    name = next(key for key in header if key != "__metadata__")
    header[twice] = header.pop(name)
    shards[1].write_bytes(with_header(json.dumps(header).encode(), data))
    edit_json(index, lambda i: i["weight_map"].pop(name))
    assert f"tensors in more than one shard: '{twice}'" in refuses_source(source)
    index.write_bytes(before)
    shards[2].unlink()
    assert f"missing files: '{shards[2].name}'" in refuses_source(source)


def test_tensors_of_an_artifact(
    artifact: Path, resave: Callable[..., None], reseal: Callable[[Path], None], refuses_artifact: Lbq
) -> None:
    def save(edit: Callable[[Tensors], object]) -> None:
        resave(artifact, edit)
        edit_json(artifact / "lbq.json", lambda m: m["files"].update({SINGLE: None}))
        reseal(artifact)

    save(lambda t: t.pop("model.norm.weight"))
    for error in refuses_artifact(artifact):
        assert "tensors missing: 'model.norm.weight'" in error
    save(lambda t: t.update({"model.norm.weight": torch.ones(64).bfloat16(), "b": torch.ones(1)}))
    for error in refuses_artifact(artifact):
        assert "tensors not in the manifest: 'b'" in error
    save(lambda t: (t.pop("b"), t["lm_head.weight_shape"].add_(1)))
    for error in refuses_artifact(artifact):
        assert "lm_head.weight_shape is [265, 65], not [264, 64]" in error


def test_a_shard_that_the_manifest_does_not_know(artifact: Path, refuses_artifact: Lbq) -> None:
    """Nobody would check its hash."""
    edit_json(artifact / "lbq.json", lambda m: m["files"].pop(SHARD))
    for error in refuses_artifact(artifact):
        assert f"files not in the manifest: '{SHARD}'" in error
    (artifact / SINGLE).write_bytes((artifact / SHARD).read_bytes())
    for error in refuses_artifact(artifact):
        assert f"files not in the manifest: '{SINGLE}'" in error


HOSTILE = ["../{}", "/{}", "C:{}", "..\\{}", "a/../{}", "", ".", "..", "a\nb", "\x00", "x" * 300, "con:{}"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_shards(
    name: str, make_checkpoint: Callable[..., Path], refuses_source: Lbq, opened: Any, tmp_path: Path
) -> None:
    source = make_checkpoint(shards=3)
    outside = (source / SHARD).rename(tmp_path / SHARD)
    name = name.format(f"{tmp_path}/{SHARD}".lstrip("/") if name == "/{}" else SHARD)
    edit_json(
        source / INDEX,
        lambda i: i["weight_map"].update({k: name for k, v in i["weight_map"].items() if v == SHARD}),
    )
    with opened:
        error = refuses_source(source)
    assert f"{source}/{INDEX}: " in error
    assert "is not a plain file name; the file is broken or hostile" in error
    assert str(outside) not in {os.path.realpath(path) for path in opened.paths}


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_files_in_a_manifest(name: str, artifact: Path, refuses_artifact: Lbq, opened: Any) -> None:
    secret = artifact.parent / "secret"
    secret.write_text("secret")
    name = name.format(str(secret).lstrip("/") if name == "/{}" else "secret")
    entry = {"size": 6, "sha256": "0" * 64}
    edit_json(artifact / "lbq.json", lambda m: m["files"].update({name: entry}))
    with opened:
        for error in refuses_artifact(artifact):
            assert "lbq.json" in error
    assert str(secret) not in {os.path.realpath(path) for path in opened.paths}


# ---------------------------------------------------------------------------- 7: cuts and flipped bits


@pytest.mark.parametrize("part", [0, 0.5, 0.9999])
def test_cut_files(
    part: float, make_checkpoint: Callable[..., Path], artifact: Path, refuses_source: Lbq, refuses_artifact: Lbq
) -> None:
    source = make_checkpoint(shards=3)
    for folder in (source, artifact):
        shard = folder / SHARD
        os.truncate(shard, int(shard.stat().st_size * part))
    assert f"{source / SHARD}: " in refuses_source(source)
    for error in refuses_artifact(artifact):
        assert SHARD in error
        assert "bytes instead of" in error


def test_flipped_bits(artifact: Path, lbq: Lbq) -> None:
    """In the data no load can tell: that is what `lbq verify` is for. It names the file, whichever it is."""
    draw = random.Random(1)
    for path in sorted(artifact.iterdir()):
        if path.name == "lbq.json":
            continue
        before = path.read_bytes()
        data = bytearray(before)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        done = lbq("verify", artifact)
        assert done.code == 3
        assert f"{path.name}: content differs from its sha256" in done.error
        done = lbq("verify", artifact, "--json")
        assert json.loads(done.out)["problems"] == {path.name: "content differs from its sha256"}
        path.write_bytes(before)
    assert lbq("verify", artifact).code == 0


def test_missing_files(artifact: Path, refuses_artifact: Lbq) -> None:
    for path in sorted(artifact.iterdir()):
        moved = path.rename(artifact.parent / "away")
        for error in refuses_artifact(artifact):
            assert path.name in error
        moved.rename(path)


# ------------------------------------------------------------- 8, 9, 10: configs, pickles, remote code


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": 0}, "$.hidden_size"),
        ({"num_hidden_layers": 3}, "tensors missing: 'model.layers.2."),
        ({"num_hidden_layers": 1}, "does not have: 'model.layers.1."),
        ({"hidden_size": 128}, "the config says"),
        ({"vocab_size": 200}, "tokenizer.json: token ids go up to 257"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"architectures": ["EvilForCausalLM"]}, "EvilForCausalLM"),
        ({"hidden_act": "relu\n\x1b]0;owned\x07"}, r"'relu\n\x1b]0;owned\x07'"),
    ],
)
def test_configs(
    changes: dict[str, object], says: str, make_checkpoint: Callable[..., Path], refuses_source: Lbq
) -> None:
    source = make_checkpoint()
    (source / "evil.py").write_text("raise SystemExit('imported')")
    edit_json(source / "config.json", lambda config: config.update(changes))
    error = refuses_source(source)
    assert says in error
    assert str(source) in error


def test_a_config_with_impossible_numbers(make_checkpoint: Callable[..., Path], refuses_source: Lbq) -> None:
    source = make_checkpoint()
    for number in ("1e999", "NaN", "-Infinity"):
        text = (source / "config.json").read_text()
        (source / "config.json").write_text(text.replace('"rms_norm_eps": 1e-05', f'"rms_norm_eps": {number}'))
        assert "config.json" in refuses_source(source)
        (source / "config.json").write_text(text)


def test_a_config_with_a_huge_integer(make_checkpoint: Callable[..., Path], lbq: Lbq, tmp_path: Path) -> None:
    source = make_checkpoint(pad_token_id=1 << 70)
    done = lbq("convert", source, "--gs", "32", "--out", tmp_path / "out")
    assert done.code in (0, 3), done
    if done.code:
        assert "config.json" in done.error


def test_internal_fields_are_ignored(make_checkpoint: Callable[..., Path], lbq: Lbq, tmp_path: Path) -> None:
    source = make_checkpoint(_attn_implementation_internal="someone/evil-kernels", _attn_implementation="eager")
    done = lbq("convert", source, "--gs", "32", "--out", tmp_path / "out")
    assert done.code == 0, done
    assert "unknown keys are ignored: _attn_implementation, _attn_implementation_internal" in done.err
    assert "attn_implementation" not in (tmp_path / "out" / "config.json").read_text()


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickled_checkpoint(make_checkpoint: Callable[..., Path], refuses_source: Lbq, tmp_path: Path) -> None:
    source = make_checkpoint()
    (source / SINGLE).unlink()
    canary = tmp_path / "canary"
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    assert "only pickled weights ('pytorch_model.bin')" in refuses_source(source)
    assert not canary.exists()


def test_a_tokenizer_larger_than_the_vocabulary(
    artifact: Path, reseal: Callable[[Path], None], refuses_artifact: Lbq
) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    more = [{"id": i, "content": f"<{i}>", "special": True, **flags} for i in range(258, 265)]
    edit_json(artifact / "tokenizer.json", lambda t: t["added_tokens"].extend(more))
    reseal(artifact)
    (error,) = refuses_artifact(artifact, ("run",))
    assert f"{artifact}/tokenizer.json: token ids go up to 264 but the model has 264 embedding rows" in error


def test_what_is_no_file(make_checkpoint: Callable[..., Path], lbq: Lbq, artifact: Path, tmp_path: Path) -> None:
    """Pipes, folders and links to nowhere in the place of files: an error, and no waiting for a writer."""
    source = make_checkpoint(shards=2)
    for folder, names, command in (
        (source, ("config.json", INDEX, "model-00001-of-00002.safetensors"), ("convert", source, "--dry-run")),
        (artifact, ("lbq.json", INDEX, SHARD, "report.json"), ("inspect", artifact)),
    ):
        for name in names:
            kept = (folder / name).rename(tmp_path / "kept")
            for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)):
                make(folder / name)
                done = lbq(*command)
                assert done.code in (3, 4), (name, done)
                assert name in done.error or "not an lbq artifact" in done.error
                os.rmdir(folder / name) if (folder / name).is_dir() else os.unlink(folder / name)
            kept.rename(folder / name)


# ------------------------------------------------------------------------ 11: templates that reach out


def test_a_template_that_reaches_for_classes(artifact: Path, reseal: Callable[[Path], None], lbq: Lbq) -> None:
    (artifact / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    reseal(artifact)
    done = lbq("run", artifact, "-p", "Hi", "--device", "cpu")
    assert done.code == 3, done
    assert "template" in done.error
    assert "<class" not in done.out + done.err


# ------------------------------------------------------------ 12 to 16: numbers, widths, heads, scales


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers(value: str, make_checkpoint: Callable[..., Path], refuses_source: Lbq) -> None:
    source = make_checkpoint(edit=lambda t: t[UP].__setitem__((95, 63), float(value)))
    assert refuses_source(source) == f"{source}: {UP} has {value} at [95, 63]; mend the checkpoint or fetch it again"


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("width", [1, 67, 192, 576, 4304])
def test_odd_widths(
    width: int, bits: int, make_checkpoint: Callable[..., Path], lbq: Lbq, refuses_source: Lbq, tmp_path: Path
) -> None:
    """Taken with a rule that is said, or refused under --strict; and the result runs."""
    source = make_checkpoint(intermediate_size=width, num_hidden_layers=1)
    error = refuses_source(source, 2, "--strict", "--gs", "64", "--bits", bits) if width % 64 else ""
    options = ("--bits", bits, "--gs", "64", "--out", tmp_path / "out")
    done = lbq("convert", source, *options, *(() if error else ("--strict",)))
    assert done.code == 0, done
    said = {1: "one scale a row", 67: "one scale a row", 4304: "one scale a row"}.get(width)
    if said:
        assert f"note: {width} inputs do not divide into groups of 64: {said} instead (1 layer)" in done.err
        assert f"{width} inputs do not divide" in error
    assert lbq("verify", tmp_path / "out").code == 0
    assert lbq("inspect", tmp_path / "out").code == 0
    done = lbq("run", tmp_path / "out", "-p", "Hi", "--max-tokens", "3", "--temperature", "0", "--device", "cpu")
    assert done.code == 0, done


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_numbers_at_the_edge(bits: int, make_checkpoint: Callable[..., Path], lbq: Lbq, tmp_path: Path) -> None:
    """Scales of 5e5/7 and 1e-7/7, zeros, constants, subnormals: codes as good as any, and nothing infinite or lost."""

    def edit(tensors: Tensors) -> None:
        w = tensors[UP] = tensors[UP].float()
        w[0], w[1], w[2] = 0.0, 0.25, w[2].abs()
        w[3], w[4], w[5] = w[3] * 1e-40, w[4].sign() * 5e5, w[5].sign() * 1e-7

    source = make_checkpoint(edit=edit)
    assert lbq("convert", source, "--bits", bits, "--gs", "32", "--out", tmp_path / "out").code == 0
    with open_checkpoint(source) as weights, open_artifact(tmp_path / "out") as made:
        w = weights.tensor(UP).double()
        q = made.packed(UP.removesuffix(".weight")).dequantize().double()
    assert bool(torch.isfinite(q).all())
    assert torch.equal(q[0], w[0])
    assert bool((q[4:6].abs().amin(1) > w[4:6].abs().amin(1) / 2).all())
    assert bool((q[4:6].abs().amax(1) < w[4:6].abs().amax(1) * 1.5).all())


# ----------------------------------------------------------------------------------------- 19: outputs


def test_outputs(
    make_checkpoint: Callable[..., Path],
    kept_artifact: Path,
    lbq: Lbq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every output that cannot be is refused before any weight is read."""
    source = make_checkpoint(edit=lambda t: t[UP].fill_(float("nan")))  # work would end in exit code 3
    full, file, parentless = tmp_path / "full", tmp_path / "file", tmp_path / "none" / "out"
    (full / "precious").mkdir(parents=True)
    file.write_text("precious")
    old = tmp_path / "old"
    old.mkdir()
    for path in kept_artifact.iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    link = tmp_path / "link"
    link.symlink_to(source)
    before = {path: sorted(os.listdir(path)) for path in (tmp_path, source, full, old)}
    cases: list[tuple[Path, tuple[str, ...], int, str]] = [
        (source, (), 2, "contain one another"),
        (source / "inside", (), 2, "contain one another"),
        (link, (), 2, "contain one another"),
        (tmp_path, ("--overwrite",), 2, "contain one another"),
        (full, (), 4, "not empty and not an lbq artifact"),
        (full, ("--overwrite",), 4, "not empty and not an lbq artifact"),
        (file, ("--overwrite",), 4, "exists and is not a folder"),
        (old, (), 4, "exists; choose another output, or --overwrite"),
        (parentless, (), 4, "is not a folder; make it first"),
        (old, ("--overwrite",), 3, "has nan"),
    ]
    for target, options, code, says in cases:
        done = lbq("convert", source, "--gs", "32", "--out", target, *options)
        assert (done.code, says in done.error) == (code, True), (target, options, done)
        assert {path: sorted(os.listdir(path)) for path in before} == before
    assert content(old) == content(kept_artifact)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    done = lbq("convert", source, "--gs", "32", "--out", tmp_path / "out")
    assert (done.code, "is not writable" in done.error) == (4, True)


def test_a_read_only_file_system(
    checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("lbq.formats.staging.os.open", refuse)
    done = lbq("convert", checkpoints["llama"], "--gs", "32", "--out", tmp_path / "out")
    monkeypatch.undo()
    assert done.code == 4
    assert "Read-only file system" in done.error


def test_two_converters(checkpoints: Mapping[str, Path], lbq: Lbq, tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "out"):
        done = lbq("convert", checkpoints["llama"], "--gs", "32", "--out", tmp_path / "out")
    assert done.code == 5
    assert done.error == f"{tmp_path}/out: another lbq is writing it; wait, or choose another output"


@pytest.mark.parametrize("command", ["inspect", "verify", "run", "convert"])
@pytest.mark.parametrize("what", ["nowhere", "file", "empty", "not\nprintable\x1b[2J"])
def test_what_is_no_model(command: str, what: str, lbq: Lbq, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    done = lbq(command, tmp_path / what, *(("-p", "Hi") if command == "run" else ()))
    assert done.code in ((3,) if what == "empty" else (4,))
    assert what.encode("unicode_escape").decode() in done.error


# ---------------------------------------------------------------------------------------------- sweeps

VALUES: tuple[object, ...] = (None, -1, 0, 1, 1 << 31, 1 << 70, 0.5, 1e308, True, "", "../{i}", [[]], {})


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a manifest; of its two layers, which are alike, the first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        if "layers.1." not in str(key):
            yield value, key
            yield from leaves(inner)


def accepted(read: Callable[[], object]) -> bool:
    """Whether ``read`` takes what it finds; if not, its error must be one for bad data."""
    try:
        read()
    except DataError:
        return False
    return True


def opens(folder: Path) -> bool:
    return accepted(lambda: open_artifact(folder).close())


def test_every_field_of_a_manifest(artifact: Path) -> None:
    path = artifact / "lbq.json"
    manifest = json.loads(path.read_text())
    tried = harmless = 0
    for container, key in leaves(manifest):
        before = container[key]
        for value in VALUES:
            container[key] = value
            path.write_text(json.dumps(manifest))
            tried += 1
            harmless += opens(artifact)
        del container[key]
        path.write_text(json.dumps(manifest))
        opens(artifact)
        if isinstance(container, dict):
            container[key] = before
        else:
            container.insert(key, before)
    path.write_text(json.dumps(manifest))
    assert opens(artifact)
    assert tried > 1000
    assert harmless < tried / 4


@pytest.mark.parametrize("name", ["lbq.json", INDEX, SHARD, "model-00001-of-00003.safetensors"])
def test_any_byte_of_a_header(name: str, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbq.formats.artifact._check_sizes", lambda *_: None)  # else that would be all there is to see
    path = artifact / name
    before = path.read_bytes()
    end = 8 + struct.unpack("<Q", before[:8])[0] if name.endswith(".safetensors") else len(before)
    draw = random.Random(1)
    for _ in range(400):
        data = bytearray(before)
        at = draw.randrange(end)
        match draw.randrange(4):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at] = draw.randrange(256)
            case 2:
                del data[at : at + draw.randrange(1, 40)]
            case _:
                del data[at:]
        path.write_bytes(data)
        opens(artifact)
    path.write_bytes(before)
    assert opens(artifact)


def test_any_field_of_a_config(make_checkpoint: Callable[..., Path]) -> None:
    path = make_checkpoint() / "config.json"
    config = json.loads(path.read_text())
    refused = 0
    for container, key in leaves(config):
        before = container[key]
        for value in VALUES:
            container[key] = value
            path.write_text(json.dumps(config))
            refused += not accepted(lambda: read_spec(path.parent))
        container[key] = before
    assert refused > 100


def test_what_opens_also_runs(artifact: Path) -> None:
    """A spec that is wrong and yet fits its tensors decodes nonsense, or is refused: it does not crash."""
    from lbq.runtime import load

    path = artifact / "lbq.json"
    manifest = json.loads(path.read_text())

    def run() -> None:
        try:
            model = load(artifact, device="cpu")
        except UsageError:  # the context is too short
            return
        model.logits([1])
        model.close()

    ran = 0
    for container, key in leaves(manifest["spec"]):
        before = container[key]
        for value in VALUES:
            container[key] = value
            path.write_text(json.dumps(manifest))
            ran += opens(artifact) and accepted(run)
        container[key] = before
    assert ran > 30
