"""What the coordinator makes of a round's adapter where it goes down as steps, and which form each node is sent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from common.adapter import adapter, broadcast, compact
from common.adapter.broadcast import SAME, STEP, WHOLE, Form
from common.frame.records import TensorSpec
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
    tensors: State, *, nodes: Sequence[int], held: Mapping[int, str], steps: Sequence[Step]
) -> list[tuple[Form, bytes, list[int]]]:
    """For each form in use: the form, its body and the nodes that are sent it.

    A site that missed rounds is sent their steps as long as these weigh less than the adapter.

    Args:
        tensors: The adapter to send, without what sites make themselves.
        nodes: Who is asked.
        held: Hash of the adapter that a node is known to hold.
        steps: To the newest adapter, each from the one before; none after a start, or where the run sends none.
    """
    sha256 = adapter.digest(tensors)
    groups: dict[str, list[int]] = {}
    for node in nodes:
        groups.setdefault(held.get(node, ""), []).append(node)
    made: dict[Form, tuple[bytes, list[int]]] = {}
    for base_sha256, group in groups.items():
        form, body = _form(base_sha256, sha256, steps)
        made.setdefault(form, (body, []))[1].extend(group)
    whole = adapter.encode(tensors, dtype="float32") if any(form.form == WHOLE for form in made) else b""
    return [(form, whole if form.form == WHOLE else body, group) for form, (body, group) in made.items()]


def _form(held: str, sha256: str, steps: Sequence[Step]) -> tuple[Form, bytes]:
    """The shortest form for a node that holds this adapter, and its body but for the whole one's."""
    if held == sha256:
        return Form(SAME, sha256, sha256), b""
    bases = [step.base_sha256 for step in steps]
    if held in bases and steps[-1].sha256 == sha256:
        return Form(STEP, sha256, held), b"".join(step.body for step in steps[bases.index(held) :])
    return Form(WHOLE, sha256, ""), b""


def light(steps: Sequence[Step], *, sent: Sequence[TensorSpec]) -> list[Step]:
    """The newest steps that follow each other and together weigh no more than the whole adapter; at least the last."""
    limit, kept = adapter.encoded_size(sent, dtype="float32"), list[Step]()
    for step in reversed(steps):
        limit -= len(step.body)
        if kept and (limit < 0 or step.sha256 != kept[0].base_sha256):
            break
        kept.insert(0, step)
    return kept


def _left_out(memory: Memory, name: str, like: Tensor) -> Tensor:
    """What this tensor's steps so far left out."""
    return memory.get(LEFT_OUT + name, like.new_zeros(like.shape))
