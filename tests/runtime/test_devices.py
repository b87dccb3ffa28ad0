"""Which device is taken and why not, how much context fits it, and how its failures are told."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from lbq.formats.errors import DeviceError, UsageError
from lbq.runtime import devices
from lbq.runtime.binding import bind
from lbq.runtime.devices import CpuDevice, CudaDevice, check_fit, device_errors, find_device, fitting_context
from lbq.runtime.kernels.gpu import Gpu, meaning

GB = 1 << 30


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU that lbq can use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "gcc" else None)
    return monkeypatch


def test_a_gpu_is_taken_where_it_can_be(gpu):
    assert find_device("auto", exact=False) == find_device("cuda", exact=False) == CudaDevice(False)
    assert find_device("cpu", exact=True) == CpuDevice(True)
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto", exact=False) == CpuDevice(False, note=None)


@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        (torch.version, "hip", "6.4", "ROCm"),
        (torch.cuda, "get_device_capability", lambda: (7, 5), "7.5"),
        (devices.shutil, "which", lambda _: None, "install gcc"),
    ],
)
def test_a_gpu_of_no_use_is_said(gpu, where, name, value, message):
    gpu.setattr(where, name, value)
    with pytest.raises(DeviceError, match=f"{message}.*--device cpu"):
        find_device("cuda", exact=False)
    found = find_device("auto", exact=False)
    assert isinstance(found, CpuDevice)
    assert message in str(found.note)
    assert find_device("cpu", exact=False).note is None


def test_a_compiler_named_by_the_environment(gpu):
    gpu.setattr(devices.shutil, "which", lambda name: name if name == "/opt/cc" else None)
    gpu.setenv("CC", "/opt/cc")
    assert find_device("cuda", exact=False) == CudaDevice(False)


def test_a_compiler_that_triton_would_not_find(gpu):
    gpu.setattr(devices.shutil, "which", lambda name: name if name in ("cc", "gcc") else None)
    gpu.setenv("CC", "ccache gcc")  # taken alone, and as one name
    assert "CC='ccache gcc' is none" in str(find_device("auto", exact=False).note)


@pytest.mark.parametrize(
    ("most", "token_bytes", "free", "context"),
    [
        (131072, 1 << 17, 80 * GB, 8192),
        (2048, 1 << 17, 80 * GB, 2048),
        (131072, 1 << 17, GB + 4096 * (1 << 17), 4096),
        (131072, 1 << 17, GB + 4096 * (1 << 17) - 1, 3840),
        (131072, 1 << 17, GB // 2, 256),
        (100, 1 << 17, 0, 100),
    ],
)
def test_the_context_that_fits(most, token_bytes, free, context):
    assert fitting_context(most, token_bytes, free) == context


def test_a_context_that_does_not_fit():
    check_fit(131072, lambda _: 1 << 16, GB + 131072 * (1 << 16), None)
    with pytest.raises(
        DeviceError, match=r"131072 tokens takes 17\.2 GB .* has 8\.0 GB left .* --context 60928, or --kv"
    ):
        check_fit(131072, lambda _: 1 << 17, 8 * 10**9 + GB // 2, "int8")
    with pytest.raises(DeviceError, match=r"0\.0 GB left beside the weights: try --device cpu$"):
        check_fit(512, lambda _: 1 << 17, 0, None)
    with pytest.raises(DeviceError, match=r"try --context 2816, or --device"):  # where it is short, a token takes more
        check_fit(20000, lambda n: 2000 if n > 8192 else 4000, 12 * 10**6 + GB // 2, None)


@pytest.mark.usefixtures("gpu")
def test_int8_keys_and_values():
    assert find_device("cuda", exact=False, kv_cache="int8") == CudaDevice(False, kv_cache="int8")
    found = find_device("cpu", exact=False, kv_cache="int8")
    assert found.cache_dtype(100) == torch.int8
    assert "opened for every token" in found.cache_fallback(None)
    assert CudaDevice(False, kv_cache="int4").cache_dtype(100) == torch.uint8
    assert CudaDevice(False).cache_dtype(8192) == torch.float16
    assert CudaDevice(False).cache_dtype(8193) == torch.int8
    assert CudaDevice(False, fused=False).cache_dtype(8193) == torch.float16
    assert CudaDevice(False, kv_cache="float").cache_dtype(100000) == torch.float16
    assert CudaDevice(True).cache_dtype(100000) == torch.float32
    assert CpuDevice(False).cache_dtype(100000) == torch.float32
    assert CpuDevice(False).cache_fallback(None) is None
    with pytest.raises(UsageError, match="do not go with float32"):
        find_device("cpu", exact=True, kv_cache="int8")
    with pytest.raises(UsageError, match="kv_cache int2: auto, float, int8 or int4"):
        find_device("cpu", exact=False, kv_cache="int2")


SMALL_GPU, LARGE_GPU = Gpu("GeForce", (8, 6), 28), Gpu("A100", (8, 0), 108, 163 << 10)
INT4 = CudaDevice(False, kv_cache="int4", device=torch.device("meta"))


@pytest.mark.parametrize(
    ("device", "head_dim", "gpu"),
    [
        (INT4, 256, LARGE_GPU),
        (INT4, 128, SMALL_GPU),
        (INT4, 288, SMALL_GPU),  # not by the fused step
        (replace(INT4, fused=False), 256, SMALL_GPU),
        (replace(INT4, kv_cache="int8"), 256, SMALL_GPU),
        (CpuDevice(False, kv_cache="int4"), 256, SMALL_GPU),
    ],
)
def test_caches_that_a_gpu_has_room_for(make_tiny, device, head_dim, gpu):
    with meaning(gpu):
        device.check_cache(make_tiny("qwen3-qk-norm", head_dim=head_dim).weights.spec)


def test_a_cache_that_a_gpu_has_no_room_for(make_tiny):
    spec = make_tiny("qwen3-qk-norm", head_dim=160).weights.spec
    said = r"^keys and values in int4: heads of 160 take 144 kB .*, of which GeForce has 99: try --kv-cache int8$"
    with meaning(SMALL_GPU), pytest.raises(DeviceError, match=said):
        INT4.check_cache(spec)


@pytest.mark.parametrize("gpu", [SMALL_GPU, LARGE_GPU])
def test_no_smaller_cache_is_advised_that_would_be_refused(make_tiny, reference_kernels, monkeypatch, gpu):
    decoder = bind(make_tiny("qwen3-qk-norm", head_dim=256).weights, reference_kernels).decoder
    monkeypatch.setattr(devices, "_free_bytes", lambda: 0)
    with meaning(gpu), pytest.raises(DeviceError, match="--device cpu") as caught:
        replace(INT4, kv_cache="int8").check_context(decoder, 100)
    assert ("--kv-cache int4" in str(caught.value)) == (gpu is LARGE_GPU)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "--context N, or --device cpu"),
        (torch.AcceleratorError("CUDA error: an illegal memory access\nwas encountered"), "access was encountered;"),
        (CompilationError(None, None, "no"), "CompilationError"),
        (OutOfResources(300000, 232448, "shared memory"), "shared memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "--device cpu"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "shorter --context"),
        (subprocess.CalledProcessError(1, "gcc"), "headers of Python"),
    ],
)
def test_failures_of_a_device(error, message):
    with pytest.raises(DeviceError, match=message) as caught, device_errors():
        raise error
    assert "\n" not in str(caught.value)


def test_what_to_do_where_memory_runs_out():
    with pytest.raises(DeviceError, match=r"^the GPU is out of memory: buy some$"), device_errors("buy some"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("x"), UsageError("no"), KeyboardInterrupt()])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, device_errors():
        raise error
    assert caught.value is error
