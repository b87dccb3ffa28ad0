"""Prompts: how fast, next to torch's BF16 products of the same shapes in the same run; and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lbq.runtime.attention import CUDA_BACKENDS, AttentionMixer
from lbq.runtime.bench.context import Bench, Model
from lbq.runtime.bench.timing import spent
from lbq.runtime.cache import KVCache, name_of
from lbq.runtime.decoder import Decoder
from lbq.runtime.kernels import prompt
from lbq.runtime.kernels.attention import Cache, Heads, Norms
from lbq.runtime.kernels.cuda import CudaLinear
from lbq.runtime.kernels.dequant import dequantize
from lbq.runtime.kernels.prompt import float16_product
from lbq.runtime.prompts import CHUNK, PromptLayers

Call = Callable[[], object]
KL_BOUND = 1e-3


def check_prompt(bench: Bench, model: Model, tokens: int = 300) -> None:
    """Logits of a short prompt against float32 on the same weights, of four layers: both ways keep all of them."""
    layers = 2 if bench.toy else 4
    tokens = 100 if bench.toy else tokens
    ids = _ids(bench, model.decoder(bench.device, layers=1), tokens)
    rows = []
    exact = model.decoder(bench.device, layers=layers, exact=True)
    expected = exact.forward(ids, exact.new_state(tokens, fixed=True), all_logits=True).double().log_softmax(1)
    del exact
    decoder = model.decoder(bench.device, layers=layers)
    for name, dtype, own in (
        ("its own layers", torch.float16, True),
        ("its own layers, int8 cache", torch.int8, True),
        ("the decoder's layers", torch.float16, False),
    ):
        state = decoder.new_state(tokens, dtype=dtype, fixed=True)
        with_ = PromptLayers(decoder) if own else None
        got = decoder.forward(ids, state, all_logits=True, layers=with_).double().log_softmax(1)
        kl = (expected.exp() * (expected - got)).sum(1)
        bad = "" if float(kl.max()) <= KL_BOUND else " **too much**"
        rows.append(f"| {name} | {float(kl.mean()):.1e} | {float(kl.max()):.1e}{bad} |")
    bench.say("| way | mean KL to float32 | largest |\n|---|---|---|\n" + "\n".join(rows))


def _ids(bench: Bench, decoder: Decoder, tokens: int) -> torch.Tensor:
    random = torch.Generator(bench.device).manual_seed(5)
    return torch.randint(0, decoder.spec.vocab_size, (tokens,), device=bench.device, generator=random)


@dataclass(frozen=True)
class Timed:
    """A whole prompt of ``tokens`` into a cache of dtype ``cache``. FLOP/s: ``rate`` of its linear layers, ``bf16`` of
    torch's BF16 products of those shapes. ``peak``: bytes beside weights and cache."""

    tokens: int
    cache: str
    seconds: float
    rate: float
    bf16: float
    peak: int


def time_prompts(bench: Bench, decoder: Decoder, lengths: Sequence[int]) -> Iterator[Timed]:
    """Prompts as an engine takes them in, launched from Python."""
    layers = PromptLayers(decoder)
    for tokens in lengths:
        ids = _ids(bench, decoder, tokens)
        bf16 = _bf16_rate(bench, decoder, min(tokens, CHUNK))
        for dtype in (torch.float16, torch.int8):
            state = decoder.new_state(tokens, dtype=dtype, fixed=True)
            held = _peak(bench, reset=True)

            def run(ids: torch.Tensor = ids, state=state) -> None:  # type: ignore[no-untyped-def]
                state.length = 0
                decoder.forward(ids, state, layers=layers)

            seconds = spent(bench.device, run, 1 if bench.toy else 5 if tokens <= 2048 else 3)
            rate = _linear_flops(decoder, tokens) / seconds
            cache = name_of(dtype)
            yield Timed(tokens, cache, seconds, rate, bf16, _peak(bench) - held)
            del state


def prefill(bench: Bench, model: Model, lengths: tuple[int, ...] = (512, 2048, 8192)) -> None:
    """Whole prompts: the share is FLOPs of linear layers ÷ time ÷ torch's BF16 rate at those shapes."""
    lengths = (100,) if bench.toy else lengths
    decoder = model.decoder(bench.device)
    bench.say("| tokens | cache | ms | tokens/s | linear TFLOP/s | torch BF16 TFLOP/s | share | peak beside weights |")
    bench.say("|---|---|---|---|---|---|---|---|")
    for one in time_prompts(bench, decoder, lengths):
        bench.say(
            f"| {one.tokens} | {one.cache} | {one.seconds * 1e3:.2f} | {one.tokens / one.seconds:.0f} "
            f"| {one.rate / 1e12:.0f} | {one.bf16 / 1e12:.0f} | {one.rate / one.bf16:.0%} | {one.peak / 1e6:.0f} MB |"
        )
    bench.say()
    for tokens in lengths[:2]:
        _parts(bench, decoder, tokens)


def _peak(bench: Bench, *, reset: bool = False) -> int:
    if bench.device.type != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def _matrices(decoder: Decoder) -> list[CudaLinear]:
    layer = decoder.layers[0]
    assert isinstance(layer.mixer, AttentionMixer)
    found = (layer.mixer.qkv, layer.mixer.out, layer.mlp.gate_up, layer.mlp.down)
    return [linear for linear in found if isinstance(linear, CudaLinear)]


def _linear_flops(decoder: Decoder, tokens: int) -> float:
    """Of the products that are done: behind the last layer's keys and values only the last token goes on."""
    sizes = [2.0 * linear.n * linear.k for linear in _matrices(decoder)]
    head = 2.0 * decoder.spec.vocab_size * decoder.spec.hidden_size
    whole = len(decoder.layers) - 1
    return tokens * (whole * sum(sizes) + sizes[0]) + sum(sizes[1:]) + head


def _bf16_rate(bench: Bench, decoder: Decoder, tokens: int) -> float:
    """FLOP/s of torch's BF16 products of one layer's four shapes, one after the other."""
    calls: list[Call] = []
    flops = 0.0
    for linear in _matrices(decoder):
        x = torch.randn(tokens, linear.k, device=bench.device).bfloat16()
        w = torch.randn(linear.n, linear.k, device=bench.device).bfloat16()
        calls.append(partial(torch.mm, x, w.t()))
        flops += 2.0 * tokens * linear.n * linear.k
    return flops / (bench.clock.seconds(calls, replays=9, least=8) * len(calls))


def _parts(bench: Bench, decoder: Decoder, tokens: int) -> None:
    """One layer's parts by themselves."""
    parts, moved = _layer_parts(decoder, tokens, bench.device)
    bench.say(f"| {tokens} tokens: part of a layer | µs | of copy bandwidth |\n|---|---|---|")
    for name, calls in parts.items():
        seconds = bench.clock.seconds(calls, replays=9, least=8) * len(calls)
        share = f"{moved[name] / seconds / bench.copy:.0%}" if name in moved else ""
        bench.say(f"| {name} | {seconds * 1e6:.0f} | {share} |")
    bench.say()


def _layer_parts(decoder: Decoder, tokens: int, device: torch.device) -> tuple[dict[str, list[Call]], dict[str, int]]:
    """What a layer does to so many tokens, by name, and the bytes that it moves where those decide."""
    layer = decoder.layers[0]
    mixer = layer.mixer
    assert isinstance(mixer, AttentionMixer)
    spec = mixer.spec
    shape = Heads(spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim, spec.rope.dims, spec.scale, spec.window)
    held = Cache(KVCache(spec.kv_heads, spec.head_dim, tokens, dtype=torch.float16, device=device, fixed=True).kv)
    norm = Norms(layer.mixer_norm.weight, layer.mixer_norm.eps)
    x = torch.randn(tokens, decoder.spec.hidden_size, device=device)
    angles = (torch.rand(tokens, spec.rope.dims // 2, device=device),) * 2
    matrices = _matrices(decoder)
    operands = [prompt.operand(torch.randn(tokens, m.k, device=device)) for m in matrices]
    results = [prompt.multiply(o, m.weight, m.norms, m.bias) for o, m in zip(operands, matrices, strict=True)]
    opened = [torch.empty(m.n, m.k, dtype=torch.float16, device=device) for m in matrices]
    pairs = list(zip(matrices, operands, opened, strict=True))
    q = prompt.heads(results[0], shape, None, None, angles, 0, held)
    parts: dict[str, list[Call]] = {
        "dequantise": [partial(dequantize, m.weight, 0, m.n, to, m.norms) for m, _, to in pairs],
        "float16 products": [partial(float16_product, o.values, to) for _, o, to in pairs],
        "attention": [partial(prompt.attend, q, shape, 0, held)],
        "(torch's attention)": [_torch_attention(q, shape, held)],
        "norms": [partial(prompt.add_norm, x, results[1], norm), partial(prompt.add_norm, x, results[3], norm)],
        "heads": [partial(prompt.heads, results[0], shape, None, None, angles, 0, held)],
        "operand": [partial(prompt.operand, q)],
        "gate": [partial(prompt.gate, results[2], layer.mlp.activation)],
    }
    moved = {
        "dequantise": sum(m.weight.nbytes + to.nbytes for m, _, to in pairs),
        "norms": 2 * x.numel() * (4 + 4 + 2 + 2),
        "heads": 2 * results[0].values.nbytes,
        "operand": 2 * q.nbytes,
        "gate": results[2].values.nbytes * 3 // 2,
    }
    return parts, moved


def _torch_attention(q: torch.Tensor, heads: Heads, held: Cache) -> Call:
    """The same by torch, from the first token on: of [1, heads, M, dim], which is what its flash attention takes."""
    m = q.shape[0]
    split = q.view(1, m, -1, heads.dim).transpose(1, 2)
    k, v = (each[:, :m].repeat_interleave(heads.group, 0).unsqueeze(0) for each in held.kv)

    def run() -> torch.Tensor:
        with sdpa_kernel(CUDA_BACKENDS):
            return scaled_dot_product_attention(split, k, v, is_causal=True, scale=heads.scale)

    return run
