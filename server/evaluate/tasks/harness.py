"""Kind `harness`: tasks of EleutherAI's lm-evaluation-harness, from a folder of the user's, with local data.

Nothing is fetched and none of the folder's code is run: a task is one plain YAML file whose data lie beside it
(`harness_yaml.py`).
"""

import contextlib
import io
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError

from common import extras
from common.errors import ConfigError, DataError
from common.model.base import Engine
from common.run.schema.tasks import EvaluationConfig, HarnessTask
from common.run.schema.training import DataConfig
from server.evaluate.figures import patterns
from server.evaluate.figures.bootstrap import Scores
from server.evaluate.tasks import harness_yaml
from server.evaluate.tasks.task import Task, digest, file_hash

_READERS: Final = ("json", "csv", "parquet", "text")
_ERRORS: Final[tuple[type[Exception], ...]] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    TemplateError,
)
_FEWSHOT_SEED: Final = 1234  # the harness' own default
_WEIGHTED: Final = {"word_perplexity": "perplexity", "byte_perplexity": "perplexity", "bits_per_byte": "bits"}


def load(settings: HarnessTask, data: DataConfig, evaluation: EvaluationConfig) -> Task:
    """Read the tasks that `harness_tasks` names.

    Raises:
        ConfigError: The harness is not installed.
        DataError: A task is not in the folder, runs code, names data elsewhere, or the harness refuses it.
    """
    folder = Path(settings.data).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of harness tasks; mend data in the run file")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        command = extras.install("harness")
        raise ConfigError(f"kind harness needs lm-evaluation-harness; install it with: {command}") from error
    harness_yaml.render_in_sandbox()
    tasks = harness_yaml.tasks(folder)
    plain = {name: plain_config(tasks, name, folder) for name in settings.harness_tasks}
    # What the harness copies of the rows goes when they are in memory.
    with tempfile.TemporaryDirectory() as cache, _translated("harness task"):
        configs = [
            {**config, "dataset_kwargs": {**config["dataset_kwargs"], "cache_dir": cache, "keep_in_memory": True}}
            for config in plain.values()
        ]
        loaded: dict[str, Any] = TaskManager(include_defaults=False).load(configs)
    for task in loaded["tasks"].values():
        for steps in task._filters:
            steps.filters = [partial(timed, make) for make in steps.filters]
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    contents = []  # hashes in the place of paths
    for config in plain.values():
        files = config["dataset_kwargs"]["data_files"]
        contents.append({**config, "dataset_kwargs": {split: file_hash(path) for split, path in files.items()}})

    def score(engine: Engine) -> Mapping[str, Scores]:
        from lm_eval.evaluator import evaluate

        from server.evaluate.tasks.harness_model import EngineLM

        with _translated("harness"):
            model = EngineLM(engine, batch_size=evaluation.batch_size)
            results: Any = evaluate(model, loaded, limit=settings.max_rows or None, bootstrap_iters=0)
        scores = {}
        for name in loaded["tasks"]:
            for key, value in results["results"][name].items():
                metric, comma, rule = key.partition(",")
                if comma and value != "N/A" and not metric.endswith("_stderr"):
                    suffix = "" if rule == "none" else f".{rule}"
                    scores[f"{name}.{metric}{suffix}"] = _rows(results, name, metric, rule)
        return scores

    return Task(settings, digest(*contents), score)


def plain_config(tasks: Mapping[str, tuple[Path, dict[str, Any]]], name: str, folder: Path) -> dict[str, Any]:
    """A task's configuration, found to be data and nothing else, with whole paths."""
    if name not in tasks:
        if odd := next((path for path, content in tasks.values() if not content), None):
            raise DataError(f"{odd}: runs code or includes files, or is no YAML; write the task as one plain YAML file")
        raise DataError(f"{folder}: no harness task {name}; there are {', '.join(tasks) or 'none'}")
    yaml_path, config = tasks[name]
    harness_yaml.check(yaml_path, config)
    if config.get("dataset_path") not in _READERS:
        raise DataError(f"{yaml_path}: dataset_path must be one of {', '.join(_READERS)}; nothing is fetched")
    options = config.get("dataset_kwargs") or {}
    files = options.get("data_files") if isinstance(options, dict) else None
    splits = files if isinstance(files, dict) else {"train": files}
    paths = {}
    for split, written in splits.items():  # a relative path is that of the YAML file
        path = (yaml_path.parent / str(written)).resolve()
        if not isinstance(written, str) or not path.is_file() or not path.is_relative_to(folder.resolve()):
            raise DataError(
                f"{yaml_path}: each split of dataset_kwargs.data_files must be one local file that is there, in "
                f"{folder}"
            )
        paths[split] = str(path)
    return {**config, "dataset_kwargs": {"data_files": paths}}


def timed(make: Callable[[], Any]) -> Any:
    """A filter of the harness; the pattern that it looks for in answers gets a limit of time."""
    made = make()
    if isinstance(getattr(made, "regex", None), re.Pattern):
        made.regex = patterns.compiled(made.regex.pattern)
    return made


def _rows(results: Any, name: str, metric: str, rule: str) -> Scores:
    """One metric row by row, which must make the harness' own figure."""
    values = [sample[metric] for sample in results["samples"][name] if sample["filter"] == rule]
    is_better = bool(results["higher_is_better"][name].get(metric, True))
    if metric in _WEIGHTED:
        rows = tuple((-float(total), float(count)) for total, count in values)
        scores = Scores(rows, _WEIGHTED[metric], is_better)
    elif metric == "perplexity":
        scores = Scores(tuple((-float(value), 1.0) for value in values), "perplexity", is_better)
    else:
        is_plain = all(isinstance(value, int | float) for value in values)
        scores = Scores(tuple((float(value),) for value in values) if is_plain else (), "mean", is_better)
    whole = float(results["results"][name][f"{metric},{rule}"])
    if not scores.rows or abs(scores.value - whole) > 1e-9 * max(1.0, abs(whole)):
        raise DataError(f"harness task {name}: {metric} is no mean of its rows, so it has no interval; remove it")
    return scores


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """The one place where the harness' errors become ours; what it prints may quote rows and goes nowhere."""
    from datasets.exceptions import DatasetsError  # slow to import, as is the next
    from yaml import YAMLError

    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    except OverflowError:
        raise DataError(
            f"{what}: a perplexity is larger than any number; texts without blanks between words, such as Japanese "
            "ones, have no word_perplexity: remove that metric, or look at the model"
        ) from None
    except (*_ERRORS, DatasetsError, YAMLError) as error:  # whose text may quote rows
        raise DataError(
            f"{what}: lm-evaluation-harness cannot use it ({type(error).__name__}); try it with "
            "`lm_eval validate --tasks NAME --include_path FOLDER`"
        ) from None
