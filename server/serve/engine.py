"""One base in memory, adapters beside it, and answers a token at a time.

T tokens of a prompt, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from peft import PeftModel
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.utils import logging as transformers_logging

from common.data.rows import Message, Row
from common.errors import ModelError
from common.model import base as model
from common.model import base_files, probe
from common.run import config
from common.text import prompts
from server.export import tokenizer as export_tokenizer
from server.serve.folders import Served, base_name, date_of
from server.serve.requests import Refused, Talk

Finish = Literal["stop", "length"]
_UNBOUNDED: Final = 1 << 20  # tokens, of a base whose positions have no end
_UNFINISHED: Final = "\ufffd"  # what a tokenizer makes of the first bytes of a character


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        max_tokens: Most tokens of it.
        temperature: 0: always the likeliest token.
        top_p: Only the likeliest tokens that together have this probability.
        seed: Of the draw; None: from the system.
        stops: Texts at which it ends, before them.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stops: Sequence[str] = ()


@dataclass
class Answer:
    """An answer in the making.

    Attributes:
        num_tokens: Of the answer so far.
        finish: Why it ended; None while it has not.
    """

    num_prompt_tokens: int
    num_tokens: int = 0
    finish: Finish | None = None


class Models:
    """The base and its adapters; not for two threads at once."""

    def __init__(self, base: Path, served: Sequence[Served], *, settings: config.ModelConfig, device_name: str) -> None:
        """Load all of it.

        Raises:
            ModelError: Base or adapter cannot be loaded here.
        """
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        device = model.choose_device(device_name)
        self.base = base_name(base)
        network = model.load_base(base, settings, device)
        self.max_tokens = base_files.num_positions(network.config) or _UNBOUNDED
        tokenizer = model.load_tokenizer(base)
        if tokenizer.chat_template:  # as a run uses it
            tokenizer = prompts.use_template(tokenizer, "tokenizer", date=date_of(served))
        self._tokenizers = {self.base: tokenizer}
        probe.check_finite(network)
        probe.check_function(network, probe.trial_rows(tokenizer, network))
        self._network: Any = network
        for adapter in served:
            with model.quiet_peft():
                if isinstance(self._network, PeftModel):
                    self._network.load_adapter(str(adapter.folder), _key(adapter.name))
                else:
                    self._network = PeftModel.from_pretrained(self._network, str(adapter.folder), _key(adapter.name))
            self._tokenizers[adapter.name] = export_tokenizer.of_base(
                base, adapter.template, system_prompt=adapter.system_prompt, date=adapter.date
            )
        self._ends: dict[str, set[int]] = {}
        for name, tokenizer in self._tokenizers.items():
            try:
                self._ends[name] = set(prompts.stop_ids(tokenizer, network.generation_config))
            except ModelError:  # no template that could be trained with; then those that base and tokenizer name
                named = network.generation_config.eos_token_id
                self._ends[name] = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
        self._network.eval()

    @property
    def names(self) -> list[str]:
        """All models, the base first."""
        return list(self._tokenizers)

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """Of a model, with its own chat template.

        Raises:
            Refused: There is no such model.
        """
        if name not in self._tokenizers:
            known = ", ".join(self._tokenizers)
            raise Refused(f"model: there is none of that name; there are {known}", status=404, kind="not_found_error")
        return self._tokenizers[name]

    def chat_ids(self, name: str, messages: Sequence[Talk]) -> list[int]:
        """A conversation as the model's run rendered it.

        Raises:
            Refused: No such model, no template, or one that refuses these roles.
        """
        tokenizer = self.tokenizer(name)
        if not tokenizer.chat_template:
            raise Refused(f"model: {name} has no chat template; use /v1/completions")
        turns = tuple(Message(message.role, message.text) for message in messages)
        row = Row((*turns, Message("assistant", "")), unit="", row_id="messages")
        try:
            return prompts.prompt_ids(row, tokenizer)[0]
        except ModelError:  # whose remedy is a run's
            raise Refused("messages: the model's chat template refuses this order of roles") from None

    def text_ids(self, name: str, prompt: str) -> list[int]:
        """A prompt as it is, with what the tokenizer puts before every text."""
        return list(self.tokenizer(name)(prompt)["input_ids"])

    def answer(self, name: str, ids: Sequence[int], sampling: Sampling, answer: Answer) -> Iterator[str]:
        """Pieces of text, as soon as nothing that follows can change them; `answer` is kept up to date."""
        tokenizer, tokens, sent = self.tokenizer(name), [], ""
        for token in self._tokens(name, ids, sampling):
            answer.num_tokens += 1
            if token in self._ends[name]:
                answer.finish = "stop"
                break
            tokens.append(token)
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            ends = [start for start in map(text.find, sampling.stops) if start >= 0]
            if ends:
                yield text[len(sent) : min(ends)]
                answer.finish = "stop"
                return
            safe = _safe(text, sampling.stops)
            if len(safe) > len(sent):
                yield safe[len(sent) :]
                sent = safe
        rest = str(tokenizer.decode(tokens, skip_special_tokens=True))[len(sent) :]
        answer.finish = answer.finish or "length"
        if rest:
            yield rest

    def _tokens(self, name: str, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Up to `max_tokens` tokens under one adapter, or under none."""
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        step: Any = torch.tensor([list(ids)], device=self._network.device)
        past = None
        for _ in range(sampling.max_tokens):
            with torch.no_grad(), self._under(name):
                out = self._network(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            token = draw(out.logits[0, -1].float().cpu(), sampling, generator)
            yield token
            step = torch.tensor([[token]], device=self._network.device)

    def _under(self, name: str) -> Any:
        """The model's adapter for as long as a step lasts."""
        if not isinstance(self._network, PeftModel):
            return nullcontext()
        if name == self.base:
            return self._network.disable_adapter()
        if self._network.active_adapter != _key(name):
            self._network.set_adapter(_key(name))
        return nullcontext()


def draw(logits_v: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token."""
    if sampling.temperature == 0:
        return int(logits_v.argmax())
    steps = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(float(sampling.top_p)))
    no_ids: Any = torch.empty((1, 0), dtype=torch.int64)  # which these two do not look at
    scores_1v = steps(no_ids, logits_v[None])
    return int(torch.multinomial(scores_1v[0].softmax(-1), 1, generator=generator))


def _key(name: str) -> str:
    """A name that torch takes for a module: without dots."""
    return name.replace(".", "\u2024")


def _safe(text: str, stops: Sequence[str]) -> str:
    """A text without a tail that may become a text to stop at, or that is half a character."""
    text = text.rstrip(_UNFINISHED)
    tails = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
    return text[: len(text) - max(tails, default=0)]
