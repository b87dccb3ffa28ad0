"""vLLM's own code on artifacts: how it reads the config, which kernel it takes, and what its loader makes of the
weights, whole and split between ranks.

Skipped where vLLM is not installed: docs/interop.md says how to have it here without a GPU. Its kernels for NVIDIA are
chosen by its own code, which is told that there is such a GPU, and do not run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from server_weights import WIDTHS, check_weights

from lbq import load as load_lbq
from lbq.conversion import convert
from lbq.formats.packing import BITS, GROUPS
from lbq.formats.readers import VERSIONS, vllm_fit, vllm_kernel
from lbq.formats.scheme import Scheme
from lbq.quantizer.export import export

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")  # read when it is imported
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

Make = Callable[..., Path]


@contextmanager
def nvidia(capability: int) -> Iterator[None]:
    """vLLM's code takes this machine for one with a GPU of a capability, such as 90."""
    from vllm.model_executor.kernels.linear.mixed_precision import humming
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability, PlatformEnum

    fake = {
        "_enum": PlatformEnum.CUDA,
        "is_cuda": lambda: True,
        "is_cuda_alike": lambda: True,
        "is_cpu": lambda: False,
        "get_device_capability": lambda *_: DeviceCapability(*divmod(capability, 10)),
        "is_device_capability": lambda wanted, *_: wanted == capability,
        "has_device_capability": lambda wanted, *_: wanted <= capability,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fake.items():
            patch.setattr(current_platform, name, value, raising=False)
        patch.setattr(humming, "has_humming", lambda: True)  # vLLM asks for it; it is not imported without a GPU
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process, of which vLLM believes that it is all there is."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        store = tmp_path_factory.mktemp("store") / "file"
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def load(folder: Path, ranks: int = 1, rank: int = 0, capability: int = 80) -> tuple[torch.nn.Module, dict[str, str]]:
    """The model of a rank after vLLM's loader, before its kernels repack; and by layer the kernel that it chose."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16 as Scheme
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    kernels: dict[str, str] = {}
    create = Scheme.create_weights

    def chosen(self: Any, *args: Any, **kwargs: Any) -> None:
        with nvidia(capability):
            create(self, *args, **kwargs)
        kernels[self.layer_name] = type(self.kernel).__name__

    config = EngineArgs(
        model=str(folder), max_model_len=64, dtype="bfloat16", enforce_eager=True
    ).create_engine_config()
    group = parallel_state.get_tp_group()
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(config):
        patch.setattr(Scheme, "create_weights", chosen)
        patch.setattr(group, "world_size", ranks)
        patch.setattr(group, "rank_in_group", rank)
        with set_default_torch_dtype(torch.bfloat16):
            model = initialize_model(config)
        loader = DefaultModelLoader(config.load_config)
        model.load_weights(loader.get_all_weights(config.model_config, model))
    return model, kernels


def check(folder: Path, ranks: int, rank: int) -> None:
    """Every layer has its scheme, its weights, and a kernel."""
    model, kernels = load(folder, ranks, rank)
    check_weights(model, folder, ranks, rank)
    assert len(kernels) == sum(hasattr(layer, "weight_packed") for layer in model.modules())


def test_the_version_is_the_one_that_is_documented() -> None:
    if find_spec("vllm._C"):
        pytest.skip("builds for a CPU may be older")
    assert vllm.__version__ == VERSIONS["vLLM"]


SHAPES = [(1152, 896), (4096, 4096), (960, 576), (1151, 1024), (64, 1024), (288, 512), (128, 96), (512, 4304)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [None, *GROUPS])
def test_kernels_are_those_of_the_matrix(bits: int, group: int | None) -> None:
    """By vLLM's own choice, on GPUs from Ampere to Blackwell."""
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
    from vllm.scalar_type import scalar_types

    kind = {3: scalar_types.uint3b4, 4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[bits]
    for n, k in SHAPES:
        scheme = Scheme(bits, group)
        if k == group or k % (group or k) or not vllm_fit(n, k, scheme).runs:
            continue
        config = MPLinearLayerConfig((k, n), (k, n), kind, torch.bfloat16, group or -1, False)
        for capability in (80, 89, 90, 100, 120):
            with nvidia(capability):
                found = choose_mp_linear_kernel(config)
            wanted = {"Triton": "TritonW4A16"}.get(name := vllm_kernel(n, k, scheme, hopper=capability == 90), name)
            assert found.__name__ == f"{wanted}LinearKernel", (n, k, capability)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("family", ["llama", "smollm2", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_weights_of_every_family(make: Make, family: str, ranks: int, rank: int) -> None:
    check(make(family, bits=4, group=128), ranks, rank)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, "row"])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_weights_of_every_width(make: Make, bits: int, group: int | str, ranks: int, rank: int) -> None:
    check(make(bits=bits, group=group), ranks, rank)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_weights_of_mixed_widths(make: Make, ranks: int, rank: int) -> None:
    """Layers of 8 and of 16 bits among those of 4, and a 16-bit head."""
    check(make(bits=4, group=64, lm_head=16, overrides=("down_proj=8",), keep=("layers.0.self_attn",)), ranks, rank)


@pytest.mark.usefixtures("world")
def test_exports_for_ranks(make: Make) -> None:
    """Groups of 256, for two ranks in 128 and for four in 64, where key heads are fewer than ranks."""
    folder = make(bits=4, group=256)
    for ranks, rank in ((2, 1), (4, 0), (4, 3)):
        out = export(folder, "vllm", folder.parent / f"vllm-{ranks}-{rank}", ranks=ranks).path
        check(out, ranks, rank)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(("bits", "k"), [(8, 100), (4, 104), (4, 100), (3, 96), (3, 104)])
def test_odd_numbers_of_inputs(write_checkpoint: Callable[..., Path], tmp_path: Path, bits: int, k: int) -> None:
    source = write_checkpoint(tmp_path / "source", "qwen3", **{**WIDTHS, "intermediate_size": k})
    check(convert(source, tmp_path / "out", bits=bits, group="row", device="cpu").path, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "ranks"), [(None, 1), (None, 2), ("vllm", 1), ("gptq", 1), ("awq", 1), ("auto-round", 1)]
)
def test_products_on_a_cpu(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str | None, ranks: int
) -> None:
    """vLLM runs artifacts and their exports, by its CPU kernels (INT4): log-probabilities as lbq's, in BF16."""
    pytest.importorskip("vllm._C", reason="this vLLM has no kernels for a CPU")
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    folder = make(bits=4, group=64, lm_head=16)
    out = folder if to is None else export(folder, to, tmp_path / "out").path
    ids = [i * 7 % 250 for i in range(3, 40)]
    with load_lbq(folder, device="cpu") as model:
        logs = model.logits(ids).double().log_softmax(-1)
    limits = {"max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 64}
    engine = vllm.LLM(str(out), tensor_parallel_size=ranks, enforce_eager=True, dtype="bfloat16", **limits)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = engine.generate([{"prompt_token_ids": ids}], sampling)[0].prompt_logprobs[1:]
    theirs = torch.tensor([entry[token].logprob for entry, token in zip(found, ids[1:], strict=True)])
    ours = logs[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    assert ours.std() > 2
    assert (theirs - ours).abs().max() < 0.15  # of bfloat16
