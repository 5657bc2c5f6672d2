"""The command by which a coordinator looks for what would stop a run."""

from pathlib import Path
from typing import Annotated

import typer

from common import cli
from common.errors import ConfigError


def doctor(
    federation: Annotated[Path | None, typer.Option(help="The folder that provision made.", metavar="DIR")] = None,
    gateway: Annotated[Path | None, typer.Option(help="The gateway's own file.", metavar="GATEWAY.toml")] = None,
    run: Annotated[Path | None, typer.Option(help="A run file.", metavar="RUN.toml")] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of its base; default: model.base, in the store.")] = None,
    superlink: Annotated[str, typer.Option(help="A SuperLink without a gateway, host:port.")] = "",
    certificate: Annotated[
        Path | None, typer.Option(help="Operator's certificate, PEM; default: the federation's first operator's.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key, PEM, mode 0600.")] = None,
    json: cli.JsonOption = False,
) -> None:
    """Look for what would stop a run, and name each remedy.

    Looks at what is named: the federation's folder, the gateway, the SuperLink, a run file. Changes nothing. Exit code
    1 if a check failed.

    \b
    Examples:
      silotune-server doctor --federation onco-eu --gateway GATEWAY.toml --run RUN.toml
      silotune-server doctor --superlink 127.0.0.1:8000 --run RUN.toml --base models/embedded
    """
    from common.doctor import doctor as doctoring
    from server.doctor import examine

    if (certificate is None) != (key is None):
        raise ConfigError("--certificate and --key go together; give both, or neither")
    operator = (certificate, key) if certificate is not None and key is not None else None
    machine = examine.Machine(federation, gateway, run, base, superlink, operator)
    results = examine.examine(machine)
    cli.emit(doctoring.as_dict(results), as_json=json, show=lambda: doctoring.show(doctoring.render(results)))
    raise typer.Exit(0 if doctoring.is_healthy(results) else 1)
