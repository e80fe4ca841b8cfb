"""Leaves of scattered entries: what SaRA's optimizer must hold, whatever the tensors, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pegbox.errors import BadInput, Corrupt, WrongBase
from pegbox.optim.sparse_leaves import SparseAdamW, default_rate, sara_adamw, smallest_entries, whole
from pegbox.parts import deltas
from pegbox.parts.penalties import nuclear_norm
from pegbox.parts.thresholds import quantile_threshold
from pegbox.parts.values import load_values, mixed, save_values


class Net(nn.Module):
    """A convolution, a norm, an embedding tied to the head."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(8) * 0.1)
        self.to(dtype)

    def forward(self, ids):
        x = self.embed(ids)
        x = self.norm(torch.tanh(self.conv(x.mT).mT) * self.scale)
        return self.head(x)


IDS = torch.randint(0, 12, (6, 5), generator=torch.Generator().manual_seed(1))


def loss_of(net, ids=IDS):
    return nn.functional.cross_entropy(net(ids).flatten(0, 1).float(), ids.roll(1, 1).flatten())


def train(net, optimizer, steps=3):
    for _ in range(steps):
        loss_of(net).backward()
        optimizer.step()


def weights(net):
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def plain(net, **options):
    return sara_adamw(net, **{"density": 0.3, "lr": 1e-2, "lambda_rank": 0.0, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_attaching_changes_nothing_and_training_only_what_is_chosen(dtype):
    """1. The first forward is the base's, and entries outside M stay bit for bit."""
    net = Net(dtype)
    before, base = net(IDS), weights(net)
    optimizer = plain(net)
    assert torch.equal(net(IDS), before)
    train(net, optimizer)
    moved = 0
    for name, p in net.named_parameters():
        outside = torch.ones(p.numel(), dtype=torch.bool)
        if name in optimizer.leaves:
            outside[optimizer.leaves[name].index.long()] = False
        assert torch.equal(p.detach().flatten()[outside], base[name].flatten()[outside])
        moved += int((p.detach() != base[name]).sum())
    assert moved > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_chosen_is_dense_adamw_bit_for_bit(dtype):
    """2. density 1, lambda 0, no second stage."""
    nets = [Net(dtype), Net(dtype)]
    dense = torch.optim.AdamW(nets[0].parameters(), lr=1e-2, weight_decay=0.1)
    sparse = plain(nets[1], density=1.0, weight_decay=0.1)
    assert sum(x.index.numel() for x in sparse.leaves.values()) == sum(p.numel() for p in nets[1].parameters())
    for _ in range(10):
        for net, optimizer in zip(nets, (dense, sparse)):
            loss_of(net).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


def test_leaves_get_the_dense_gradient_and_the_model_keeps_none():
    """3. Exactly grad[M], over three micro-batches too; after backward no parameter has a gradient."""
    dense, net = Net(), Net()
    optimizer = plain(net)
    for ids in IDS.chunk(3):
        loss_of(dense, ids).backward()
        loss_of(net, ids).backward()
        assert all(p.grad is None for p in net.parameters())
    want = dict(dense.named_parameters())
    for name, leaf in optimizer.leaves.items():
        assert torch.equal(leaf.values.grad, want[name].grad.flatten()[leaf.index.long()])


def test_state_and_gradients_have_the_size_of_the_selection():
    """4. 2 |M| 4 bytes of state and |M| numbers of gradient."""
    net = Net()
    optimizer = plain(net)
    loss_of(net).backward()
    count = sum(x.index.numel() for x in optimizer.leaves.values())
    assert sum(x.values.grad.nbytes for x in optimizer.leaves.values()) == 4 * count
    optimizer.step()
    assert sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim) == 8 * count


def test_an_empty_mask_costs_no_gradient():
    net = Net()
    optimizer = plain(net, density=None, threshold=0.05)
    assert "norm.weight" not in optimizer.leaves  # ones
    assert not net.norm.weight.requires_grad
    assert net.norm.bias.requires_grad  # zeros are below any threshold
    assert "norm.bias" not in plain(Net(), density=None, threshold=0.05, exclude_zeros=True).leaves


def test_the_rank_gradient_is_that_of_the_nuclear_norm():
    """5. Finite differences to 1e-6 in float64; only on M; alone it lowers the norm monotonically."""
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    _, slope = nuclear_norm(x)
    for i, j in ((0, 0), (2, 3), (4, 1)):
        step = torch.zeros_like(x)
        step[i, j] = 1e-6
        rise = (nuclear_norm(x + step)[0] - nuclear_norm(x - step)[0]) / 2e-6
        assert float(rise) == pytest.approx(float(slope[i, j]), abs=1e-6)
    low = torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)
    norm, slope = nuclear_norm(low)
    assert torch.isfinite(slope).all()
    assert float((slope * low).sum()) == pytest.approx(float(norm), rel=1e-9)  # <UV^T, X> = |X|_*
    assert torch.linalg.matrix_rank(slope) == 2
    w = nn.Parameter(torch.randn(12, 10) * 0.1)
    base = w.detach().clone()
    optimizer = sara_adamw([("w", w)], 0.1, lr=1e-4, lambda_rank=1.0, min_side=4, weight_decay=0.0)
    index, norms = optimizer.leaves["w"].index.long(), []
    for _ in range(20):
        flat = torch.zeros(w.numel())
        flat[index] = w.detach().flatten()[index]
        norms.append(float(nuclear_norm(flat.view_as(w))[0]))
        optimizer.step()
    assert norms == sorted(norms, reverse=True)
    outside = torch.ones(w.numel(), dtype=torch.bool)
    outside[index] = False
    assert torch.equal(w.detach().flatten()[outside], base.flatten()[outside])


@pytest.mark.parametrize("reset", [False, True])
def test_at_the_second_stage_what_has_grown_freezes_and_moments_are_sliced(reset):
    """6. M2 is in M; frozen entries keep their value; sliced moments equal the old ones."""
    net = Net()
    optimizer = plain(net, progressive_iter=4, lr=3e-2, reset_state=reset)
    train(net, optimizer, 4)
    before, index = weights(net), {n: x.index.clone() for n, x in optimizer.leaves.items()}
    state = {n: {k: v.clone() for k, v in optimizer.state[x.values].items()} for n, x in optimizer.leaves.items()}
    optimizer.next_stage()
    left = 0
    for name, leaf in optimizer.leaves.items():
        inside = torch.isin(index[name], leaf.index)
        assert int(inside.sum()) == leaf.index.numel()
        left += int((~inside).sum())
        assert (leaf.values.abs() < optimizer.theta).all()
        if reset:
            assert not optimizer.state.get(leaf.values)
        else:
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[leaf.values][key], state[name][key][inside])
            assert optimizer.state[leaf.values]["step"] == 4
    assert left
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    train(net, optimizer, 2)
    for name, p in net.named_parameters():
        if name in index:
            frozen = index[name][~torch.isin(index[name], optimizer.leaves[name].index)].long()
            assert torch.equal(p.detach().flatten()[frozen], before[name].flatten()[frozen])


@pytest.mark.parametrize("compact", [False, True])
def test_files_give_the_weights_back_at_any_strength(compact, tmp_path):
    """7, 9. Bit-exact; alpha 0 is the base, 1 the tuned model; two at (1, 0) give the first; four bytes a position."""
    nets = [Net(), Net()]
    for i, net in enumerate(nets):
        optimizer = plain(net, progressive_iter=2, lr=1e-2 * (i + 1))
        train(net, optimizer, 4)
        theta = optimizer.theta if compact else None
        save_values(optimizer.delta(), optimizer.base(), tmp_path / f"{i}", theta=theta)
        count = optimizer.delta().entries()
        assert (tmp_path / f"{i}").stat().st_size <= count * (4 if compact else 8) + 4000
    base = Net()
    named = dict(base.named_parameters())
    undo = load_values(tmp_path / "0", named)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), nets[0].parameters()))
    deltas.revert(undo)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), Net().parameters()))
    load_values(tmp_path / "0", named, 0.0)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), Net().parameters()))
    undo = load_values([tmp_path / "0", tmp_path / "1"], named, [1.0, 0.0])
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), nets[0].parameters()))
    deltas.revert(undo)
    load_values([tmp_path / "0", tmp_path / "1"], named, [0.6, 0.6])
    start = weights(Net())
    for name, p in named.items():
        want = start[name] + sum(0.6 * (dict(n.named_parameters())[name].detach() - start[name]) for n in nets)
        torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-6)


def test_the_rate_that_goes_with_a_threshold():
    """8. 2e-3 -> 4.9659e-4."""
    assert default_rate(2e-3) == pytest.approx(4.9659e-4, rel=1e-4)
    assert sara_adamw(Net(), 2e-3).param_groups[0]["lr"] == default_rate(2e-3)


@pytest.mark.parametrize("at", [1, 3])
def test_it_goes_on_exactly_from_a_state(at):
    options = {"progressive_iter": 2, "lambda_rank": 1e-3, "min_side": 4}
    net = Net()
    optimizer = plain(net, **options)
    train(net, optimizer, at)
    saved, between = copy.deepcopy(optimizer.state_dict()), weights(net)
    train(net, optimizer, 5 - at)
    again = Net()
    other = plain(again, **options)
    again.load_state_dict(between, strict=False)
    other.load_state_dict(saved)
    train(again, other, 5 - at)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), net.parameters()))
    with pytest.raises(BadInput, match="other entries"):
        plain(Net(), density=0.5, **options).load_state_dict(copy.deepcopy(saved))


def test_bf16_weights_have_float32_masters():
    net = Net(torch.bfloat16)
    optimizer = plain(net, lr=1e-5, weight_decay=0.0)
    train(net, optimizer, 5)
    leaf = optimizer.leaves["conv.weight"]
    assert leaf.values.dtype == torch.float32
    assert (leaf.values != leaf.base.float()).any()  # steps below bf16's resolution add up
    assert torch.equal(leaf.parameter.flatten()[leaf.index.long()], leaf.values.detach().bfloat16())


def test_it_is_an_optimizer_for_schedulers_trainers_and_clipping(tmp_path):
    from transformers import Trainer, TrainingArguments

    from pegbox.testing import tiny_llama

    model = tiny_llama()
    base = weights(model)
    optimizer = sara_adamw(model, density=0.05, lr=1e-2, lambda_rank=0.0, max_grad_norm=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    ids = torch.arange(3, 15)
    arguments = TrainingArguments(str(tmp_path), max_steps=3, report_to=[], save_strategy="no", use_cpu=True)
    rows = [{"input_ids": ids, "labels": ids}] * 8
    Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, schedule)).train()
    assert optimizer.updates == 3
    assert any(not torch.equal(p, base[n]) for n, p in model.named_parameters())
    optimizer.release()
    sara_adamw(model, density=0.1)


def test_the_forward_saves_what_the_frozen_model_would():
    """It keeps no activations of its own: saved bytes equal those of a dense forward over the same parameters."""

    def saved(net):
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = loss_of(net)
        del loss
        return sum(kept.values())

    dense, net = Net(), Net()
    plain(net, density=0.9)
    for p, q in zip(dense.parameters(), net.parameters()):
        p.requires_grad_(q.requires_grad)
    assert saved(net) == saved(dense)


def test_thresholds_from_a_density():
    named = {"a": torch.randn(30, 20), "b": torch.randn(50)}
    theta = quantile_threshold(named, 0.2)
    assert sum(int((w.abs() < theta).sum()) for w in named.values()) == 130
    assert quantile_threshold(named, 1.0) == float("inf")
    zeros = {"a": torch.cat([torch.zeros(50), torch.ones(50)])}
    with pytest.raises(BadInput, match="exclude_zeros"):
        quantile_threshold(zeros, 0.3)
    assert quantile_threshold(zeros, 0.5, exclude_zeros=True) == 1.0


# ---- bad input


@pytest.mark.parametrize("theta", [0.0, -1.0, float("nan"), float("inf")])
def test_thresholds_that_are_none(theta):
    with pytest.raises(BadInput, match="threshold"):
        sara_adamw(Net(), theta)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({}, "exactly one way"),
        ({"threshold": 0.1, "density": 0.1}, "exactly one way"),
        ({"threshold": 1e-12, "exclude_zeros": True}, "nothing would train"),
        ({"threshold": 0.1, "lambda_rank": -1.0}, "lambda_rank"),
        ({"threshold": 0.1, "progressive_iter": 0}, "progressive_iter"),
    ],
)
def test_options_that_can_not_be(options, word):
    with pytest.raises(BadInput, match=word):
        sara_adamw(Net(), **options)


def test_a_second_stage_that_never_begins_warns():
    with pytest.warns(UserWarning, match="never begins"):
        sara_adamw(Net(), 0.1, progressive_iter=5, total_steps=5)


def test_nan_integers_and_tensors_given_twice():
    net = Net()
    with torch.no_grad():
        net.conv.weight[0, 0, 0] = torch.nan
    with pytest.raises(BadInput, match=r"conv\.weight.*NaN"):
        sara_adamw(net, 0.1)
    with pytest.raises(BadInput, match="NaN"):
        sara_adamw(net, density=0.1)
    packed = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(BadInput, match="uint8"):
        smallest_entries({"packed": packed}, 0.1, None)
    net = Net()
    net.packed = packed
    with pytest.warns(UserWarning, match="not floating"):
        sara_adamw(net, 0.1)
    tied = Net()
    with pytest.raises(BadInput, match="one tensor"):
        sara_adamw([*tied.named_parameters(), ("head.weight", tied.head.weight)], 0.1)


def test_a_parameter_has_one_leaf():
    net = Net()
    plain(net)
    with pytest.raises(BadInput, match="another optimizer"):
        plain(net)
    with pytest.raises(BadInput, match="nothing would train"):
        SparseAdamW(Net(), {})
    with pytest.raises(BadInput, match="sorted"):
        SparseAdamW(Net(), {"scale": torch.tensor([3, 1])})
    assert whole({"a": torch.zeros(2, 3)})["a"].numel() == 6


def test_no_matrix_for_the_rank_loss():
    net = Net()
    optimizer = plain(net, lambda_rank=1e-3)
    loss_of(net).backward()
    with pytest.raises(BadInput, match="min_side"):
        optimizer.step()


def test_another_base_or_shape_is_refused(tmp_path):
    net = Net()
    optimizer = plain(net)
    train(net, optimizer)
    for name, theta in (("full", None), ("compact", optimizer.theta)):
        save_values(optimizer.delta(), optimizer.base(), tmp_path / name, theta=theta)
        load_values(tmp_path / name, dict(Net().named_parameters()))
        other = Net()
        with torch.no_grad():
            other.conv.weight.mul_(1.5)
        with pytest.raises(WrongBase, match="another base"):
            load_values(tmp_path / name, dict(other.named_parameters()))
        fewer = {n: p for n, p in Net().named_parameters() if n != "scale"}
        with pytest.raises(WrongBase, match="does not have"):
            load_values(tmp_path / name, fewer)
    deltas.save(optimizer.delta(), tmp_path / "bare")
    with pytest.raises(Corrupt, match="nothing of the base"):
        load_values(tmp_path / "bare", dict(Net().named_parameters()))
    with pytest.raises(BadInput, match="strengths"):
        load_values([tmp_path / "full"], dict(Net().named_parameters()), [1.0, 2.0])
    assert not mixed([optimizer.delta()], [0.0], {})
