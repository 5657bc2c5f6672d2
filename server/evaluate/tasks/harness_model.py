"""The engine behind lm-evaluation-harness' interface; importing this needs the extra `harness`."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM

from common.errors import DataError
from common.model import base
from common.model.base import Engine
from server.evaluate.figures import likelihood


class EngineLM(TemplateLM):  # type: ignore[misc]
    """The adapter that is in an engine, greedy and on texts as they are."""

    def __init__(self, engine: Engine, *, batch_size: int) -> None:
        super().__init__()
        self._engine = engine
        self._rows_at_once = batch_size
        self.tokenizer = engine.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return int(self._engine.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before."""
        return likelihood.prefix_id(self._engine)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """A plain text as tokens."""
        if add_special_tokens is None:
            return likelihood.token_ids(self._engine, string)
        return list(self._engine.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Our own likelihoods."""
        pairs = [(context, following) for _, context, following in requests]
        return likelihood.log_likelihoods(self._engine, pairs, batch_size=self._rows_at_once)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, nats."""
        texts = [request.args[0] for request in requests]
        return [total for total, _ in likelihood.rolling(self._engine, texts, batch_size=self._rows_at_once)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut before the first of the texts in `until`.

        Raises:
            DataError: The task samples, or a prompt is too long.
        """
        answers = []
        for context, settings in (request.args for request in requests):
            if settings.get("do_sample"):
                raise DataError("a harness task samples its answers; set do_sample: false in its generation_kwargs")
            ids = likelihood.token_ids(self._engine, context)
            room = likelihood.max_length_tokens(self._engine) - len(ids)
            wanted = int(settings.get("max_gen_toks", min(room, 256)))
            if not ids or wanted < 1 or wanted > room:
                raise DataError(
                    f"a harness prompt of {len(ids)} tokens leaves room for {room}, and {wanted} are wanted; set "
                    "max_gen_toks in the task's generation_kwargs, or shorten its rows"
                )
            text = base.answer(self._engine, [ids], max_new_tokens=wanted)[0]
            until = settings.get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            answers.append(text)
        return answers
