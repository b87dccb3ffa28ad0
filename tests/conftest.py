"""Tiny checkpoints and artifacts of every family, and the command line in this process."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hub_stub import Hub
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lbq.formats import json_file
from lbq.formats.disk import hash_file
from lbq.quantizer.families import read_spec

SHAPE: dict[str, object] = {
    "vocab_size": 264,  # 256 bytes, two special tokens, and rows that no token uses
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": LLAMA3},
    "smollm2": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 9},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
}
TEMPLATE = """\
{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""

Tensors = dict[str, torch.Tensor]


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges: a token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    (folder / "tokenizer.json").write_text(made.to_str())
    settings = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))


def random_tensors(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Every tensor of the model that ``folder/config.json`` describes."""
    spec = read_spec(folder).spec
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=random) * scale).to(dtype)

    tensors = {f"{spec.embedding}.weight": normal(spec.vocab_size, spec.hidden_size, scale=1.0)}
    for p in spec.projections():
        if p.name != spec.head.name or not spec.tied:
            tensors[f"{p.name}.weight"] = normal(p.out_features, p.in_features, scale=0.15)
        if p.bias:
            tensors[f"{p.name}.bias"] = normal(p.out_features, scale=0.3)
    tensors |= {f"{name}.weight": 1 + normal(width, scale=0.2) for name, width in spec.norms()}
    return tensors


def save_tensors(folder: Path, tensors: Tensors, shards: int = 1) -> None:
    """One file, or shards and an index, in place of what is there."""
    for old in folder.glob("model*"):
        old.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def write_checkpoint() -> MakeCheckpoint:
    """``write_checkpoint(folder, family, edit=…, dtype=…, shards=…, **config)`` makes a checkpoint in a new folder.

    ``edit`` changes the tensors before they are saved; ``config`` overrides fields of config.json (None removes one).
    """

    def write(
        folder: Path,
        family: str = "llama",
        *,
        edit: Callable[[Tensors], object] = lambda _: None,
        dtype: torch.dtype = torch.bfloat16,
        shards: int = 1,
        **config: object,
    ) -> Path:
        folder.mkdir(parents=True)
        fields = {**SHAPE, **FAMILIES[family], **config}
        json_text = json.dumps({name: value for name, value in fields.items() if value is not None})
        (folder / "config.json").write_text(json_text)
        tensors = random_tensors(folder, dtype)
        edit(tensors)
        save_tensors(folder, tensors, shards)
        write_tokenizer(folder)
        return folder

    return write


@pytest.fixture
def make_checkpoint(write_checkpoint: MakeCheckpoint, tmp_path: Path) -> MakeCheckpoint:
    """``write_checkpoint`` into ``tmp_path/source``."""
    return lambda *args, **options: write_checkpoint(tmp_path / "source", *args, **options)


@pytest.fixture(scope="session")
def checkpoints(write_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A checkpoint of every family. To be read only."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: write_checkpoint(root / family, family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def read_tensors() -> Callable[[Path], Tensors]:
    """All tensors of a folder, by the safetensors package."""

    def read(folder: Path) -> Tensors:
        tensors: Tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        return tensors

    return read


@pytest.fixture
def resave() -> Callable[..., None]:
    """``resave(folder, edit, shards=1)`` changes a folder's tensors."""

    def change(folder: Path, edit: Callable[[Tensors], object], shards: int = 1) -> None:
        tensors: Tensors = {}
        for path in folder.glob("*.safetensors"):
            tensors |= load_file(path)
        edit(tensors)
        save_tensors(folder, tensors, shards)

    return change


@pytest.fixture
def reseal() -> Callable[[Path], None]:
    """Write the sizes and hashes of an artifact's files, as they are now, into its manifest."""

    def seal(folder: Path) -> None:
        path = folder / "lbq.json"
        manifest = json.loads(path.read_text())
        manifest["files"] = {name: hash_file(folder / name) for name in manifest["files"] if (folder / name).is_file()}
        path.write_bytes(json_file.encode(manifest))

    return seal


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says why a command failed; notes may stand before it."""
        lines = self.err.splitlines()
        notes = [line for line in lines if line.startswith("note: ")]
        assert len(lines) == len(notes) + 1, self.err
        assert lines[-1].startswith("lbq: error: "), self.err
        assert "a bug in lbq" not in lines[-1], self.err
        assert "Traceback" not in self.err
        return lines[-1].removeprefix("lbq: error: ")


@pytest.fixture
def lbq(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``lbq("convert", folder, …)`` runs a command in this process, as ``lbq.cli.main`` does."""
    from lbq import cli

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["lbq", *map(str, arguments)])
        code = cli._run()
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture(scope="session")
def kept_artifact(checkpoints: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama checkpoint at INT4 in groups of 32, in three shards. To be read only: see ``artifact``."""
    from lbq.conversion import convert

    target = tmp_path_factory.mktemp("artifacts") / "llama-int4-g32"
    return convert(checkpoints["llama"], target, group=32, max_shard_bytes=40_000, device="cpu").path


@pytest.fixture
def artifact(kept_artifact: Path, tmp_path: Path) -> Path:
    """A copy of ``kept_artifact`` that a test may break."""
    copy = tmp_path / "artifact"
    copy.mkdir()
    for path in kept_artifact.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


class Opened:
    """The files that were opened while this context was entered."""

    active: Opened | None = None

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __enter__(self) -> Opened:
        Opened.active = self
        return self

    def __exit__(self, *_: object) -> None:
        Opened.active = None


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and Opened.active is not None:
        Opened.active.paths.append(str(arguments[0]))


@pytest.fixture(scope="session")
def _hooked() -> None:
    sys.addaudithook(_audit)  # for good: Python has no way to remove one


@pytest.fixture
def opened(_hooked: None) -> Opened:
    """``with opened:`` collects what is opened into ``opened.paths``."""
    return Opened()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors are not worth waking threads for, on a busy machine least of all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on loopback with a cache of its own, for this process and for those it starts; nobody is logged in."""
    import huggingface_hub
    from huggingface_hub import constants

    with Hub() as hub:
        home = tmp_path / "hf-home"
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_OFFLINE"))]:
            monkeypatch.delenv(name)
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        # The client has read these when it was imported, by whichever test was first.
        known = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in known.items():
            monkeypatch.setattr(constants, name, value)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody sleeps in this process; the seconds that were asked for."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits
