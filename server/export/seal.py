"""The seal of an exported folder: `export.json` names every file with its SHA-256, `export.sig.json` signs that."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors import SafetensorError, safe_open

from common import storage
from common.errors import AuthError, ModelError
from common.frame import wire
from common.frame.records import TensorSpec
from common.text import prompts
from common.trust import identity

FILE: Final = "export.json"
SIGNATURE_FILE: Final = "export.sig.json"
PURPOSE: Final = "export"
VERSION: Final = 3
FORMATS: Final = ("peft", "vllm", "merged", "nf4", "int8", "gguf", "onnx")
MAX_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class Facts:
    """What an export is of.

    Attributes:
        name: Of the run, or of the mixture.
        run_sha256: Identity of the run, or of the recipe of a mixture.
        num_rounds: Rounds behind the adapter; 0 for a mixture.
        base: What adapter_config.json tells of the base; empty: nothing.
        adapter_sha256: Of the canonical adapter's file, taken before anything was written.
        chat_template_sha256: Of the template's text; empty where no base was at hand, and so no format has one.
        date: Day of the run, YYYY-MM-DD, which its chat template prints; empty: it prints none.
        gguf_type: Type of the GGUF file's matrices, a name of `export_gguf.TYPES`.
        inputs: SHA-256 of `export.json` of every export that was mixed into this one.
        perplexity: Of the merged weights against base and adapters side by side, `server/export/perplexity.py`; empty
            where no rows were given, or nothing was merged.
        probe: Of the merged weights against base and adapters side by side on fixed tokens, `server/export/probe.py`;
            empty where nothing was merged.
        system_prompt: `data.system_prompt` of the run, which every chat template here begins with.
        addendum_sha256: Of the stages after the end of the run that the adapter went through; empty: it went through
            none.
    """

    name: str
    run_sha256: str
    base_sha256: str
    num_rounds: int
    formats: tuple[str, ...]
    base: str = ""
    adapter_sha256: str = ""
    chat_template: prompts.TemplateName = "tokenizer"
    chat_template_sha256: str = ""
    date: str = ""
    gguf_type: str = "bf16"
    inputs: tuple[str, ...] = ()
    perplexity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    probe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    system_prompt: str = ""
    addendum_sha256: str = ""


@dataclass(frozen=True)
class Seal:
    """`export.json`, read.

    Attributes:
        adapter: Names and shapes of the canonical adapter, from the run's manifest (of a mixture: from what was mixed).
        files: SHA-256 of every file by its path in the folder.
        tensors: Of every safetensors file, type and shape of each tensor by name.
    """

    facts: Facts
    adapter: Mapping[str, list[int]]
    files: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, list[Any]]]


def write(folder: Path, facts: Facts, *, specs: Sequence[TensorSpec], key: Ed25519PrivateKey | None) -> None:
    """Seal a folder that is whole.

    Args:
        specs: Names and shapes of the canonical adapter.
        key: Who signs; None leaves it unsigned.

    Raises:
        StorageError: Disk full or not writable.
    """
    paths = listed(folder)
    content = {
        "version": VERSION,
        "facts": dataclasses.asdict(facts),
        "adapter": {spec.name: list(spec.shape) for spec in specs},
        "files": {path: storage.sha256(folder / path) for path in paths},
        "tensors": {path: tensors(folder / path) for path in paths if path.endswith(".safetensors")},
    }
    data = wire.canonical_json(content)
    storage.write_atomic(folder / FILE, data)
    if key:
        signed = {"signer": identity.public_hex(key), "signature": identity.sign(key, data, purpose=PURPOSE)}
        storage.write_atomic(folder / SIGNATURE_FILE, wire.canonical_json(signed))


def read(folder: Path) -> Seal:
    """Parse `export.json`; what it says is not checked here.

    Raises:
        ModelError: Missing, too large, or not of this form.
    """
    try:
        data = _bytes(folder / FILE)
        content = json.loads(data, object_pairs_hook=wire.unique_pairs)
        lists = {key: tuple(content["facts"][key]) for key in ("formats", "inputs")}
        facts = Facts(**{**content["facts"], **lists})
        if facts.date:
            datetime.date.fromisoformat(facts.date)
        sealed = Seal(facts, dict(content["adapter"]), dict(content["files"]), dict(content["tensors"]))
        if content["version"] != VERSION or wire.canonical_json(content) != data:
            raise ValueError("another version, or not canonical")
    except OSError as error:
        raise ModelError(f"{folder}: no readable {FILE}; only what `export --to` wrote can be verified") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(f"{folder / FILE}: not a seal of version {VERSION}; get the folder again") from error
    return sealed


def check_signature(folder: Path, *, wanted: str) -> str:
    """The signer of a folder; empty if it is unsigned and nobody demands a signer.

    Args:
        wanted: Public key that must have signed, 64 hexadecimal digits; empty: any, or none.

    Raises:
        AuthError: Unsigned though a signer is demanded, signed by another, or the signature is not valid.
    """
    path = folder / SIGNATURE_FILE
    if not path.exists():
        if wanted:
            raise AuthError(
                f"{folder}: not signed, and a signature of {wanted[:16]} is demanded; ask for a signed export"
            )
        return ""
    try:
        fields = json.loads(_bytes(path), object_pairs_hook=wire.unique_pairs)
        signer, signature = str(fields["signer"]), str(fields["signature"])
        data = _bytes(folder / FILE)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise AuthError(f"{path}: not a signature; get the folder again") from error
    if wanted and signer != wanted:
        raise AuthError(
            f"{folder}: signed by {wire.shown(signer[:16])}, demanded is {wanted[:16]}; ask for the right one"
        )
    identity.verify(signer, signature, data, purpose=PURPOSE)
    return signer


def listed(folder: Path) -> list[str]:
    """Every file below a folder but the seal itself, as sorted paths.

    Raises:
        ModelError: A link, a socket or the like.
    """
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise ModelError(
                f"{folder}: {wire.shown(name, limit=200)} is a link or no plain file; get the folder again"
            )
        if path.is_file() and name not in (FILE, SIGNATURE_FILE):
            names.append(name)
    return names


def tensors(path: Path) -> dict[str, list[Any]]:
    """Type and shape of each tensor of a safetensors file, from its header.

    Raises:
        ModelError: It is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
            return {name: [part.get_dtype(), part.get_shape()] for name, part in slices.items()}
    except SafetensorError as error:
        raise ModelError(f"{path}: not safetensors; export it again") from error


def _bytes(path: Path) -> bytes:
    """A small file.

    Raises:
        ValueError: It is not small.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError("too large")
    return path.read_bytes()
