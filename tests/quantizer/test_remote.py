"""A checkpoint on the Hub, planned from its headers. The Hub is a stub on loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stub import Answer, Hub, Request

from lbq.conversion import decide, make_order
from lbq.formats.errors import DataError, RemoteError, UsageError
from lbq.quantizer import prepare as preparing
from lbq.quantizer import remote, timing
from lbq.quantizer.plan import HEAD_DIFFERS
from lbq.quantizer.prepare import prepare
from lbq.quantizer.request import make_request
from lbq.quantizer.source import fetch_weights, resolve

pytestmark = pytest.mark.usefixtures("one_thread", "no_waiting")

Lbq = Callable[..., Any]
NAME = "user/model"
WEIGHTS = ".safetensors"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_BYTES", 64)
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(timing, "WRITE_BYTES", 1 << 20)
    monkeypatch.setattr(timing, "CPU_BLOCK", 1 << 14)


def headers(content: bytes) -> int:
    """Where the data of a safetensors file begin."""
    return 8 + int.from_bytes(content[:8], "little")


def ranges(hub: Hub) -> list[tuple[str, int, int]]:
    """File, first and last byte of everything that was read of a large file."""
    found = []
    for request in hub.requests:
        if request.storage and request.method == "GET":
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
            assert asked, f"all of {request.path} was asked for"
            found.append((request.path.rpartition("/")[2], int(asked[1]), int(asked[2])))
    return found


@pytest.fixture
def source(write_checkpoint: Callable[..., Path], tmp_path: Path, hub: Hub) -> Path:
    folder = write_checkpoint(tmp_path / "model", "qwen2", shards=3)
    hub.add_folder(NAME, folder)
    return folder


def test_the_plan_of_the_same_folder(source: Path, hub: Hub, lbq: Lbq, tmp_path: Path) -> None:
    options = ("--gs", "64", "--set", "o_proj=8", "--device", "cpu", "--json", "--out", tmp_path / "out")
    there, here = (lbq("plan", model, *options) for model in (NAME, source))
    assert (there.code, here.code) == (0, 0), there
    assert there.err == here.err != ""
    plan, local = json.loads(there.out), json.loads(here.out)
    sizes = {path.name: path.stat().st_size for path in source.glob("*.safetensors")}
    assert (plan.pop("remote_bytes"), local.pop("remote_bytes")) == (sum(sizes.values()), 0)
    assert (plan.pop("largest_remote"), local.pop("largest_remote")) == (max(sizes.values()), 0)
    assert (plan.pop("cache_free") > 0, local.pop("cache_free")) == (True, None)
    assert plan.pop("timing")["reading"] is None
    assert local.pop("timing")["reading"] > 0
    del plan["disk_free"], local["disk_free"]
    assert plan == local
    read = ranges(hub)
    assert {name for name, _, _ in read} == sizes.keys()
    assert all(last < headers((source / name).read_bytes()) for name, _, last in read)
    assert "fetches   " in lbq("plan", NAME, "--gs", "64", "--device", "cpu").out


def test_one_file(checkpoints: Mapping[str, Path], hub: Hub, lbq: Lbq) -> None:
    hub.add_folder(NAME, checkpoints["llama"])
    assert lbq("plan", NAME, "--device", "cpu").code == 0
    content = (checkpoints["llama"] / "model.safetensors").read_bytes()
    assert ranges(hub)
    assert all(last < headers(content) for _, _, last in ranges(hub))


def test_shards_in_the_cache_are_opened_there(source: Path, hub: Hub) -> None:
    whole = fetch_weights(resolve(NAME, weights=False))
    names = sorted(path.name for path in whole.folder.glob("*.safetensors"))
    (whole.folder / names[1]).unlink()
    hub.requests.clear()
    prepared = prepare(resolve(NAME, weights=False), make_request())
    assert {name for name, _, _ in ranges(hub)} == {names[1]}
    assert prepared.remote_bytes == (source / names[1]).stat().st_size
    assert (
        prepared.checkpoint.tensor("model.norm.weight" if "x" in names else _tensor_of(source / names[0])) is not None
    )


def _tensor_of(path: Path) -> str:
    content = path.read_bytes()
    return next(name for name in json.loads(content[8 : headers(content)]) if name != "__metadata__")


def test_what_is_refused_is_refused_before_weights_are_fetched(
    source: Path, hub: Hub, lbq: Lbq, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for options, code in (
        (("--gs", "64", "--strict"), 2),
        (("--set", "nothing=8"), 2),
        (("--out", tmp_path / "full"), 4),
    ):
        assert lbq("convert", NAME, *options).code == code
    assert all(last < headers((source / name).read_bytes()) for name, _, last in ranges(hub))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:5], "too short for a safetensors file"),
        (lambda data: data[:30], "cut short or not a safetensors file"),
        (lambda data: data[:-5], "cut short inside tensor"),
        (lambda data: (1 << 60).to_bytes(8, "little") + data[8:], "cut short or not"),
        (lambda data: data[:8] + b"[" + data[9:], "not a JSON object"),
    ],
)
def test_broken_files(checkpoints: Mapping[str, Path], hub: Hub, spoil: Callable[[bytes], bytes], message: str) -> None:
    hub.add_folder(NAME, checkpoints["llama"])
    hub.put(NAME, "model.safetensors", spoil((checkpoints["llama"] / "model.safetensors").read_bytes()))
    with pytest.raises(DataError, match=f"user/model/model.safetensors: .*{message}"):
        prepare(resolve(NAME, weights=False), make_request())


@pytest.mark.usefixtures("source")
def test_a_hub_that_fails(hub: Hub) -> None:
    found = resolve(NAME, weights=False)
    hub.fail("GET", r".*/model-00002.*", 503, times=2)
    prepare(found, make_request())
    hub.fail("GET", r".*/model-00002.*", 403)
    with pytest.raises(RemoteError, match=r"model-00002-of-00003\.safetensors"):
        prepare(found, make_request())


@pytest.mark.usefixtures("source")
def test_a_server_without_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first bytes do; nothing from the middle is taken for what it is not."""
    found = resolve(NAME, weights=False)
    real = Hub.blob

    def blob(self: Hub, request: Request, oid: str, name: str) -> Answer:
        request.headers.pop("range")
        return real(self, request, oid, name)

    monkeypatch.setattr("hub_stub._STORAGE", (("GET", r"/blob/(?P<oid>\w+)/(?P<name>.+)", blob),))
    with pytest.raises(RemoteError, match="knows no ranges"):
        prepare(found, make_request())
    monkeypatch.setattr(remote, "FIRST_BYTES", 1 << 20)
    prepare(found, make_request())


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_tied_embedding(make_checkpoint: Callable[..., Path], hub: Hub, same: bool) -> None:
    def both(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if not same:
            tensors["lm_head.weight"][3, 3] += 1

    hub.add_folder(NAME, make_checkpoint("smollm2", edit=both, shards=2))
    assert prepare(resolve(NAME, weights=False), make_request()).head_differs is not same


def test_a_head_that_differs_further_on(
    make_checkpoint: Callable[..., Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only the weights tell is said when they are here."""

    def both(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    hub.add_folder(NAME, make_checkpoint("smollm2", edit=both))
    monkeypatch.setattr(preparing, "REMOTE_PIECES", 0)
    said: list[str] = []
    job = decide(NAME, make_order(group=32), tmp_path / "out", device="cpu", on_note=said.append)
    assert [note for note in said if note in job.prepared.plan.notes] == list(job.prepared.plan.notes)
    assert HEAD_DIFFERS in said


@pytest.mark.usefixtures("source")
def test_a_size_that_cannot_be_had_is_refused_first(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this model takes"):
        decide(NAME, make_order(target_bpw=1.5), tmp_path / "out", device="cpu")
    assert all(request.method != "GET" or "range" in request.headers for request in hub.requests if request.storage)


@pytest.mark.usefixtures("source")
def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(NAME, weights=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((RemoteError, DataError)):
        prepare(resolve(NAME, weights=False), make_request())
