"""What the loss covers: templates, mask, and what a template must not do."""

import traceback
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.data import read
from common.data.rows import Columns, Message, Row
from common.errors import DataError, ModelError
from common.text import prompts, templates

EMBEDDED_BASE = Path(__file__).parents[4] / "simulations" / "embedded" / "base"
CONTROL = ("<|im_start|>", "<|im_end|>")
CANARY = "Zyxwvut-4711"
# HuggingFaceTB/SmolLM2-135M-Instruct, tokenizer_config.json: it begins with a system message of its own.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same text with the answers marked for transformers' own mask, an oracle that shares no code with ours.
SMOLLM2_MARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CORPUS = ["the patient was treated with aspirin\n\n for two weeks, user assistant system 0123456789 [INST] [/INST]"] * 3


def make_tokenizer(
    template: str | None = SMOLLM2, *, is_trimmed: bool = False, specials: tuple[str, ...] = CONTROL
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 400 tokens whose pad token is its end token, as SmolLM2's is."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if is_trimmed:
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=specials[-1], pad_token=specials[-1])
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    "smollm2": make_tokenizer(),
    "chatml": prompts.use_template(make_tokenizer(None), "chatml"),
    "alpaca": prompts.use_template(make_tokenizer(None), "alpaca"),
    "trimmed offsets": make_tokenizer(is_trimmed=True),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def conversation(*contents: str, num_context: int = 0) -> Row:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], content) for i, content in enumerate(contents))
    return Row(messages, unit="p1", row_id="a.jsonl line 3", num_context=num_context)


def whole(row: Row, tokenizer, **options) -> prompts.Encoded:
    encoded = prompts.encode(row, tokenizer, max_length_tokens=10_000, too_long="error", **options)
    assert encoded is not None
    return encoded


def covered(encoded: prompts.Encoded, tokenizer) -> str:
    """The text that the loss covers."""
    ids = [i for i, is_answer in zip(encoded.input_ids, encoded.is_answer, strict=True) if is_answer]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def full_text(encoded: prompts.Encoded, tokenizer) -> str:
    return tokenizer.decode(encoded.input_ids, clean_up_tokenization_spaces=False)


def test_loss_covers_answer_and_end_token_and_nothing_else(tokenizer):
    encoded = whole(conversation("what was given?", "aspirin for\n\ntwo weeks"), tokenizer)
    assert covered(encoded, tokenizer) == "aspirin for\n\ntwo weeks<|im_end|>"
    assert full_text(encoded, tokenizer).rstrip().endswith("two weeks<|im_end|>")
    assert not encoded.is_answer[-1], "the white space after the end token is not learned"


def test_every_answer_of_a_conversation_is_covered(tokenizer):
    encoded = whole(conversation("one?", "first", "two?", "second"), tokenizer)
    assert covered(encoded, tokenizer) == "first<|im_end|>second<|im_end|>"


def test_answers_in_the_context_are_not_covered(tokenizer):
    row = conversation("one?", "first", "two?", "second", num_context=2)
    encoded = whole(row, tokenizer, system_prompt="Be brief.")
    assert covered(encoded, tokenizer) == "second<|im_end|>"
    assert "first" in full_text(encoded, tokenizer)


def test_mask_equals_the_one_of_transformers():
    tokenizer = TOKENIZERS["smollm2"]
    row = conversation("what was given?", "aspirin  \n for ä 💊", "and then?", " nothing ")
    encoded = whole(row, tokenizer)
    oracle = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in row.messages],
        chat_template=SMOLLM2_MARKED,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert list(encoded.input_ids) == oracle["input_ids"]
    assert list(encoded.is_answer) == [bool(x) for x in oracle["assistant_masks"]]


answers = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda text: text.strip() and not text[0].isspace() and "<|" not in text
)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(answers, min_size=1, max_size=3), name=st.sampled_from(sorted(TOKENIZERS)))
def test_covered_tokens_decode_to_the_answers_exactly(contents, name):
    tokenizer = TOKENIZERS[name]
    turns = [text for content in contents for text in ("and?", content)]
    encoded = whole(conversation(*turns), tokenizer)
    assert covered(encoded, tokenizer) == "".join(f"{content}<|im_end|>" for content in contents)


@settings(max_examples=40, deadline=None)
@given(content=answers, name=st.sampled_from(sorted(TOKENIZERS)))
def test_prompt_for_generation_is_what_precedes_the_answer_in_training(content, name):
    tokenizer = TOKENIZERS[name]
    encoded = whole(conversation("and?", content), tokenizer)
    ids, wanted = prompts.prompt_ids(conversation("and?", content), tokenizer)
    assert list(encoded.input_ids[: len(ids)]) == ids
    assert encoded.is_answer.index(True) == len(ids)
    assert wanted == content


def test_default_system_message_of_a_template_is_kept_and_ours_replaces_it():
    tokenizer = TOKENIZERS["smollm2"]
    row = conversation("and?", "yes")
    assert "named SmolLM" in full_text(whole(row, tokenizer), tokenizer)
    ours = full_text(whole(row, tokenizer, system_prompt="Be brief."), tokenizer)
    assert "Be brief." in ours
    assert "named SmolLM" not in ours


def test_a_rows_own_system_message_wins_over_the_runs():
    tokenizer = TOKENIZERS["chatml"]
    row = Row((Message("system", "own"), Message("user", "a?"), Message("assistant", "b")), unit="p1", row_id="row 1")
    text = full_text(whole(row, tokenizer, system_prompt="Be brief."), tokenizer)
    assert text.startswith("<|im_start|>system\nown<|im_end|>")
    assert "Be brief." not in text


def test_prompt_and_training_use_the_same_system_message():
    tokenizer = TOKENIZERS["chatml"]
    ids, _ = prompts.prompt_ids(conversation("a?", "b"), tokenizer, system_prompt="Be brief.")
    assert "Be brief." in tokenizer.decode(ids)


def test_a_leading_line_break_that_merges_with_the_template_is_left_out_and_the_rest_is_covered():
    core = Tokenizer(models.WordLevel({"[unk]": 0, "<|im_end|>": 1, "\n\n": 2, "a": 3, "\n": 4}, unk_token="[unk]"))
    core.pre_tokenizer = pre_tokenizers.Split("\n\n", "isolated")
    core.add_special_tokens(["<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", unk_token="[unk]")
    tokenizer.chat_template = templates.CHATML
    encoded = whole(conversation("q", "\na"), tokenizer)
    assert [i for i, is_answer in zip(encoded.input_ids, encoded.is_answer, strict=True) if is_answer] == [3, 1]


def test_space_of_the_template_is_not_covered_where_offsets_are_trimmed():
    template = templates.CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant: '").replace(
        "message['role'] + '\n'", "message['role'] + (': ' if message['role'] == 'assistant' else '\n')"
    )
    for is_trimmed in (False, True):
        tokenizer = make_tokenizer(template, is_trimmed=is_trimmed)
        assert covered(whole(conversation("a?", "\naspirin"), tokenizer), tokenizer) == "\naspirin<|im_end|>"


def test_end_marker_that_merges_with_what_follows_is_refused():
    core = Tokenizer(models.WordLevel({"[unk]": 0, "#\n": 1, "a": 2}, unk_token="[unk]"))
    core.pre_tokenizer = pre_tokenizers.Split("#\n", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[unk]")
    tokenizer.chat_template = templates.CHATML.replace("<|im_end|>", "#")
    with pytest.raises(ModelError, match="no token ends where an answer ends"):
        whole(conversation("q", "a"), tokenizer)


def test_template_with_spaces_around_the_answer():
    tokenizer = make_tokenizer(LLAMA2)
    encoded = whole(conversation("a?", "yes", "b?", "no"), tokenizer)
    assert covered(encoded, tokenizer) == " yes <|im_end|> no <|im_end|>"


@pytest.mark.skipif(not (EMBEDDED_BASE / "tokenizer.json").is_file(), reason="the embedded base is not built")
def test_embedded_base_covers_answer_and_end_token():
    tokenizer = prompts.use_template(AutoTokenizer.from_pretrained(EMBEDDED_BASE), "tokenizer")
    encoded = whole(conversation("What was given?", "Aspirin."), tokenizer)
    text = covered(encoded, tokenizer)
    assert text.startswith("Aspirin.")
    assert encoded.input_ids[max(i for i, is_answer in enumerate(encoded.is_answer) if is_answer)] in prompts.stop_ids(
        tokenizer
    )


def test_stop_ids_hold_end_of_turn_and_end_token():
    tokenizer = make_tokenizer(templates.CHATML, specials=("<|im_start|>", "<|im_end|>", "</s>"))
    assert prompts.stop_ids(tokenizer) == tuple(sorted(tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])))


BAD_TEMPLATES = {
    "no end token": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "leaves out": "{% for m in messages %}{% if m['role'] != 'system' %}"
    "{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}",
    "answers cannot be located": "{{ messages | length }}" + templates.CHATML,
    "refuses the roles": "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception(messages[1]['content']) }}{% endif %}" + templates.CHATML,
}


@pytest.mark.parametrize("what", BAD_TEMPLATES)
def test_template_that_cannot_be_trained_on_is_refused_with_a_remedy(what):
    tokenizer = make_tokenizer(BAD_TEMPLATES[what])
    row = conversation(CANARY, f"{CANARY}!")
    with pytest.raises(ModelError, match=what) as caught:
        whole(row, tokenizer, system_prompt="Be brief.")
    assert "a.jsonl line 3" in str(caught.value)
    assert "model.chat_template" in str(caught.value)
    assert CANARY not in "".join(traceback.format_exception(caught.value))
    assert caught.value.exit_code == 4


def test_remedy_names_a_template_that_the_tokenizer_can_have():
    bad = BAD_TEMPLATES["no end token"]
    for specials, name in ((CONTROL, "chatml"), (("</s>",), "alpaca")):
        with pytest.raises(ModelError, match=f'model.chat_template = "{name}"'):
            whole(conversation("a?", "b"), make_tokenizer(bad, specials=specials))


def test_tokenizer_without_a_template_is_refused():
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        prompts.use_template(make_tokenizer(None), "tokenizer")
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        whole(conversation("a?", "b"), make_tokenizer(None))


def test_chatml_needs_its_control_tokens():
    with pytest.raises(ModelError, match="alpaca"):
        prompts.use_template(make_tokenizer(None, specials=("</s>",)), "chatml")


def test_alpaca_needs_an_end_token():
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end token"):
        prompts.use_template(tokenizer, "alpaca")


def test_unknown_template_is_a_callers_mistake():
    with pytest.raises(ValueError, match="vicuna"):
        prompts.use_template(make_tokenizer(), "vicuna")


def test_start_token_is_kept_where_the_tokenizer_adds_one():
    tokenizer = make_tokenizer(None, specials=("<s>", "</s>"))
    tokenizer.bos_token = "<s>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    prompts.use_template(tokenizer, "alpaca")
    assert full_text(whole(conversation("a?", "b"), tokenizer), tokenizer).count("<s>") == 1


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False
        chat_template = templates.CHATML

        def apply_chat_template(self, messages, **options):
            return TOKENIZERS["chatml"].apply_chat_template(messages, **options)

    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        whole(conversation("a?", "b"), Slow())


def test_too_long_row_names_its_place_its_length_and_the_settings():
    tokenizer = TOKENIZERS["chatml"]
    length = len(whole(conversation("a?", CANARY), tokenizer).input_ids)
    with pytest.raises(DataError) as caught:
        prompts.encode(conversation("a?", CANARY), tokenizer, max_length_tokens=length - 1, too_long="error")
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert message.startswith(f"a.jsonl line 3: {length} tokens, over the limit of {length - 1}")
    assert "data.max_length_tokens" in message
    assert "data.too_long" in message
    assert CANARY not in message


def visit(num_words: int) -> Row:
    """An instruction, a long input whose words are numbered, and a note."""
    fields = {
        "instruction": "Write the note.",
        "input": " ".join(f"w{number}" for number in range(num_words)),
        "output": "The patient was treated with aspirin for two weeks.",
    }
    (row,) = read.to_rows([fields], Columns())
    return row


@pytest.mark.parametrize("limit", [150, 200, 301])
def test_the_middle_of_a_long_input_is_cut_and_instruction_and_answer_stay(limit):
    tokenizer, row = make_tokenizer(), visit(400)
    whole = prompts.encode_whole(row, tokenizer)
    found = prompts.encode(row, tokenizer, max_length_tokens=limit, too_long="truncate_input")
    text = tokenizer.decode(found.input_ids)
    assert limit - 16 <= len(found.input_ids) <= limit
    assert found.num_truncated >= len(whole.input_ids) - limit
    assert "user\nWrite the note.\n\nw0 w1 " in text
    assert " [...] " in text
    assert " w399<|im_end|>" in text
    assert tokenizer.decode([i for i, wanted in zip(found.input_ids, found.is_answer, strict=True) if wanted]) == (
        "The patient was treated with aspirin for two weeks.<|im_end|>"
    )
    head, tail = text.partition("note.\n\n")[2].partition("<|im_end|>")[0].split(" [...] ")
    assert {*head.split(), *tail.split()} <= {f"w{number}" for number in range(400)}  # no word is cut in two
    assert abs(len(tokenizer.tokenize(head)) - len(tokenizer.tokenize(tail))) <= 8  # as much of both
    at_right = prompts.encode(row, tokenizer, max_length_tokens=limit, too_long="truncate")
    assert at_right is None  # control: the answer is gone


def test_what_fits_is_left_alone_and_what_never_will_is_dropped():
    tokenizer, row = make_tokenizer(), visit(5)
    size = len(prompts.encode_whole(row, tokenizer).input_ids)
    assert prompts.shorten(row, tokenizer, max_length_tokens=size) is row
    assert prompts.encode(visit(400), tokenizer, max_length_tokens=40, too_long="truncate_input") is None
    (bare,) = read.to_rows([{"instruction": "word " * 300, "output": "Yes."}], Columns())
    assert prompts.encode(bare, tokenizer, max_length_tokens=100, too_long="truncate_input") is None  # no input


def test_the_longest_turn_of_a_conversation_is_cut():
    tokenizer = make_tokenizer()
    turns = [("user", "Hello?"), ("assistant", "Yes."), ("user", "word " * 300 + "Why?"), ("assistant", "So.")]
    row = Row(tuple(Message(*turn) for turn in turns), unit="", row_id="row 1")
    short = prompts.shorten(row, tokenizer, max_length_tokens=120)
    assert [message.content for message in short.messages][:2] == ["Hello?", "Yes."]
    assert short.messages[2].content.endswith("Why?")
    assert short.num_cut > 0
    assert len(prompts.encode_whole(short, tokenizer).input_ids) <= 120
