"""A site with a policy, on the tiny base: what it is asked, what it answers and what its audit log says of it."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from client.agent.agent import Agent, SiteData
from client.agent.gatekeeper import Gatekeeper
from client.memory.history import AUDIT_FILE
from client.memory.replicas import HEADS_FILE
from client.policy import file
from common.adapter import adapter, start
from common.frame import wire
from common.frame.records import HEADS, LINKS, RoundPlan, to_head
from common.frame.wire import Frame
from common.run import config, manifest
from common.run.manifest import Offer, RunManifest
from common.trust import audit_log, identity, signed_frame
from common.trust import heads as audit_heads
from common.trust.audit_log import AuditLog, Entry, Head
from common.trust.heads import SignedHead
from server.fleet import trail
from server.fleet.trail import Operator
from tests import tiny

OPERATOR, ADMIN, SITE, STRANGER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3, 4))
NOW = 1_800_000_000.0
FEDERATION = "onco-eu"
SERVER_LOG = audit_heads.operator(identity.public_hex(OPERATOR))
MAX = 1 << 24
POLICY = """
version = 1
serial = 3

[federation]
id = "onco-eu"
operators = ["{operator}"]

[[models.allow]]
name = "tiny"
sha256 = "{base}"

[lora]
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
r = [2, 16]

[train]
learning_rate = [1e-3, 1e-1]
min_local_steps = 3
min_batch_size = 4
min_records = 9
max_rounds = 4
max_length_tokens = 64

[privacy]
mode = "none"
secagg = "none"

[cohort]
min_sites = 2

[data.datasets.notes]
path = "rows.jsonl"
columns = ["instruction", "input", "output", "patient_id"]
max_rows = 100

[evaluation]
min_slice = 3

[egress]
max_bytes_per_message = 1_000_000
max_bytes_per_run = 10_000_000

[egress.metrics]
num_examples = [0, 1e6]
num_held_out = [0, 1e6]
num_truncated = [0, 1e6]
num_dropped = [0, 1e6]
num_steps = [0, 1e6]
num_tokens = [0, 1e9]
train_loss = [0, 20]
seconds = [0, 86400]
nll_sum = [0, 1e9]
num_answer_tokens = [0, 1e9]
num_rows = [0, 1e6]
num_generated = [0, 1e6]
num_exact = [0, 1e6]

[runs]
max_per_day = 2
approval = "every_run"
"""


def links(num_lines: int) -> list[str]:
    """Hashes of the lines of a coordinator's log."""
    return [hashlib.sha256(number.to_bytes(4, "big")).hexdigest() for number in range(num_lines)]


def server_head(sequence: int = 7) -> Head:
    """The head of that log at one of its lines, of which one comes a second."""
    return Head(sequence, audit_log.follow(audit_log.GENESIS, links(sequence + 1)), NOW - 60 + sequence)


def signed(
    head: Head, owner: str = "south", *, key: Ed25519PrivateKey = SITE, federation: str = FEDERATION
) -> SignedHead:
    """A head as its owner tells it; all sites have one key here."""
    return audit_heads.sign(head, owner=owner, federation=federation, key=key)


def signed_anew(data: bytes, *, key: Ed25519PrivateKey = SITE) -> bytes:
    """An answer as the site itself would have signed it."""
    frame = wire.unpack(data, max_body_bytes=MAX)
    return wire.pack(signed_frame.sign(frame, key=key, federation=FEDERATION))


def told(
    head: Head | None = None,
    *,
    key: Ed25519PrivateKey = OPERATOR,
    federation: str = FEDERATION,
    **others: Head | SignedHead,
) -> dict[str, list]:
    """What a coordinator with this key says of the logs beside a plan; sites' heads are signed by `SITE`."""
    server, own = head or server_head(), audit_heads.operator(identity.public_hex(key))
    heads = {own: signed(server, own, key=key, federation=federation)}
    heads |= {name: signed(one, name) if isinstance(one, Head) else one for name, one in others.items()}
    return {HEADS: audit_heads.to_list(heads), LINKS: links(server.sequence + 1)}


TOLD = told()


def policy_text(base_sha256: str, **changes: str) -> str:
    """The policy with lines changed: `learning_rate="[1e-6, 1]"`; a key that is there once."""
    text = POLICY.format(operator=identity.public_hex(OPERATOR), base=base_sha256)
    for key, value in changes.items():
        lines = [line for line in text.splitlines() if line.startswith(f"{key} = ")]
        assert len(lines) == 1, key
        text = text.replace(f"\n{lines[0]}\n", f"\n{key} = {value}\n")
    return text


def operator(folder: Path, *, roster_folder: Path | None = None) -> Operator:
    """The operator with a key file, and the audit log beside it; offers are for the sites' clock."""
    path = folder / "op.pem"
    if not path.exists():
        write_key(path, OPERATOR)
    day = int(NOW + 86_400)
    return Operator(
        lambda run: manifest.sign(run, OPERATOR, federation=FEDERATION, not_after=day),
        trail.open_trail(path, federation=FEDERATION, roster_folder=roster_folder),
    )


def write_key(path: Path, key: Ed25519PrivateKey) -> None:
    """A key file as `new-key` makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def write_node(site: "Vault") -> Path:
    """The site's own file on disk, with its keys beside it."""
    folder = site.folder
    for name, key in (("site.pem", SITE), ("admin.pem", ADMIN)):
        write_key(folder / name, key)
    path = folder / "node.toml"
    path.write_text(
        f'[site]\nname = "north"\n[data]\npath = "rows.jsonl"\n[agent]\nlog_folder = "{folder}"\n'
        f'policy = "{folder / "policy.toml"}"\npolicy_signer = "{identity.public_hex(ADMIN)}"\n'
        f'identity_key = "{folder / "site.pem"}"\n'
    )
    return path


def node(folder: Path, name: str, *, roster_folder: Path | None = None) -> config.NodeConfig:
    """The site's own file."""
    agent = {
        "log_folder": str(folder),
        "policy": str(folder / "policy.toml"),
        "policy_signer": "ab" * 32,
        "identity_key": "k",
    }
    agent |= {"roster_folder": str(roster_folder)} if roster_folder else {}
    return config.NodeConfig.model_validate({"site": {"name": name}, "data": {"path": "rows.jsonl"}, "agent": agent})


@dataclass
class Vault:
    """A site, its clock and its answers."""

    folder: Path
    engine: object
    data: SiteData
    policy: str
    name: str = "north"
    roster_folder: Path | None = None
    now: float = NOW
    key: Ed25519PrivateKey = SITE
    errors: list[Exception] = field(default_factory=list)
    num_reads: int = 0

    def __post_init__(self) -> None:
        self.start()

    def start(self, policy: str = "") -> None:
        """Start the agent, anew if it runs already."""
        path = self.folder / "policy.toml"
        self.policy = policy or self.policy
        path.write_text(self.policy)
        file.sign(path, ADMIN)
        signed = file.load(path, signer=identity.public_hex(ADMIN))
        own = node(self.folder, self.name, roster_folder=self.roster_folder)
        self.gate = Gatekeeper(signed, node=own, key=self.key, clock=lambda: self.now)
        self.agent = Agent(
            self.name,
            load_data=lambda _: self._read(),
            load_engine=lambda _: self.engine,
            report=lambda reference, error: self.errors.append(error),
            guard=self.gate,
        )

    def _read(self) -> SiteData:
        """The rows, counting how often they are read."""
        self.num_reads += 1
        return self.data

    def manifest(self, **changes: str) -> RunManifest:
        """The run; `federation__num_rounds="3"` changes a setting."""
        settings = tiny.settings("tiny", {key.replace("__", "."): value for key, value in changes.items()})
        return RunManifest(settings, self.engine.base_sha256, self.engine.tensor_specs, self.engine.codes_sha256)

    def offer(self, run: RunManifest | None = None, *, key=OPERATOR, federation="onco-eu", days=1.0) -> Offer:
        """A signed offer."""
        return manifest.sign(run or self.manifest(), key, federation=federation, not_after=int(NOW + days * 86_400))

    def approve(self, run: RunManifest, *, is_approved: bool = True) -> None:
        """Somebody at the site decides, in a process of their own."""
        log = AuditLog(self.folder / AUDIT_FILE, key=self.key, clock=lambda: self.now)
        log.append("approved" if is_approved else "denied", run=run.sha256, by="tester")

    def ask(self, frame: Frame | bytes) -> Frame:
        """One request."""
        data = frame if isinstance(frame, bytes) else wire.pack(frame)
        return wire.unpack(self.send(data), max_body_bytes=MAX)

    def send(self, data: bytes) -> bytes:
        """What the agent answers, asked in this thread."""
        return self.agent.answer(data)

    def open(self, run: RunManifest | None = None, *, approve: bool = True) -> Frame:
        """Approve and open a run."""
        run = run or self.manifest()
        if approve:
            self.approve(run)
        return self.ask(self.offer(run).to_frame())

    def step(self, kind: str = "train", run: RunManifest | None = None, state=None, **plan: object) -> Frame:
        """A step of a run."""
        run = run or self.manifest()
        head = {**to_head(RoundPlan(run.sha256, 0)), **TOLD, **plan}
        body = state if isinstance(state, bytes) else adapter.encode(state or self.begun(run), dtype="float32")
        return self.ask(Frame(kind, head, body))

    def begun(self, run: RunManifest) -> dict:
        """What a coordinator sends first."""
        whole = start.initial(run, self.engine.initial)
        return {spec.name: whole[spec.name] for spec in run.plan.down(0)}

    def log(self) -> list[Entry]:
        """The audit log, which must be whole."""
        return list(audit_log.read(self.folder / AUDIT_FILE, identity.public_hex(self.key)))

    def refused(self, answer: Frame) -> tuple[str, str]:
        """Code and rule of a refusal; nothing else left, and the log has it."""
        assert (answer.kind, sorted(answer.head), answer.body) == ("refused", ["code", "reference"], b"")
        last = self.log()[-1]
        assert (last.kind, last.facts["reference"]) == ("refused", answer.head["reference"])
        assert last.facts["code"] == answer.head["code"]
        return answer.head["code"], last.facts["rule"]

    def kept(self) -> dict[str, list[Head]]:
        """Heads of others' logs, by owner."""
        found = audit_heads.read(self.folder / HEADS_FILE)
        return {owner: [told.head for told in heads] for owner, heads in found.items()}

    def sent(self) -> list[tuple[str, int]]:
        """What left."""
        return [(entry.facts["step"], entry.facts["round_index"]) for entry in self.log() if entry.kind == "left"]


def make(
    folder: Path,
    engine,
    *,
    name: str = "north",
    count: int = 12,
    roster_folder: Path | None = None,
    made_of: type[Vault] = Vault,
    key: Ed25519PrivateKey = SITE,
    **policy: str,
) -> Vault:
    """A site with `count` rows; three quarters train."""
    folder.mkdir(exist_ok=True)
    text = policy_text(engine.base_sha256, **policy)
    return made_of(folder, engine, tiny.site_data(name, count), text, name=name, roster_folder=roster_folder, key=key)
