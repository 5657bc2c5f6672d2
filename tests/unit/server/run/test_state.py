"""A coordinator that is killed within a round goes on with the updates that it has."""

import json
import shutil

import pytest

from common.errors import ModelError
from common.frame import wire
from server.folder import run_files
from server.run import run
from server.run import state as states
from tests import tiny
from tests.samples.coordinator import is_kept

CHANGES = {
    "federation.num_sites": "0",
    "federation.num_rounds": "2",
    "training.local_steps": "1",
    "training.local_epochs": "0.0",
}
KILLED_AT = 5  # of the frames that south gets: opened, evaluated, trained, evaluated, and here


class Killed(BaseException):
    """The process is gone: nothing of it runs on."""


@pytest.fixture
def play(engine, tiny_base, tmp_path):
    """A run from where its folder is, and the kinds of the frames that each site was sent."""

    def begin(folder="run", *, nodes=None, dies_at: int = 0, changes=None):
        settings = tiny.settings(tiny_base, {**CHANGES, **(changes or {})})
        asked = {}

        def noting(number, answer):
            def node(frame: bytes) -> bytes:
                asked.setdefault(number, []).append(wire.unpack(frame, max_body_bytes=1 << 24).kind)
                if number == 2 and len(asked[2]) == dies_at:
                    raise Killed
                return answer(frame)

            return node

        there = nodes or tiny.make_nodes(engine)
        path = tmp_path / folder
        is_begun = (path / run_files.RUN_FILE).exists()
        log = run_files.prepare(settings, path, resume=is_begun)
        fleet = tiny.fleet({number: noting(number, answer) for number, answer in there.items()})
        outcome = run.execute(
            settings, fleet=fleet, engine=engine, folder=path, log=log, resume=is_begun, is_noise_accepted=True
        )
        return outcome.tensors, asked

    return begin


@pytest.fixture
def killed(play, tmp_path):
    """The folder of a run that was killed in its second round, when north's update was there and south was asked."""
    with pytest.raises(Killed):
        play(dies_at=KILLED_AT)
    (update,) = is_kept(tmp_path / "run")
    assert update.startswith("00001.")
    assert ".north." in update
    return tmp_path / "run"


def is_same(first, second) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_a_run_that_was_killed_between_two_updates_ends_with_the_adapter_of_a_whole_one(play, killed):
    whole, _ = play("whole")
    resumed, asked = play()
    assert is_same(resumed, whole)
    assert asked[1] == ["open", "evaluate"]  # the update of north was here already
    assert asked[2] == asked[3] == ["open", "train", "evaluate"]  # control
    assert is_kept(killed) == []


def test_no_update_outlives_its_round(play, tmp_path):
    play()
    assert not (tmp_path / "run" / states.UPDATES).exists()
    assert not (tmp_path / "run" / states.FILE).exists()


def test_a_kept_update_that_was_changed_is_refused_and_asked_for_again_once_it_is_removed(play, killed):
    (path,) = (killed / states.UPDATES).glob("*")
    data = path.read_bytes()
    path.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    with pytest.raises(ModelError, match=r"not the update that came from north; remove the file"):
        play()
    path.unlink()
    resumed, asked = play()
    assert asked[1] == ["open", "train", "evaluate"]
    assert is_same(resumed, play("whole")[0])


def test_a_kept_update_under_another_name_or_digest_is_refused(play, killed):
    (path,) = (killed / states.UPDATES).glob("*")
    other = path.with_name(path.name.replace(".north.", ".south."))
    shutil.copy(path, other)
    with pytest.raises(ModelError, match="came from south"):
        play()
    other.unlink()
    path.rename(path.with_name(path.name[:-64] + "0" * 64))
    with pytest.raises(ModelError, match="came from north"):
        play()


def test_an_update_to_another_adapter_is_removed_and_counts_no_more(play, killed):
    (path,) = (killed / states.UPDATES).glob("*")
    mark = path.name.split(".")[1]
    path.rename(path.with_name(path.name.replace(mark, "0" * len(mark))))
    resumed, asked = play()
    assert asked[1] == ["open", "train", "evaluate"]
    assert is_same(resumed, play("whole")[0])


def test_a_site_that_does_not_come_back_counts_with_the_update_that_it_sent(play, killed, engine):
    others = {number: node for number, node in tiny.make_nodes(engine).items() if number != 1}
    resumed, asked = play(nodes=others)
    assert asked.keys() == {2, 3}
    assert is_same(resumed, play("whole")[0])


def test_a_round_whose_missing_site_does_not_come_back_is_drawn_anew_and_keeps_its_updates(play, killed, engine):
    nodes, trained = tiny.make_nodes(engine), []

    def fail_later(frame: bytes) -> bytes:
        trained.append(frame)
        return frame if len(trained) == 1 else b""

    without_south, asked = play(nodes={1: nodes[1], 3: nodes[3]})
    assert asked[1] == ["open", "evaluate"]
    failing = {**tiny.make_nodes(engine), 2: tiny.spoilt(nodes[2], "train", fail_later)}
    assert is_same(without_south, play("whole", nodes=failing)[0])


def test_a_state_of_another_run_or_adapter_is_not_gone_on_from(play, killed):
    path = killed / states.FILE
    record = json.loads(path.read_bytes())
    assert (record["phase"], record["num_rounds"], record["cohort"]) == ("collect", 1, ["north", "south", "west"])
    for key, value in (("num_rounds", 0), ("adapter_sha256", "0" * 64), ("run_sha256", "0" * 64), ("phase", "other")):
        path.write_text(json.dumps({**record, key: value}))
        shutil.copytree(killed, killed.with_name(f"other-{key}"))
    whole, _ = play("whole")
    for key in ("num_rounds", "adapter_sha256", "run_sha256", "phase"):
        assert is_same(play(f"other-{key}")[0], whole)


def test_under_privacy_for_sites_as_a_whole_no_update_is_kept_and_the_round_is_drawn_anew(play, tmp_path):
    private = {
        "privacy.mode": '"site"',
        "privacy.sampling_prob": "1.0",
        "privacy.noise_multiplier": "1.0",
        "privacy.clip_norm": "0.1",
        "privacy.dp_delta": "1e-5",
        "federation.num_sites": "3",
        "aggregation.weighting": '"uniform"',
    }
    with pytest.raises(Killed):
        play(dies_at=KILLED_AT, changes=private)
    assert is_kept(tmp_path / "run") == []
    assert json.loads((tmp_path / "run" / states.FILE).read_bytes())["phase"] == "collect"
    _, asked = play(changes=private)
    assert asked[1] == ["open", "train", "evaluate"]
