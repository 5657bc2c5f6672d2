"""The commands for audit logs: the coordinator's own, and those that a site hands over."""

from pathlib import Path
from typing import Annotated

import typer

from common import cli

app = cli.make(
    "audit",
    "Audit logs: signed, chained, append-only.",
    examples=(
        "silotune-server audit show --operator-key op.pem",
        "silotune-server audit verify audit.jsonl --key HEX --heads heads.jsonl --owner north",
    ),
)
LogArgument = Annotated[Path | None, typer.Argument(help="An audit log.", metavar="[AUDIT.jsonl]")]
KeyOption = Annotated[str, typer.Option(help="Public key of the log's signer, 64 hexadecimal digits.")]
OperatorOption = Annotated[Path | None, typer.Option(help="Instead of both: the operator's key, whose own log it is.")]
FolderOption = Annotated[Path | None, typer.Option(help="Where that log lies; default: beside the key.")]


@app.command()
def show(
    log: LogArgument = None,
    key: KeyOption = "",
    operator_key: OperatorOption = None,
    audit_folder: FolderOption = None,
    last: Annotated[int, typer.Option(min=1, help="Newest entries to show.")] = 20,
    json: cli.JsonOption = False,
) -> None:
    """Show the newest entries of an audit log.

    \b
    Examples:
      silotune-server audit show --operator-key op.pem --last 50
    """
    from common.trust import audit_view

    entries = audit_view.newest(*_named(log, key, operator_key, audit_folder), limit=last)
    cli.emit({"entries": entries}, as_json=json, show=lambda: cli.show(audit_view.render(entries)))


@app.command()
def verify(
    log: LogArgument = None,
    key: KeyOption = "",
    operator_key: OperatorOption = None,
    audit_folder: FolderOption = None,
    heads: Annotated[Path | None, typer.Option(help="Heads that were kept elsewhere: finds a cut tail.")] = None,
    owner: Annotated[str, typer.Option(help="Whose log it is; default: the operator's of this key.")] = "",
    json: cli.JsonOption = False,
) -> None:
    """Check every line of an audit log.

    \b
    Examples:
      silotune-server audit verify --operator-key op.pem --heads from-alder.jsonl
      silotune-server audit verify north.jsonl --key 3b6a27bc... --heads op-audit/audit-heads.jsonl --owner north
    """
    from common.trust import audit_view
    from common.trust import heads as audit_heads

    path, public_key = _named(log, key, operator_key, audit_folder)
    result = audit_view.verify(path, public_key, heads=heads, owner=owner or audit_heads.operator(public_key))
    line = f"{path}: {result['num_entries']} entries, whole; {result['num_heads_checked']} heads checked"
    cli.emit(result, as_json=json, show=lambda: cli.show(line))


@app.command()
def heads(
    operator_key: Annotated[Path, typer.Option(help="The operator's key.")],
    audit_folder: FolderOption = None,
    out: Annotated[Path | None, typer.Option(help="Copy all kept heads here, for a site's audit verify.")] = None,
    json: cli.JsonOption = False,
) -> None:
    """Show the last known head of each site's audit log.

    \b
    Examples:
      silotune-server audit heads --operator-key op.pem --out heads.jsonl
    """
    from common.trust import audit_view
    from server.fleet import trail

    folder = audit_folder or trail.folder_of(operator_key)
    result = audit_view.kept(folder / trail.HEADS_FILE, out=out)
    cli.emit(result, as_json=json, show=lambda: cli.show(audit_view.render_heads(result["heads"])))


def _named(log: Path | None, key: str, operator_key: Path | None, audit_folder: Path | None) -> tuple[Path, str]:
    """The log that is meant, and the public key of its signer.

    Raises:
        ConfigError: Neither a log with its key nor an operator's key is given, or both.
    """
    from common.errors import ConfigError
    from common.trust import identity
    from server.fleet import trail

    if operator_key and not log and not key:
        folder = audit_folder or trail.folder_of(operator_key)
        return folder / trail.AUDIT_FILE, identity.public_hex(identity.load(operator_key))
    if log and key and not operator_key:
        return log, key
    raise ConfigError("name a log and its --key, or --operator-key for the coordinator's own log")
