"""Guards that `tests.mutations` switches off: what a mutation is, and the rules of a site's policy."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

Row = tuple[str, str, str, str | None, tuple[str, ...]]


@dataclass(frozen=True)
class Mutation:
    """One guard.

    Attributes:
        name: What the command calls it.
        file: Path in the tree.
        before: Text that occurs in the file exactly once.
        after: What takes its place.
        loses: What is possible then.
        tests: The fewest that notice, as pytest names them; quick ones.
    """

    name: str
    file: str
    before: str
    after: str
    loses: str
    tests: tuple[str, ...]

    def applied_to(self, text: str) -> str:
        """The file with the guard off.

        Raises:
            ValueError: The text to be changed is not there exactly once, or stays as it is.
        """
        if text.count(self.before) != 1 or self.before == self.after:
            times = text.count(self.before)
            raise ValueError(f"{self.name}: its text is in {self.file} {times} times, or stays as it is")
        return text.replace(self.before, self.after)


def guards(file: str, *rows: Row) -> Iterator[Mutation]:
    """The guards of one file.

    Args:
        file: Path in the tree.
        rows: Name, what is possible without it, its text, the text with the guard off, and its tests (`FILE::TEST`,
            without `tests/` and `.py`). Off is None for `if False:` in the place of a condition, `pass` of a statement.
    """
    for name, loses, before, after, tests in rows:
        off = "if False:" if before.startswith("if ") and before.endswith(":") else "pass"
        named = tuple(f"tests/{test.replace('::', '.py::', 1)}" for test in tests)
        yield Mutation(name, file, before, off if after is None else after, loses, named)


# fmt: off
POLICY: Final = (
*guards("client/policy/rules.py",
    ("policy-adapter.kinds", "a run beyond `adapter.kinds` is opened",
     'judge("adapter.kinds", adapter.kind)', None,
     ("unit/client/policy/test_kinds::test_lora_itself_is_refused_where_it_is_not_listed",)),
    ("policy-lora.r", "a run beyond `lora.r` is opened",
     'judge("lora.r", rank)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[adapter.r]",
      "attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[adapter.site_ranks]")),
    ("policy-lora.alpha", "a run beyond `lora.alpha` is opened",
     'judge("lora.alpha", adapter.alpha)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[adapter.alpha]",)),
    ("policy-lora.scale", "a run beyond `lora.scale` is opened",
     'judge("lora.scale", adapter.scale)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[adapter.use_rslora]",)),
    ("policy-lora.max_dropout", "a run beyond `lora.max_dropout` is opened",
     'judge("lora.max_dropout", adapter.dropout)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[adapter.dropout]",)),
    ("policy-train.learning_rate", "a run beyond `train.learning_rate` is opened",
     'judge("train.learning_rate", training.learning_rate)', None,
     ("unit/client/policy/test_rules::test_a_refusal_names_rule_value_and_limit",)),
    ("policy-train.learning_rate-of-each-round", "a run beyond `train.learning_rate of each round` is opened",
     '_require(rate >= lowest, "train.learning_rate", slow)', None,
     ("attacks/agent/test_floors::test_the_rate_of_each_round_counts_and_not_the_peak_alone",
      "attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.schedule]")),
    ("policy-train.optimizers", "a run beyond `train.optimizers` is opened",
     'judge("train.optimizers", training.optimizer.kind)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.optimizer.kind]",)),
    ("policy-train.objectives", "a run beyond `train.objectives` is opened",
     'judge("train.objectives", training.objective.kind)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.objective.kind]",)),
    ("policy-train.methods", "a run beyond `train.methods` is opened",
     'judge("train.methods", run.aggregation.method)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[aggregation.method]",)),
    ("policy-train.min_batch_size", "a run beyond `train.min_batch_size` is opened",
     'judge("train.min_batch_size", training.batch_size)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.batch_size]",)),
    ("policy-train.min_local_steps", "a run beyond `train.min_local_steps` is opened",
     '_judge(policy, "train.min_local_steps", num_steps)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.local_epochs]",)),
    ("policy-train.max_local_steps", "a run beyond `train.max_local_steps` is opened",
     '_judge(policy, "train.max_local_steps", num_steps)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.local_steps]",)),
    ("policy-train.local_steps-before-rows-are-read", "a run beyond `train.local_steps before rows are read` is opened",
     "_check_num_steps(policy, training, training.local_steps, num_rounds=run.federation.num_rounds)", None,
     ("unit/client/policy/test_rules::test_steps_that_a_run_names_are_judged_before_a_row_is_read",)),
    ("policy-train.local_steps-by-the-sites-rows", "a run beyond `train.local_steps by the site's rows` is opened",
     "_check_num_steps(policy, training, head.num_steps, num_rounds=num_rounds)", None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.local_epochs]",)),
    ("policy-train.max_warmup_fraction", "a run beyond `train.max_warmup_fraction` is opened",
     'judge("train.max_warmup_fraction", training.warmup_fraction)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.warmup_fraction]",)),
    ("policy-train.max_pull", "a run beyond `train.max_pull` is opened",
     'judge("train.max_pull", (run.aggregation.proximal + training.optimizer.weight_decay) * training.learning_rate)',
     None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.optimizer.weight_decay]",
      "attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[aggregation.proximal]")),
    ("policy-train.adam_beta1", "a run beyond `train.adam_beta1` is opened",
     'judge("train.adam_beta1", training.optimizer.beta1)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.optimizer.beta1]",)),
    ("policy-train.adam_beta2", "a run beyond `train.adam_beta2` is opened",
     'judge("train.adam_beta2", training.optimizer.beta2)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.optimizer.beta2]",)),
    ("policy-train.max_adam_epsilon", "a run beyond `train.max_adam_epsilon` is opened",
     'judge("train.max_adam_epsilon", training.optimizer.epsilon)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.optimizer.epsilon]",)),
    ("policy-train.max_momentum", "a run beyond `train.max_momentum` is opened",
     'judge("train.max_momentum", training.optimizer.momentum)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.optimizer.momentum]",)),
    ("policy-train.min_grad_norm", "a run beyond `train.min_grad_norm` is opened",
     'judge("train.min_grad_norm", training.max_grad_norm)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.max_grad_norm]",)),
    ("policy-train.beta", "a run beyond `train.beta` is opened",
     'judge("train.beta", training.objective.beta)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.objective.beta]",)),
    ("policy-train.max_label_smoothing", "a run beyond `train.max_label_smoothing` is opened",
     'judge("train.max_label_smoothing", training.objective.label_smoothing)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.objective.label_smoothing]",)),
    ("policy-train.answer_weights", "a run beyond `train.answer_weights` is opened",
     'judge("train.answer_weights", weight)', None,
     ("attacks/agent/test_floors::test_a_value_outside_the_safe_range_is_refused_by_its_rule[training.objective.desirable_weight]",)),
    ("policy-train.max_rounds-with-polish", "a run beyond `train.max_rounds with polish` is opened",
     '_require(is_within, "train.max_rounds", f"{together} {policy.train.max_rounds}")', None,
     ("attacks/agent/test_agent::test_a12_training_that_reads_single_gradients[changes6-train.max_rounds]",)),
    ("policy-train.max_length_tokens", "a run beyond `train.max_length_tokens` is opened",
     'judge("train.max_length_tokens", run.data.max_length_tokens)', None,
     ("attacks/agent/test_agent::test_a12_training_that_reads_single_gradients[changes7-train.max_length_tokens]",)),
    ("policy-train.min_records", "a run beyond `train.min_records` is opened",
     '_judge(policy, "train.min_records", head.num_examples)', None,
     ("attacks/agent/test_agent::test_a12_too_few_records_or_steps_at_this_site[min_records-10]",)),
    ("policy-data.datasets.max_rows", "a run beyond `data.datasets.max_rows` is opened",
     '_judge(policy, "data.datasets.max_rows", num_rows, limit=dataset.max_rows)', None,
     ("unit/client/policy/test_rules::test_more_rows_than_may_be_read_are_refused",)),
    ("policy-data.datasets-of-held-out-rows", "a run beyond `data.datasets of held-out rows` is opened",
     '_require(data.held_out_path in listed, "data.datasets", f"{data.held_out_path} is not listed")', None,
     ("unit/client/policy/test_rules::test_a_site_reads_listed_rows_and_columns_only",)),
    ("policy-data.datasets.columns-of-a-site", "a run beyond `data.datasets.columns of a site` is opened",
     "_require(not extra, \"data.datasets.columns\", f\"{', '.join(extra)} not listed for {data.path}\")", None,
     ("unit/client/policy/test_rules::test_a_site_reads_listed_rows_and_columns_only",)),
    ("policy-data.datasets.columns-of-an-objective", "a run beyond `data.datasets.columns of an objective` is opened",
     '_require(not extra, "data.datasets.columns", reads)', None,
     ("unit/client/policy/test_rules::test_the_columns_of_preferences_must_be_listed_too",)),
    ("policy-data.system_prompts", "a run beyond `data.system_prompts` is opened",
     '_require(is_listed, "data.system_prompts", f"{len(prompt)} characters that are not listed")', None,
     ("attacks/agent/test_agent::test_a22_text_and_template_of_the_server",)),
    ("policy-models.allow.quantization", "a run beyond `models.allow.quantization` is opened",
     'judge("models.allow.quantization", model.quantization, limit=base.quantization)', None,
     ("attacks/agent/test_codes::test_a_policy_judges_the_precision_of_its_own_site",)),
    ("policy-models.allow.chat_template", "a run beyond `models.allow.chat_template` is opened",
     'judge("models.allow.chat_template", model.chat_template, limit=base.chat_template)', None,
     ("attacks/agent/test_agent::test_a22_text_and_template_of_the_server",)),
    ("policy-lora.targets-of-nothing", "a run beyond `lora.targets of nothing` is opened",
     '_require(bool(specs), "lora.targets", "the run trains nothing")', None,
     ("unit/client/policy/test_rules::test_a_run_that_trains_nothing_is_refused",)),
    ("policy-lora.targets", "a run beyond `lora.targets` is opened",
     '_require(is_allowed, "lora.targets", f"{shown(module, limit=200)} is not one of them")', None,
     ("attacks/agent/test_agent::test_a11_target_that_lists_tokens_or_is_not_allowed[base_model.model.lm_head.lora_"
      "A.weight]",
      "unit/client/policy/test_kinds::test_anything_else_is_refused_by_its_rule")),
    ("policy-lora.r-of-tensors", "a run beyond `lora.r of tensors` is opened",
     '_judge(policy, rule, rank, limit=limits)', None,
     ("attacks/agent/test_agent::test_a11_rank_out_of_range",)),
    ("policy-adapter.kinds-of-tensors", "a run beyond `adapter.kinds of tensors` is opened",
     "_require(kinds.belongs(kind, spec.name), \"adapter.kinds\", f\"{name} is no tensor of kind '{kind}'\")", None,
     ("unit/client/policy/test_kinds::test_anything_else_is_refused_by_its_rule",)),
    ("policy-adapter.max_parameters", "a run beyond `adapter.max_parameters` is opened",
     'judge("adapter.max_parameters", trainable.num_values(specs))', None,
     ("unit/client/policy/test_kinds::test_anything_else_is_refused_by_its_rule",
      "unit/client/policy/test_kinds::test_virtual_tokens_touch_no_layer_and_are_bounded_by_their_size")),
    ("policy-privacy.min_noise_multiplier", "a run beyond `privacy.min_noise_multiplier` is opened",
     'judge("privacy.min_noise_multiplier", privacy.noise_multiplier)', None,
     ("unit/client/policy/test_rules::test_noise_for_whole_sites_is_held_to_the_limits_of_privacy_and_to_the_cohort",)),
    ("policy-privacy.max_clip_norm", "a run beyond `privacy.max_clip_norm` is opened",
     'judge("privacy.max_clip_norm", privacy.clip_norm)', None,
     ("unit/client/policy/test_rules::test_noise_for_whole_sites_is_held_to_the_limits_of_privacy_and_to_the_cohort",)),
    ("policy-privacy.dp_delta", "a run beyond `privacy.dp_delta` is opened",
     'judge("privacy.dp_delta", privacy.dp_delta)', None,
     ("attacks/agent/test_privacy::test_a06_a_delta_above_the_sites",)),
    ("policy-privacy.max_epsilon", "a run beyond `privacy.max_epsilon` is opened",
     'judge("privacy.max_epsilon", planned)', None,
     ("attacks/agent/test_privacy::test_a06_a_plan_above_the_sites_epsilon",)),
    ("policy-cohort.min_sites", "a run beyond `cohort.min_sites` is opened",
     'judge("cohort.min_sites", run.federation.min_sites)', None,
     ("attacks/agent/test_agent::test_a08_cohort_below_the_minimum[changes0]",)),
    ("policy-cohort.min_sites-of-drawn-sites", "a run beyond `cohort.min_sites of drawn sites` is opened",
     'judge("cohort.min_sites", site_level.num_expected(run))', None,
     ("unit/client/policy/test_rules::test_noise_for_whole_sites_is_held_to_the_limits_of_privacy_and_to_the_cohort",)),
    ("policy-cohort.min_sites-of-the-roster", "a run beyond `cohort.min_sites of the roster` is opened",
     '_judge(policy, "cohort.min_sites", num_sites)', None,
     ("attacks/test_roster::test_a08_federation_with_fewer_sites_than_an_aggregate_must_come_from",)),
    ("policy-evaluation.min_slice-of-answers", "a run beyond `evaluation.min_slice of answers` is opened",
     'judge("evaluation.min_slice", run.evaluation.exact_match_rows)', None,
     ("unit/client/policy/test_rules::test_rows_that_are_answered_have_a_floor",)),
    ("policy-egress.metrics-that-are-listed", "a run beyond `egress.metrics that are listed` is opened",
     '_require(is_listed, "egress.metrics", f"{kind} would report {name}, which is not listed")', None,
     ("attacks/agent/test_rounds::test_a20_figure_that_the_policy_does_not_list",)),
    ("policy-egress.max_bytes_per_message-that-is-declared",
     "a run beyond `egress.max_bytes_per_message that is declared` is opened",
     'judge("egress.max_bytes_per_message", declared.bytes_per_message)', None,
     ("attacks/agent/test_rounds::test_a14_bytes_that_the_manifest_announces",)),
    ("policy-egress.max_bytes_per_run-that-is-declared",
     "a run beyond `egress.max_bytes_per_run that is declared` is opened",
     'judge("egress.max_bytes_per_run", max(run_manifest.plan.bytes_per_run, usage.bytes_of_run))', None,
     ("attacks/agent/test_rounds::test_a14_bytes_that_the_manifest_announces",)),
    ("policy-runs.max_per_day", "a run beyond `runs.max_per_day` is opened",
     'judge("runs.max_per_day", usage.num_runs_today + 1)', None,
     ("unit/client/policy/test_rules::test_runs_of_the_day_are_counted",)),
    ("policy-settings-without-a-rule", "a run beyond `settings without a rule` is opened",
     "_require(not unknown, \"manifest\", f\"no rule judges {', '.join(unknown)}\")", None,
     ("attacks/agent/test_agent::test_a04_setting_that_no_rule_judges",)),
    ("policy-operators-of-the-roster", "a run beyond `operators of the roster` is opened",
     '_require(not operators or made.signer in operators, "roster", stranger)', None,
     ("attacks/test_roster::test_a02_operator_who_left_the_roster_but_not_the_policy",)),
    ("policy-federation.operators", "a run beyond `federation.operators` is opened",
     '_require(made.signer in (listed or operators), "federation.operators", stranger)', None,
     ("attacks/agent/test_agent::test_a02_manifest_signed_by_a_stranger_or_for_another_federation",)),
    ("policy-federation.id", "an offer for another federation is taken",
     "made.federation == policy.federation.id,",
     "True,",
     ("attacks/agent/test_agent::test_a02_manifest_signed_by_a_stranger_or_for_another_federation",)),
    ("policy-federation.not_after", "an old offer is taken",
     'now <= made.not_after, "federation.not_after"',
     'True, "federation.not_after"',
     ("attacks/agent/test_agent::test_a02_manifest_past_its_date",)),
    ("policy-offer-life", "an offer holds for ever",
     "made.not_after - now <= manifest.MAX_OFFER_S",
     "True",
     ("attacks/agent/test_agent::test_a02_offer_for_a_hundred_years",)),
    ("policy-models.allow", "any base is trained",
     "for base in policy.models.allow if base.sha256 == run_manifest.base_sha256",
     "for base in policy.models.allow",
     ("attacks/agent/test_agent::test_a10_base_that_is_not_listed",)),
    ("policy-forbidden-targets", "a layer within an embedding is trained",
     "is_allowed = (is_norm or parts[-1] in policy.lora.targets) and not set(parts) & set(FORBIDDEN)",
     "is_allowed = is_norm or parts[-1] in policy.lora.targets",
     ("attacks/agent/test_agent::test_a11_target_that_lists_tokens_or_is_not_allowed[base_model.model.model.embed_t"
      "okens.q_proj.lora_A.weight]",)),
    ("policy-privacy.mode", "a run without privacy is opened where it is required",
     'protection.mode == "none" or privacy.mode != "none",',
     "True,",
     ("attacks/agent/test_privacy::test_a07_a_run_without_privacy",)),
    ("policy-privacy.site_level", "noise for whole sites passes for noise for units",
     "or privacy.noise_at in protection.site_level,",
     "or True,",
     ("unit/client/policy/test_rules::test_noise_for_whole_sites_satisfies_a_site_that_requires_privacy_only_where_"
      "its_policy_says_so",)),
    ("policy-privacy.secagg", "a run without secure aggregation is opened where it is required",
     '_require(protection.secagg == "none", "privacy.secagg"',
     '_require(True, "privacy.secagg"',
     ("attacks/agent/test_agent::test_a07_run_without_the_protection_that_the_site_requires[secagg]",)),
    ("policy-plan-of-figures", "what counts and held-out figures cost is not in the plan",
     "dp_delta=protection.dp_delta, beside=[*chain(*released.values())])", "dp_delta=protection.dp_delta)",
     ("attacks/agent/test_oracle::test_a29_what_evaluations_and_counts_cost_is_in_the_plan_and_refused_beyond_the_budget",)),
    ("policy-own-delta", "a plan is judged at another delta than the site's",
     "planned = cost.epsilon(run, dp_delta=protection.dp_delta,",
     "planned = cost.epsilon(run, dp_delta=0.01,",
     ("attacks/agent/test_privacy::test_a06_a_plan_above_the_sites_epsilon",)),
),
*guards("client/policy/file.py",
    ("policy-signature", "an edited policy holds",
     "identity.verify(signer, signature, data, purpose=PURPOSE)", None,
     ("attacks/agent/test_rounds::test_a26_policy_that_was_edited_without_a_signature",)),
),
*guards("client/agent/gatekeeper.py",
    ("policy-serial", "an old policy is brought back",
     "if serial < last or (serial == last and signed_policy.sha256 != history.policy_sha256):", None,
     ("attacks/agent/test_rounds::test_a26_older_policy_restored",)),
),
)
