"""One block, tuned by auto-round, and its weights in lbq's form: the same numbers, code for code."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lbq.formats.errors import DataError
from lbq.formats.packing import SCALE_DTYPE, PackedWeight, pack
from lbq.formats.safetensors_file import Checkpoint
from lbq.quantizer import tensors
from lbq.quantizer.autoround.blocks import Block
from lbq.quantizer.autoround.settings import Tuning
from lbq.quantizer.plan import Quantize
from lbq.quantizer.quiet import quiet

CLAMP = torch.tensor(1e-5, dtype=SCALE_DTYPE)  # auto-round lifts smaller scales to this, and so zeroes small groups


class Samples(list[torch.Tensor]):
    """Hidden states as auto-round takes them, a list with a tensor [1, tokens, hidden] for each sample: float32, and
    made from the BF16 ``source`` when they are asked for, so that they need no memory."""

    def __init__(self, source: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: Any) -> Any:
        return self._source[int(number)].float()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[number] for number in range(len(self)))


def products_dtype(device: torch.device) -> torch.dtype:
    """In which dtype matrices are multiplied while a block is tuned: BF16 where the hardware does, which is faster.
    Weights, codes and scales are float32 and exact either way."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def rounded(checkpoint: Checkpoint, steps: Sequence[Quantize], device: torch.device) -> dict[str, PackedWeight]:
    """The layers by lbq's own round to nearest; no pages of the source stay in memory. Raises DataError for a weight
    that has no code."""
    made = {}
    for step in steps:
        made[step.module] = tensors.quantized(checkpoint, step, device)
        checkpoint.release(step.source)
    return made


def put(block: Block, packed: Mapping[str, PackedWeight]) -> None:
    """Give the block's linear layers the weights that the codes stand for."""
    for module, weight in packed.items():
        linear = block.linear(module)
        linear.weight.data.copy_(weight.dequantize())


def tune(
    block: Block,
    config: Any,
    steps: Sequence[Quantize],
    fallback: Mapping[str, PackedWeight],
    tuning: Tuning,
    seed: int,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
) -> dict[str, PackedWeight]:
    """Find codes with which ``block`` gives ``outputs`` from ``inputs``: BF16 [1, tokens, hidden], one a sample.

    ``fallback`` has every layer by round to nearest, from which layers are taken that auto-round leaves alone and
    groups that it would zero. ``config`` is transformers' of the model. The block's weights are spoilt.

    Raises DataError where auto-round leaves numbers that are not codes times scales.
    """
    tuned = [step for step in steps if step.tunable]
    if not tuned:
        return dict(fallback)
    put(block, {step.module: fallback[step.module] for step in steps if not step.tunable})
    device = next(block.parameters()).device
    products = torch.autocast(device.type, torch.bfloat16, enabled=products_dtype(device) == torch.bfloat16)
    with quiet(), _seeded(seed), products:
        _quantize_block(block, config, tuned, tuning, seed, inputs, outputs)
    block.to(device)  # auto-round leaves it on the CPU
    packed = {step.module: _packed(block.linear(step.module), step, fallback[step.module]) for step in tuned}
    return {module: packed.get(module, weight) for module, weight in fallback.items()}


class _Layers(torch.nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([block])


class _Model(torch.nn.Module):
    """A model of one block, which is all that auto-round has to know of one."""

    def __init__(self, block: Block, config: Any) -> None:
        super().__init__()
        self.model = _Layers(block)
        self.config = config
        self.dtype = torch.float32


def _quantize_block(
    block: Block,
    config: Any,
    steps: Sequence[Quantize],
    tuning: Tuning,
    seed: int,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
) -> None:
    """Run auto-round on the block, which then holds the dequantised weights and, in each linear layer, ``scale``."""
    from auto_round import AutoRound, RTNConfig, SignRoundConfig  # slow to import

    chosen = {step.module: _scheme(step) for step in steps}
    names = {id(block.linear(module)): scheme for module, scheme in chosen.items()}
    model = _Model(block, config)
    layers = {
        name: names.get(id(layer), {"bits": 16, "act_bits": 16})
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    device = next(block.parameters()).device
    algorithm: Any = RTNConfig(disable_opt_rtn=True)  # searched scales would be float32: not lbq's format
    if tuning.calibrated:
        algorithm = SignRoundConfig(iters=tuning.iterations, enable_quanted_input=False)
    rounder = AutoRound(
        model,
        tokenizer="",
        scheme=next(iter(chosen.values())),
        layer_config=layers,
        alg_configs=algorithm,
        nsamples=max(1, len(inputs)),
        batch_size=max(1, min(tuning.batch, len(inputs))),
        scale_dtype=SCALE_DTYPE,
        amp=False,  # float32: the dequantised weight is the product of code and scale, exactly
        device_map=str(device),
        enable_torch_compile=False,
        seed=seed,
        trust_remote_code=False,
    )
    if not tuning.calibrated:
        rounder.quantize_block(block, None, device=str(device), auto_offload=False)
        return
    first = Samples(inputs)[0]  # inputs as if captured; the samples themselves are q_input
    rounder.quantize_block(
        block,
        [(((first,), {}),)],
        q_input=Samples(inputs),
        device=str(device),
        auto_offload=False,
        reference_output=Samples(outputs),
    )


def _scheme(step: Quantize) -> dict[str, object]:
    """auto-round's words for a layer's bits and group: signed, symmetric, the full range of codes, weights only."""
    group = -1 if step.group == step.entry.k else step.group
    return {"bits": step.entry.bits, "group_size": group, "sym": True, "data_type": "int", "act_bits": 16}


def _packed(linear: torch.nn.Linear, step: Quantize, fallback: PackedWeight) -> PackedWeight:
    """Codes and scales of a layer that auto-round has done; groups with clamped scales from ``fallback``.

    Raises DataError where the layer's weights, NaN for instance, are not what codes and scales stand for.
    """
    entry = step.entry
    weight = linear.weight.data.cpu().view(entry.n, -1, step.group)
    found: Any = linear.scale
    assert found.dtype == SCALE_DTYPE
    scales = found.cpu().reshape(entry.n, -1)
    factors = scales.float().unsqueeze(2)
    signed = (weight / factors).round_()
    half = 1 << (entry.bits - 1)
    if not torch.equal(signed * factors, weight) or not -half <= int(signed.min()) <= int(signed.max()) < half:
        raise DataError(
            f"{step.module}: what AutoRound made of it is not codes times scales; leave the layer out with "
            f"--keep {step.module}, or convert with --method rtn"
        )
    clamped = scales.abs() <= CLAMP
    repeat = step.group // entry.group
    own_scales = fallback.scales.cpu()[:, ::repeat]
    own_codes = fallback.signed_codes().cpu().view(entry.n, -1, step.group)
    scales = torch.where(clamped, own_scales, scales)
    codes = torch.where(clamped.unsqueeze(2), own_codes, signed.to(torch.int8)).to(torch.int16).add_(half)
    words = pack(codes.to(torch.uint8).view(entry.n, entry.k), entry.bits)
    return PackedWeight(words, scales.repeat_interleave(repeat, dim=1), entry.bits, entry.group, entry.k)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Every generator that auto-round draws from begins at ``seed``, and afterwards goes on as if nothing had been."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
