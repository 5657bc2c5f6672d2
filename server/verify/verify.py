"""Whether an exported folder is what its maker sealed, and whether what was sealed is sound.

The seal alone would pass a folder that was broken before it was sealed, so the adapter's form and every tensor are
checked for themselves.
"""

import dataclasses
import json
import pickletools
import re
import textwrap
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from safetensors import safe_open

from common import storage
from common.adapter import adapter, peft_config
from common.errors import ModelError
from common.frame import wire
from common.frame.records import TensorSpec
from common.model import base as model
from server.export import folder as export_folder
from server.export import gguf as export_gguf
from server.export import onnx, seal
from server.export import perplexity as export_perplexity
from server.export import probe as export_probe
from server.report import symptoms as troubleshooting
from server.verify import template
from server.view import export

KINDS: Final = frozenset({".safetensors", ".json", ".jinja", ".md", ".gguf", ".txt", ".model", "Modelfile", ".onnx"})
_ONNX: Final = f"onnx/{onnx.MODEL_FILE}"
_ONNX_WEIGHTS: Final = f"onnx/{onnx.WEIGHTS_FILE}"
_TEXT: Final = frozenset({".jinja", ".md", ".txt", "Modelfile"})
_FREE: Final = frozenset({"peft_version", "target_modules"})
_ADAPTER: Final = re.compile(r"(peft|vllm/[^/]+)/adapter_config\.json")


def verify(folder: Path, *, signer: str = "", base: Path | None = None) -> dict[str, Any]:
    """Check an exported folder.

    Args:
        signer: Public key that must have signed; empty: any, or none.
        base: The base's folder; None compares no logits.

    Returns:
        `name`, `formats`, `signer` (empty if unsigned), `addendum_sha256` of the stages after the end of its run
        (empty: there were none), `num_files`, `num_tensors`, `perplexity` as it was measured
        when it was merged (empty: it was not, or nothing was merged), `probe`: merged logits as they were compared then
        (empty: nothing was merged), and with a base `logits`: of each format the figures of `server/verify/logits.py`.

    Raises:
        AuthError: Not signed as demanded, or the signature is not valid.
        ModelError: Files missing, added, changed, of a forbidden kind, or not sound.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: there is no such folder; check the path")
    signed_by = seal.check_signature(folder, wanted=signer)
    sealed = seal.read(folder)
    paths = seal.listed(folder)
    for path in paths:
        _check_kind(folder, path)
    # Exactly the files that were sealed, each with its bytes.
    if added := sorted(set(paths) - sealed.files.keys()):
        raise ModelError(f"{folder}: {wire.shown(added[0], limit=200)} was added after sealing; get the folder again")
    if missing := sorted(sealed.files.keys() - set(paths)):
        raise ModelError(f"{folder}: {wire.shown(missing[0], limit=200)} is missing; get the folder again")
    for path in paths:
        if storage.sha256(folder / path) != sealed.files[path]:
            raise ModelError(f"{folder}: {wire.shown(path, limit=200)} was changed after sealing; get the folder again")
    _check_facts(folder, sealed)
    _check_card(folder, sealed.facts)
    perplexity = check_perplexity(folder, sealed.facts)
    probe = check_probe(folder, sealed.facts)
    num_tensors = _check_adapters(folder, sealed) + _check_tensors(folder, sealed)
    if base:
        model.check_hash(base, sealed.facts.base_sha256)
    template.check(folder, sealed.facts, base=base)
    result = {
        "name": sealed.facts.name,
        "formats": list(sealed.facts.formats),
        "signer": signed_by,
        "addendum_sha256": sealed.facts.addendum_sha256,
        "num_files": len(paths),
        "num_tensors": num_tensors,
        "perplexity": perplexity,
        "probe": probe,
    }
    if base:
        from server.verify import logits

        result["logits"] = logits.compare(folder, base, sealed.facts)
    return result


def in_words(result: Mapping[str, Any]) -> list[str]:
    """A result of `verify` for people."""
    symptoms = troubleshooting.of_formats(result.get("logits", {}))
    return [*export.lines(result), *(f"{each.name}: {each.evidence}. {each.remedy}" for each in symptoms)]


def _check_kind(folder: Path, path: str) -> None:
    """Data only: a kind that is known to run nothing when it is read, and content of that kind."""
    file = folder / path
    kind = file.suffix or file.name
    with file.open("rb") as opened:
        start = opened.read(4096)
    # A pickle of protocol 2 or later begins with PROTO, its number and another opcode.
    opcodes = {opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
    is_pickle = len(start) > 2 and start[:1] == b"\x80" and 2 <= start[1] <= 5 and start[2:3] in opcodes
    has_reader = kind in (".safetensors", ".gguf") or path == _ONNX_WEIGHTS  # strict; theirs could look like a pickle
    if (kind not in KINDS and path != _ONNX_WEIGHTS) or zipfile.is_zipfile(file) or (is_pickle and not has_reader):
        raise ModelError(
            f"{folder}: {wire.shown(path, limit=200)} is, or may be, a pickle or a program; do not load it"
        )
    try:
        if kind in _TEXT:
            file.read_text(encoding="utf-8")
        elif kind == ".json":
            json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder}: {wire.shown(path, limit=200)} is no {kind} file; get the folder again") from error


def _check_facts(folder: Path, sealed: seal.Seal) -> None:
    """The formats promised are those that are there."""
    formats = set(sealed.facts.formats)
    present = {path.split("/")[0] for path in sealed.files if "/" in path}
    odd = sorted((formats ^ present) | (formats - set(seal.FORMATS)))
    named = f"vllm/{sealed.facts.name}/adapter_config.json"
    needed = {"vllm": named, "onnx": _ONNX, "gguf": f"gguf/{export_gguf.MODEL_FILE}"}
    odd += [path for name, path in needed.items() if name in formats and path not in sealed.files]
    odd += sorted(path for path in sealed.files if path.endswith((".onnx", ".gguf")) and path not in needed.values())
    if sealed.facts.gguf_type not in export_gguf.TYPES:
        raise ModelError(f"{folder}: GGUF type {wire.shown(sealed.facts.gguf_type)} does not exist; export it again")
    if odd:
        what = wire.shown(odd[0], limit=200)
        raise ModelError(f"{folder}: {what} is promised and not there, or there and not promised; export it again")


def _check_card(folder: Path, facts: seal.Facts) -> None:
    """There is a card, and it is of this run and this base."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if not text:
        raise ModelError(f"{folder}: has no model card README.md; export it again")
    named = [("base", facts.base_sha256), ("run", facts.run_sha256), *(("input", digest) for digest in facts.inputs)]
    for what, digest in named:
        if digest not in text:
            raise ModelError(f"{card}: does not name the {what} {digest[:16]} that export.json names; export it again")
    if textwrap.indent(facts.system_prompt, "    ", lambda line: True) not in text:
        raise ModelError(f"{card}: lacks the system prompt that export.json names; export it again")


def check_perplexity(folder: Path, facts: seal.Facts) -> dict[str, Any]:
    """What was measured when it was merged is within its limit, and the card says it."""
    if not facts.perplexity:
        return {}
    figures = export_probe.stored(export_perplexity.Perplexity, facts.perplexity, what="perplexity")
    figures.check(str(folder))
    card = folder / "README.md"
    if f"{figures.merged:.4f}" not in card.read_text(encoding="utf-8"):
        raise ModelError(f"{card}: does not tell the perplexity that export.json tells; export it again")
    return dataclasses.asdict(figures)


def check_probe(folder: Path, facts: seal.Facts) -> dict[str, Any]:
    """What was merged was held against the adapter, and figures to be base and adapter; the card says it."""
    if not export_folder.NEED_BASE & set(facts.formats):
        return {}
    figures = export_probe.stored(export_probe.Probe, facts.probe, what="merged logits")
    figures.check(str(folder))
    card = folder / "README.md"
    if export_perplexity.probed(figures) not in card.read_text(encoding="utf-8"):
        raise ModelError(f"{card}: does not tell of merged logits what export.json tells; export it again")
    return dataclasses.asdict(figures)


def _check_adapters(folder: Path, sealed: seal.Seal) -> int:
    """Every adapter is canonical, and has all modules of the run."""
    specs = [TensorSpec(name, tuple(shape)) for name, shape in sealed.adapter.items()]
    folders = [Path(path).parent for path in sealed.files if _ADAPTER.fullmatch(path)]
    promised = [name for name in ("peft", "vllm") if name in sealed.facts.formats]
    if sorted(path.parts[0] for path in folders) != promised:
        raise ModelError(f"{folder}: the adapters promised are {promised}, found {len(folders)}; export it again")
    for subfolder in folders:
        check_config(folder / subfolder, specs, base=sealed.facts.base)
        path = folder / subfolder / "adapter_model.safetensors"
        adapter.decode(path.read_bytes(), specs, dtype="float32")
        if storage.sha256(path) != sealed.facts.adapter_sha256:
            raise ModelError(f"{path}: holds other values than the adapter that was exported; export it again")
    return len(specs) * len(folders)


def check_config(folder: Path, specs: Sequence[TensorSpec], *, base: str) -> None:
    """`adapter_config.json` says what a canonical adapter of these tensors on this base says, and nothing else.

    Raises:
        ModelError: Names the first key that differs.
    """
    path = folder / "adapter_config.json"
    given = json.loads(path.read_bytes())
    if not isinstance(given, dict):
        raise ModelError(f"{path}: is no object; export it again")
    rank = next(spec.shape[0] for spec in specs if spec.name.endswith(".lora_A.weight"))
    lora = peft_config.canonical(rank, adapter.module_names(specs), base=base or None)
    wanted = json.loads(json.dumps(peft_config.settings_of(lora)))
    for key in sorted((given.keys() | wanted.keys()) - _FREE):
        if key not in given or key not in wanted or given[key] != wanted[key]:
            was, should = (wire.shown(side.get(key, "absent")) for side in (given, wanted))
            raise ModelError(f"{path}: {wire.shown(key)} is {was}, of a canonical adapter {should}; export it again")
    targets = sorted(given.get("target_modules") or [])
    if targets != wanted["target_modules"]:
        odd = sorted(set(targets) ^ set(wanted["target_modules"]))
        raise ModelError(f"{path}: target_modules and the run's modules differ, first {wire.shown(odd[0], limit=200)}")


def _check_tensors(folder: Path, sealed: seal.Seal) -> int:
    """Tensors of every file: as declared, and finite."""
    num_tensors = 0
    for path in sorted(path for path in sealed.files if path.endswith(".safetensors")):
        header = seal.tensors(folder / path)
        if header != sealed.tensors.get(path):
            odd = sorted(header.keys() ^ sealed.tensors.get(path, {}).keys()) or sorted(header)
            raise ModelError(
                f"{folder / path}: tensors differ from those declared, such as {wire.shown(odd[0], limit=200)}"
            )
        with safe_open(folder / path, framework="pt") as opened:
            for name in header:
                values = opened.get_tensor(name)  # whole numbers, as quantised weights are, are always finite
                is_finite = not values.is_floating_point() or bool(torch.isfinite(values.float()).all())
                _require_finite(folder / path, name, is_finite=is_finite)
        num_tensors += 0 if _ADAPTER.fullmatch(str(Path(path).with_name("adapter_config.json"))) else len(header)
    for path in sorted(path for path in sealed.files if path.endswith(".gguf")):
        try:
            tensors = gguf.GGUFReader(folder / path).tensors
        except (ValueError, OSError, KeyError, IndexError) as error:
            raise ModelError(f"{folder / path}: not a GGUF file; export it again") from error
        for tensor in tensors:
            is_finite = bool(np.isfinite(gguf.dequantize(tensor.data, tensor.tensor_type)).all())
            _require_finite(folder / path, tensor.name, is_finite=is_finite)
        num_tensors += len(tensors)
    return num_tensors + (onnx.check(folder / _ONNX) if _ONNX in sealed.files else 0)


def _require_finite(path: Path, name: str, *, is_finite: bool) -> None:
    """Refuse a tensor that is not."""
    if not is_finite:
        raise ModelError(f"{path}: tensor {wire.shown(name, limit=200)} holds NaN or infinity; export it again")
