"""Sections `[model]` and `[adapter]` of the run file."""

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field

from common.run.catalogue.kinds import Quantization
from common.run.schema.section import TARGET, Array, Line, OfSites, RequiredLine, Section, Sha256

ALL_LINEAR: Final = ("all-linear",)
BY_HASH: Final = "by-hash"  # a base in a manifest, where its hash is all that names it


class ModelConfig(Section):
    """The base model that every site must hold, and the precision in which it is used."""

    base: RequiredLine = Field(
        description="The base model: a folder, a name in the local store such as `smollm2`, `embedded`, or a hub id."
    )
    revision: Line = Field(default="", description="Commit or tag; only for a hub id. Empty: the newest.")
    sha256: Sha256 = Field(default="", description="Expected SHA-256 of the base's files. Empty: any.")
    quantization: Quantization = Field(
        default="nf4", description="Storage of the frozen base's weights: as they are, 8-bit or 4-bit NormalFloat."
    )
    site_quantization: OfSites[Quantization] = Field(
        default={},
        validate_default=True,
        description='Sites that hold the base in another precision: `{ north = "none", south = "int8" }`. The others, '
        "and the coordinator, have `quantization`.",
    )
    double_quantization: bool = Field(default=True, description="Quantise the quantiser's scales too; `nf4` only.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Compute type. `auto`: bfloat16 on CUDA, float32 on CPU."
    )
    chat_template: Literal["tokenizer", "chatml", "alpaca"] = Field(
        default="tokenizer", description="How a row becomes a prompt. `tokenizer`: the template that the base brings."
    )


Rank = Annotated[int, Field(ge=1, le=512)]


def _all_or_some(targets: tuple[str, ...]) -> tuple[str, ...]:
    if len(targets) > 1 and ALL_LINEAR[0] in targets:
        raise ValueError('"all-linear" names all layers; remove it, or the others')
    return targets


Targets = Annotated[
    Array[Annotated[str, Field(pattern=TARGET, max_length=1024)]], Field(min_length=1), AfterValidator(_all_or_some)
]
_KIND: Final = "Kind of adapter: all that is trained and all that travels; docs/methods.md has what each does."
_TARGETS: Final = (
    "Layers that get an adapter: names of modules, or `all-linear` (all but the output head). `silotune-server layers` "
    "chooses them by the signal in their weights."
)


class _Adapter(Section):
    @property
    def num_prepended(self) -> int:
        """Virtual tokens that stand before each row's own, so that its logits come later."""
        return 0

    @property
    def layers(self) -> tuple[str, ...]:
        """`targets`; nothing for a kind that has none."""
        return ()

    @property
    def lower_ranks(self) -> Mapping[str, int]:
        """`site_ranks`; nothing for a kind that has none."""
        return {}


class _Factors(_Adapter):
    r: int = Field(default=16, ge=1, le=512, description="Rank of the adapter's factors; of `adalora` at the start.")
    alpha: float = Field(
        default=32.0, gt=0, le=65536, description="Scale: the factors' product is multiplied by `alpha / r`."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of the adapter's inputs zeroed in training.")
    targets: Targets = Field(default=ALL_LINEAR, description=_TARGETS)

    @property
    def layers(self) -> tuple[str, ...]:
        """`targets`."""
        return self.targets


class _Scaled(_Factors):
    use_rslora: bool = Field(default=False, description="Multiply by `alpha / sqrt(r)` instead of `alpha / r`.")

    @property
    def scale(self) -> float:
        """What the factors' product is multiplied by."""
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)


class LoraAdapter(_Scaled):
    """A pair of factors beside each layer."""

    kind: Literal["lora"] = Field(default="lora", description=_KIND)
    site_ranks: OfSites[Rank] = Field(
        default={},
        validate_default=True,
        description="Sites that hold fewer than `r` ranks: `{ north = 4, south = 8 }`. The others hold `r`.",
    )

    @property
    def lower_ranks(self) -> Mapping[str, int]:
        """`site_ranks`."""
        return self.site_ranks


class DoraAdapter(_Scaled):
    """LoRA's direction, and a length for each output."""

    kind: Literal["dora"] = Field(default="dora", description=_KIND)


class AdaLoraAdapter(_Factors):
    """Factors whose ranks the coordinator lowers from round to round."""

    kind: Literal["adalora"] = Field(default="adalora", description=_KIND)
    target_r: int = Field(
        default=0, ge=0, le=512, description="Mean rank that is left after the last round. 0: half of `r`."
    )

    @property
    def scale(self) -> float:
        """What the factors' product is multiplied by."""
        return self.alpha / self.r

    @property
    def final_r(self) -> int:
        """What `target_r` means."""
        return self.target_r or max(1, self.r // 2)


class LayersAdapter(_Adapter):
    """A factor for each output of a layer (`ia3`), or the layers' own weights (`full`)."""

    kind: Literal["ia3", "full"] = Field(description=_KIND)
    targets: Targets = Field(default=ALL_LINEAR, description=_TARGETS)

    @property
    def layers(self) -> tuple[str, ...]:
        """`targets`."""
        return self.targets


class NormsAdapter(_Adapter):
    """The weights of the normalisation layers."""

    kind: Literal["ln_tuning"] = Field(default="ln_tuning", description=_KIND)


class TokensAdapter(_Adapter):
    """Virtual tokens before each row."""

    kind: Literal["prompt_tuning", "prefix_tuning", "p_tuning"] = Field(description=_KIND)
    num_virtual_tokens: int = Field(default=16, ge=1, le=1024, description="Tokens that are put first.")

    @property
    def num_prepended(self) -> int:
        """See the other kinds; those of `prefix_tuning` are keys and values, and stand before no logits."""
        return self.num_virtual_tokens if self.kind != "prefix_tuning" else 0


FACTORS: Final = (LoraAdapter, DoraAdapter, AdaLoraAdapter)
AdapterConfig = LoraAdapter | DoraAdapter | AdaLoraAdapter | LayersAdapter | NormsAdapter | TokensAdapter
