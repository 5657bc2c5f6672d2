"""The sites' identity keys by the federation's signed roster, as the coordinator of a run knows them."""

from collections.abc import Mapping
from pathlib import Path

from common.errors import AuthError
from common.trust import governance, kit, roster


class SiteKeys:
    """Keys by site name; the roster is read again when its file changes, and never goes back.

    Args:
        folder: Where `federation.json` and `roster.json` lie.
        federation: Id of the federation that it must be of.

    Raises:
        ConfigError: A file is missing or cannot be read.
        AuthError: The roster is of another federation, or too few of its governance signed it.
    """

    def __init__(self, folder: Path, federation: str) -> None:
        self._pinned = governance.load(folder / kit.PINNED)
        if self._pinned.federation_id != federation:
            raise AuthError(f"{folder} is of federation {self._pinned.federation_id}, the run is for {federation}")
        self._path = folder / kit.ROSTER
        self._epoch, self._data, self._keys = 1, b"", dict[str, str]()
        self.now()

    def epoch(self) -> int:
        """The roster's epoch now; see `now`."""
        self.now()
        return self._epoch

    def now(self) -> Mapping[str, str]:
        """Public keys, hex, by site name.

        Raises:
            ConfigError: The roster cannot be read.
            AuthError: It was replaced by one that is older or not signed.
        """
        data = governance.read(self._path)
        if data != self._data:
            found = roster.parse(data, governance=self._pinned, epoch_min=self._epoch)
            self._epoch, self._data = found.epoch, data
            self._keys = {site.name: site.identity_key for site in found.sites}
        return self._keys
