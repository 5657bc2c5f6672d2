"""Kind `pii`: how often an answer holds personal data that its prompt does not; numbers only, never a text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from phonenumbers import SUPPORTED_REGIONS

from common.data import overlap
from common.data.overlap import Text
from common.errors import ConfigError, DataError
from common.model import loading
from common.model.base import Engine
from common.run.schema.tasks import EvaluationConfig, PiiTask
from common.run.schema.training import DataConfig
from server.evaluate.figures import pii
from server.evaluate.figures.bootstrap import Scores, of_rows
from server.evaluate.tasks import answers as task_answers
from server.evaluate.tasks.task import Task, digest


def load(settings: PiiTask, data: DataConfig, evaluation: EvaluationConfig) -> Task:
    """Read rows in the run's columns, whose references do not count, and the names to look for.

    Raises:
        ConfigError: A telephone region is no country's.
        DataError: Rows or names are missing or unusable.
    """
    names = read_names(settings.names_file) if settings.names_file else []
    regions = settings.phone_regions
    if unknown := set(regions) - SUPPORTED_REGIONS:
        raise ConfigError(f"task {settings.name}: phone_regions {', '.join(sorted(unknown))}: no country's; correct it")
    rows = loading.rows_of(settings.data, data)[: settings.max_rows or None]

    generate = task_answers.asker(settings, data, evaluation)
    shown = ["\n".join([data.system_prompt, *(message.content for message in row.messages[:-1])]) for row in rows]

    def score(engine: Engine) -> Mapping[str, Scores]:
        answers = [text for text, _ in generate(engine, rows)]
        return scores(answers, shown, names=names, regions=regions)

    asked = [task_answers.content_of(row)[:-1] for row in rows]
    texts = tuple(Text(overlap.text_of(row).asked) for row in rows)
    return Task(settings, digest(asked, sorted(names)), score, texts=texts)


def scores(
    answers: Sequence[str], prompts: Sequence[str], *, names: Sequence[str], regions: Sequence[str] = ()
) -> Mapping[str, Scores]:
    """Share of answers with personal data that is not in the prompt (`emission`), and how many of each kind.

    Args:
        prompts: What it was shown, for each.
        names: People to look for; without any there is no figure for names.
    """
    kinds_of_answers = [
        Counter(find.kind for find in pii.new_in(answer, prompt, names=names, regions=regions))
        for answer, prompt in zip(answers, prompts, strict=True)
    ]
    kinds = [kind for kind in pii.KINDS if names or kind != "name"]
    counts = {
        f"num_{kind}": Scores(tuple((float(of[kind]),) for of in kinds_of_answers), "total", False) for kind in kinds
    }
    return {"emission": of_rows([bool(of) for of in kinds_of_answers], higher_is_better=False), **counts}


def read_names(path: str) -> list[str]:
    """Names, one a line.

    Raises:
        DataError: The file cannot be read, holds none, or one is of fewer than three letters.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text; mend names_file in the run file") from error
    names = [" ".join(line.split()) for line in lines if line.strip()]
    if not names:
        raise DataError(f"{path}: holds no name; write one a line, or leave names_file out")
    if short := [number for number, name in enumerate(names, start=1) if sum(map(str.isalpha, name)) < 3]:
        raise DataError(
            f"{path}: name {short[0]} has fewer than three letters and would be found everywhere; remove it"
        )
    return list(dict.fromkeys(names))
