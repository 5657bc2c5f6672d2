"""What the tables of all our files are made of: kinds of values, and a section that is frozen, strict and closed."""

from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

SLUG = r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$"
SHA256 = r"^([0-9a-f]{64})?$"
PROXY = r"^(http://[A-Za-z0-9.:\[\]_-]+:[0-9]{1,5}/?)?$"
LINE = r"^[^\x00-\x1f\x7f]*$"
TARGETS = r"^[A-Za-z0-9_.]+( *, *[A-Za-z0-9_.]+)*$|^all-linear$"


def _listed(item: str) -> str:
    """Pattern of items with commas between them, or of nothing."""
    return rf"^({item}( *, *{item})*)?$"


_OF_SITE = "[a-z0-9-]{1,64} *= *"
SITE_RANKS = _listed(_OF_SITE + "[1-9][0-9]{0,3}")
SITE_QUANTIZATION = _listed(_OF_SITE + "(none|int8|nf4)")
METRICS = _listed("(exact_match|f1|rouge1|rouge2|rougeL|number|json|label_accuracy|macro_f1)")
EXPORT_FORMATS = _listed("(peft|vllm|merged|nf4|int8|gguf|onnx)")
GATE_RULES = _listed("(probes|baseline|sites|loss|schema|exposure|extraction|pii|audit)")
REGIONS = _listed("[A-Z]{2}")
PATTERNS = {
    SLUG: "1 to 64 of a-z, 0-9 and -, with no - at either end",
    SHA256: "64 digits of 0-9 and a-f, or empty",
    PROXY: "http://host:port, without name and password and without TLS to the proxy itself, or empty",
    LINE: "one line without control characters",
    TARGETS: '"all-linear", or module names with commas between them',
    SITE_RANKS: 'names of sites with their ranks, such as "north = 4, south = 8", or empty',
    SITE_QUANTIZATION: 'names of sites with none, int8 or nf4, such as "north = none, south = int8", or empty',
    METRICS: "of exact_match, f1, rouge1, rouge2, rougeL, number, json, label_accuracy and macro_f1, with commas "
    "between them, or empty",
    GATE_RULES: "of probes, baseline, sites, loss, schema, exposure, extraction, pii and audit, with commas between "
    "them, or empty",
    EXPORT_FORMATS: "of peft, vllm, merged, nf4, int8, gguf and onnx, with commas between them, or empty",
    REGIONS: 'countries of two capitals with commas between them, such as "DE, AT", or empty',
}

Slug = Annotated[str, Field(pattern=SLUG)]
Sha256 = Annotated[str, Field(pattern=SHA256)]
Line = Annotated[str, Field(pattern=LINE, max_length=4096)]
RequiredLine = Annotated[str, Field(pattern=LINE, min_length=1, max_length=4096)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
PositiveCount = Annotated[int, Field(ge=1, le=1_000_000)]
Seconds = Annotated[float, Field(gt=0, le=2_592_000)]
MAX_MESSAGE_MIB = 2047  # of one message, at both ends; on its way it goes in pieces
Mebibytes = Annotated[int, Field(ge=1, le=MAX_MESSAGE_MIB)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def refuse_look_alikes(value: object) -> object:
    """Tell 1 from true and 1.0, which Python holds to be equal."""
    if type(value) is not int:
        raise ValueError("must be the whole number 1")
    return value


def is_positive(table: Mapping[str, object], key: str) -> bool:
    """Whether an unchecked table holds a whole number over 0 under `key`."""
    value = table.get(key)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _frozen(value: object) -> object:
    """Let a TOML array be a tuple, so that a config can be hashed."""
    return tuple(value) if isinstance(value, list) else value


def of_sites(text: str) -> dict[str, str]:
    """Each site's value in a setting of form `SITE_RANKS` or `SITE_QUANTIZATION`; of a name written twice, the last.

    Example:
        >>> of_sites("north = 4, south=8")
        {'north': '4', 'south': '8'}
    """
    pairs = (part.partition("=") for part in text.split(",") if part)
    return {site.strip(): value.strip() for site, _, value in pairs}


def names_a_site_twice(text: str) -> bool:
    """Whether such a setting gives a site two values."""
    return len(of_sites(text)) < text.count("=")


T = TypeVar("T", bound=BaseModel)
Tables = Annotated[tuple[T, ...], BeforeValidator(_frozen)]  # an array of tables: [[section.name]] in the file


class Section(BaseModel):
    """What all tables of both files share: frozen, strict, closed, finite numbers only."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
