"""Floors of the local training: an update is the sum of many steps over many rows, whichever settings a run chooses.

Every setting of these sections is judged by a rule or was found harmless; each judged one has a value here that is
refused.
"""

import functools

import pytest
import torch

from client.agent.guard import Permissive
from client.policy import file
from client.policy import rules as policy
from client.policy.rules import Usage
from client.train import loop, schedule
from common.adapter import adapter
from common.errors import PolicyRefusedError
from common.frame.records import OpenedHead, TensorSpec
from common.privacy.noise import SeededNoise
from common.run import config
from common.run.manifest import RunManifest
from common.run.schema import shape
from tests import tiny
from tests.samples import vault

BASE = "ab" * 32
SPECS = (TensorSpec("m.q_proj.lora_A.weight", (4, 64)), TensorSpec("m.q_proj.lora_B.weight", (64, 4)))
SECTIONS = ("adapter", "training", "aggregation", "wire")
SGD = {"training.optimizer.kind": "sgd"}
DPO = {"training.objective.kind": "dpo"}
KTO = {"training.objective.kind": "kto"}
# a policy that allows what the cases below need beside the setting that each is about
WIDE = {
    "max_rounds": '2000\noptimizers = ["adamw", "sgd"]\nobjectives = ["sft", "dpo", "kto"]\n'
    'methods = ["fedavg", "ravan"]\nmax_local_steps = 50',
    "num_exact": "[0, 1e6]\npreference_loss_sum = [0, 1e9]\nnum_preferred = [0, 1e9]",
    "max_bytes_per_message": "100_000",
    "r": "[2, 16]\nresidual_r = 4\nmax_dropout = 0.5\nscale = [0.05, 8]\nalpha = [1, 100]",
}
STEPS = {"training.local_steps": "10", "training.local_epochs": "0.0"}
# the setting: changes that its rule refuses, and the rule
REFUSED = {
    "adapter.kind": ({"adapter.kind": "ia3"}, "adapter.kinds"),
    "adapter.r": ({"adapter.r": "32"}, "lora.r"),
    "adapter.alpha": ({"adapter.alpha": "0.5"}, "lora.alpha"),
    "adapter.use_rslora": ({"adapter.use_rslora": "true", "adapter.alpha": "20.0"}, "lora.scale"),
    "adapter.dropout": ({"adapter.dropout": "0.51"}, "lora.max_dropout"),
    "adapter.site_ranks": ({"adapter.site_ranks.south": "1", "aggregation.method": "fedsvd"}, "lora.r"),
    "training.objective.kind": ({"training.objective.kind": "dpo"}, "train.objectives"),
    "training.objective.beta": ({**DPO, "training.objective.beta": "1e-3"}, "train.beta"),
    "training.objective.label_smoothing": (
        {**DPO, "training.objective.label_smoothing": "0.31"},
        "train.max_label_smoothing",
    ),
    "training.objective.desirable_weight": (
        {**KTO, "training.objective.desirable_weight": "1e-2"},
        "train.answer_weights",
    ),
    "training.objective.undesirable_weight": (
        {**KTO, "training.objective.undesirable_weight": "100.0"},
        "train.answer_weights",
    ),
    "training.local_epochs": ({"training.local_epochs": "1e-3"}, "train.min_local_steps"),
    "training.local_steps": ({**STEPS, "training.local_steps": "51"}, "train.max_local_steps"),
    "training.batch_size": ({"training.batch_size": "3"}, "train.min_batch_size"),
    "training.learning_rate": ({"training.learning_rate": "9e-4"}, "train.learning_rate"),
    "training.schedule": ({**STEPS, "federation.num_rounds": "400"}, "train.learning_rate"),
    "training.final_rate_fraction": (
        {**STEPS, "federation.num_rounds": "400", "training.final_rate_fraction": "0.04"},
        "train.learning_rate",
    ),
    "training.warmup_fraction": ({"training.warmup_fraction": "0.21"}, "train.max_warmup_fraction"),
    "training.optimizer.kind": ({"training.optimizer.kind": "sgd"}, "train.optimizers"),
    "training.optimizer.weight_decay": ({"training.optimizer.weight_decay": "6.0"}, "train.max_pull"),
    "training.optimizer.beta1": ({"training.optimizer.beta1": "0.0"}, "train.adam_beta1"),
    "training.optimizer.beta2": ({"training.optimizer.beta2": "0.0"}, "train.adam_beta2"),
    "training.optimizer.epsilon": ({"training.optimizer.epsilon": "1.0"}, "train.max_adam_epsilon"),
    "training.optimizer.momentum": ({**SGD, "training.optimizer.momentum": "0.999"}, "train.max_momentum"),
    "training.max_grad_norm": ({"training.max_grad_norm": "1e-6"}, "train.min_grad_norm"),
    "aggregation.method": ({"aggregation.method": "ffa"}, "train.methods"),
    "aggregation.proximal": ({"aggregation.proximal": "6.0"}, "train.max_pull"),
}
# judged by the tensors themselves or by bytes, in tests/unit/client/policy/test_rules.py and test_kinds.py
ELSEWHERE = {
    "adapter.targets",
    "adapter.num_virtual_tokens",
    "aggregation.residual_rank",
    "aggregation.num_heads",
    "wire.max_update_mib",
}
# refused by the default list alone
NARROW = {"training.objective.kind": "objectives", "training.optimizer.kind": "optimizers"}


def site_policy(setting: str = "") -> file.Policy:
    wide = dict(WIDE)
    if name := NARROW.get(setting):
        wide["max_rounds"] = "\n".join(line for line in wide["max_rounds"].split("\n") if not line.startswith(name))
    return file.parse(vault.policy_text(BASE, **wide), name="policy.toml")


def judge(rules: file.Policy, changes: dict[str, str]) -> None:
    """What a site judges before it reads rows, and then what it judges by their number."""
    manifest = RunManifest(tiny.settings("tiny", changes), BASE, SPECS)
    policy.check(rules, manifest, Usage(), site="north")
    dataset = file.DatasetRules(path="rows.jsonl", columns=("output",), max_rows=100)
    num_steps = schedule.num_local_steps(40, manifest.run.training)
    head = OpenedHead(
        "north", BASE, num_examples=40, num_held_out=9, num_truncated=0, num_dropped=0, num_steps=num_steps
    )
    num_rounds = manifest.run.federation.num_rounds
    policy.check_opened(rules, dataset, head, manifest.run.training, num_rounds=num_rounds)


def test_every_setting_that_shapes_an_update_is_judged_or_was_found_harmless():
    found = {key for key in shape.keys_of(config.RunConfig) if key.split(".")[0] in SECTIONS}
    assert found == policy.JUDGED.keys() | policy.HARMLESS.keys()
    assert not policy.JUDGED.keys() & policy.HARMLESS.keys()
    assert policy.JUDGED.keys() == REFUSED.keys() | ELSEWHERE
    assert all(len(reason) > 10 for reason in policy.HARMLESS.values())


def test_every_rule_that_is_named_stands_in_the_policy():
    for rule in {*policy.JUDGED.values(), *(rule for _, rule in REFUSED.values())}:
        functools.reduce(getattr, rule.split("."), site_policy())


@pytest.mark.parametrize("setting", REFUSED)
def test_a_value_outside_the_safe_range_is_refused_by_its_rule(setting):
    changes, rule = REFUSED[setting]
    with pytest.raises(PolicyRefusedError) as caught:
        judge(site_policy(setting), changes)
    assert caught.value.rule == rule


def test_control_the_same_policy_lets_the_plain_run_and_safe_values_pass():
    judge(site_policy(), {})
    judge(site_policy(), {**DPO, "training.objective.beta": "0.1"})
    judge(site_policy(), {**KTO, "training.objective.desirable_weight": "2.0"})
    judge(site_policy(), {**SGD, "training.optimizer.momentum": "0.9"})
    within = {"weight_decay": "0.1", "beta1": "0.5", "epsilon": "1e-7"}
    judge(site_policy(), {f"training.optimizer.{key}": value for key, value in within.items()})
    judge(site_policy(), {"training.max_grad_norm": "0.0"})


def test_the_rate_of_each_round_counts_and_not_the_peak_alone():
    """Cosine over 400 rounds from 2e-2: the last has a mean rate of 1.2e-7, and 1e-3 is the floor."""
    many = {**STEPS, "federation.num_rounds": "400"}
    with pytest.raises(
        PolicyRefusedError, match=r"round 400 of 400 trains at a mean rate of 1\.2e-07, .*final_rate_frac"
    ):
        judge(site_policy(), many)
    judge(site_policy(), {**many, "training.final_rate_fraction": "0.06"})
    judge(site_policy(), {**many, "training.schedule": "constant"})
    judge(site_policy(), {**many, "training.schedule": "linear", "training.final_rate_fraction": "0.06"})
    slow = {**many, "training.schedule": "constant", "training.warmup_fraction": "0.2"}
    with pytest.raises(PolicyRefusedError, match=r"round 1 of 400 trains at a mean rate of"):
        judge(site_policy(), slow)


def similarity(engine, training: config.TrainingConfig) -> float:
    """Cosine between a round's update and the plain gradient of all rows, which is what an attacker inverts."""
    rows = tiny.site_data("north", 12).train
    encoded = _encoded(engine, rows)
    adapter.write(engine.model, engine.initial)
    engine.model.train()
    loop.mean_gradient(engine, encoded, micro_batch_size=len(rows))
    raw = {name: -p.grad.clone() for name, p in adapter.parameters(engine.model).items() if p.grad is not None}
    engine.model.zero_grad()
    none = tiny.settings("tiny").privacy
    shared = {"privacy": none, "round_index": 0, "num_rounds": 1, "seed": 1, "source": SeededNoise(1)}
    loop.train(engine, encoded, training=training, **shared)
    moved = {name: p.detach() - engine.initial[name] for name, p in adapter.parameters(engine.model).items()}
    vectors = [torch.cat([part[name].flatten() for name in raw]) for part in (raw, moved)]
    return float(torch.nn.functional.cosine_similarity(*vectors, dim=0))


def _encoded(engine, rows):
    from common.model import base

    encoded, _ = base.encode(engine, rows, tiny.settings("tiny").data)
    return encoded


def test_a12_settings_that_make_an_update_the_raw_gradient(engine):
    """Epsilon far above the gradients and no memory: cosine above 0.99. What a policy allows is far from it."""
    raw = {"training.optimizer.epsilon": "1.0", "training.optimizer.beta1": "0.0", "training.optimizer.beta2": "0.0"}
    whole = {**STEPS, "training.batch_size": "9", "training.local_steps": "5", "training.learning_rate": "1e-2"}
    attack = {**whole, **raw}
    assert similarity(engine, tiny.settings("tiny", attack).training) > 0.99
    limits = {
        "training.optimizer.epsilon": "1e-7",
        "training.optimizer.beta1": "0.5",
        "training.optimizer.beta2": "0.9",
    }
    assert similarity(engine, tiny.settings("tiny", {**whole, **limits}).training) < 0.9
    judge(site_policy(), {**whole, **limits})
    with pytest.raises(PolicyRefusedError):
        judge(site_policy(), attack)


def test_a12_control_a_site_without_a_guard_opens_such_a_run(site):
    raw = {
        "training__optimizer__epsilon": "1.0",
        "training__optimizer__beta1": "0.0",
        "training__optimizer__beta2": "0.0",
    }
    asked = site.offer(site.manifest(**raw)).to_frame()
    site.approve(site.manifest(**raw))
    assert site.refused(site.ask(asked)) == ("PolicyRefusedError", "train.adam_beta1")
    site.agent._guard = Permissive()
    assert site.ask(asked).kind == "opened"
