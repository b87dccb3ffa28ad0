"""A checkpoint through convert and load: logits against transformers, text, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_steps import divergence
from transformers import AutoModelForCausalLM

from lbq.conversion import convert
from lbq.formats.artifact import open_artifact
from lbq.formats.errors import DataError, DeviceError, StorageError, UsageError
from lbq.runtime import load
from lbq.runtime.binding import Bound, KernelUse
from lbq.runtime.devices import CpuDevice, CudaDevice
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.kernels.linear import Matrix
from lbq.runtime.loading import open_model

CPU = {"device": "cpu"}
PROMPT = [int(i) for i in torch.randint(0, 264, (40,), generator=torch.Generator().manual_seed(5))]


def reference_of(checkpoint, artifact_path):
    """transformers in float32 with the artifact's weights, dequantised to float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    artifact = open_artifact(artifact_path)
    with torch.no_grad():
        if artifact.spec.tied is False:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # the source may be tied
        for name, parameter in model.named_parameters():
            module = name.removesuffix(".weight")
            stored = artifact.packed(module).dequantize() if artifact.is_quantized(module) else artifact.dense(name)
            parameter.copy_(stored)
    artifact.close()
    return model


@pytest.fixture(scope="module", params=[(8, "row"), (4, 32), (3, 32)], ids=["int8", "int4", "int3"])
def widths(request):
    return request.param


@pytest.fixture
def converted(checkpoints, family, widths, tmp_path):
    bits, group = widths
    path = convert(checkpoints[family], tmp_path / "out", bits=bits, group=group, device="cpu").path
    return path, reference_of(checkpoints[family], path)


def test_logits_and_greedy_tokens_match_transformers(converted):
    path, reference = converted
    exact, default = load(path, dtype="float32", **CPU), load(path, **CPU)
    tokens = list(PROMPT)
    engine = default.new_engine()
    logits, decoded = engine.prefill(PROMPT), []
    for _ in range(30):
        decoded.append(logits.clone())
        tokens.append(int(logits.argmax()))
        logits = engine.decode(tokens[-1])
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0]
    got = exact.logits(tokens)
    assert torch.cosine_similarity(got.double(), expected.double(), dim=1).min() >= 0.9999999
    assert divergence(expected, default.logits(tokens)).max() <= 1e-4
    answers = expected[len(PROMPT) - 1 : -1]
    assert divergence(answers, torch.stack(decoded)).max() <= 1e-5
    best = answers.topk(2).values
    clear = best[:, 0] - best[:, 1] > 1e-3
    assert torch.equal(answers.argmax(1)[clear], torch.tensor(tokens[len(PROMPT) :])[clear])
    exact.close()
    default.close()


@pytest.fixture(scope="module")
def model(kept_artifact):
    model = load(kept_artifact, **CPU)
    yield model
    model.close()


def test_stream_is_generate(model):
    stream = model.stream("hello", max_tokens=20, temperature=0.8, seed=3)
    pieces = list(stream)
    result = model.generate("hello", max_tokens=20, temperature=0.8, seed=3)
    assert result.text == "".join(pieces)
    assert result.finish.tokens == stream.finish.tokens
    assert len(result.finish.tokens) == 20 or result.finish.reason == "eos"


def test_streams_may_be_read_in_turn(model):
    def whole(text):
        return list(model.stream(text, max_tokens=12, chat=False))

    alone = whole("one"), whole("two")
    a, b = (model.stream(text, max_tokens=12, chat=False) for text in ("one", "two"))
    together = [], []
    for _ in range(12):
        for pieces, stream in zip(together, (a, b), strict=True):
            pieces.extend(piece for piece in [next(stream, None)] if piece is not None)
    assert together == alone


def test_engines_are_used_again_and_know_what_they_hold(model):
    first = model.generate("the same beginning, one end", max_tokens=3, chat=False)
    again = model.generate("the same beginning, other end", max_tokens=3, chat=False)
    assert again.finish.reused_tokens >= len("the same beginning, o") - 1
    assert model.generate("the same beginning, one end", max_tokens=3, chat=False).text == first.text
    with pytest.raises(UsageError, match="the prompt has"):
        model.stream("x" * 500, chat=False)


@pytest.fixture
def engines_made(monkeypatch):
    made = []
    real = CpuDevice.engine

    def engine(self, decoder, context):
        made.append(real(self, decoder, context))
        return made[-1]

    monkeypatch.setattr(CpuDevice, "engine", engine)
    return made


def test_one_engine_serves_one_thing_after_another(kept_artifact, engines_made):
    with load(kept_artifact, **CPU) as model:
        model.generate("hello", max_tokens=3)
        for read in (0, 1):
            stream = model.stream("hello", max_tokens=20, chat=False)
            for _ in range(read):
                next(stream)
            stream.close()
        list(model.chat(max_tokens=3).reply("hello"))
        model.logits(PROMPT)
        assert model.generate("hello", max_tokens=3).finish.reused_tokens == 0
        assert len(engines_made) == 1


def test_a_text_that_fails_costs_its_engine(kept_artifact, engines_made):
    """Keys beyond float16 leave infinities in the cache, and a masked infinity is not nothing."""
    with load(kept_artifact, **CPU) as model:
        expected = model.generate("hello", max_tokens=3).finish.tokens
        cache = engines_made[0]._state.layers[0].kv
        stream = model.stream("hello there", max_tokens=30, chat=False)
        next(stream)
        cache[:, :, : len(PROMPT)] = float("inf")
        with pytest.raises(DataError, match="--dtype float32"):
            list(stream)
        assert model.generate("hello", max_tokens=3).finish.tokens == expected
        assert len(engines_made) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("illegal")])
@pytest.mark.parametrize("method", ["prefill", "decode"])
def test_a_device_that_fails_in_a_text(kept_artifact, monkeypatch, error, method):
    def fail(*_):
        raise error

    with load(kept_artifact, **CPU) as model:
        monkeypatch.setattr(DecoderEngine, method, fail)
        with pytest.raises(DeviceError, match="--device cpu"):
            model.generate("hello", max_tokens=3)
        monkeypatch.undo()
        model.generate("hello", max_tokens=3)


def test_memory_that_runs_out_in_load_or_at_a_new_engine(kept_artifact, monkeypatch):
    def fail(*_):
        return torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(CpuDevice, "engine", fail)
    with load(kept_artifact, **CPU) as model:
        for use in (lambda: model.generate("hello"), lambda: model.logits(PROMPT), model.new_engine):
            with pytest.raises(DeviceError, match="out of memory: try a shorter --context"):
                use()
    monkeypatch.setattr(CpuDevice, "packed", fail)
    with pytest.raises(DeviceError, match="out of memory"):
        load(kept_artifact, **CPU)


def test_a_seed_gives_the_same_text_whatever_came_before(model):
    prompt = "a prompt that is longer than sixteen tokens of this tokenizer, and shared"
    settings = {"temperature": 1.0, "max_tokens": 30, "chat": False, "seed": 1}
    model.generate(prompt + " in part", max_tokens=1, chat=False)
    first, second = (model.generate(prompt, **settings).finish for _ in range(2))
    assert (first.prompt_tokens > 16, first.reused_tokens, second.reused_tokens) == (True, 0, 0)
    assert first.tokens == second.tokens


def test_logits_are_a_normal_tensor(model):
    logits = model.logits(PROMPT)
    assert not logits.is_inference()
    logits.add_(1)


def test_a_closed_model(kept_artifact):
    with load(kept_artifact, **CPU) as model:
        model.generate("hello", max_tokens=1)
    assert model._ready is None
    with pytest.raises(UsageError, match="closed"):
        model.generate("hello")


def test_what_a_request_lacks_is_said_before_weights_are_bound(kept_artifact, monkeypatch):
    monkeypatch.setattr("lbq.runtime.ready.bind", lambda *_: pytest.fail("bound"))
    with open_model(kept_artifact, **CPU) as model:
        for use in (model.stream, lambda _, **options: model.chat(**options)):
            for options in ({"temperature": -1}, {"think": True}):
                with pytest.raises(UsageError):
                    use("hello", **options)
        model.template = None
        with pytest.raises(UsageError, match="no chat template"):
            model.chat()
        with pytest.raises(UsageError, match="no chat template"):
            model.stream("hello", chat=True)


def test_prompts(model):
    plain = model.prompt_ids("hi", chat=False)
    chat = model.prompt_ids("hi")
    assert len(plain) == 2
    assert model.prompt_ids([{"role": "user", "content": "hi"}]) == chat
    assert chat[0] == model.tokenizer.token_id("<|im_start|>")
    with pytest.raises(UsageError, match="continued"):
        model.prompt_ids([{"role": "user", "content": "hi"}], chat=False)
    for chat_or_not in (True, False):
        with pytest.raises(UsageError, match=r"think|switch"):
            model.prompt_ids("hi", chat=chat_or_not, think=True)


def test_options_are_the_models_unless_said(model):
    assert model.options().sampling == model.defaults.sampling
    changed = model.options(temperature=0.5, max_tokens=3, stop=["x"])
    assert (changed.sampling.temperature, changed.max_tokens, changed.stop) == (0.5, 3, ("x",))
    assert model.options(stop=None, temperature=None, max_tokens=None, seed=None) == model.options()
    assert model.options(stop="Paris").stop == ("Paris",)
    for odd in ({"stop": 5}, {"stop": [5]}, {"temperature": "1"}, {"max_tokens": 2.5}, {"seed": 1.5}):
        with pytest.raises(UsageError, match=f"{next(iter(odd))}"):
            model.options(**odd)
    with pytest.raises(UsageError, match="unknown settings: heat"):
        model.options(heat=1)


def test_chat_goes_on(model):
    session = model.chat(system="be brief", max_tokens=4)
    for word in ("one", "two"):
        list(session.reply(word))
    assert [turn.role for turn in session.history] == ["system", "user", "assistant", "user", "assistant"]


def test_weights_held(model, kept_artifact):
    with open_artifact(kept_artifact) as artifact:
        assert 0 < model.resident_bytes < 2 * artifact.weight_bytes


def test_strict_refuses_a_gpu_that_is_not_used(kept_artifact, monkeypatch):
    found = CpuDevice(exact=False, note="the GPU is not used")
    monkeypatch.setattr("lbq.runtime.loading.find_device", lambda *_, **__: found)
    assert load(kept_artifact).note == "the GPU is not used"
    with pytest.raises(DeviceError, match="the GPU is not used; refused under --strict"):
        load(kept_artifact, strict=True)


def test_a_cache_that_a_gpu_has_no_room_for_is_refused_before_weights_are_bound(kept_artifact, monkeypatch):
    found = CudaDevice(exact=False, kv_cache="int4", device=torch.device("meta"))
    monkeypatch.setattr("lbq.runtime.loading.find_device", lambda *_, **__: found)
    monkeypatch.setattr("lbq.runtime.ready.bind", lambda *_: pytest.fail("weights were bound"))
    monkeypatch.setattr(CudaDevice, "int4_trouble", lambda *_: "heads of 256")
    with pytest.raises(DeviceError, match="in int4: heads of 256: try --kv-cache int8"):
        open_model(kept_artifact, kv_cache="int4")


def test_strict_refuses_slower_ways_of_prompts_and_of_several_texts(kept_artifact, monkeypatch):
    model = load(kept_artifact, strict=True, **CPU)
    model.bind()
    monkeypatch.setattr(CudaDevice, "batch_fallback", lambda *_: "weights are of 3 bits")
    monkeypatch.setattr(model, "_on", CudaDevice(exact=False))
    with pytest.raises(DeviceError, match="one after the other, because weights are of 3 bits; refused under --strict"):
        model.generate_batch(["a", "b"], chat=False, max_tokens=1)
    monkeypatch.undo()
    assert len(model.generate_batch(["a", "b"], chat=False, max_tokens=1)) == 2  # a CPU has no other way
    model.close()
    monkeypatch.setattr(CpuDevice, "prompt_fallback", lambda *_: "layer 0: heads of 288")
    with load(kept_artifact, **CPU) as lax:
        lax.bind()
        assert lax.prompt_fallback == "layer 0: heads of 288"
    with pytest.raises(DeviceError, match="prompts go by torch's attention, because layer 0: heads of 288"):
        load(kept_artifact, strict=True, **CPU).bind()


def test_strict_names_the_first_fallback(kept_artifact, monkeypatch):
    load(kept_artifact, strict=True, **CPU).close()
    slow = (KernelUse("lm_head", Matrix(5, 32, 4, 32), "a slow kernel", "it is Monday", 1),)
    monkeypatch.setattr("lbq.runtime.ready.bind", lambda *_: Bound(None, slow, 0))
    with pytest.raises(DeviceError, match="lm_head: a slow kernel, because it is Monday"):
        load(kept_artifact, strict=True, **CPU)


@pytest.mark.parametrize(
    "arguments",
    [
        {"context": 0},
        {"context": 129},
        {"context": 2.5},
        {"threads": 0},
        {"threads": 10**9},
        {"dtype": "float16"},
        {"device": "tpu"},
    ],
)
def test_arguments_that_make_no_sense(kept_artifact, arguments):
    with pytest.raises(UsageError, match=str(next(iter(arguments.values())))):
        load(kept_artifact, **{**CPU, **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(kept_artifact):
    with pytest.raises(DeviceError, match="no CUDA device"):
        load(kept_artifact, device="cuda")
    assert load(kept_artifact, device="auto").device.type == "cpu"


def test_folders_that_are_no_artifact(tmp_path):
    with pytest.raises(StorageError):
        load(tmp_path / "nothing")
    with pytest.raises(DataError):
        load(tmp_path)


def test_tokenizer_of_another_model(artifact, reseal):
    path = artifact / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["far away"] = 264
    path.write_text(json.dumps(content))
    reseal(artifact)
    with pytest.raises(DataError, match="264 embedding rows"):
        load(artifact, **CPU)


def test_runtime_needs_neither_quantizer_nor_transformers(kept_artifact):
    code = f"""
import sys
import lbq.runtime
assert "torch" not in sys.modules, "importing the package loads torch"
model = lbq.runtime.load({str(kept_artifact)!r}, device="cpu")
model.generate("hi", max_tokens=2)
absent = ("transformers", "auto_round", "compressed_tensors", "huggingface_hub", "lbq.quantizer")
print([name for name in absent if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_several_prompts(model):
    """Each as it is by itself; with a seed of its own."""
    prompts = ["Once upon", "There was a very long", "x"]
    alone = [model.generate(prompt, max_tokens=9) for prompt in prompts]
    together = model.generate_batch(iter(prompts), max_tokens=9)
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.finish.tokens for one in together] == [one.finish.tokens for one in alone]
    drawn = {"temperature": 1.0, "max_tokens": 9}
    together = dict(model.stream_batch(prompts, seed=5, **drawn))
    assert [together[i].text for i in range(3)] == [
        model.generate(prompt, seed=5 + i, **drawn).text for i, prompt in enumerate(prompts)
    ]
    assert model.generate_batch([]) == []


class _Counting:
    """A device that takes several texts together by engines of their own, and counts places."""

    def __init__(self, device):
        self._device, self.made = device, []

    def __getattr__(self, name):
        return getattr(self._device, name)

    def most_places(self, decoder, context):  # noqa: ARG002
        return 2

    def batch(self, decoder, context, places):
        self.made.append((context, places))
        return self._device.batch(decoder, context, places)


def test_prompts_take_the_places_of_texts_that_ended(model, monkeypatch):
    device = _Counting(model._on)
    monkeypatch.setattr(model, "_on", device)
    prompts = ["Once upon", "There was a very long", "x", "Tom", "The"]
    alone = [model.generate(prompt, max_tokens=9, stop=["e"]) for prompt in prompts]
    together = model.generate_batch(prompts, max_tokens=9, stop="e")
    assert device.made == [(min(256, model.context), 2)]
    for one, other in zip(together, alone, strict=True):
        assert (one.text, one.finish.tokens, one.finish.reason) == (
            other.text,
            other.finish.tokens,
            other.finish.reason,
        )
        assert one.finish.decode_steps == other.finish.decode_steps
        assert one.finish.prompt_tokens == other.finish.prompt_tokens
    for _ in model.stream_batch(prompts, max_tokens=3):
        break  # left before the end
    assert model.generate_batch(prompts[:1], max_tokens=2)[0].text == model.generate(prompts[0], max_tokens=2).text
    full = model.generate_batch(prompts[:2])
    assert {one.finish.reason for one in full} <= {"context", "eos"}


def test_a_device_that_fails_in_the_second_prompt(model, monkeypatch):
    monkeypatch.setattr(model, "_on", _Counting(model._on))
    prefill, prefills = DecoderEngine.prefill, []

    def fail(self, ids):
        prefills.append(ids)
        if len(prefills) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(self, ids)

    monkeypatch.setattr(DecoderEngine, "prefill", fail)
    with pytest.raises(DeviceError, match="out of memory"):
        model.generate_batch(["a", "b", "c"], max_tokens=2)


@pytest.mark.parametrize("when", ["at once", "later"])
@pytest.mark.parametrize("together", [False, True])
def test_broken_logits_end_one_text_of_several(model, monkeypatch, when, together):
    if together:
        monkeypatch.setattr(model, "_on", _Counting(model._on))
    # With a seed, which takes in whole prompts.
    prompts = ["Once upon", "There was a very long", "x", "Tom", "The"]
    alone = model.generate_batch(prompts, max_tokens=9, seed=1)
    assert [one.error for one in alone] == [None] * 5
    broken, prefill = len(model.prompt_ids(prompts[1])), DecoderEngine.prefill

    def overflow(self, ids):
        logits = prefill(self, ids)
        if len(ids) == broken:
            self._state.layers[0].kv.fill_(float("inf"))
            return logits * float("nan") if when == "at once" else logits
        return logits

    monkeypatch.setattr(DecoderEngine, "prefill", overflow)
    found = model.generate_batch(prompts, max_tokens=9, seed=1)
    odd = found.pop(1)
    assert [one.finish.tokens for one in found] == [one.finish.tokens for one in (alone[0], *alone[2:])]
    assert [one.error for one in found] == [None] * 4
    assert isinstance(odd.error, DataError)
    assert "not finite" in str(odd.error)
    assert (odd.finish.reason, odd.finish.prompt_tokens) == ("error", broken)
    assert odd.finish.tokens == (() if when == "at once" else alone[1].finish.tokens[:1])
    assert alone[1].text.startswith(odd.text)
    assert odd.finish.seconds_to_first_token >= 0
    assert odd.finish.decode_steps == 0
    stream = model.stream(prompts[1], max_tokens=9, seed=1)
    with pytest.raises(DataError, match="not finite"):
        list(stream)
    assert stream.finish.tokens == odd.finish.tokens


@pytest.mark.parametrize(
    ("prompts", "settings", "said"),
    [
        ("a text", {}, "must be a list"),
        (["a", ""], {}, "prompt 2 is empty"),
        (["a", "b " * 5000], {}, "prompt 2 has"),
        (["a"], {"places": 0}, "at least 1"),
        (["a"], {"temperatur": 1}, "temperatur"),
    ],
)
def test_prompts_that_make_no_sense(model, prompts, settings, said):
    with pytest.raises(UsageError, match=said):
        model.generate_batch(prompts, chat=False, **settings)
