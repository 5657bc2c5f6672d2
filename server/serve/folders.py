"""What is served: exports that pass `verify`, all on one base."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.errors import ConfigError, ModelError
from common.frame import wire
from common.model import base as model
from common.text.prompts import TemplateName
from server.export import seal, tokenizer
from server.merge import folder as merge_folder
from server.verify import verify

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Served:
    """One adapter under the name that requests choose it by.

    Attributes:
        name: Of the model in requests.
        folder: Of the adapter, as peft reads it.
        template_file: Its chat template; None: it was exported without one.
        date: Day of its run, which its chat template prints; empty: it prints none.
    """

    name: str
    folder: Path
    template: TemplateName
    template_file: Path | None
    rank: int
    date: str = ""
    system_prompt: str = ""


def verified(arguments: Sequence[str], base: Path, *, signer: str = "") -> list[Served]:
    """Verify the exports, and hold their base against the one that is here.

    Args:
        arguments: Folders, each alone or as NAME=FOLDER.
        signer: Public key that must have signed them; empty: any, or none.

    Raises:
        AuthError: Not signed as demanded.
        ConfigError: Two of one name, or a name that is the base's.
        ModelError: A folder fails `verify`, holds no adapter, or is of another base.
    """
    base_sha256 = model.hash_base(base)
    served = []
    for argument in arguments:
        given, _, path = argument.rpartition("=")
        if given and not _NAME.fullmatch(given):
            raise ConfigError(f"{wire.shown(given)}: no name for a model; 1 to 64 letters, digits, dots, - or _")
        folder = Path(path)
        verify.verify(folder, signer=signer)
        sealed = seal.read(folder)
        facts = sealed.facts
        if facts.base_sha256 != base_sha256:
            raise ModelError(
                f"{folder}: is of a base with hash {facts.base_sha256[:16]}, {base} has {base_sha256[:16]}; "
                "give the base that it was trained on"
            )
        adapter = merge_folder.adapter_folder(folder, facts)
        template = adapter / tokenizer.TEMPLATE_FILE
        rank = next(shape[0] for name, shape in sealed.adapter.items() if name.endswith(".lora_A.weight"))
        file = template if template.is_file() else None
        name = given or facts.name
        served.append(Served(name, adapter, facts.chat_template, file, rank, facts.date, facts.system_prompt))
    names = [base_name(base), *(adapter.name for adapter in served)]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two models would be called {wire.shown(doubled[0])}; name one of them: NAME=FOLDER")
    return served


def date_of(served: Sequence[Served]) -> str:
    """The day that the base's own chat template prints beside these adapters: that of the first that prints one."""
    return next((adapter.date for adapter in served if adapter.date), "")


def dates_in_words(served: Sequence[Served]) -> list[str]:
    """The days that prompts name, in words; nothing where none does."""
    names: dict[str, list[str]] = {}
    for adapter in served:
        names.setdefault(adapter.date, []).append(adapter.name)
    dates = [f"{date} ({', '.join(of_day)})" for date, of_day in names.items() if date]
    return [f"date in prompts, of the run: {'; '.join(dates)}"] if dates else []


def base_name(base: Path) -> str:
    """The base's own name in requests."""
    return base.resolve().name
