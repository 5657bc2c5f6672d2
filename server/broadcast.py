"""What the coordinator makes of a round's adapter where it goes down as steps, and which form each node is sent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from common import adapter, broadcast, compact
from common.broadcast import SAME, STEP, WHOLE, Form
from common.records import TensorSpec
from server.aggregate.method import State
from server.aggregate.optimizer import Memory

LEFT_OUT = "down/"  # in the coordinator's memory: what the steps so far left out


@dataclass(frozen=True)
class Step:
    """The step to the newest adapter: hashes of the adapters before and after it, and its body."""

    base_sha256: str
    sha256: str
    body: bytes


def settle(
    before: State, after: State, memory: Memory, *, sent: Sequence[TensorSpec], dtype: str, density: float = 1.0
) -> tuple[State, Memory, Step]:
    """The next global adapter as sites will hold it: the one before, and the step as it is sent.

    What rounding to nearest and a density below 1 leave out of a step is remembered and added to the next (error
    feedback), so that the errors do not add up over the rounds. Source: Tang et al. 2019, arXiv:1905.05957, the
    server's half.

    Args:
        before: What sites hold.
        after: What the method and the optimizer made of it.
        memory: The coordinator's; kept with the checkpoint.
        sent: The tensors that sites are sent.
        dtype: `wire.down`.
        density: `wire.down_density`.
    """
    base = {spec.name: before[spec.name] for spec in sent}
    wanted = {name: after[name] - tensor + _left_out(memory, name, tensor) for name, tensor in base.items()}
    body = compact.encode(wanted, dtype=dtype, density=density, draws=None)
    step = compact.decode(body, sent, dtype=dtype, density=density)
    held = broadcast.stepped(base, step)
    left_out = {LEFT_OUT + name: tensor - step[name] for name, tensor in wanted.items()}
    made = Step(adapter.digest(base), adapter.digest(held), body)
    return {**after, **held}, {**memory, **left_out}, made


def forms(
    tensors: State, *, nodes: Sequence[int], held: Mapping[int, str], step: Step | None
) -> list[tuple[Form, bytes, list[int]]]:
    """For each form in use: the form, its body and the nodes that are sent it.

    Args:
        tensors: The adapter to send, without what sites make themselves.
        nodes: Who is asked.
        held: Hash of the adapter that a node is known to hold.
        step: To the newest adapter; None after a start.
    """
    sha256 = adapter.digest(tensors)
    groups: dict[str, list[int]] = {WHOLE: [], STEP: [], SAME: []}
    for node in nodes:
        groups[_form(held.get(node, ""), sha256, step)].append(node)
    base = step.base_sha256 if step else ""
    made = {WHOLE: Form(WHOLE, sha256, ""), STEP: Form(STEP, sha256, base), SAME: Form(SAME, sha256, sha256)}
    bodies = {WHOLE: adapter.encode(tensors, dtype="float32") if groups[WHOLE] else b"", SAME: b""}
    bodies[STEP] = step.body if step else b""
    return [(made[form], bodies[form], group) for form, group in groups.items() if group]


def _form(held: str, sha256: str, step: Step | None) -> str:
    """The shortest form for a node that holds this adapter."""
    if held == sha256:
        return SAME
    return STEP if step and (step.base_sha256, step.sha256) == (held, sha256) else WHOLE


def _left_out(memory: Memory, name: str, like: Tensor) -> Tensor:
    """What this tensor's steps so far left out."""
    return memory.get(LEFT_OUT + name, like.new_zeros(like.shape))
