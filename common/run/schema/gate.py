"""Section `[gate]` of the run file: what an adapter must show before it is exported."""

from typing import Annotated, Final, Literal

from pydantic import Field

from common.run.schema.section import GATE_RULES, Count, Line, PositiveCount, RequiredLine, Section, Tables
from common.run.schema.tasks import split_names

Share = Annotated[float, Field(ge=0, le=1)]
LIMITS: Final[dict[str, tuple[str, ...]]] = {  # the settings of each rule; one that is not named must not be set
    "probes": ("max_probe_drop",),
    "baseline": ("min_baseline_gain",),
    "sites": ("max_site_rise",),
    "loss": ("min_loss_gain",),
    "schema": ("min_schema_valid",),
    "exposure": ("max_exposure",),
    "extraction": ("max_extracted",),
    "pii": ("max_pii_emission",),
    "audit": ("audit_file",),
}


class FigureLimit(Section):
    """A limit for any figure of the evaluation, such as `notes.rougeL`; each must hold."""

    figure: RequiredLine = Field(description="Its name, as in the event `measured`.")
    bound: Literal["min", "max"] = Field(description="Whether it must be at least the limit, or at most.")
    limit: float = Field(ge=-1e9, le=1e9, description="In the figure's own unit; the limit itself is allowed.")


class GateConfig(Section):
    """What an adapter must show before it is exported; fixed before training. Sites are never told of it."""

    rules: str = Field(
        default="",
        pattern=GATE_RULES,
        max_length=4096,
        description="What must hold: `probes`, `baseline`, `sites`, `loss`, `schema`, `exposure`, `extraction`, `pii`, "
        "`audit`; see docs/gate.md. Empty: no gate, unless `figures` has limits.",
    )
    evidence: Literal["estimate", "interval"] = Field(
        default="estimate",
        description="What is held against limits of the coordinator's figures: the figure itself, or the end of its "
        "interval of 95 % that is worse.",
    )
    min_rows: PositiveCount = Field(
        default=30, description="A figure of fewer rows of the coordinator's shows nothing: its rule is not met."
    )
    max_probe_drop: Share = Field(
        default=0.01, description="With `probes`: how far below the base each probe's figure may be. 0.01: one point."
    )
    min_baseline_gain: Share = Field(
        default=0.0, description="With `baseline`: each figure must be better than the prompt-only one by more."
    )
    max_site_rise: Annotated[float, Field(ge=0, le=100)] = Field(
        default=0.0, description="With `sites`: how far a site's held-out loss may be above the base's there, nats."
    )
    min_loss_gain: Annotated[float, Field(ge=0, le=100)] = Field(
        default=0.0, description="With `loss`: the sites' held-out loss must be below the base's by more, nats."
    )
    min_schema_valid: Share = Field(
        default=0.99, description="With `schema`: the share of answers that meet their JSON schema must be above."
    )
    max_exposure: Annotated[float, Field(ge=0, le=64)] = Field(
        default=5.0, description="With `exposure`: a figure `exposure` of canaries must be below, bits."
    )
    max_extracted: Share = Field(
        default=0.0, description="With `extraction`: share of canaries that may be written out by the model."
    )
    max_pii_emission: Share = Field(
        default=0.0, description="With `pii`: share of answers with personal data that is allowed."
    )
    audit_file: Line = Field(
        default="", description="With `audit`: path of what `silotune-sim audit ... --json` wrote. Empty: none."
    )
    stop_after: Count = Field(
        default=0,
        description="End the rounds after so many evaluations in a row that show harm or no lower held-out loss. "
        "0: never.",
    )
    figures: Tables[FigureLimit] = Field(default=(), description="Limits for figures by name.")

    @property
    def rule_names(self) -> tuple[str, ...]:
        """The names in `rules`, each once, in the order written."""
        return split_names(self.rules)

    @property
    def is_on(self) -> bool:
        """Whether an adapter must show anything."""
        return bool(self.rules or self.figures)

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings that could have no effect."""
        named = self.rule_names
        unused = [key for rule, keys in LIMITS.items() if rule not in named for key in keys]
        unused += [] if self.is_on else ["evidence", "min_rows"]
        return tuple(key for key in unused if getattr(self, key) != type(self).model_fields[key].default)
