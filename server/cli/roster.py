"""`silotune-server roster`: changes of the roster that the members of the governance sign one by one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common import cli
from common.errors import ConfigError

if TYPE_CHECKING:
    from server.members.changes import Change, Make

app = cli.make(
    "roster",
    "Changes of the roster, signed by one member of the governance at a time.",
    examples=(
        "silotune-server revoke alder --federation onco-eu --propose revoke-alder.json",
        "silotune-server roster sign revoke-alder.json --key 2.key --pinned federation.json --roster roster.json",
        "silotune-server roster publish revoke-alder.json --federation onco-eu",
    ),
)
GovernanceFiles = Annotated[
    list[Path] | None, typer.Option(help="A governance key; repeat it for each of the quorum.", metavar="KEYFILE")
]
ProposeFile = Annotated[
    Path | None, typer.Option(help="Instead: write the change here, for members to sign one by one.", metavar="FILE")
]
FederationFolder = Annotated[Path, typer.Option(help="The folder that provision made.", metavar="DIR")]
ProposalFile = Annotated[Path, typer.Argument(help="What --propose wrote.", metavar="PROPOSAL.json")]
PinnedFile = Annotated[Path, typer.Option(help="Your own copy of federation.json.", metavar="FILE")]
RosterFile = Annotated[Path, typer.Option(help="Your own copy of the newest roster.json.", metavar="FILE")]


@app.command()
def show(proposal_file: ProposalFile, pinned: PinnedFile, roster: RosterFile, json: cli.JsonOption = False) -> None:
    """Show what a proposal changes and who has signed it. Signs nothing.

    \b
    Examples:
      silotune-server roster show admit-alder.json --pinned federation.json --roster roster.json
    """
    _, lines, result = _read(proposal_file, pinned_file=pinned, roster_file=roster)
    cli.emit(result, as_json=json, show=lambda: cli.show(*lines))


@app.command()
def sign(
    proposal_file: ProposalFile,
    key: Annotated[Path, typer.Option(help="Your governance key.", metavar="KEYFILE")],
    pinned: PinnedFile,
    roster: RosterFile,
    out: Annotated[Path | None, typer.Option(help="For the signed proposal; default: the same file.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Sign without asking.")] = False,
    json: cli.JsonOption = False,
) -> None:
    """Sign a proposal as one member of the governance, on your own machine.

    It is held against your own copies of federation.json and of the newest roster, and what changes is shown first.

    \b
    Examples:
      silotune-server roster sign admit-alder.json --key 2.key --pinned federation.json --roster roster.json
    """
    from common.trust import governance, identity
    from server.members import proposal

    signed, lines, result = _read(proposal_file, pinned_file=pinned, roster_file=roster)
    member = identity.load(key)
    public = governance.load(pinned).member(member)
    if not yes:
        cli.show(*lines)
        typer.confirm("Sign this?", abort=True, err=True)
    complete = proposal.sign(signed, [member])
    proposal.write(out or proposal_file, complete)
    shown = {**result, "signed_by": sorted(complete.signatures), "missing": max(0, result["missing"] - 1)}
    words = f"next: {_next(shown['missing'], out or proposal_file)}"
    cli.emit(shown, as_json=json, show=lambda: cli.show(f"signed by {public[:16]}", words))


@app.command()
def publish(
    proposal_files: Annotated[list[Path], typer.Argument(help="The signed proposal, or copies.", metavar="FILE...")],
    federation: FederationFolder,
    json: cli.JsonOption = False,
) -> None:
    """Let a proposal hold that a quorum has signed; copies with one signature each are put together.

    \b
    Examples:
      silotune-server roster publish admit-alder.json --federation onco-eu
      silotune-server roster publish from-1.json from-3.json --federation onco-eu
    """
    import datetime

    from server.members import changes

    change = changes.publish(federation, proposal_files, now=datetime.datetime.now(datetime.UTC))
    show_change(change, federation=federation, as_json=json)


def decide(
    make: "Make",
    *,
    federation: Path,
    governance: list[Path] | None,
    propose: Path | None,
    as_json: bool,
) -> None:
    """Change the roster with the keys that were given, or write a proposal.

    Raises:
        ConfigError: Neither keys nor a file for the proposal, or both.
    """
    import datetime

    from server.members import changes

    if bool(governance) == bool(propose):
        raise ConfigError(
            "give --governance KEYFILE for each of the quorum, or --propose FILE to collect signatures one by one"
        )
    if governance:
        now = datetime.datetime.now(datetime.UTC)
        change = changes.at_once(federation, make, governance_files=governance, now=now)
        return show_change(change, federation=federation, as_json=as_json)
    path = Path(propose or "")
    proposed = changes.propose(federation, make, path=path)
    result = {"name": proposed.name, "epoch": proposed.roster.epoch, "proposal": str(path)}
    words = (
        f"{proposed.name}: epoch {proposed.roster.epoch} is proposed in {path}; nothing has changed yet",
        f"next: each member signs it: silotune-server roster sign {cli.quoted([path])} --key KEYFILE "
        "--pinned federation.json --roster roster.json",
    )
    return cli.emit(result, as_json=as_json, show=lambda: cli.show(*words))


def show_change(change: "Change", *, federation: Path, as_json: bool) -> None:
    """Print a change of the roster, and who needs what for it to hold everywhere."""
    result = {"name": change.name, "epoch": change.epoch, "others": list(change.others)}
    if change.kit and change.expires_at:
        result |= {"kit": str(change.kit), "expires_at": change.expires_at.isoformat()}
    steps = _handed_out(change, federation)
    result["next"] = [f"{who}: {what}" for who, what in steps]
    lines = [f"{change.name}: roster epoch {change.epoch}", *(f"next   {who:<11} {what}" for who, what in steps)]
    cli.emit(result, as_json=as_json, show=lambda: cli.show(*lines))


def _handed_out(change: "Change", federation: Path) -> list[tuple[str, str]]:
    """Who needs what after a change of the roster, in this order."""
    lists = f"{federation}/roster.json {federation}/revoked.txt"
    steps = [("gateway", f"install -m 644 {lists} /etc/silotune/    (on its machine; it reads them within seconds)")]
    if change.kit:
        words = " --words WORDS, the federation's, which you read out" if change.is_admitted else ""
        install = f"silotune-client install {change.kit.name} --keys KEYS{words}"
        steps.append((change.name, f"send {change.kit}; there: {install}"))
    if change.others:
        names = ", ".join(change.others)
        steps += [
            ("other sites", f"{names}: a link with --agent fetches roster.json from the gateway within half a minute"),
            ("without it", f"send {federation}/roster.json; there: silotune-client roster roster.json --keys KEYS"),
        ]
    steps.append(("members", f"send {federation}/roster.json to those who sign one by one; the next change follows it"))
    return steps


def _read(path: Path, *, pinned_file: Path, roster_file: Path) -> tuple[Any, list[str], dict[str, Any]]:
    """A proposal that was checked, what it changes in words, and the same for programs."""
    from common.trust import governance, roster
    from server.members import proposal

    pinned = governance.load(pinned_file)
    current = roster.load(roster_file, governance=pinned, epoch_min=1)
    signed = proposal.read(path)
    proposal.check(signed, current=current, pinned=pinned)
    lines = proposal.in_words(signed.proposal, current=current)
    missing = max(0, pinned.quorum - len(signed.signatures))
    lines.append(f"signed by {len(signed.signatures)} of {len(pinned.keys)} members; {missing} more are needed")
    result = {"changes": lines[:-1], "signed_by": sorted(signed.signatures), "missing": missing}
    return signed, lines, {"epoch": signed.proposal.roster.epoch, **result}


def _next(missing: int, path: Path) -> str:
    """What comes after a signature."""
    if missing:
        return f"{missing} more members sign {path}, or copies of it"
    return f"send {path} to the coordinator, who publishes it: silotune-server roster publish --help"
