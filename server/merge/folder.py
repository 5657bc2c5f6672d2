"""Sealed exports in, one sealed export out: adapters merged, with the hashes of what went in."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import jinja2
from pydantic import TypeAdapter, ValidationError

from common import storage
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import ConfigError, ModelError
from common.frame import wire
from common.frame.records import TensorSpec
from common.model import base as model
from common.run.schema.section import Slug
from common.trust import identity
from server.export import canonical, seal
from server.export import folder as export_folder
from server.merge import adapters
from server.verify import verify

CARD_TEMPLATE: Final = Path(__file__).with_name("merged_card.md.j2")
_SECTION: Final = r"^## {}\n(.*?)(?=^## |\Z)"
_QUOTED: Final = ("Data", "Privacy", "Licences")


@dataclass(frozen=True)
class Input:
    """A verified export that is merged.

    Attributes:
        signer: Public key of who signed it; empty: nobody.
        card: Text of its model card.
    """

    facts: seal.Facts
    sha256: str
    signer: str
    tensors: Tensors
    card: str


def write(
    folders: Sequence[Path],
    output: Path,
    recipe: adapters.Recipe,
    *,
    name: str,
    formats: str = "",
    base: Path | None = None,
    signer: str = "",
    sign_with: Path | None = None,
) -> dict[str, object]:
    """Merge the adapters of sealed exports into a new sealed export.

    Args:
        folders: Exports with the format peft or vllm, all of one base and one chat template.
        output: A new folder.
        formats: Some of `seal.FORMATS`, with commas; empty: peft.
        base: The base's folder; only peft and vllm do without.
        signer: Public key that must have signed every input; empty: any, or none.
        sign_with: The operator's key file; None leaves the result unsigned.

    Returns:
        `folder`, `formats`, `signer` (empty if unsigned), `rank`, `lost` (share of the norm that the rank cut off).

    Raises:
        AuthError: An input is not signed as demanded.
        ConfigError: The recipe means nothing, the folder holds something, or a format is impossible.
        ModelError: An input fails `verify`, or they are of different bases or templates.
        StorageError: Disk full or not writable.
    """
    adapters.check(recipe, len(folders))
    try:  # under the rule for names of runs, as it becomes a folder
        TypeAdapter(Slug).validate_python(name)
    except ValidationError as error:
        raise ConfigError(f"--name {wire.shown(name)}: 1 to 64 of a-z, 0-9 and -, with no - at either end") from error
    asked = export_folder.parse_formats(formats or "peft")
    key = identity.load(sign_with) if sign_with else None
    inputs = [read(folder, signer=signer) for folder in folders]
    first = inputs[0].facts
    for folder, facts in zip(folders, [source.facts for source in inputs], strict=True):
        if facts.base_sha256 != first.base_sha256:
            raise ModelError(f"{folder}: is of another base than {folders[0]}; merge adapters of one base")
        for what in ("chat_template", "system_prompt"):
            if getattr(facts, what) != getattr(first, what):
                raise ModelError(
                    f"{folder}: was trained with another {what.replace('_', ' ')} than {folders[0]}; it cannot be "
                    "merged"
                )
        if facts.date != first.date:
            raise ModelError(
                f"{folder}: its prompts say {facts.date or 'no date'}, those of {folders[0]} "
                f"{first.date or 'none'}; adapters of runs of one day only can be merged"
            )
    if base:
        model.check_hash(base, first.base_sha256)
    tensors, lost = adapters.merge([source.tensors for source in inputs], recipe)
    content = _content(inputs, tensors, recipe, name=name, formats=asked, base=base, lost=lost)
    export_folder.write_content(output, content, base=base, llama_cpp=None, key=key)
    return {
        "folder": str(output), "formats": ", ".join(asked), "signer": identity.public_hex(key) if key else "",
        "rank": next(iter(content.adapter.values())).shape[0], "lost": lost,
    }  # fmt: skip


def read(folder: Path, *, signer: str = "") -> Input:
    """Verify an export and take its adapter.

    Raises:
        AuthError: Not signed as demanded.
        ModelError: It fails `verify`, or holds no adapter.
    """
    verified = verify.verify(folder, signer=signer)
    sealed = seal.read(folder)
    peft_folder = adapter_folder(folder, sealed.facts)
    specs = [TensorSpec(name, tuple(shape)) for name, shape in sealed.adapter.items()]
    tensors = adapter.decode((peft_folder / "adapter_model.safetensors").read_bytes(), specs, dtype="float32")
    card = (folder / "README.md").read_text(encoding="utf-8")
    return Input(sealed.facts, storage.sha256(folder / seal.FILE), verified["signer"], tensors, card)


def adapter_folder(folder: Path, facts: seal.Facts) -> Path:
    """The folder of an export's adapter.

    Raises:
        ModelError: It has none.
    """
    folders = {"peft": folder / "peft", "vllm": folder / "vllm" / facts.name}
    present = [path for name, path in folders.items() if name in facts.formats]
    if not present:
        raise ModelError(f"{folder}: holds no adapter, only {', '.join(facts.formats)}; export peft as well")
    return present[0]


def _content(
    inputs: Sequence[Input],
    tensors: Tensors,
    recipe: adapters.Recipe,
    *,
    name: str,
    formats: Sequence[str],
    base: Path | None,
    lost: float,
) -> export_folder.Content:
    """The result as the content of a folder; its identity is the hash of the recipe and the inputs' seals."""
    first = inputs[0].facts
    ingredients = asdict(recipe) | {"inputs": [source.sha256 for source in inputs]}
    facts = seal.Facts(
        name=name,
        run_sha256=hashlib.sha256(wire.canonical_json(ingredients)).hexdigest(),
        base_sha256=first.base_sha256,
        num_rounds=0,
        formats=tuple(formats),
        base=first.base,
        adapter_sha256=hashlib.sha256(canonical.encoded(tensors)).hexdigest(),
        chat_template=first.chat_template,
        chat_template_sha256=export_folder.template_sha256(base, first.chat_template, first.system_prompt, first.date)
        if base
        else "",
        system_prompt=first.system_prompt,
        date=first.date,
        inputs=tuple(source.sha256 for source in inputs),
    )
    text = card(inputs, facts, recipe, lost=lost, licence=export_folder.licence_of(base) if base else "")
    return export_folder.Content(facts, tensors, text, text)


def card(inputs: Sequence[Input], facts: seal.Facts, recipe: adapters.Recipe, *, lost: float, licence: str) -> str:
    """The model card of a merged adapter; what the inputs' cards say of data, privacy and licences is in it."""
    template = jinja2.Template(CARD_TEMPLATE.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined)
    sections = [{title: section(source.card, title) for title in _QUOTED} for source in inputs]
    rows = list(zip(inputs, recipe.weights, sections, strict=True))
    text: str = template.render(
        facts=facts, recipe=recipe, rows=rows, lost=lost, licence=licence, system_prompt=facts.system_prompt
    )
    return text


def section(card_text: str, title: str) -> str:
    """What a card says under a title; empty if it has no such part.

    Example:
        >>> section("# Name\\n\\n## Data\\n\\nRows.\\n\\n## Privacy\\n\\nNone.\\n", "Data")
        'Rows.'
    """
    match = re.search(_SECTION.format(re.escape(title)), card_text, re.MULTILINE | re.DOTALL)
    return match[1].strip() if match else ""
