"""The model's decoder blocks, by transformers' own classes, one at a time and without the rest of the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from lbq.formats.errors import DataError
from lbq.formats.safetensors_file import Checkpoint
from lbq.quantizer import tensors
from lbq.quantizer.plan import Keep, Plan, Quantize
from lbq.quantizer.quiet import quiet

LAYERS = "model.layers"


class Block(torch.nn.Module):
    """A decoder block that is given hidden states and nothing else: positions and mask are those of whole samples.

    Float32 on one device. ``forward`` maps [batch, tokens, hidden] to the same shape.
    """

    def __init__(self, layer: torch.nn.Module, positions: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> None:
        super().__init__()
        self.layer = layer
        self._positions = positions
        self._mask = mask

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        out = self.layer(hidden_states, attention_mask=self._mask, position_embeddings=self._positions)
        assert isinstance(out, torch.Tensor)
        return out

    def linear(self, module: str) -> torch.nn.Linear:
        """The linear layer with this name in the model."""
        found = self.layer.get_submodule(".".join(module.split(".")[3:]))
        assert isinstance(found, torch.nn.Linear)
        return found


class Blocks:
    """A model as a skeleton without weights, from which :meth:`load` makes one block."""

    def __init__(self, folder: Path, plan: Plan, checkpoint: Checkpoint, device: torch.device) -> None:
        """Raises DataError where transformers does not take ``config.json``."""
        self._plan, self._checkpoint, self._device = plan, checkpoint, device
        self.config, self._model = _skeleton(folder)
        self._steps: list[list[Quantize | Keep]] = [[] for _ in plan.spec.layers]
        for step in plan.steps:
            name = step.module if isinstance(step, Quantize) else step.name
            if name.startswith(LAYERS + "."):
                self._steps[int(name.split(".")[2])].append(step)

    def __len__(self) -> int:
        return len(self._steps)

    def quantized(self, number: int) -> list[Quantize]:
        """The block's linear layers that become codes."""
        return [step for step in self._steps[number] if isinstance(step, Quantize)]

    def check(self) -> None:
        """Raise DataError for NaN and infinity in any block: better at once than after hours."""
        for step in (step for steps in self._steps for step in steps):
            tensors.check(self._checkpoint, step)
            self._checkpoint.release(step.source)

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states of token ids, int64 [samples, tokens], before the first block: BF16 [samples, tokens, hidden].

        Raises DataError for a broken embedding.
        """
        name = f"{self._plan.spec.embedding}.weight"
        step = next(step for step in self._plan.steps if isinstance(step, Keep) and step.name == name)
        table = tensors.dense(self._checkpoint, step)
        hidden = table[tokens]
        self._checkpoint.release(step.source)
        return hidden

    def load(self, number: int, length: int) -> Block:
        """Block ``number`` with the source's weights, for samples of ``length`` tokens.

        Tensors that stay BF16 are rounded to it. Raises DataError for NaN and infinity in these.
        """
        layer = copy.deepcopy(self._model.model.layers[number])
        state: dict[str, torch.Tensor] = {}
        for step in self._steps[number]:
            whole = f"{step.module}.weight" if isinstance(step, Quantize) else step.name
            read = (
                tensors.dense(self._checkpoint, step)
                if isinstance(step, Keep)
                else self._checkpoint.tensor(step.source)
            )
            state[whole.split(".", 3)[3]] = read.to(self._device, torch.float32, copy=True)
            self._checkpoint.release(step.source)
        layer.load_state_dict(state, assign=True)
        layer.requires_grad_(False)
        window = self._plan.spec.layer(number).mixer.window
        return Block(layer.eval(), self._positions(length), _mask(length, window, self._device))

    def _positions(self, length: int) -> tuple[torch.Tensor, ...]:
        """Cosines and sines, each [1, length, head_dim]."""
        rotary = type(self._model.model.rotary_emb)(self.config).to(self._device)
        places = torch.arange(length, device=self._device)[None]
        with torch.no_grad():
            return tuple(rotary(torch.empty(0, device=self._device), places))


def _skeleton(folder: Path) -> tuple[Any, Any]:
    with quiet():
        from transformers import AutoConfig, AutoModelForCausalLM  # slow to import

        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            config._name_or_path = ""  # nobody shall look there
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, trust_remote_code=False, attn_implementation="sdpa", dtype=torch.float32
                )
        except Exception as error:  # whatever a config makes them raise
            reason = " ".join(str(error).split())
            raise DataError(f"{folder / 'config.json'}: transformers cannot build the model: {reason}") from error
    return config, model


def _mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """What a token may see, bool [1, 1, length, length]; None: all before it and itself."""
    if window is None or window >= length:
        return None
    places = torch.arange(length, device=device)
    back = places[:, None] - places[None]
    return ((back >= 0) & (back < window))[None, None]
