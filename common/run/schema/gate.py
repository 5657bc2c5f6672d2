"""Section `[gate]` of the run file: what an adapter must show before it is exported."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from common.run.schema.section import Count, PositiveCount, RequiredLine, Section, Tables

Share = Annotated[float, Field(ge=0, le=1)]
Nats = Annotated[float, Field(ge=0, le=100)]
_KIND: Any = Field(description="What must hold.")


class ProbesRule(Section):
    """No figure of a task of kind `probe` is worse than the base's on the same rows by more."""

    kind: Literal["probes"] = _KIND
    max_drop: Share = Field(default=0.01, description="How far below the base each may be. 0.01: one point.")


class BaselineRule(Section):
    """In each task with a prompt-only baseline, probes aside, no figure is worse, and one is better by more."""

    kind: Literal["baseline"] = _KIND
    min_gain: Share = Field(default=0.0, description="By how much one figure must be better.")


class SitesRule(Section):
    """No site's held-out loss is above the base's there, nor above its own alone where that was compared, by more."""

    kind: Literal["sites"] = _KIND
    max_rise: Nats = Field(default=0.0, description="How far above it may be, nats.")


class LossRule(Section):
    """The sites' held-out loss is below the base's by more, with and without the best and the worst site."""

    kind: Literal["loss"] = _KIND
    min_gain: Nats = Field(default=0.0, description="By how much it must be below, nats.")


class SchemaRule(Section):
    """More answers than this meet their JSON schema."""

    kind: Literal["schema"] = _KIND
    min_valid: Share = Field(default=0.99, description="The share that must be exceeded.")


class ExposureRule(Section):
    """Canaries are exposed by less, in a measure that could have shown more."""

    kind: Literal["exposure"] = _KIND
    max_exposure: Annotated[float, Field(ge=0, le=64)] = Field(
        default=5.0, description="What a figure `exposure` must be below, bits."
    )


class ExtractionRule(Section):
    """No more canaries are written out by the model."""

    kind: Literal["extraction"] = _KIND
    max_extracted: Share = Field(default=0.0, description="The share that is allowed.")


class PiiRule(Section):
    """No more answers hold personal data."""

    kind: Literal["pii"] = _KIND
    max_emission: Share = Field(default=0.0, description="The share that is allowed.")


class AuditRule(Section):
    """The audited lower bound of epsilon is not above the run's claim; of an audit of this very claim and delta."""

    kind: Literal["audit"] = _KIND
    file: RequiredLine = Field(description="Path of what `silotune-sim audit ... --json` wrote.")


class FigureRule(Section):
    """Any figure of the evaluation, such as `notes.rougeL`, against a limit."""

    kind: Literal["figure"] = _KIND
    figure: RequiredLine = Field(description="Its name, as in the event `measured`.")
    bound: Literal["min", "max"] = Field(description="Whether it must be at least the limit, or at most.")
    limit: float = Field(ge=-1e9, le=1e9, description="In the figure's own unit; the limit itself is allowed.")


GateRule = Annotated[
    ProbesRule
    | BaselineRule
    | SitesRule
    | LossRule
    | SchemaRule
    | ExposureRule
    | ExtractionRule
    | PiiRule
    | AuditRule
    | FigureRule,
    Field(discriminator="kind"),
]


class GateConfig(Section):
    """What an adapter must show before it is exported; fixed before training. Sites are never told of it."""

    evidence: Literal["estimate", "interval"] = Field(
        default="estimate",
        description="What is held against limits of the coordinator's figures: the figure itself, or the end of its "
        "interval of 95 % that is worse.",
    )
    min_rows: PositiveCount = Field(
        default=30, description="A figure of fewer rows of the coordinator's shows nothing: its rule is not met."
    )
    stop_after: Count = Field(
        default=0,
        description="End the rounds after so many evaluations in a row that show harm or no lower held-out loss. "
        "0: never.",
    )
    rules: Tables[GateRule] = Field(
        default=(), description="What must hold, all of it; see docs/gate.md. None: no gate."
    )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its rules, in their order."""
        return tuple(rule.kind for rule in self.rules)

    @model_validator(mode="after")
    def _each_kind_once(self) -> Self:
        """Two limits of one kind would be one; figures have one each."""
        named = [kind for kind in self.kinds if kind != "figure"]
        if twice := [kind for number, kind in enumerate(named) if kind in named[:number]]:
            raise ValueError(f"two of [[gate.rules]] are of kind {twice[0]}; remove one")
        return self
