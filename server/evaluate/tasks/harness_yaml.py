"""Harness tasks as data: read by a YAML loader without tags, keys and values from closed lists, templates in a sandbox.

lm-evaluation-harness 0.4.13 runs code that a folder of tasks brings, in five ways: `!function` (under any spelling that
YAML has for the tag), `class`, callables of `custom_dataset`, metrics that its registry does not know and that the
package `evaluate` then loads from a folder or the hub, and jinja2 templates, which it renders without a sandbox when a
task is loaded. Here a folder's files are read without it, and it gets what was found to be plain.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.errors import ConfigError, DataError

MAX_BYTES: Final = 1 << 20
_TEXTS: Final = frozenset({
    "task", "task_alias", "tag", "dataset_path", "dataset_name", "training_split", "validation_split", "test_split",
    "fewshot_split", "doc_to_text", "doc_to_target", "doc_to_choice", "description", "target_delimiter",
    "fewshot_delimiter", "output_type", "gen_prefix",
})  # fmt: skip
_OTHERS: Final = frozenset({
    "dataset_kwargs", "fewshot_config", "num_fewshot", "metric_list", "generation_kwargs", "repeats", "filter_list",
    "metadata",
})  # fmt: skip
_LISTS: Final = frozenset(("tag", "doc_to_choice", "doc_to_target"))  # may be lists, too
_FEWSHOT: Final = frozenset({
    "sampler", "split", "fewshot_indices", "samples", "doc_to_text", "doc_to_choice", "doc_to_target", "gen_prefix",
    "fewshot_delimiter", "target_delimiter",
})  # fmt: skip
_SAMPLERS: Final = frozenset(("default", "first_n"))
_FILTERS: Final = frozenset({
    "regex", "regex_pos", "remove_whitespace", "multi_choice_regex", "take_first", "take_first_k", "majority_vote",
    "lowercase", "uppercase", "map", "format_span",
})  # fmt: skip
_ESCAPE: Final = "{{ ''.__class__.__mro__ }}"  # what a template must not reach


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without tags of its own, and without aliases, by which a short file becomes a long one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("alias")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def tasks(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The tasks of a folder: name to file and content; a file that is not plain YAML stands under its own path.

    Returns:
        Content is empty for a file that cannot be read as plain YAML.
    """
    contents: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        content: Any = None
        # A file that is too large or no plain YAML has no content.
        with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
            if path.stat().st_size <= MAX_BYTES:
                content = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)  # noqa: S506  a SafeLoader
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            content = {}
        contents.setdefault(
            str(content["task"]) if isinstance(content.get("task"), str) else str(path), (path, content)
        )
    return contents


def check(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a task that is more than data.

    Args:
        content: As read.

    Raises:
        DataError: A key or a value that is not in the closed lists above.
    """
    import lm_eval.api.metrics  # noqa: F401  fills the registry
    from lm_eval.api.registry import metric_registry

    for key, value in content.items():
        if key not in _TEXTS | _OTHERS:
            raise DataError(f"{path}: {key!r} runs code or includes files, or is not known; remove it")
        if key in _TEXTS and not isinstance(value, (str, list) if key in _LISTS else str):
            raise DataError(f"{path}: {key} must be text")
    if strange := next(_not_plain(content), None):
        raise DataError(f"{path}: a value of type {strange} is neither text, number, list nor map; write it as text")
    fewshot = content.get("fewshot_config") or {}
    if not isinstance(fewshot, dict) or fewshot.keys() - _FEWSHOT or fewshot.get("sampler", "default") not in _SAMPLERS:
        raise DataError(f"{path}: fewshot_config may have {', '.join(sorted(_FEWSHOT))}; see docs/evaluation.md")
    for entry in _listed(
        content.get("metric_list") or []
    ):  # of a name that is not in its registry the harness loads code
        name: Any = entry.get("metric") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name not in metric_registry or "hf_evaluate" in entry:
            raise DataError(f"{path}: metric {name!r} is not one of the harness' own; any other would run code")
        if not isinstance(entry.get("aggregation", ""), str):
            raise DataError(f"{path}: metric {name!r}: aggregation must be text")
    for entry in _listed(content.get("filter_list") or []):
        for step in _listed(entry.get("filter") if isinstance(entry, dict) else None):
            function = step.get("function") if isinstance(step, dict) else None
            if function not in _FILTERS:
                raise DataError(f"{path}: filter {function!r} is not one of {', '.join(sorted(_FILTERS))}")


def _listed(value: Any) -> list[Any]:
    """A list, also of what stands alone."""
    return value if isinstance(value, list) else [value]


def render_in_sandbox() -> None:
    """Put a sandboxed environment in the place of the one in which the harness renders templates, for this process.

    Raises:
        ConfigError: This version of the harness renders them elsewhere; it is not used then.
    """
    from jinja2.exceptions import SecurityError
    from lm_eval import utils

    old = utils.env
    if not isinstance(old, ImmutableSandboxedEnvironment):
        made = ImmutableSandboxedEnvironment(
            loader=old.loader, undefined=old.undefined, keep_trailing_newline=old.keep_trailing_newline
        )
        made.filters.update(regex_replace=old.filters["regex_replace"])
        utils.env = made
    try:
        rendered = utils.apply_template(_ESCAPE, {})
    except SecurityError:
        return
    raise ConfigError(f"lm-evaluation-harness renders templates outside the sandbox ({len(rendered)}); install 0.4.13")


def _not_plain(value: object) -> Iterator[str]:
    """Types of values that JSON does not have."""
    if isinstance(value, Mapping):
        yield from (type(key).__name__ for key in value if not isinstance(key, str | int))
        for item in value.values():
            yield from _not_plain(item)
    elif isinstance(value, list):
        for item in value:
            yield from _not_plain(item)
    elif value is not None and not isinstance(value, str | int | float | bool):
        yield type(value).__name__
