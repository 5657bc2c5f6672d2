"""`silotune-client`: what a hospital's or bank's data team runs beside its data."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from client.cli import consent, doctor, join, personal, privacy
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
BaseOption = Annotated[str, typer.Option(help="A base, to count and show tokens: a folder or a name in the store.")]
ObjectiveOption = Annotated[
    str, typer.Option(metavar="sft|dpo|kto", help="The run's training.objective: which columns are read.")
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
    found = rows.check(node, rows.asked(node, run, given))
    counts = found.report.as_dict() if found.report else {}
    result = {**counts, "problems": [finding.as_dict() for finding in found.findings]}
    shown = [checks.render(found.report)] if found.report else []
    next_step = cli.next_step(*cli.again(context, "preview", without=("json",)))
    if not (run or base or node.model.base):
        next_step = "next: name the base in this site's file, model.base, or check again with --base"
    ending = findings.render(found.findings) if found.findings else next_step
    cli.emit(result, as_json=json, show=lambda: cli.show(*shown, ending))
    raise typer.Exit(DataError.exit_code if found.findings else 0)


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
    told, shown = rows.preview(node, asked, limit=limit)
    next_step = "next: name the site's policy, agent.policy, and sign it; see silotune-client sign-policy --help"
    if node.agent.policy:
        next_step = cli.next_step("silotune-client", "serve", node_file)
    found = {"settings": asdict(asked), "rows": [item.as_dict() for item in shown]}
    cli.emit(found, as_json=json, show=lambda: cli.show(f"{told}\n", render_preview(shown), next_step))


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

    node = config.load_node(node_file)  # told before torch is loaded

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


for _command in (
    consent.runs,
    consent.review,
    consent.approve,
    consent.deny,
    consent.new_key,
    consent.sign_policy,
    privacy.privacy,
    personal.export_adapter,
    join.enroll,
    join.renew,
    join.install,
    join.roster,
    join.link,
    doctor.doctor,
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
