import pytest

from common.errors import ModelError
from common.model import base, store


@pytest.fixture
def put(tmp_path):
    """Make a folder that looks like a base."""

    def make(name: str, *, weights: bytes | None = b"w"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        if weights is not None:
            (folder / "model.safetensors").write_bytes(weights)
        return folder

    return make


def test_a_folder_is_itself(put, tmp_path):
    assert store.resolve(str(put("base")), store=tmp_path / "none") == tmp_path / "base"


def test_a_name_is_looked_up_in_the_store(put, tmp_path):
    put("store/smollm2")
    assert store.resolve("smollm2", store=tmp_path / "store") == tmp_path / "store" / "smollm2"


def test_a_hub_id_is_a_folder_of_the_store(put, tmp_path):
    put("store/org--name")
    assert store.resolve("org/name", store=tmp_path / "store").name == store.folder_name("org/name") == "org--name"


def test_a_shipped_base_wins(put, tmp_path):
    shipped = put("package")
    put("store/embedded")
    assert store.resolve("embedded", store=tmp_path / "store", shipped={"embedded": shipped}) == shipped


def test_a_base_that_is_nowhere_is_an_error_with_the_command_that_fetches_it(tmp_path):
    with pytest.raises(ModelError, match=r"'org/name'.*silotune-sim base org/name"):
        store.resolve("org/name", store=tmp_path)


def test_a_folder_without_a_configuration_is_no_base(put, tmp_path):
    (put("store/odd") / "config.json").unlink()
    with pytest.raises(ModelError):
        store.resolve("odd", store=tmp_path / "store")


def test_a_base_is_found_by_its_hash_whatever_it_is_called(put):
    folders = [put("one", weights=b"1"), put("two", weights=b"2")]
    assert store.find_by_hash(base.hash_base(folders[1]), folders) == folders[1]


def test_an_unfinished_download_does_not_hide_the_right_base(put):
    folders = [put("a-partial", weights=None), put("b-right")]
    assert store.find_by_hash(base.hash_base(folders[1]), folders) == folders[1]


@pytest.mark.parametrize("names", [[], ["one"]])
def test_a_hash_that_nobody_has_is_an_error_that_says_where_it_looked(put, names):
    folders = [put(name) for name in names]
    with pytest.raises(ModelError, match=r"ab.*(one|nothing)"):
        store.find_by_hash("ab" * 32, folders)


def test_the_hash_covers_weights_configuration_tokenizer_and_names_only(put):
    folder = put("base")
    first = base.hash_base(folder)
    (folder / "README.md").write_text("about")
    (folder / "pytorch_model.bin").write_bytes(b"never loaded")
    assert base.hash_base(folder) == first
    (folder / "tokenizer.json").write_text("{}")
    second = base.hash_base(folder)
    (folder / "tokenizer.json").rename(folder / "tokenizer_config.json")
    assert len({first, second, base.hash_base(folder)}) == 3


def test_the_hash_changes_with_one_byte(put):
    folder = put("base")
    first = base.hash_base(folder)
    (folder / "model.safetensors").write_bytes(b"x")
    assert base.hash_base(folder) != first


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_base_has_no_hash(put, missing):
    folder = put("base")
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=r"config\.json and \*\.safetensors"):
        base.hash_base(folder)
