"""The audit of the mechanism catches noise that is too weak, and leaves right noise alone; so does the self-test."""

import json
import math

import numpy as np
import pytest
import torch

from client.agent import process, self_test
from client.policy import file
from client.train import private
from common import accounting, cli
from common.errors import PrivacyError
from common.privacy import bounds, noise
from common.privacy.noise import SeededNoise, SystemNoise
from common.run import config
from common.run.schema.privacy import UnitPrivacy
from common.trust import identity
from simulations.audit import mechanism
from simulations.cli.app import app
from tests import tiny
from tests.samples import vault

DELTA = 1e-5
SETTINGS = {(1.0, 8.0, 20): 2.26, (0.25, 2.0, 50): 4.44, (0.1, 1.0, 100): 7.05}
RUNS = [(setting, seed) for setting in SETTINGS for seed in range(3)]


class Weakened(SeededNoise):
    """The product's generator with its normal values scaled."""

    def __init__(self, seed: int, factor: float) -> None:
        super().__init__(seed)
        self.factor = factor

    def discrete(self, size: int, *, std: float, device: torch.device) -> torch.Tensor:
        return super().discrete(size, std=std, device=device) * self.factor


class Constant(SeededNoise):
    """Normal values that are no noise, as all are the same."""

    def discrete(self, size: int, *, std: float, device: torch.device) -> torch.Tensor:
        return super().discrete(size, std=std, device=device) * 0 + 0.7 * std


class Broken(SeededNoise):
    """Normal values that are no numbers."""

    def discrete(self, size: int, *, std: float, device: torch.device) -> torch.Tensor:
        return super().discrete(size, std=std, device=device) * math.nan


def audited(setting, source, num_canaries: int = 1000):
    sampling_prob, noise_multiplier, num_steps = setting
    privacy = UnitPrivacy(sampling_prob=sampling_prob, noise_multiplier=noise_multiplier, clip_norm=0.5, dp_delta=DELTA)
    return mechanism.audit(privacy, num_steps=num_steps, num_canaries=num_canaries, source=source)


@pytest.mark.parametrize(("setting", "seed"), RUNS)
def test_right_noise_is_not_refuted_and_half_of_it_is(setting, seed):
    right, half = audited(setting, SeededNoise(seed)), audited(setting, Weakened(seed, 0.5))
    assert right.claimed_epsilon == pytest.approx(SETTINGS[setting], abs=0.005)
    assert 0.5 * right.claimed_epsilon < right.audited_epsilon <= right.claimed_epsilon
    assert not right.is_refuted
    assert half.audited_epsilon > half.claimed_epsilon
    assert half.is_refuted


@pytest.mark.parametrize(("setting", "seed"), RUNS)
def test_without_noise_nothing_is_left_of_the_claim(setting, seed):
    """With q = 1 the canaries' scores do not vary at all; below it only their own draws make them vary."""
    found = audited(setting, Weakened(seed, 0.0))
    assert found.is_refuted
    assert found.audited_epsilon == math.inf if setting[0] == 1.0 else found.audited_epsilon > 25
    assert found.figures["one_run_epsilon"] == pytest.approx(found.figures["one_run_ceiling"])


def test_the_bound_is_exceeded_by_right_noise_as_seldom_as_its_confidence_says():
    """With one step of every unit the claim is exact, so the bound passes it in one of twenty audits."""
    setting = (1.0, 2.0, 1)
    exceeded = sum(audited(setting, SeededNoise(seed), 200).is_refuted for seed in range(100))
    assert exceeded <= 13  # 5 are expected; more are one chance in a thousand


def test_a_clip_that_does_nothing_is_caught(monkeypatch):
    """The control of the canaries' length: ten times the clip norm."""
    setting = (0.25, 2.0, 50)
    assert not audited(setting, SeededNoise(1)).is_refuted
    whole = lambda rows, *, clip_norm: (rows.double().sum(0) / noise.grid_step(clip_norm), rows.norm(dim=1))  # noqa: E731
    monkeypatch.setattr(private, "clip", whole)
    assert audited(setting, SeededNoise(1)).is_refuted


def test_units_that_are_drawn_more_often_than_accounted_are_caught():
    class Eager(SeededNoise):
        def uniform(self, size: int) -> np.ndarray:
            return super().uniform(size) * (0.4 if size != 1000 else 1.0)  # draws, not the canaries' coins

    setting = (0.1, 1.0, 100)
    assert audited(setting, Eager(3)).is_refuted


@pytest.mark.parametrize("seed", range(3))
def test_the_one_run_bound_never_exceeds_the_claim_when_the_noise_is_right(seed):
    for setting in SETTINGS:
        found = audited(setting, SeededNoise(seed))
        assert found.figures["one_run_epsilon"] < found.claimed_epsilon


@pytest.mark.parametrize(("m", "wanted"), [(20, 1.8), (50, 2.8), (100, 3.5), (200, 4.2), (500, 5.1), (1000, 5.8)])
def test_the_ceiling_is_the_published_one(m, wanted):
    found = bounds.one_run_epsilon(num_canaries=m, num_guesses=m, num_right=m, dp_delta=DELTA)
    assert found == pytest.approx(wanted, abs=0.05)


def test_guesses_without_any_skill_refute_nothing():
    for m in (20, 100, 1000):
        assert bounds.one_run_epsilon(num_canaries=m, num_guesses=m, num_right=m // 2, dp_delta=DELTA) < 1e-9


@pytest.mark.parametrize(("noise_multiplier", "num_steps"), [(8.0, 20), (20.0, 100)])
def test_the_formula_of_gaussian_privacy_agrees_with_the_accountant(noise_multiplier, num_steps):
    wanted = accounting.epsilon(
        sampling_prob=1.0, noise_multiplier=noise_multiplier, num_steps=num_steps, dp_delta=DELTA
    )
    found = bounds.gdp_epsilon(math.sqrt(num_steps) / noise_multiplier, dp_delta=DELTA)
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(("mu", "epsilon"), [(0.2367, 1.0), (0.6477, 3.0), (1.5315, 8.0)])
def test_the_formula_of_gaussian_privacy_gives_published_values(mu, epsilon):
    assert bounds.gdp_epsilon(mu, dp_delta=1e-6) == pytest.approx(epsilon, abs=2e-3)
    assert bounds.gdp_epsilon(mu / 2, dp_delta=1e-6) < 0.6 * epsilon


def test_canaries_cannot_be_told_apart_by_the_coins_alone():
    """The control: noise that drowns them leaves no bound."""
    assert audited((1.0, 1e4, 4), SeededNoise(2)).audited_epsilon == 0.0


def test_an_agent_starts_with_right_noise_and_not_with_any_other():
    self_test.check(SystemNoise())
    for source in (Weakened(1, 0.5), Weakened(1, 0.7), Weakened(1, 0.0), Constant(1), Broken(1)):
        with pytest.raises(PrivacyError, match=r"self-test.*does not start"):
            self_test.check(source)


def test_right_noise_passes_the_self_test_every_time():
    for seed in range(20):
        self_test.check(SeededNoise(seed))


def test_an_agent_whose_policy_requires_privacy_does_not_start_with_half_the_noise(engine, tmp_path, monkeypatch):
    """The controls: the same policy with right noise, and the same noise with a policy that requires nothing."""
    site_key = tmp_path / "site.pem"
    identity.create(site_key)
    guarded = {mode: agent_node(tmp_path / mode, engine, mode=mode, key=site_key) for mode in ("required", "none")}
    process.make_agent(guarded["required"])
    right = SystemNoise.discrete
    monkeypatch.setattr(SystemNoise, "discrete", lambda *given, **named: right(*given, **named) * 0.5)
    process.make_agent(guarded["none"])
    with pytest.raises(PrivacyError, match=r"self-test.*does not start"):
        process.make_agent(guarded["required"])


def agent_node(folder, engine, *, mode: str, key):
    """A site with a signed policy."""
    folder.mkdir()
    policy = folder / "policy.toml"
    text = vault.policy_text(engine.base_sha256)
    policy.write_text(text.replace('mode = "none"', f'mode = "{mode}"'))
    file.sign(policy, vault.ADMIN)
    agent = {"policy": str(policy), "policy_signer": identity.public_hex(vault.ADMIN), "identity_key": str(key)}
    sections = {"site": {"name": "north"}, "data": {"path": "rows.jsonl"}}
    return config.NodeConfig.model_validate({**sections, "agent": {**agent, "log_folder": str(folder)}})


def silotune_sim(*arguments: object) -> int:
    try:
        cli.run(app, [str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_ends_with_the_code_of_privacy_when_the_claim_is_refuted(capsys):
    given = ("audit", "mechanism", "--confidence", "0.999999", "--json")
    assert silotune_sim(*given) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["claimed_epsilon"], told["num_canaries"], told["ceiling"]) == (
        pytest.approx(4.44, abs=0.005),
        1000,
        "infinite",
    )
    assert told["audited_epsilon"] < told["claimed_epsilon"]
    assert "knows all units but one" in told["threat_model"]
    assert silotune_sim(*given, "--noise-multiplier", "1", "--claim", "4.44") == 5
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["is_refuted"]


def test_the_command_takes_the_settings_of_a_run(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text(tiny.RUN_FILE.format(base="tiny").replace("training.local_epochs = 1.0\n", ""))
    assert silotune_sim("audit", "mechanism", path) == 2
    assert "privacy.mode" in capsys.readouterr().err
    private_run = ("privacy.mode=unit", "privacy.sampling_prob=0.25", "privacy.noise_multiplier=2.0")
    steps = ("training.local_steps=25", "privacy.dp_delta=1e-5", "data.unit_column=patient_id")
    settings = [part for setting in (*private_run, *steps) for part in ("--set", setting)]
    assert silotune_sim("audit", "mechanism", path, *settings, "--confidence", "0.999999", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["claimed_epsilon"] == pytest.approx(4.44, abs=0.005)
