"""What a base's files say before a weight is loaded: whether tokens, rows and precision can fit it.

The tokenizer cuts text as the base's `tokenizer.json` does, every id that it can make has an embedding, the rows of a
run have positions, and the weights are not quantised already. All of it takes under a second for a vocabulary of
128,000 tokens; figures in docs/performance.md.
"""

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.errors import ModelError
from common.model import skeleton
from common.text import templates

FILE: Final = "tokenizer.json"
TEXT: Final = (
    "In 2024, Dr. MüllerSchmidt gave 12.5 mg at 08:30.  Two  blanks,\ta tab\nand don't: camelCase HTTPServer3, "
    "Straße, naïve, 日本語のテキスト, 한국어, ½ ²√ 🙂\U0001f469\u200d\u2695\ufe0f."
)
SENTENCE: Final = "The patient was given 25 mg at noon."


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer, which cuts text as its `tokenizer.json` does and makes no id that the base has not.

    transformers builds some tokenizers from vocabulary and merges by the class that `tokenizer_config.json` names, and
    drops the file's own steps where that class has others. The file is what the base was trained with, so it wins.

    Returns:
        A tokenizer with a pad token: a missing one becomes the end token, for masks go by position.

    Raises:
        ModelError: No tokenizer, a damaged one, or ids beyond the base's embedding.
    """
    tokenizer = _loaded(AutoTokenizer, folder)
    if (folder / FILE).is_file():
        try:
            core = Tokenizer.from_file(str(folder / FILE))
        except Exception as error:  # tokenizers raises no other class
            raise ModelError(f"{folder / FILE} is damaged; fetch the base again") from error
        if tokenizer is None or not _is_same(tokenizer, core):
            tokenizer = _loaded(PreTrainedTokenizerFast, folder)
        if tokenizer is not None and ids_of(tokenizer, TEXT) != core.encode(TEXT, add_special_tokens=False).ids:
            raise ModelError(f"{folder}: its tokenizer does not cut text as {FILE} there does; fetch the base again")
    if tokenizer is None:
        raise ModelError(f"{folder}: no tokenizer that transformers can load; fetch the base again with its {FILE}")
    _check_text(tokenizer, folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    _check_ids(tokenizer, skeleton.settings(folder), folder)
    return tokenizer


def check_unquantised(folder: Path) -> None:
    """Refuse to train on a base whose files are quantised already.

    Raises:
        ModelError: They are.
    """
    found = getattr(skeleton.settings(folder), "quantization_config", None)
    if not found:
        return
    named = found if isinstance(found, dict) else found.to_dict()
    bits = next((f", {n} bits" for n in (4, 8) if named.get(f"load_in_{n}bit") or named.get("bits") == n), "")
    raise ModelError(
        f"{folder}: the base's files are quantised already ({named.get('quant_method', 'unknown method')}{bits}): an "
        "adapter trained on them fits no other base, and can never be merged or become GGUF; take the original, "
        "unquantised base, of which model.quantization = 'nf4' makes 4-bit weights while it is loaded"
    )


def num_positions(settings: PretrainedConfig) -> int | None:
    """Longest row that a base can read; None where its positions have no end (ALiBi).

    A factor of rotary scaling counts, which some configurations have in their `max_position_embeddings` and some have
    not: the longer of the two is taken.
    """
    text = settings.get_text_config()
    listed = getattr(text, "max_position_embeddings", None)
    if not isinstance(listed, int) or listed <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    scaled = [
        int(part["factor"] * (part.get("original_max_position_embeddings") or listed))
        for part in parts
        if isinstance(part.get("factor"), int | float)
    ]
    return max([listed, *scaled])


def check_length(
    folder: Path, num_tokens: int, *, name: str = "data.max_length_tokens", num_prepended: int = 0
) -> None:
    """Refuse rows that the base has no positions for.

    Args:
        name: Of the setting that says so.

    Raises:
        ModelError: There are fewer positions.
    """
    limit = num_positions(skeleton.settings(folder))
    if limit is not None and num_tokens + num_prepended > limit:
        virtual = f", with {num_prepended} virtual tokens before each row" if num_prepended else ""
        raise ModelError(
            f"{name} = {num_tokens}{virtual}: the base in {folder} has {limit} positions; set it to at most "
            f"{limit - num_prepended}"
        )


def check_room(settings: Any, num_tokens: int, *, num_new: int) -> None:
    """Refuse a prompt and an answer that together need more positions than the base has.

    Raises:
        ModelError: There are fewer.
    """
    limit = num_positions(settings)
    if limit is not None and num_tokens + num_new > limit:
        raise ModelError(
            f"a prompt of {num_tokens} tokens and an answer of up to {num_new} need more than the {limit} positions of "
            "the base; shorten the prompt, or lower evaluation.max_new_tokens"
        )


def check_token_ids(ids: Iterator[int], base: Any) -> None:
    """Refuse tokens that the base has no embedding for; on a GPU one of them would end the process.

    Raises:
        ModelError: There is one.
    """
    size, highest = num_rows(base.config), max(ids, default=0)
    if highest >= size:
        raise ModelError(
            f"a row holds token {highest}, and the base's embedding ends at {size - 1}; a text spells a control "
            "token that the base was never given: take it out of the rows, or use the base's own tokenizer"
        )


def num_rows(settings: PretrainedConfig) -> int:
    """Tokens that a base has an embedding for."""
    return int(settings.get_text_config().vocab_size)


def _loaded(maker: Any, folder: Path) -> PreTrainedTokenizerBase | None:
    """A tokenizer from local files only; None if this class cannot be made of them."""
    try:
        found: PreTrainedTokenizerBase = maker.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # noqa: BLE001  tokenizers raises no other class
        return None
    return found


def _is_same(tokenizer: PreTrainedTokenizerBase, core: Tokenizer) -> bool:
    """Whether two tokenizers cut the probe text alike, write it alike, and have the same tokens."""
    ids = core.encode(TEXT, add_special_tokens=False).ids
    try:
        found = ids_of(tokenizer, TEXT)
    except ModelError:
        return False
    if found != ids or tokenizer.get_vocab() != core.get_vocab(with_added_tokens=True):
        return False
    return bool(
        tokenizer.decode(ids, clean_up_tokenization_spaces=False) == core.decode(ids, skip_special_tokens=False)
    )


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text alone.

    Raises:
        ModelError: The tokenizer cannot cut it, as one whose vocabulary is not its own.
    """
    try:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # tokenizers raises no other class
        raise ModelError(
            f"no tokenizer: {type(tokenizer).__name__} fails on plain text; fetch the base again"
        ) from error


def _check_text(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A plain sentence must come back, case and blanks aside: an empty vocabulary makes nothing or one token of it."""

    def folded(text: str) -> str:
        return "".join(unicodedata.normalize("NFKC", text).casefold().split())

    ids = ids_of(tokenizer, SENTENCE)
    back: str = tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[assignment]
    if folded(back) != folded(SENTENCE):
        raise ModelError(
            f"{folder}: no tokenizer: a plain sentence becomes {len(ids)} tokens of {len(tokenizer)}, and does not "
            f"come back; fetch the base again with its {FILE}"
        )


def _check_ids(tokenizer: PreTrainedTokenizerBase, settings: PretrainedConfig, folder: Path) -> None:
    """Every token that a row, a template or padding can need must have a row of the embedding.

    Some bases bring control tokens for pictures that the text model has no embedding for; they may be there.
    """
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"{folder}: its tokenizer has neither a pad token nor an end token; set eos_token in tokenizer_config.json"
        )
    size = num_rows(settings)
    remedy = f"the embedding of the base in {folder} has {size} rows; "
    for name in ("pad_token", "eos_token", "bos_token"):
        number = getattr(tokenizer, f"{name}_id")
        if number is not None and number >= size:
            raise ModelError(
                f"the tokenizer's {name} {getattr(tokenizer, name)} has id {number}, and {remedy}set {name} in "
                "tokenizer_config.json to a token that the base has"
            )
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    template = f"{tokenizer.chat_template or ''} {' '.join(templates.CHATML_TOKENS)}"
    beyond = {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if number >= size and (number not in control or token in template)
    }
    if beyond:
        token, number = min(beyond.items(), key=lambda item: item[1])
        raise ModelError(
            f"the tokenizer has {len(beyond)} tokens that the base has not, such as {token} with id {number}, and "
            f"{remedy}use the base's own tokenizer, or resize the base's embedding and save it"
        )
