"""Where a site's audit log and the heads of others' logs lie, and who signed the log."""

from pathlib import Path

from client.memory.history import AUDIT_FILE
from client.memory.replicas import HEADS_FILE
from common.errors import ConfigError
from common.run import config
from common.trust import identity


def log_of(node: config.NodeConfig) -> tuple[Path, str]:
    """The log's file and the public key of its signer.

    Raises:
        ConfigError: The site has no identity key, so that it keeps no log; or the key cannot be used.
    """
    if not node.agent.identity_key:
        raise ConfigError("this site has no identity key, so it keeps no audit log; set agent.identity_key in its file")
    key = identity.load(Path(node.agent.identity_key))
    return Path(node.agent.log_folder) / AUDIT_FILE, identity.public_hex(key)


def heads_of(node: config.NodeConfig) -> Path:
    """The file of heads beside the log; see `log_of`."""
    return log_of(node)[0].with_name(HEADS_FILE)
