"""A healthy site on disk for the doctor's tests: admitted, with a kit, rows, a base and a signed policy."""

from dataclasses import dataclass
from pathlib import Path

from client.doctor import examine
from client.doctor.examine import Diagnosis, Machine
from client.policy import file
from common.doctor.doctor import Result
from common.run import config
from common.run.config import NodeConfig
from common.trust import identity
from tests import tiny
from tests.samples import vault
from tests.samples.federations import Federation

NODE = """
[site]
name = "alder"
[data]
path = "{folder}/rows.jsonl"
[model]
store = "{folder}/models"
[hardware]
device = "cpu"
num_threads = 1
[agent]
socket = "{folder}/run/agent.sock"
log_folder = "{folder}/log"
policy = "{folder}/policy.toml"
policy_signer = "{signer}"
identity_key = "{keys}/identity.key"
"""


@dataclass
class Site:
    """A site's folder; tests break one thing in it."""

    folder: Path
    federation: Federation
    base: Path
    base_sha256: str

    @property
    def keys(self) -> Path:
        """Of keys and kit."""
        return self.federation.keys("alder")

    @property
    def node_file(self) -> Path:
        """The site's own file."""
        return self.folder / "node.toml"

    @property
    def node(self) -> NodeConfig:
        """What it says."""
        return config.load_node(self.node_file)

    def write(self, **changes: str) -> None:
        """Write everything; `changes` are lines of the policy."""
        signer = identity.public_hex(vault.ADMIN)
        self.node_file.write_text(NODE.format(folder=self.folder, keys=self.keys, signer=signer))
        tiny.write_table(self.folder / "rows.jsonl")
        for name, mode in (("models", 0o755), ("run", 0o700), ("log", 0o700)):
            (self.folder / name).mkdir(mode=mode, exist_ok=True)
        if not (self.folder / "models" / "tiny").exists():
            (self.folder / "models" / "tiny").symlink_to(self.base)
        self.sign(**changes)

    def sign(self, **changes: str) -> None:
        """Write and sign the policy."""
        text = vault.policy_text(self.base_sha256, **{"path": f'"{self.folder}/rows.jsonl"', **changes})
        (self.folder / "policy.toml").write_text(text)
        file.sign(self.folder / "policy.toml", vault.ADMIN)

    def edit(self, old: str, new: str) -> None:
        """Change the site's own file."""
        text = self.node_file.read_text()
        assert text.count(old) == 1
        self.node_file.write_text(text.replace(old, new))

    def examine(self, **options) -> Diagnosis:
        """All checks."""
        return examine.examine(Machine(self.node_file, **{"units": self.keys, **options}))

    def find(self, name: str, **options) -> Result:
        """One check's result."""
        (found,) = [result for result in self.examine(**options).results if result.name == name]
        return found


def make(folder: Path, federation: Federation, *, base: Path, base_sha256: str) -> Site:
    """A healthy site of a federation that alder has joined."""
    folder.mkdir(exist_ok=True)
    if not (federation.keys("alder") / "site.pem").exists():
        federation.install(federation.folder / "kits" / "alder", "alder")
    site = Site(folder, federation, base, base_sha256)
    site.write()
    return site
