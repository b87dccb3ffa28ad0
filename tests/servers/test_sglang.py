"""SGLang's own code on artifacts: how it reads the config, and what its loader makes of the weights, whole and split
between ranks.

Skipped where SGLang is not installed: docs/interop.md says how to have it here without a GPU. What it imports of
compiled packages is replaced by stand-ins that do nothing; its kernels do not run.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from server_weights import check_weights

from lbq.formats.packing import BITS
from lbq.formats.readers import VERSIONS
from lbq.quantizer.export import export

pytestmark = [
    pytest.mark.skipif(find_spec("sglang") is None, reason="SGLang is not installed"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread", "sglang"),
]

COMPILED = (
    "cuda",
    "flashinfer",
    "llguidance",
    "outlines",
    "sgl_kernel",
    "torchaudio",
    "torchvision",
    "tvm_ffi",
    "xgrammar",
)
Make = Callable[..., Path]


class _Named(type):
    """Classes with every attribute there is."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Thing()


class _Thing(metaclass=_Named):
    """Takes every call, and as a decorator changes nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: object) -> Any:
        decorates = len(args) == 1 and not kwargs and (inspect.isclass(args[0]) or inspect.isfunction(args[0]))
        return args[0] if decorates else _Thing()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Thing()

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: object) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()


class _Module(ModuleType):
    __version__ = "0"
    __file__ = None
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (_Thing,), {}) if name[0].isupper() else _Thing()


class _Finder:
    """Stand-ins for compiled packages."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        del path, target
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in COMPILED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        del module


@pytest.fixture(scope="module")
def sglang() -> Iterator[None]:
    """SGLang with stand-ins for what needs a GPU, on a machine that it takes for one with a Hopper."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        yield
    sys.meta_path.remove(finder)  # type: ignore[arg-type]


def load(folder: Path, ranks: int = 1, rank: int = 0) -> torch.nn.Module:
    """The model of a rank after SGLang's loader, before its kernels repack."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader import loader
    from sglang.srt.model_loader.utils import set_default_torch_dtype
    from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish, reset_context
    from sglang.srt.server_args import ServerArgs

    settings = {"device": "cpu", "dtype": "bfloat16", "attention_backend": "torch_native"}
    reset_context()
    publish(
        ServerArgs(model_path=str(folder), tp_size=ranks, **settings),
        role="scheduler",
        ranks=SpawnRanks(world_rank=rank),
    )
    config, how = ModelConfig(str(folder), dtype="bfloat16"), LoadConfig()
    own = SimpleNamespace(world_size=ranks, rank_in_group=rank, cpu_group=None, device_group=None)
    only = SimpleNamespace(world_size=1, rank_in_group=0, is_first_rank=True, is_last_rank=True)
    groups = {"tp_group": own, "attn_tp_group": own, "moe_tp_group": own, "pp_group": only}
    with get_parallel().override(**groups), set_default_torch_dtype(torch.bfloat16):
        model: torch.nn.Module = loader._initialize_model(config, how, loader._get_quantization_config(config, how))
        model.load_weights(loader.DefaultModelLoader(how)._get_all_weights(config, model))
    return model


def test_the_version_is_the_one_that_is_documented() -> None:
    import sglang

    assert sglang.__version__ == VERSIONS["SGLang"]


@pytest.mark.parametrize("family", ["llama", "smollm2", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_weights_of_every_family(make: Make, family: str, ranks: int, rank: int) -> None:
    folder = make(family, bits=4, group=128)
    check_weights(load(folder, ranks, rank), folder, ranks, rank)


@pytest.mark.parametrize("bits", [bits for bits in BITS if bits != 3])
@pytest.mark.parametrize("group", [32, "row"])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_weights_of_every_width(make: Make, bits: int, group: int | str, ranks: int, rank: int) -> None:
    folder = make(bits=bits, group=group)
    check_weights(load(folder, ranks, rank), folder, ranks, rank)


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_weights_of_mixed_widths(make: Make, ranks: int, rank: int) -> None:
    """Layers of 8 and of 16 bits among those of 4, and a 16-bit head."""
    folder = make(bits=4, group=64, lm_head=16, overrides=("down_proj=8",), keep=("layers.0.self_attn",))
    check_weights(load(folder, ranks, rank), folder, ranks, rank)


def test_exports_for_ranks(make: Make) -> None:
    """Groups of 256, for two ranks in 128 and for four in 64, where key heads are fewer than ranks."""
    folder = make(bits=4, group=256)
    for ranks, rank in ((2, 1), (4, 0), (4, 3)):
        out = export(folder, "sglang", folder.parent / f"sglang-{ranks}-{rank}", ranks=ranks).path
        check_weights(load(out, ranks, rank), out, ranks, rank)


def test_three_bits_are_refused(make: Make) -> None:
    with pytest.raises(ImportError, match="is not supported now"):
        load(make(bits=3, group=32))
