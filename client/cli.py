"""`silotune-client`: what a hospital's or bank's data team runs beside its data."""

from pathlib import Path
from typing import Annotated

import typer

from common import cli, quiet

app = cli.make(
    "silotune-client",
    "Check your rows, see them as the model will, and serve training. Nothing here sends a row anywhere.",
    examples=("silotune-client check node.toml", "silotune-client preview node.toml --base smollm2"),
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


def main() -> None:
    """Entry point."""
    quiet.hush()
    cli.run(app)


if __name__ == "__main__":
    main()
