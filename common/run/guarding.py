"""Which of two protections a run has: secure aggregation hides an update, robust aggregation has to look at it."""

from typing import Final

from common.run.schema.aggregation import AggregationConfig

SCREENED: Final = {
    "off": "",
    "report": "an update unlike the others is reported",
    "drop": "an update unlike the others is left out",
}
NO_SECURE_SUM: Final = "secure aggregation: off, so the coordinator sees each site's own update"


def in_words(settings: AggregationConfig) -> str:
    """Both, for sites and readers of a report; this version has no secure aggregation.

    Example:
        >>> in_words(AggregationConfig()).rpartition("; ")[2]
        'robust aggregation: off, so one bad site can move the adapter where it likes'
    """
    bound = settings.max_update_norm
    bounded = f"an update is scaled down to norm {bound:g}" if bound else ""
    others = " and ".join(filter(None, (bounded, SCREENED[settings.screening.action])))
    if settings.robust.rule == "none":
        off = f"off, but {others}" if others else "off, so one bad site can move the adapter where it likes"
        return f"{NO_SECURE_SUM}; robust aggregation: {off}"
    num_bad = settings.robust.num_bad_sites
    rule = f"{settings.robust.rule} against {num_bad} bad site{'s' * (num_bad > 1)}"
    return f"{NO_SECURE_SUM}; robust aggregation: {', and '.join(filter(None, (rule, others)))}"
