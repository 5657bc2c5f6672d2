"""What crosses a boundary, as frozen dataclasses with a strict way in."""

import dataclasses
import types
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from common.errors import WireError
from common.frame import wire

T = TypeVar("T")
MAX_NUMBER: Final = 2**53
MAX_CHARACTERS: Final = 256
HEADS: Final = "heads"  # beside a plan: where the audit logs of the others stand
LINKS: Final = "links"  # and that the coordinator's own log continues what it was
ADAPTER: Final = "adapter"  # in which form the adapter comes (`common.adapter.broadcast`)
SIGNED: Final = ("signer", "signature")  # of a whole answer; see `common.trust.signed_frame`


@dataclass(frozen=True)
class TensorSpec:
    """One trainable tensor of the adapter: name as peft saves it, and shape. Values are float32."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class OpenedHead:
    """What a site tells when it takes part in a run: counts only.

    A site whose policy demands differential privacy tells units in the place of rows, noised (`client.policy.figures`).

    Attributes:
        site: The site's name.
        run_sha256: Hash of the manifest that it opened.
        num_examples: Rows that it trains on.
        num_held_out: Rows that it keeps for evaluation; 0: it answers no evaluation.
        num_truncated: Of both, cut at `data.max_length_tokens`; None in a run that protects units.
        num_dropped: Of both, left out because they are too long, or are pairs whose answers are the same after
            the cut; None likewise.
        num_steps: Optimiser steps that a round will take here.
        adapter_sha256: Of the adapter that this site holds: the one that it was sent last, or that the run starts from,
            as it made that from the seed; empty where its largest values go down alone.
        signer: The site's identity, which signed this answer; empty where it has none. See `common.trust.signed_frame`.
        signature: By that key; empty likewise.
    """

    site: str
    run_sha256: str
    num_examples: int
    num_held_out: int
    num_truncated: int | None
    num_dropped: int | None
    num_steps: int
    adapter_sha256: str = ""
    signer: str = ""
    signature: str = ""


@dataclass(frozen=True)
class RoundPlan:
    """What the server asks of a site in one round; `evaluate` requests use it too.

    Attributes:
        run_sha256: Hash of the manifest that the site opened.
        round_index: From 0; the global adapter that comes along is the state before this round. For `evaluate` also
            `num_rounds` and beyond: what the last round has left, then the polished adapters in their order.
        generate: For `evaluate`: also answer held-out rows greedily and count exact matches.
    """

    run_sha256: str
    round_index: int
    generate: bool = False


@dataclass(frozen=True)
class UpdateHead:
    """What a site tells about its local training; the delta travels in the body.

    Attributes:
        site: The site's name.
        run_sha256: Of the run it answers.
        round_index: Of the round it answers.
        num_examples: Rows in the site's training set: the weight of its update.
        num_steps: Optimiser steps done.
        num_tokens: Tokens seen, padding excluded; None under differential privacy, which covers no such count.
        train_loss: Mean negative log-likelihood per answer token over the round, nats; None likewise.
        seconds: Wall time of the local training; None likewise.
        num_audit_entries: Lines in the site's audit log before this answer; 0 where it keeps none.
        audit_sha256: Hash of the last of them; empty where there is none.
        audit_time: When it was written, Unix seconds.
        audit_signer: Public key of that log, which is the site's identity; empty likewise.
        audit_signature: By that key; see `common.trust.heads`.
        signer: As of `OpenedHead`.
        signature: As of `OpenedHead`.
    """

    site: str
    run_sha256: str
    round_index: int
    num_examples: int
    num_steps: int
    num_tokens: int | None
    train_loss: float | None
    seconds: float | None
    num_audit_entries: int = 0
    audit_sha256: str = ""
    audit_time: float = 0.0
    audit_signer: str = ""
    audit_signature: str = ""
    signer: str = ""
    signature: str = ""


@dataclass(frozen=True)
class SiteMetrics:
    """A site's held-out figures for the global adapter that it was sent.

    Attributes:
        nll_sum: Sum of negative log-likelihood over answer tokens, nats.
        num_answer_tokens: Tokens in that sum.
        num_rows: Held-out rows scored.
        num_generated: Rows answered greedily; 0 if not asked.
        num_exact: Of these, equal to the reference after stripping white space.
        preference_loss_sum: Sum of the objective's loss over the rows; None unless preferences are learnt.
        num_preferred: Rows whose preference the adapter agrees with more than at the start; None likewise.
        signer: As of `OpenedHead`.
        signature: As of `OpenedHead`.
    """

    site: str
    run_sha256: str
    round_index: int
    nll_sum: float
    num_answer_tokens: int
    num_rows: int
    num_generated: int
    num_exact: int
    seconds: float
    preference_loss_sum: float | None = None
    num_preferred: int | None = None
    signer: str = ""
    signature: str = ""

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per answer token, nats; under preferences the objective's mean over rows."""
        return self.loss_sum / self.num_terms

    @property
    def loss_sum(self) -> float:
        """Sum of the loss that the run lowers."""
        return self.nll_sum if self.preference_loss_sum is None else self.preference_loss_sum

    @property
    def num_terms(self) -> int:
        """Terms in that sum: answer tokens, or rows with a preference."""
        return self.num_answer_tokens if self.preference_loss_sum is None else self.num_rows


def read_plan(head: dict[str, Any]) -> RoundPlan:
    """The plan in a request's head; beside it stand heads of audit logs, and the form of the adapter.

    Raises:
        WireError: See `from_head`.
    """
    return from_head(RoundPlan, {name: value for name, value in head.items() if name not in (HEADS, LINKS, ADAPTER)})


def to_head(record: Any) -> dict[str, Any]:
    """A record as a frame head."""
    return dataclasses.asdict(record)


def from_head(kind: type[T], head: dict[str, Any]) -> T:
    """A frame head as a record: exactly its fields, of exactly their types, numbers from 0 to 2^53.

    Sums over many sites stay finite within that limit, and every whole number below it has a float.

    Raises:
        WireError: A field is missing, unknown, of another type or out of range.
    """
    fields = {f.name: f.type for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if head.keys() != fields.keys():
        wrong = ", ".join(sorted(head.keys() ^ fields.keys()))
        raise WireError(f"{kind.__name__} has missing or unknown fields: {wire.shown(wrong, limit=200)}")
    return kind(**{name: _scalar(name, head[name], expected) for name, expected in fields.items()})


def _scalar(name: str, value: Any, expected: Any) -> Any:
    """One field: exact type (bool is not int, but a whole number is a float), bounded; None where that is a type."""
    if isinstance(expected, types.UnionType):
        if value is None:
            return None
        expected = next(kind for kind in expected.__args__ if kind is not types.NoneType)
    if type(value) is not expected and (type(value), expected) != (int, float):
        raise WireError(f"field {name} is {type(value).__name__}, expected {expected.__name__}")
    if expected is str and len(value) > MAX_CHARACTERS:
        raise WireError(f"field {name} has {len(value)} characters; the limit is {MAX_CHARACTERS}")
    if expected in (int, float) and not 0 <= value <= MAX_NUMBER:
        raise WireError(f"field {name} is not a number from 0 to 2^53")
    return expected(value)
