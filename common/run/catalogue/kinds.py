"""What holds of each kind of adapter, as data: run file, server, sites, policy and pages read it; loads no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

KindName = Literal[
    "lora", "dora", "adalora", "ia3", "ln_tuning", "full", "prompt_tuning", "prefix_tuning", "p_tuning",
]  # fmt: skip
Quantization = Literal["none", "int8", "nf4"]
ALL: Final[tuple[Quantization, ...]] = ("none", "int8", "nf4")


@dataclass(frozen=True)
class Kind:
    """What holds of a kind of adapter; what may be combined with it follows from these (`common.run.rules.kinds`).

    Attributes:
        name: As in `adapter.kind`.
        title: As in its paper.
        source: Paper.
        rule: What is trained, in a line.
        tensors: Pattern of what follows a module's name in a tensor's, or of the whole name where no module is touched.
        layers: What it stands on: linear layers by `adapter.targets`, norms, both, or none (`input`).
        inexact: Why the mean of its tensors is not the mean of what they do to the model; empty: it is, being linear.
        bases: Quantisations of the base that it is sound on.
        float32_on: Quantisations on which it computes in float32 only.
        starts_from_base: Whether its start is read off the base's weights, and so differs between precisions of it.
        is_mergeable: Whether it can be added to the base's weights, as merged, quantised and GGUF exports need.
        nearest: Kinds to take where this one is refused, nearest first.
    """

    name: KindName
    title: str
    source: str
    rule: str
    tensors: str
    layers: Literal["linear", "norms", "both", "input"] = "linear"
    inexact: str = ""
    bases: tuple[Quantization, ...] = ALL
    float32_on: tuple[Quantization, ...] = ()
    starts_from_base: bool = False
    is_mergeable: bool = True
    nearest: tuple[KindName, ...] = ("lora",)

    @property
    def has_factors(self) -> bool:
        """Whether it is a plain pair A and B, which methods, stacked clipping and the canonical export act on."""
        return self.name == "lora"


_TABLE: Final = (
    Kind(
        name="lora",
        title="LoRA, rsLoRA",
        source="arXiv:2106.09685",
        rule="W0 + s B A",
        tensors=r"(lora_[ABH]|residual_[AB])\.weight",
        inexact="the product of the means is not the mean of the products; the gap is shown, and exact methods exist",
        nearest=("lora",),
    ),
    Kind(
        name="dora",
        title="DoRA",
        source="arXiv:2402.09353",
        rule="LoRA's direction, and a length for each output",
        tensors=r"lora_([AB]|magnitude_vector)\.weight",
        inexact="the weight is a product, divided by its own length",
        starts_from_base=True,
        bases=("none", "nf4"),
        nearest=("lora",),
    ),
    Kind(
        name="adalora",
        title="AdaLoRA",
        source="arXiv:2303.10512",
        rule="P diag(e) Q; each round the coordinator zeroes the least important e, so that all sites agree on ranks",
        tensors=r"lora_[ABE]",
        inexact="a product of three",
        nearest=("lora",),
    ),
    Kind(
        name="ia3",
        title="IA3",
        source="arXiv:2205.05638",
        rule="a factor for each output, or each input of the feed-forward's last layer",
        tensors=r"ia3_l",
        float32_on=("int8", "nf4"),
        nearest=("ln_tuning", "lora"),
    ),
    Kind(
        name="ln_tuning",
        title="LayerNorm tuning",
        source="arXiv:2312.11420",
        rule="the normalisation layers' own weights",
        tensors=r"ln_tuning_layers\.(weight|bias)",
        layers="norms",
        float32_on=ALL,
        nearest=("ia3", "lora"),
    ),
    Kind(
        name="full",
        title="full fine-tuning",
        source="no adapter; for small bases",
        rule="the weights of the targets, with all-linear those of the norms too; never embeddings nor output head",
        tensors=r"ln_tuning_layers\.(weight|bias)",
        layers="both",
        bases=("none",),
        float32_on=ALL,
        nearest=("lora",),
    ),
    Kind(
        name="prompt_tuning",
        title="prompt tuning",
        source="arXiv:2104.08691",
        rule="embeddings of virtual tokens before each row",
        tensors=r"prompt_encoder\.embedding\.weight",
        layers="input",
        is_mergeable=False,
        nearest=("ia3", "lora"),
    ),
    Kind(
        name="prefix_tuning",
        title="prefix tuning",
        source="arXiv:2101.00190",
        rule="keys and values of virtual tokens in every layer, without the paper's projection",
        tensors=r"prompt_encoder\.embedding\.weight",
        layers="input",
        is_mergeable=False,
        nearest=("prompt_tuning", "lora"),
    ),
    Kind(
        name="p_tuning",
        title="P-tuning",
        source="arXiv:2103.10385",
        rule="embeddings of virtual tokens, made by a small network that is trained too",
        tensors=r"prompt_encoder\.(embedding\.weight|mlp_head\.\d\.(weight|bias))",
        layers="input",
        inexact="the mean of networks is not the network of the mean",
        is_mergeable=False,
        nearest=("prompt_tuning", "lora"),
    ),
)
KINDS: Final[Mapping[str, Kind]] = {kind.name: kind for kind in _TABLE}
_MODULE: Final = re.compile(
    r"(.+?)\.(?:" + "|".join(sorted({kind.tensors for kind in _TABLE if kind.layers != "input"})) + ")"
)


def module_of(name: str) -> str:
    """The module that a tensor of any kind belongs to; empty for one that stands before the input.

    Example:
        >>> module_of("base_model.model.q_proj.lora_A.weight"), module_of("prompt_encoder.embedding.weight")
        ('base_model.model.q_proj', '')
    """
    found = _MODULE.fullmatch(name)
    return found[1] if found else ""


def belongs(kind: str, name: str) -> bool:
    """Whether a tensor's name is one that this kind has.

    Example:
        >>> belongs("ia3", "base_model.model.q_proj.ia3_l"), belongs("ia3", "base_model.model.q_proj.lora_A.weight")
        (True, False)
    """
    facts = KINDS[kind]
    prefix = "" if facts.layers == "input" else r".+\."
    return re.fullmatch(prefix + facts.tensors, name) is not None
