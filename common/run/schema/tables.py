"""The tables of the two files, each right by itself; `common.run.config` adds that they fit together.

What goes together is told by rules on these tables, so that no module of rules imports what calls it.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from common.run.schema.aggregation import AggregationConfig
from common.run.schema.export import ExportConfig
from common.run.schema.gate import GateConfig
from common.run.schema.model import AdapterConfig, LoraAdapter, ModelConfig
from common.run.schema.node import AgentConfig, HardwareConfig, LinkConfig, NodeDataConfig, NodeModelConfig, SiteConfig
from common.run.schema.polish import Stage, check_order
from common.run.schema.privacy import PrivacyConfig
from common.run.schema.section import Count, Line, RequiredLine, Section, Slug, Tables, refuse_look_alikes
from common.run.schema.tasks import EvaluationConfig
from common.run.schema.training import DataConfig, FederationConfig, TrainingConfig
from common.run.schema.wire import WireConfig


class OutputConfig(Section):
    """What is written at the coordinator."""

    folder: RequiredLine = Field(default="runs", description="Folder in which each run gets a folder of its own.")
    keep_checkpoints: Count = Field(default=0, description="Newest checkpoints that are kept. 0: all.")
    example_prompts: Line = Field(
        default="",
        description="Path of prompts that anybody may see, a column `prompt`: the report shows what base and exported "
        "adapter answer to the first eight. These texts are written into the run's folder; name no rows of people.",
    )


class RunTables(Section):
    """What stands in a run file."""

    version: Annotated[Literal[1], BeforeValidator(refuse_look_alikes)] = Field(description="Version of this format.")
    name: Slug = Field(default="run", description="Name of the run.")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Seed of all randomness that need not be secret.")
    model: ModelConfig
    adapter: Annotated[AdapterConfig, Field(discriminator="kind")] = Field(default_factory=LoraAdapter)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    federation: FederationConfig = Field(default_factory=FederationConfig)
    aggregation: AggregationConfig = Field(default_factory=AggregationConfig)
    privacy: Annotated[PrivacyConfig, Field(discriminator="mode")]
    wire: WireConfig = Field(default_factory=WireConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)
    polish: Annotated[Tables[Stage], AfterValidator(check_order)] = ()

    @property
    def evaluated_rounds(self) -> tuple[int, ...]:
        """After how many rounds the sites score the adapter; beyond the last one, polished adapters in their order.

        A site answers no other evaluation, and plans what these cost.
        """
        last, every = self.federation.num_rounds, self.evaluation.every_rounds
        polished = range(last + 1, last + 1 + self.evaluation.num_polish_stages)
        return (*sorted({0, last, *range(every, last, every)}), *polished)


class NodeTables(Section):
    """What stands in a site's own file."""

    site: SiteConfig
    data: NodeDataConfig
    model: NodeModelConfig = Field(default_factory=NodeModelConfig)
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)
    agent: AgentConfig = Field(default_factory=AgentConfig)
    link: LinkConfig = Field(default_factory=LinkConfig)
