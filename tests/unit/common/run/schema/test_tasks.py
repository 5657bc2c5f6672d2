"""Tables of the evaluation suite: settings of secrets, personal data and judges, and where rows may be sent."""

import pytest

from common.errors import ConfigError
from common.run import config

MINIMAL = 'version = 1\n[model]\nbase = "embedded"\n[privacy]\nmode = "none"\n'


def problems(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, name="run.toml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("kind = 'memorisation', members_data = 'm.jsonl'", "members_data and non_members_data belong together"),
        ("kind = 'choice', num_candidates = 64", 'num_candidates  has no effect with kind = "choice"'),
        (
            "kind = 'json', json_schema = 's', names_file = 'n.txt'",
            'with kind = "json"; remove it, or set evaluation.tasks.1.kind to "pii"',
        ),
        ("kind = 'json', json_schema = 's', phone_regions = ['DE']", "phone_regions  has no effect"),
        ("kind = 'pii', phone_regions = ['Germany']", "a country as two capitals"),
        ("kind = 'judge'", "set one of judge_base and judge_url"),
        ("kind = 'judge', judge_base = 'b', judge_url = 'http://127.0.0.1:1'", "set one of judge_base and judge_url"),
        ("kind = 'judge', judge_url = 'http://127.0.0.1:1'", "judge_url and judge_model belong together"),
        ("kind = 'judge', judge_base = 'b', judge_key_file = 'k'", "judge_key_file is for judge_url"),
        ("kind = 'judge', judge_model = 'm', judge_url = 'https://judge.example/v1'", "set allow_remote = true"),
        ("kind = 'judge', judge_model = 'm', judge_url = 'https://127.0.0.1.example.org/v1'", "is another machine"),
        ("kind = 'judge', judge_model = 'm', judge_url = 'file:///etc'", "give http(s)://HOST"),
        ("kind = 'judge', judge_model = 'm', judge_url = 'http://j.example', allow_remote = true", "only by https"),
        ("kind = 'judge', judge_model = 'm', judge_url = 'http://[::1]:1', allow_remote = true", "has no effect"),
        ("kind = 'judge', judge_base = 'b', against = 'prompt-only'", "a baseline_prompt belong together"),
        ("kind = 'judge', judge_base = 'b', baseline_prompt = 'p'", "a baseline_prompt belong together"),
        ("kind = 'judge', judge_base = 'b', min_agreement = 0.9", "min_agreement is for calibration_data"),
    ],
)
def test_settings_of_secrets_names_and_judges_fit_together(task: str, message: str):
    text = f"evaluation.tasks = [{{name = 'a', data = 'rows.jsonl', {task}}}]\n"
    assert message in problems(f"{text}{MINIMAL}")


@pytest.mark.parametrize(
    "task",
    [
        "kind = 'judge', judge_base = 'b', calibration_data = 'p.jsonl', min_agreement = 0.9",
        "kind = 'judge', judge_model = 'm', judge_url = 'http://[::1]:8000/v1', judge_key_file = 'k'",
        "kind = 'judge', judge_model = 'm', judge_url = 'https://judge.example/v1', allow_remote = true",
        "kind = 'judge', judge_base = 'b', against = 'prompt-only', baseline_prompt = 'p'",
        "kind = 'memorisation', members_data = 'm', non_members_data = 'n', num_candidates = 64",
        "kind = 'pii', names_file = 'n.txt', phone_regions = ['DE', 'AT'], max_new_tokens = 64",
    ],
)
def test_settings_that_fit_together_are_taken(task: str):
    text = f"evaluation.tasks = [{{name = 'a', data = 'rows.jsonl', {task}}}]\n"
    [found] = config.parse(f"{text}{MINIMAL}", name="run.toml").evaluation.tasks
    assert found.kind == task.split("'")[1]
