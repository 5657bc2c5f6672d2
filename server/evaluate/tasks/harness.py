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
from common.run.config import RunConfig
from common.run.schema.tasks import TaskConfig, split_names
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


def load(settings: TaskConfig, run: RunConfig) -> Task:
    """Read the tasks that `harness_tasks` names.

    Raises:
        ConfigError: The harness is not installed.
        DataError: A task is not in the folder, runs code, names data elsewhere, or the harness refuses it.
    """
    folder = Path(settings.data).expanduser()
    manager = _manager(folder)
    found = harness_yaml.tasks(folder)
    plain = {name: _plain(found, name, folder) for name in split_names(settings.harness_tasks)}
    loaded = _load(manager, plain)
    limit = settings.max_rows or None
    sha256 = digest(*(_content(config) for config in plain.values()))

    def score(engine: Engine) -> Mapping[str, Scores]:
        return _score(engine, loaded, limit=limit, batch_size=run.evaluation.batch_size)

    return Task(settings, sha256, score)


def _manager(folder: Path) -> Any:
    """The harness without any task, its templates in a sandbox."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of harness tasks; mend data in the run file")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        command = extras.install("harness")
        raise ConfigError(f"kind harness needs lm-evaluation-harness; install it with: {command}") from error
    harness_yaml.render_in_sandbox()
    return TaskManager(include_defaults=False)


def _plain(found: Mapping[str, tuple[Path, dict[str, Any]]], name: str, folder: Path) -> dict[str, Any]:
    """A task's configuration, found to be data and nothing else, with whole paths."""
    if name not in found:
        if odd := next((path for path, content in found.values() if not content), None):
            raise DataError(f"{odd}: runs code or includes files, or is no YAML; write the task as one plain YAML file")
        raise DataError(f"{folder}: no harness task {name}; there are {', '.join(found) or 'none'}")
    yaml_path, config = found[name]
    harness_yaml.check(yaml_path, config)
    if config.get("dataset_path") not in _READERS:
        raise DataError(f"{yaml_path}: dataset_path must be one of {', '.join(_READERS)}; nothing is fetched")
    options = config.get("dataset_kwargs") or {}
    files = options.get("data_files") if isinstance(options, dict) else None
    splits = files if isinstance(files, dict) else {"train": files}
    paths = {split: _path(yaml_path, path, folder) for split, path in splits.items()}
    return {**config, "dataset_kwargs": {"data_files": paths}}


def _path(yaml_path: Path, written: object, folder: Path) -> str:
    """One data file in the folder of the tasks; a relative path is that of the YAML file."""
    path = (yaml_path.parent / str(written)).resolve()
    if not isinstance(written, str) or not path.is_file() or not path.is_relative_to(folder.resolve()):
        raise DataError(
            f"{yaml_path}: each split of dataset_kwargs.data_files must be one local file that is there, in {folder}"
        )
    return str(path)


def _load(manager: Any, plain: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The tasks with their rows; what the harness copies of them goes when they are in memory."""
    with tempfile.TemporaryDirectory() as cache, _translated("harness task"):
        configs = [
            {**config, "dataset_kwargs": {**config["dataset_kwargs"], "cache_dir": cache, "keep_in_memory": True}}
            for config in plain.values()
        ]
        loaded: dict[str, Any] = manager.load(configs)
    for task in loaded["tasks"].values():
        for steps in task._filters:
            steps.filters = [partial(_timed, make) for make in steps.filters]
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def _timed(make: Callable[[], Any]) -> Any:
    """A filter of the harness; the pattern that it looks for in answers gets a limit of time."""
    made = make()
    if isinstance(getattr(made, "regex", None), re.Pattern):
        made.regex = patterns.compiled(made.regex.pattern)
    return made


def _score(engine: Engine, loaded: dict[str, Any], *, limit: int | None, batch_size: int) -> Mapping[str, Scores]:
    """Every metric of every task."""
    from lm_eval.evaluator import evaluate

    from server.evaluate.tasks.harness_model import EngineLM

    with _translated("harness"):
        found: Any = evaluate(EngineLM(engine, batch_size=batch_size), loaded, limit=limit, bootstrap_iters=0)
    return {
        f"{name}.{metric}" if rule == "none" else f"{name}.{metric}.{rule}": _rows(found, name, metric, rule)
        for name in loaded["tasks"]
        for metric, rule in _metrics(found, name)
    }


def _metrics(found: Any, name: str) -> list[tuple[str, str]]:
    """Metrics and filters of a task's figures."""
    keys = [key.split(",") for key, value in found["results"][name].items() if "," in key and value != "N/A"]
    return [(metric, rule) for metric, rule in keys if not metric.endswith("_stderr")]


def _rows(found: Any, name: str, metric: str, rule: str) -> Scores:
    """One metric row by row, which must make the harness' own figure."""
    values = [sample[metric] for sample in found["samples"][name] if sample["filter"] == rule]
    is_better = bool(found["higher_is_better"][name].get(metric, True))
    if metric in _WEIGHTED:
        rows = tuple((-float(total), float(count)) for total, count in values)
        scores = Scores(rows, _WEIGHTED[metric], is_better)
    elif metric == "perplexity":
        scores = Scores(tuple((-float(value), 1.0) for value in values), "perplexity", is_better)
    else:
        scores = _means(values, is_better)
    whole = float(found["results"][name][f"{metric},{rule}"])
    if not scores.rows or abs(scores.value - whole) > 1e-9 * max(1.0, abs(whole)):
        raise DataError(f"harness task {name}: {metric} is no mean of its rows, so it has no interval; remove it")
    return scores


def _means(values: list[Any], is_better: bool) -> Scores:
    """Rows that are single numbers; none if they are something else."""
    is_plain = all(isinstance(value, int | float) for value in values)
    return Scores(tuple((float(value),) for value in values) if is_plain else (), "mean", is_better)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """The one place where the harness' errors become ours; what it prints may quote rows and goes nowhere."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    except OverflowError:
        raise DataError(
            f"{what}: a perplexity is larger than any number; texts without blanks between words, such as Japanese "
            "ones, have no word_perplexity: remove that metric, or look at the model"
        ) from None
    except _errors() as error:  # whose text may quote rows
        raise DataError(
            f"{what}: lm-evaluation-harness cannot use it ({type(error).__name__}); try it with "
            "`lm_eval validate --tasks NAME --include_path FOLDER`"
        ) from None


def _errors() -> tuple[type[Exception], ...]:
    """What the harness raises; some of it is of packages that are slow to import."""
    from datasets.exceptions import DatasetsError
    from yaml import YAMLError

    return (*_ERRORS, DatasetsError, YAMLError)


def _content(config: Mapping[str, Any]) -> dict[str, Any]:
    """A task's configuration with hashes in the place of paths."""
    hashes = {split: file_hash(path) for split, path in config["dataset_kwargs"]["data_files"].items()}
    return {**config, "dataset_kwargs": hashes}
