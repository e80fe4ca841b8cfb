"""Emulated fine-tuning over live models: caches, batches, blocks, members that share a base, and what is refused."""

import copy
import math

import pytest
import torch

from decode.casts import answers, cast, emulated, prompts, quiet, sharpened, tokenizer
from pegbox.decode.base import DECODE, DecodeContext
from pegbox.decode.combine import combine
from pegbox.decode.emulated import EmulatedDecoding
from pegbox.decode.pairs import Member, View
from pegbox.errors import BadInput, Unsupported
from pegbox.testing import tiny_llama


@pytest.fixture(scope="module")
def models():
    return cast()


def test_anchor_is_reference_answers_as_the_tuned_model(models):
    """With the reference as anchor and weight 1: the tuned model's distribution, and its greedy answers."""
    same = {**models, "anchor": models["reference"]}
    ids, mask, _ = prompts()
    decoding = emulated(same)
    got = decoding(input_ids=ids, attention_mask=mask).logits.exp()
    wanted = models["tuned"](input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    assert ((got - wanted.softmax(-1)) * mask[..., None]).abs().max() <= 1e-6
    assert torch.equal(answers(decoding, ids, mask), answers(models["tuned"], ids, mask))
    assert len(decoding.members) == 2  # one model in two roles runs once


@pytest.mark.parametrize("sample", [False, True])
def test_weight_zero_is_the_anchors_own_generate(models, sample):
    """Bit for bit under the same seed, and no other model is called."""
    ids, mask, _ = prompts()
    decoding = emulated(models, weight=0.0)
    torch.manual_seed(5)
    ours = answers(decoding, ids, mask, do_sample=sample)
    torch.manual_seed(5)
    assert torch.equal(ours, answers(models["anchor"], ids, mask, do_sample=sample))
    assert sum(decoding.summary()["calls"].values()) == 0
    assert list(decoding.summary()["calls"]) == ["anchor"]


@pytest.mark.parametrize("top_p", [None, 0.8])
def test_cached_equals_uncached(models, top_p):
    """The same tokens, and logits within 1e-5."""
    ids, mask, _ = prompts()
    decoding = emulated(models, top_p=top_p)
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 8, "do_sample": False}
    runs = [decoding.generate(ids, attention_mask=mask, use_cache=on, **options) for on in (True, False)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for ours, theirs in zip(runs[0].logits, runs[1].logits):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [None, 3])
def test_a_padded_batch_equals_the_rows_alone(models, block):
    ids, mask, rows = prompts()
    decoding = emulated(models, block_size=block)
    together = answers(decoding, ids, mask)
    for row, prompt in zip(together, rows):
        assert torch.equal(row[None], answers(decoding, torch.tensor([prompt])))


@pytest.mark.parametrize(("block", "weight"), [(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (4, 0.4)])
def test_greedy_blocks_equal_single_tokens(models, block, weight):
    ids, mask, _ = prompts()
    plain = answers(emulated(models, weight=weight), ids, mask, count=13)
    assert torch.equal(answers(emulated(models, weight=weight, block_size=block), ids, mask, count=13), plain)


def test_greedy_blocks_on_many_random_models():
    ids, mask, _ = prompts((5, 6))
    for scale in (0.02, 0.6):
        found = cast(scale=scale)
        plain = answers(emulated(found, top_p=0.9), ids, mask, count=12)
        assert torch.equal(answers(emulated(found, top_p=0.9, block_size=4), ids, mask, count=12), plain)


def test_sampled_blocks_draw_from_the_same_distribution():
    """V = 8, two tokens, 40,000 draws in a batch: total variation to the exact distribution at most 0.02."""
    processors = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.3}
    found = cast(vocabulary=8, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    prompt = torch.tensor([[3, 1, 6]])
    exact = _pair_distribution(emulated(found), prompt, processors)
    torch.manual_seed(1)
    drawn = answers(
        emulated(found, block_size=3), prompt.expand(40_000, -1), count=2, do_sample=True, **{"top_k": 0, **processors}
    )
    counts = torch.bincount(drawn[:, 0] * 8 + drawn[:, 1], minlength=64) / len(drawn)
    assert 0.5 * (counts - exact).abs().sum() <= 0.02


@pytest.mark.slow
def test_whole_blocks_draw_from_the_same_distribution():
    """As above in batches of ten, where most blocks are accepted whole and end in the extra token."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    found = cast(scale=0.05, vocabulary=8, **sizes, num_key_value_heads=1, **ends)
    found["anchor"] = copy.deepcopy(found["reference"])
    sharpened(found["anchor"], by=1.1)
    prompt = torch.tensor([[3, 1, 6]])
    exact = _pair_distribution(emulated(found), prompt, {})
    decoding, counts = emulated(found, block_size=1), torch.zeros(64)
    torch.manual_seed(1)
    for _ in range(4000):
        drawn = answers(decoding, prompt.expand(10, -1), count=2, do_sample=True, top_k=0)
        counts += torch.bincount(drawn[:, 0] * 8 + drawn[:, 1], minlength=64)
    assert decoding.summary()["acceptance"] > 0.9
    assert decoding.summary()["rounds"] < 1.5 * 4000
    assert 0.5 * (counts / counts.sum() - exact).abs().sum() <= 0.02


def _pair_distribution(decoding, prompt, processors):
    """(64,) exact probabilities of the first two tokens, through the same processors."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=True, **{"top_k": 0, **processors})
    warp = decoding.host._get_logits_processor(config, input_ids_seq_length=prompt.shape[1])
    first = warp(prompt, decoding(input_ids=prompt).logits[:, -1]).softmax(-1)[0]
    longer = torch.cat([prompt.expand(8, -1), torch.arange(8)[:, None]], -1)
    second = warp(longer, decoding(input_ids=longer).logits[:, -1]).softmax(-1)
    return (first[:, None] * second).reshape(-1)


@pytest.mark.parametrize("count", [10, 11, 3])
def test_a_draft_that_is_the_target_is_always_accepted(models, count):
    """The anchor is called once per block and its extra token."""
    twins = {"anchor": models["reference"], "reference": copy.deepcopy(models["reference"]), "tuned": models["tuned"]}
    ids, mask, _ = prompts()
    decoding = emulated(twins, block_size=4)
    answers(decoding, ids, mask, count=count)
    found = decoding.summary()
    assert found["acceptance"] == 1.0
    assert found["calls"]["anchor"] == math.ceil(count / 5)


def test_blocks_call_the_anchor_less(models):
    ids, _, _ = prompts((6,))
    twins = {"anchor": models["reference"], "reference": copy.deepcopy(models["reference"]), "tuned": models["tuned"]}
    sharpened(twins["anchor"], by=1.05)
    decoding = emulated(twins, block_size=4)
    answers(decoding, ids, count=40)
    found = decoding.summary()
    assert found["acceptance"] >= 0.7
    assert found["calls"]["anchor"] <= 0.4 * 40


def test_caches_after_a_rejected_block(models, monkeypatch):
    """They hold exactly the prompt and the accepted tokens, and go on as a forward without a cache would."""
    ids, mask, _ = prompts()
    rejected, original = [], EmulatedDecoding._round

    def checked(self, session, call, block):
        before = call.answer.shape[1]
        original(self, session, call, block)
        if call.finished:
            return
        accepted = call.answer.shape[1] - 1  # the last token is drawn, and not yet fed
        rejected.append(accepted < before + block)
        for i, track in enumerate(session.tracks):
            assert track.cache.get_seq_length() == track.length
            lag = accepted - track.answered
            assert lag == 0 or (i == self.drafting and lag == 1)
            fresh = track.member.begin(track.prompt, track.mask, cached=False).logits(call.answer)
            again = track.fork(torch.arange(len(ids))).logits(call.answer)
            torch.testing.assert_close(again, fresh, atol=1e-5, rtol=0)

    monkeypatch.setattr(EmulatedDecoding, "_round", checked)
    answers(emulated(models, block_size=4), ids, mask, count=14)
    assert any(rejected)


# ---- a base with its adapter on and off -----------------------------------------------------------------------------


def adapted(seed=0):
    from peft import LoraConfig, get_peft_model

    bare = quiet(tiny_llama(2))
    sharpened(bare)
    torch.manual_seed(seed)
    model = get_peft_model(bare, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.eval()


def test_an_adapter_is_a_pair_in_one(models):
    """Off, the logits are the bare base's bit for bit; afterwards the adapter is as it was; the base is held once."""
    bare = quiet(tiny_llama(2))
    sharpened(bare)
    model = adapted()
    ids, mask, _ = prompts()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = model(input_ids=ids, attention_mask=mask).logits
    with View(model, adapter=False).active() as off:
        assert torch.equal(
            off(input_ids=ids, attention_mask=mask).logits, bare(input_ids=ids, attention_mask=mask).logits
        )
    decoding = emulated({"anchor": models["anchor"], "tuned": model}, deltas=[{"tuned": "tuned"}])
    answers(decoding, ids, mask)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    held = {p.data_ptr(): p.numel() for m in decoding.members for p in m.module.parameters()}
    apart = sum(p.numel() for m in (models["anchor"], model) for p in m.parameters())
    assert sum(held.values()) == apart
    separate = emulated({"anchor": models["anchor"], "tuned": model, "reference": bare})
    assert torch.equal(answers(decoding, ids, mask), answers(separate, ids, mask))


def test_an_adapter_is_put_back_after_an_exception():
    model = adapted()
    ids, mask, _ = prompts()
    before = model(input_ids=ids, attention_mask=mask).logits
    with pytest.raises(KeyError), View(model, adapter=False).active():
        raise KeyError("stop")
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


def test_two_adapters_on_one_base(models):
    """Two behaviours over one base, interpolated: as two models of their own."""
    from peft import LoraConfig

    model = adapted()
    torch.manual_seed(9)
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids, mask, _ = prompts()
    views = {"one": View(model, "default"), "two": View(model, "other"), "off": View(model, adapter=False)}
    deltas = [{"tuned": n, "reference": "off", "weight": w} for n, w in (("one", 0.3), ("two", 0.7))]
    decoding = emulated({"anchor": models["anchor"], **views}, deltas=deltas)
    logits = [m.forward(ids, mask)[0] for m in decoding.members]
    assert len(logits) == 4
    wanted = combine(logits[0], [logits[1], logits[3]], [logits[2]] * 2, [0.3, 0.7])
    torch.testing.assert_close(decoding(input_ids=ids, attention_mask=mask).logits, wanted)
    assert model.active_adapter == "default"


# ---- through transformers' generate ---------------------------------------------------------------------------------


def test_each_token_is_fed_once(models):
    """The prompt once per member, then one token per member and step."""
    ids, mask, _ = prompts()
    decoding = emulated(models)
    answers(decoding, ids, mask, count=6)
    assert set(decoding.summary()["tokens"].values()) == {ids.numel() + 5 * len(ids)}
    assert set(decoding.summary()["calls"].values()) == {6}


def test_several_answers_to_a_prompt_share_its_prefill(models):
    ids, mask, _ = prompts()
    decoding = emulated(models)
    torch.manual_seed(0)
    out = answers(decoding, ids, mask, count=4, do_sample=True, num_return_sequences=3)
    assert out.shape == (9, 4)
    prefill, rest = len(ids) * (ids.shape[1] - 1), 9 * 4
    assert set(decoding.summary()["tokens"].values()) == {prefill + rest}
    greedy = answers(decoding, ids, mask, count=4)
    tripled = decoding.begin(ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), repeats=3)
    first = tripled.scores(ids[:, :0].repeat_interleave(3, 0)).argmax(-1)
    assert first.tolist() == greedy[:, 0].repeat_interleave(3).tolist()


def test_end_tokens_streamers_and_outputs(models):
    """Rows end at their end token and are padded; a streamer gets the prompt and each token, blocks or not."""

    class Kept:
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value)

        def end(self):
            self.ended = True

    ids, mask, _ = prompts()
    free = answers(emulated(models), ids, mask, count=12)
    end = int(free[0, 3])
    for block in (None, 4):
        decoding = emulated(models, block_size=block)
        out = answers(decoding, ids, mask, count=12, eos_token_id=end, pad_token_id=258)
        for row, whole in zip(out, free):
            stop = (whole == end).nonzero().flatten()
            length = int(stop[0]) + 1 if len(stop) else len(whole)
            assert row[:length].tolist() == whole[:length].tolist()
            assert set(row[length:].tolist()) <= {258}
        kept = Kept()
        alone = ids[:1, 2:] if mask[0, 2] else ids[:1]
        got = answers(decoding, alone, count=5, streamer=kept)
        assert torch.cat([p.reshape(-1) for p in kept.pieces]).tolist() == [*alone[0].tolist(), *got[0].tolist()]
        assert kept.ended


def test_as_a_logits_processor(models):
    """The same answers where the anchor generates and the others step inside a processor; rebuilt when it must be."""
    from pegbox.decode.processor import EmulatedLogits

    ids, mask, _ = prompts()
    decoding = emulated(models, top_p=0.9)
    wanted = answers(decoding, ids, mask)
    processor = EmulatedLogits(decoding, mask)
    for _ in range(2):  # the second call begins anew
        assert torch.equal(answers(models["anchor"], ids, mask, logits_processor=[processor]), wanted)
    calls = decoding.summary()["calls"]["tuned"]
    scores = models["anchor"](input_ids=ids, attention_mask=mask).logits[:, -1]
    other = ids.roll(1, 0)
    processor(other, scores)
    assert decoding.summary()["calls"]["tuned"] == calls + 1
    with pytest.raises(BadInput, match="num_beams"):
        answers(models["anchor"], ids, mask, logits_processor=[processor], num_beams=2)
    with pytest.raises(BadInput, match="left"):
        EmulatedLogits(decoding, mask.flip(-1))


def test_messages_streams_and_own_prompts(models):
    """Through pegbox's generation: the host's template, and members that read the messages in a form of their own."""
    from pegbox.parts.generation import generate, stream

    speaker = tokenizer()
    messages = [[{"role": "user", "content": text}] for text in ("hi", "how are you")]
    plain = emulated(models, tokenizer=speaker)
    texts = generate(plain, speaker, messages, max_new_tokens=6)
    assert "".join(stream(plain, speaker, messages[1], max_new_tokens=6)) == texts[1]
    framed = emulated(models, tokenizer=speaker, prompts={"anchor": "Q: {prompt}\nA:"})
    found = framed.member_prompts(messages[0])
    assert speaker.decode(found["anchor"]) == "Q: hi\nA:"
    assert generate(framed, speaker, messages, max_new_tokens=6) != texts
    alone = [generate(framed, speaker, [m], max_new_tokens=6)[0] for m in messages]
    assert generate(framed, speaker, messages, max_new_tokens=6) == alone
    same = emulated(models, tokenizer=speaker, prompts={"anchor": "template", "tuned": "template"})
    assert generate(same, speaker, messages, max_new_tokens=6) == texts
    ids, mask, _ = prompts()
    with pytest.raises(BadInput, match="form"):
        answers(framed, ids, mask)
    with pytest.raises(BadInput, match="common text"):
        framed(input_ids=ids)


def test_likelihood_of_an_answer(models):
    """The sum of the combination's log-probabilities over the answer's tokens, padded batches included."""
    decoding = emulated(models)
    asked, said = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    got = decoding.log_likelihood(asked, said)
    for i, (p, a) in enumerate(zip(asked, said)):
        logits = decoding(input_ids=torch.tensor([p + a])).logits[0]
        wanted = sum(logits[len(p) + j - 1, token] for j, token in enumerate(a))
        assert abs(float(got[i] - wanted)) < 1e-4


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_other_tokenizers_are_refused_with_the_first_token_that_differs(models):
    other = tokenizer()
    other.add_tokens(["<new>"])
    model = View(models["tuned"], tokenizer=other)
    with pytest.raises(BadInput, match="'<new>' is None to the first and 260"):
        emulated({**models, "tuned": model}, tokenizer=tokenizer())


def test_padded_vocabularies_are_cut_and_short_ones_refused(models):
    """Ids behind the tokenizer's are cut; a model that lacks ids that are in use is refused."""
    wide = cast(vocabulary=300)
    ids, mask, _ = prompts()
    mixed = {**models, "anchor": wide["anchor"]}
    decoding = emulated(mixed, tokenizer=tokenizer())
    assert decoding(input_ids=ids).logits.shape[-1] == 288
    assert int(answers(decoding, ids, mask).max()) < 288
    narrow = cast(vocabulary=256, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    with pytest.raises(BadInput, match="256 logits"):
        emulated({**models, "tuned": narrow["tuned"]}, tokenizer=tokenizer())
    with pytest.raises(BadInput, match="vocabularies differ"):
        emulated(mixed)


def test_a_delta_needs_a_reference(models):
    with pytest.raises(BadInput, match="reference"):
        emulated(models, deltas=[{"tuned": "tuned"}])
    with pytest.raises(BadInput, match="No model has the role 'tunde'"):
        emulated(models, deltas=[{"tuned": "tunde", "reference": "reference"}])


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"deltas": []}, "deltas"),
        ({"deltas": [{"weight": float("nan")}]}, "weight"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"block_size": 0}, "block_size"),
        ({"draft": "tuned"}, "block_size"),
        ({"prompts": {"nobody": "raw"}}, "nobody"),
        ({"deltas": [{"weight": 1.0}, {"weight": -1.0}], "top_p": 0.5}, "sum to 0"),
        ({"deltas": [{"weigth": 1.0}]}, "weigth"),
    ],
)
def test_bad_settings(block, words):
    with pytest.raises(BadInput, match=words):
        DECODE.validate({"kind": "emulated", **block})


@pytest.mark.parametrize("block", [None, 2])
def test_beams_are_refused(models, block):
    ids, mask, _ = prompts()
    with pytest.raises(Unsupported, match="num_beams"):
        answers(emulated(models, block_size=block), ids, mask, num_beams=2)


def test_right_padding_is_refused(models):
    ids, mask, _ = prompts()
    with pytest.raises(BadInput, match="left"):
        answers(emulated(models), ids, mask.flip(-1))


def test_a_prompt_beyond_a_members_context_is_refused(models):
    short = {**models, "tuned": quiet(tiny_llama(2, max_position_embeddings=8))}
    ids, mask, _ = prompts((9,))
    with pytest.raises(BadInput, match="'tuned' no room"):
        answers(emulated(short), ids, mask)


def test_members_with_an_encoder_are_refused(models):
    from transformers import T5Config, T5ForConditionalGeneration

    small = {"vocab_size": 288, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**small))
    with pytest.raises(Unsupported, match="encoder"):
        emulated({**models, "tuned": model})


def test_members_in_training_mode_are_evaluated_and_put_back(models):
    """With dropout, training mode would change the answers; afterwards each module is in the mode it was in."""
    noisy = cast(attention_dropout=0.5)
    ids, mask, _ = prompts()
    wanted = answers(emulated(noisy), ids, mask)
    noisy["tuned"].train()
    assert torch.equal(answers(emulated(noisy), ids, mask), wanted)
    assert noisy["tuned"].training
    assert not noisy["anchor"].training


def test_sliding_caches_are_not_taken_back(models):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 288, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=6)
    model = quiet(MistralForCausalLM(config))
    ids, _, _ = prompts((9,))
    found = {**models, "anchor": model}
    assert answers(emulated(found), ids, count=4).shape == (1, 4)
    with pytest.raises(Unsupported, match="block_size"):
        answers(emulated(found, block_size=3), ids, count=12)


def test_prompt_adapters_are_refused(models):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_llama(2), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(Unsupported, match="prompt adapter"):
        emulated({**models, "tuned": model})


def test_a_members_counts():
    member = Member(quiet(tiny_llama()), "one")
    ids, mask, _ = prompts((4, 4))
    member.begin(ids, mask).logits(ids[:, :0])
    assert (member.calls, member.tokens) == (1, 8)


def test_a_context_without_models_names_the_role():
    with pytest.raises(BadInput, match="--role tuned"):
        DECODE.validate("emulated").bind(DecodeContext(quiet(tiny_llama())))
