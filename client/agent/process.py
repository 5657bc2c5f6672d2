"""The agent's process: a site's own file becomes an agent behind a socket."""

import faulthandler
from collections.abc import Callable
from pathlib import Path

from client.agent import self_test, shelf, sitelog
from client.agent.agent import PERMISSIVE, Agent, SiteData
from client.agent.gatekeeper import Gatekeeper
from client.agent.shelf import Shelf
from client.data import site_files, split
from client.ledger import sealed
from client.policy import file as policy_file
from common import keyfile, storage
from common.errors import ConfigError
from common.model import loading, store
from common.model.base import Engine
from common.run import config
from common.run.manifest import RunManifest
from common.run.schema import precisions
from common.trust import identity

LOG_FILE = "agent.jsonl"
RESIDUALS = "residuals"
HELD_OUT = b"silotune/v1/held-out"


def harden() -> None:
    """Keep this process' memory, which holds rows, out of core dumps and of tracebacks of a crash."""
    keyfile.harden()
    faulthandler.disable()


def make_agent(node: config.NodeConfig, *, tell: Callable[[str], None] = lambda line: None) -> Agent:
    """The agent of one site; rows and base are read when a run is opened.

    Args:
        node: The site's own file.
        tell: Given a line for people where a run waits, is refused or opened, or a round is answered.

    Raises:
        ConfigError: Policy or key cannot be read.
        PolicyRefusedError: The policy was edited and not signed again, or is older than one that was in force.
        AuditError: The audit log is not whole.
        PrivacyError: The policy requires differential privacy, and this machine's noise does not pass its self-test.
    """
    log = Path(node.agent.log_folder) / LOG_FILE
    storage.remove_leftovers(log.parent)
    loader = EngineLoader(node)
    return Agent(
        node.site.name,
        load_data=lambda manifest: load_data(node, manifest),
        load_engine=loader.load,
        report=sitelog.reporter(log, tell=tell),
        max_body_bytes=node.agent.max_message_mib << 20,
        guard=make_guard(node, tell=tell) if node.agent.policy else PERMISSIVE,
        state_folder=Path(node.agent.log_folder) / RESIDUALS,
        shelf=make_shelf(node),
    )


def make_shelf(node: config.NodeConfig) -> Shelf:
    """Where this site keeps what stays with it, beside its logs."""
    return Shelf(Path(node.agent.log_folder) / shelf.FOLDER)


def check_policy(node: config.NodeConfig, *, without_policy: bool) -> None:
    """A site without a policy takes every run, also one that leaves its updates unprotected; somebody must want that.

    Raises:
        ConfigError: There is no policy and nobody said so, or there is one and somebody said there is none.
    """
    if not node.agent.policy and not without_policy:
        raise ConfigError(
            "agent.policy is not set, so this site would take every run, unprotected ones too; write a policy and sign "
            "it (silotune-client sign-policy), or give --without-policy to try things out with rows that may be seen"
        )
    if node.agent.policy and without_policy:
        raise ConfigError("--without-policy, and agent.policy is set; remove one of them")


def make_guard(node: config.NodeConfig, *, tell: Callable[[str], None] = lambda line: None) -> Gatekeeper:
    """What keeps this site's policy; see `make_agent` for what it raises."""
    agent = node.agent
    signed = policy_file.load(Path(agent.policy), signer=agent.policy_signer)
    self_test.run_if_required(signed.rules.privacy)
    made = Gatekeeper(signed, node=node, key=identity.load(Path(agent.identity_key)), tell=tell)
    tell(f"policy with serial {signed.rules.serial} is in force until this agent is restarted")
    return made


def load_data(node: config.NodeConfig, manifest: RunManifest) -> SiteData:
    """The site's rows, split as the run says unless the site has held-out rows of its own.

    Raises:
        DataError: Rows are missing or unusable, or a unit has rows on both sides.
    """
    objective = manifest.run.training.objective.kind
    rows = site_files.read_rows(node.data, node.data.path, objective=objective)
    if node.data.held_out_path:
        held_out = site_files.read_rows(node.data, node.data.held_out_path, objective=objective)
        if node.data.unit_column:
            site_files.check_apart(rows, held_out)
        return SiteData(rows, held_out)
    name, run, secret = node.site.name, manifest.run, split_secret(node)
    return SiteData(*split.for_run({name: rows}, run.data, run.privacy, seed=run.seed, secret=secret)[name])


def split_secret(node: config.NodeConfig) -> bytes | None:
    """What chooses the held-out units of a site that has an identity: a key that only this site can derive.

    A site without an identity, which has no policy either, is split by the run's seed as in a simulation.

    Returns:
        32 bytes; the same for as long as the site's identity is.

    Raises:
        ConfigError: The identity key cannot be read.
    """
    key_file = node.agent.identity_key
    return sealed.derive_key(identity.load(Path(key_file)), purpose=HELD_OUT) if key_file else None


class EngineLoader:
    """Loads a base once and keeps it for as long as runs want the same one."""

    def __init__(self, node: config.NodeConfig) -> None:
        self._node = node
        self._key: tuple[object, ...] = ()
        self._engine: Engine | None = None

    def load(self, manifest: RunManifest) -> Engine:
        """The engine for a run.

        Raises:
            ModelError: The base is not here, or is another one.
        """
        run = manifest.run
        own = precisions.at_site(run.model, self._node.site.name)
        residual_rank = run.aggregation.residual_rank
        beside = (run.training.gradient_checkpointing, residual_rank, run.aggregation.num_core_heads)
        key = (manifest.base_sha256, own, run.adapter, manifest.date, *beside)
        if self._engine is None or key != self._key:
            self._engine, self._key = None, key  # the old base's memory is free before the new one is loaded
            self._engine = self._load(manifest)
        return self._engine

    def _load(self, manifest: RunManifest) -> Engine:
        """From the site's own folders only, by hash."""
        own, hardware = precisions.at_site(manifest.run.model, self._node.site.name), self._node.hardware
        return loading.engine_of(
            manifest.run,
            store.find_by_hash(manifest.base_sha256, site_files.base_folders(self._node.model)),
            own=own.model_copy(update={"sha256": manifest.base_sha256}),
            device_name=hardware.device,
            num_threads=hardware.num_threads,
            trains=True,
            date=manifest.date,
        )
