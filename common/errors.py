"""The error tree: every failure that a user or a peer can cause, with its exit code."""


class SilotuneError(Exception):
    """Root of the tree.

    The message is one line that names the file, row, key or site and the remedy. It never holds data, tensor
    values, prompts or keys.

    Attributes:
        exit_code: What a command returns to the shell.
        is_retryable: Whether the same call may succeed later without a change.
    """

    exit_code = 1
    is_retryable = False


class ConfigError(SilotuneError):
    """A file, key, type or combination of settings is wrong."""

    exit_code = 2


class DataError(SilotuneError):
    """Local data are missing or unusable."""

    exit_code = 3


class ModelError(SilotuneError):
    """The base model or the adapter does not fit: shapes, names, hashes, precision, non-finite values."""

    exit_code = 4


class CodesDifferError(ModelError):
    """The quantised base here is not the one that the run's manifest names."""


class PrivacyError(SilotuneError):
    """A privacy rule refuses."""

    exit_code = 5


class PolicyRefusedError(PrivacyError):
    """A rule of the site's own policy refuses.

    Attributes:
        rule: Dotted path of the rule in the policy file.
    """

    def __init__(self, message: str, *, rule: str = "") -> None:
        super().__init__(message)
        self.rule = rule


class AccountingUnsupported(PrivacyError):
    """Noise, sampling or steps for which no epsilon can be proven."""


class FloorRefused(PrivacyError):
    """A plan protects less than it must."""


class BudgetExhausted(PrivacyError):
    """A step would pass the data set's privacy budget."""


class LedgerError(PrivacyError):
    """A privacy ledger is missing, is not what was written into it, or says something else than the site's settings."""


class ApprovalRequired(PrivacyError):
    """Nobody at the site has approved this run yet."""


class ApprovalDenied(PrivacyError):
    """Somebody at the site has denied this run."""


class ProtocolError(SilotuneError):
    """A peer did not keep to the protocol."""

    exit_code = 6


class WireError(ProtocolError):
    """Bytes that are not a valid frame: version, length, hash, header or tensors."""


class AuthError(ProtocolError):
    """A signature, certificate, proof or epoch that does not show what it must."""


class RosterOutdated(ProtocolError):
    """A run is offered under a newer roster of the federation than the site has."""


class AuditError(ProtocolError):
    """An audit log is not what was written into it."""


class TooFewSitesError(ProtocolError):
    """Fewer valid updates than `federation.min_sites` arrived before the deadline."""


class RemoteError(ProtocolError):
    """A peer refused or failed; it sent a code and a reference, nothing else.

    Attributes:
        code: Of the peer's error; empty if it sent none.
        reference: Of the reason in the peer's own log; empty if it sent none.
    """

    def __init__(self, message: str, *, code: str = "", reference: str = "") -> None:
        super().__init__(message)
        self.code, self.reference = code, reference


class TransportError(SilotuneError):
    """The network, a socket or a process at the other end is not there."""

    exit_code = 7
    is_retryable = True


class StorageError(SilotuneError):
    """A result could not be written: full disk, missing permission."""

    exit_code = 8


class RunBusyError(StorageError):
    """Another process is at work in a run's folder."""


class GateRefused(SilotuneError):
    """An adapter does not show what the run file's `[gate]` asks for, so it is not exported."""

    exit_code = 9


def code_of(error: BaseException) -> str:
    """All that a peer learns of an error: its class if it is of our tree; else whether memory ran out, and no more.

    Example:
        >>> code_of(DataError("no rows")), code_of(KeyError("name")), code_of(MemoryError())
        ('DataError', 'InternalError', 'OutOfMemory')
    """
    if isinstance(error, SilotuneError):
        return type(error).__name__
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    return "OutOfMemory" if is_memory else "InternalError"
