"""Who judges: a model of this process, or one behind an OpenAI-compatible server. Either gives one word a question."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import torch

from common.data.rows import Message, Row
from common.errors import ConfigError, TransportError
from common.model import base
from common.model.base import Engine
from common.run import config
from common.run.schema.tasks import JudgeTask
from common.text import prompts
from server.evaluate.figures import likelihood
from server.evaluate.tasks.task import as_base

WORDS: Final = ("A", "B", "TIE")
TIMEOUT_S: Final = 120.0
MAX_NEW_TOKENS: Final = 16
MAX_VERDICT: Final = 100  # characters; a longer reply is none
MAX_REPLY_BYTES: Final = 1 << 20
Ask = Callable[[Sequence[str]], list[str | None]]  # questions to verdicts; None is one that says nothing
_VERDICT: Final = re.compile(
    r"\W*+(?:(?:final\s++)?(?:verdict|answer|winner|response)\b(?:\s++is\b)?|is\b)?+\W*+(A|B|TIE)\W*", re.IGNORECASE
)


def parse(reply: str) -> str | None:
    """The verdict of a reply that is nothing but one; None for any other, which is counted and never guessed at.

    Example:
        >>> parse("**A**"), parse("Verdict: tie."), parse("A is better than B"), parse("")
        ('A', 'TIE', None, None)
    """
    text = reply.strip()
    match = _VERDICT.fullmatch(text) if len(text) <= MAX_VERDICT else None  # its time grows with the length cubed
    return match[1].upper() if match else None


def of_server(settings: JudgeTask) -> Ask:
    """Ask a server, one question after another, greedily.

    Raises:
        ConfigError: The key file cannot be read, is empty, or others may read it.
    """
    headers = {}
    if path := settings.judge_key_file:
        file = Path(path).expanduser()
        try:
            key, mode = file.read_text(encoding="ascii").strip(), file.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"judge_key_file {path}: cannot be read") from error
        if mode & 0o077:
            raise ConfigError(f"judge_key_file {path}: others may read it; chmod 600 {path}")
        if not key or not key.isprintable():
            raise ConfigError(f"judge_key_file {path}: holds no key on one line")
        headers = {"authorization": f"Bearer {key}"}
    url = settings.judge_url.rstrip("/") + "/chat/completions"

    def ask(questions: Sequence[str]) -> list[str | None]:
        # No proxy of the environment: the rows go to the address of the run file and nowhere else.
        with httpx.Client(timeout=TIMEOUT_S, headers=headers, trust_env=False) as client:
            return [parse(_reply(client, url, settings.judge_model, question)) for question in questions]

    return ask


@contextmanager
def of_model(folder: Path, engine: Engine, *, sha256: str, batch_size: int) -> Iterator[Ask]:
    """Ask a model of this process: the likeliest of the words, so that every question has a verdict.

    The run's own base is the one in the engine, with the adapter as it was attached; another is loaded on the CPU and
    let go at the end.

    Args:
        sha256: Of the judge's files, as `model.hash_base` gives it.

    Raises:
        ModelError: The folder cannot be loaded.
    """
    if sha256 != engine.base_sha256:
        device = torch.device("cpu")
        tokenizer = prompts.use_template(base.load_tokenizer(folder), "tokenizer")
        settings = config.ModelConfig(base=str(folder), quantization="none")
        model = base.load_base(folder, settings, device)
        yield _by_likelihood(Engine(model, tokenizer, device, "", (), {}), batch_size)
        return
    with as_base(engine):
        yield _by_likelihood(engine, batch_size)


def _by_likelihood(engine: Engine, batch_size: int) -> Ask:
    """The likeliest word after each question, in the judge's own chat template."""

    def ask(questions: Sequence[str]) -> list[str | None]:
        rows = [Row((Message("user", text), Message("assistant", "A")), "", "a question") for text in questions]
        asked = [prompts.prompt_ids(row, engine.tokenizer)[0] for row in rows]
        words = [engine.tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS]
        pairs = [(ids, list(word)) for ids in asked for word in words]
        totals = [total for total, _ in likelihood.log_likelihoods(engine, pairs, batch_size=batch_size)]
        by_question = [totals[start : start + len(WORDS)] for start in range(0, len(totals), len(WORDS))]
        return [WORDS[sums.index(max(sums))] for sums in by_question]

    return ask


def _reply(client: httpx.Client, url: str, name: str, question: str) -> str:
    """The text of one answer.

    Raises:
        TransportError: The server cannot be reached, refuses, or answers in another form.
    """
    body = {
        "model": name,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": MAX_NEW_TOKENS,
    }
    try:
        reply = client.post(url, json=body)
    except httpx.HTTPError as error:
        raise TransportError(f"judge_url: {url} does not answer ({type(error).__name__}); start it") from error
    if reply.status_code != httpx.codes.OK or len(reply.content) > MAX_REPLY_BYTES:
        raise TransportError(f"judge_url: {url} answers with status {reply.status_code}; see its own log")
    try:
        content: Any = reply.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise TransportError(f"judge_url: {url} does not answer as an OpenAI-compatible server does")
    return content
