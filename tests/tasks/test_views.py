"""Model views: hidden rows without logits, through wrappers and adapters; targets; classifiers."""

import os

import pytest
import torch

from pegbox.errors import Unsupported
from pegbox.parts.view import ModelView
from pegbox.tasks.views import CausalView, ClassificationView
from pegbox.testing import tiny_llama


def batch_of(rows=2, length=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (rows, length), generator=g)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def lora(model, **options):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **options))


def same(view, batch):
    hidden, logits = view.hidden(batch), view.logits(batch)
    assert hidden.shape[:2] == batch["input_ids"].shape
    return torch.equal(view.head(hidden), logits)


def test_it_is_a_model_view(llama):
    assert isinstance(CausalView(llama), ModelView)
    assert isinstance(ClassificationView(llama), ModelView)


def test_head_of_hidden_is_logits_and_rows_may_be_sliced(llama):
    view, batch = CausalView(llama), batch_of()
    assert same(view, batch)
    hidden = view.hidden(batch)
    assert torch.allclose(view.head(hidden[0, 2:5]), view.logits(batch)[0, 2:5], atol=1e-6)
    assert view.vocabulary == 288


def test_the_head_is_not_run_and_is_put_back(llama):
    view, before = CausalView(llama), dict(llama.lm_head.__dict__)
    calls = []
    handle = llama.lm_head.register_forward_hook(lambda m, a, out: calls.append(tuple(out.shape)))
    view.hidden(batch_of())
    handle.remove()
    assert calls == [(2, 9, 1)]
    assert "forward" not in llama.lm_head.__dict__
    assert set(llama.lm_head.__dict__) == set(before)
    with pytest.raises(ValueError, match="exactly one"):
        view.hidden({**batch_of(), "input_ids": None})
    assert "forward" not in llama.lm_head.__dict__


def test_adapters_on_the_head_count(llama):
    for options in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        model = lora(tiny_llama(), **options)
        if "modules_to_save" in options:
            with torch.no_grad():
                model.get_output_embeddings().modules_to_save["default"].weight.mul_(2)
        view, batch = CausalView(model), batch_of()
        assert view.head_parameters
        assert same(view, batch)
        base = torch.equal(tiny_llama()(**view.inputs(batch)).logits, view.logits(batch))
        assert not base
        with model.disable_adapter():
            assert same(view, batch)
            assert torch.equal(view.logits(batch), tiny_llama()(**view.inputs(batch)).logits)
    assert CausalView(lora(tiny_llama(), target_modules=["q_proj"])).head_parameters == []


def test_prompts_in_front_are_left_out(llama):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    view, batch = CausalView(model), batch_of()
    assert view.logits(batch).shape == (2, 9, 288)
    assert same(view, batch)


def test_gradients_equal_the_models_own(llama):
    for checkpointing in (False, True):
        model, batch = tiny_llama(), batch_of()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        view = CausalView(model)
        view.head(view.hidden(batch)).square().sum().backward()
        ours = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        view.logits(batch).square().sum().backward()
        assert all(torch.allclose(p.grad, ours[n], rtol=1e-5, atol=1e-6) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "family", ["gemma2", "cohere", "granite", "gpt2", "opt", "gpt_neox", "falcon_h1", "qwen2", "olmoe"]
)
def test_what_models_do_to_their_logits(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    extra = {
        "gemma2": {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 0.5},
        "cohere": {"logit_scale": 0.25, "num_key_value_heads": 2},
        "granite": {"logits_scaling": 7.0, "num_key_value_heads": 2},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1},
        "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
        "falcon_h1": {
            "lm_head_multiplier": 3.0,
            "num_key_value_heads": 2,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
        },
        "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
        "qwen2": {"num_key_value_heads": 2},
    }.get(family, {})
    config = AutoConfig.for_model(family, **(sizes if family != "gpt2" else {"vocab_size": 97}), **extra)
    config.pad_token_id = 0
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = {"input_ids": torch.randint(1, 97, (2, 7))}
    view = CausalView(model)
    with torch.no_grad():
        assert torch.allclose(view.head(view.hidden(batch)), view.logits(batch), rtol=1e-5, atol=1e-6)


def test_autocast_around_the_forward_alone_reaches_the_head(llama):
    """Accelerate wraps the model's forward only; the head then must not run in full precision."""
    forward = llama.forward

    def wrapped(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(*args, **kwargs)

    llama.forward = wrapped
    view, batch = CausalView(llama), batch_of()
    assert view.head(view.hidden(batch)).dtype == torch.bfloat16
    llama.__dict__.pop("forward")


def test_side_keys_stay_out_of_the_forward(llama):
    view = CausalView(llama)
    batch = {**batch_of(), "sample_ids": torch.arange(2), "sample_weight": torch.ones(2), "corrupted_ids": None}
    assert set(view.inputs(batch)) == {"input_ids", "attention_mask"}
    assert same(view, batch)


def test_packed_sequences_are_independent(llama):
    view, whole = CausalView(llama.eval()), batch_of(1, 10)
    ids = whole["input_ids"]
    packed = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]),
        "sequence_ids": torch.tensor([[0] * 4 + [1] * 6]),
    }
    alone = {"input_ids": ids[:, 4:], "labels": ids[:, 4:]}
    assert torch.allclose(view.hidden(packed)[:, 4:], view.hidden(alone), atol=1e-5)
    targets, valid = view.targets(packed)
    assert not valid[0, 3]
    assert valid.sum() == 8
    assert torch.equal(targets[0, 4:9], view.targets(alone)[0][0, :5])


def test_a_model_without_output_embedding_is_refused(llama):
    with pytest.raises(Unsupported, match="no output embedding"):
        CausalView(llama.model)


@pytest.mark.parametrize("unused", [False, True])
def test_distributed_wrapper(unused, tmp_path):
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, batch = tiny_llama(), batch_of()
        wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
        for _ in range(2):
            model.zero_grad()
            view = CausalView(wrapped)
            view.head(view.hidden(batch)).square().mean().backward()
        ours = model.lm_head.weight.grad.clone()
        model.zero_grad()
        CausalView(model).logits(batch).square().mean().backward()
        assert torch.allclose(ours, model.lm_head.weight.grad, atol=1e-6)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("family", ["bert", "llama", "roberta"])
def test_classifiers(family):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        family, vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.tensor([[5, 6, 7, 0, 0], [4, 3, 2, 9, 8]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([2, -100])}
    view = ClassificationView(model)
    hidden = view.hidden(batch)
    assert hidden.shape == (2, 1, 16)
    assert torch.allclose(view.head(hidden[:, 0]), view.logits(batch), atol=1e-6)
    targets, valid = view.targets(batch)
    assert targets.tolist() == [[2], [0]]
    assert valid.tolist() == [[True], [False]]
