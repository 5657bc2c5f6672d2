"""What local training lowers: the likelihood of answers (`sft`), or what people prefer among them (`dpo`, `kto`).

The loss of an example depends on no other example, so that each can be clipped with its unit; the one exception is
KTO's reference point, which a private run has to fix. B rows, N examples, T tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from common.data.rows import Row
from common.errors import DataError
from common.loss import likelihood
from common.model import base, base_files, varlen
from common.model.base import Engine
from common.run import config
from common.run.schema.training import Objective, Preference, Sft
from common.text import prompts
from common.text.prompts import Batch, Encoded, EncodingReport


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        chosen: Prompt and the better answer.
        rejected: Prompt and the worse one.
        reference: Log-probability of each answer at the start of the run; empty until
            `preference_score.with_references`.
    """

    chosen: Encoded
    rejected: Encoded
    reference: tuple[float, ...] = ()

    @property
    def unit(self) -> str:
        """The one unit of both."""
        return self.chosen.unit

    @property
    def rows(self) -> tuple[Encoded, ...]:
        """What goes through the model for the loss."""
        return (self.chosen, self.rejected)


@dataclass(frozen=True)
class Rated:
    """One answer, and whether it is wanted.

    Attributes:
        answer: Prompt and answer.
        is_desirable: What people said of it.
        mismatched: The prompt with the answer to another one, for the reference point; None where that is zero.
        reference: Log-probability of answer and mismatched answer at the start; empty until
            `preference_score.with_references`.
    """

    answer: Encoded
    is_desirable: bool
    mismatched: Encoded | None = None
    reference: tuple[float, ...] = ()

    @property
    def unit(self) -> str:
        """The answer's unit."""
        return self.answer.unit

    @property
    def rows(self) -> tuple[Encoded, ...]:
        """What goes through the model for the loss."""
        return (self.answer,)


Example = Encoded | Pair | Rated
T = TypeVar("T", bound=Example)


SFT: Final = Sft()


def encode(engine: Engine, rows: Sequence[Row], run: config.RunConfig) -> tuple[Sequence[Example], EncodingReport]:
    """Rows to tokens and masks as the run's objective needs them.

    Raises:
        DataError: No row is left, one is too long and `data.too_long` is `error`, rows are not of this objective, or
            both answers of all pairs are the same after the cut.
    """
    objective = run.training.objective
    if objective.kind == "sft":
        return base.encode(engine, rows, run.data)
    if objective.kind == "dpo" and run.data.too_long == "truncate_input":
        limit, prompt = run.data.max_length_tokens, run.data.system_prompt  # of both answers
        rows = [prompts.shorten(row, engine.tokenizer, max_length_tokens=limit, system_prompt=prompt) for row in rows]
    found = [_encode_one(engine, row, run.data) for row in with_others(rows, objective)]
    kept = [  # a cut can make the answers of a pair the same tokens, whose loss has no gradient
        example
        for example in found
        if example and not (isinstance(example, Pair) and example.chosen.input_ids == example.rejected.input_ids)
    ]
    if not kept and any(found):
        raise DataError(
            f"both answers of all {sum(map(bool, found))} pairs are the same after the cut at "
            f"{run.data.max_length_tokens} tokens, so nothing is preferred: raise data.max_length_tokens, or set "
            'data.too_long = "truncate_input"'
        )
    if not kept:
        raise DataError(
            f"no answer token is left in any of {len(found)} rows at {run.data.max_length_tokens} tokens: "
            "raise data.max_length_tokens or shorten the rows"
        )
    base_files.check_token_ids((max(row.input_ids) for example in kept for row in example.rows), engine.model)
    return kept, prompts.report_of(kept, num_rows=len(found))


def with_others(rows: Sequence[Row], objective: Preference) -> list[tuple[Row, Row | None]]:
    """Each row and the conversation that goes with it: the rejected answer, or the answer to another prompt.

    Args:
        rows: Of one side of a site, in order.

    Raises:
        DataError: Rows have no label, or there are too few for a reference point.
    """
    if objective.kind == "dpo":
        return [(row, replace(row, messages=row.rejected, rejected=())) for row in rows]
    if any(row.is_desirable is None for row in rows):
        raise DataError("training.objective.kind = 'kto' needs rows with a label; these have none")
    if not objective.couples_examples:
        return [(row, None) for row in rows]
    if len(rows) < 2:
        raise DataError(
            "KTO's reference point needs two rows; add rows, or set training.objective.reference_point = 'zero'"
        )
    half = len(rows) // 2  # far away in the file, where the next row is often of the same patient or prompt
    others = [rows[(place + half) % len(rows)] for place in range(len(rows))]
    return [
        (row, replace(row, messages=(*row.messages[: row.num_context], *other.messages[other.num_context :])))
        for row, other in zip(rows, others, strict=True)
    ]


def _encode_one(engine: Engine, both: tuple[Row, Row | None], data: config.DataConfig) -> Pair | Rated | None:
    """One example; None if one of its rows is dropped."""
    row, other = both
    if row.is_desirable is None and not row.rejected:
        raise DataError(f"{row.row_id}: has no rejected answer, which training.objective.kind = 'dpo' needs")
    first, second = (
        prompts.encode(
            conversation,
            engine.tokenizer,
            max_length_tokens=data.max_length_tokens,
            too_long=data.too_long,
            system_prompt=data.system_prompt,
        )
        if conversation
        else None
        for conversation in (row, other)
    )
    if first is None or (other is not None and second is None):
        return None
    if row.is_desirable is None and second is not None:
        return Pair(first, second)
    return Rated(first, bool(row.is_desirable), second)


def length(example: Example) -> int:
    """Tokens of an example's longest row."""
    return max(len(row.input_ids) for row in example.rows)


def num_terms(examples: Sequence[Example], objective: Objective) -> int:
    """What the mean loss is a mean over: answer tokens under `sft`, examples under the others."""
    if objective.kind != "sft":
        return len(examples)
    return sum(sum(row.is_answer[1:]) for example in examples for row in example.rows)


def collate(engine: Engine, units: Sequence[Sequence[Example]], *, allows_packing: bool = True) -> Batch:
    """All rows of some units as one batch on the engine's device; the rows of an example one after the other.

    They are packed into one line where the model keeps rows of a line apart and this is allowed, and padded elsewhere.
    """
    rows = [(row, owner) for owner, unit in enumerate(units) for example in unit for row in example.rows]
    return prompts.collate(
        [row for row, _ in rows],
        pad_id=engine.pad_id,
        owners=[owner for _, owner in rows],
        is_packed=allows_packing and varlen.traits_of(engine.model).can_pack,
    ).to(engine.device)


def loss(
    engine: Engine, batch: Batch, examples: Sequence[Example], objective: Objective, *, origin: float | Tensor = 0.0
) -> Tensor:
    """Sum of the examples' losses, a scalar that carries gradients; all rows go through the model at once.

    Args:
        batch: The examples' rows; see `collate`.
        examples: With references, unless the objective is `sft`.
        origin: KTO's reference point, nats.

    Returns:
        Under `sft` the negative log-likelihood of the answer tokens, nats.
    """
    if objective.kind == "sft":
        return likelihood.answer_nll(engine.model, batch)[0]
    return losses(examples, -likelihood.row_nll(engine.model, batch), objective, origin=origin)[0].sum()


def losses(
    examples: Sequence[Example], log_prob_b: Tensor, objective: Preference, *, origin: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and margin of each example, from the log-probabilities of its rows in order.

    Shape: (B,) to (N,) and (N,); a margin is above 0 where the adapter agrees with the preference.
    """
    reference_b = torch.tensor([value for e in examples for value in _reference(e)], dtype=log_prob_b.dtype)
    reference_b = reference_b.to(log_prob_b.device, non_blocking=True)
    gain_b = log_prob_b - reference_b
    if objective.kind == "dpo":
        margin_n = objective.beta * (gain_b[0::2] - gain_b[1::2])
        return dpo(margin_n, label_smoothing=objective.label_smoothing), margin_n
    is_wanted_n = torch.tensor([isinstance(e, Rated) and e.is_desirable for e in examples])
    is_wanted_n = is_wanted_n.to(gain_b.device, non_blocking=True)
    margin_n = objective.beta * torch.where(is_wanted_n, gain_b - origin, origin - gain_b)
    weight_n = torch.where(is_wanted_n, objective.desirable_weight, objective.undesirable_weight)
    return kto(margin_n, weight_n), margin_n


def dpo(margin_n: Tensor, *, label_smoothing: float) -> Tensor:
    """Loss of each pair: -(1 - s) log sigmoid(m) - s log sigmoid(-m).

    Args:
        margin_n: beta times how much more the chosen answer has gained over the start than the rejected one.
        label_smoothing: s, the probability that a pair was labelled the wrong way round; 0 is plain DPO.

    Shape: (N,) to (N,).
    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; with s > 0 Mitchell 2023, conservative DPO, equation 3.

    Example:
        >>> import torch
        >>> round(float(dpo(torch.zeros(1), label_smoothing=0.0)), 4)
        0.6931
    """
    return -(1 - label_smoothing) * logsigmoid(margin_n) - label_smoothing * logsigmoid(-margin_n)


def kto(margin_n: Tensor, weight_n: Tensor) -> Tensor:
    """Loss of each rated answer: w (1 - sigmoid(m)).

    Args:
        margin_n: beta times the answer's gain over the start less the reference point; with the sign turned where the
            answer is not wanted.
        weight_n: w of the answer's kind.

    Shape: (N,) and (N,) to (N,).
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, equation 8.
    """
    return weight_n * (1 - margin_n.sigmoid())


def _reference(example: Example) -> tuple[float, ...]:
    """Log-probabilities at the start of the rows that the loss covers."""
    if isinstance(example, Encoded) or not example.reference:
        raise ValueError("this example has no log-probabilities of the run's start; see `preference_score`")
    return example.reference[: len(example.rows)]


def log_probs(engine: Engine, rows: Sequence[Encoded]) -> Tensor:
    """Log-probability of each row's answer under the adapter that is in the engine. Shape: (B,)."""
    return -likelihood.row_nll(engine.model, collate(engine, [rows]))


def parts(examples: Sequence[T], batch_size: int, *, max_tokens: int = 0) -> Iterator[Sequence[T]]:
    """Micro-batches of similar length; the same ones whatever the order.

    Args:
        examples: The batch.
        batch_size: Most examples of a micro-batch, unless `max_tokens` bounds it.
        max_tokens: Most tokens of a micro-batch of several examples; 0: any number.
    """
    part: list[T] = []
    num_tokens = 0
    for example in sorted(examples, key=length):
        size = sum(len(row.input_ids) for row in example.rows)
        if part and (num_tokens + size > max_tokens if max_tokens else len(part) == batch_size):
            yield part
            part, num_tokens = [], 0
        part.append(example)
        num_tokens += size
    if part:
        yield part
