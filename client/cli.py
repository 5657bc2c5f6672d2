"""`silotune-client`: what a hospital's or bank's data team runs beside its data."""

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
NodeFile = Annotated[Path, typer.Argument(help="This site's own file.", metavar="NODE.toml")]
BaseOption = Annotated[str, typer.Option(help="A base, to count and show tokens: a folder or a name in the store.")]
LengthOption = Annotated[int | None, typer.Option(help="The run's data.max_length_tokens.", min=8)]


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

    Runs until stopped, and has no network of its own.

    \b
    Examples:
      silotune-client serve node.toml
    """
    from client import serve as serving
    from client import service
    from common import config

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
