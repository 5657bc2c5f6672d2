"""Control tokens that a row spells are text: they are cut into ordinary tokens, and the template's own stay whole.

A tokenizer takes every occurrence of an added token for the token itself, whoever wrote it. So a text in which a row
spells one goes through a twin of the tokenizer whose control tokens have secret names, which only the template's own
tokens are given: ids and all else are the same.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from common.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Core
    from transformers import PreTrainedTokenizerBase as Tokenizer

_PIPED: Final = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
Span = tuple[int, int]
Piece = tuple[int, int, frozenset[str]]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: All of it.
        contents: Where the messages' own texts are, in the order of the text; the template wrote all else.
        roles: Whose they are.
        answers: Where each answer is that is trained on: from its own text, or from white space of the template that
            follows the generation prompt, to the end of its end-of-turn token.
        opening: What the template puts into the generation prompt as if an answer had begun, such as a block without
            thoughts; nothing in most.
    """

    text: str
    contents: tuple[Span, ...]
    roles: tuple[str, ...]
    answers: tuple[Span, ...] = ()
    opening: str = ""


@dataclass(frozen=True)
class _Known:
    """What is worked out of a tokenizer once.

    Attributes:
        tokens: All added tokens that are not white space; the value says whether they are special.
        pattern: Finds them, the longest first.
        names: Their names in the twin.
        twin: The tokenizer under these names.
    """

    tokens: Mapping[str, bool]
    pattern: re.Pattern[str]
    names: Mapping[str, str]
    twin: "list[Core]"


_KNOWN: "WeakKeyDictionary[Tokenizer, _Known]" = WeakKeyDictionary()


def added(tokenizer: "Tokenizer") -> re.Pattern[str]:
    """A pattern of all added tokens, special or not; runs of white space, which some tokenizers have too, aside."""
    return _known(tokenizer).pattern


def controls(tokenizer: "Tokenizer", *, role: str, written: str, opening: str = "") -> frozenset[str]:
    """Give the tokens that are text where a message spells them.

    Those that are special, whatever list the tokenizer has them in, those of the form <|...|>, and those that the
    template itself writes. An answer may hold what is not special and opens an answer, as <think> does, or what only
    the template's source has, as <tool_call>: the model is to write these itself. Other added tokens are words.

    Args:
        written: What the template wrote in this conversation.
        opening: What of that opens an answer.

    Returns:
        Their texts.
    """
    found = set()
    for token, is_special in _known(tokenizer).tokens.items():
        if is_special or _PIPED.fullmatch(token):
            found.add(token)
        elif role == "assistant":
            found |= {token} if token in written and token not in opening else set()
        elif token in written or token in str(tokenizer.chat_template):
            found.add(token)
    return frozenset(found)


def require_fast(tokenizer: "Tokenizer") -> None:
    """Refuse a tokenizer that cannot tell which characters a token covers.

    Raises:
        ModelError: It is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            "the tokenizer is not a fast one, so answers cannot be located in the text: "
            "give a model folder that has a tokenizer.json"
        )


def tokenise(found: Rendered, tokenizer: "Tokenizer") -> tuple[list[int], list[tuple[int, int]]]:
    """Give the tokens of a conversation; what its messages spell is text.

    Returns:
        Ids, and the characters that each covers.
    """
    if any(added(tokenizer).search(found.text, *span) for span in found.contents):
        texts = pieces(found, tokenizer)
        if spelled(found.text, texts, tokenizer):
            return encode(found.text, texts, tokenizer)
    result = tokenizer(found.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(result["input_ids"]), list(result["offset_mapping"])


def pieces(found: Rendered, tokenizer: "Tokenizer") -> list[Piece]:
    """Give each message's own place, with the tokens that are text in it."""
    edges = [0, *(edge for span in found.contents for edge in span), len(found.text)]
    written = "\0".join(found.text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))
    texts = {role: controls(tokenizer, role=role, written=written, opening=found.opening) for role in set(found.roles)}
    return [(start, end, texts[role]) for (start, end), role in zip(found.contents, found.roles, strict=True)]


def spelled(text: str, pieces: Sequence[Piece], tokenizer: "Tokenizer") -> list[re.Match[str]]:
    """Find the control tokens that messages spell.

    Args:
        pieces: Start and end of each message's own text, and what is text there.

    Returns:
        Where they are, in order.
    """
    found = _known(tokenizer).pattern.finditer(text)
    return [one for one in found if _is_spelled(one, pieces)]


def encode(text: str, pieces: Sequence[Piece], tokenizer: "Tokenizer") -> tuple[list[int], list[tuple[int, int]]]:
    """Give the tokens of a conversation in which a message spells a control token.

    Args:
        pieces: As for `spelled`.

    Returns:
        Ids, and the characters of `text` that each covers.
    """
    known = _known(tokenizer)
    if not known.twin:
        known.twin.append(_twin(tokenizer, known.names))
    parts, origin, place = [], [], 0
    for one in known.pattern.finditer(text):
        if _is_spelled(one, pieces):
            continue
        name = known.names[one[0]]
        parts += [text[place : one.start()], name]
        origin += [*range(place, one.start()), *[one.start()] * len(name)]
        place = one.end()
    parts.append(text[place:])
    origin += range(place, len(text) + 1)
    result = known.twin[0].encode("".join(parts), add_special_tokens=False)
    # a token's end is where the next character begins, also behind a name, which is longer or shorter than its token
    return result.ids, [
        (origin[left], origin[right] if right > left else origin[left]) for left, right in result.offsets
    ]


def _is_spelled(one: re.Match[str], pieces: Sequence[Piece]) -> bool:
    """Whether a token that was found touches a message in which it is text."""
    return any(one.start() < end and start < one.end() and one[0] in texts for start, end, texts in pieces)


def _known(tokenizer: "Tokenizer") -> _Known:
    """Worked out once a tokenizer."""
    if tokenizer not in _KNOWN:
        tokens = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        tokens = {content: is_special for content, is_special in tokens.items() if content.strip()}
        pattern = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)"
        secret = secrets.token_hex(8)
        names = {token: f"\ue000{secret}{number}\ue001" for number, token in enumerate(tokens)}
        _KNOWN[tokenizer] = _Known(tokens, re.compile(pattern), names, [])
    return _KNOWN[tokenizer]


def _twin(tokenizer: "Tokenizer", names: Mapping[str, str]) -> "Core":
    """The same tokenizer with other names for its added tokens."""
    from tokenizers import Tokenizer as Core

    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in stored["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocabulary = stored["model"]["vocab"]
    if isinstance(vocabulary, dict):
        stored["model"]["vocab"] = {names.get(text, text): number for text, number in vocabulary.items()}
    else:  # Unigram: pairs of text and score
        stored["model"]["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if unknown := stored["model"].get("unk_token"):
        stored["model"]["unk_token"] = names.get(unknown, unknown)
    core = Core.from_str(json.dumps(stored))
    core.no_truncation()
    core.no_padding()
    return core
