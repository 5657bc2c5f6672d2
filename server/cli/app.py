"""`silotune-server`: what a coordinator runs."""

import functools
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from common import cli, quiet
from server.cli import audit, doctor, layers, polish, preferences
from server.cli import export as cli_export
from server.cli import roster as cli_roster
from server.cli.roster import FederationFolder, GovernanceFiles, ProposeFile

app = cli.make(
    "silotune-server",
    "Found a federation, start its runs, show their status, and export their adapters.",
    examples=(
        "silotune-server provision federation.toml --out onco-eu",
        "silotune-server run RUN.toml --superlink 127.0.0.1:8000 --ca ca.pem",
        "silotune-server status runs/triage",
    ),
)
CertificateOption = Annotated[
    Path | None, typer.Option(help="Operator's certificate, PEM, where a gateway is before the SuperLink.")
]
KeyOption = Annotated[Path | None, typer.Option(help="Its private key, PEM, mode 0600.")]
app.command()(doctor.doctor)
app.command()(layers.layers)
app.command()(polish.polish)
app.add_typer(audit.app, name="audit", help="Show and check audit logs, a site's too.")
app.add_typer(cli_roster.app, name="roster", help="Sign and publish changes of the roster, one member at a time.")
app.add_typer(preferences.app, name="preferences", help="Check, build, import and rank preference data.")
RunFolder = Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN_FOLDER")]
RequestFile = Annotated[Path, typer.Argument(help="What the site sent.", metavar="REQUEST.json")]


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def trial(context: typer.Context) -> None:
    """Run a whole federation on this machine, to try it: silotune-sim trial.

    \b
    Examples:
      silotune-server trial
      silotune-server trial my-trial --detach
    """
    # Another process, since nothing of a server may import simulations; in the place of this one, so that Ctrl-C and
    # SIGTERM reach it.
    os.execv(sys.executable, [sys.executable, "-m", "simulations.cli.app", "trial", *context.args])  # noqa: S606


@app.command()
def run(
    context: typer.Context,
    run_file: Annotated[Path, typer.Argument(help="The run file.", metavar="RUN.toml")],
    superlink: Annotated[str, typer.Option(help="Address of the SuperLink on this machine, host:port.")],
    ca: Annotated[Path, typer.Option(help="PEM certificate that the SuperLink's own must lead to.")],
    certificate: CertificateOption = None,
    key: KeyOption = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder; default: a new one.")] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the base; default: model.base, in the store.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the newest finished round in --output.")
    ] = False,
    operator_key: Annotated[
        Path | None, typer.Option(help="Private key that signs the run; sites with a policy take no other.")
    ] = None,
    federation: Annotated[str, typer.Option(help="Id of the federation that a signed run is for.")] = "",
    offer_days: Annotated[
        float, typer.Option(min=0.01, max=366, help="Days in which sites may open a signed run.")
    ] = 30.0,
    audit_folder: Annotated[
        Path | None, typer.Option(help="Folder of the operator's audit log; default: KEY-audit beside the key.")
    ] = None,
    roster: Annotated[
        Path | None, typer.Option(help="Folder of federation.json and roster.json: sites' keys, by which they sign.")
    ] = None,
    i_accept: cli.AcceptOption = False,
    set_: cli.SetOption = None,
    json: cli.JsonOption = False,
) -> None:
    """Start a run at the SuperLink and watch it.

    The SuperLink must be on this machine. Ctrl-C ends the watching, not the run; silotune-server watch shows it again.

    \b
    Examples:
      silotune-server run RUN.toml --superlink 127.0.0.1:8000 --ca ca.pem
      silotune-server run RUN.toml --superlink 127.0.0.1:8000 --ca ca.pem --operator-key op.pem --federation onco-eu
    """
    from common.run import config
    from server.folder import begun

    earlier = begun.read(output).overrides if resume and output else {}
    changes = {**earlier, **cli.overrides(set_)}
    settings = config.load(run_file, overrides=changes)  # told before Flower is loaded

    from server.run import launch, link

    folder = output or cli.fresh_folder(Path(settings.output.folder), settings.name)
    command = (*cli.again(context, without=("output", "set_", "resume")), "--output", str(folder), "--resume")
    result = launch.run(
        settings,
        address=superlink,
        ca_file=ca,
        identity=link.identity_of(certificate, key),
        folder=folder,
        base=base,
        resume=resume,
        is_quiet=json,
        operator_key=operator_key,
        federation=federation,
        offer_days=offer_days,
        audit_folder=audit_folder,
        roster_folder=roster,
        is_noise_accepted=i_accept,
        start=begun.Begun(changes, command, str(Path.cwd()), str(base.absolute()) if base else ""),
    )
    cli.emit(result, as_json=json, show=lambda: cli.show(*launch.next_steps(folder)))


@app.command()
def register(
    public_key: Annotated[Path, typer.Argument(help="A node's public key, PEM.", metavar="NODE.pub")],
    name: Annotated[str, typer.Option(help="What to call the node.")],
    superlink: Annotated[str, typer.Option(help="Address of the SuperLink, host:port.")],
    ca: Annotated[Path, typer.Option(help="PEM certificate that the SuperLink's own must lead to.")],
    certificate: CertificateOption = None,
    key: KeyOption = None,
    json: cli.JsonOption = False,
) -> None:
    """Allow a site's node to connect to the SuperLink.

    \b
    Examples:
      silotune-server register alder.pem --name alder --superlink 127.0.0.1:8000 --ca ca.pem
    """
    from server.run import link

    identity = link.identity_of(certificate, key)
    node_id = link.register_file(public_key, name=name, address=superlink, ca_file=ca, identity=identity)
    cli.emit({"name": name, "node_id": node_id}, as_json=json, show=lambda: cli.show(f"{name}: node {node_id}"))


@app.command()
def gateway(
    gateway_file: Annotated[Path, typer.Argument(help="The gateway's own file.", metavar="GATEWAY.toml")],
) -> None:
    """Run the gateway in front of the SuperLink: sites and operators pass by their certificates.

    Runs until stopped. Refusals are written to log.file, one JSON line each.

    \b
    Examples:
      silotune-server gateway GATEWAY.toml
    """
    from server.gateway import serve, settings

    config = settings.load(gateway_file)
    cli.say(f"gateway: sites on {config.fleet.listen}, operators on {config.control.listen}; stop it with Ctrl-C")
    serve.run(config)


@app.command()
def methods(json: cli.JsonOption = False) -> None:
    """Show the aggregation methods and what each can be combined with.

    \b
    Examples:
      silotune-server methods
      silotune-server methods --json
    """
    from server.report import methods as methods_page

    cli.emit(methods_page.as_dict(), as_json=json, show=lambda: cli.show(methods_page.render()))


@app.command()
def status(
    run_folder: RunFolder,
    sites: Annotated[bool, typer.Option("--sites", help="Show every site, however many.")] = False,
    json: cli.JsonOption = False,
) -> None:
    """Show a run's status: running, interrupted, finished or failed.

    Reads the run's events and draws its report.html anew. A run whose process was killed is `interrupted`, and goes on
    with --resume.

    \b
    Examples:
      silotune-server status runs/triage
      silotune-server status runs/triage --sites
      silotune-server status runs/triage --json
    """
    from server.report import status as standing

    result = standing.read(run_folder)
    cli.emit(result, as_json=json, show=lambda: cli.show(standing.render(result, all_sites=sites)))


@app.command()
def watch(run_folder: RunFolder, json: cli.JsonOption = False) -> None:
    """Show a run's progress until it ends.

    On the coordinator's machine, as often as wanted: after Ctrl-C, from another terminal, or after the SuperLink was
    away. Ctrl-C ends the watching, not the run. The exit code is that of the run; 6 where its process is gone.

    \b
    Examples:
      silotune-server watch runs/triage
      silotune-server watch runs/triage --json
    """
    from server.run import launch

    result = launch.watch(run_folder, is_quiet=json)
    cli.emit(result, as_json=json, show=lambda: cli.show(*launch.next_steps(run_folder)))


@app.command()
def export(
    run_folder: RunFolder,
    round_: Annotated[int, typer.Option("--round", help="Number of finished rounds; 0: the newest checkpoint.")] = 0,
    output: Annotated[Path | None, typer.Option(help="For the peft adapter; default: RUN_FOLDER/adapter.")] = None,
    merged: Annotated[Path | None, typer.Option(help="Also merge into the base, saved as bf16 here.")] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the base; default: model.base, in the store.")] = None,
    to: Annotated[Path | None, typer.Option(help="Instead: a new folder with all --formats, sealed.")] = None,
    formats: Annotated[
        str, typer.Option(help="Of peft, vllm, merged, nf4, int8, gguf, onnx; with --to; default: peft.")
    ] = "",
    operator_key: Annotated[Path | None, typer.Option(help="Private key that signs the folder; with --to.")] = None,
    llama_cpp: Annotated[Path | None, typer.Option(help="A llama.cpp checkout whose converter writes gguf.")] = None,
    gguf_type: Annotated[
        str, typer.Option(help="bf16, or by that checkout's llama-quantize: q8_0, q6_k, q5_k_m, q4_k_m.")
    ] = "",
    rows: Annotated[
        Path | None,
        typer.Option(help="Rows for merged against side by side; with --to; default: evaluation.server_data."),
    ] = None,
    json: cli.JsonOption = False,
) -> None:
    """Write the adapter, the base with it merged in, or a sealed folder of several formats.

    The adapter is a folder that plain peft loads; the merged base is bf16. A sealed folder holds its model card, the
    hashes of its files and, with --operator-key, a signature.

    \b
    Examples:
      silotune-server export runs/triage --round 5 --output adapter-5
      silotune-server export runs/triage --base smollm2-folder --merged merged
      silotune-server export runs/triage --to triage-1 --formats peft,merged,gguf --operator-key op.pem
    """
    from server.folder import run_files

    run_files.stored_manifest(run_folder)  # told before torch is loaded

    from server.run import finish

    if to:
        finish.refuse_beside_to(output=output, merged=merged)
        sealed = finish.export_to(
            run_folder,
            to,
            formats=formats,
            num_rounds=round_,
            base=base,
            llama_cpp=llama_cpp,
            sign_with=operator_key,
            gguf_type=gguf_type,
            rows=rows,
        )
        signer = ("--signer", sealed["signer"]) if sealed["signer"] else ()
        lines = (f"{to}: {sealed['formats']}", cli.next_step("silotune-server", "verify", to, *signer))
        return cli.emit(sealed, as_json=json, show=lambda: cli.show(*lines))
    finish.refuse_without_to(
        formats=formats, operator_key=operator_key, llama_cpp=llama_cpp, gguf_type=gguf_type, rows=rows
    )
    result = finish.export_run(run_folder, num_rounds=round_, output=output, merged=merged, base=base)
    return cli.emit(
        result, as_json=json, show=lambda: cli.show(*(f"{name:<9} {path}" for name, path in result.items()))
    )


app.command()(cli_export.verify)
app.command()(cli_export.gate)
app.command()(cli_export.merge)
app.command()(cli_export.serve)
app.command()(cli_export.compare)


@app.command()
def provision(
    federation_file: Annotated[Path, typer.Argument(help="The federation file.", metavar="FEDERATION.toml")],
    out: Annotated[Path, typer.Option(help="The federation's folder; must be new or empty.", metavar="DIR")],
    json: cli.JsonOption = False,
) -> None:
    """Found a federation: its certificates, governance keys and roster.

    Run it on a machine without a network. Nothing is ever overwritten.

    \b
    Examples:
      silotune-server provision federation.toml --out onco-eu
    """
    import datetime

    from server.members import founding

    pinned = founding.provision(federation_file, folder=out, now=datetime.datetime.now(datetime.UTC))
    result = {"federation_id": pinned.federation_id, "folder": str(out), "words": pinned.words, "epoch": 1}
    next_steps = (
        f"next: move {out}/offline to a safe, give each member one key of {out}/governance, and delete both here",
        "then admit each site that sends a request: silotune-server admit --help",
    )
    cli.emit(result, as_json=json, show=lambda: cli.show(f"words of the federation    {pinned.words}", *next_steps))


@app.command()
def admit(
    request_file: RequestFile,
    federation: FederationFolder,
    words: Annotated[str, typer.Option(help="The six words that the site's admin reads out.")],
    governance: GovernanceFiles = None,
    propose: ProposeFile = None,
    json: cli.JsonOption = False,
) -> None:
    """Admit a site: certificate, next roster, startup kit.

    Hear the words from the site by telephone; a request whose words differ was altered on its way.

    \b
    Examples:
      silotune-server admit request.json --federation onco-eu --governance 1.key --governance 2.key
          --words "lusab babad gutih tugad bisog mofip"
      silotune-server admit request.json --federation onco-eu --propose admit-alder.json --words "lusab babad ..."
    """
    import datetime

    from server.members import changes as members

    now = datetime.datetime.now(datetime.UTC)
    cli_roster.decide(
        functools.partial(members.admission, request_file=request_file, words=words, now=now),
        federation=federation,
        governance=governance,
        propose=propose,
        as_json=json,
    )


@app.command()
def rotate(
    request_file: RequestFile,
    federation: FederationFolder,
    governance: GovernanceFiles = None,
    propose: ProposeFile = None,
    json: cli.JsonOption = False,
) -> None:
    """Give a site its next certificate.

    The request must be signed by the site's identity key. The old certificate stays good for the overlap.

    \b
    Examples:
      silotune-server rotate renewal.json --federation onco-eu --governance 1.key --governance 2.key
      silotune-server rotate renewal.json --federation onco-eu --propose rotate-alder.json
    """
    import datetime

    from server.members import changes as members

    cli_roster.decide(
        functools.partial(members.renewal, request_file=request_file, now=datetime.datetime.now(datetime.UTC)),
        federation=federation,
        governance=governance,
        propose=propose,
        as_json=json,
    )


@app.command()
def reissue(federation: FederationFolder, json: cli.JsonOption = False) -> None:
    """Give the gateway and the operators their next certificates.

    The keys stay, and so does the roster.

    \b
    Examples:
      silotune-server reissue --federation onco-eu
    """
    import datetime

    from server.members import founding

    ends = founding.reissue(federation, now=datetime.datetime.now(datetime.UTC))
    lines = [f"{name:<12} until {end:%Y-%m-%d}" for name, end in ends.items()]
    next_step = f"next: copy {federation}/servers to the gateway, and restart it"
    result = {name: end.isoformat() for name, end in ends.items()}
    cli.emit(result, as_json=json, show=lambda: cli.show(*lines, next_step))


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="The site's name.")],
    federation: FederationFolder,
    governance: GovernanceFiles = None,
    propose: ProposeFile = None,
    json: cli.JsonOption = False,
) -> None:
    """Take a site out of the federation for good.

    Its certificates and keys are never accepted again; the other sites learn it by the next roster.

    \b
    Examples:
      silotune-server revoke alder --federation onco-eu --governance 1.key --governance 2.key
      silotune-server revoke alder --federation onco-eu --propose revoke-alder.json
    """
    from server.members import changes as members

    cli_roster.decide(
        functools.partial(members.revocation, name=name),
        federation=federation,
        governance=governance,
        propose=propose,
        as_json=json,
    )


def main() -> None:
    """Entry point."""
    quiet.hush()
    cli.run(app)


if __name__ == "__main__":
    main()
