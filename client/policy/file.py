"""A site's policy: what it allows, in its own words, signed by its admin. Closed: what is not allowed is refused.

Only the schema and the way from file to record; `client.policy.rules` holds the rules against a run.
"""

import hashlib
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AfterValidator, Field, ValidationError

from common import storage
from common.errors import AuthError, ConfigError, PolicyRefusedError
from common.run import egress, reading
from common.run.catalogue.kinds import KindName
from common.run.catalogue.methods import MethodName
from common.run.problems import hints
from common.run.reading import Problem
from common.run.schema import section
from common.run.schema.section import Count, PositiveCount, RequiredLine, Section, Slug
from common.run.schema.shape import path_of
from common.run.schema.training import ObjectiveName
from common.trust import identity

PURPOSE: Final = "policy"
HASH: Final = r"^[0-9a-f]{64}$"
PATTERNS: Final = {**section.PATTERNS, HASH: "64 digits of 0-9 and a-f"}
SIGNATURE_SUFFIX: Final = ".sig"
FORBIDDEN: Final = ("embed_tokens", "lm_head", "modules_to_save", "bias", "embed_in", "embed_out", "wte", "wpe")


def _ordered(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("the first number must not be above the second")
    return limits


def _trainable(names: tuple[str, ...]) -> tuple[str, ...]:
    """Layers whose updates list the tokens that were seen can be allowed by nobody."""
    forbidden = sorted(name for name in names if any(part in name for part in FORBIDDEN))
    if forbidden:
        raise ValueError(f"{', '.join(forbidden)} can never be trained: such an update lists the tokens of the rows")
    return names


def _known(metrics: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """A figure that does not exist would be a rule without effect."""
    unknown = sorted(metrics.keys() - egress.RANGES.keys())
    if unknown:
        raise ValueError(f"no such figure: {', '.join(unknown)}; there are {', '.join(sorted(egress.RANGES))}")
    return metrics


Hash = Annotated[str, Field(pattern=HASH)]
Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
CountRange = Annotated[tuple[PositiveCount, PositiveCount], AfterValidator(_ordered)]
Targets = Annotated[tuple[str, ...], AfterValidator(_trainable)]
Demand = Literal["required", "none"]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class FederationRules(Section):
    """Whose runs are considered."""

    id: Slug = Field(description="The federation's id.")
    operators: tuple[Hash, ...] = Field(
        description="Public keys whose signature on a run counts. Where the roster names operators, a run needs one of "
        "those; keys here narrow them down, and none here means all of them."
    )
    roster_epoch_min: Count = Field(
        default=0, description="Oldest roster that is accepted. 0: the agent may do without a roster."
    )


class BaseRules(Section):
    """One base model that may be trained on."""

    name: RequiredLine = Field(description="What people call it.")
    sha256: Hash = Field(description="Hash of its files.")
    quantization: tuple[Literal["none", "int8", "nf4"], ...] = Field(default=("none", "int8", "nf4"))
    chat_template: tuple[Literal["tokenizer", "chatml", "alpaca"], ...] = Field(default=("tokenizer",))


class ModelsRules(Section):
    """Bases."""

    allow: tuple[BaseRules, ...] = Field(description="None: no run can pass.")


class LoraRules(Section):
    """What may be trained of a base."""

    targets: Targets = Field(description="Layers by the last part of their name.")
    r: CountRange = Field(description="Ranks, lowest and highest.")
    alpha: Range = Field(default=(1.0, 1024.0), description="Values of `adapter.alpha`, lowest and highest.")
    scale: Range = Field(
        default=(0.05, 64.0),
        description="What the factors' product is multiplied by: `alpha / r`, or `alpha / sqrt(r)` under "
        "`adapter.use_rslora`. Near 0, gradients vanish beside `training.optimizer.epsilon`.",
    )
    max_dropout: BelowOne = Field(default=0.5, description="Highest `adapter.dropout`.")
    residual_r: Count = Field(default=0, description="Highest rank of a side adapter, frozen here. 0: none.")


class AdapterRules(Section):
    """Kinds of adapters beside plain LoRA; `lora.targets` holds for all that stand on layers, norms aside."""

    kinds: tuple[KindName, ...] = Field(
        default=("lora",),
        description="What may be trained. `full` and `ln_tuning` send changes of the base's own weights.",
    )
    max_parameters: int = Field(
        default=0,
        ge=0,
        description="Most values of an adapter of another kind than `lora`. 0: none, so no such run can pass.",
    )


class TrainRules(Section):
    """Floors and ceilings of the local training; an update must be the sum of many steps over many rows."""

    learning_rate: Range = Field(
        description="The peak may not be above the second number, nor the mean rate of any round below the first, "
        "whatever the schedule: a rate near 0 hands out raw gradients."
    )
    min_local_steps: PositiveCount = Field(default=20)
    max_local_steps: PositiveCount = Field(default=10_000)
    min_batch_size: PositiveCount = Field(default=4)
    min_records: PositiveCount = Field(default=500)
    max_rounds: PositiveCount
    max_length_tokens: PositiveCount
    max_warmup_fraction: BelowOne = Field(default=0.2, description="A warm-up is a rate near 0.")
    max_pull: BelowOne = Field(
        default=0.1,
        description="Share of the way back that a step may go under `aggregation.proximal` and "
        "`training.optimizer.weight_decay` together; near 1 only the last step's gradient would leave.",
    )
    adam_beta1: Range = Field(
        default=(0.5, 0.999), description="Decay of AdamW's first moment. 0: each step is one batch's gradient."
    )
    adam_beta2: Range = Field(default=(0.9, 0.99999), description="Decay of AdamW's second moment.")
    max_adam_epsilon: Positive = Field(
        default=1e-7, description="Far above the gradients, AdamW hands them out as they are."
    )
    max_momentum: BelowOne = Field(default=0.99, description="Of SGD.")
    min_grad_norm: NotNegative = Field(
        default=0.01,
        description="Lowest `training.max_grad_norm` but 0, which is no clipping: shorter gradients vanish beside "
        "`training.optimizer.epsilon`.",
    )
    beta: Range = Field(default=(0.01, 10.0), description="`training.objective.beta` of preferences.")
    max_label_smoothing: float = Field(default=0.3, ge=0, lt=0.5, description="Of preferences.")
    answer_weights: Range = Field(
        default=(0.1, 10.0),
        description="`training.objective.desirable_weight` and `training.objective.undesirable_weight`.",
    )
    max_tensor_norm: Positive = Field(default=1000.0, description="Of each tensor of the global adapter.")
    max_move: Positive = Field(
        default=4.0,
        description="How far a value of the global adapter may move in a round, as a multiple of how far this site's "
        "own steps could move it. Above 1 where sites make more steps than this one, as rounds counted in epochs may.",
    )
    min_spread: Share = Field(
        default=0.1,
        description="Over how many of its steps a round's gradients must be spread, as a share: (sum of norms)^2 / sum "
        "of squares / steps. One row that alone has a gradient leaves the share of the steps that read it. Not for "
        "runs that protect units, whose noise covers one.",
    )
    min_answering: Share = Field(
        default=0.1,
        description="Share of a round's rows to which each direction of a LoRA down-projection must answer: (sum of "
        "the rows' energies)^2 / sum of squares / rows. One row that alone answers leaves 1 / rows. Not for runs that "
        "protect units.",
    )
    optimizers: tuple[Literal["adamw", "sgd"], ...] = Field(default=("adamw",))
    objectives: tuple[ObjectiveName, ...] = Field(
        default=("sft",), description="What may be learnt: answers (`sft`), or preferences among them (`dpo`, `kto`)."
    )
    methods: tuple[MethodName, ...] = Field(
        default=("fedavg", "ffa", "fedsvd", "rolora", "flexlora"),
        description="How updates may be aggregated; the method says which factors leave.",
    )


class PrivacyRules(Section):
    """What must protect an update; this version has no secure aggregation, so `required` there refuses every run."""

    mode: Demand = Field(description="Differential privacy.")
    secagg: Demand = Field(description="Secure aggregation.")
    site_level: tuple[Literal["server", "sites"], ...] = Field(
        default=(),
        description="Where noise for whole sites (`privacy.mode = site`) may be added in the place of noise for units. "
        "None: where `mode` is `required`, only noise for units will do.",
    )
    max_epsilon: Positive = Field(default=8.0)
    dp_delta: float = Field(default=1e-6, gt=0, lt=1)
    min_noise_multiplier: Positive = Field(default=0.8)
    max_clip_norm: Positive = Field(default=1.0)
    count_noise: Positive = Field(
        default=10.0,
        description="Where `mode` is `required`: standard deviation of the noise on the numbers of units to train on "
        "and held out, which a run that protects units gets once. Charged.",
    )


class CohortRules(Section):
    """How many sites an aggregate must come from."""

    min_sites: PositiveCount


class DatasetRules(Section):
    """Rows that may be read."""

    path: RequiredLine
    columns: tuple[str, ...] = Field(min_length=1)
    max_rows: PositiveCount


class DataRules(Section):
    """Rows, and texts that a coordinator may put around them."""

    datasets: dict[Slug, DatasetRules] = Field(description="Each by a name of its own.")
    system_prompts: tuple[str, ...] = Field(default=("",), description="Exactly these; the empty one is none.")


class EvaluationRules(Section):
    """What may be reported of held-out rows."""

    min_slice: int = Field(default=50, ge=1, description="Fewest rows behind a figure.")
    round_metrics_to: int = Field(default=3, ge=0, le=6, description="Decimal digits of a figure that leaves.")
    noise_multiplier: NotNegative = Field(
        default=0.0,
        description="Where `privacy.mode` is `required`: noise on each held-out figure over what one unit can add to "
        "it. Charged for every evaluation that a run plans. 0: no held-out figure leaves.",
    )
    max_loss: Positive = Field(
        default=10.0, description="Largest mean loss of a unit in such a figure, nats; higher ones count as this."
    )
    max_polish_move: NotNegative = Field(
        default=1.0,
        description="How far a polished adapter may be from the last round's, as a multiple of how far all rounds "
        "together could have moved it. 0: no polished adapter is scored.",
    )
    generations_leave: Literal[False] = Field(default=False, description="No version lets answers leave.")


class EgressRules(Section):
    """How much may leave."""

    max_bytes_per_message: int = Field(ge=1)
    max_bytes_per_run: int = Field(ge=1)
    metrics: Annotated[dict[str, Range], AfterValidator(_known)] = Field(description="Figures, with their ranges.")


class RunsRules(Section):
    """How many runs, and who says yes."""

    max_per_day: PositiveCount
    approval: Literal["every_run", "changed_runs", "none"] = Field(
        default="every_run",
        description="`changed_runs`: a run that differs from one approved before in name and seed only needs no other "
        "approval. `none`: whatever this policy allows may run.",
    )


class Policy(Section):
    """What this site allows."""

    version: Literal[1]
    serial: Count = Field(description="Raised with every edit; the agent does not start with an older one.")
    federation: FederationRules
    models: ModelsRules
    lora: LoraRules
    adapter: AdapterRules = Field(default_factory=AdapterRules)
    train: TrainRules
    privacy: PrivacyRules
    cohort: CohortRules
    data: DataRules
    evaluation: EvaluationRules = Field(default_factory=EvaluationRules)
    egress: EgressRules
    runs: RunsRules


@dataclass(frozen=True)
class SignedPolicy:
    """A policy whose signature was found right."""

    rules: Policy
    sha256: str


def load(path: Path, *, signer: str) -> SignedPolicy:
    """Read a policy and its signature, `PATH.sig`.

    Args:
        signer: Public key of the site's admin, 64 hexadecimal digits.

    Raises:
        ConfigError: A file is missing, or the policy has problems; the message lists all of them.
        PolicyRefusedError: The signature does not fit: the policy was edited and not signed again.
    """
    text = reading.read(path)
    data = text.encode()
    try:
        signature = reading.read(signature_path(path)).strip()
        identity.verify(signer, signature, data, purpose=PURPOSE)
    except AuthError as error:
        raise PolicyRefusedError(
            f"{path} is not what its admin signed; check it and run: silotune-client sign-policy {path} --key KEY",
            rule="signature",
        ) from error
    return SignedPolicy(parse(text, name=str(path)), hashlib.sha256(data).hexdigest())


def sign(path: Path, key: Ed25519PrivateKey) -> Policy:
    """Check a policy and write its signature beside it, `PATH.sig`.

    Raises:
        ConfigError: The policy has problems.
    """
    text = reading.read(path)
    rules = parse(text, name=str(path))
    signature = identity.sign(key, text.encode(), purpose=PURPOSE)
    storage.write_atomic(signature_path(path), f"{signature}\n".encode())
    return rules


def shortcomings(rules: Policy) -> list[str]:
    """Lists of a policy that nobody has filled in yet, and what each means: it is valid, and allows nothing."""
    empty = {
        "models.allow": not rules.models.allow,
        "lora.targets": not rules.lora.targets,
        "data.datasets": not rules.data.datasets,
    }
    return [
        f"{key} is empty, so {'the agent does not start' if key == 'data.datasets' else 'no run can pass'}"
        for key, is_empty in empty.items()
        if is_empty
    ]


def parse(text: str, *, name: str) -> Policy:
    """Check the text of a policy; `name` is what messages call it.

    Raises:
        ConfigError: All problems, one a line.
    """
    try:
        table = tomllib.loads(text)
        problems, json_text = reading.unfilled(table), json.dumps(table, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{name} is not a policy in TOML: {error}") from None
    try:
        rules = Policy.model_validate_json(json_text)
        if not problems:
            return rules
    except ValidationError as error:
        unfilled = [problem.key for problem in problems]
        for detail in error.errors(include_url=False):
            key = path_of(detail["loc"], {})
            message: Callable[[], str] = partial(hints.wrong, key, dict(detail), patterns=PATTERNS)
            if detail["type"] == "extra_forbidden":  # the value of an unknown rule is not repeated
                message = partial(str, "there is no such rule; the policy of a startup kit has all of them")
            elif detail["type"] == "tuple_type":
                message = partial(str, f"must be an array (you wrote {hints.show_value(detail['input'])})")
            if key not in unfilled:
                problems.append(Problem(key, message))
    raise ConfigError(reading.report(problems, text, name=name)) from None


def signature_path(path: Path) -> Path:
    """Path of a policy's signature."""
    return path.with_name(path.name + SIGNATURE_SUFFIX)
