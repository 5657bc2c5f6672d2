"""All uploads of a round, for methods whose result no running sum gives."""

from common.adapter import adapter
from server.aggregate.method import State


class Kept:
    """Keeps every upload and gives them in an order of their own, so that no result depends on that of arrival."""

    def __init__(self) -> None:
        self._uploads: list[tuple[str, float, State]] = []

    def add(self, upload: State, *, weight: float) -> None:
        """Keep an upload.

        Raises:
            ValueError: The weight is not positive.
        """
        if not weight > 0:
            raise ValueError(f"weight {weight} is not positive")
        digest = adapter.digest(upload)
        self._uploads.append((digest, weight, upload))

    def ordered(self) -> list[tuple[float, State]]:
        """Weights and uploads, by the uploads' hashes.

        Raises:
            ValueError: Nothing was added.
        """
        if not self._uploads:
            raise ValueError("no upload was added")
        return [(weight, upload) for _, weight, upload in sorted(self._uploads, key=lambda kept: kept[:2])]
