"""How likely a model holds a text to be, as lm-evaluation-harness counts it.

B batch, T tokens.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from common.errors import DataError, ModelError
from common.model.base import Engine

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context, and of what follows it
_NO_LIMIT: Final = 1 << 20


def max_length_tokens(engine: Engine) -> int:
    """Most tokens that the model takes."""
    return int(getattr(engine.model.config, "max_position_embeddings", _NO_LIMIT))


def prefix_id(engine: Engine) -> int:
    """What stands before a text that nothing stands before: the start token, or else the end token.

    Raises:
        ModelError: The tokenizer names neither.
    """
    tokenizer = engine.tokenizer
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token is None:
        raise ModelError("the tokenizer names neither a start token nor an end token; set eos_token in its settings")
    return int(token)


def token_ids(engine: Engine, text: str) -> list[int]:
    """A plain text as the tokenizer encodes it of its own accord, without a chat template."""
    return list(engine.tokenizer(text, verbose=False)["input_ids"])


def encode_pair(engine: Engine, context: str, continuation: str) -> Pair:
    """A context and what follows it as tokens; spaces at the context's end go to what follows.

    Source: lm-evaluation-harness 0.4.13, `TemplateLM._encode_pair`.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    whole, before = token_ids(engine, bare + continuation), token_ids(engine, bare)
    return before, whole[len(before) :]


@torch.no_grad()
def log_likelihoods(engine: Engine, pairs: Sequence[Pair], *, batch_size: int) -> list[tuple[float, bool]]:
    """For each pair the log-likelihood of what follows, nats, and whether greedy decoding would write it.

    Raises:
        DataError: A pair is longer than the model takes, or nothing follows.
        ModelError: A likelihood is not finite.
    """
    limit = max_length_tokens(engine)
    for number, (context, following) in enumerate(pairs, start=1):
        if not context or not following or len(context) + len(following) > limit + 1:
            raise DataError(
                f"text {number} of {len(pairs)} has {len(context)} and {len(following)} tokens; both need one, and the "
                f"model takes {limit} together: shorten the row or remove it"
            )
    engine.model.eval()
    order = sorted(range(len(pairs)), key=lambda number: len(pairs[number][0]) + len(pairs[number][1]))
    scored: dict[int, tuple[float, bool]] = {}
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        scored.update(zip(numbers, _batch(engine, [pairs[each] for each in numbers]), strict=True))
    return [scored[each] for each in range(len(pairs))]


def rolling(engine: Engine, texts: Sequence[str], *, batch_size: int) -> list[tuple[float, int]]:
    """For each text the sum of its log-likelihood, nats, and its tokens; a long text goes in windows.

    Raises:
        DataError: A text has no token.
        ModelError: A likelihood is not finite.

    Source: lm-evaluation-harness 0.4.13, `get_rolling_token_windows` with a context of one token.
    """
    encoded = [token_ids(engine, text) for text in texts]
    limit = max_length_tokens(engine)
    cut = [list(windows(ids, prefix_id=prefix_id(engine), limit=limit)) for ids in encoded]
    flat = iter(log_likelihoods(engine, [pair for pairs in cut for pair in pairs], batch_size=batch_size))
    sums = [math.fsum(next(flat)[0] for _ in pairs) for pairs in cut]
    if not all(cut):
        raise DataError(f"text {cut.index([]) + 1} of {len(texts)} has no token; remove it")
    return list(zip(sums, map(len, encoded), strict=True))


def windows(ids: Sequence[int], *, prefix_id: int, limit: int) -> Iterator[Pair]:
    """Cut a text so that each token is predicted once, with as much before it as the model takes.

    Example:
        >>> [(context, following) for context, following in windows([1, 2, 3, 4, 5], prefix_id=0, limit=4)]
        [([0], [1, 2, 3, 4]), ([1, 2, 3, 4], [5])]
    """
    first = min(limit, len(ids))
    if ids:
        yield [prefix_id], list(ids[:first])
    for start in range(first, len(ids), limit):
        end = min(start + limit, len(ids))
        yield list(ids[end - limit - 1 : start]), list(ids[start:end])


def _batch(engine: Engine, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """One forward pass; the last token is predicted and never read."""
    sequences = [[*context, *following] for context, following in pairs]
    width = max(map(len, sequences)) - 1
    ids_bt = torch.full((len(pairs), width), engine.pad_id)
    mask_bt = torch.zeros((len(pairs), width), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids_bt[row, : len(sequence) - 1] = torch.tensor(sequence[:-1])
        mask_bt[row, : len(sequence) - 1] = 1
    logits_btv = engine.model(input_ids=ids_bt.to(engine.device), attention_mask=mask_bt.to(engine.device)).logits
    scored = []
    for logits_tv, (context, following) in zip(logits_btv, pairs, strict=True):
        start = len(context) - 1
        log_probs_nv = torch.log_softmax(logits_tv[start : start + len(following)].float(), dim=-1)
        wanted_n = torch.tensor(following, device=log_probs_nv.device)
        total = float(log_probs_nv.gather(1, wanted_n[:, None]).sum())
        if not math.isfinite(total):
            raise ModelError(f"a log-likelihood is {total}; the adapter has diverged, lower training.learning_rate")
        scored.append((total, bool((log_probs_nv.argmax(dim=-1) == wanted_n).all())))
    return scored
