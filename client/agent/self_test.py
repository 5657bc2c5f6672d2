"""Before an agent with a promise to keep serves anybody: does the noise that this machine draws keep it?"""

from typing import Final

from client.policy.file import PrivacyRules
from client.train import dirac
from common import accounting
from common.errors import PrivacyError
from common.privacy import bounds
from common.privacy.noise import Noise, SystemNoise
from common.run.schema.privacy import UnitPrivacy

DP_DELTA: Final = 1e-5
NUM_CANARIES: Final = 2000
NUM_STEPS: Final = 4
CONFIDENCE: Final = 1 - 1e-7  # right noise, tried every hour for a century, is stopped with one chance in ten
SETTINGS: Final = UnitPrivacy(sampling_prob=1.0, noise_multiplier=2.0, dp_delta=DP_DELTA)


def run_if_required(rules: PrivacyRules) -> None:
    """Let an agent start only with noise that passes, if its site's policy requires differential privacy.

    Raises:
        PrivacyError: See `check`.
    """
    if rules.mode == "required":
        check(SystemNoise())


def check(source: Noise) -> None:
    """A short form of `silotune-sim audit mechanism`: draw, clip and noise of training, read by who knows most.

    Noise of seven tenths of its strength or less is found at all but one of thousands of starts; takes 0.1 s.

    Args:
        source: Of noise and draws.

    Raises:
        PrivacyError: The noise protects less than the accountant says it does.
    """
    found = dirac.scores(num_canaries=NUM_CANARIES, privacy=SETTINGS, num_steps=NUM_STEPS, source=source)
    claimed = accounting.epsilon(
        sampling_prob=SETTINGS.sampling_prob,
        noise_multiplier=SETTINGS.noise_multiplier,
        num_steps=NUM_STEPS,
        dp_delta=DP_DELTA,
    )
    fit = bounds.gaussian_fit(found.score_m, found.is_in_m, dp_delta=DP_DELTA, confidence=CONFIDENCE)
    if not fit.epsilon <= claimed:
        raise PrivacyError(
            f"self-test: the noise of this installation gives epsilon {fit.epsilon:.2f} or more where {claimed:.2f} is "
            "claimed, so the agent does not start; install silotune anew from pinned packages, run its tests/privacy, "
            "and report it with the machine's type"
        )
