"""Layouts and mixtures: nothing lost but what is counted, documents apart, shares kept at every draw."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pegbox.data.base import DATA
from pegbox.data.collate import PackingCollator, PaddingCollator
from pegbox.data.layouts import arranged, best_fit, greedy, windows
from pegbox.data.policies.mixture import blended, shares
from pegbox.errors import BadInput, Unsupported
from pegbox.objectives.base import OBJECTIVE
from pegbox.parts.context import Context
from pegbox.parts.tokens import shift
from pegbox.tasks.views import CausalView
from pegbox.testing import tiny_llama

COLLATE = PaddingCollator(258)
LENGTHS = st.lists(st.integers(2, 20), min_size=1, max_size=25)


def examples(lengths=(7, 11, 5, 9, 4, 12), tasks=None, prompt=2, tail=0):
    g = torch.Generator().manual_seed(sum(lengths))
    out = []
    for i, n in enumerate(lengths):
        ids = torch.randint(0, 256, (n,), generator=g).tolist()
        labels = [t if prompt <= j < n - tail else -100 for j, t in enumerate(ids)]
        row = {"input_ids": ids, "labels": labels, "sample_id": 100 + i, "weight": 1.0, "row_id": f"r{i}"}
        out.append({**row, "task_id": tasks[i] if tasks else 0, "task": "xyz"[tasks[i]] if tasks else "x"})
    return out


def pairs(batches):
    """The multiset of (input token, next token, sample) that a loss sees."""
    found = []
    for b in batches:
        mask = b.get("attention_mask")
        targets, valid = shift(b["labels"], b.get("sequence_ids"), b.get("position_ids"), mask)
        rows = b.get("sequence_ids")
        if rows is None:
            rows = torch.arange(valid.shape[0])[:, None].expand(valid.shape)
        owner = b["sample_ids"][rows.clamp(min=0)]
        found += list(zip(b["input_ids"][valid].tolist(), targets[valid].tolist(), owner[valid].tolist()))
    return sorted(found)


@given(LENGTHS, st.integers(4, 30))
def test_every_layout_has_the_pairs_of_the_plain_set(lengths, size):
    """The set of (token, label) pairs with loss is the unpacked one; only what is too long is missing, and counted."""
    rows = examples(lengths, prompt=1)
    for mode in ("padding", "dynamic", "pack", "best_fit", "concat"):
        short = [e for e in rows if mode == "concat" or len(e["input_ids"]) <= size + 1]
        if not short:
            continue
        made = arranged(rows, mode, size, report=False)
        assert made.dropped == len(rows) - len(short)
        assert pairs([COLLATE(list(made))]) == pairs([COLLATE(short)])
        assert all(len(r["input_ids"]) <= size + 1 for r in made)


@given(LENGTHS)
def test_bins_hold_every_item_once_and_no_row_is_too_full(lengths):
    for pack in (greedy, best_fit):
        rows = pack(lengths, 20)
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
    assert len(best_fit(lengths, 20)) <= len(greedy(lengths, 20))
    assert list(itertools.chain(*greedy(lengths, 20))) == list(range(len(lengths)))


def test_windows_share_one_token_and_cover_the_stream():
    made = windows([5, 9, 3], 6)
    assert [sum(p.length for p in row) for row in made] == [7, 7, 5]
    assert made[1][0].example == 1
    assert made[1][0].start == 1  # the last token of the window before


def test_rows_hold_one_task():
    made = arranged(examples(tasks=[0, 1, 0, 2, 1, 0]), "best_fit", 30)
    assert sorted(made.task_ids) == [0, 1, 2]
    for row in made:
        assert {int(i) % 10 for i in row["sample_ids"]} <= {0: {0, 2, 5}, 1: {1, 4}, 2: {3}}[row["task_id"]]
    batch = COLLATE(list(made))
    assert batch["task_ids"].tolist() == [0, 0, 0, 1, 1, 2]


def loss(model, batch):
    made = OBJECTIVE.validate({})
    return float(made.value(None, CausalView(model), batch, made.count(batch)))


def test_packed_logits_are_those_of_each_document_alone():
    """With document masks (positions that restart) logits equal the unpacked ones, and no gradient crosses."""
    model, rows = tiny_llama(), examples()
    batch = COLLATE(list(arranged(rows, "pack", 30)))
    logits = CausalView(model).logits(batch)
    for i, e in enumerate(rows):
        alone = CausalView(model).logits(COLLATE([e]))[0]
        assert torch.allclose(logits[batch["sequence_ids"] == i], alone, rtol=0, atol=1e-5)
    table = model.get_input_embeddings()
    embedded = table(batch["input_ids"]).detach().requires_grad_()
    out = model(inputs_embeds=embedded, position_ids=batch["position_ids"], use_cache=False).logits
    second = batch["sequence_ids"][0] == 1
    out[0, second].sum().backward()
    assert not embedded.grad[0, ~second].any()
    crossing = COLLATE(list(arranged(rows, "pack", 30, cross_attend=True)))
    assert crossing["position_ids"][0].tolist() == list(range(crossing["input_ids"].shape[1]))
    assert loss(model, crossing) != pytest.approx(loss(model, batch), abs=1e-5)


def test_trimming_leaves_the_loss_and_shortens_the_batch():
    """Dynamic padding: the loss is that of full padding."""
    model, rows = tiny_llama(), examples((9, 14, 7), tail=3)
    full, plain, trimmed = (
        COLLATE(list(x)) for x in (arranged(rows, "padding", 40), rows, arranged(rows, "dynamic", 40))
    )
    assert [b["input_ids"].shape[1] for b in (full, plain, trimmed)] == [41, 14, 11]
    assert loss(model, trimmed) == pytest.approx(loss(model, plain), abs=1e-6)
    assert loss(model, full) == pytest.approx(loss(model, plain), abs=1e-6)


def test_packing_wastes_little_of_a_skewed_set():
    """Padding share <= 10 % where plain padding gives >= 60 %."""
    g = torch.Generator().manual_seed(0)
    lengths = [int(n) for n in (8 + 200 * torch.rand(300, generator=g) ** 6)]
    rows = examples(lengths)
    packed = arranged(rows, "best_fit", 255)
    share = 1 - sum(packed.lengths) / (256 * len(packed))
    plain = []
    for i in range(0, 300, 16):
        part = lengths[i : i + 16]
        plain.append((max(part) * len(part), sum(part)))
    padding = 1 - sum(used for _, used in plain) / sum(total for total, _ in plain)
    assert share <= 0.1
    assert padding >= 0.6


def test_layouts_refuse():
    """A budget below two tokens, nothing left (with how many and why), no assistant token, labels that are classes."""
    rows = examples()
    with pytest.raises(BadInput, match="at least 2"):
        arranged(rows, "pack", 1)
    with pytest.raises(BadInput, match="all 6 examples have more than 4 tokens"):
        arranged(examples((6, 7, 8, 9, 10, 11)), "pack", 3)
    with pytest.warns(UserWarning, match="2 of 6 examples have more than 10"):
        assert len(arranged(rows, "dynamic", 9)) == 4
    with pytest.raises(BadInput, match="r0 has no assistant token"):
        arranged(examples((5,), prompt=5), "pack", 9)
    with pytest.raises(BadInput, match="not classes"):
        arranged([{"input_ids": [1, 2], "labels": 1, "sample_id": 0}], "pack", 9)
    with pytest.raises(BadInput, match="greater than or equal to 2"):
        DATA.validate({"kind": "layout", "seq_length": 1})
    packed = arranged(rows, "pack", 30)
    with pytest.raises(BadInput, match="packed already"):
        PackingCollator(258, 64)(list(packed))


def test_a_model_whose_documents_would_leak_is_refused():
    class Blind(torch.nn.Module):
        """Takes no position ids."""

        def __init__(self):
            super().__init__()
            self.inner = tiny_llama()

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, use_cache=False):
            return self.inner(input_ids)

    policy = DATA.validate({"kind": "layout", "mode": "pack", "seq_length": 30})
    with pytest.raises(Unsupported, match="see the one packed before"):
        policy.prepare(examples(), Context(Blind()))
    crossing = DATA.validate({"kind": "layout", "mode": "pack", "seq_length": 30, "cross_attend": True})
    assert len(crossing.prepare(examples(), Context(Blind()))) == 2


# ---- mixtures ----


@given(st.lists(st.floats(1e-4, 1), min_size=1, max_size=12))
def test_after_any_number_of_draws_every_task_has_had_its_share(weights):
    """|count_k - n w_k| <= 1 after every n."""
    total = sum(weights)
    weights = [w / total for w in weights]
    counts = [0] * len(weights)
    for n, task in enumerate(itertools.islice(blended(weights), 120), start=1):
        counts[task] += 1
        assert all(abs(c - n * w) <= 1 for c, w in zip(counts, weights))


def test_shares_by_size_and_temperature():
    assert shares([50, 5, 1]) == pytest.approx([50 / 56, 5 / 56, 1 / 56])
    assert shares([50, 5, 0], 0.0) == [0.5, 0.5, 0]
    assert shares([81, 16], 0.25) == pytest.approx([0.6, 0.4])
    with pytest.raises(BadInput, match="no rows"):
        shares([0, 0])


def drawn(block, tasks, count, ctx=None):
    rows = examples((5,) * len(tasks), tasks=tasks)
    order = iter(DATA.validate({"kind": "mixture", **block}).sampler(None, rows, ctx or Context(None, seed=3)))
    return list(itertools.islice(order, count))


def test_a_mixtures_order_follows_from_the_seed_and_uses_rows_up_before_repeating():
    tasks = [0] * 6 + [1] * 2
    first = drawn({}, tasks, 16)
    assert first == drawn({}, tasks, 16)
    assert sorted(first[:8]) == sorted(first[8:]) == list(range(8))
    even = drawn({"temperature": 0.0}, tasks, 12)
    assert sum(i >= 6 for i in even) == 6
    named = Context(None, seed=3, tasks=("x", "y"))
    assert all(i >= 6 for i in drawn({"weights": {"x": 0, "y": 2}}, tasks, 5, named))


def test_mixtures_refuse():
    named = Context(None, seed=3, tasks=("x", "y"))
    for block, words in (
        ({"weights": {"x": 0}}, "all 0"),
        ({"weights": {"x": 1}, "temperature": 0.5}, "Leave one out"),
        ({"weights": {"x": 1, "z": 1}}, "no task 'z'"),
        ({"weights": {"x": 1}}, "no share for the task 'y'"),
        ({"temperature": 2}, "less than or equal to 1"),
    ):
        with pytest.raises(BadInput, match=words):
            drawn(block, [0, 1], 1, named)


def test_rounds_must_alternate_and_hold_an_answer():
    from pegbox.data.formats import convert, detect

    def read(*turns):
        record = {"chat_rounds": [{"role": r, "content": "x"} for r in turns]}
        return convert(record, detect(set(record), "f"), "f, line 1")

    assert [m["role"] for m in read("system", "human", "bot").messages] == ["system", "user", "assistant"]
    for turns in (("bot", "human"), ("human", "human", "bot"), ("human", "system", "bot")):
        with pytest.raises(BadInput, match="alternate"):
            read(*turns)
    with pytest.raises(BadInput, match="no assistant turn"):
        read("human")
    pair = convert({"query": "2+2?", "answer": "4"}, detect({"query", "answer"}, "f"), "f, line 1")
    assert pair.messages[-1]["content"] == "4"


def test_sources_name_tasks_and_sets_number_them_alike(tokenizer, tmp_path):
    from pegbox.data.dataset import encode_rows, load_rows

    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"question": "{name}?", "answer": "1"}}\n')
    rows = load_rows([{"path": str(tmp_path / f"{n}.jsonl"), "task": f"task {n}"} for n in "ab"])
    assert [r.task for r in rows] == ["task a", "task b"]
    later = encode_rows(rows.rows[1:], tokenizer, task_names=["task b", "task c"])
    assert (later.tasks, later.task_ids.tolist()) == (["task b", "task c"], [0])
