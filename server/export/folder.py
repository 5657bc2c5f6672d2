"""A whole export: one folder with every form that was asked for, a model card, hashes of all files, and a signature."""

import dataclasses
import functools
import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from common import storage
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import ConfigError
from common.event_kinds import Event
from common.model import base as model
from common.model import probe as base_probe
from common.run import config
from common.run.catalogue.kinds import KINDS
from common.run.manifest import RunManifest
from common.text import prompts
from server.export import adapter as export
from server.export import canonical, gguf, onnx, perplexity, seal
from server.export import kind as export_kind
from server.export import tokenizer as export_tokenizer
from server.export.perplexity import Perplexity, SideBySide
from server.export.probe import Probe
from server.export.seal import FORMATS
from server.view.run_view import RunView

NEED_BASE: Final = frozenset({"merged", "nf4", "int8", "gguf", "onnx"})
_LICENCE: Final = re.compile(r"^license:\s*([\w.+-]{1,64})\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Exported:
    """A checkpoint of a run, and where it comes from.

    Attributes:
        tensors: The adapter, under the run's names.
    """

    tensors: Tensors
    run_manifest: RunManifest
    num_rounds: int
    sites: dict[str, int]
    log: Sequence[Event]


def parse_formats(text: str) -> tuple[str, ...]:
    """The value of `--formats`, names with commas: each once, in the order of `seal.FORMATS`.

    Raises:
        ConfigError: None, or one that does not exist.

    Example:
        >>> parse_formats("gguf, peft")
        ('peft', 'gguf')
    """
    asked = {name.strip() for name in text.split(",")}
    if unknown := sorted(asked - set(FORMATS)):
        raise ConfigError(f"--formats: '{unknown[0]}' is none of {', '.join(FORMATS)}")
    return tuple(name for name in FORMATS if name in asked)


@dataclass(frozen=True)
class Content:
    """All that goes into a folder, whatever it was made from.

    Attributes:
        adapter: The canonical adapter, or one of another kind, which no format holds but merged into the base.
        adapter_card: Model card of a peft folder.
        card: Model card of the whole.
        made: Configuration of another kind; None: the adapter is canonical.
        side_by_side: Gives base and adapters side by side as a run has them; None: there is no run, only the adapter.
        quantization: Of the base during training, for the card.
    """

    facts: seal.Facts
    adapter: Tensors
    adapter_card: str
    card: str
    made: PeftConfig | None = None
    side_by_side: Callable[[], SideBySide] | None = None
    quantization: str = "none"


def write(
    folder: Path,
    source: Exported,
    *,
    formats: Sequence[str],
    base: Path | None,
    llama_cpp: Path | None,
    key: Ed25519PrivateKey | None,
    gguf_type: str = "bf16",
    rows: Path | None = None,
) -> None:
    """Fill a new folder from a run; it bears its name only when it is whole.

    Args:
        folder: Must not exist, or be empty.
        base: The base's folder; only `peft` and `vllm` do without, and then have no chat template beside them.
        llama_cpp: A checkout of llama.cpp whose converter writes the GGUF file; None: it is written here.
        key: The operator's; None leaves the folder unsigned.
        gguf_type: Type of the GGUF file's matrices, one of `export_gguf.TYPES`.
        rows: A file on which merged weights are held against base and adapters side by side; None: they are not.

    Raises:
        ConfigError: The folder holds something, or a format is impossible for this base, rank or machine.
        DataError: The rows are missing or unusable.
        ModelError: Base and adapter do not fit, or the merged weights are not as good as side by side.
        StorageError: Disk full or not writable.
    """
    content = content_of(source, formats=formats, base=base, gguf_type=gguf_type)
    if base:
        manifest = source.run_manifest
        side_by_side = functools.partial(
            perplexity.side_by_side, rows, source.tensors, run=manifest.run, base=base, date=manifest.date
        )
        content = dataclasses.replace(content, side_by_side=side_by_side)
    write_content(folder, content, base=base, llama_cpp=llama_cpp, key=key)


def check(
    source: Exported, *, formats: Sequence[str], base: Path, llama_cpp: Path | None, gguf_type: str = "bf16"
) -> None:
    """What `write` would refuse before it begins, for a run that is yet to train an adapter of this form.

    Raises:
        ConfigError: A format is impossible for this kind of adapter, base, rank or machine.
    """
    content = content_of(source, formats=formats, base=base, gguf_type=gguf_type)
    _check_possible(content, base, llama_cpp)


def content_of(source: Exported, *, formats: Sequence[str], base: Path | None, gguf_type: str = "bf16") -> Content:
    """A run's checkpoint as the content of a folder."""
    manifest, run = source.run_manifest, source.run_manifest.run
    # What this kind of adapter can become.
    kind = KINDS[run.adapter.kind]
    plain = [name for name in ("peft", "vllm") if name in formats]
    if plain and not kind.has_factors:
        raise ConfigError(
            f"--formats {plain[0]}: a sealed adapter is plain LoRA, and this run trained '{run.adapter.kind}'; give "
            "--output for its peft folder" + (", or export merged" if kind.is_mergeable else "")
        )
    if NEED_BASE & set(formats):
        export_kind.check_mergeable(run.adapter.kind)
    base_shared = export.shared_base(run.model.base)
    tensors, made = export.finished(source.tensors, run.adapter, base=base_shared)
    template, prompt = run.model.chat_template, run.data.system_prompt
    facts = seal.Facts(
        name=run.name,
        run_sha256=manifest.sha256,
        base_sha256=manifest.base_sha256,
        num_rounds=source.num_rounds,
        formats=tuple(formats),
        base=base_shared,
        adapter_sha256="" if made else hashlib.sha256(canonical.encoded(tensors)).hexdigest(),
        chat_template=template,
        chat_template_sha256=template_sha256(base, template, prompt, manifest.date) if base else "",
        date=manifest.date,
        gguf_type=gguf_type,
        system_prompt=prompt,
        addendum_sha256=derived.addendum_sha256 if (derived := RunView.of(source.log).derived) else "",
    )
    card = functools.partial(export.card, manifest, num_rounds=source.num_rounds, sites=source.sites, log=source.log)
    licence = licence_of(base) if base else ""
    folder_card = card(kind="folder", licence=licence, formats=formats)
    return Content(facts, tensors, card(kind="adapter"), folder_card, made, quantization=run.model.quantization)


def write_content(
    folder: Path, content: Content, *, base: Path | None, llama_cpp: Path | None, key: Ed25519PrivateKey | None
) -> None:
    """Fill a new folder and seal it; see `write`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: holds files already; give another folder")
    _check_possible(content, base, llama_cpp)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        facts, card = content.facts, content.card
        for target in [name for name in ("peft", f"vllm/{facts.name}") if name.split("/")[0] in facts.formats]:
            _save_adapter(partial / target, content)
            if base:
                tokenizer = tokenizer_of(base, facts)
                template = str(tokenizer.chat_template)
                storage.write_atomic(partial / target / export_tokenizer.TEMPLATE_FILE, template.encode())
                ends = export_tokenizer.ended(base, tokenizer).to_json_string()
                storage.write_atomic(partial / target / GENERATION_CONFIG_NAME, ends.encode())
        if base and NEED_BASE & set(facts.formats):
            probe, measured = _fill_merged(partial, content, base=base, llama_cpp=llama_cpp)
            figures = dataclasses.asdict(measured) if measured else {}
            facts = dataclasses.replace(facts, probe=dataclasses.asdict(probe), perplexity=figures)
            card += "\n" + perplexity.in_words(measured, probe, quantization=content.quantization)
        storage.write_atomic(partial / "README.md", card.encode())
        seal.write(partial, facts, specs=() if content.made else adapter.specs(content.adapter), key=key)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise storage.storage_error(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_possible(content: Content, base: Path | None, llama_cpp: Path | None) -> None:
    """What is known to fail must not fail after minutes of merging."""
    formats = content.facts.formats
    if base is None and (needing := sorted(NEED_BASE & set(formats))):
        raise ConfigError(f"--formats {needing[0]} needs the base; give its folder with --base")
    rank = canonical.rank_of(content.adapter) if content.made is None else 0
    if "vllm" in formats and rank not in canonical.RANKS:
        raise ConfigError(
            f"--formats vllm: the adapter has rank {rank}, vLLM takes up to {canonical.RANKS[-1]}; "
            "export merged instead, or train with a smaller aggregation.residual_rank"
        )
    if "onnx" in formats:
        onnx.require()
    if base and "gguf" in formats:
        if '"""' in content.facts.system_prompt:
            raise ConfigError(
                'gguf: data.system_prompt holds """, which ends a text in a Modelfile; write it in another way'
            )
        gguf.check_checkout(llama_cpp, content.facts.gguf_type)
        if not llama_cpp:
            gguf.check(base)


def _fill_merged(
    folder: Path, content: Content, *, base: Path, llama_cpp: Path | None
) -> tuple[Probe, Perplexity | None]:
    """All that is made from the merged checkpoint, which goes again if nobody asked for it; how good it is."""
    scratch, merged, facts = folder / ".adapter", folder / "merged", content.facts
    reference = content.side_by_side() if content.side_by_side else None
    _save_adapter(scratch, content)
    probe = export.merge(
        scratch, base, merged, chat_template=facts.chat_template, system_prompt=facts.system_prompt, date=facts.date,
        beside_btv=reference.logits_btv if reference else None,
    )  # fmt: skip
    shutil.rmtree(scratch)
    measured = perplexity.measure(reference, merged, facts.chat_template) if reference else None
    if measured:
        measured.check(facts.name)
    for kind in [kind for kind in ("nf4", "int8") if kind in facts.formats]:
        quantise(merged, folder / kind, kind=kind)
    if "gguf" in facts.formats:
        (folder / "gguf").mkdir()
        output = folder / "gguf" / gguf.MODEL_FILE
        if llama_cpp:
            gguf.run_converter(llama_cpp, merged, output, name=facts.name)
        else:
            gguf.convert(merged, output, name=facts.name)
        if llama_cpp and facts.gguf_type != "bf16":
            gguf.run_quantize(llama_cpp, output, kind=facts.gguf_type)
        text = gguf.modelfile(merged, system_prompt=facts.system_prompt)
        storage.write_atomic(folder / "gguf" / "Modelfile", text.encode())
    if "onnx" in facts.formats:
        onnx.convert(merged, folder / "onnx")
    if "merged" not in facts.formats:
        shutil.rmtree(merged)
    return probe, measured


def _save_adapter(folder: Path, content: Content) -> None:
    """A peft folder with its card."""
    canonical.save(folder, content.adapter, base=content.facts.base, card=content.adapter_card, made=content.made)


def template_of(base: Path, name: prompts.TemplateName, system_prompt: str, date: str) -> str:
    """The chat template that a run of that day on this base was trained with, the run's system prompt included.

    Raises:
        ModelError: The base has no tokenizer, or none that this template fits.
    """
    return str(export_tokenizer.of_base(base, name, system_prompt=system_prompt, date=date).chat_template)


def tokenizer_of(base: Path, facts: seal.Facts) -> PreTrainedTokenizerBase:
    """The base's tokenizer with the template of an export."""
    return export_tokenizer.of_base(base, facts.chat_template, system_prompt=facts.system_prompt, date=facts.date)


def template_sha256(base: Path, name: prompts.TemplateName, system_prompt: str, date: str) -> str:
    """The hash of `template_of`, for the seal."""
    return hashlib.sha256(template_of(base, name, system_prompt, date).encode()).hexdigest()


def quantise(merged: Path, output: Path, *, kind: str) -> None:
    """A merged checkpoint through bitsandbytes: NF4 with double quantisation, or 8-bit.

    Raises:
        ModelError: It cannot be loaded so on this machine, or few of its weights are quantised.
    """
    quantization = config.ModelConfig(base=str(merged), quantization=kind, dtype="bfloat16")  # type: ignore[arg-type]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded = model.load_base(merged, quantization, model.choose_device("auto"))
    base_probe.check_precision(loaded, kind)  # type: ignore[arg-type]
    loaded.config.use_cache = True
    loaded.save_pretrained(output)
    export_tokenizer.copy(merged, output)


def licence_of(base: Path) -> str:
    """The `license` in the front matter of a base's card; empty if it names none."""
    try:
        text = (base / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    if not text.startswith("---\n"):
        return ""
    match = _LICENCE.search(text.split("\n---", 1)[0])
    return match[1] if match else ""
