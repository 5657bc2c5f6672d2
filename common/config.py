"""RunConfig (the run file) and NodeConfig (a site's own file): the only schemas, and how they are loaded.

Both are frozen, strict (no value is converted from another type) and closed (an unknown key is an error). A setting
has one home and one unit; what is derived from settings is a property. Nothing here looks at disk or hardware.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from common import config_file, config_rules
from common.config_aggregation import AggregationConfig
from common.config_privacy import PrivacyConfig
from common.config_types import (
    PATTERNS,
    TARGETS,
    Count,
    Decay,
    Line,
    Mebibytes,
    PositiveCount,
    RequiredLine,
    Seconds,
    Section,
    Sha256,
    Slug,
    refuse_look_alikes,
)


class ModelConfig(Section):
    """The base model that every site must hold, and the precision in which it is used."""

    base: RequiredLine = Field(
        description="The base model: a folder, a name in the local store such as `smollm2`, `embedded`, or a hub id."
    )
    revision: Line = Field(default="", description="Commit or tag; only for a hub id. Empty: the newest.")
    sha256: Sha256 = Field(default="", description="Expected SHA-256 of the base's files. Empty: any.")
    quantization: Literal["none", "int8", "nf4"] = Field(
        default="nf4", description="Storage of the frozen base's weights: as they are, 8-bit or 4-bit NormalFloat."
    )
    double_quantization: bool = Field(default=True, description="Quantise the quantiser's scales too; `nf4` only.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Compute type. `auto`: bfloat16 on CUDA, float32 on CPU."
    )
    chat_template: Literal["tokenizer", "chatml", "alpaca"] = Field(
        default="tokenizer", description="How a row becomes a prompt. `tokenizer`: the template that the base brings."
    )


class AdapterConfig(Section):
    """The low-rank adapter: all that is trained and all that travels."""

    kind: Literal["lora"] = Field(default="lora", description="Kind of adapter.")
    r: int = Field(default=16, ge=1, le=512, description="Rank of the adapter's two factors.")
    alpha: float = Field(
        default=32.0, gt=0, le=65536, description="Scale: the factors' product is multiplied by `alpha / r`."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of the adapter's inputs zeroed in training.")
    targets: str = Field(
        default="all-linear",
        pattern=TARGETS,
        max_length=4096,
        description="Layers that get an adapter: `all-linear` (all but the output head) or module names with commas.",
    )
    use_rslora: bool = Field(default=False, description="Multiply by `alpha / sqrt(r)` instead of `alpha / r`.")

    @property
    def scale(self) -> float:
        """What the factors' product is multiplied by."""
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The module names in `targets`, in the order written; `("all-linear",)` for the default."""
        return tuple(name.strip() for name in self.targets.split(","))


class DataConfig(Section):
    """The rows: where a simulation takes them from, and how rows become examples at every site."""

    source: RequiredLine = Field(
        default="embedded",
        description="Simulations only (a site's path is in its own file): a JSONL, JSON, CSV or Parquet file or a "
        "folder of them, a `datasets` id, or `embedded`.",
    )
    partition: Literal["column", "iid", "dirichlet"] = Field(
        default="column",
        description="Simulations only: how rows become sites: by `site_column`, evenly at random, or skewed.",
    )
    num_sites: Count = Field(
        default=0, description="Simulations only: number of sites. 0: one per value of `site_column`."
    )
    dirichlet_alpha: float = Field(
        default=0.5, gt=0, le=1_000_000, description="Skew of `dirichlet`; smaller means sites differ more."
    )
    site_column: Line = Field(default="site", description="Simulations only: the column that names a row's site.")
    unit_column: Line = Field(
        default="patient_id",
        description="Column of the unit, such as a patient. Rows of one unit are never split between training and "
        "held-out. Empty: each row is its own unit.",
    )
    instruction_column: RequiredLine = Field(default="instruction", description="Column of the task or question.")
    input_column: RequiredLine = Field(
        default="input", description="Column of the text that the task is about; may be empty in a row."
    )
    output_column: RequiredLine = Field(default="output", description="Column of the wanted answer.")
    held_out_fraction: float = Field(
        default=0.2, gt=0, lt=0.9, description="Share of a site's units kept for evaluation, never trained on."
    )
    max_length_tokens: int = Field(
        default=512, ge=8, le=1_048_576, description="Longest example, prompt and answer together, in tokens."
    )
    too_long: Literal["truncate", "drop", "error"] = Field(
        default="error", description="What happens to an example over `max_length_tokens`."
    )
    system_prompt: str = Field(default="", max_length=65536, description="System message before every example.")


class TrainingConfig(Section):
    """What a site does in one round, and the optimizer that does it."""

    local_epochs: float = Field(
        default=1.0,
        ge=0,
        le=1000,
        description="Passes over a site's training rows per round; 0.5 is half of them. Leave it out (it is then 0) "
        "where `local_steps` is set.",
    )
    local_steps: Count = Field(default=0, description="Optimizer steps per round. 0: `local_epochs` decides.")
    batch_size: int = Field(default=8, ge=1, le=65536, description="Rows per optimizer step.")
    micro_batch_size: int = Field(
        default=0, ge=0, le=65536, description="Rows in memory at once; divides `batch_size`. 0: `batch_size`."
    )
    learning_rate: float = Field(default=2e-4, gt=0, le=100, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="Learning rate over the whole run, all rounds together."
    )
    warmup_fraction: Decay = Field(default=0.0, description="Share of the whole run in which the rate rises from 0.")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="Optimizer at the sites.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Decay of weights: decoupled under `adamw`, part of the gradient under `sgd`.",
    )
    adam_beta1: Decay = Field(default=0.9, description="`adamw` only: decay of the first moment.")
    adam_beta2: Decay = Field(default=0.999, description="`adamw` only: decay of the second moment.")
    adam_epsilon: float = Field(default=1e-8, gt=0, le=1, description="`adamw` only: added to the denominator.")
    momentum: Decay = Field(default=0.0, description="`sgd` only: momentum.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, le=1_000_000, description="Gradients are scaled to this L2 norm at most. 0: no clipping."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about a third more time."
    )

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_epochs(cls, table: Any) -> Any:
        """Let `local_steps` alone decide where `local_epochs` was left out, and say so in the resolved values."""
        if not isinstance(table, dict) or "local_epochs" in table or not config_rules.is_positive(table, "local_steps"):
            return table
        return {**table, "local_epochs": 0.0}


class FederationConfig(Section):
    """Rounds, and which sites take part in them."""

    num_rounds: int = Field(default=10, ge=1, le=100_000, description="Rounds in the run.")
    sites_per_round: Count = Field(default=0, description="Sites drawn for each round. 0: all.")
    min_sites: PositiveCount = Field(default=2, description="Fewest valid updates with which a round counts.")
    round_timeout_s: Seconds = Field(default=3600.0, description="Longest wait for a round's updates, in seconds.")
    join_timeout_s: Seconds = Field(default=600.0, description="Longest wait for sites at the start, in seconds.")
    num_sites: Count = Field(
        default=0, description="Sites to wait for at the start. 0: whoever has connected, at least `min_sites`."
    )


class WireConfig(Section):
    """What travels."""

    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="Type of the deltas that go up. The adapter always goes down in float32."
    )
    max_update_mib: Mebibytes = Field(default=600, description="Largest update that is accepted, in MiB.")


class EvaluationConfig(Section):
    """What is measured on held-out rows, and how often."""

    every_rounds: PositiveCount = Field(default=1, description="Evaluate after every so many rounds.")
    server_data: Line = Field(default="", description="Path of the coordinator's own held-out rows. Empty: none.")
    batch_size: int = Field(default=16, ge=1, le=65536, description="Rows in memory at once in evaluation.")
    exact_match_rows: Count = Field(
        default=0, description="Held-out rows per site that are answered by generation at the end. 0: none."
    )
    max_new_tokens: int = Field(default=32, ge=1, le=65536, description="Longest generated answer, in tokens.")


class OutputConfig(Section):
    """What is written at the coordinator."""

    folder: RequiredLine = Field(default="runs", description="Folder in which each run gets a folder of its own.")
    keep_checkpoints: Count = Field(default=0, description="Newest checkpoints that are kept. 0: all.")


PRIVATE_METHOD: Final = "fedsvd"


class RunConfig(Section):
    """One whole run: the file that a coordinator writes and every site can read."""

    version: Annotated[Literal[1], BeforeValidator(refuse_look_alikes)] = Field(description="Version of this format.")
    name: Slug = Field(default="run", description="Name of the run.")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Seed of all randomness that need not be secret.")
    model: ModelConfig
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    federation: FederationConfig = Field(default_factory=FederationConfig)
    aggregation: AggregationConfig = Field(default_factory=AggregationConfig)
    privacy: PrivacyConfig
    wire: WireConfig = Field(default_factory=WireConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)

    @model_validator(mode="before")
    @classmethod
    def _private_runs_refactor(cls, table: Any) -> Any:
        """Let a private run that names no method use `fedsvd`, whose product of factors carries no noise squared."""
        if not isinstance(table, dict) or not config_rules.is_private(table):
            return table
        aggregation = table.get("aggregation", {})
        if not isinstance(aggregation, dict) or "method" in aggregation:
            return table
        return {**table, "aggregation": {**aggregation, "method": PRIVATE_METHOD}}

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        """Refuse values that are fine alone and contradict each other."""
        config_rules.check(self, config_rules.RUN_RULES)
        return self


class SiteConfig(Section):
    """Who this site is."""

    name: Slug = Field(description="The site's name.")


class NodeDataConfig(Section):
    """This site's rows. They never leave it."""

    path: RequiredLine = Field(description="A JSONL, JSON, CSV or Parquet file, or a folder of them.")
    held_out_path: Line = Field(
        default="", description="Own held-out rows, instead of the run's `data.held_out_fraction`. Empty: none."
    )
    instruction_column: RequiredLine = Field(default="instruction", description="Column of the task or question.")
    input_column: RequiredLine = Field(
        default="input", description="Column of the text that the task is about; may be empty in a row."
    )
    output_column: RequiredLine = Field(default="output", description="Column of the wanted answer.")
    unit_column: Line = Field(
        default="patient_id", description="Column of the unit, such as a patient. Empty: each row is its own unit."
    )


class NodeModelConfig(Section):
    """Where this site keeps base models."""

    store: Line = Field(default="", description="Folder with base models. Empty: the user's default store.")
    base: Line = Field(default="", description="Folder of the base, if it is not in the store. Empty: the store.")


class HardwareConfig(Section):
    """What this site trains on."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device. `auto`: CUDA where there is one, else CPU."
    )
    num_threads: int = Field(default=0, ge=0, le=4096, description="CPU threads. 0: all cores.")


class AgentConfig(Section):
    """The process that holds this site's data and base model."""

    socket: RequiredLine = Field(
        default="/run/silotune/agent.sock", description="Unix socket on which the courier reaches the agent."
    )
    courier_group: Line = Field(default="", description="Unix group of the courier, which may open the socket too.")
    log_folder: RequiredLine = Field(default="/var/lib/silotune", description="Folder of the agent's own log.")
    max_message_mib: Mebibytes = Field(default=600, description="Largest message on the socket, in MiB.")
    policy: Line = Field(default="", description="This site's signed policy. Empty: every run is taken.")
    policy_signer: Sha256 = Field(default="", description="Public key of the admin who signs the policy, 64 digits.")
    identity_key: Line = Field(default="", description="Private key of this site (Ed25519, PEM); signs the audit log.")
    roster_folder: Line = Field(
        default="", description="Folder with the installed federation.json and roster.json. Empty: no roster is read."
    )


class NodeConfig(Section):
    """One site: what the coordinator must never decide. The file stays at the site."""

    site: SiteConfig
    data: NodeDataConfig
    model: NodeModelConfig = Field(default_factory=NodeModelConfig)
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)
    agent: AgentConfig = Field(default_factory=AgentConfig)

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        """Refuse values that are fine alone and contradict each other."""
        config_rules.check(self, config_rules.NODE_RULES)
        return self


RUN_FILE = config_file.Format(
    RunConfig, rules=config_rules.RUN_RULES, patterns=PATTERNS, other=NodeConfig, other_name="a site's own file"
)
NODE_FILE = config_file.Format(
    NodeConfig, rules=config_rules.NODE_RULES, patterns=PATTERNS, other=RunConfig, other_name="the run file"
)
_NO_OVERRIDES: Mapping[str, str] = {}


def load(path: Path, *, overrides: Mapping[str, str] = _NO_OVERRIDES) -> RunConfig:
    """Read a run file.

    Args:
        path: A TOML file.
        overrides: Settings that win over the file: `section.key` to a TOML value; a bare word counts as a string.

    Returns:
        The settings, defaults filled in.

    Raises:
        ConfigError: The file cannot be read, or it has problems; the message lists all of them.
    """
    return parse(config_file.read(path), name=str(path), overrides=overrides)


def load_node(path: Path) -> NodeConfig:
    """Read a site's own file; see `load`."""
    return parse_node(config_file.read(path), name=str(path))


def parse(text: str, *, name: str, overrides: Mapping[str, str] = _NO_OVERRIDES) -> RunConfig:
    """Check the text of a run file; `name` is what messages call it. See `load`.

    Example:
        >>> text = 'version = 1\\n[model]\\nbase = "embedded"\\n[privacy]\\nmode = "none"'
        >>> parse(text, name="run.toml", overrides={"adapter.r": "8"}).adapter.r
        8
    """
    return config_file.parse(text, RUN_FILE, name=name, overrides=overrides)


def parse_node(text: str, *, name: str) -> NodeConfig:
    """Check the text of a site's own file; `name` is what messages call it. See `load`."""
    return config_file.parse(text, NODE_FILE, name=name, overrides=_NO_OVERRIDES)


def resolved_json(config: RunConfig | NodeConfig) -> str:
    """Write every setting, defaults included, as canonical JSON: sorted keys, no spaces, ASCII.

    Example:
        >>> resolved_json(NodeConfig(site=SiteConfig(name="north"), data=NodeDataConfig(path="rows.jsonl")))[:43]
        '{"agent":{"courier_group":"","identity_key"'
    """
    return json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(config: RunConfig | NodeConfig) -> str:
    """Hash the resolved settings: equal for two files that mean the same, however they are written."""
    return hashlib.sha256(resolved_json(config).encode("ascii")).hexdigest()
