import io
import tomllib
import zipfile
from pathlib import Path

from server.run import link


def test_a_bundle_holds_names_and_no_code():
    with zipfile.ZipFile(io.BytesIO(link.build_bundle())) as bundle:
        assert set(bundle.namelist()) == {"pyproject.toml", ".info/CONTENT"}
        app = tomllib.loads(bundle.read("pyproject.toml").decode())["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "server.run.app:app", "clientapp": "client.courier.app:app"}
    signing = {"operator-key", "federation", "offer-days", "audit-folder", "roster-folder"}
    assert set(app["config"]) == {"run-folder", "base-folder", "num-threads", "resume", "i-accept"} | signing


def test_the_same_bundle_every_time():
    assert link.build_bundle() == link.build_bundle()


def test_the_repositorys_own_bundle_is_the_same_app():
    with zipfile.ZipFile(io.BytesIO(link.build_bundle())) as bundle:
        made = tomllib.loads(bundle.read("pyproject.toml").decode())["tool"]["flwr"]["app"]
    ours = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert {key: ours[key] for key in made} == made
    assert ours["fab-include"] == ["pyproject.toml"]
