"""A pair of base and tuned model: walked block by block, whatever form the update has; refused where none."""

import warnings

import pytest
import torch

from parts.pair_models import adapted, batch_of, eager, moved, two_models
from pegbox.errors import BadInput, Unsupported
from pegbox.parts.mixing import mixed, shares_of
from pegbox.parts.pairs import ModelPair
from pegbox.testing import tiny_tokenizer


@torch.no_grad()
def walked(pair, batch):
    walk = pair.begin(batch)
    steps = [pair.step(walk) for _ in range(len(pair))]
    return walk, steps


@torch.no_grad()
def test_the_walk_is_the_tuned_models_own_forward_bit_for_bit():
    """The stream after the last block, and the logits made of it."""
    pair, batch = two_models(), batch_of(9, 9)
    walk, _ = walked(pair, batch)
    own = pair.tuned(**batch, output_hidden_states=True, use_cache=False)
    caught = []
    hook = pair.tuned.model.norm.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    pair.tuned(**batch, use_cache=False)
    hook.remove()
    assert torch.equal(walk.hidden, caught[0])
    assert torch.allclose(pair.walk.finish(walk).logits, own.logits, atol=1e-6)


def test_base_blocks_see_the_tuned_stream():
    pair, batch = two_models(), batch_of(7)
    _, steps = walked(pair, batch)
    x, below, _ = steps[1]
    with torch.no_grad():
        walk = pair.begin(batch)
        args, kwargs = walk.calls[1]
        expected = pair.base.model.layers[1](x, *args[1:], **{k: v for k, v in kwargs.items() if k != "hidden_states"})
    assert torch.equal(below, expected)


def test_an_adapter_is_a_pair_in_one():
    base = eager()
    model = adapted(base)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    shared, two = ModelPair(model), ModelPair(adapted(base), base)
    assert shared.shared
    assert not two.shared
    batch = batch_of(8, 5)
    for (_, a, b), (_, c, d) in zip(walked(shared, batch)[1], walked(two, batch)[1]):
        assert torch.allclose(a, c, atol=1e-6)
        assert torch.allclose(b, d, atol=1e-6)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(not m._disable_adapters for m in shared.everywhere)


def test_adapters_are_on_again_after_an_exception():
    model = adapted(eager())
    pair = ModelPair(model)
    before = model(**batch_of(6)).logits
    hook = model.get_base_model().model.layers[1].mlp.register_forward_hook(_failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        walked(pair, batch_of(6))
    hook.remove()
    assert torch.equal(model(**batch_of(6)).logits, before)


def _failing(*_):
    raise RuntimeError("on purpose")


def test_a_merged_adapter_is_merged_again():
    model = adapted(eager())
    model.merge_adapter()
    weights = {n: p.clone() for n, p in model.named_parameters()}
    pair = ModelPair(model)
    _, steps = walked(pair, batch_of(6))
    assert float((steps[0][2] - steps[0][1]).abs().max()) > 1e-4
    for name, weight in model.named_parameters():
        assert torch.allclose(weight, weights[name], atol=1e-6), name
    assert all(m.merged for m in pair.everywhere)


@pytest.mark.parametrize("execution", ["in_place", "scatter", "bypass"])
def test_sparse_updates_are_pairs_in_one(execution):
    from peft import get_peft_model

    from pegbox.tuners.sparse import SparseConfig

    base, batch = eager(), batch_of(6)
    model = get_peft_model(eager(), SparseConfig(execution=execution, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.5
    model.eval()
    with torch.no_grad():
        tuned = model(**batch).logits
    walk, steps = walked(ModelPair(model), batch)
    _, plain = walked(ModelPair(moved(base, 0.0), base), batch)
    assert torch.allclose(steps[0][1], plain[0][1], atol=1e-6)
    assert float((steps[0][2] - steps[0][1]).abs().max()) > 1e-4
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, tuned)
        assert torch.allclose(ModelPair(model).walk.finish(walk).logits, tuned, atol=1e-6)


def test_base_end_is_the_plain_bases_stream():
    for pair, base in ((two_models(), None), (ModelPair(adapted(eager())), eager())):
        batch = batch_of(7)
        base = base or pair.base
        caught = []
        hook = base.model.norm.register_forward_pre_hook(lambda m, args, to=caught: to.append(args[0]))
        with torch.no_grad():
            base(**batch, use_cache=False)
            assert torch.allclose(pair.base_end(batch), caught[0], atol=1e-6)
        hook.remove()


def test_modes_are_as_before():
    pair = two_models()
    pair.tuned.train()
    with pair.as_evaluated():
        assert not pair.tuned.training
    assert pair.tuned.training
    assert not pair.base.training


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"num_hidden_layers": 2}, "3 blocks and the base 2"),
        ({"hidden_size": 16}, "32 wide and the base 16"),
    ],
)
def test_other_shapes_are_refused(other, words):
    """Different layer counts and hidden sizes."""
    with pytest.raises(BadInput, match=words):
        ModelPair(eager(), eager(**other))


def test_other_kinds_of_blocks_are_refused():
    """Different layer classes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(vocab_size=288, n_embd=32, n_layer=3, n_head=4))
    with pytest.raises(BadInput, match="Block 0 is a LlamaDecoderLayer"):
        ModelPair(eager(), other)


def test_other_tokenizers_are_refused():
    """A different tokenizer."""
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    base = eager()
    with pytest.raises(BadInput, match="different tokenizers"):
        ModelPair(moved(base), base, (tiny_tokenizer(), other))


def test_moved_embeddings_are_noted_once():
    """Embeddings that differ between base and tuned: allowed, warned of once, not counted."""
    base = eager()
    with pytest.warns(UserWarning, match="embeddings") as caught:
        pair = ModelPair(moved(base, embeddings=True), base)
    assert len(caught) == 1
    _, steps = walked(pair, batch_of(6))
    start = pair.tuned.get_input_embeddings()(batch_of(6)["input_ids"])
    assert torch.equal(steps[0][0], start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_models()


def test_a_quantized_side_is_warned_of():
    """Quantization error would count as tuning."""
    base = eager()
    tuned = moved(base)
    tuned.is_quantized = True
    with pytest.warns(UserWarning, match="quantized"):
        ModelPair(tuned, base)


def test_encoder_decoders_prompts_and_bare_models_are_refused():
    """An encoder-decoder is not defined; prompt adapters share no stream; a bare model has no adapter."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    small = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(Unsupported, match="encoder-decoder"):
        ModelPair(T5ForConditionalGeneration(small), T5ForConditionalGeneration(small))
    prompted = get_peft_model(eager(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(Unsupported, match="prompt adapter"):
        ModelPair(prompted, eager())
    with pytest.raises(BadInput, match="no adapter"):
        ModelPair(eager())
    with pytest.raises(BadInput, match="base of a pair has an adapter"):
        ModelPair(eager(), adapted(eager()))


# ---- the mixture


@torch.no_grad()
def shell(pair):
    """The tuned model with the base's blocks, built explicitly."""
    import copy

    built = copy.deepcopy(pair.tuned)
    built.model.layers = copy.deepcopy(pair.base.model.layers)
    return built


@torch.no_grad()
def test_the_ends_of_the_mixture_are_exact():
    """Share 1 is the tuned model, share 0 its shell around the base's blocks, bit for bit."""
    pair, batch = two_models(), batch_of(8, 8)
    tuned, bare = pair.tuned(**batch).logits, shell(pair)(**batch).logits
    for share, expected in ((1.0, tuned), (0.0, bare)):
        with mixed(pair, share) as model:
            assert torch.equal(model(**batch).logits, expected)
    with mixed(pair, [1.0, 0.0, 1.0]) as model:
        assert not torch.equal(model(**batch).logits, tuned)
    assert torch.equal(pair.tuned(**batch).logits, tuned)


@torch.no_grad()
def test_it_is_no_interpolation_of_weights():
    """The state after one block is affine in the share; after two it is not."""
    batch = batch_of(6)

    def state(pair, share):
        caught = []
        hook = pair.tuned.model.norm.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
        with mixed(pair, share) as model:
            model(**batch, use_cache=False)
        hook.remove()
        return caught[0].double()

    def bend(pair):
        low, middle, high = (state(pair, a) for a in (0.5, 1.0, 1.5))
        return float((low + high - 2 * middle).abs().max())

    base = eager(num_hidden_layers=1)
    assert bend(ModelPair(moved(base, 0.3), base)) < 1e-6
    base = eager(num_hidden_layers=2)
    assert bend(ModelPair(moved(base, 0.3), base)) > 1e-4


@torch.no_grad()
def test_equal_models_are_left_alone_at_every_share():
    """Base = tuned: scaling leaves the logits unchanged for all shares."""
    base = eager()
    pair, batch = ModelPair(moved(base, 0.0), base), batch_of(7, 4)
    plain = base(**batch).logits
    for share in (0.0, 0.3, 0.75, 1.25, 3.0):
        with mixed(pair, share) as model:
            assert torch.equal(model(**batch).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("form", ["two models", "adapter"])
@pytest.mark.parametrize("side", [(7, 7), (7, 4)])
def test_cached_equals_uncached(form, side):
    """Generation with one cache for both equals computing everything anew, step by step, with equal lengths."""
    from transformers import DynamicCache

    pair = two_models() if form == "two models" else ModelPair(adapted(eager(), 3.0))
    batch = batch_of(*side, side="left")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with mixed(pair, 0.6) as model:
        cache = DynamicCache()
        ids, mask, place = batch["input_ids"], batch["attention_mask"], positions
        fed = ids
        for _ in range(4):
            step = model(fed, attention_mask=mask, position_ids=place[:, -fed.shape[1] :], cache=cache, use_cache=True)
            whole = model(ids, attention_mask=mask, position_ids=place, use_cache=False)
            assert torch.allclose(step.logits[:, -1], whole.logits[:, -1], atol=1e-5)
            fed = whole.logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, fed], -1)
            mask = torch.cat([mask, torch.ones_like(fed)], -1)
            place = torch.cat([place, place[:, -1:] + 1], -1)
        assert len(cache.layers) == 2 * len(pair)
        assert {cache.get_seq_length(i) for i in range(2 * len(pair))} == {ids.shape[1] - 1}


@torch.no_grad()
def test_generate_with_beams_static_caches_and_several_answers():
    pair, batch = two_models(), batch_of(6, 6)
    with mixed(pair, 0.5) as model:
        plain = model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=False)
        assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), plain)
        static = model.generate(**batch, max_new_tokens=5, do_sample=False, cache_implementation="static")
        assert torch.equal(static, plain)
        beams = [
            model.generate(**batch, max_new_tokens=5, do_sample=False, num_beams=3, use_cache=cached)
            for cached in (True, False)
        ]
    assert torch.equal(*beams)
    tuned = pair.tuned.generate(**batch, max_new_tokens=5, do_sample=False)
    with mixed(pair, 1.0) as model:
        assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), tuned)


@torch.no_grad()
def test_a_cache_from_outside_is_refused():
    from transformers import DynamicCache

    pair, batch = two_models(), batch_of(6)
    cache = DynamicCache()
    pair.tuned(**batch, cache=cache, use_cache=True)
    with mixed(pair, 0.5) as model, pytest.raises(BadInput, match="filled by the tuned model alone"):
        model(batch["input_ids"][:, -1:], cache=cache, use_cache=True)


@pytest.mark.parametrize(
    ("share", "words"),
    [(float("nan"), "finite"), (float("inf"), "finite"), (-0.5, "allow_negative"), ([1.0, 0.5], "2 numbers for 3")],
)
def test_shares_are_checked(share, words):
    """Alpha negative or not finite; negative needs to be allowed."""
    with pytest.raises(BadInput, match=words):
        shares_of(share, 3)
    assert shares_of(-0.5, 2, allow_negative=True) == [-0.5, -0.5]


@torch.no_grad()
def test_other_families_mix_too():
    """GPT-2: another calling convention, learnt positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=288, n_embd=32, n_layer=3, n_head=4, n_positions=64)).eval()
    tuned = GPT2LMHeadModel(base.config).eval()
    tuned.load_state_dict({k: v + 0.02 * (".h." in k) * torch.randn(v.shape) for k, v in base.state_dict().items()})
    pair, batch = ModelPair(tuned, base), batch_of(6, 6)
    with mixed(pair, 0.5) as model:
        plain = model.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0)
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0), plain)
