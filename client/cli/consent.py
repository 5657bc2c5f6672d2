"""The commands by which a site reads, approves and checks runs, and signs its policy."""

import getpass
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from client.cli.options import NodeFile
from common import cli
from common.frame import site_states

audit_app = cli.make(
    "audit",
    "This site's audit log: signed, chained, append-only.",
    examples=("silotune-client audit verify node.toml",),
)
RunArgument = Annotated[str, typer.Argument(help="A run's name, or the first digits of its hash.", metavar="RUN")]
NEXT = (
    "next: copy both files to where agent.policy points, and restart the agent (systemctl restart silotune-agent), "
    "which goes on with its old policy until then; silotune-client doctor shows which one is in force"
)
ByOption = Annotated[str, typer.Option(help="Who decides; default: this user.")]


def runs(node_file: NodeFile, json: cli.JsonOption = False) -> None:
    """List the runs that this site was offered, with the state of each.

    States: offered, waits for approval, approved, denied, refused by rule, failed, training, finished (its last round
    was answered). The reason behind a reference is in agent.jsonl.

    \b
    Examples:
      silotune-client runs node.toml
    """
    import time

    from client.review import review as desk
    from common.run import config

    table = desk.runs(desk.open_desk(config.load_node(node_file)))
    open_ = [row for row in table if row["state"] != site_states.REFUSED]  # of a refused one no offer may be kept
    first = next((row["run"] for row in open_ if row["state"] == site_states.WAITS), open_[0]["run"] if open_ else "")
    next_step = [cli.next_step("silotune-client", "review", node_file, first[:12])] if first else []
    shown = (desk.render_runs(table, now=time.time()), *next_step)
    cli.emit({"runs": table}, as_json=json, show=lambda: cli.show(*shown))


def review(node_file: NodeFile, run: RunArgument, json: cli.JsonOption = False) -> None:
    """Show what a run asks of this site, also one that the policy refused.

    What leaves and how much of it, what is read, and how the run differs from the last one that was approved.

    \b
    Examples:
      silotune-client review node.toml triage
    """
    from client.review import review as desk
    from common.run import config

    page = desk.review(desk.open_desk(config.load_node(node_file)), run)
    next_steps = [
        f"{head}: {cli.quoted(['silotune-client', word, node_file, page.run[:12]])}"
        for head, word in (("next", "approve"), ("or", "deny"))
    ]
    if not page.is_open:
        next_steps = [
            "next: leave it refused; or change the policy, sign it, restart the agent, and let it be offered anew"
        ]
    cli.emit(asdict(page), as_json=json, show=lambda: cli.show(desk.render(page), *next_steps))


def approve(node_file: NodeFile, run: RunArgument, by: ByOption = "", json: cli.JsonOption = False) -> None:
    """Let a run train here.

    Exactly the manifest that was reviewed; a changed one waits again.

    \b
    Examples:
      silotune-client approve node.toml 3f9c2a71be04 --by "Data protection officer"
    """
    _decide(node_file, run, is_approved=True, by=by, as_json=json)


def deny(node_file: NodeFile, run: RunArgument, by: ByOption = "", json: cli.JsonOption = False) -> None:
    """Refuse a run, also one that is under way.

    \b
    Examples:
      silotune-client deny node.toml triage
    """
    _decide(node_file, run, is_approved=False, by=by, as_json=json)


def new_key(path: Annotated[Path, typer.Argument(metavar="KEY.pem")], json: cli.JsonOption = False) -> None:
    """Make an Ed25519 key, such as the policy admin's.

    The file is for this user alone; the public key is printed.

    \b
    Examples:
      silotune-client new-key admin.pem
    """
    from common.trust import identity

    public = identity.public_hex(identity.create(path))
    cli.emit({"public_key": public}, as_json=json, show=lambda: cli.show(public))


def sign_policy(
    policy_file: Annotated[Path, typer.Argument(help="The site's policy.", metavar="POLICY.toml")],
    key: Annotated[Path, typer.Option(help="The admin's private key.")],
    json: cli.JsonOption = False,
) -> None:
    """Check a policy and sign it.

    An agent that runs goes on with the policy that it began with, until it is restarted.

    \b
    Examples:
      silotune-client sign-policy policy.toml --key admin.pem
    """
    from client.policy import file as policies
    from common.trust import identity

    signer = identity.load(key)
    rules = policies.sign(policy_file, signer)
    missing = policies.shortcomings(rules)
    result = {
        "signature": str(policies.signature_path(policy_file)),
        "policy_signer": identity.public_hex(signer),
        "serial": rules.serial,
    }
    lines = [*(f"{name:<14} {value}" for name, value in result.items()), *(f"note: {line}" for line in missing), NEXT]
    cli.emit({**result, "notes": missing}, as_json=json, show=lambda: cli.show(*lines))


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
    from client.memory import replicas
    from common.run import config
    from common.trust import audit_view

    entries = audit_view.newest(*replicas.log_of(config.load_node(node_file)), limit=last)
    cli.emit({"entries": entries}, as_json=json, show=lambda: cli.show(audit_view.render(entries)))


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
    from client.memory import replicas
    from common.run import config
    from common.trust import audit_view

    node = config.load_node(node_file)
    result = audit_view.verify(*replicas.log_of(node), heads=heads, owner=node.site.name)
    line = f"{result['num_entries']} entries, whole; head {result['sha256']}"
    cli.emit(result, as_json=json, show=lambda: cli.show(line))


@audit_app.command("heads")
def audit_heads(
    node_file: NodeFile,
    out: Annotated[Path | None, typer.Option(help="Copy all kept heads here, for another's audit verify.")] = None,
    json: cli.JsonOption = False,
) -> None:
    """Show the newest known heads of the other parties' audit logs.

    \b
    Examples:
      silotune-client audit heads node.toml --out heads.jsonl
    """
    from client.memory import replicas
    from common.run import config
    from common.trust import audit_view

    result = audit_view.kept(replicas.heads_of(config.load_node(node_file)), out=out)
    cli.emit(result, as_json=json, show=lambda: cli.show(audit_view.render_heads(result["heads"])))


def _decide(node_file: Path, run: str, *, is_approved: bool, by: str, as_json: bool) -> None:
    from client.review import review as desk
    from common.run import config

    result = desk.decide(
        desk.open_desk(config.load_node(node_file)), run, is_approved=is_approved, by=by or getpass.getuser()
    )
    cli.emit(
        result, as_json=as_json, show=lambda: cli.show(f"{result['name']} ({result['run'][:12]}): {result['state']}")
    )
