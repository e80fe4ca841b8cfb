"""Statistics against closed forms: padding, sharing, units of gradients, files, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pegbox.errors import BadInput, Corrupt
from pegbox.parts.statistics import Statistics, StatSpec, collect
from pegbox.testing import tiny_llama

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"


def rows(count=4, length=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, length + 1, (count,), generator=generator)
    ids = torch.randint(0, 256, (count, length), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    labels = ids.masked_fill(~mask, -100)
    return {"input_ids": ids.masked_fill(~mask, 258), "attention_mask": mask.long(), "labels": labels}


def alone(batch):
    """The same sequences, one per batch, without padding."""
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]):
        yield {
            "input_ids": ids[mask][None],
            "attention_mask": torch.ones(1, int(mask.sum())),
            "labels": labels[mask][None],
        }


def spec(*kinds, **options):
    return StatSpec(kinds, dtype="float64", **options)


def summed_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


@pytest.fixture
def model():
    return tiny_llama().double()


INPUTS = ("input_mean", "input_abs", "input_norm", "input_unit_norm", "input_covariance")


@pytest.mark.parametrize("weigh", ["token", "sequence"])
@pytest.mark.parametrize("normalize", ["none", "abs_max", "signed_max"])
def test_padding_and_batching_do_not_count(model, weigh, normalize):
    batch = rows()
    wanted = spec(*INPUTS, weigh=weigh, normalize=normalize)
    together, single = collect(model, wanted, [batch]), collect(model, wanted, list(alone(batch)))
    assert together.tokens == single.tokens == int(batch["attention_mask"].sum())
    assert together.sequences == single.sequences == 4
    for kind in INPUTS:
        for name, value in together[kind].items():
            torch.testing.assert_close(value, single[kind][name], rtol=1e-6, atol=1e-9)  # norms run in float32


def test_inputs_against_the_formulas(model):
    ids = torch.arange(12).view(1, 12)
    seen = []
    handle = model.get_submodule(UP).register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    model(input_ids=ids)
    handle.remove()
    x = seen[0]
    stats = collect(model, spec(*INPUTS), [{"input_ids": ids}])
    torch.testing.assert_close(stats["input_mean"][UP], x.mean(0))
    torch.testing.assert_close(stats["input_abs"][UP], x.abs().mean(0))
    torch.testing.assert_close(stats["input_norm"][UP], x.square().mean(0).sqrt())
    torch.testing.assert_close(stats["input_covariance"][UP], x.T @ x / 12)
    scaled = collect(model, spec("input_covariance", weigh="sequence", normalize="signed_max"), [{"input_ids": ids}])
    torch.testing.assert_close(scaled["input_covariance"][UP], x.T @ x / x.max() ** 2)


def test_a_heads_norm_is_taken_per_token(model):
    o, down = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"
    seen = {}
    for name in (o, down):
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0][0]}))
    ids = torch.arange(12).view(1, 12)
    model(input_ids=ids)
    wanted = dict(seen)
    stats = collect(model, spec("input_unit_norm"), [{"input_ids": ids}])
    torch.testing.assert_close(stats["input_unit_norm"][o], wanted[o].view(12, 4, 8).norm(dim=-1).mean(0))
    torch.testing.assert_close(stats["input_unit_norm"][down], wanted[down].abs().mean(0))


def test_layers_with_one_input_share_one_tensor(model):
    stats = collect(model, spec("input_covariance"), [rows()])
    c = stats["input_covariance"]
    block = "model.layers.0.self_attn."
    assert c[block + "q_proj"] is c[block + "k_proj"] is c[block + "v_proj"]
    assert c["model.layers.0.mlp.gate_proj"] is c["model.layers.0.mlp.up_proj"]
    assert c[block + "q_proj"] is not c[block + "o_proj"]
    assert c[block + "q_proj"] is not c["model.layers.1.self_attn.q_proj"]
    assert stats.nbytes() == 2 * (32 * 32 * 3 + 64 * 64) * 8


def test_repeating_a_sequence_and_the_order_change_nothing(model):
    one = {"input_ids": torch.arange(20).view(1, 20)}
    wanted = spec("input_covariance", weigh="sequence", normalize="abs_max", batches=64)
    single, repeated = collect(model, wanted, [one]), collect(model, wanted, [one] * 64)
    torch.testing.assert_close(single["input_covariance"][UP], repeated["input_covariance"][UP])
    several = list(alone(rows()))
    forward, backward = collect(model, wanted, several), collect(model, wanted, several[::-1])
    difference = (forward["input_covariance"][UP] - backward["input_covariance"][UP]).norm()
    assert difference < 1e-6 * forward["input_covariance"][UP].norm()


def test_gradients_per_batch_are_autograds(model):
    batch = rows()
    stats = collect(model, spec("gradient_sum", "gradient_square", "gradient_abs"), [batch], loss=summed_loss)
    summed_loss(model, batch).backward()
    for name in (Q, UP):
        grad = model.get_parameter(name + ".weight").grad
        torch.testing.assert_close(stats["gradient_sum"][name + ".weight"], grad, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(stats["gradient_square"][name + ".weight"], grad**2, rtol=1e-5, atol=1e-10)
        torch.testing.assert_close(stats["gradient_abs"][name + ".weight"], grad.abs(), rtol=1e-5, atol=1e-8)


def test_gradients_per_sample_are_those_of_single_samples(model):
    batch = rows()
    stats = collect(model, spec("gradient_square", per="sample"), [batch], loss=summed_loss)
    squares = 0
    for single in alone(batch):
        model.zero_grad()
        summed_loss(model, single).backward()
        squares = squares + model.get_parameter(UP + ".weight").grad ** 2
    torch.testing.assert_close(stats["gradient_square"][UP + ".weight"], squares / 4, rtol=1e-5, atol=1e-10)


def test_gradients_per_token_and_of_biases():
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).double()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

    x = torch.randn(2, 7, 3, dtype=torch.float64)

    def loss(model, batch):
        return model(batch["x"]).square().sum()

    wanted = spec("gradient_square", "gradient_abs", per="token", targets=("net.1",))
    stats = collect(Wrapped(), wanted, [{"x": x}], loss=loss)
    h = net[0](x)
    g = 2 * net[1](h)
    each = (g[..., :, None] * h[..., None, :]).flatten(0, 1)
    torch.testing.assert_close(stats["gradient_square"]["net.1.weight"], each.square().mean(0).detach())
    torch.testing.assert_close(stats["gradient_abs"]["net.1.weight"], each.abs().mean(0).detach())
    torch.testing.assert_close(stats["gradient_square"]["net.1.bias"], g.square().flatten(0, 1).mean(0).detach())


def test_transposed_weights_get_their_own_layout():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=288, n_embd=16, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    batch = rows()
    stats = collect(model, StatSpec(("gradient_sum",)), [batch], loss=summed_loss)
    summed_loss(model, batch).backward()
    name = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(stats["gradient_sum"][name], model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_frozen_and_wrapped_models_work_and_come_back_as_they_were(model):
    import peft

    batch = rows()
    expected = collect(model, spec("gradient_sum"), [batch], loss=summed_loss)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    wrapped.train()
    flags = {n: p.requires_grad for n, p in wrapped.named_parameters()}
    stats = collect(wrapped, spec("gradient_sum"), [batch], loss=summed_loss)
    torch.testing.assert_close(stats["gradient_sum"][Q + ".weight"], expected["gradient_sum"][Q + ".weight"])
    assert {n: p.requires_grad for n, p in wrapped.named_parameters()} == flags
    assert all(m.training for m in wrapped.modules())
    assert all(p.grad is None for p in wrapped.parameters())
    assert not any(m._forward_hooks for m in wrapped.modules())


def test_the_models_own_loss_is_the_default(model):
    assert collect(model, spec("gradient_sum"), [rows()])["gradient_sum"][UP + ".weight"].abs().max() > 0


def test_encoder_decoder_uses_each_sides_mask():
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model("t5", vocab_size=288, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    config.decoder_start_token_id = 0
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    source, target = rows(length=10), rows(length=6, seed=1)
    batch = {
        "input_ids": source["input_ids"],
        "attention_mask": source["attention_mask"],
        "decoder_input_ids": target["input_ids"],
        "decoder_attention_mask": target["attention_mask"],
    }
    stats = collect(model, StatSpec(("input_covariance",)), [batch])
    key, query = (f"decoder.block.0.layer.1.EncDecAttention.{r}" for r in "kq")
    keep = batch["attention_mask"].bool()
    seen = model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    x = seen[keep].detach()
    torch.testing.assert_close(stats["input_covariance"][key], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert stats["input_covariance"][query] is not stats["input_covariance"][key]


def test_save_and_load_keep_sharing(model, tmp_path):
    stats = collect(model, spec("input_covariance", "input_norm"), [rows()])
    stats.save(tmp_path / "stats.safetensors")
    again = Statistics.load(tmp_path / "stats.safetensors")
    assert (again.sequences, again.tokens, again.fingerprint) == (stats.sequences, stats.tokens, stats.fingerprint)
    assert again.nbytes() == stats.nbytes()
    for kind in stats:
        assert all(torch.equal(t, again[kind][n]) for n, t in stats[kind].items())
    (tmp_path / "stats.safetensors").write_bytes(b"x")
    with pytest.raises(Corrupt, match="statistics file"):
        Statistics.load(tmp_path / "stats.safetensors")


def test_fingerprints_tell_models_apart(model):
    mark = collect(model, spec("input_norm"), [rows()]).fingerprint
    assert mark == collect(model, spec("input_norm"), [rows(seed=2)]).fingerprint
    assert mark != collect(tiny_llama(1).double(), spec("input_norm"), [rows()]).fingerprint


def test_layers_that_never_run_are_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    stats = collect(Half(), StatSpec(("input_norm",), targets=("used", "idle")), [{"x": torch.ones(1, 2, 3)}])
    assert stats.missing == ("idle",)
    assert list(stats["input_norm"]) == ["used"]


def test_refusals(model):
    with pytest.raises(BadInput, match="Did you mean 'input_norm'"):
        StatSpec(("input_norms",))
    with pytest.raises(BadInput, match="at least one kind"):
        StatSpec(())
    with pytest.raises(BadInput, match="No calibration batch"):
        collect(model, spec("input_norm"), [])
    with pytest.raises(BadInput, match=r"linear layers; 'model.norm'"):
        collect(model, spec("input_norm", targets=("model.norm",)), [rows()])
    unlabelled = {key: value for key, value in rows().items() if key != "labels"}
    with pytest.raises(BadInput, match="need a loss"):
        collect(model, spec("gradient_sum"), [unlabelled])
    with torch.no_grad():
        model.get_submodule(Q).weight[0, 0] = float("inf")
    with pytest.raises(BadInput, match=r"'model.layers.0.self_attn.o_proj' are not finite"):
        collect(model, spec("input_norm"), [rows()])
