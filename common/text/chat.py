"""Messages to text by a chat template, and where in it each message and each answer is."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Final

from jinja2 import TemplateError

from common.data.rows import Message, Row
from common.errors import ModelError
from common.text import spelling, templates
from common.text.spelling import Rendered, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_THOUGHT_END: Final = "</think>"
_PRIVATE: Final = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))  # Unicode's private use areas


def render(row: Row, tokenizer: "Tokenizer", *, system_prompt: str = "") -> Rendered:
    """Render a conversation and locate the answers that are trained on.

    The whole conversation is rendered once, as the template has it, so an earlier answer may stand there in another
    form than it had when it was the last one: Qwen 3 leaves the thoughts of earlier answers out.

    Raises:
        ModelError: The template cannot be used for training.
    """
    messages = _with_system(row, system_prompt)
    num_context = row.num_context + len(messages) - len(row.messages)
    found, order = _located(messages, tokenizer, where=row.row_id)
    prompt, opening = _prompt(messages[:-1], messages[-1].content, tokenizer, where=row.row_id)
    places = dict(zip(order, found.contents, strict=True))
    last = len(messages) - 1
    start = places[last][0]
    blank = found.text[:start].removeprefix(prompt)
    if not found.text[:start].startswith(prompt) or blank.strip():
        raise ModelError(
            f"{row.row_id}: the chat template does not begin a conversation in the way it renders the first part of it "
            f"alone, so answers cannot be located: {remedy(tokenizer)}"
        )
    end = _turn_end(found.text[places[last][1] :], tokenizer)
    answers = []
    for k in (k for k, message in enumerate(messages) if message.role == "assistant" and k >= num_context):
        start, stop = places[k]
        if not end.strip() or not found.text.startswith(end, stop):
            raise ModelError(
                f"{row.row_id}: the chat template puts no end token after an answer, so the model would never learn to "
                f"stop: {remedy(tokenizer)}"
            )
        answers.append((start - len(blank) if found.text.endswith(blank, 0, start) else start, stop + len(end)))
    return replace(found, answers=tuple(answers), opening=opening)


def render_prompt(row: Row, tokenizer: "Tokenizer", *, system_prompt: str = "") -> Rendered:
    """Render what comes before the last answer, the generation prompt included.

    Args:
        row: The conversation; of the answer only is asked whether it begins with thoughts of its own.

    Returns:
        Text, without answers; places only where a message spells an added token.

    Raises:
        ModelError: There is no template, or it refuses the messages.
    """
    messages = _with_system(row, system_prompt)
    prompt, opening = _prompt(messages[:-1], messages[-1].content, tokenizer, where=row.row_id)
    if not any(spelling.added(tokenizer).search(message.content) for message in messages[:-1]):
        return Rendered(prompt, (), (), opening=opening)
    found, _ = _located(messages[:-1], tokenizer, where=row.row_id, is_prompt=True)
    return replace(found, text=prompt, opening=opening)


def require_template(tokenizer: "Tokenizer") -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        ModelError: It has none.
    """
    if not tokenizer.chat_template:
        raise ModelError('the tokenizer has no chat template: set model.chat_template = "chatml" or "alpaca"')


def remedy(tokenizer: "Tokenizer") -> str:
    """Name a setting that replaces a template that cannot be used.

    Returns:
        The end of a message.
    """
    is_possible = set(templates.CHATML_TOKENS) <= tokenizer.get_vocab().keys()
    is_tried = str(tokenizer.chat_template).endswith(templates.CHATML)
    return f'set model.chat_template = "{"chatml" if is_possible and not is_tried else "alpaca"}"'


def _prompt(messages: Sequence[Message], answer: str, tokenizer: "Tokenizer", *, where: str) -> tuple[str, str]:
    """What the model is shown to write this answer, and the template's opening of answers.

    An answer that brings thoughts of its own takes the opening's place.
    """
    usual = _apply(messages, tokenizer, where=where, is_prompt=True)
    bare = usual
    if "enable_thinking" in str(tokenizer.chat_template):
        bare = _apply(messages, tokenizer, where=where, is_prompt=True, is_thinking=True)
    opening = usual.removeprefix(bare)
    if opening == usual or not opening.strip():
        return usual, ""
    is_own = answer.lstrip().startswith(opening.split()[0])
    return bare if is_own else usual, opening


def _turn_end(tail: str, tokenizer: "Tokenizer") -> str:
    """What ends an answer, white space before it included: the first control token in what follows the last answer, or
    all of that if it has none."""
    found = spelling.added(tokenizer).search(tail)
    return tail[: found.end()] if found else tail.rstrip()


def _located(
    messages: Sequence[Message], tokenizer: "Tokenizer", *, where: str, is_prompt: bool = False
) -> tuple[Rendered, list[int]]:
    """The text, where each message's own text is in it, and the messages' numbers in the order of the text.

    A sign of its own is put after each message, stripped of white space at its ends, and found again. How much of that
    white space the template leaves is then seen one message at a time, from the length of the text. What comes out must
    be the rendering of the messages as they are.
    """
    text = _apply(messages, tokenizer, where=where, is_prompt=is_prompt)
    cores = [replace(message, content=message.content.strip()) for message in messages]
    taken = set().union(*(message.content for message in messages))
    signs = list(islice((chr(code) for code in chain(*_PRIVATE) if chr(code) not in taken), len(messages)))
    marked = [replace(core, content=core.content + sign) for core, sign in zip(cores, signs, strict=True)]
    plain = _apply(marked, tokenizer, where=where, is_prompt=is_prompt)
    order = sorted(range(len(messages)), key=lambda k: plain.find(signs[k]))
    spans: list[Span] = []
    for k in order:
        end, sign = plain.find(signs[k]), signs[k]
        core = _rendered(plain[:end], cores[k], is_earlier=k < len(messages) - 1)
        if plain.count(sign) != 1 or core is None:
            raise ModelError(
                f"{where}: the chat template leaves out or rewrites a message of role {messages[k].role}: "
                f"{remedy(tokenizer)}"
            )
        spans.append((end - len(core), end))
        plain = plain[:end] + plain[end + 1 :]
    if plain != text:
        plain, spans = _widened(messages, cores, order, plain, spans, tokenizer, where=where, is_prompt=is_prompt)
    if plain != text:
        raise ModelError(f"{where}: the chat template leaves out or rewrites a message: {remedy(tokenizer)}")
    return Rendered(text, tuple(spans), tuple(messages[k].role for k in order)), order


def _rendered(before: str, core: Message, *, is_earlier: bool) -> str | None:
    """What of a message stands at the end of a text: all of it, or of an earlier answer what follows its thoughts."""
    if before.endswith(core.content):
        return core.content
    rest = core.content.rpartition(_THOUGHT_END)[2].strip()
    return rest if core.role == "assistant" and is_earlier and rest and before.endswith(rest) else None


def _widened(
    messages: Sequence[Message],
    cores: Sequence[Message],
    order: Sequence[int],
    plain: str,
    spans: Sequence[Span],
    tokenizer: "Tokenizer",
    *,
    where: str,
    is_prompt: bool,
) -> tuple[str, list[Span]]:
    """Text and places with the white space at the ends of messages that the template leaves there."""

    def kept(k: int, content: str) -> int:
        changed = [replace(core, content=content) if j == k else core for j, core in enumerate(cores)]
        return len(_apply(changed, tokenizer, where=where, is_prompt=is_prompt)) - len(plain)

    parts, found, place = [], [], 0
    for k, (start, end) in zip(order, spans, strict=True):
        given, core = messages[k].content, cores[k].content
        num_left = kept(k, given.rstrip()) if given.rstrip() != core else 0
        num_right = kept(k, given.lstrip() or given) if given.lstrip() != core or not core else 0
        left, right = given[: len(given) - len(given.lstrip())], given[len(given.rstrip()) :]
        parts += [plain[place:start], left[len(left) - num_left :] if num_left > 0 else ""]
        own = len("".join(parts)) - max(num_left, 0)
        parts += [plain[start:end], right[:num_right] if num_right > 0 else ""]
        found.append((own, len("".join(parts))))
        place = end
    return "".join([*parts, plain[place:]]), found


def _apply(
    messages: Sequence[Message],
    tokenizer: "Tokenizer",
    *,
    where: str,
    is_prompt: bool = False,
    is_thinking: bool = False,
) -> str:
    """Render messages as text."""
    require_template(tokenizer)
    talk = [{"role": message.role, "content": message.content} for message in messages]
    options = {"enable_thinking": True} if is_thinking else {}
    try:
        return templates.apply(tokenizer, talk, is_prompt=is_prompt, **options)
    except TemplateError:  # whose text is the template's and may quote a message
        roles = ", ".join(message.role for message in messages)
        raise ModelError(f"{where}: the chat template refuses the roles {roles}: {remedy(tokenizer)}") from None


def _with_system(row: Row, system_prompt: str) -> tuple[Message, ...]:
    """The row's messages, begun by the run's system message if they have none."""
    if not system_prompt or row.messages[0].role == "system":
        return row.messages
    return (Message("system", system_prompt), *row.messages)
