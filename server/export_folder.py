"""A whole export: one folder with every form that was asked for, a model card, hashes of all files, and a signature."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from common import config, model, storage
from common.adapter import Tensors
from common.errors import ConfigError
from common.events import Event
from common.kinds import KINDS
from common.manifest import RunManifest
from server import export, export_canonical, export_gguf, export_kind, seal
from server.seal import FORMATS

NEED_BASE: Final = frozenset({"merged", "nf4", "int8", "gguf"})
_LICENCE: Final = re.compile(r"^license:\s*([\w.+-]{1,64})\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Exported:
    """A checkpoint of a run, and where it comes from.

    Attributes:
        tensors: The adapter, under the run's names.
        run_manifest: The run.
        num_rounds: Rounds behind it.
        sites: Training rows by site.
        log: The run's events.
    """

    tensors: Tensors
    run_manifest: RunManifest
    num_rounds: int
    sites: dict[str, int]
    log: Sequence[Event]


def parse_formats(text: str) -> tuple[str, ...]:
    """Names with commas, each once, in the order of `seal.FORMATS`.

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


def write(
    folder: Path,
    source: Exported,
    *,
    formats: Sequence[str],
    base: Path | None,
    llama_cpp: Path | None,
    key: Ed25519PrivateKey | None,
) -> None:
    """Fill a new folder; it bears its name only when it is whole.

    Args:
        folder: Must not exist, or be empty.
        source: What to export.
        formats: Some of `seal.FORMATS`.
        base: The base's folder; only `peft` and `vllm` do without.
        llama_cpp: A checkout of llama.cpp whose converter writes the GGUF file; None: it is written here.
        key: The operator's; None leaves the folder unsigned.

    Raises:
        ConfigError: The folder holds something, or a format is impossible for this base or rank.
        ModelError: Base and adapter do not fit.
        StorageError: Disk full or not writable.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: holds files already; give another folder")
    _check_possible(source, formats, base)
    if base and "gguf" in formats and not llama_cpp:
        export_gguf.check(base)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _fill(partial, source, formats=formats, base=base, llama_cpp=llama_cpp)
        seal.write(partial, _facts(source, formats), run_manifest=source.run_manifest, key=key)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise storage.storage_error(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_possible(source: Exported, formats: Sequence[str], base: Path | None) -> None:
    """What is known to fail must not fail after minutes of merging."""
    if base is None and (needing := sorted(NEED_BASE & set(formats))):
        raise ConfigError(f"--formats {needing[0]} needs the base; give its folder with --base")
    _check_kind(source.run_manifest.run.adapter.kind, formats)
    if source.run_manifest.run.adapter.kind != "lora":
        return
    rank = export_canonical.rank_of(export_canonical.canonical(source.tensors, source.run_manifest.run.adapter))
    if "vllm" in formats and rank not in export_canonical.RANKS:
        raise ConfigError(
            f"--formats vllm: the adapter has rank {rank}, vLLM takes up to {export_canonical.RANKS[-1]}; "
            "export merged instead, or train with a smaller aggregation.residual_rank"
        )


def _check_kind(kind: str, formats: Sequence[str]) -> None:
    """What this kind of adapter can become."""
    facts = KINDS[kind]
    plain = [name for name in ("peft", "vllm") if name in formats]
    if plain and not facts.has_factors:
        raise ConfigError(
            f"--formats {plain[0]}: a sealed adapter is plain LoRA, and this run trained '{kind}'; give --output for "
            "its peft folder" + (", or export merged" if facts.is_mergeable else "")
        )
    if NEED_BASE & set(formats):
        export_kind.check_mergeable(kind)


def _facts(source: Exported, formats: Sequence[str]) -> seal.Facts:
    """What `export.json` says beside the files."""
    found = source.run_manifest
    return seal.Facts(found.run.name, found.sha256, found.base_sha256, source.num_rounds, tuple(formats))


def _fill(folder: Path, source: Exported, *, formats: Sequence[str], base: Path | None, llama_cpp: Path | None) -> None:
    """Every format, then the card."""
    licence = licence_of(base) if base else ""
    name = source.run_manifest.run.name
    for target in [target for target in ("peft", f"vllm/{name}") if target.split("/")[0] in formats]:
        _save_adapter(folder / target, source)
    if base and NEED_BASE & set(formats):
        _fill_merged(folder, source, formats=formats, base=base, llama_cpp=llama_cpp)
    text = export.card(
        source.run_manifest,
        num_rounds=source.num_rounds,
        sites=source.sites,
        log=source.log,
        kind="folder",
        licence=licence,
        formats=formats,
    )
    storage.write_atomic(folder / "README.md", text.encode())


def _fill_merged(folder: Path, source: Exported, *, formats: Sequence[str], base: Path, llama_cpp: Path | None) -> None:
    """All that is made from the merged checkpoint, which goes again if nobody asked for it."""
    scratch, merged = folder / ".adapter", folder / "merged"
    _save_adapter(scratch, source)
    export.merge(scratch, base, merged, chat_template=source.run_manifest.run.model.chat_template)
    shutil.rmtree(scratch)
    for kind in [kind for kind in ("nf4", "int8") if kind in formats]:
        quantise(merged, folder / kind, kind=kind)
    if "gguf" in formats:
        _save_gguf(folder / "gguf", merged, name=source.run_manifest.run.name, llama_cpp=llama_cpp)
    if "merged" not in formats:
        shutil.rmtree(merged)


def _save_adapter(folder: Path, source: Exported) -> None:
    """A peft folder with its card."""
    export.save_adapter(
        folder,
        source.tensors,
        run_manifest=source.run_manifest,
        num_rounds=source.num_rounds,
        sites=source.sites,
        log=source.log,
    )


def _save_gguf(folder: Path, merged: Path, *, name: str, llama_cpp: Path | None) -> None:
    """Model and Modelfile."""
    folder.mkdir()
    output = folder / export_gguf.MODEL_FILE
    if llama_cpp:
        export_gguf.run_converter(llama_cpp, merged, output)
    else:
        export_gguf.convert(merged, output, name=name)
    storage.write_atomic(folder / "Modelfile", export_gguf.modelfile(merged).encode())


def quantise(merged: Path, output: Path, *, kind: str) -> None:
    """A merged checkpoint through bitsandbytes: NF4 with double quantisation, or 8-bit.

    Raises:
        ModelError: It cannot be loaded so on this machine.
    """
    quantization = config.ModelConfig(base=str(merged), quantization=kind, dtype="bfloat16")  # type: ignore[arg-type]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded = model.load_base(merged, quantization, model.choose_device("auto"))
    loaded.config.use_cache = True
    loaded.save_pretrained(output)
    AutoTokenizer.from_pretrained(merged, local_files_only=True).save_pretrained(output)


def licence_of(base: Path) -> str:
    """The `license` in the front matter of a base's card; empty if it names none."""
    try:
        text = (base / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    if not text.startswith("---\n"):
        return ""
    found = _LICENCE.search(text.split("\n---", 1)[0])
    return found[1] if found else ""
