"""What leaves, held to what the manifest declared and the policy allows: exact fields, ranges, rounding, tensors."""

from collections.abc import Mapping
from typing import Any

from client.policy.file import Policy
from common.adapter import compact
from common.errors import ModelError, PolicyRefusedError, WireError
from common.frame.exchanges import EXCHANGES
from common.frame.records import SIGNED, from_head
from common.frame.wire import Frame
from common.run import egress
from common.run.manifest import RunManifest


def rounded(reply: Frame, *, digits: int) -> Frame:
    """Round every figure; a sum over tokens or rows is rounded by its mean, which is what it is used for.

    Example:
        >>> rounded(Frame("update", {"train_loss": 1.23456}), digits=3).head
        {'train_loss': 1.235}
    """
    head = {name: round(value, digits) if isinstance(value, float) else value for name, value in reply.head.items()}
    if reply.kind == "metrics" and reply.head.get("num_answer_tokens"):
        head["nll_sum"] = _rounded_sum(reply.head["nll_sum"], reply.head["num_answer_tokens"], digits=digits)
    if reply.head.get("preference_loss_sum") is not None:
        head["preference_loss_sum"] = _rounded_sum(
            reply.head["preference_loss_sum"], reply.head["num_rows"], digits=digits
        )
    return reply.with_head(head)


def check(policy: Policy, run_manifest: RunManifest, reply: Frame, *, names: Mapping[str, Any]) -> None:
    """Let nothing through that is not declared.

    Args:
        policy: The site's.
        run_manifest: Of the run that is open.
        reply: All that would leave, rounded.
        names: What site, run and round must be called in it.

    Raises:
        PolicyRefusedError: A field too many or too few, a figure out of range, a slice that is too small, other
            tensors.
    """
    declared = run_manifest.plan.egress.metrics.get(reply.kind)
    if declared is None:
        raise PolicyRefusedError(f"egress: a reply of kind '{reply.kind}' is not declared", rule="egress")
    _check_fields(reply, declared.keys())
    wrong = sorted(name for name in names.keys() & reply.head.keys() if reply.head[name] != names[name])
    if wrong:
        raise PolicyRefusedError(f"egress.metrics: {', '.join(wrong)} not those of the request", rule="egress.metrics")
    for name, limits in declared.items():
        _check_range(name, reply.head[name], limits)
        _check_range(name, reply.head[name], policy.egress.metrics.get(name, (0, -1)))
    _check_slices(policy, run_manifest, reply)
    _check_body(run_manifest, reply)


def _check_fields(reply: Frame, figures: Any) -> None:
    """Exactly the record's fields, of their types."""
    try:
        from_head(egress.REPLIES[reply.kind], reply.head)
    except WireError as error:
        raise PolicyRefusedError(f"egress.metrics: {error}", rule="egress.metrics") from error
    told = {name for name, value in reply.head.items() if value is not None}
    extra = sorted(told - set(figures) - set(egress.NAMES))
    extra += [name for name in (*egress.AUDIT, *SIGNED) if reply.head.get(name)]  # the gatekeeper's, later
    if extra:
        raise PolicyRefusedError(f"egress.metrics: {', '.join(extra)} not declared", rule="egress.metrics")
    if missing := sorted(set(figures) - told):
        raise PolicyRefusedError(f"egress.metrics: {', '.join(missing)} declared and not told", rule="egress.metrics")


def _check_range(name: str, value: float, limits: tuple[float, float]) -> None:
    """One figure; its value is not repeated."""
    if not limits[0] <= value <= limits[1]:
        raise PolicyRefusedError(
            f"egress.metrics: {name} is not from {limits[0]:g} to {limits[1]:g}", rule="egress.metrics"
        )


def _check_slices(policy: Policy, run_manifest: RunManifest, reply: Frame) -> None:
    """No figure over fewer rows than the policy's slice: held-out ones, or those that the training loss is of."""
    head = reply.head
    if reply.kind == "metrics":
        counts = head["num_rows"], head["num_generated"]
    elif reply.kind == "update" and head["train_loss"] is not None:
        counts = head["num_examples"], head["num_steps"] * run_manifest.run.training.batch_size
    else:
        return
    smallest = min(filter(None, counts), default=0)
    if smallest < policy.evaluation.min_slice:
        raise PolicyRefusedError(
            f"evaluation.min_slice: a figure over {smallest} rows; the smallest slice is {policy.evaluation.min_slice}",
            rule="evaluation.min_slice",
        )


def _check_body(run_manifest: RunManifest, reply: Frame) -> None:
    """The tensors that the method trains in this round under an update, nothing under anything else."""
    if not any(exchange.has_tensors for exchange in EXCHANGES.values() if exchange.reply == reply.kind):
        if reply.body:
            raise PolicyRefusedError(f"egress: {len(reply.body)} bytes under '{reply.kind}'", rule="egress")
        return
    specs = run_manifest.plan.for_site(reply.head["site"]).sent(reply.head["round_index"])
    try:
        compact.decode_update(reply.body, specs, run_manifest.plan.wire)
    except (WireError, ModelError) as error:
        raise PolicyRefusedError(f"egress: {error}", rule="egress") from error


def _rounded_sum(total: float, num_terms: int, *, digits: int) -> float:
    """The sum whose mean is the rounded mean."""
    return round(round(total / num_terms, digits) * num_terms, digits)
