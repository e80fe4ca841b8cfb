"""Heads, hooks, and patched passes: what must hold of reading and writing, on several families of decoders."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analyze.circuits.casts import family, llama, prompts, same, snapshot
from pegbox.analyze.circuits import Head, HeadView, Patch, Prompts, accuracy, capture, lora_rank_sites, mlp_sites
from pegbox.analyze.circuits.activations import edited, last_logits, taken
from pegbox.analyze.circuits.passes import Resumed, Tokens, Whole, resumable
from pegbox.errors import BadInput, Unsupported

FAMILIES = ["llama", "gpt2", "neox", "qwen3", "phi3"]


@pytest.fixture(scope="module", params=FAMILIES)
def view(request):
    return HeadView(family(request.param))


@torch.no_grad()
def test_its_own_clean_value_changes_nothing(view):
    """A head overwritten with its own clean value: the same logits, bit for bit; so for q, k, v."""
    given_ = prompts()
    plain = last_logits(view, given_)
    clean = capture(view, given_, ("o", "q", "k", "v"))
    assert torch.equal(clean.logits, plain)
    for kind in ("o", "q", "k", "v"):
        patches = []
        for head in view.all():
            site = view.site(kind, *head)
            patches.append(Patch(site, taken(clean[kind, head.layer], site)))
            at = given_.at("mid")
            patches.append(Patch(site, taken(clean[kind, head.layer][torch.arange(4), at], site), at))
        assert torch.equal(last_logits(view, given_, patches), plain)


@torch.no_grad()
def test_all_heads_from_another_run():
    """All heads of all blocks and tokens from another prompt, MLPs recomputed: an independent forward by blocks."""
    model = llama()
    view, ours, theirs = HeadView(model), prompts(seed=0), prompts(seed=1)
    donor = capture(view, theirs)
    patched = last_logits(view, ours, [Patch(view.site("o", n), donor["o", n]) for n in range(view.layers)])
    x = model.model.embed_tokens(ours.ids)
    for n, block in enumerate(model.model.layers):
        x = x + donor["o", n] @ block.self_attn.o_proj.weight.T
        x = x + block.mlp(block.post_attention_layernorm(x))
    torch.testing.assert_close(patched, model.lm_head(model.model.norm(x))[:, -1], rtol=0, atol=1e-12)


@torch.no_grad()
def test_keys_and_values_of_a_group():
    """With grouped queries, another k or v of a head changes exactly the heads of its KV group."""
    view, given_ = HeadView(llama()), prompts()
    assert (view.heads, view.kv_heads) == (4, 2)
    clean = capture(view, given_)
    for kind in ("k", "v"):
        site = view.site(kind, 1, 3)
        noise = torch.randn(4, 10, view.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        moved = capture(view, given_, edits=[Patch(site, noise)])
        changed = [not torch.equal(moved.head(view, "o", 1, h), clean.head(view, "o", 1, h)) for h in range(4)]
        assert changed == [False, False, True, True]
    moved = capture(view, given_, edits=[Patch(view.site("q", 1, 3), noise)])
    changed = [not torch.equal(moved.head(view, "o", 1, h), clean.head(view, "o", 1, h)) for h in range(4)]
    assert changed == [False, False, False, True]


@torch.no_grad()
def test_a_padded_batch_is_its_rows(view):
    """Left padding changes no row's logits, nor what is patched in it."""
    given_ = prompts(lengths=[10, 7, 8, 9])
    assert given_.padded
    donor = capture(view, prompts(lengths=[10, 7, 8, 9], seed=5))
    at = given_.at("mid")

    def edits(part, rows):
        site = view.site("o", 1, 2)
        return [Patch(site, taken(donor["o", 1][rows, at[rows]], site), part.at("mid"))]

    whole = last_logits(view, given_, edits(given_, torch.arange(4)))
    for i in range(4):
        row = given_.take(slice(i, i + 1))
        assert not row.padded
        torch.testing.assert_close(
            last_logits(view, row, edits(row, torch.tensor([i])))[0], whole[i], rtol=0, atol=2e-5
        )


def test_the_model_is_as_before(view):
    """Hooks are gone after exceptions; parameters, modes and gradients are untouched."""
    view.model.train()
    before = snapshot(view.model)

    def broken(_):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="middle"):
        last_logits(view, prompts(), [(view.site("o", 1), broken)])
    with pytest.raises(RuntimeError, match="middle"), edited([(view.site("q", 0), broken)]):
        view.model(input_ids=prompts().ids)
    run = Resumed(view, prompts(), Tokens.since(prompts().at("mid"), 10))
    with pytest.raises(RuntimeError, match="middle"):
        run.run(2, {("o", 2): broken}, 1)
    capture(view, prompts(), ("o", "v"))
    accuracy(view, prompts())
    assert same(before, snapshot(view.model))
    view.model.eval()


@torch.no_grad()
def test_resumed_passes_are_whole_passes(view):
    """Beginning at a block on some tokens, variants side by side: the same logits and the same seen activations."""
    given_ = prompts(lengths=[10, 8, 10, 9])
    assert resumable(view, given_)
    tokens = Tokens.since(given_.at("early"), given_.width)
    runs = [kind(view, given_, tokens) for kind in (Resumed, Whole)]
    scale = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)[None, :, None, None]
    place = tokens.index(given_.at("early"))

    def edit(x):
        y = x.clone()
        rows = torch.arange(4)
        y[rows, :, place] = (x * scale)[rows, :, place]
        return y

    watch = [view.site("q", 2), view.site("o", 1)]
    found = [run.run(3, {("o", 1): edit}, 1, watch) for run in runs]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
    for a, b in zip(found[0][1], found[1][1]):
        real = tokens.real[:, None, :, None].expand(a.shape)
        torch.testing.assert_close(a[real], b[real], rtol=0, atol=1e-5)
    assert not torch.allclose(found[0][0][:, 0], found[0][0][:, 1])


@torch.no_grad()
def test_a_decoder_that_can_not_resume_is_run_whole():
    """ALiBi is laid over a mask of two axes, so a given mask breaks it; it is noticed, and the same scores come out."""
    from analyze.circuits.casts import naive_scores
    from pegbox.analyze.circuits import path_patching

    view = HeadView(family("bloom"))
    clean, corrupt = prompts(2), prompts(2, seed=1)
    assert not resumable(view, clean)
    found = path_patching(view, clean, corrupt, receivers=[(2, 1)], composition="q")
    torch.testing.assert_close(
        found.scores, naive_scores(view, clean, corrupt, [(2, 1)], "q", "last"), rtol=0, atol=1e-6
    )


@torch.no_grad()
def test_caches_hold_what_is_needed():
    """Three of n tokens of the o_proj inputs, unless keys or values need all: bytes are counted."""
    view, given_ = HeadView(llama(dtype=torch.float32)), prompts()
    columns = given_.columns(["early", "mid", "last"])
    kept = capture(view, given_, ("o",), columns)
    assert kept.nbytes == 3 * 4 * 3 * view.width * 4
    assert capture(view, given_, ("o",)).nbytes == kept.nbytes // 3 * 10
    for layer in range(3):
        whole = capture(view, given_)["o", layer]
        assert torch.equal(kept["o", layer], whole[torch.arange(4)[:, None], columns])


def test_adapters_are_seen_through():
    """On a PEFT model heads are the base's; the written slice reaches the adapter, and switching it off is the base."""
    from parts.pair_models import adapted

    base = llama(dtype=torch.float32)
    tuned = adapted(base, 3.0)
    view, given_ = HeadView(tuned), prompts()
    assert (view.layers, view.heads) == (3, 4)
    with torch.no_grad():
        merged = adapted(base, 3.0).merge_and_unload()
        donor = capture(HeadView(base), given_)
        edits = lambda v: [Patch(v.site("o", 1, 2), taken(donor["o", 1], v.site("o", 1, 2)))]  # noqa: E731
        torch.testing.assert_close(
            last_logits(view, given_, edits(view)), last_logits(HeadView(merged), given_, edits(HeadView(merged))),
            rtol=0, atol=1e-4,
        )  # fmt: skip
    sites = lora_rank_sites(view)
    assert len(sites) == 3 * 7 * 4
    assert {site.layer for site in sites} == {0, 1, 2}
    with pytest.raises(BadInput, match="no LoRA 'other'"):
        lora_rank_sites(view, "other")


def test_mlps_end_in_one_matrix(view):
    assert [site.layer for site in mlp_sites(view)] == [0, 1, 2]


# ---- bad input


def test_heads_out_of_range():
    view = HeadView(llama())
    for bad in [(3, 0), (0, 4), (-1, 0), (0, -1)]:
        with pytest.raises(BadInput, match="out of range: layers 0-2, heads 0-3"):
            view.check([bad])
    with pytest.raises(BadInput, match="twice"):
        view.check([(0, 0), (0, 0)])
    with pytest.raises(BadInput, match=r"\[layer, head\]"):
        view.check([(0, 0, 0)])
    assert view.check([[2, 3]]) == (Head(2, 3),)


def test_an_unknown_composition():
    with pytest.raises(BadInput, match="Known: q, k, v"):
        HeadView(llama()).site("z", 0, 0)


def test_a_fused_projection_of_unknown_layout():
    """A fused qkv whose sizes do not add up to a known layout is refused where a part of it is asked for."""
    view = HeadView(family("gpt2"))
    from dataclasses import replace

    pieces = tuple(replace(p, slices={}) for p in view.anatomy.pieces)
    blind = HeadView(view.model, replace(view.anatomy, pieces=pieces))
    assert blind.site("o", 0, 1).columns == slice(8, 16)
    with pytest.raises(Unsupported, match="layout of the fused projection is not known"):
        blind.site("q", 0, 1)


def test_other_models_are_refused():
    import transformers as t

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    both = t.T5ForConditionalGeneration(t.T5Config(**sizes))
    with pytest.raises(Unsupported, match="encoder-decoder"):
        HeadView(both)
    with pytest.raises(Unsupported, match="no output head"):
        HeadView(llama().model)


def test_prompts_of_unequal_length_without_a_mask():
    with pytest.raises(BadInput, match="padding token"):
        Prompts.of([[1, 2], [1]])
    with pytest.raises(BadInput, match="padded on the left"):
        Prompts(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool())
    with pytest.raises(BadInput, match="at least one prompt"):
        Prompts.of([[1], []])
    with pytest.raises(BadInput, match="'x' needs a column"):
        Prompts.of([[1, 2]], {"x": [2]})
    with pytest.raises(BadInput, match="fall on one token"):
        Prompts.of([[1, 2]], {"x": [1]}).columns(["x", "last"])
    with pytest.raises(BadInput, match="no answers"):
        prompts(answers=False).right()
    with pytest.raises(BadInput, match="Did you mean 'early'"):
        prompts().at("erly")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3))
def test_batches_hold_every_row_once(lengths, size):
    rows = [[i + 1] * n for i, n in enumerate(lengths)]
    whole = Prompts.of(rows, {"first": [0] * len(rows)}, [1] * len(rows), pad=0)
    again = []
    for part in whole.batches(size):
        assert bool((part.ids[torch.arange(len(part)), part.at("first")] > 0).all())
        again += [ids[mask].tolist() for ids, mask in zip(part.ids, part.mask)]
    assert again == rows
