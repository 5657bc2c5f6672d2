"""The command by which a site looks for what would stop a run."""

from pathlib import Path
from typing import Annotated

import typer

from client.cli.options import NodeFile
from common import cli


def doctor(
    node_file: NodeFile,
    keys: Annotated[
        Path | None, typer.Option(help="Folder of keys and kit; default: that of agent.identity_key.", metavar="DIR")
    ] = None,
    gateway: Annotated[str, typer.Option(help="Also try the gateway, host:port; else nothing is asked.")] = "",
    run: Annotated[str, typer.Option(help="Estimate memory for an offered run: its name or hash.")] = "",
    units: Annotated[
        Path, typer.Option(help="Folder of the systemd units; else those in the folder of keys.", metavar="DIR")
    ] = Path("/etc/systemd/system"),
    json: cli.JsonOption = False,
) -> None:
    """Look for what would stop a run here, and name each remedy.

    Changes nothing, prints no row and no key, and says in plain sentences what the policy means. Exit code 1 if a check
    failed.

    \b
    Examples:
      silotune-client doctor node.toml
      silotune-client doctor node.toml --keys /etc/silotune/keys --gateway gate.example:9443
      silotune-client doctor node.toml --run triage
    """
    from client.doctor import examine
    from client.review import explain
    from common.doctor import doctor as doctoring

    found = examine.examine(examine.Patient(node_file, keys=keys, gateway=gateway, run=run, units=units))
    sentences = explain.explain(found.policy, reads_roster=found.reads_roster) if found.policy else {}
    result = {**doctoring.as_dict(found.results), "policy": sentences}
    cli.emit(
        result, as_json=json, show=lambda: doctoring.show(doctoring.render(found.results), *explain.render(sentences))
    )
    raise typer.Exit(0 if doctoring.is_healthy(found.results) else 1)
