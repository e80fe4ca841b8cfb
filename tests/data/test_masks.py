"""Masks over a dozen template families: what is trained is what the assistant said, and the end of its turn."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.families import FAMILIES, QWEN3, R1, Family, make_tokenizer
from pegbox.data.masks import mask_chat, mask_text, tokenise
from pegbox.data.rows import Row
from pegbox.data.templates import ChatTemplate, resolve_template
from pegbox.errors import BadInput

ALL = {f.name: f for f in [*FAMILIES, QWEN3, R1]}
_TEMPLATES: dict[str, ChatTemplate] = {}


def spoken(family: Family) -> ChatTemplate:
    """The family's template over its tokenizer, made once."""
    return _TEMPLATES.setdefault(family.name, resolve_template(make_tokenizer(family)))


def chat(*turns: str, system: str = "", **fields) -> Row:
    """User and assistant by turns."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]
    return Row(id="r", kind="chat", messages=messages, source="data.jsonl, line 7", **fields)


def said(template: ChatTemplate, sequence) -> str:
    """The trained tokens, decoded."""
    ids = [i for i, t in zip(sequence.ids, sequence.trained) if t]
    return template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def seen(template: ChatTemplate, sequence) -> str:
    return template.tokenizer.decode(sequence.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def turn(family: Family, text: str) -> str:
    """What one answer looks like in the family: some put white space around it."""
    lead = " " if family.name in ("llama-2", "mistral", "vicuna") else ""
    return lead + text + (family.closing or "")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_closing_is_found(family):
    assert spoken(family).traits.closing == family.closing
    assert spoken(family).traits.system == ("native" if family.system else "folded")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_single_turn(family):
    template = spoken(family)
    (sequence,) = mask_chat(chat("What is 2+2?", "It is 4."), template)
    end = family.closing or family.eos
    assert said(template, sequence).strip().removesuffix(end).rstrip() == "It is 4."
    assert said(template, sequence).endswith(end)
    assert sequence.trained[-1], "the end of turn is the last token and in the loss"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_prompt_is_what_generation_starts_from(family):
    template = spoken(family)
    row = chat("What is 2+2?", "It is 4.")
    (sequence,) = mask_chat(row, template)
    first = sequence.trained.index(True)
    assert sequence.ids[:first] == template.prompt_ids(row.messages[:1])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_multi_turn_assistant_and_last_and_all(family):
    template = spoken(family)
    row = chat("One?", "Un.", "Two?", "Deux.", "Three?", "Trois.", system="Be brief.")
    (every,) = mask_chat(row, template)
    (last,) = mask_chat(row, template, "last")
    (whole,) = mask_chat(row, template, "all")
    end = "" if family.closing else family.eos
    assert said(template, every) == turn(family, "Un.") + turn(family, "Deux.") + turn(family, "Trois.") + end
    assert said(template, last) == turn(family, "Trois.") + end
    assert every.ids == last.ids == whole.ids
    assert whole.trained == [False] + [True] * (len(whole.ids) - 1)
    assert "Be brief." in seen(template, every)


words = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="<>|[]"), min_size=1, max_size=12)
answers = words.map(str.strip).filter(bool)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(FAMILIES),
    turns=st.lists(st.tuples(answers, answers), min_size=1, max_size=4),
    system=st.one_of(st.just(""), answers),
    train_on=st.sampled_from(["assistant", "last"]),
)
def test_trained_tokens_are_exactly_the_answers(family, turns, system, train_on):
    template = spoken(family)
    row = chat(*[text for pair in turns for text in pair], system=system)
    (sequence,) = mask_chat(row, template, train_on)
    wanted = [answer for _, answer in turns][-1 if train_on == "last" else 0 :]
    end = "" if family.closing else family.eos
    assert said(template, sequence) == "".join(turn(family, text) for text in wanted) + end


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    turns=st.lists(st.tuples(answers, answers), min_size=1, max_size=3),
    pairs=st.lists(st.tuples(st.sampled_from("ĊĠ.:abe"), st.sampled_from("ĊĠ.:abe")), unique=True, max_size=8),
)
def test_masks_hold_for_any_merges(turns, pairs):
    """Merges across the prompt's end (newline + newline, space + letter) never move the boundary."""
    vicuna = ALL["vicuna"]
    template = resolve_template(make_tokenizer(vicuna, merges=list(pairs)))
    row = chat(*[text for pair in turns for text in pair])
    (sequence,) = mask_chat(row, template)
    assert said(template, sequence) == "".join(turn(vicuna, answer) for _, answer in turns)
    first = sequence.trained.index(True)
    assert sequence.ids[:first] == template.prompt_ids(row.messages[:1])


def test_a_token_across_the_prompt_end_is_cut():
    family = Family("glue", ALL["chatml"].template, "<|im_end|>", ALL["chatml"].tokens, None, "<|im_end|>")
    template = resolve_template(make_tokenizer(family, merges=[("Ċ", "Ċ")]))
    row = chat("Poem?", "\nRoses")
    (sequence,) = mask_chat(row, template)
    assert sequence.recut
    assert said(template, sequence) == "\nRoses<|im_end|>"
    assert sequence.ids[: sequence.trained.index(True)] == template.prompt_ids(row.messages[:1])


def test_whole_tokens_are_kept_where_nothing_straddles():
    tokenizer = make_tokenizer(ALL["chatml"], merges=[("a", "b")])
    ids, ranges, recut = tokenise(tokenizer, "abab", [2])
    assert (len(ids), ranges, recut) == (2, [(0, 2), (2, 4)], False)


def test_eos_that_is_also_pad_and_end_of_turn_stays_in_the_loss():
    template = spoken(ALL["smollm2"])
    assert template.tokenizer.pad_token_id == template.tokenizer.eos_token_id
    (sequence,) = mask_chat(chat("Hi", "Ho"), template)
    assert sequence.ids[-1] == template.tokenizer.eos_token_id
    assert sequence.trained[-1]


# ---- system messages


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_system_message_is_folded_where_the_template_refuses_it(name):
    template = spoken(ALL[name])
    row = chat("Hi", "Ho", system="Be kind.")
    (sequence,) = mask_chat(row, template)
    assert "Be kind.\n\nHi" in seen(template, sequence)
    assert sequence.ids[: sequence.trained.index(True)] == template.prompt_ids(row.messages[:2])


def test_roles_that_do_not_alternate_are_refused_with_place_and_reason():
    row = Row(
        "r", "chat", [{"role": "user", "content": "a"}] * 2 + [{"role": "assistant", "content": "b"}], source="f, 3"
    )
    with pytest.raises(BadInput, match=r"f, 3.*alternate.*--template"):
        mask_chat(row, spoken(ALL["mistral"]))


# ---- reasoning


def reasoned(*pairs: tuple[str, str, str]) -> Row:
    messages = []
    for question, thought, answer in pairs:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, "reasoning_content": thought})
    return Row("r", "chat", messages, source="f, 1")


def test_native_reasoning_is_trained():
    template = spoken(QWEN3)
    assert template.traits.reasoning == "native"
    (sequence,) = mask_chat(reasoned(("2+2?", "Count.", "4")), template)
    assert said(template, sequence) == "<think>\nCount.\n</think>\n\n4<|im_end|>"


def test_a_template_that_strips_earlier_reasoning_gives_one_sequence_per_turn():
    template = spoken(QWEN3)
    row = reasoned(("2+2?", "Count.", "4"), ("3+3?", "Again.", "6"))
    first, second = mask_chat(row, template)
    assert said(template, first) == "<think>\nCount.\n</think>\n\n4<|im_end|>"
    assert said(template, second) == "<think>\nAgain.\n</think>\n\n6<|im_end|>"
    assert "Count." not in seen(template, second), "the second turn sees what generation would see"
    assert second.ids[: second.trained.index(True)] == template.prompt_ids(row.messages[:3])
    assert (first.part, second.part) == ("/1", "/3")
    (last,) = mask_chat(row, template, "last")
    assert last.ids == second.ids


def test_reasoning_goes_inline_where_the_template_does_not_read_it():
    template = spoken(ALL["chatml"])
    (sequence,) = mask_chat(reasoned(("2+2?", "Count.", "4")), template)
    assert said(template, sequence) == "<think>\nCount.\n</think>\n\n4<|im_end|>"


def test_answers_stand_behind_a_prompt_that_opens_the_reasoning():
    template = spoken(R1)
    assert template.traits.opener == "<think>\n"
    row = reasoned(("2+2?", "Count.", "4"))
    (sequence,) = mask_chat(row, template)
    assert said(template, sequence) == "Count.\n</think>\n\n4<|end of sentence|>"
    assert sequence.ids[: sequence.trained.index(True)] == template.prompt_ids(row.messages[:1])
    (plain,) = mask_chat(chat("2+2?", "4"), template)
    assert said(template, plain) == "\n</think>\n\n4<|end of sentence|>"


def test_r1_turns_each_get_their_context():
    template = spoken(R1)
    first, second = mask_chat(reasoned(("2+2?", "Count.", "4"), ("3+3?", "Again.", "6")), template)
    assert said(template, second) == "Again.\n</think>\n\n6<|end of sentence|>"
    assert seen(template, second).startswith("<|begin of sentence|><|User|>2+2?<|Assistant|>\n\n4<|end of sentence|>")
    assert said(template, first).startswith("Count.")


# ---- tools


TOOLS = [{"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "ping", "arguments": {"host": "r1"}}}


def tool_row() -> Row:
    messages = [
        {"role": "user", "content": "Is r1 up?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "ok in 3 ms"},
        {"role": "assistant", "content": "Yes, r1 answers."},
    ]
    return Row("r", "chat", messages, tools=TOOLS, source="f, 2")


def test_tool_calls_are_trained_and_results_are_not():
    template = spoken(QWEN3)
    sequences = mask_chat(tool_row(), template)
    text = "".join(said(template, s) for s in sequences)
    assert '<tool_call>\n{"name": "ping", "arguments": {"host": "r1"}}\n</tool_call><|im_end|>' in text
    assert "Yes, r1 answers.<|im_end|>" in text
    assert "ok in 3 ms" not in text
    assert all('"ping"' in seen(template, s) for s in sequences)


def test_tools_that_the_template_does_not_render_are_refused():
    with pytest.raises(BadInput, match=r"f, 2.*'?ping'?"):
        mask_chat(tool_row(), spoken(ALL["chatml"]))


def test_a_template_without_tool_schemas_is_refused_by_the_tool_name():
    row = chat("Hi", "Ho", tools=TOOLS)
    with pytest.raises(BadInput, match=r"does not render tools.*ping"):
        mask_chat(row, spoken(ALL["chatml"]))


# ---- refusals and options


def test_a_chat_without_an_assistant_turn_is_refused():
    with pytest.raises(BadInput, match=r"line 7.*no assistant turn"):
        mask_chat(chat("Hello?"), spoken(ALL["chatml"]))


def test_messages_marked_untrained_are_context_only():
    row = chat("One?", "Un.", "Two?", "Deux.")
    row.messages[1]["train"] = False
    (sequence,) = mask_chat(row, spoken(ALL["chatml"]))
    assert said(spoken(ALL["chatml"]), sequence) == "Deux.<|im_end|>"


def test_a_template_that_changes_the_answer_is_refused():
    family = Family("upper", ALL["chatml"].template.replace("m['content']", "(m['content'] | replace('!', ''))"), "")
    with pytest.raises(BadInput, match="drops or changes a part of the answer"):
        mask_chat(chat("Hi", "Ho!"), resolve_template(make_tokenizer(family)))


def test_a_template_whose_prompt_differs_from_its_turns_is_refused():
    broken = ALL["chatml"].template.replace("'<|im_start|>assistant\\n'", "'<|im_start|>bot\\n'")
    template = resolve_template(make_tokenizer(ALL["chatml"]), broken)
    with pytest.raises(BadInput, match="differently from the prompt"):
        mask_chat(chat("Hi", "Ho"), template)


def test_trailing_user_turns_are_left_out():
    template = spoken(ALL["chatml"])
    assert mask_chat(chat("Hi", "Ho", "Bye"), template)[0].ids == mask_chat(chat("Hi", "Ho"), template)[0].ids


def test_added_tokens_of_blanks_are_no_end_of_turn():
    tokenizer = make_tokenizer(ALL["alpaca"])
    tokenizer.add_tokens(["\n\n"])
    assert resolve_template(tokenizer).traits.closing == ""


# ---- built-in templates


def test_plain_template_for_a_tokenizer_without_one():
    bare = Family("bare", "", "</s>", (), "<s>", "</s>")
    template = resolve_template(make_tokenizer(bare, adds_bos=True))
    assert template.name == "plain"
    (sequence,) = mask_chat(chat("Hi", "Ho"), template)
    assert seen(template, sequence) == "<s>### User:\nHi\n\n### Assistant:\nHo</s>"
    assert said(template, sequence) == "Ho</s>"


def test_raw_template_for_completion_rows():
    bare = Family("bare", "", "</s>", (), "<s>", "</s>")
    template = resolve_template(make_tokenizer(bare), None, "completion")
    messages = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
    (sequence,) = mask_chat(Row("r", "completion", messages), template)
    assert (seen(template, sequence), said(template, sequence)) == ("2+2=4</s>", "4</s>")


def test_completion_rows_stay_raw_beside_a_chat_template():
    assert resolve_template(make_tokenizer(ALL["chatml"]), None, "completion").name == "raw"


@pytest.mark.parametrize("family", [*FAMILIES, QWEN3, R1], ids=lambda f: f.name)
def test_an_installed_template_renders_the_same_by_itself(family):
    tokenizer = make_tokenizer(family)
    template = resolve_template(tokenizer)
    messages = [*chat("One?", "Un.", "Two?", system="Be brief.").messages]
    messages[2] = messages[2] | {"reasoning_content": "Think."}
    before, digest = template.render(messages, generation_prompt=True), template.digest
    template.install()
    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert own == before == template.render(messages, generation_prompt=True)
    assert template.digest == digest
    assert resolve_template(tokenizer).digest == digest
    assert "Be brief." in own


def test_named_templates_each_get_the_prelude():
    tokenizer = make_tokenizer(ALL["gemma"])
    tokenizer.chat_template = {"default": ALL["gemma"].template, "tool_use": QWEN3.template}
    template = resolve_template(tokenizer)
    assert template.render(chat("Hi", system="S").messages).startswith("<bos><start_of_turn>user\nS\n\nHi")
    assert template.render(chat("Hi").messages, TOOLS).startswith("<|im_start|>system\n# Tools")


def test_template_from_a_file(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    template = resolve_template(make_tokenizer(ALL["zephyr"]), file)
    (sequence,) = mask_chat(chat("Hi", "Ho"), template)
    assert seen(template, sequence) == "[Hi][Ho]"
    with pytest.raises(BadInput, match="not found"):
        resolve_template(make_tokenizer(ALL["zephyr"]), tmp_path / "absent.jinja")


def test_a_date_in_a_template_never_changes():
    dated = "{{ strftime_now('%d %b %Y') }} " + ALL["chatml"].template
    template = resolve_template(make_tokenizer(ALL["chatml"]), dated)
    assert template.render([{"role": "user", "content": "x"}]).startswith("26 Jul 2024 ")


# ---- plain text


def test_text_is_trained_whole_and_windowed():
    tokenizer = make_tokenizer(ALL["zephyr"])
    (whole,) = mask_text("abcdef", tokenizer, None)
    assert whole.ids[-1] == tokenizer.eos_token_id
    assert whole.trained == [False] + [True] * 6
    pieces = mask_text("abcdefgh", tokenizer, 4)  # 9 tokens; the lone last one has nothing before it
    assert [len(p.ids) for p in pieces] == [4, 4]
    assert [p.part for p in pieces] == ["/0", "/1"]
