"""Decoders over every form that a tuned model can have: each cell answers as it does over the same models held apart.

The update's form must not matter to a decoder: adapters share their base with the reference, full updates stand alone,
packed bases are shared by both.
"""

import os

import pytest
import torch

import pegbox
from pegbox.ask import open_any
from pegbox.decode.base import DECODE, DecodeContext
from pegbox.parts.generation import generate
from pegbox.recipe import Role
from pegbox.testing import tiny_llama, tiny_tokenizer

FORMS = {
    "lora": {"tuner": {"kind": "lora", "r": 4, "target_modules": "all-linear"}},
    "ia3": {
        "tuner": {
            "kind": "ia3",
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        }
    },
    "sparse": {"tuner": {"kind": "sparse"}, "select": {"kind": "random", "budget": {"density": 0.05}}},
    "bypass": {
        "tuner": {"kind": "sparse", "execution": "bypass"},
        "select": {"kind": "magnitude", "budget": {"density": 0.05}},
    },
    "full": {"tuner": {"kind": "full"}},
    "packed": {"tuner": {"kind": "lora", "r": 4, "target_modules": "all-linear"}, "prepare": [{"kind": "nf4"}]},
}
REWARD = f"{__file__}:vowels"
DECODERS = {
    "plain": {"kind": "emulated"},
    "filter": {"kind": "emulated", "top_p": 0.7, "deltas": [{"weight": 1.5}]},
    "blocks": {"kind": "emulated", "block_size": 3},
    "transfer": {"kind": "transfer_q", "baseline": "tuned", "reward": REWARD, "k": 3, "horizon": 2, "alpha": 0.1},
}
ASK = [[{"role": "user", "content": text}] for text in ("hello", "what is it?")]


def vowels(prompts, completions):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for name, sizes in (("base", {}), ("large", {"hidden_size": 48})):
        model = tiny_llama(3, **sizes)
        model.get_output_embeddings().weight.data.mul_(8.0)
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    os.environ["PEGBOX_CACHE"] = str(folder / "cache")
    return folder


@pytest.fixture(scope="module")
def tuned(place):
    """Form -> a run of it, made when first asked for."""
    made = {}

    def run(form):
        if form not in made:
            made[form] = pegbox.train(
                {"title": form, "optim": {"kind": "adamw", "lr": 0.02}, **FORMS[form]},
                model=str(place / "base"),
                data={"path": "network", "limit": 6, "families": ["subnet"]},
                out=place / form,
                suites=[],
                steps=3,
                batch=2,
                micro_batch=2,
                max_length=400,
                eval_split=0.0,
            )
        return made[form]

    return run


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("form", FORMS)
def test_cell(form, decoder, place, tuned):
    run = tuned(form)
    roles = {"tuned": Role(of=str(run.path))}
    model, tokenizer = open_any(str(place / "large"), decode=DECODERS[decoder], roles=roles)
    answers = generate(model, tokenizer, ASK, max_new_tokens=5)

    anchor, _ = open_any(str(place / "large"))
    apart = {"tuned": run.model()[0], "tuned.base": run.model()[0]}
    if form == "full":
        apart["tuned.base"] = open_any(str(place / "base"))[0]
    else:
        from pegbox.decode.pairs import View

        apart["tuned.base"] = View(apart["tuned.base"], adapter=False)
    again = DECODE.validate(DECODERS[decoder]).bind(DecodeContext(anchor, tokenizer, apart))
    assert generate(again, tokenizer, ASK, max_new_tokens=5) == answers
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize("form", FORMS)
def test_a_tuned_run_in_its_own_decoder(form, place, tuned):
    """The run itself as anchor with a delta of itself: twice the tuning; its own base again with weight -1."""
    run = tuned(form)
    roles = {"tuned": Role(of=str(run.path))}
    block = {"kind": "emulated", "deltas": [{"weight": -1.0}]}
    undone, tokenizer = open_any(str(run.path), decode=block, roles=roles)
    base = undone.members[-1]
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    wanted = base.forward(ids, None)[0].log_softmax(-1)
    assert torch.allclose(undone(input_ids=ids).logits, wanted, atol=1e-3)
    assert generate(undone, tokenizer, ASK, max_new_tokens=3)


def test_scaling_composes_with_the_forms(place, tuned):
    """Another decoder of the axis through the same seam: alpha 1 is the tuned model itself."""
    for form in ("lora", "full"):
        run = tuned(form)
        scaled, tokenizer = open_any(str(run.path), decode={"kind": "scaled", "alpha": 1.0})
        plain, _ = open_any(str(run.path))
        assert generate(scaled, tokenizer, ASK, max_new_tokens=4) == generate(plain, tokenizer, ASK, max_new_tokens=4)
