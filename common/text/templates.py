"""Chat templates: those that are built in, and what is put before a base's own so that a run can be trained with it.

What is put before it is part of the template from then on, in training, evaluation, `serve` and every export, so that
whoever renders a conversation with an exported template gets the tokens of training.
"""

import datetime
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from jinja2 import TemplateError

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
_CLOCK: Final = "strftime_now"
_DIRECTIVES: Final = "aAbBdmyYjHMSpIwuUWVG"
_FORMATS: Final = re.compile(r"strftime_now\(\s*(['\"])([^'\"{}]*)\1\s*\)")
_PINNED: Final = "{%- macro strftime_now(format) -%}"
# Gemma's authors put the system text so before the first question in the template of Gemma 3.
_FOLDED: Final = (
    "{%- if messages[0]['role'] == 'system' and messages[1] is defined and messages[1]['role'] == 'user' -%}"
    "{%- set messages = [{'role': 'user', 'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']}]"
    " + messages[2:] -%}"
    "{%- endif -%}"
)
_UNTHINKING: Final = "{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}"
_OPENED: Final = (
    "{%- if add_generation_prompt and (enable_thinking is not defined or not enable_thinking) -%}{{- OPENING -}}"
    "{%- endif -%}"
)
_SYSTEM, _QUESTION, _ANSWER = "\ue000", "\ue001", "\ue002"  # private use: no template has them or takes them away


def needs_date(template: str) -> bool:
    """Whether a template prints the day on which it is rendered, and nobody has told it which.

    Example:
        >>> needs_date("{{ strftime_now('%d') }}"), needs_date(with_date("{{ strftime_now('%d') }}", "2026-03-04"))
        (True, False)
    """
    return _CLOCK in template and _PINNED not in template


def is_dated(template: str) -> bool:
    """Whether a template prints a day that it was told."""
    return _PINNED in template


def with_date(template: str, date: str) -> str:
    """A template for which every day is this one.

    Args:
        template: Any; one that asks for no date is given back as it is.
        date: YYYY-MM-DD; empty: the template asks the clock wherever it is rendered.

    Returns:
        The template after a macro that takes the place of `strftime_now`.

    Raises:
        ValueError: No such date.

    Example:
        >>> import jinja2
        >>> made = with_date("Today Date: {{ strftime_now('%d %b %Y') }}", "2026-03-04")
        >>> jinja2.Template(made).render()
        'Today Date: 04 Mar 2026'
    """
    if not date or not needs_date(template):
        return template
    day = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())
    values = {f"%{letter}": day.strftime(f"%{letter}") for letter in _DIRECTIVES}
    values |= {f"%-{letter}": str(int(values[f"%{letter}"])) for letter in "dmyjHMSI"}
    replaced = "".join(f" | replace({key!r}, {value!r})" for key, value in values.items())
    # formats that stand in the template are written out, for not every engine has the filter
    known = {found[2]: day.strftime(found[2]) for found in _FORMATS.finditer(template)}
    text = f"{known!r}[format] if format in {known!r} else format{replaced}" if known else f"format{replaced}"
    return f"{_PINNED}{{{{- ({text}) -}}}}{{%- endmacro -%}}{template}"


def fitted(tokenizer: "Tokenizer") -> str:
    """A base's own template, with what its authors leave to those who call it.

    A system message that it refuses, or leaves out, goes before the first question. What it puts between the generation
    prompt and an answer, as the empty block of thoughts of Qwen 3, becomes part of the generation prompt, by the
    template's own switch `enable_thinking` if it has one; who renders with `enable_thinking=True` gets it without.

    Returns:
        The template; as it was where nothing is missing, and where it cannot be used for training at all, which
        `common.text.chat` refuses with a remedy as soon as there is a row.
    """
    template = str(tokenizer.chat_template)
    if not _takes_system(tokenizer, template) and _takes_system(tokenizer, _FOLDED + template):
        template = _FOLDED + template
    gap = _gap(tokenizer, template)
    if not gap.strip():
        return template
    if not _gap(tokenizer, _UNTHINKING + template).strip():
        return _UNTHINKING + template
    opened = template + _OPENED.replace("OPENING", repr(gap))
    return template if _gap(tokenizer, opened) else opened


def apply(tokenizer: "Tokenizer", talk: Sequence[dict[str, str]], *, is_prompt: bool = False, **options: Any) -> str:
    """Render messages as text.

    Args:
        is_prompt: Whether an answer follows.
        options: Variables of the template, and `chat_template` for another one.

    Raises:
        TemplateError: The template refuses them; its text may quote a message.
    """
    try:
        text = tokenizer.apply_chat_template(list(talk), tokenize=False, add_generation_prompt=is_prompt, **options)
    except TypeError as error:  # a template that adds text to a content that is none
        raise TemplateError(type(error).__name__) from None
    return str(text)


def _takes_system(tokenizer: "Tokenizer", template: str) -> bool:
    """Whether a system message is in the text, before a question alone and before one with its answer."""
    asked = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _QUESTION}]
    answered = [*asked, {"role": "assistant", "content": _ANSWER}]
    try:
        prompt = apply(tokenizer, asked, is_prompt=True, chat_template=template)
        whole = apply(tokenizer, answered, chat_template=template)
    except TemplateError:
        return False
    return all(text.count(_SYSTEM) == 1 and text.count(_QUESTION) == 1 for text in (prompt, whole))


def _gap(tokenizer: "Tokenizer", template: str) -> str:
    """What a template puts between the generation prompt and the answer; nothing where the one does not lead to the
    other."""
    asked = [{"role": "user", "content": _QUESTION}]
    try:
        prompt = apply(tokenizer, asked, is_prompt=True, chat_template=template)
        whole = apply(tokenizer, [*asked, {"role": "assistant", "content": _ANSWER}], chat_template=template)
    except TemplateError:
        return ""
    before, _, _ = whole.partition(_ANSWER)
    return before.removeprefix(prompt) if before.startswith(prompt) else ""
