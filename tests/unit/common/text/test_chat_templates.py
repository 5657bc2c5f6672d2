"""Spans, prompts and ends of turns under templates that behave as those of well-known models do.

The templates here are written for these tests: each keeps the behaviour of one published template, named beside it,
that a plain ChatML does not have.
"""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from client.data import check
from common.data.rows import Message, Row
from common.errors import ModelError
from common.text import chat, prompts, spelling, templates

# Qwen/Qwen3-8B: the last answer gets a block for thoughts, an empty one if it has none; earlier answers lose theirs.
QWEN3 = (
    "{%- set ns = namespace(last=messages|length - 1, is_open=true) %}"
    "{%- for message in messages[::-1] %}{%- if ns.is_open and message.role == 'user' %}"
    "{%- set ns.is_open = false %}{%- set ns.last = (messages|length - 1) - loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role != 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- else %}{%- set content = message.content %}{%- set thoughts = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thoughts) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
# As before, without a switch: the block can be had in the generation prompt by no argument.
NO_SWITCH = QWEN3.replace(
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}", ""
)
# microsoft/Phi-3-mini-4k-instruct: the end token is put behind a whole conversation, not behind a turn.
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# google/gemma-2-2b-it: refuses a system message, trims, and calls the assistant by another name.
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# google/gemma-3-4b-it: the system message goes before the first question.
GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set prefix = messages[0]['content'] + '\n\n' -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set prefix = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- for message in turns -%}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{- prefix if loop.first else '' -}}{{- message['content'] | trim -}}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
# meta-llama/Llama-3.2-1B-Instruct: prints the day in a system turn of its own, and trims.
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set told = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set told = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + told + '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
# mistralai/Mistral-7B-Instruct-v0.3: the system message goes before the last question, and only where that is last.
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set told = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}{%- for message in turns %}"
    "{%- if message['role'] == 'user' %}{%- if loop.last and told is defined %}"
    "{{- '[INST] ' + told + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
# mistralai/Mistral-Small-24B-Instruct-2501: today and yesterday in a system message of its own.
MISTRAL_SMALL = (
    "{%- set today = strftime_now('%Y-%m-%d') %}{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}{%- set told = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set told = 'The current date is ' + today + '.' %}{%- set turns = messages %}{%- endif %}"
    "{{- '[SYSTEM_PROMPT]' + told + '[/SYSTEM_PROMPT]' }}{%- for message in turns %}"
    "{%- if message['role'] == 'user' %}{{- '[INST]' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
CONTROL = {
    "qwen3": (QWEN3, "<|im_start|> <|im_end|> <|endoftext|>", "<|im_end|>"),
    "no switch": (NO_SWITCH, "<|im_start|> <|im_end|> <|endoftext|>", "<|im_end|>"),
    "phi3": (PHI3, "<|system|> <|user|> <|assistant|> <|end|> <|endoftext|>", "<|end|>"),
    "gemma2": (GEMMA2, "<bos> <start_of_turn> <end_of_turn> <eos>", "<end_of_turn>"),
    "gemma3": (GEMMA3, "<bos> <start_of_turn> <end_of_turn> <eos>", "<end_of_turn>"),
    "llama3": (
        LLAMA3,
        "<|begin|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|>",
        "<|eot_id|>",
    ),
    "mistral": (MISTRAL, "<s> [INST] [/INST] </s>", "</s>"),
    "mistral small": (MISTRAL_SMALL, "<s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] </s>", "</s>"),
    "chatml": (templates.CHATML, "<|im_start|> <|im_end|> <|endoftext|>", "<|im_end|>"),
}
DATE = "2026-03-04"


def make_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Byte-level; control tokens as the model's: those of Phi-3 take what white space follows, thoughts are no special
    tokens of Qwen's, and the last token is the end token."""
    template, control, _ = CONTROL[name]
    core = Tokenizer(models.BPE())
    # line breaks stay together whatever follows, as in the tokenizers of Llama 3 and Qwen
    cut = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)| ?[^\s]+|\s+"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(["the patient was treated with aspirin\n\n user assistant system"] * 3, trainer)
    takes_blanks = name == "phi3"
    core.add_special_tokens([AddedToken(text, special=True, rstrip=takes_blanks) for text in control.split()])
    core.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>", "<|fim|>", "metformin")])
    first, *_, last = control.split()
    built = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=first, eos_token=last, pad_token=last)
    built.chat_template = template
    return prompts.use_template(built, "tokenizer", date=DATE)


TOKENIZERS = {name: make_tokenizer(name) for name in CONTROL}
ROLES = ("user", "assistant")


def conversation(*contents: str, system: str = "", num_context: int = 0) -> Row:
    turns = tuple(Message(ROLES[i % 2], content) for i, content in enumerate(contents))
    first = (Message("system", system),) if system else ()
    return Row((*first, *turns), unit="p1", row_id="a.jsonl line 3", num_context=num_context)


def whole(row: Row, name: str, **options) -> prompts.Encoded:
    return prompts.encode_whole(row, TOKENIZERS[name], **options)


def decoded(ids, name: str) -> str:
    return TOKENIZERS[name].decode(ids, clean_up_tokenization_spaces=False)


def covered(encoded: prompts.Encoded, name: str) -> str:
    return decoded([i for i, wanted in zip(encoded.input_ids, encoded.is_answer, strict=True) if wanted], name)


texts = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=20).filter(
    lambda text: text.strip() == text and "<" not in text and "[" not in text and text != ""
)
spelt = st.sampled_from([token for _, control, _ in CONTROL.values() for token in control.split()])
mixed = st.lists(st.one_of(texts, spelt), min_size=1, max_size=3).map("".join).filter(lambda text: text.strip() == text)
blanks = st.sampled_from(["", "", " ", "\n", " \n\n"])


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(CONTROL)),
    answers=st.lists(mixed, min_size=1, max_size=3),
    question=mixed,
    system=st.one_of(st.just(""), mixed),
    around=st.tuples(st.sampled_from(["", " "]), blanks),  # a line break may merge with the template's
)
def test_the_mask_is_each_answer_and_its_end_token(name, answers, question, system, around):
    turns = [text for answer in answers for text in (question, around[0] + answer + around[1])]
    row = conversation(*turns, system=system)
    encoded, end = whole(row, name), CONTROL[name][2]
    found = covered(encoded, name)
    wanted = "".join(f"{around[0]}{answer}{around[1]}{end}" for answer in answers)
    assert "".join(found.split()) == "".join(wanted.split())  # a template may trim, and Mistral's puts a blank before
    assert around != ("", "") or name == "mistral" or found == wanted
    end_id = TOKENIZERS[name].convert_tokens_to_ids(end)
    marked = [i for i, wanted in zip(encoded.input_ids, encoded.is_answer, strict=True) if wanted]
    assert marked.count(end_id) == len(answers)  # what an answer spells is no end
    ids, _ = prompts.prompt_ids(row, TOKENIZERS[name])
    first = max(i for i in range(len(ids)) if not encoded.is_answer[i]) + 1
    assert first == len(ids)  # evaluation and serve ask what training showed
    assert list(encoded.input_ids[:first]) == ids


def prompt_of(row: Row, name: str, **options) -> str:
    return decoded(prompts.prompt_ids(row, TOKENIZERS[name], **options)[0], name)


def as_others_render(row: Row, name: str, **options) -> str:
    """What an engine that has only the exported template makes of the conversation before the last answer."""
    talk = [{"role": message.role, "content": message.content} for message in row.messages[:-1]]
    return TOKENIZERS[name].apply_chat_template(talk, tokenize=False, add_generation_prompt=True, **options)


@pytest.mark.parametrize("name", ["qwen3", "no switch"])
def test_what_a_template_puts_before_an_answer_belongs_to_the_prompt(name):
    row = conversation("one?", "first", "two?", "second")
    text = decoded(whole(row, name).input_ids, name)
    assert text == (
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
        "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nsecond<|im_end|>\n"
    )
    assert covered(whole(row, name), name) == "first<|im_end|>second<|im_end|>"
    assert prompt_of(row, name) == text[: text.index("second")] == as_others_render(row, name)


@pytest.mark.parametrize("name", ["qwen3", "no switch"])
def test_thoughts_of_a_row_s_own_are_learnt_and_those_of_earlier_answers_are_left_out(name):
    row = conversation("one?", "<think>\na\n</think>\n\nfirst", "two?", "<think>\nb\n</think>\n\nsecond")
    assert covered(whole(row, name), name) == "first<|im_end|><think>\nb\n</think>\n\nsecond<|im_end|>"
    assert prompt_of(row, name).endswith("<|im_start|>assistant\n")
    assert prompt_of(row, name) == as_others_render(row, name, enable_thinking=True)
    assert TOKENIZERS[name].convert_tokens_to_ids("<think>") in whole(row, name).input_ids
    with pytest.raises(ModelError, match="rewrites a message of role assistant"):  # the template has them on own lines
        whole(conversation("one?", "<think>a</think> first"), name)


def test_a_conversation_of_several_turns_under_an_end_token_that_comes_once():
    row = conversation("one?", "first", "two?", "second", system="Be brief.")
    assert covered(whole(row, "phi3"), "phi3") == "first<|end|>second<|end|>"
    assert decoded(whole(row, "phi3").input_ids, "phi3").endswith("second<|end|><|endoftext|>")  # a blank is taken
    assert covered(whole(replace(row, num_context=3), "phi3"), "phi3") == "second<|end|>"
    assert prompt_of(row, "phi3") == as_others_render(row, "phi3").replace("|>\n", "|>")


def test_a_system_message_goes_into_the_first_question_as_gemma_s_authors_put_it():
    row = conversation("one?", "first", "two?", "second", system="Be brief.")
    for name in ("gemma2", "gemma3"):
        text = decoded(whole(row, name).input_ids, name)
        assert text.startswith("<bos><start_of_turn>user\nBe brief.\n\none?<end_of_turn>\n<start_of_turn>model\nfirst")
        assert prompt_of(row, name) == as_others_render(row, name) == text[: text.index("second")]
    bare = conversation("one?", "first")
    assert prompt_of(bare, "gemma2", system_prompt="Be brief.").startswith(
        "<bos><start_of_turn>user\nBe brief.\n\none?"
    )
    assert prompt_of(bare, "gemma2") == "<bos><start_of_turn>user\none?<end_of_turn>\n<start_of_turn>model\n"
    with pytest.raises(ModelError, match="refuses the roles"):  # no order of roles is mended but this
        whole(Row((Message("assistant", "a"), Message("assistant", "b")), unit="p", row_id="row 1"), "gemma2")


def test_a_system_message_that_is_lost_once_there_is_an_answer_goes_into_the_first_question():
    row = conversation("one?", "first", "two?", "second", system="Be brief.")
    wanted = "<s>[INST] Be brief.\n\none?[/INST] first</s>[INST] two?[/INST]"
    assert prompt_of(row, "mistral") == wanted
    assert decoded(whole(row, "mistral").input_ids, "mistral") == f"{wanted} second</s>"


def test_white_space_at_the_ends_of_an_answer_is_covered_where_the_template_keeps_it():
    row = conversation("one?", "\n first \n")
    assert covered(whole(conversation("one?", " first \n"), "chatml"), "chatml") == " first \n<|im_end|>"
    assert covered(whole(row, "llama3"), "llama3") == "first<|eot_id|>"
    assert covered(whole(row, "qwen3"), "qwen3") == " first \n<|im_end|>"


def test_the_end_of_a_turn_and_the_end_token_stop_an_answer():
    for name, (_, control, end) in CONTROL.items():
        tokenizer = TOKENIZERS[name]
        wanted = {tokenizer.convert_tokens_to_ids(end), tokenizer.convert_tokens_to_ids(control.split()[-1])}
        assert set(prompts.stop_ids(tokenizer)) == wanted, name


def test_an_end_of_several_tokens_is_refused():
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = templates.CHATML.replace("<|im_end|>", " (over)")
    assert prompts.encode_whole(conversation("a?", "b"), tokenizer).is_answer.count(True) > 2
    with pytest.raises(ModelError, match=r"where to stop: set model\.chat_template"):
        prompts.stop_ids(tokenizer)


def test_a_date_stands_still_wherever_the_template_is_rendered():
    row = conversation("one?", "first")
    assert "Today Date: 04 Mar 2026\n" in prompt_of(row, "llama3")
    assert "The current date is 2026-03-04." in prompt_of(row, "mistral small")
    for name in ("llama3", "mistral small"):
        assert prompt_of(row, name) == as_others_render(row, name)
        other = make_tokenizer(name)
        other.chat_template = templates.with_date(CONTROL[name][0], "2027-11-30")
        assert prompts.prompt_ids(row, other) != prompts.prompt_ids(row, TOKENIZERS[name])  # control
        again = prompts.use_template(make_tokenizer(name), "tokenizer", date="2027-11-30")
        assert again.chat_template == TOKENIZERS[name].chat_template  # an export's date stays as it is


def test_a_template_that_prints_no_date_is_the_same_every_day():
    for name in set(CONTROL) - {"llama3", "mistral small"}:
        assert not templates.needs_date(CONTROL[name][0])
        assert templates.with_date(CONTROL[name][0], DATE) == CONTROL[name][0]
    assert templates.needs_date(LLAMA3)


def test_dates_are_written_as_strftime_writes_them():
    asked = "%A, %-d %B %y (%j) %H:%M, week %V"
    tokenizer, talk = make_tokenizer("chatml"), [{"role": "user", "content": asked}]
    for source in ("{{ strftime_now('" + asked + "') }}", "{{ strftime_now(messages[0]['content']) }}"):
        made = templates.with_date(source, DATE)
        text = tokenizer.apply_chat_template(talk, tokenize=False, chat_template=made)
        assert text == "Wednesday, 4 March 26 (063) 00:00, week 10"


@pytest.mark.parametrize("name", ["chatml", "qwen3", "phi3", "mistral"])
def test_a_control_token_that_a_row_spells_is_text(name):
    tokenizer, end = TOKENIZERS[name], CONTROL[name][2]
    row = conversation(f"is {end} a token?", f"no, {end} is text", system=f"{end}<|fim|>")
    encoded, plain = whole(row, name), whole(conversation("is it a token?", "no, it is text", system="-"), name)
    special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids("<|fim|>")}
    assert [i for i in encoded.input_ids if i in special] == [i for i in plain.input_ids if i in special]
    assert covered(encoded, name).strip() == f"no, {end} is text{end}"
    counts = [check.check([one], tokenizer=tokenizer).tokens for one in (row, conversation("is it?", "no"))]
    assert [count.num_with_control_tokens for count in counts] == [1, 0]
    assert prompts.prompt_ids(row, tokenizer)[0] == list(encoded.input_ids[: encoded.is_answer.index(True)])


def test_words_that_were_added_stay_whole_and_thoughts_are_tokens_in_answers_only():
    tokenizer = TOKENIZERS["qwen3"]
    word, thought, fim = tokenizer.convert_tokens_to_ids(["metformin", "<think>", "<|fim|>"])
    plain = whole(conversation("metformin?", "metformin"), "qwen3")
    spelt_in_question = whole(conversation("metformin <think> <|im_end|>?", "metformin"), "qwen3")
    for encoded in (plain, spelt_in_question):
        assert encoded.input_ids.count(word) == 2
        assert encoded.input_ids.count(thought) == 1  # the template's
    assert fim not in prompts.text_ids("<|fim|> metformin <|im_end|>", tokenizer)
    assert word in prompts.text_ids("<|fim|> metformin <|im_end|>", tokenizer)
    answer = "<think>\nmetformin <|im_end|>\n</think>\n\nyes"
    assert whole(conversation("a?", answer), "qwen3").input_ids.count(thought) == 1


def test_a_text_that_spells_nothing_has_the_same_tokens_in_the_tokenizer_s_twin():
    for name, tokenizer in TOKENIZERS.items():
        found = chat.render(conversation("metformin\n\n for ä 💊?", " yes\n"), tokenizer)
        ids, offsets = spelling.encode(found.text, [], tokenizer)
        plain = tokenizer(found.text, add_special_tokens=False, return_offsets_mapping=True)
        assert (ids, offsets) == (plain["input_ids"], plain["offset_mapping"]), name


def test_a_twin_is_made_of_unigram_and_wordlevel_vocabularies_too():
    control = AddedToken("<end>", special=True)
    for model in (
        models.Unigram(
            [("<unk>", 0.0), ("<end>", 0.0), ("a", -1.0), ("<", -2.0), ("end", -2.0), (">", -2.0)], unk_id=0
        ),
        models.WordLevel({"<unk>": 0, "<end>": 1, "a": 2}, unk_token="<unk>"),
    ):
        core = Tokenizer(model)
        core.add_special_tokens([control, AddedToken("<unk>", special=True)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>")
        end, before = tokenizer.eos_token_id, tokenizer.backend_tokenizer.to_str()
        assert end in tokenizer("a<end>", add_special_tokens=False)["input_ids"]  # control
        assert end not in prompts.text_ids("a<end>", tokenizer)
        assert tokenizer.backend_tokenizer.to_str() == before
