"""Chat templates: messages to text, and where in it the answers are."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from jinja2 import TemplateError

from common.errors import ModelError
from common.rows import Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS: Final = ("<|im_start|>", "<|im_end|>")
# Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca, the prompt without input. A system message is its preamble.
ALPACA: Final = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)


def render(row: Row, tokenizer: "Tokenizer", *, system_prompt: str = "") -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and locate the answers that are trained on.

    Args:
        row: The conversation.
        tokenizer: Has the chat template.
        system_prompt: System message for rows that have none of their own.

    Returns:
        The text, and for each answer where it begins, right after the generation prompt, and where its end-of-turn
        token ends; the white space that the template puts after that is outside.

    Raises:
        ModelError: The template cannot be used for training.
    """
    messages = _with_system(row, system_prompt)
    num_context = row.num_context + len(messages) - len(row.messages)
    text = _apply(messages, tokenizer, where=row.row_id)
    for message in messages:
        if message.content.strip() not in text:
            raise ModelError(
                f"{row.row_id}: the chat template leaves out or rewrites a {message.role} message: {remedy(tokenizer)}"
            )
    turns = [k for k, message in enumerate(messages) if message.role == "assistant" and k >= num_context]
    return text, [_answer_span(messages, k, text, tokenizer, where=row.row_id) for k in turns]


def render_prompt(row: Row, tokenizer: "Tokenizer", *, system_prompt: str = "") -> str:
    """Render what comes before the last answer, the generation prompt included.

    Args:
        row: The conversation.
        tokenizer: Has the chat template.
        system_prompt: System message for rows that have none of their own.

    Returns:
        The text.

    Raises:
        ModelError: There is no template, or it refuses the messages.
    """
    return _apply(_with_system(row, system_prompt)[:-1], tokenizer, where=row.row_id, is_prompt=True)


def require_template(tokenizer: "Tokenizer") -> None:
    """Refuse a tokenizer without a chat template.

    Args:
        tokenizer: To look at.

    Raises:
        ModelError: It has none.
    """
    if not tokenizer.chat_template:
        raise ModelError('the tokenizer has no chat template: set model.chat_template = "chatml" or "alpaca"')


def remedy(tokenizer: "Tokenizer") -> str:
    """Name a setting that replaces a template that cannot be used.

    Args:
        tokenizer: Has that template.

    Returns:
        The end of a message.
    """
    is_possible = set(CHATML_TOKENS) <= tokenizer.get_vocab().keys()
    is_tried = str(tokenizer.chat_template).endswith(CHATML)
    return f'set model.chat_template = "{"chatml" if is_possible and not is_tried else "alpaca"}"'


def _answer_span(
    messages: Sequence[Message], k: int, text: str, tokenizer: "Tokenizer", *, where: str
) -> tuple[int, int]:
    """Where turn `k` lies in `text`, its end-of-turn token included."""
    before = _apply(messages[:k], tokenizer, where=where, is_prompt=True)
    through = text if k == len(messages) - 1 else _apply(messages[: k + 1], tokenizer, where=where)
    for prefix, longer in pairwise((before, through, text)):
        if not longer.startswith(prefix):
            raise ModelError(
                f"{where}: the chat template does not begin a conversation in the way it renders the first part of it "
                f"alone, so answers cannot be located: {remedy(tokenizer)}"
            )
    answer = through[len(before) :].rstrip()
    if not answer.partition(messages[k].content.strip())[2].strip():
        raise ModelError(
            f"{where}: the chat template puts no end token after an answer, so the model would never learn to stop: "
            f"{remedy(tokenizer)}"
        )
    return len(before), len(before) + len(answer)


def _apply(messages: Sequence[Message], tokenizer: "Tokenizer", *, where: str, is_prompt: bool = False) -> str:
    """Render messages as text."""
    require_template(tokenizer)
    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=is_prompt)
    except (TemplateError, TypeError):  # whose text is the template's and may quote a message
        roles = ", ".join(message.role for message in messages)
        raise ModelError(f"{where}: the chat template refuses the roles {roles}: {remedy(tokenizer)}") from None
    return str(text)


def _with_system(row: Row, system_prompt: str) -> tuple[Message, ...]:
    """The row's messages, begun by the run's system message if they have none."""
    if not system_prompt or row.messages[0].role == "system":
        return row.messages
    return (Message("system", system_prompt), *row.messages)
