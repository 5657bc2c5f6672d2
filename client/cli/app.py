"""`silotune-client`: what a hospital's or bank's data team runs beside its data."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from client.cli import consent, join, privacy
from client.cli.options import NodeFile
from common import cli, quiet
from common.errors import DataError

app = cli.make(
    "silotune-client",
    "Join a federation, check your rows, and serve training. Nothing here sends a row anywhere.",
    examples=(
        "silotune-client enroll --federation onco-eu --name alder --out keys",
        "silotune-client check node.toml",
        "silotune-client preview node.toml --base smollm2",
    ),
)
UNITS_FOLDER = Path("/etc/systemd/system")
BaseOption = Annotated[str, typer.Option(help="A base, to count and show tokens: a folder or a name in the store.")]
ObjectiveOption = Annotated[
    str, typer.Option(metavar="sft|dpo|kto", help="The run's training.objective.kind: which columns are read.")
]
LengthOption = Annotated[int | None, typer.Option(help="The run's data.max_length_tokens.", min=8)]
RunOption = Annotated[
    str,
    typer.Option(
        metavar="RUN", help="An offer, by the run's name or the first digits of its hash, or a run's TOML file."
    ),
]
SystemOption = Annotated[str, typer.Option(help="The run's data.system_prompt.")]
TemplateOption = Annotated[str, typer.Option(metavar="tokenizer|chatml|alpaca", help="The run's model.chat_template.")]
DateOption = Annotated[str, typer.Option(metavar="YYYY-MM-DD", help="The run's day, if its template prints it.")]


@app.command()
def check(
    context: typer.Context,
    node_file: NodeFile,
    base: BaseOption = "",
    run: RunOption = "",
    max_length_tokens: LengthOption = None,
    objective: ObjectiveOption = "sft",
    json: cli.JsonOption = False,
) -> None:
    """Count this site's rows and name every problem.

    Prints counts only; a problem is named by its row, never by its text. Exit code 3 if there is one.

    \b
    Examples:
      silotune-client check node.toml
      silotune-client check node.toml --base smollm2 --max-length-tokens 512
      silotune-client check node.toml --run triage
      silotune-client check node.toml --objective dpo
    """
    import datetime

    from client.cli import rows
    from client.data import check as checks
    from client.data import findings
    from common.run import config

    node = config.load_node(node_file)
    today = datetime.datetime.now(datetime.UTC).date()
    given = rows.Asked(objective, max_length_tokens, date=today.isoformat(), base=base)
    asked = rows.asked(node, run, given)
    checked = rows.check(node.data, node.model, asked, site=node.site.name)
    counts = asdict(checked.report) if checked.report else {}
    result = {**counts, "problems": [asdict(finding) for finding in checked.findings]}
    shown = [checks.render(checked.report)] if checked.report else []
    next_step = cli.next_step(*cli.again(context, "preview", without=("json",)))
    if not (run or base or node.model.base):
        next_step = "next: name the base in this site's file, model.base, or check again with --base"
    ending = findings.render(checked.findings) if checked.findings else next_step
    cli.emit(result, as_json=json, show=lambda: cli.show(*shown, ending))
    raise typer.Exit(DataError.exit_code if checked.findings else 0)


@app.command()
def preview(
    node_file: NodeFile,
    base: BaseOption = "",
    run: RunOption = "",
    limit: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 3,
    max_length_tokens: LengthOption = None,
    objective: ObjectiveOption = "sft",
    system_prompt: SystemOption = "",
    chat_template: TemplateOption = "tokenizer",
    date: DateOption = "",
    json: cli.JsonOption = False,
) -> None:
    """Show this site its rows as the model gets them in a run.

    The tokens that the loss covers stand out, in a pipe by white square brackets. Nothing leaves this screen.

    \b
    Examples:
      silotune-client preview node.toml --run triage
      silotune-client preview node.toml --run triage.toml --base smollm2 --limit 2
      silotune-client preview node.toml --base smollm2 --system-prompt "Be brief." --max-length-tokens 512
    """
    import datetime

    from client.cli import rows
    from client.data.check import render_preview
    from common.run import config

    node = config.load_node(node_file)
    day = rows.day(date, datetime.datetime.now(datetime.UTC).date())
    given = rows.Asked(objective, max_length_tokens, "truncate", system_prompt, chat_template, day, base)  # type: ignore[arg-type]
    asked = rows.asked(node, run, given)
    settings, shown = rows.preview(node.data, node.model, asked, limit=limit)
    next_step = "next: name the site's policy, agent.policy, and sign it; see silotune-client sign-policy --help"
    if node.agent.policy:
        next_step = cli.next_step("silotune-client", "serve", node_file)
    result = {"settings": asdict(asked), "rows": [asdict(item) for item in shown]}
    cli.emit(result, as_json=json, show=lambda: cli.show(f"{settings}\n", render_preview(shown), next_step))


@app.command()
def serve(
    node_file: NodeFile,
    without_policy: Annotated[
        bool, typer.Option("--without-policy", help="Take every run, unprotected ones too: to try things out.")
    ] = False,
) -> None:
    """Hold rows and base; answer the courier.

    Runs until stopped, and has no network of its own. Its memory is never written to disk as a core dump. The policy is
    read at the start: an edited one is in force after a restart.

    \b
    Examples:
      silotune-client serve node.toml
      silotune-client serve node.toml --without-policy
    """
    from common.run import config

    node = config.load_node(node_file)  # a mistake in it is reported before torch is loaded

    from client.agent import process as serving
    from client.courier import door

    serving.harden()
    serving.check_policy(node, without_policy=without_policy)
    agent = serving.make_agent(node, tell=lambda line: cli.say(f"{node.site.name}: {line}"))
    server = door.serve(
        agent.answer,
        socket_path=Path(node.agent.socket),
        max_message_bytes=node.agent.max_message_mib << 20,
        courier_group=node.agent.courier_group,
        on_stranger=agent.sent_away,
    )
    cli.say(f"{node.site.name}: agent listens on {node.agent.socket}; stop it with Ctrl-C")
    door.wait(server)


@app.command()
def export_adapter(
    node_file: NodeFile,
    run: Annotated[str, typer.Argument(help="Hash of the run, or how it begins.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.", metavar="FOLDER")],
    json: cli.JsonOption = False,
) -> None:
    """Write this site's own adapter of a personalised run as a peft folder.

    It is the adapter that was scored here last. Half of it never left this site: whoever gets the folder learns from it
    what only this site's rows taught.

    \b
    Examples:
      silotune-client export-adapter node.toml 3f9c2a71be04 own-adapter
    """
    from common.run import config

    node = config.load_node(node_file)  # a mistake in it is reported before torch is loaded

    from client.agent import process

    num_rounds = process.make_shelf(node).export(run, folder)
    result = {"adapter": str(folder), "num_rounds": num_rounds}
    cli.emit(result, as_json=json, show=lambda: cli.show(f"{folder}: this site's adapter after {num_rounds} rounds"))


@app.command()
def doctor(
    node_file: NodeFile,
    keys: Annotated[
        Path | None, typer.Option(help="Folder of keys and kit; default: that of agent.identity_key.", metavar="DIR")
    ] = None,
    gateway: Annotated[str, typer.Option(help="Also try the gateway, host:port; else nothing is asked.")] = "",
    run: Annotated[str, typer.Option(help="Estimate memory for an offered run: its name or hash.")] = "",
    units: Annotated[
        Path, typer.Option(help="Folder of the systemd units; else those in the folder of keys.", metavar="DIR")
    ] = UNITS_FOLDER,
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

    diagnosis = examine.examine(examine.Machine(node_file, keys=keys, gateway=gateway, run=run, units=units))
    sentences = explain.explain(diagnosis.policy, reads_roster=diagnosis.reads_roster) if diagnosis.policy else {}
    results = diagnosis.results
    shown = (doctoring.render(results), *explain.render(sentences))
    result = {**doctoring.as_dict(results), "policy": sentences}
    cli.emit(result, as_json=json, show=lambda: doctoring.show(*shown))
    raise typer.Exit(0 if doctoring.is_healthy(results) else 1)


for _command in (
    consent.runs,
    consent.review,
    consent.approve,
    consent.deny,
    consent.new_key,
    consent.sign_policy,
    privacy.privacy,
    join.enroll,
    join.renew,
    join.install,
    join.roster,
    join.link,
):
    app.command()(_command)
app.add_typer(consent.audit_app, name="audit", help="Show and check this site's audit log.")
app.add_typer(privacy.ledger_app, name="ledger", help="Begin this site's privacy ledger, or lower its budget.")


def main() -> None:
    """Entry point."""
    quiet.hush()
    cli.run(app)


if __name__ == "__main__":
    main()
