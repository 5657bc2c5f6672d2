"""Whether every format of an export speaks with the tokenizer and the chat template that the adapter was trained on."""

import hashlib
from pathlib import Path
from typing import Final

import gguf

from common.errors import ModelError
from common.frame import wire
from common.text import templates
from server.export import folder as export_folder
from server.export import gguf as export_gguf
from server.export import tokenizer as export_tokenizer
from server.export.seal import Facts

_BUILT_IN: Final = {"chatml": templates.CHATML, "alpaca": templates.ALPACA}
_FOLDERS: Final = ("merged", "nf4", "int8", "onnx")


def check(folder: Path, facts: Facts, *, base: Path | None) -> None:
    """Hold each format's template against the sealed hash, and that against what the run's setting stands for.

    Args:
        folder: The export; its files are those that were sealed.
        base: The base's folder; None: a template that came with the base is not recomputed.

    Raises:
        ModelError: A format has another template, none, or one where there should be none; or a Modelfile has another.
    """
    wanted = facts.chat_template_sha256
    _check_hash(folder, facts, base)
    texts: dict[Path, str] = {}  # as readers get it; empty where there is none
    for path in (folder / "peft", folder / "vllm" / facts.name):
        if path.relative_to(folder).parts[0] in facts.formats:
            file = path / export_tokenizer.TEMPLATE_FILE
            texts[path] = file.read_text(encoding="utf-8") if file.is_file() else ""
    for path in (folder / name for name in _FOLDERS if name in facts.formats):
        texts[path] = str(export_tokenizer.load(path).chat_template or "")
    if "gguf" in facts.formats:
        field = gguf.GGUFReader(folder / "gguf" / export_gguf.MODEL_FILE).get_field(gguf.Keys.Tokenizer.CHAT_TEMPLATE)
        texts[folder / "gguf"] = str(field.contents()) if field else ""
    for path, text in texts.items():
        sha256 = hashlib.sha256(text.encode()).hexdigest() if text else ""
        if sha256 != wanted:
            raise ModelError(
                f"{path}: its chat template has hash {sha256[:16] or 'none'}, the adapter was trained on "
                f"{wanted[:16] or 'one that was not at hand'}; export it again"
            )
        if text and not text.startswith(export_tokenizer.system_default(facts.system_prompt)):
            raise ModelError(f"{path}: its chat template lacks the run's system prompt; export it again")
    if "gguf" in facts.formats:
        path = folder / "gguf" / "Modelfile"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if base:  # to the letter
            tokenizer = export_folder.tokenizer_of(base, facts)
            ends = export_tokenizer.generation_of(base)
            is_right = text == export_gguf.modelfile_of(tokenizer, ends, system_prompt=facts.system_prompt)
        else:  # of one of our two forms
            is_right = export_gguf.is_modelfile(text, system_prompt=facts.system_prompt)
        if not is_right:
            raise ModelError(f"{path}: is not the Modelfile of this model; export it again")
    loaded = [folder / name for name in _FOLDERS if name in facts.formats]
    if base is None or not loaded:
        return
    trained_with = export_folder.tokenizer_of(base, facts)
    for path in loaded:
        if odd := export_tokenizer.differences(export_tokenizer.load(path), trained_with):
            raise ModelError(f"{path}: its tokenizer is not the base's ({odd[0]} differs); export it again")


def _check_hash(folder: Path, facts: Facts, base: Path | None) -> None:
    """The sealed hash is that of a built-in template, or of the base's own."""
    if facts.chat_template not in ("tokenizer", *_BUILT_IN):
        raise ModelError(f"{folder}: chat template {wire.shown(facts.chat_template)} does not exist; export it again")
    if not facts.chat_template_sha256:
        return
    if text := _BUILT_IN.get(facts.chat_template):
        head = export_tokenizer.system_default(facts.system_prompt)
        possible = {hashlib.sha256((head + start + text).encode()).hexdigest() for start in ("", "{{ bos_token }}")}
    else:
        possible = {facts.chat_template_sha256}
    if base:
        possible &= {export_folder.template_sha256(base, facts.chat_template, facts.system_prompt, facts.date)}
    if facts.chat_template_sha256 not in possible:
        raise ModelError(f"{folder}: its chat template is not {wire.shown(facts.chat_template)}'s; export it again")
