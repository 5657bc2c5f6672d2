"""Likelihoods, and tasks that rest on them, against lm-evaluation-harness' own model on the same weights."""

import json
import math

import jinja2
import pytest

from common.adapter import adapter
from common.data.rows import Message, Row
from common.errors import DataError
from server.evaluate import suite
from server.evaluate.figures import likelihood
from server.evaluate.tasks import answers, harness, harness_yaml
from server.evaluate.tasks import choice as task_choice
from tests import tiny

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
"""
CHOICE = r"""
output_type: multiple_choice
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
TEXT = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
ANSWER = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{wanted}}"
generation_kwargs: {until: ["Z"], do_sample: false, max_gen_toks: 5}
metric_list:
  - metric: exact_match
"""
QUESTIONS = [
    {"question": f"north sees {tiny.WORDS[n]} {n}?", "choices": [tiny.WORDS[(n + k) % 12] * (1 + k) for k in range(3)]}
    for n in range(12)
]
TEXTS = [("knee burn " * (5 + 40 * (n % 3))) + tiny.WORDS[n] for n in range(6)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(shared_engine):
    """The engine with an adapter that does something."""
    import torch

    torch.manual_seed(1)
    start = shared_engine.initial
    adapter.write(shared_engine.model, {name: t + 0.05 * torch.randn_like(t) for name, t in start.items()})
    yield shared_engine
    adapter.write(shared_engine.model, shared_engine.initial)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trained):
    """Files of rows and of harness tasks; half of the references are what the model writes."""
    found = tmp_path_factory.mktemp("tasks")
    write(found / "choices.jsonl", [{**row, "answer": n % 3} for n, row in enumerate(QUESTIONS)])
    write(found / "texts.jsonl", [{"text": text} for text in TEXTS])
    said = [model_says(trained, row["question"]) for row in QUESTIONS]
    wanted = [text if number % 2 else "x" for number, text in enumerate(said)]
    asked = [{"question": row["question"], "wanted": text} for row, text in zip(QUESTIONS, wanted, strict=True)]
    write(found / "asked.jsonl", asked)
    for name, file, rest in (("c", "choices", CHOICE), ("t", "texts", TEXT), ("a", "asked", ANSWER)):
        (found / f"{name}.yaml").write_text(TASK.format(name=name, file=f"{file}.jsonl") + rest)
    return found


def model_says(engine, text):
    from common.model import base

    return base.answer(engine, [likelihood.token_ids(engine, text)], max_new_tokens=5)[0].split("Z")[0]


@pytest.fixture(scope="module")
def theirs(folder, trained):
    """The harness' own figures, by its own model class."""
    pytest.importorskip("lm_eval")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = {"c": "choices", "t": "texts", "a": "asked"}
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    told = [
        {**manager.task_index[name].cfg, "dataset_kwargs": {"data_files": {"test": str(folder / f"{file}.jsonl")}}}
        for name, file in files.items()
    ]
    lm = HFLM(pretrained=trained.model, tokenizer=trained.tokenizer, batch_size=4, device="cpu")
    found = simple_evaluate(lm, tasks=told, task_manager=manager, bootstrap_iters=0)["results"]
    pairs = [(name, key.split(","), value) for name, figures in found.items() for key, value in figures.items()]
    return {f"{name}.{key[0]}": value for name, key, value in pairs if key[1:] == ["none"] and "stderr" not in key[0]}


def run_of(tiny_base, *tasks):
    tables = [", ".join(f"{key} = {json.dumps(value)}" for key, value in task.items()) for task in tasks]
    text = ", ".join(f"{{{table}}}" for table in tables)
    return tiny.settings(tiny_base, {"evaluation.tasks": f"[{text}]", "evaluation.batch_size": "5"})


def score(engine, tiny_base, task):
    run = run_of(tiny_base, task)
    return suite.LOADERS[task["kind"]](run.evaluation.tasks[0], run.data, run.evaluation).score(engine)


def test_multiple_choice_is_that_of_the_harness(theirs, trained, tiny_base, folder):
    found = score(trained, tiny_base, {"name": "c", "kind": "choice", "data": str(folder / "choices.jsonl")})
    assert found["acc"].value == pytest.approx(theirs["c.acc"], abs=1e-6)
    assert found["acc_norm"].value == pytest.approx(theirs["c.acc_norm"], abs=1e-6)
    assert 0 < theirs["c.acc"] < 1
    assert theirs["c.acc"] != theirs["c.acc_norm"]


def test_perplexity_is_that_of_the_harness_in_windows_too(theirs, trained, tiny_base, folder):
    assert max(len(likelihood.token_ids(trained, text)) for text in TEXTS) > likelihood.max_length_tokens(trained)
    found = score(trained, tiny_base, {"name": "t", "kind": "perplexity", "data": str(folder / "texts.jsonl")})
    assert found["word_perplexity"].value == pytest.approx(theirs["t.word_perplexity"], rel=1e-6)
    assert found["bits_per_byte"].value == pytest.approx(theirs["t.bits_per_byte"], rel=1e-6)


def test_the_harness_itself_runs_on_our_engine_with_the_same_figures(theirs, trained, tiny_base, folder):
    task = {"name": "h", "kind": "harness", "data": str(folder), "harness_tasks": ["c", "t", "a"]}
    found = score(trained, tiny_base, task)
    assert {name: scores.value for name, scores in found.items()} == pytest.approx(theirs, rel=1e-6)
    assert theirs["a.exact_match"] == 0.5
    assert [len(scores.rows) for scores in found.values()] == [12, 12, 6, 6, 12]


def test_harness_tasks_that_would_fetch_or_run_code_are_refused(trained, tiny_base, tmp_path, folder):
    write(tmp_path / "choices.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": 0}])
    task = {"name": "h", "kind": "harness", "data": str(tmp_path), "harness_tasks": ["c"]}
    good = TASK.format(name="c", file="choices.jsonl") + CHOICE
    wrong = {
        "nothing is fetched": good.replace("dataset_path: json", "dataset_path: org/name"),
        "one local file": good.replace("test: choices.jsonl", "test: https://example.org/choices.jsonl"),
        "runs code": good + "process_docs: !function utils.process\n",
        "no harness task c; there are d": good.replace("task: c", "task: d"),
        "cannot use it": good.replace("answer\n", "'{{1/0}}'\n"),
    }
    for message, text in wrong.items():
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(DataError, match=message):
            score(trained, tiny_base, task)
    (tmp_path / "c.yaml").write_text(good)  # control
    assert set(score(trained, tiny_base, task)) == {"c.acc", "c.acc_norm"}
    with pytest.raises(DataError, match="no such folder"):
        score(trained, tiny_base, {**task, "data": str(tmp_path / "none")})


HOSTILE = {
    "tag": ("process_docs: !function own.process\n", "plain YAML"),
    "tag, spelled out": ("process_docs: !<!function> own.process\n", "plain YAML"),
    "class": ("class: own.Task\n", "'class' runs code"),
    "python object": ("description: !!python/object/apply:os.system [touch RAN]\n", "plain YAML"),
    "include": ("include: other.yaml\n", "'include' runs code"),
    "unsafe": ("unsafe_code: true\n", "'unsafe_code' runs code"),
    "prompt": ("use_prompt: promptsource:all\n", "'use_prompt' runs code"),
    "results": ("process_results: own.results\n", "'process_results' runs code"),
    "few shots": ("fewshot_config: {sampler: own.Sampler}\n", "fewshot_config may have"),
    "filter": ("filter_list: [{name: f, filter: [{function: custom, filter_fn: own.f}]}]\n", "filter 'custom' is not"),
    "alias": ("metadata: {a: &a [1], b: [*a, *a]}\n", "plain YAML"),
    "metric": ("metric_list: [{metric: FOLDER/own}]\n", "is not one of the harness' own"),
    "metric of the hub": ("metric_list: [{metric: acc, hf_evaluate: true}]\n", "is not one of the harness' own"),
    "group": ("group: more\n", "'group' runs code"),
    "a date": ("metadata: {day: 2026-01-01}\n", "a value of type date"),
    "files elsewhere": ("dataset_kwargs: {data_files: {test: /etc/passwd}}\n", "one local file that is there, in"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_task_that_is_more_than_data_is_refused(tmp_path, attack):
    text, told = HOSTILE[attack]
    write(tmp_path / "choices.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": 0}])
    good = TASK.format(name="c", file="choices.jsonl") + CHOICE
    key = text.split(":")[0]
    rest = "\n".join(line for line in good.splitlines() if not line.startswith(key))
    if key in ("metric_list", "dataset_kwargs"):
        rest = good[: good.index(key)].rstrip()
    (tmp_path / "c.yaml").write_text(f"{rest}\n{text.replace('FOLDER', str(tmp_path))}")
    with pytest.raises(DataError, match=told):
        harness.plain_config(harness_yaml.tasks(tmp_path), "c", tmp_path)
    (tmp_path / "c.yaml").write_text(good)  # control
    assert harness.plain_config(harness_yaml.tasks(tmp_path), "c", tmp_path)["task"] == "c"


ESCAPE = (
    "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ question.__class__.__base__ }}",
    "{% set _ = choices.append('more') %}{{ question }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(question) }}",
)


def test_a_template_of_a_task_reaches_nothing_of_python(tmp_path):
    """Control: the environment that the harness makes for itself runs the command."""
    pytest.importorskip("lm_eval")
    from jinja2.exceptions import SecurityError, UndefinedError
    from lm_eval import utils

    row, ran = {"question": "q", "choices": ["a"]}, tmp_path / "ran"
    bare = jinja2.Environment(loader=jinja2.BaseLoader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    bare.from_string(ESCAPE[0].replace("RAN", str(ran))).render(**row)
    assert ran.exists()
    ran.unlink()
    harness_yaml.render_in_sandbox()
    for template in ESCAPE:
        with pytest.raises((SecurityError, UndefinedError)):
            utils.apply_template(template.replace("RAN", str(ran)), row)
    assert not ran.exists()
    assert utils.apply_template("{{ question }}-{{ choices | join }}\n", row) == "q-a\n"
    assert utils.apply_template("{{ question | regex_replace('q', 'p') }}", row) == "p"


def test_likelihoods_do_not_depend_on_the_batch_and_are_sums_of_log_probabilities(trained):
    texts = [(row["question"], f" {choice}") for row in QUESTIONS for choice in row["choices"]]
    pairs = [likelihood.encode_pair(trained, *pair) for pair in texts]
    one = likelihood.log_likelihoods(trained, pairs, batch_size=1)
    many = likelihood.log_likelihoods(trained, pairs, batch_size=7)
    assert [total for total, _ in many] == pytest.approx([total for total, _ in one], abs=1e-4)
    vocabulary = [(pairs[0][0], [token]) for token in range(len(trained.tokenizer))]
    every = likelihood.log_likelihoods(trained, vocabulary, batch_size=64)
    assert math.fsum(math.exp(total) for total, _ in every) == pytest.approx(1.0, abs=1e-5)


def test_a_text_that_is_too_long_or_empty_is_refused(trained):
    limit = likelihood.max_length_tokens(trained)
    assert likelihood.log_likelihoods(trained, [([1] * limit, [2])], batch_size=1)
    for pair in (([1] * limit, [2, 3]), ([], [1]), ([1], [])):
        with pytest.raises(DataError, match="shorten the row or remove it"):
            likelihood.log_likelihoods(trained, [pair], batch_size=1)


def test_windows_predict_each_token_once():
    for size in (1, 4, 5, 9, 12, 13):
        cut = list(likelihood.windows(range(1, size + 1), prefix_id=0, limit=4))
        assert [token for _, following in cut for token in following] == list(range(1, size + 1))
        assert all(context and len(context) + len(following) <= 5 for context, following in cut)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "choices": ["a"], "answer": 0},
        {"question": "q", "choices": ["a", ""], "answer": 0},
        {"question": "q", "choices": ["a", "b"], "answer": 2},
        {"question": "q", "choices": ["a", "b"], "answer": True},
        {"question": "", "choices": ["a", "b"], "answer": 0},
        {"choices": ["a", "b"], "answer": 0},
    ],
)
def test_rows_that_are_no_choices_are_refused(row):
    with pytest.raises(DataError, match="row 1: column"):
        task_choice.choice_of(row, where="x, row 1")


def test_a_baseline_puts_prompt_and_examples_before_each_question(trained, tiny_base, folder, tmp_path):
    examples = write(tmp_path / "examples.jsonl", [{**QUESTIONS[0], "answer": 1}] * 2)
    task = {"name": "c", "kind": "choice", "data": str(folder / "choices.jsonl"), "baseline_prompt": "Choose well."}
    run = run_of(tiny_base, {**task, "baseline_examples": 2, "baseline_data": str(examples)})
    found = suite.LOADERS["choice"](run.evaluation.tasks[0], run.data, run.evaluation)
    rows = [task_choice.choice_of({**row, "answer": n % 3}, where="") for n, row in enumerate(QUESTIONS)]
    solved = task_choice.solved(task_choice.choice_of({**QUESTIONS[0], "answer": 1}, where=""))
    shown = task_choice.score(trained, rows, batch_size=5, before=f"Choose well.\n\n{solved}\n\n{solved}\n\n")
    assert found.score_baseline(trained) == shown
    row = Row((Message("system", "own"), Message("user", "q"), Message("assistant", "a")), unit="", row_id="r")
    asked = answers.with_prompt(row, "Be brief.", [row])
    assert [(m.role, m.content) for m in asked.messages] == [
        ("system", "Be brief.\n\nown"), ("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "a"),
    ]  # fmt: skip
    short = {**task, "baseline_examples": 3, "baseline_data": str(examples)}
    with pytest.raises(DataError, match="2 rows, and task c asks for baseline_examples = 3"):
        score(trained, tiny_base, short)
