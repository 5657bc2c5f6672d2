"""Who takes part: sites that open the run, refuse it, come late, come back, or pretend."""

import pytest

from client.agent.agent import Agent
from common.errors import DataError, TooFewSitesError, TransportError
from common.frame import wire
from common.frame.wire import Frame
from common.run import manifest
from server.fleet import sites as fleet_sites
from tests import tiny
from tests.samples import rosters, vault

WANT_TWO = {"federation.num_sites": "0"}


def joined(fed) -> list[str]:
    return sorted(head.site for head in fed.opened.values())


def start(fed) -> list[str]:
    """Wait for sites; the names of those that are there."""
    fed.wait()
    return joined(fed)


def test_sites_tell_their_rows_when_they_join(federate, nodes, told):
    assert start(federate(nodes)) == ["north", "south", "west"]
    events = {event["site"]: event for event in told("site_joined")}
    assert [events[site]["num_examples"] for site in ("north", "south", "west")] == [12, 9, 6]
    assert [events[site]["num_steps"] for site in ("north", "south", "west")] == [3, 3, 2]
    assert "run_sha256" not in events["north"]


def test_a_run_starts_with_min_sites_where_no_number_is_given(federate, nodes):
    assert start(federate({1: nodes[1], 2: nodes[2]}, WANT_TWO)) == ["north", "south"]


def test_sites_that_connect_later_are_waited_for(federate, nodes):
    fed = federate({1: nodes[1]})
    sleep = fed.sleep

    def connect(seconds: float) -> None:
        sleep(seconds)
        if fed.clock() > 1005:
            fed.fleet = tiny.fleet(nodes)

    fed.sleep = connect
    assert start(fed) == ["north", "south", "west"]


def test_an_agent_that_starts_later_is_waited_for(federate, nodes):
    asked = []

    def away_at_first(frame: bytes) -> bytes:
        asked.append(frame)
        if len(asked) < 4:
            raise TransportError("no agent yet")
        return nodes[3](frame)

    assert start(federate({**nodes, 3: away_at_first})) == ["north", "south", "west"]


def test_too_few_sites_is_an_error_that_says_who_is_missing_and_why(federate, nodes):
    def away(_: bytes) -> bytes:
        raise TransportError("no agent")

    fed = federate({1: nodes[1], 2: away}, WANT_TWO)
    with pytest.raises(TooFewSitesError, match=r"1 sites opened the run, 2 are needed; node 2: agent-away") as caught:
        start(fed)
    assert caught.value.exit_code == 6
    assert fed.clock() - 1000 >= fed.manifest.run.federation.join_timeout_s


def test_a_run_that_enough_have_refused_is_given_up_at_once(federate, nodes, engine, told):
    def unusable(_):
        raise DataError("rows.jsonl line 3")

    agent = Agent("west", load_data=unusable, load_engine=lambda _: engine, report=lambda *_: None)
    fed = federate({**nodes, 3: agent.answer})
    with pytest.raises(TooFewSitesError, match=r"node 3: failed \(DataError\); the site's log .* reference"):
        start(fed)
    assert fed.clock() == 1000
    assert [event["node"] for event in told("site_refused")] == [3]
    assert "line 3" not in str(told("site_refused"))


def test_a_node_that_never_answers_does_not_keep_the_others_from_starting(federate, nodes):
    fed = federate({**nodes, 4: tiny.silent}, {"federation.join_timeout_s": "30"})
    assert start(fed) == ["north", "south", "west"]
    assert fed.clock() - 1000 < 31


def test_a_node_that_never_answers_costs_one_long_wait_and_short_ones(federate, nodes):
    fed = federate({**nodes, 4: tiny.silent}, {"federation.join_timeout_s": "300"})
    start(fed)
    assert fed.clock() - 1000 == pytest.approx(300, abs=1)
    for _ in range(5):
        fed.rejoin()
    assert fed.clock() - 1300 < 5 * (fleet_sites.SECOND_WAIT_S + 1)


def test_a_site_that_was_only_slow_is_taken_in_later(federate, nodes, engine):
    slow = tiny.make_agent("east", engine).answer

    def node(frame: bytes) -> bytes | None:
        return slow(frame) if fed.clock() > 1400 else None

    fed = federate({**nodes, 4: node}, {"federation.join_timeout_s": "300"})
    assert start(fed) == ["north", "south", "west"]
    fed.sleep(200)
    fed.rejoin()
    assert joined(fed) == ["east", "north", "south", "west"]


def test_a_second_node_of_the_same_name_is_refused(federate, nodes, engine):
    double = tiny.make_agent("north", engine, count=40).answer
    fed = federate({**nodes, 4: double})
    assert start(fed) == ["north", "south", "west"]
    assert fed.opened[1].num_examples == 12
    assert "taken" in fed.refused[4]


def test_a_node_cannot_take_the_name_of_one_that_failed(federate, nodes, engine):
    """Its node id, which the link vouches for, keeps the name for the whole run."""
    fed = federate({**nodes, 0: tiny.make_agent("east", engine).answer})
    start(fed)
    fed.fleet = tiny.fleet({**nodes, 0: tiny.make_agent("north", engine, count=40).answer})
    fed.doubtful |= {0, 1}
    fed.rejoin()
    assert fed.opened[1].site == "north"
    assert 0 not in fed.opened


@pytest.mark.parametrize("name", ["", "North", "a b", "x\x1b[2J", "../etc", "a" * 65, "n\n", "| x |"])
def test_a_name_that_is_no_site_name_is_refused(federate, nodes, name):
    fed = federate({**nodes, 4: tiny.spoilt(nodes[1], "open", tiny.with_head(site=name))})
    start(fed)
    assert joined(fed) == ["north", "south", "west"]
    assert str(fed.refused[4]).isprintable()


@pytest.mark.parametrize("changes", [{"num_examples": 0}, {"run_sha256": "ab" * 32}, {"num_steps": -1}, {"extra": 1}])
def test_a_malformed_answer_to_the_offer_is_refused(federate, nodes, changes):
    fed = federate({**nodes, 4: tiny.spoilt(nodes[1], "open", tiny.with_head(site="east", **changes))})
    start(fed)
    assert joined(fed) == ["north", "south", "west"]
    assert 4 in fed.refused


def test_control_the_same_answer_unchanged_is_taken(federate, nodes):
    fed = federate({**nodes, 4: tiny.spoilt(nodes[1], "open", tiny.with_head(site="east"))})
    start(fed)
    assert joined(fed) == ["east", "north", "south", "west"]


@pytest.mark.parametrize("reply", [b"", b"x" * 100, b"\x80\x04N."])
def test_an_answer_that_is_no_frame_is_refused(federate, nodes, reply):
    fed = federate({**nodes, 4: lambda _: reply})
    start(fed)
    assert fed.refused[4].startswith("WireError")


def test_a_site_that_refused_is_offered_the_run_again_before_each_round(federate, nodes, engine):
    faults = [DataError("not mounted"), DataError("not mounted")]

    def load_data(_):
        if faults:
            raise faults.pop()
        return tiny.site_data("east", 12)

    agent = Agent("east", load_data=load_data, load_engine=lambda _: engine, report=lambda *_: None)
    fed = federate({**nodes, 4: agent.answer}, WANT_TWO)
    start(fed)
    for expected in (False, True):
        fed.rejoin()
        assert (4 in fed.opened) is expected


def test_only_sites_that_are_connected_are_present(federate, nodes):
    fed = federate(nodes)
    start(fed)
    fed.fleet = tiny.fleet({1: nodes[1], 3: nodes[3]})
    assert sorted(fed.present().values()) == [1, 3]
    assert fed.name(2) == "south"
    assert fed.name(9) == "node 9"


def test_a_refusal_is_told_under_the_sites_name_where_it_is_known_also_from_an_earlier_try(federate, nodes, told):
    fed = federate({**nodes, 3: tiny.spoilt(nodes[3], "open", lambda _: b"")})
    with pytest.raises(TooFewSitesError, match="node 3: WireError"):  # control
        start(fed)
    fed.told_names = {3: "west"}
    fed.rejoin()
    with pytest.raises(TooFewSitesError, match="; west: WireError"):
        start(fed)
    assert [(event["site"], event["state"]) for event in told("site_refused")] == [
        ("node 3", "failed"),
        ("west", "failed"),
    ]


def with_an_older_roster(node, *, num_times: int):
    """A node that says so at the first offers."""
    asked = []

    def answer(frame: bytes) -> bytes:
        asked.append(frame)
        old = wire.pack(Frame("refused", {"code": "RosterOutdated", "reference": "a1"}))
        return old if len(asked) <= num_times else node(frame)

    return answer


def test_a_site_that_fetches_the_newest_roster_is_told_at_once_and_waited_for(federate, nodes, told):
    assert start(federate({**nodes, 3: with_an_older_roster(nodes[3], num_times=2)})) == ["north", "south", "west"]
    assert [(event["node"], event["state"]) for event in told("site_refused")] == [(3, "has an older roster")]


@pytest.mark.parametrize("changes", [{}, {**WANT_TWO, "federation.min_sites": "3"}])
def test_a_site_that_gets_no_newer_roster_ends_the_run_early_and_the_reason_names_the_remedy(
    federate, nodes, changes, tmp_path
):
    fed = federate({**nodes, 3: with_an_older_roster(nodes[3], num_times=99)}, changes)
    fed.trail = vault.operator(tmp_path, roster_folder=rosters.write(tmp_path / "federation")).trail
    fed.trail.signers.update(dict.fromkeys(["north", "south"], ""))
    with pytest.raises(TooFewSitesError, match=r"node 3: its roster is older than epoch 4 .*silotune-client roster"):
        start(fed)
    waited_s = fed.clock() - 1000
    assert fleet_sites.ROSTER_WAIT_S <= waited_s < fleet_sites.ROSTER_WAIT_S + 2 * fleet_sites.APPROVAL_RETRY_S
    assert waited_s < fed.manifest.run.federation.join_timeout_s


def test_control_a_site_that_is_away_is_waited_for_to_the_end(federate, nodes):
    def away(_: bytes) -> bytes:
        raise TransportError("no agent")

    fed = federate({**nodes, 3: away})
    with pytest.raises(TooFewSitesError):
        start(fed)
    assert fed.clock() - 1000 >= fed.manifest.run.federation.join_timeout_s


def test_an_offer_names_the_epoch_of_the_coordinators_roster_as_it_is_now(federate, nodes, tmp_path):
    heard = []

    def refuse(frame: bytes) -> bytes:
        heard.append(manifest.read_offer(wire.unpack(frame, max_body_bytes=1 << 20)))
        return wire.pack(Frame("refused", {"code": "DataError", "reference": "a1"}))

    fed = federate({1: refuse})
    fed.trail = vault.operator(tmp_path, roster_folder=rosters.write(tmp_path / "federation")).trail
    for _ in range(2):
        fed.rejoin()
        rosters.write(tmp_path / "federation", rosters.signed(rosters.changed()))
    assert [offer.roster_epoch for offer in heard] == [4, 5]
