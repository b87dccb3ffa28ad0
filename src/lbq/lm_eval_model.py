"""``lbq`` as a model of lm-evaluation-harness, 0.4: ``lbq lm-eval run --model lbq --model_args path=ARTIFACT``.

Importing this module registers it, for those who call ``lm_eval.simple_evaluate`` themselves. The harness and what it
needs are the extra ``lbq[lm-eval]``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from lbq.formats.errors import UsageError
from lbq.loading import load
from lbq.runtime.model import Model
from lbq.runtime.text.chat import require_template
from lbq.runtime.text.generation import Engine, stream_text

MAX_TOKENS = 256  # of a generated text where a task does not say: the harness's own default
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

Pair = tuple[tuple[str, str], list[int], list[int]]  # texts, ids of the context, ids of the continuation

log = logging.getLogger(__name__)


@register_model("lbq")
class LbqModel(TemplateLM):  # type: ignore[misc]
    """An artifact, or with ``bits`` a checkpoint that is quantised now, behind the harness's interface.

    ``path`` is a folder or a Hub id; ``bits`` to ``revision`` are those of :func:`lbq.load`; ``device``, ``dtype``,
    ``context`` and ``threads`` those of :class:`lbq.runtime.loading.LoadSettings`. Texts are scored one by one, so that
    ``batch_size`` changes nothing.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        device: str | None = None,
        dtype: Literal["auto", "float32"] = "auto",
        context: int | None = None,
        threads: int | None = None,
        bits: int | None = None,
        group: int | Literal["row"] | None = None,
        lm_head: int | None = None,
        revision: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if path is None:
            raise UsageError("--model_args: path=ARTIFACT is missing")
        if batch_size not in (None, 1, "1", "auto") or max_batch_size is not None:
            log.warning("batch_size has no effect: lbq scores texts one by one")
        kind = (device or "auto").partition(":")[0]
        if kind not in ("auto", "cpu", "cuda"):
            raise UsageError(f"device {device}: auto, cpu or cuda")
        self.model: Model = load(
            path,
            bits=bits,
            group=group,
            lm_head=lm_head,
            revision=revision,
            on_note=log.warning,
            device=kind,  # type: ignore[arg-type]
            dtype=dtype,
            context=context,
            threads=threads,
        )
        self._device = self.model.device
        self._path = path

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> LbqModel:
        """As the harness makes a model: its own ``--device`` and ``--batch_size`` give way to ``--model_args``."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**(given | arg_dict))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> LbqModel:
        """Likewise, of ``path=…,device=…``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @cached_property
    def _engine(self) -> Engine:
        return self.model.new_engine()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if not self.model.end_ids:
            raise UsageError(f"{self._path}: no token that ends a text is known (generation_config.json)")
        return min(self.model.end_ids)

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token: the one that begins a text, where the tokenizer has one."""
        first = self.model.tokenizer.encode("", add_special_tokens=True)
        return first[0] if first else self.eot_token_id

    @property
    def max_length(self) -> int:
        """The most tokens of a text."""
        return self.model.context

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self._path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, which the harness keeps with the results."""
        if chat_template is False:
            return None
        if isinstance(chat_template, str):
            raise UsageError("--apply_chat_template takes no name here: an artifact has one template")
        return require_template(self.model.template).source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        template = require_template(self.model.template)
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids. By default with what the tokenizer puts around a text, unless it stands there already."""
        del kwargs
        plain = self.model.tokenizer.encode(string, add_special_tokens=False)
        if add_special_tokens is False:
            return plain
        ids = self.model.tokenizer.encode(string, add_special_tokens=True)
        doubled = add_special_tokens is None and len(ids) > len(plain) and plain[:1] == ids[:1]
        return plain if doubled else ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts, cut into windows of the model's context whose predictions do not overlap."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="rolling"):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
        return found

    def _loglikelihood_tokens(
        self, requests: Iterable[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        pairs = list(requests)
        shown = tqdm(pairs, disable=disable_tqdm, desc="loglikelihood")
        return [self._score(context, continuation) for _, context, continuation in shown]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """ln p of a continuation, and whether it is the most probable one token by token."""
        room = self.max_length
        if len(continuation) > room:
            raise UsageError(f"a continuation of {len(continuation)} tokens: {self._path} has a context of {room}")
        if len(context) + len(continuation) > room + 1:
            log.warning("a text of %d tokens is cut on the left to %d", len(context) + len(continuation), room + 1)
        inputs = (context + continuation)[-(room + 1) : -1]
        before, scored = inputs[: -len(continuation)], inputs[-len(continuation) :]
        self._engine.truncate(0)
        if before:
            self._engine.prefill(before)
        logs = self._engine.all_logits(scored).double().log_softmax(-1).cpu()
        chosen = logs.gather(1, logs.new_tensor(continuation).long().unsqueeze(1))
        return float(chosen.sum()), logs.argmax(-1).tolist() == continuation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that go on from the given ones, up to a stop string, which is cut off."""
        texts = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generate"):
            text = self._generate(request.args[0], dict(request.args[1]))
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def _generate(self, prompt: str, settings: dict[str, Any]) -> str:
        stop = settings.pop("until", None) or []
        stop = [stop] if isinstance(stop, str) else list(stop)
        lengths = [settings.pop(name, None) for name in LENGTH_NAMES]
        most = min(next((int(length) for length in lengths if length), MAX_TOKENS), self.max_length - 1)
        sampled = settings.pop("do_sample", None)
        temperature = float(settings.pop("temperature", 0.0 if not sampled else 1.0)) if sampled is not False else 0.0
        known = {
            name: settings.pop(name)
            for name in ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
            if name in settings
        }
        if settings:
            log.warning("settings of generation that lbq does not have are ignored: %s", ", ".join(sorted(settings)))
        ids = self.tok_encode(prompt)
        if len(ids) > self.max_length - most:
            log.warning("a prompt of %d tokens is cut on the left to %d", len(ids), self.max_length - most)
            ids = ids[most - self.max_length :]
        defaults: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        chosen: Any = defaults | known
        stops = [text for text in stop if text]
        options = self.model.options(max_tokens=most, stop=stops, temperature=temperature, **chosen)
        self._engine.truncate(0)
        pieces = stream_text(
            self._engine, self.model.tokenizer, ids, options, self.model.end_ids, held=0, continues_text=True
        )
        return "".join(piece for piece in pieces if isinstance(piece, str))
