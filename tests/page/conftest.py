"""Made-up artifacts of any depth with every level of report, and a browser to look at their pages."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator
from typing import Literal

import headless_browser
import msgspec
import pytest
from headless_browser import Browser

from lbq.formats.disk import FileEntry
from lbq.formats.manifest import Manifest, Method, QuantizedModule, Source, Summary
from lbq.formats.quality import (
    Divergence,
    Estimate,
    FrontierPoint,
    LogitCosine,
    Perplexity,
    Quality,
    Scores,
    Sensitivity,
    Text,
)
from lbq.formats.report import ModuleReport, Report
from lbq.formats.spec import Attention, GatedMlp, Layer, ModelSpec, Norm, Projection, Rope

Made = tuple[Manifest, Report]
Level = Literal["weights", "scores", "full"]
HIDDEN, MLP, VOCAB = 64, 128, 256
ERRORS = {8: 0.006, 4: 0.09, 3: 0.2}


def spec(layers: int) -> ModelSpec:
    prefix = "model.layers.{i}."
    qkv = tuple(Projection(f"{prefix}self_attn.{name}_proj", HIDDEN, HIDDEN) for name in "qkv")
    gate_up = tuple(Projection(f"{prefix}mlp.{name}_proj", MLP, HIDDEN) for name in ("gate", "up"))
    layer = Layer(
        mixer_norm=Norm(f"{prefix}input_layernorm", 1e-5),
        mixer=Attention(
            qkv,
            Projection(f"{prefix}self_attn.o_proj", HIDDEN, HIDDEN),
            4,
            4,
            HIDDEN // 4,
            0.25,
            Rope(1e4, HIDDEN // 4),
        ),
        mlp_norm=Norm(f"{prefix}post_attention_layernorm", 1e-5),
        mlp=GatedMlp(gate_up, Projection(f"{prefix}mlp.down_proj", HIDDEN, MLP), "silu"),
    )
    head = Projection("lm_head", VOCAB, HIDDEN)
    norm = Norm("model.norm", 1e-5)
    return ModelSpec(VOCAB, HIDDEN, 128, "model.embed_tokens", (layer,), (0,) * layers, norm, head, tied=False)


def text(path: str, windows: int = 8) -> Text:
    return Text(path, "ab" * 32, windows * 512, 512, windows, windows * 256)


def quality(made: ModelSpec, level: Level) -> Quality | None:
    if level == "weights":
        return None
    scores = Scores(
        kl=Divergence(0.38287, 0.0186, 0.28664, 0.69012, 2.25791, 8.20127),
        same_top1=Estimate(0.67871, 0.00715),
        logit_cosine=LogitCosine(0.87927, -0.58315),
        perplexity=Perplexity(29.5421, 23.027, Estimate(0.24915, 0.02452)),
    )
    if level == "scores":
        return Quality(text("heldout.txt"), scores, "cpu")
    draw = random.Random(1)
    alone = []
    for unit in made.units():
        names, weights = tuple(p.name for p in unit), sum(p.in_features * p.out_features for p in unit)
        base = 0.01 * math.exp(draw.gauss(0, 0.7))
        for bits, factor in ((8, 0.004), (4, 1), (3, 6)):
            kl = Estimate(base * factor, base * factor / 10)
            alone.append(Sensitivity(names, bits, 32, weights * bits // 8, kl))
    units = len(alone) // 3
    points = tuple(
        FrontierPoint(
            bits_per_weight=3.3 + 0.25 * i,
            nbytes=1000 * i,
            bits=(4,) * units,
            predicted_kl=3 * 0.7**i,
            measured_kl=Estimate(3.3 * 0.7**i, 0.1 * 0.7**i) if i % 5 == 0 else None,
        )
        for i in range(20)
    )
    return Quality(text("heldout.txt"), scores, "cpu", text("train.txt", 4), tuple(alone), points)


@pytest.fixture
def make() -> Callable[..., Made]:
    """``make(layers=30, level="full", bits=lambda unit_number: 4)``: a manifest and the report of its layers."""

    def made(layers: int = 30, level: Level = "full", bits: Callable[[int], int] = lambda _: 4) -> Made:
        draw, model = random.Random(2), spec(layers)
        quantized, modules = {}, []
        for number, unit in enumerate(model.units()):
            for p in unit:
                entry = QuantizedModule(p.out_features, p.in_features, bits(number), 32)
                error = ERRORS[entry.bits] * math.exp(draw.gauss(0, 0.08))
                quantized[p.name] = entry
                modules.append(
                    ModuleReport(
                        p.name,
                        entry.n,
                        entry.k,
                        entry.bits,
                        32,
                        1 - error**2 / 2,
                        error,
                        1.7 * error,
                        draw.randrange(64),
                    )
                )
        notes = ("config.json: unknown keys are ignored: use_magic",)
        manifest = Manifest(
            lbq_format=1,
            spec=model,
            quantized=quantized,
            dense={},
            method=Method({"4": "signed"}, 4, 32, 8, keep=("layers.7",)),
            source=Source("example/Aurora-1B", "c0ffee" * 6, {"model.safetensors": FileEntry(2_000_000, "01" * 32)}),
            tools={"lbq": "0.1.0", "torch": "2.13.0"},
            summary=Summary(10**6, 4.5, 0.99572, 0.99, 0.0926),
            notes=notes,
            files={"model.safetensors": FileEntry(600_000, "cd" * 32), "report.json": FileEntry(5000, "ef" * 32)},
        )
        return manifest, Report(1, tuple(modules), notes, quality(model, level))

    return made


@pytest.fixture
def edit() -> Callable[..., Made]:
    """``edit((manifest, report), lambda manifest, report: …)`` changes both as the JSON they are stored as."""

    def changed(made: Made, change: Callable[..., object]) -> Made:
        manifest, report = (msgspec.json.decode(msgspec.json.encode(part)) for part in made)
        change(manifest, report)
        return (
            msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest),
            msgspec.json.decode(msgspec.json.encode(report), type=Report),
        )

    return changed


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium. Without one the tests are skipped; not so in continuous integration."""
    program = headless_browser.find()
    if program is None:
        why = f"no Chromium here (looked for {', '.join(headless_browser.NAMES)})"
        if os.environ.get("CI"):
            pytest.fail(f"{why}; scripts/install_browser says why there is none")
        pytest.skip(f"{why}: scripts/install_browser")
    with Browser(program, tmp_path_factory.mktemp("profile")) as started:
        yield started
