"""What the commands of `silotune-sim` on a run share: their options, taken once as an `Order`."""

import functools
import inspect
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from common import cli

RunFile = Annotated[Path, typer.Argument(help="The run file.", metavar="RUN.toml")]
StoreOption = Annotated[Path | None, typer.Option(help="Folder with base models.")]
ModelOption = Annotated[str, typer.Option("--model", help="Another base: a folder or a name in the store.")]
DataOption = Annotated[
    str, typer.Option("--data", help="Other rows: JSONL, JSON, CSV, TSV, Parquet, a folder, or a datasets id.")
]
SHARED: Final[Mapping[str, tuple[Any, Any]]] = {  # name to type and default
    "output": (
        Annotated[Path | None, typer.Option(help="The run's folder; default: a new one under output.folder.")],
        None,
    ),
    "model": (ModelOption, ""),
    "data": (DataOption, ""),
    "store": (StoreOption, None),
    "threads": (
        Annotated[
            int, typer.Option(min=0, help="CPU threads; 0: all cores, or one in each process of the other engines.")
        ],
        0,
    ),
    "set_": (cli.SetOption, None),
    "json": (cli.JsonOption, False),
}


def of_run(
    *, run_file: Path | None = None, without: Collection[str] = (), again_without: Collection[str] = ("output",)
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command on a run of a function whose first parameter is an `Order`.

    The run file is read before the function is called, so that a wrong one is refused before torch is loaded.

    Args:
        run_file: The run file, of a command that has no argument for it.
        without: Those of `SHARED` that the command does not take.
        again_without: Parameters that `Order.again` leaves out; see `common.cli.again`.
    """

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(context: typer.Context, **given: Any) -> None:
            shared = {name: given.pop(name, default) for name, (_, default) in SHARED.items()}
            path, overrides = run_file or given.pop("run_file"), cli.overrides(shared["set_"])

            from common.run import config

            named = changes(model=shared["model"], data=shared["data"], overrides=overrides)
            config.load(path, overrides=named)

            from simulations.commands import commands

            order = commands.Order(
                path,
                named,
                output=shared["output"],
                store=shared["store"],
                as_json=shared["json"],
                num_threads=shared["threads"],
                again=cli.again(context, without=again_without),
            )
            function(order, **({"context": context} if "context" in taken else {}), **given)

        taken = dict(list(inspect.signature(function).parameters.items())[1:])
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter("context", keyword, annotation=typer.Context)]
        if run_file is None:
            parameters.append(inspect.Parameter("run_file", keyword, annotation=RunFile))
        parameters += [parameter.replace(kind=keyword) for name, parameter in taken.items() if name != "context"]
        parameters += [
            inspect.Parameter(name, keyword, annotation=annotation, default=default)
            for name, (annotation, default) in SHARED.items()
            if name not in without
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return declare


def changes(*, model: str = "", data: str = "", overrides: Mapping[str, str]) -> dict[str, str]:
    """What a command line changes, in the run file's own words."""
    named = {"model.base": model, "data.source": data}
    return {**{key: json.dumps(value, ensure_ascii=False) for key, value in named.items() if value}, **overrides}
