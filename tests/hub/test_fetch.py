"""Models by their names on the Hub, against a stub of its protocol: what is fetched, what is refused, what is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hub_stub import TOKEN, Hub, sha256

from lbq.formats.errors import UsageError
from lbq.formats.manifest import License, read_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "user/tiny"
Lbq = Callable[..., Any]
ANSWER = ("-p", "Hi", "--max-tokens", "3", "--device", "cpu", "--threads", "1", "--temperature", "0")


@pytest.fixture
def artifact_files(kept_artifact: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in kept_artifact.iterdir()}


@pytest.fixture
def on_hub(hub: Hub, artifact_files: dict[str, bytes]) -> str:
    """The artifact is on the Hub among files that are none of its own; the commit."""
    return hub.add(NAME, {**artifact_files, "README.md": b"# A card", "onnx/model.onnx": b"o", "big.gguf": b"g" * 99})


@pytest.mark.usefixtures("on_hub")
def test_run(hub: Hub, lbq: Lbq, kept_artifact: Path, artifact_files: dict[str, bytes]) -> None:
    done = lbq("run", NAME, *ANSWER)
    assert (done.code, done.out) == (0, lbq("run", kept_artifact, *ANSWER).out)
    assert hub.fetched() == sorted(artifact_files)
    hub.requests.clear()
    assert lbq("run", NAME, *ANSWER).code == 0
    assert [r.path for r in hub.requests] == [f"/api/models/{NAME}/revision/main"]


@pytest.mark.usefixtures("on_hub")
def test_inspect_fetches_no_weights(hub: Hub, lbq: Lbq, kept_artifact: Path) -> None:
    done = lbq("inspect", NAME, "--layers")
    assert (done.code, done.err) == (0, "")
    assert done.out.replace(NAME, str(kept_artifact)) == lbq("inspect", kept_artifact, "--layers").out
    assert hub.fetched() == ["lbq.json", "report.json"]


@pytest.mark.usefixtures("on_hub")
def test_report_fetches_no_weights(hub: Hub, lbq: Lbq, kept_artifact: Path, tmp_path: Path) -> None:
    assert lbq("report", NAME, "--out", tmp_path / "a.html").code == 0
    assert lbq("report", kept_artifact, "--out", tmp_path / "b.html").code == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert hub.fetched() == ["lbq.json", "report.json"]


@pytest.mark.usefixtures("on_hub")
def test_export(lbq: Lbq, kept_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lbq("export", NAME, "--to", "gptq").code == 0
    assert lbq("export", kept_artifact, "--to", "gptq", "--out", "local").code == 0
    found = tmp_path / f"{NAME.partition('/')[2]}-gptq"
    assert (found / "model.safetensors").read_bytes() == (tmp_path / "local" / "model.safetensors").read_bytes()


def test_a_revision_is_pinned(hub: Hub, lbq: Lbq, on_hub: str) -> None:
    hub.repos[NAME].refs["v1"] = on_hub
    hub.add(NAME, {"README.md": b"moved"})
    for revision in (on_hub, "v1"):
        assert lbq("verify", f"{NAME}@{revision}").code == 0
    done = lbq("verify", NAME)
    assert done.code == 3
    assert done.error.startswith(f"{NAME}: not an lbq artifact (no lbq.json); ")
    done = lbq("verify", f"{NAME}@v2")
    assert (done.code, done.error) == (6, f"{NAME}@v2: no such branch, tag or commit")


def test_a_branch_that_moves_meanwhile(hub: Hub, lbq: Lbq, on_hub: str, artifact_files: dict[str, bytes]) -> None:
    """All files are of the commit that was looked at."""
    moved = {**artifact_files, "lbq.json": b"{}", "config.json": b"[]"}
    hub.before("HEAD", "/resolve/main/lbq.json", lambda: hub.add(NAME, moved))
    done = lbq("pull", NAME)
    assert done.code == 0, done.err
    folder = Path(done.out.strip())
    assert folder.name == on_hub
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == artifact_files
    assert lbq("pull", NAME).code == 3


@pytest.mark.usefixtures("on_hub")
def test_offline_from_the_cache(hub: Hub, lbq: Lbq, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert lbq("run", NAME, *ANSWER).code == 0
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = lbq("run", NAME, *ANSWER)
    assert (done.code, "note:" in done.err) == (0, False)
    assert hub.requests == []
    done = lbq("inspect", "user/other")
    assert (done.code, done.error) == (
        6,
        "user/other: not in the cache, and HF_HUB_OFFLINE is set: unset it, or fetch it once",
    )


@pytest.mark.usefixtures("on_hub")
def test_a_hub_out_of_reach_is_said(hub: Hub, lbq: Lbq) -> None:
    assert lbq("inspect", NAME).code == 0
    commit = hub.head(NAME)[:12]
    hub.fail("GET", "/api/models/", 503, times=99)
    done = lbq("inspect", NAME)
    assert (done.code, done.err) == (
        0,
        f"note: {NAME}: the Hub is out of reach; taken from the cache at commit {commit}\n",
    )
    done = lbq("verify", NAME)
    assert (done.code, "is not in the cache, and the Hub is out of reach" in done.error) == (6, True)


def test_load(kept_artifact: Path, on_hub: str) -> None:
    import lbq

    texts = []
    for model, revision in ((NAME, None), (NAME, on_hub), (kept_artifact, None)):
        with lbq.load(model, revision=revision, device="cpu") as loaded:
            texts.append(loaded.generate("Hi", max_tokens=3, temperature=0.0).text)
    assert len(set(texts)) == 1
    with pytest.raises(UsageError, match="no revisions"):
        lbq.load(kept_artifact, revision="v1")


@pytest.mark.parametrize("command", ["convert", "run --bits 4 -p Hi"])
@pytest.mark.usefixtures("on_hub")
def test_an_artifact_where_a_checkpoint_is_asked_for(hub: Hub, lbq: Lbq, command: str) -> None:
    name, *options = command.split()
    done = lbq(name, NAME, *options)
    assert (done.code, done.error) == (2, f"{NAME}: an artifact, quantized already; lbq run {NAME}")
    assert hub.fetched() == []


def test_no_network(hub: Hub, lbq: Lbq, monkeypatch: pytest.MonkeyPatch, no_waiting: list[float]) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = lbq("run", NAME, *ANSWER)
    assert done.code == 6
    assert done.error.startswith(f"{NAME}: the Hub cannot be reached (")
    assert hub.requests == no_waiting == []


@pytest.mark.usefixtures("on_hub")
def test_cut_downloads_go_on(hub: Hub, lbq: Lbq, no_waiting: list[float]) -> None:
    hub.cut("GET", "/blob/", times=2)
    hub.fail("GET", "/blob/", 429, retry_after="3", skip=1)
    hub.fail("GET", "/api/models/", 500)
    hub.fail("HEAD", "/resolve/", 500)
    assert lbq("verify", NAME).code == 0
    assert 4.0 in no_waiting  # the client's: a second more than it was asked for


@pytest.mark.usefixtures("on_hub", "no_waiting")
def test_a_download_that_fails_for_good(hub: Hub, lbq: Lbq) -> None:
    hub.fail("GET", "/blob/", 500, times=99, skip=1)
    done = lbq("verify", NAME)
    assert done.code == 6
    assert done.err.splitlines()[-1].endswith(": the Hub fails (500): run again later")
    hub.heal()
    before = hub.fetched()
    hub.requests.clear()
    assert lbq("verify", NAME).code == 0
    assert "model-00001-of-00003.safetensors" in before
    assert "model-00001-of-00003.safetensors" not in hub.fetched()  # what was whole is not fetched again


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, "", "the Hub does not accept the token, or needs one: log in with `hf auth login` or set HF_TOKEN"),
        (401, "GatedRepo", "access is restricted: accept its terms on the Hub, then log in"),
        (403, "", "the token may not do this"),
        (404, "RepoNotFound", "no such repository on the Hub; if it is private, log in"),
        (429, "", "the Hub counts too many requests: wait a few minutes and run again"),
        (500, "", "the Hub fails (500): run again later"),
    ],
)
@pytest.mark.usefixtures("on_hub", "no_waiting")
def test_errors_of_the_hub(hub: Hub, lbq: Lbq, status: int, code: str, says: str) -> None:
    hub.fail("GET", "/api/models/", status, times=99, code=code)
    done = lbq("run", NAME, *ANSWER)
    assert done.code == 6
    assert done.error.startswith(f"{NAME}: {says}")


def test_a_private_repository(
    hub: Hub, lbq: Lbq, artifact_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, artifact_files, private=True)
    assert lbq("inspect", NAME).code == 6
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = lbq("verify", NAME)
    assert done.code == 0
    assert TOKEN not in done.out + done.err
    assert not [r for r in hub.requests if r.storage and "authorization" in r.headers]


@pytest.mark.parametrize("token", [TOKEN + "\x01", f"Bearer {TOKEN}", "pässword-of-mine"])
@pytest.mark.usefixtures("on_hub")
def test_a_broken_token_is_not_printed(token: str, lbq: Lbq, monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTTP package quotes headers that it cannot send."""
    monkeypatch.setenv("HF_TOKEN", token)
    done = lbq("inspect", NAME)
    said = done.out + done.err
    assert token not in said
    assert TOKEN not in said
    assert repr(token)[1:-1] not in said


@pytest.mark.parametrize("name", ["../x", "/abs", "C:x", "..\\x", "a/../../x", "a//b", "new\nline"])
@pytest.mark.parametrize("kind", ["listed", "manifest", "index"])
def test_hostile_names_stay_out(
    hub: Hub, lbq: Lbq, tmp_path: Path, artifact_files: dict[str, bytes], kind: str, name: str
) -> None:
    home = tmp_path / "hf-home"
    files = dict(artifact_files)
    if kind == "listed":
        files[name] = b"hostile"
    else:
        path = "lbq.json" if kind == "manifest" else "model.safetensors.index.json"
        content = json.loads(files[path])
        if kind == "manifest":
            content["files"][name] = content["files"]["config.json"]
        else:
            content["weight_map"][next(iter(content["weight_map"]))] = name
        files[path] = json.dumps(content).encode()
        if kind == "index":
            manifest = json.loads(files["lbq.json"])
            manifest["files"][path] = {"size": len(files[path]), "sha256": sha256(files[path])}
            files["lbq.json"] = json.dumps(manifest).encode()
    hub.add(NAME, files)
    before = set(tmp_path.rglob("*"))
    done = lbq("run", NAME, *ANSWER)
    assert done.code == 3, done.err
    assert repr(name)[1:-1] in done.error.replace("\\\\", "\\") or "hostile" in done.error
    assert not [path for path in set(tmp_path.rglob("*")) - before if not path.is_relative_to(home)]


@pytest.mark.usefixtures("no_waiting")
def test_what_is_not_as_its_manifest_says(hub: Hub, lbq: Lbq, artifact_files: dict[str, bytes]) -> None:
    shard, small = "model-00002-of-00003.safetensors", "chat_template.jinja"
    for name, change, fetched in (
        (shard, lambda content: content + b"x", False),
        (shard, lambda content: content[:-1] + b"x", False),  # known from the hash that the Hub keeps
        (small, lambda content: content[:-1] + b"x", True),
    ):
        hub.requests.clear()
        hub.add(NAME, {**artifact_files, name: change(artifact_files[name])})
        done = lbq("run", NAME, *ANSWER)
        assert done.code == 3
        assert f"{name} is not the file of its lbq.json" in done.error
        assert (name in hub.fetched()) == fetched
    hub.add(NAME, {name: content for name, content in artifact_files.items() if name != shard})
    done = lbq("run", NAME, *ANSWER)
    assert (done.code, f"{shard} is missing, which its lbq.json lists" in done.error) == (3, True)
    hub.add(NAME, artifact_files)
    assert lbq("run", NAME, *ANSWER).code == 0


def test_pull(hub: Hub, lbq: Lbq, on_hub: str, tmp_path: Path, artifact_files: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    done = lbq("pull", NAME, "--out", out)
    assert (done.code, done.out, done.err) == (0, f"{out}\n", "")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == artifact_files
    assert lbq("verify", out).code == 0
    assert lbq("pull", NAME, "--out", out).code == 4
    assert lbq("pull", NAME, "--out", out, "--overwrite").code == 0
    done = lbq("pull", NAME, "--json")
    folder = Path(json.loads(done.out)["path"])
    assert (folder.name, read_manifest(folder)) == (on_hub, read_manifest(out))
    done = lbq("pull", out)
    assert (done.code, "give a Hub id" in done.error) == (2, True)
    (tmp_path / "thesis.txt").write_text("precious")
    hub.requests.clear()
    assert lbq("pull", NAME, "--out", tmp_path).code == 4
    assert hub.requests == []


@pytest.mark.usefixtures("on_hub")
def test_pull_mends_a_broken_cache(lbq: Lbq, artifact_files: dict[str, bytes]) -> None:
    folder = Path(lbq("pull", NAME).out.strip())
    shard = folder / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.resolve().write_bytes(content)
    done = lbq("verify", NAME)
    assert (done.code, done.error) == (
        3,
        f"{NAME}: {shard.name}: content differs from its sha256; mend the cache: lbq pull {NAME}",
    )
    assert lbq("pull", NAME).code == 0
    assert shard.read_bytes() == artifact_files[shard.name]


def test_eval_of_hub_ids(
    hub: Hub, lbq: Lbq, kept_artifact: Path, checkpoints: Mapping[str, Path], tmp_path: Path
) -> None:
    hub.add_folder(NAME, kept_artifact)
    hub.add_folder("user/base", checkpoints["llama"])
    (tmp_path / "text").write_text("All work and no play. " * 20)
    options = ("--text", tmp_path / "text", "--context", "32", "--max-tokens", "64", "--device", "cpu", "--json")
    found = []
    for artifact, base in ((NAME, "user/base"), (kept_artifact, checkpoints["llama"]), (NAME, NAME)):
        done = lbq("eval", artifact, "--against", base, *options)
        assert done.code == 0, done.err
        found.append(json.loads(done.out)["scores"])
    assert found[0] == found[1]
    assert found[2]["kl"]["mean"] == 0.0


def test_convert(hub: Hub, lbq: Lbq, checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    first = hub.add_folder("user/base", checkpoints["llama"])
    hub.add("user/base", {**hub.files("user/base"), "pytorch_model.bin": b"pickled", "onnx/model.safetensors": b"o"})
    hub.put("user/base", "README.md", b"---\nlicense: mit\n---\n")
    assert lbq("convert", "user/base", "--gs", "32", "--out", tmp_path / "out").code == 0
    source = read_manifest(tmp_path / "out").source
    assert (source.name, source.revision, source.license) == ("user/base", hub.head("user/base"), License("mit"))
    assert hub.fetched() == sorted(["README.md", *(path.name for path in checkpoints["llama"].iterdir())])
    for wish in (["user/base", "--revision", first], [f"user/base@{first}"]):
        assert lbq("convert", *wish, "--gs", "32", "--out", tmp_path / "out", "--overwrite").code == 0
        assert read_manifest(tmp_path / "out").source.revision == first
    done = lbq("convert", f"user/base@{first}", "--revision", "main", "--out", tmp_path / "new")
    assert (done.code, "another revision" in done.error) == (2, True)


def test_convert_looks_before_it_fetches(hub: Hub, lbq: Lbq, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert lbq("convert", "user/base", "--out", tmp_path).code == 4
    assert hub.requests == []
    hub.add("user/gguf", {"model.gguf": b"g"})
    done = lbq("convert", "user/gguf")
    assert (done.code, "not a checkpoint (no config.json)" in done.error) == (3, True)


def test_without_the_package() -> None:
    """A lean install says what Hub ids need; that it runs folders, test_imports shows."""
    program = "import sys\nsys.modules['huggingface_hub'] = None\nfrom lbq import cli\ncli.main()\n"
    command = [sys.executable, "-c", program, "run", NAME, "-p", "Hi"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"lbq: error: {NAME}: a name on the Hub, which needs a package: pip install huggingface_hub\n"
