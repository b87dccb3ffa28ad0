"""Which kernel, tile and path every fused unit of a model gets on a device, and why: ``--explain``, ``--kernels``.

The device need not be here: then the tiles, which are chosen for its multiprocessors, stay open. What is said is what
``binding`` and the engines choose by the same functions; nothing is chosen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lbq.formats.packing import packed_words
from lbq.formats.spec import ModelSpec
from lbq.runtime.binding import KernelUse, unit_names
from lbq.runtime.cache import name_of
from lbq.runtime.devices import LONG_CONTEXT, CpuDevice, CudaDevice, Device
from lbq.runtime.kernels.linear import Matrix

if TYPE_CHECKING:  # without Triton until a GPU's kernels are asked about
    from lbq.runtime.fused.plan import Plan, Role
    from lbq.runtime.kernels.gemv import ArrangedWeight, Tile


@dataclass(frozen=True)
class Way:
    """How a unit runs for so many ``tokens`` at a time."""

    tokens: str
    how: str
    why: str


@dataclass(frozen=True)
class Explained:
    """A unit's kernel, and its ways from one token to many."""

    use: KernelUse
    ways: tuple[Way, ...]


@dataclass(frozen=True)
class Explanation:
    """``device``: what it is for. ``step``: how a token goes through the whole model. ``attention``: likewise."""

    device: str
    step: str
    attention: str
    units: tuple[Explained, ...]


def explain(spec: ModelSpec, uses: Sequence[KernelUse], device: Device) -> Explanation:
    """Explain ``uses``, which ``device`` chose for the units of ``spec``: of a bound decoder, or of ``needs``."""
    if isinstance(device, CpuDevice):
        return _on_cpu(uses, device)
    return _OnCuda(spec, uses, device).explanation()


def _on_cpu(uses: Sequence[KernelUse], device: CpuDevice) -> Explanation:
    threads = torch.get_num_threads()
    kind = name_of(device.cache_dtype(0))
    return Explanation(
        f"CPU, {threads} threads" + (f" ({device.note})" if device.note else ""),
        "kernel by kernel from Python, activations and sums in float32; several texts one after the other",
        f"torch's batched matmul for one token, its scaled_dot_product_attention for more; keys and values in {kind}",
        tuple(Explained(use, _cpu_ways(use, exact=device.exact)) for use in uses),
    )


def _cpu_ways(use: KernelUse, *, exact: bool) -> tuple[Way, ...]:
    from lbq.runtime.kernels.cpu.bags import ROWS_BY_BAGS
    from lbq.runtime.kernels.cpu.fbgemm import missing_fbgemm

    missing = missing_fbgemm()
    if exact or missing:
        return (Way("any", use.kernel, missing or "float32 was asked for: exact, and slow"),)
    if use.matrix.bits >= 16:
        return (Way("any", use.kernel, "16 bits a weight are read as they are and widened in registers"),)
    return (
        Way(f"1 – {ROWS_BY_BAGS}", use.kernel, "a pass over the weights for each token, at memory speed"),
        Way("more", "dequantised by tiles, float32 matmul", f"from {ROWS_BY_BAGS + 1} tokens on a tile pays off"),
    )


class _OnCuda:
    def __init__(self, spec: ModelSpec, uses: Sequence[KernelUse], device: CudaDevice) -> None:
        self._spec, self._uses, self._device = spec, uses, device
        self._here = torch.cuda.is_available()
        self._sms = torch.cuda.get_device_properties(device.device).multi_processor_count if self._here else None
        self._fallback = self._why_not_fused()
        self._roles = _roles(spec)

    def explanation(self) -> Explanation:
        name = f"{torch.cuda.get_device_name()}, {self._sms} multiprocessors" if self._here else "a GPU (none is here)"
        return Explanation(
            name, self._step(), self._attention(), tuple(Explained(use, self._ways(use)) for use in self._uses)
        )

    def _plan(self) -> Plan:
        from lbq.runtime.fused.engine import default_plan
        from lbq.runtime.fused.plan import Plan

        return default_plan(self._device.device) if self._here else Plan()

    def _why_not_fused(self) -> str | None:
        """Why decoding does not run as the fused step: what ``fused.step.why_not`` will say of the bound decoder."""
        from lbq.runtime.kernels.attention import Heads, why_not

        if not self._device.fused:
            return "it was asked for without the fused step"
        for i in range(len(self._spec.layers)):
            mixer = self._spec.layer(i).mixer
            trouble = why_not(Heads.of(mixer))
            if trouble is not None:
                return f"layer {i}: {trouble}"
        head = unit_names((self._spec.head,))
        dense = [use for use in self._uses if use.matrix.bits >= 16 and use.units != head]
        if dense:
            return f"{dense[0].units} stays in 16 bits"
        return "float32 was asked for" if self._device.exact else None

    def _step(self) -> str:
        if self._fallback is not None:
            return f"one CUDA graph of the decoder's own kernels: {self._fallback}"
        pdl = ", each launch preparing while the one before it ends (PDL)" if self._plan().pdl else ""
        return f"fused: one CUDA graph of five launches a layer, tokens chosen on the GPU{pdl}; {self._several()}"

    def _several(self) -> str:
        """How it goes with several texts: what ``fused.step.why_not`` will say of them."""
        from lbq.runtime.kernels.batch import TOKENS, why_not

        for use in self._uses:
            trouble = why_not(_shape_of(use.matrix)) if use.matrix.bits < 16 else None
            if trouble is not None:
                return f"several texts by a pass each: {use.units} has {trouble}"
        return f"up to {TOKENS} texts at a time in one pass over the weights"

    def _attention(self) -> str:
        """How one token attends, and how a prompt does."""
        one = self._one_attends()
        if self._device.exact:
            return one
        trouble = self._why_no_prompt_kernel()
        if trouble is not None:
            return f"{one}; prompts by torch's scaled_dot_product_attention: {trouble}"
        return f"{one}; prompts by a causal kernel of their own, {self._prompt_tokens()} tokens a program"

    def _prompt_tokens(self) -> str:
        """Of a long prompt, "64 or 128" where layers differ in their heads."""
        from lbq.runtime.kernels.prompt import attention_tile

        tokens = {attention_tile(kind.mixer.head_dim, LONG_CONTEXT, False).tokens for kind in self._spec.layer_kinds}
        return " or ".join(map(str, sorted(tokens)))

    def _why_no_prompt_kernel(self) -> str | None:
        """What ``prompts.why_not`` will say of the bound decoder."""
        from lbq.runtime.kernels.attention import Heads
        from lbq.runtime.kernels.prompt import why_not

        if not self._device.fused:
            return "asked for without their kernel"
        for i in range(len(self._spec.layers)):
            width = max(unit[0].in_features for unit in self._spec.layer_units(i))
            trouble = why_not(Heads.of(self._spec.layer(i).mixer), width)
            if trouble is not None:
                return f"layer {i}: {trouble}"
        return None

    def _one_attends(self) -> str:
        from lbq.runtime.kernels.attention import Heads, shared_memory
        from lbq.runtime.kernels.gpu import LEAST_SHARED

        heads = [Heads.of(each.mixer) for each in self._spec.layer_kinds]
        kind, longer = (name_of(self._device.cache_dtype(n)) for n in (LONG_CONTEXT, LONG_CONTEXT + 1))
        if longer != kind and self._fallback is None:
            kind += f", in {longer} for a context of more than {LONG_CONTEXT} tokens"
        if self._fallback is not None:
            return f"torch's scaled_dot_product_attention; keys and values in {kind}"
        if self._sms is None:
            most = max(shared_memory(each, 4) for each in heads)
            four = f" (int4 takes {most >> 10} kB of shared memory a program)" if most > LEAST_SHARED else ""
            return f"split over the text, in as many parts as suit the GPU; keys and values in {kind}{four}"
        splits = dict.fromkeys(
            self._plan().splitting(each, self._sms, self._device.cache_dtype(LONG_CONTEXT)) for each in heads
        )
        how = "; ".join(f"up to {s.splits} parts a head, {s.block} tokens at a time on {s.warps} warps" for s in splits)
        shorts = [short for each in heads if (short := self._plan().shortening(each)) is not None]
        until = f"a few tokens a program up to {max(short.until for short in shorts)} tokens, then " if shorts else ""
        trouble = self._device.int4_trouble(self._spec)
        not_four = f" (not in int4: {trouble})" if trouble else ""
        return f"one launch a layer, the text {until}in {how}; keys and values in {kind}{not_four}"

    def _ways(self, use: KernelUse) -> tuple[Way, ...]:
        from lbq.runtime.kernels.batch import why_not
        from lbq.runtime.kernels.cuda import BATCH_TOKENS, GEMV_TOKENS

        if self._device.exact:
            return (Way("any", use.kernel, "float32 was asked for: exact, and slow"),)
        few, more = f"1 – {GEMV_TOKENS}", f"{GEMV_TOKENS + 1} or more"
        if use.matrix.bits >= 16:
            return (
                Way(few, "Triton BF16 GEMV, a pass a token", "16 bits a weight as they are, sums in float32"),
                Way(more, "BF16 matmul on tensor cores", "prompts are bound by arithmetic"),
            )
        one = self._alone("1", use.matrix) if self._fallback is not None else self._in_step(use)
        trouble = why_not(_shape_of(use.matrix))
        if trouble is None:
            how = f"INT{use.matrix.bits} product on int8 tensor cores, a pass for each {GEMV_TOKENS} tokens"
            between = Way(f"2 – {BATCH_TOKENS}", how, "one pass over the weights serves several tokens")
            more = f"{BATCH_TOKENS + 1} or more"
        else:
            between = self._alone(f"2 – {GEMV_TOKENS}", use.matrix)
        return (one, between, Way(more, "dequantised to float16, float16 matmul", "prompts are bound by arithmetic"))

    def _alone(self, tokens: str, matrix: Matrix) -> Way:
        """The matrix-vector kernel by itself, a pass a token."""
        from lbq.runtime.kernels.gemv import tile

        how = f"Triton INT{matrix.bits} GEMV on two int8 planes of the activations, a pass a token"
        if self._sms is None:
            return Way(tokens, how, "the tile is chosen by the GPU's multiprocessors")
        chosen = tile(matrix.n, matrix.k, matrix.bits, self._sms)
        return Way(tokens, f"{how}, {_tile(chosen)}", _reason(chosen, matrix, chosen.rows, self._sms))

    def _in_step(self, use: KernelUse) -> Way:
        """The projection as the fused step launches it."""
        role, matrix = self._roles[use.units], use.matrix
        how = f"INT{matrix.bits} product of the fused step, {_DOES[role]}"
        if self._sms is None:
            return Way("1", how, "the tile is chosen by the GPU's multiprocessors")
        plan = self._plan()
        chosen = plan.projecting(role, _shape_of(matrix), self._sms)
        extra = (", its planes by a launch of their own" if chosen.apart else "") + (
            ", weights called into L2 ahead" if plan.pdl and chosen.ahead else ""
        )
        origin = plan.origin(role, _shape_of(matrix))
        outputs = matrix.n // 2 if role == "gate_up" else matrix.n
        rows = chosen.outputs(role)
        why = _reason(chosen.tile, matrix, rows, self._sms, outputs)
        return Way("1", f"{how}, {_tile(chosen.tile)}{extra}", origin or why)


_DOES: dict[Role, str] = {
    "qkv": "q, k and v together",
    "out": "added to the residual stream",
    "gate_up": "gate and up with the activation between them",
    "down": "added to the residual stream",
    "head": "the logits",
}


def _roles(spec: ModelSpec) -> dict[str, Role]:
    found: dict[str, Role] = {unit_names((spec.head,)): "head"}
    order: tuple[Role, ...] = ("qkv", "out", "gate_up", "down")
    for i in range(len(spec.layers)):
        found |= {unit_names(unit): role for unit, role in zip(spec.layer_units(i), order, strict=True)}
    return found


def _shape_of(matrix: Matrix) -> ArrangedWeight:
    """A weight without memory."""
    from lbq.runtime.kernels.gemv import ArrangedWeight

    n, k = matrix.n, matrix.k
    shape = (n, 3, -(-k // 32)) if matrix.bits == 3 else (n, packed_words(k, matrix.bits))
    words = torch.empty(shape, dtype=torch.int32, device="meta")
    scales = torch.empty((n, k // matrix.group), dtype=torch.bfloat16, device="meta")
    return ArrangedWeight(words, scales, matrix.bits, matrix.group, k)


def _tile(tile: Tile) -> str:
    rounds = f"{tile.rounds} rounds of " if tile.rounds > 1 else ""
    return f"{rounds}tiles of {tile.rows}×{tile.columns} words on {tile.warps} warp{'s' if tile.warps > 1 else ''}"


def _reason(tile: Tile, matrix: Matrix, rows: int, sms: int, outputs: int | None = None) -> str:
    """What the rule's outcome means for this matrix on so many multiprocessors."""
    from lbq.runtime.kernels.gemv.tiles import codes_a_column

    columns, programs = -(-matrix.k // codes_a_column(matrix.bits)), -(-(outputs or matrix.n) // rows)
    load = f"{programs} programs for {sms} multiprocessors"
    if tile.rounds > 1:
        return f"{tile.owned} whole rows a program, past activations in registers: {load}"
    if tile.columns != 128 * tile.warps:
        return f"its rows are short, {columns} words: {load}"
    if tile.warps > 1:
        return f"{tile.warps} warps share a row of {columns} words: {load}"
    return f"a warp a program keeps the GPU busy: {load}"
