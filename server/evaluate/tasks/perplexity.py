"""Kind `perplexity`: how well a model foresees raw text, which no chat template touches."""

import re
from collections.abc import Mapping
from typing import Final

from common.data.overlap import Text
from common.model.base import Engine
from common.run.schema.tasks import EvaluationConfig, PerplexityTask
from common.run.schema.training import DataConfig
from server.evaluate.figures import likelihood
from server.evaluate.figures.bootstrap import Scores
from server.evaluate.tasks.task import Task, digest, table_of, text_of

MAX_WORD: Final = 20


def load(settings: PerplexityTask, data: DataConfig, evaluation: EvaluationConfig) -> Task:
    """Read the column `text_column`.

    Raises:
        DataError: The rows are missing or unusable.
    """
    texts = [
        text_of(fields, settings.text_column, where=f"{settings.name}, row {number}")
        for number, fields in enumerate(table_of(settings), start=1)
    ]
    return Task(
        settings,
        digest(texts),
        lambda engine: score(engine, texts, batch_size=evaluation.batch_size),
        texts=tuple(Text("", text) for text in texts),
    )


def score(engine: Engine, texts: list[str], *, batch_size: int) -> Mapping[str, Scores]:
    """Perplexity a token (`perplexity`) and a word (`word_perplexity`), and bits a byte of UTF-8 (`bits_per_byte`).

    Perplexities a token compare models of one tokenizer only; the others compare any. Texts without blanks between
    words, such as Japanese ones, whose words are longer than `MAX_WORD` characters on average, have none a word.

    Source: the last two as in lm-evaluation-harness 0.4.13, output type loglikelihood_rolling.
    """
    sums = likelihood.rolling(engine, texts, batch_size=batch_size)
    nats = [-total for total, _ in sums]
    num_words = [len(re.split(r"\s+", text)) for text in texts]
    sizes = {
        "perplexity": [num_tokens for _, num_tokens in sums],
        "word_perplexity": num_words,
        "bits_per_byte": [len(text.encode()) for text in texts],
    }
    if sum(map(len, texts)) > MAX_WORD * sum(num_words):
        del sizes["word_perplexity"]
    return {
        name: Scores(
            tuple(zip(nats, map(float, counts), strict=True)),
            "bits" if name == "bits_per_byte" else "perplexity",
            higher_is_better=False,
        )
        for name, counts in sizes.items()
    }
