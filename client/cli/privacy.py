"""The commands by which a site sees and keeps its privacy budget."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from client.cli.options import NodeFile
from common import cli

ledger_app = cli.make(
    "ledger",
    "This site's privacy ledger: what was spent on its rows, across all runs.",
    examples=("silotune-client ledger create node.toml",),
)


def privacy(
    node_file: NodeFile,
    run: Annotated[str, typer.Option(help="Show the curve of this run: its name or hash; default: the last.")] = "",
    json: cli.JsonOption = False,
) -> None:
    """Show what was spent of this site's privacy budget.

    What is promised and to whom, what was spent, by which run, what one more round costs, and what is not covered.

    \b
    Examples:
      silotune-client privacy node.toml
      silotune-client privacy node.toml --run triage --json
    """
    from client.review import privacy_view
    from client.review import review as desk
    from common.run import config

    page = privacy_view.page(desk.open_desk(config.load_node(node_file)), run)
    cli.emit(asdict(page), as_json=json, show=lambda: cli.show(privacy_view.render(page)))


@ledger_app.command("create")
def ledger_create(node_file: NodeFile, json: cli.JsonOption = False) -> None:
    """Begin the privacy ledger of this site's data set, with nothing spent.

    Budget and delta are those of the policy's [privacy]. Once for each data set: a ledger that is lost cannot be begun
    anew, and rows or units that have one under another name or unit column get no second one.

    \b
    Examples:
      silotune-client ledger create node.toml
    """
    from client.data import site_files
    from client.memory import site_ledger
    from client.review import review as desk
    from common.run import config

    node = config.load_node(node_file)
    paths = filter(None, (node.data.path, node.data.held_out_path))
    rows = [row for path in paths for row in site_files.read_rows(node.data, path)]
    num_units = len({row.unit for row in rows})
    made = site_ledger.create(num_units=num_units, rows=rows, **_parts(desk.open_desk(node)))
    keep = f"keep a copy of {made.path} elsewhere, a new one after every run"
    _show(made, json, keep, cli.next_step("silotune-client", "privacy", node_file))


@ledger_app.command("lower")
def ledger_lower(node_file: NodeFile, json: cli.JsonOption = False) -> None:
    """Bring the ledger's budget down to the policy's, which was lowered and signed again.

    It can never be raised.

    \b
    Examples:
      silotune-client ledger lower node.toml
    """
    from client.memory import site_ledger
    from client.review import review as desk
    from common.run import config

    lowered = site_ledger.lower(**_parts(desk.open_desk(config.load_node(node_file))))
    _show(lowered, json, cli.next_step("silotune-client", "privacy", node_file))


def _parts(desk: Any) -> dict[str, Any]:
    return {"node": desk.node, "rules": desk.policy, "key": desk.key, "history": desk.history, "log": desk.log}


def _show(ledger: Any, as_json: bool, *ending: str) -> None:
    """Print the ledger's promise."""
    result = {"ledger": str(ledger.path), **asdict(ledger.budget().header)}
    lines = (f"{name:<12} {value}" for name, value in result.items())
    cli.emit(result, as_json=as_json, show=lambda: cli.show(*lines, *ending))
