"""Data sets of the `datasets` library: saved in a folder, or by id from its cache or a hub.

Its errors are not kept as causes: their text may quote rows.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Final

from common import extras
from common.data.files import Located
from common.errors import DataError

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]

SPLIT: Final = "train"
_SAVED: Final = ("state.json", "dataset_dict.json")


def is_saved(folder: Path) -> bool:
    """Tell whether `datasets.save_to_disk` made this folder."""
    return any((folder / name).is_file() for name in _SAVED)


def load_folder(folder: Path) -> list[Located]:
    """Read what `datasets.save_to_disk` wrote; of several splits the one called "train".

    Raises:
        DataError: The folder is damaged or has no such split.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
        chosen = saved[SPLIT] if isinstance(saved, datasets.DatasetDict) else saved
        return _located(chosen, folder.name)
    except (OSError, ValueError, KeyError):
        raise DataError(f"{folder}: is not a readable saved data set with a split {SPLIT!r}: save it again") from None


def load(name: str) -> list[Located]:
    """Load the split "train" of a data set by its id; HF_HUB_OFFLINE=1 keeps the library to its local cache.

    Args:
        name: Such as "owner/name".

    Raises:
        DataError: There is no such path, and no such data set can be loaded.
    """
    try:
        import datasets
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise DataError(
            f"{name}: no such file or folder, and `datasets` is not installed to look it up; "
            f"correct the path, or install it with: {extras.install('client')}"
        ) from error
    try:
        return _located(datasets.load_dataset(name, split=SPLIT), name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HfHubHTTPError, HFValidationError) as error:
        raise DataError(
            f"{name}: no such file or folder, and no data set of that id with a split {SPLIT!r} can be loaded "
            f"({type(error).__name__}): correct the path, or download the data set and name its folder"
        ) from None


def _located(rows: "datasets.Dataset", name: str) -> list[Located]:
    """Rows with their numbers."""
    return [Located(f"{name} row {number}", fields) for number, fields in enumerate(rows, start=1)]
