"""The base's tokenizer in an export: its own files, with the one chat template that the run was trained with.

`data.system_prompt` is part of that template: whoever renders a conversation without a system message of its own gets
the run's, as in training.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from common import storage
from common.data.rows import Message, Row
from common.errors import ModelError
from common.model import base as model
from common.model import base_files
from common.text import chat, prompts

TEMPLATE_FILE: Final = "chat_template.jinja"
CONFIG_FILE: Final = "tokenizer_config.json"
_FILES: Final = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                 "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")  # fmt: skip
# what transformers writes of the place that a tokenizer was read from, and code, which no export holds
_NOT_EXPORTED: Final = frozenset({"chat_template", "auto_map", "name_or_path", "tokenizer_file", "is_local"})


def of_base(
    base: Path, name: prompts.TemplateName, *, system_prompt: str = "", date: str = ""
) -> PreTrainedTokenizerBase:
    """The base's tokenizer with the chat template that a run's exports have.

    Args:
        date: Its day, for a template that prints one.

    Raises:
        ModelError: The base has no tokenizer, or none that this template fits, or one that drops the system prompt.
    """
    tokenizer = prompts.use_template(model.load_tokenizer(base), name, date=date)
    if not system_prompt:
        return tokenizer
    row = Row((Message("user", "Yes?"), Message("assistant", "Yes.")), unit="", row_id="a trial conversation")
    wanted = chat.render_prompt(row, tokenizer, system_prompt=system_prompt).text
    tokenizer.chat_template = system_default(system_prompt) + str(tokenizer.chat_template)
    if chat.render_prompt(row, tokenizer).text != wanted:
        raise ModelError(
            "the base's chat template cannot be given data.system_prompt as its default, which every export needs; "
            f"write it into the rows instead, or {chat.remedy(tokenizer)}"
        )
    return tokenizer


def system_default(system_prompt: str) -> str:
    """What a chat template begins with so that a conversation without a system message gets this one.

    Args:
        system_prompt: Any text; empty: nothing is added.

    Example:
        >>> import jinja2
        >>> template = system_default('Say "yes".') + "{{ messages[0].content }}"
        >>> jinja2.Template(template, trim_blocks=True).render(messages=[{"role": "user", "content": "Hm?"}])
        'Say "yes".'
    """
    if not system_prompt:
        return ""
    text = json.dumps(system_prompt, ensure_ascii=False)  # Jinja reads the escapes of JSON, but no pairs of surrogates
    return (
        "{% if not messages or messages[0]['role'] != 'system' %}"
        f"{{% set messages = [{{'role': 'system', 'content': {text}}}] + messages %}}"
        "{% endif %}\n"  # which every renderer of chat templates trims
    )


def generation_of(folder: Path) -> GenerationConfig:
    """How a base says that it generates: its generation_config.json, else what its config.json tells.

    Raises:
        ModelError: Neither can be read.
    """
    try:
        if (folder / GENERATION_CONFIG_NAME).is_file():
            return GenerationConfig.from_pretrained(folder, local_files_only=True)
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: {GENERATION_CONFIG_NAME} or config.json cannot be read; fetch the base") from error


def ended(base: Path, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The base's generation settings, ended by all tokens that end an answer under this tokenizer's template.

    Raises:
        ModelError: The base's settings cannot be read, or the template cannot be used for training.
    """
    settings = generation_of(base)
    settings.eos_token_id = list(prompts.stop_ids(tokenizer, settings))
    return settings


def save(tokenizer: PreTrainedTokenizerBase, base: Path, output: Path) -> None:
    """Write a tokenizer as the base's own files, so that nothing differs but the chat template.

    Args:
        tokenizer: Of the base, with the template that is exported.
        base: The folder that it was loaded from.

    Raises:
        ModelError: What was written is not loaded as the tokenizer that was trained with.
        OSError: Disk full or not writable.
    """
    _copy(base, output, {*_FILES, *type(tokenizer).vocab_files_names.values()} - {CONFIG_FILE, TEMPLATE_FILE})
    file = base / CONFIG_FILE
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings = {key: value for key, value in stored.items() if key not in _NOT_EXPORTED}
    _write(output, settings)
    if tokenizer.chat_template:
        storage.write_atomic(output / TEMPLATE_FILE, str(tokenizer.chat_template).encode())
    if odd := differences(load(output), tokenizer):
        # a class that its maker named cuts text in another way than tokenizer.json, which the run read
        _write(output, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
        odd = differences(load(output), tokenizer)
    if odd:
        raise ModelError(
            f"{base}: transformers cuts text for this type of model by a class of its own, and not as tokenizer.json "
            f"there says ({odd[0]} differs), so whoever loads a merged export would give it other tokens; export peft "
            "or vllm alone"
        )


def _write(folder: Path, settings: dict[str, Any]) -> None:
    """tokenizer_config.json."""
    text = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
    storage.write_atomic(folder / CONFIG_FILE, text.encode())


def copy(checkpoint: Path, output: Path) -> None:
    """The tokenizer of an exported checkpoint into another folder."""
    _copy(checkpoint, output, {*_FILES, *load(checkpoint).vocab_files_names.values(), CONFIG_FILE, TEMPLATE_FILE})


def _copy(source: Path, output: Path, names: set[str]) -> None:
    """The files of these names that are there."""
    for name in sorted(name for name in names if (source / name).is_file()):
        shutil.copyfile(source / name, output / name)


def load(folder: Path) -> PreTrainedTokenizerBase:
    """As a user gets it.

    Raises:
        ModelError: It cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}); export it again"
        ) from error


def differences(given: PreTrainedTokenizerBase, wanted: PreTrainedTokenizerBase) -> list[str]:
    """What two tokenizers differ in, the chat template and the pad token aside; empty: nothing.

    The run's own tokenizer pads with the end token where the base has none, which no export must have.
    """
    text = f"{base_files.TEXT} <|im_end|></s>"
    odd = [] if given(text)["input_ids"] == wanted(text)["input_ids"] else ["text in tokens"]
    odd += [] if given.get_vocab() == wanted.get_vocab() else ["the vocabulary"]
    maps = [{**tokenizer.special_tokens_map, "pad_token": None} for tokenizer in (given, wanted)]
    return odd + ([] if maps[0] == maps[1] else ["a special token"])
