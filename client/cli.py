"""`silotune-client`: what a hospital's or bank's data team runs beside its data."""

import getpass
from pathlib import Path
from typing import Annotated

import typer

from common import cli, quiet

app = cli.make(
    "silotune-client",
    "Join a federation, check your rows, and serve training. Nothing here sends a row anywhere.",
    examples=(
        "silotune-client enroll --federation onco-eu --name alder --out keys",
        "silotune-client check node.toml",
        "silotune-client preview node.toml --base smollm2",
    ),
)
audit_app = cli.make(
    "audit",
    "This site's audit log: signed, chained, append-only.",
    examples=("silotune-client audit verify node.toml",),
)
app.add_typer(audit_app, name="audit", help="Show and check this site's audit log.")
NodeFile = Annotated[Path, typer.Argument(help="This site's own file.", metavar="NODE.toml")]
BaseOption = Annotated[str, typer.Option(help="A base, to count and show tokens: a folder or a name in the store.")]
LengthOption = Annotated[int | None, typer.Option(help="The run's data.max_length_tokens.", min=8)]

RunArgument = Annotated[str, typer.Argument(help="A run's name, or the first digits of its hash.", metavar="RUN")]
ByOption = Annotated[str, typer.Option(help="Who decides; default: this user.")]


@app.command()
def check(
    node_file: NodeFile, base: BaseOption = "", max_length_tokens: LengthOption = None, json: cli.JsonOption = False
) -> None:
    """Count this site's rows and name every problem.

    Prints counts only; a problem is named by its row, never by its text.

    \b
    Examples:
      silotune-client check node.toml
      silotune-client check node.toml --base smollm2 --max-length-tokens 512
    """
    from client import rows
    from client.data.check import render
    from common import config

    report = rows.check(config.load_node(node_file), base=base, max_length_tokens=max_length_tokens)
    next_step = f"next: silotune-client preview {node_file} --base BASE"
    cli.emit(report.as_dict(), as_json=json, show=lambda: cli.show(render(report), next_step))


@app.command()
def preview(
    node_file: NodeFile,
    base: BaseOption = "",
    limit: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 3,
    max_length_tokens: LengthOption = None,
    json: cli.JsonOption = False,
) -> None:
    """Show this site its rows as the model gets them.

    The tokens that the loss covers stand out. Nothing leaves this screen.

    \b
    Examples:
      silotune-client preview node.toml --base smollm2 --limit 2
    """
    from client import rows
    from client.data.check import render_preview
    from common import config

    shown = rows.preview(config.load_node(node_file), base=base, limit=limit, max_length_tokens=max_length_tokens)
    next_step = f"next: silotune-client serve {node_file}"
    rows_found = {"rows": [item.as_dict() for item in shown]}
    cli.emit(rows_found, as_json=json, show=lambda: cli.show(render_preview(shown), next_step))


@app.command()
def serve(node_file: NodeFile) -> None:
    """Hold rows and base; answer the courier.

    Runs until stopped, and has no network of its own. Its memory is never written to disk as a core dump.

    \b
    Examples:
      silotune-client serve node.toml
    """
    from client import serve as serving
    from client import service
    from common import config

    serving.harden()
    node = config.load_node(node_file)
    server = service.serve(
        serving.make_agent(node).answer,
        socket_path=Path(node.agent.socket),
        max_message_bytes=node.agent.max_message_mib << 20,
        courier_group=node.agent.courier_group,
    )
    typer.echo(f"{node.site.name}: agent listens on {node.agent.socket}; stop it with Ctrl-C")
    service.wait(server)


@app.command()
def link(
    gateway: Annotated[str, typer.Option(help="Address of the gateway's listener for sites, host:port.")],
    ca: Annotated[Path, typer.Option(help="PEM certificate that the gateway's own must lead to.")],
    certificate: Annotated[Path, typer.Option(help="This site's certificate, PEM.")],
    key: Annotated[Path, typer.Option(help="Its private key, PEM, mode 0600.")],
    state: Annotated[Path, typer.Option(help="Folder of the tunnel's own certificate, link.pem.")],
    port: Annotated[int, typer.Option(help="Where to listen on 127.0.0.1.", min=1, max=65535)] = 9100,
) -> None:
    """Carry the SuperNode's connection to the gateway, with this site's certificate.

    Runs until stopped.

    \b
    Examples:
      silotune-client link --gateway gate.example:9443 --ca ca.pem --certificate site.pem --key site.key --state link
      flower-supernode --superlink 127.0.0.1:9100 --root-certificates link/link.pem --auth-supernode-private-key K
    """
    from client import link as tunnel

    typer.echo(f"link: 127.0.0.1:{port} to {gateway}; root certificate {state / tunnel.CERTIFICATE}; stop with Ctrl-C")
    tunnel.run(gateway=gateway, ca_file=ca, certificate_file=certificate, key_file=key, state=state, port=port)


@app.command()
def runs(node_file: NodeFile, json: cli.JsonOption = False) -> None:
    """List the runs that this site was offered.

    \b
    Examples:
      silotune-client runs node.toml
    """
    from client import review as desk
    from common import config

    table = desk.runs(desk.open_desk(config.load_node(node_file)))
    next_step = f"next: silotune-client review {node_file} RUN"
    cli.emit({"runs": table}, as_json=json, show=lambda: cli.show(desk.render_runs(table), next_step))


@app.command()
def review(node_file: NodeFile, run: RunArgument, json: cli.JsonOption = False) -> None:
    """Show what a run asks of this site.

    What leaves and how much of it, what is read, and how the run differs from the last one that was approved.

    \b
    Examples:
      silotune-client review node.toml triage
    """
    from client import review as desk
    from common import config

    page = desk.review(desk.open_desk(config.load_node(node_file)), run)
    next_step = f"next: silotune-client approve {node_file} {page.run[:12]}, or deny"
    cli.emit(page.as_dict(), as_json=json, show=lambda: cli.show(desk.render(page), next_step))


@app.command()
def approve(node_file: NodeFile, run: RunArgument, by: ByOption = "", json: cli.JsonOption = False) -> None:
    """Let a run train here.

    Exactly the manifest that was reviewed; a changed one waits again.

    \b
    Examples:
      silotune-client approve node.toml 3f9c2a71be04 --by "Data protection officer"
    """
    _decide(node_file, run, is_approved=True, by=by, as_json=json)


@app.command()
def deny(node_file: NodeFile, run: RunArgument, by: ByOption = "", json: cli.JsonOption = False) -> None:
    """Refuse a run, also one that is under way.

    \b
    Examples:
      silotune-client deny node.toml triage
    """
    _decide(node_file, run, is_approved=False, by=by, as_json=json)


@app.command()
def new_key(path: Annotated[Path, typer.Argument(metavar="KEY.pem")], json: cli.JsonOption = False) -> None:
    """Make an Ed25519 key, such as the policy admin's.

    The file is for this user alone; the public key is printed.

    \b
    Examples:
      silotune-client new-key admin.pem
    """
    from common import identity

    public = identity.public_hex(identity.create(path))
    cli.emit({"public_key": public}, as_json=json, show=lambda: cli.show(public))


@app.command()
def sign_policy(
    policy_file: Annotated[Path, typer.Argument(help="The site's policy.", metavar="POLICY.toml")],
    key: Annotated[Path, typer.Option(help="The admin's private key.")],
    json: cli.JsonOption = False,
) -> None:
    """Check a policy and sign it.

    \b
    Examples:
      silotune-client sign-policy policy.toml --key admin.pem
    """
    from client import policy_file as policies
    from common import identity

    signer = identity.load(key)
    written = policies.sign(policy_file, signer)
    result = {"signature": str(written), "policy_signer": identity.public_hex(signer)}
    cli.emit(result, as_json=json, show=lambda: cli.show(*(f"{name:<14} {value}" for name, value in result.items())))


@audit_app.command("show")
def audit_show(
    node_file: NodeFile,
    last: Annotated[int, typer.Option(min=1, help="Newest entries to show.")] = 20,
    json: cli.JsonOption = False,
) -> None:
    """Show the newest entries of this site's audit log.

    \b
    Examples:
      silotune-client audit show node.toml --last 50
    """
    from client import trail
    from common import config

    entries = trail.newest(config.load_node(node_file), last)
    cli.emit({"entries": entries}, as_json=json, show=lambda: cli.show(trail.render(entries)))


@audit_app.command("verify")
def audit_verify(
    node_file: NodeFile,
    heads: Annotated[Path | None, typer.Option(help="Heads that others keep: finds a cut tail.")] = None,
    json: cli.JsonOption = False,
) -> None:
    """Check every line of this site's audit log.

    \b
    Examples:
      silotune-client audit verify node.toml --heads heads.jsonl
    """
    from client import trail
    from common import config

    result = trail.verify(config.load_node(node_file), heads)
    line = f"{result['num_entries']} entries, whole; head {result['sha256']}"
    cli.emit(result, as_json=json, show=lambda: cli.show(line))


def _decide(node_file: Path, run: str, *, is_approved: bool, by: str, as_json: bool) -> None:
    """What `approve` and `deny` share."""
    from client import review as desk
    from common import config

    result = desk.decide(
        desk.open_desk(config.load_node(node_file)), run, is_approved=is_approved, by=by or getpass.getuser()
    )
    cli.emit(
        result, as_json=as_json, show=lambda: cli.show(f"{result['name']} ({result['run'][:12]}): {result['state']}")
    )


@app.command()
def enroll(
    federation: Annotated[str, typer.Option(help="The federation's id, from its coordinator.", metavar="ID")],
    name: Annotated[str, typer.Option(help="This site's name in the federation.")],
    out: Annotated[Path, typer.Option(help="Folder for keys and request; made with mode 0700.", metavar="DIR")],
    json: cli.JsonOption = False,
) -> None:
    """Make this site's keys, and a request to join.

    Private keys stay in DIR. Send request.json, and read the six words out to the coordinator by telephone.

    \b
    Examples:
      silotune-client enroll --federation onco-eu --name alder --out /etc/silotune/keys
    """
    from client import enroll as enrolling

    statement = enrolling.enroll(out, federation_id=federation, name=name)
    request_file = out / enrolling.REQUEST
    next_step = f"next: send {request_file}, read out the words, then: silotune-client install KIT --keys {out}"
    cli.emit(
        {"request": str(request_file), "words": statement.words},
        as_json=json,
        show=lambda: cli.show(f"words    {statement.words}", next_step),
    )


@app.command()
def renew(
    keys: Annotated[Path, typer.Argument(help="The folder that enroll made.", metavar="KEYS")],
    json: cli.JsonOption = False,
) -> None:
    """Make the next TLS key, and a request for its certificate.

    The request is signed by this site's identity key. The present certificate stays in use until the kit is installed.

    \b
    Examples:
      silotune-client renew /etc/silotune/keys
    """
    from client import enroll as enrolling

    enrolling.renew(keys)
    request_file = keys / enrolling.RENEWAL
    next_step = f"next: send {request_file}, then: silotune-client install KIT --keys {keys}"
    cli.emit({"request": str(request_file)}, as_json=json, show=lambda: cli.show(next_step))


@app.command()
def install(
    kit: Annotated[Path, typer.Argument(help="The unpacked startup kit.", metavar="KIT")],
    keys: Annotated[Path, typer.Option(help="The folder that enroll made.", metavar="DIR")],
    words: Annotated[str, typer.Option(help="The federation's six words, heard from its coordinator.")] = "",
    json: cli.JsonOption = False,
) -> None:
    """Check a startup kit, and put it beside the keys.

    The first time, the federation's six words are needed; they are pinned with its governance keys. Your own edits of
    the policy, node.toml and units are kept.

    \b
    Examples:
      silotune-client install alder --keys /etc/silotune/keys --words "lusab babad gutih tugad bisog mofip"
      silotune-client install alder --keys /etc/silotune/keys
    """
    import datetime

    from client import install as installing

    done = installing.install(kit, keys=keys, words=words, now=datetime.datetime.now(datetime.UTC))
    result = {"name": done.name, "epoch": done.epoch, "expires_at": done.expires_at.isoformat()}
    told = f"{done.name}: roster epoch {done.epoch}, certificate until {done.expires_at:%Y-%m-%d}"
    cli.emit(result, as_json=json, show=lambda: cli.show(told, f"next: edit {keys}/policy.toml and {keys}/node.toml"))


@app.command()
def roster(
    roster_file: Annotated[Path, typer.Argument(help="The signed roster.", metavar="ROSTER.json")],
    keys: Annotated[Path, typer.Option(help="The folder that enroll made.", metavar="DIR")],
    json: cli.JsonOption = False,
) -> None:
    """Take a newer roster into use, as after a revocation.

    Refused unless the pinned governance signed it, this site is in it, and none newer was seen.

    \b
    Examples:
      silotune-client roster roster.json --keys /etc/silotune/keys
    """
    from client import install as installing

    found = installing.update_roster(roster_file, keys=keys)
    result = {"federation_id": found.federation_id, "epoch": found.epoch, "sites": [site.name for site in found.sites]}
    told = f"{found.federation_id}: roster epoch {found.epoch}, {len(found.sites)} sites"
    cli.emit(result, as_json=json, show=lambda: cli.show(told, "next: restart the agent"))


def main() -> None:
    """Entry point."""
    quiet.hush()
    cli.run(app)


if __name__ == "__main__":
    main()
