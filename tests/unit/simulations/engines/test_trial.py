"""The federation of `trial` on disk; that it runs is what the coordinator's tutorial shows."""

import fcntl
import json
from pathlib import Path

import pytest

from client.policy import file as policy_file
from common.errors import ConfigError
from common.run import config
from common.trust import identity
from simulations.engines import trial


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trial") / "here"
    return folder, trial.make(folder)


def test_each_site_has_rows_of_its_own_and_a_policy_that_its_admin_signed(made):
    folder, _ = made
    admin = identity.public_hex(identity.load(folder / "admin.pem"))
    for name in trial.SITES:
        node = config.load_node(folder / name / "node.toml")
        rules = policy_file.load(Path(node.agent.policy), signer=admin).rules
        assert (rules.privacy.mode, rules.privacy.max_epsilon, rules.runs.approval) == ("required", 8.0, "every_run")
        assert node.data.path == str(folder / name / "rows.jsonl")
        rows = [json.loads(line) for line in (folder / name / "rows.jsonl").read_text().splitlines()]
        assert {row["site"] for row in rows} == {name}


def test_the_coordinators_own_rows_are_of_no_member(made):
    folder, _ = made
    rows = [json.loads(line) for line in (folder / "public.jsonl").read_text().splitlines()]
    assert rows
    members = {line for name in trial.SITES for line in (folder / name / "rows.jsonl").read_text().splitlines()}
    assert not {json.loads(line)["input"] for line in members} & {row["text"].splitlines()[1] for row in rows}
    (task,) = config.load(folder / "run.toml").evaluation.tasks
    assert task.data == str(folder / "public.jsonl")


def test_the_run_keeps_to_the_policies(made):
    """What the policies ask for and the run file says; that the sites take it is what the tutorial shows."""
    folder, _ = made
    run, rules = config.load(folder / "run.toml"), config.load_node(folder / "alder" / "node.toml")
    text = policy_file.load(Path(rules.agent.policy), signer=rules.agent.policy_signer).rules
    assert run.privacy.epsilon < text.privacy.max_epsilon
    assert run.training.local_steps >= text.train.min_local_steps
    assert run.federation.min_sites >= text.cohort.min_sites


def test_a_federation_that_was_made_is_found_again(made):
    folder, built = made
    again = trial.load(folder)
    assert (again.ports, again.folder) == (built.ports, built.folder)
    assert [(site.name, site.socket_path) for site in again.sites] == [
        (site.name, site.socket_path) for site in built.sites
    ]


def test_commands_name_what_is_there(made):
    folder, built = made
    launch, *rest = trial.commands(folder, built)
    assert built.address("control") in launch
    files = [word for word in launch.split() if word.startswith(str(folder)) and not word.endswith("/run")]
    assert len(files) == 7
    assert all((folder / file).exists() for file in files)
    assert len(rest) == 1 + len(trial.SITES)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no trial"):
        trial.make(tmp_path)
    with pytest.raises(ConfigError, match="holds no whole trial"):
        trial.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_second_start_and_a_stop_of_nothing_are_refused(made):
    folder, _ = made
    with pytest.raises(ConfigError, match="no trial runs in"):
        trial.stop(folder)
    assert not trial.is_running(folder)
    with (folder / trial.STATE).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert trial.is_running(folder)
        with pytest.raises(ConfigError, match="runs already; stop it with"):
            trial.detach(folder)
        with pytest.raises(ConfigError, match="runs already"):
            trial.serve(folder, announce=lambda _: pytest.fail("it did not run alone"))
