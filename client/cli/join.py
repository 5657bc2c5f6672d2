"""The commands by which a site joins a federation and connects to it."""

from pathlib import Path
from typing import Annotated

import typer

from common import cli


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
    from client.join import enroll as enrolling

    statement = enrolling.enroll(out, federation_id=federation, name=name)
    request_file = out / enrolling.REQUEST
    next_step = (
        f"next: send {request_file}, read out the words, then: silotune-client install KIT --keys {cli.quoted([out])}"
    )
    cli.emit(
        {"request": str(request_file), "words": statement.words},
        as_json=json,
        show=lambda: cli.show(f"words    {statement.words}", next_step),
    )


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
    from client.join import enroll as enrolling

    enrolling.renew(keys)
    request_file = keys / enrolling.RENEWAL
    next_step = f"next: send {request_file}, then: silotune-client install KIT --keys {cli.quoted([keys])}"
    cli.emit({"request": str(request_file)}, as_json=json, show=lambda: cli.show(next_step))


def install(
    kit: Annotated[Path, typer.Argument(help="The startup kit, the tar file as it came.", metavar="KIT")],
    keys: Annotated[Path, typer.Option(help="The folder that enroll made.", metavar="DIR")],
    words: Annotated[str, typer.Option(help="The federation's six words, heard from its coordinator.")] = "",
    json: cli.JsonOption = False,
) -> None:
    """Check a startup kit, and put it beside the keys.

    The first time, the federation's six words are needed; they are pinned with its governance keys. Words that are
    given are always checked. Do not unpack KIT yourself: this takes nothing from it but a kit's own files, and no key.
    Your own edits of the policy, node.toml and units are kept.

    \b
    Examples:
      silotune-client install alder.tar --keys /etc/silotune/keys --words "lusab babad gutih tugad bisog mofip"
      silotune-client install alder.tar --keys /etc/silotune/keys
    """
    import datetime

    from client.join import install as installing

    done = installing.install(kit, keys=keys, words=words, now=datetime.datetime.now(datetime.UTC))
    result = {"name": done.name, "epoch": done.epoch, "expires_at": done.expires_at.isoformat()}
    line = f"{done.name}: roster epoch {done.epoch}, certificate until {done.expires_at:%Y-%m-%d}"
    cli.emit(result, as_json=json, show=lambda: cli.show(line, f"next: edit {keys}/policy.toml and {keys}/node.toml"))


def roster(
    roster_file: Annotated[Path, typer.Argument(help="The signed roster.", metavar="ROSTER.json")],
    keys: Annotated[Path, typer.Option(help="The folder that enroll made.", metavar="DIR")],
    json: cli.JsonOption = False,
) -> None:
    """Take a newer roster into use, where the link does not bring it.

    Refused unless the pinned governance signed it, this site is in it, and none newer was seen.

    \b
    Examples:
      silotune-client roster roster.json --keys /etc/silotune/keys
    """
    from client.join import install as installing

    newest = installing.update_roster(roster_file, keys=keys)
    names = [site.name for site in newest.sites]
    result = {"federation_id": newest.federation_id, "epoch": newest.epoch, "sites": names}
    line = f"{newest.federation_id}: roster epoch {newest.epoch}, {len(names)} sites"
    next_step = "next: copy roster.json to agent.roster_folder; the agent reads it before its next step"
    cli.emit(result, as_json=json, show=lambda: cli.show(line, next_step))


def link(
    gateway: Annotated[str, typer.Option(help="Address of the gateway's listener for sites, host:port.")],
    ca: Annotated[Path, typer.Option(help="PEM certificate that the gateway's own must lead to.")],
    certificate: Annotated[Path, typer.Option(help="This site's certificate, PEM.")],
    key: Annotated[Path, typer.Option(help="Its private key, PEM, mode 0600.")],
    state: Annotated[Path, typer.Option(help="Folder of the tunnel's own certificate, link.pem.")],
    port: Annotated[int, typer.Option(help="Where to listen on 127.0.0.1.", min=1, max=65535)] = 9100,
    node: Annotated[
        Path | None, typer.Option(help="This site's own file, for its [link] proxy; default: no proxy.")
    ] = None,
    bundle: Annotated[
        list[str] | None,
        typer.Option(help="SHA-256 of a bundle that may run; default: this release's own.", metavar="HASH"),
    ] = None,
    agent: Annotated[
        Path | None, typer.Option(help="The agent's socket: bring it the gateway's newest roster.", metavar="SOCKET")
    ] = None,
) -> None:
    """Carry the SuperNode's connection to the gateway, with this site's certificate.

    A bundle with code of somebody else is not handed to the SuperNode. With --agent, the newest signed roster is
    fetched every half minute, and the agent judges it. Runs until stopped.

    \b
    Examples:
      silotune-client link --gateway gate.example:9443 --ca ca.pem --certificate site.pem --key site.key --state link
      flower-supernode --superlink 127.0.0.1:9100 --root-certificates link/link.pem --auth-supernode-private-key K
    """
    from client.courier import proxy, tunnel
    from common.run import config

    way = proxy.of_site(config.load_node(node).link) if node else None
    through = f" through {way}" if way else ""
    cli.say(
        f"link: 127.0.0.1:{port} to {gateway}{through}; root certificate {state / tunnel.CERTIFICATE}; stop with Ctrl-C"
    )
    files = {"ca_file": ca, "certificate_file": certificate, "key_file": key}
    tunnel.run(gateway=gateway, state=state, port=port, bundles=bundle or (), proxy=way, agent=agent, **files)
