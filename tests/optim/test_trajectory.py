"""A run as seeds and scalars: size, replay to the bit, cutting, averaging, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.zeroth import Bench, Mlp, class_loss, llama, next_token_loss
from pegbox.errors import BadInput, Corrupt, WrongBase
from pegbox.optim.trajectory import Header, Trajectory


def trained(model, value, steps=5, **options):
    bench = Bench(model, value, lr=1e-2, schedule="linear", **options)
    bench.run(steps)
    return bench


def params(model):
    return dict(model.named_parameters())


@pytest.mark.parametrize("scheme", ["keyed", "sequential"])
@pytest.mark.parametrize(
    "options",
    [
        {"restore": "exact"},
        {"restore": "snapshot", "samples": 3},
        {"restore": "in_place"},
        {"restore": "in_place", "samples": 3, "weight_decay": 0.1},
        {"restore": "in_place", "sides": 1, "distribution": "sphere"},
        {"restore": "exact", "combine": "sum", "samples": 2, "distribution": "rademacher"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_gives_the_weights_bit_for_bit(tmp_path, options, scheme, dtype):
    bench = trained(llama(dtype), next_token_loss, scheme=scheme, **options)
    bench.state.trajectory.save(tmp_path / "t.safetensors")
    fresh = llama(dtype)
    Trajectory.load(tmp_path / "t.safetensors").replay(params(fresh))
    for name, weight in bench.weights().items():
        assert torch.equal(params(fresh)[name].detach(), weight), name


def test_float64_runs_replay_too(tmp_path):
    bench = trained(Mlp(), class_loss)
    bench.step.save(bench.state, tmp_path)
    fresh = bench.step.load(Mlp(), tmp_path)
    assert all(torch.equal(params(fresh)[n].detach(), w) for n, w in bench.weights().items())


def test_truncated_is_the_run_as_it_was_then():
    bench = Bench(Mlp(), class_loss, lr=1e-2)
    bench.run(3)
    then = bench.weights()
    bench.run(4)
    fresh = Mlp()
    bench.state.trajectory.truncate(3).replay(params(fresh))
    assert all(torch.equal(params(fresh)[n].detach(), w) for n, w in then.items())
    with pytest.raises(BadInput, match="7"):
        bench.state.trajectory.truncate(8)


@pytest.mark.parametrize("last", [1, 2, 5])
def test_average_is_the_mean_of_the_last_iterates(tmp_path, last):
    bench = Bench(Mlp(), class_loss, lr=1e-2, weight_decay=0.1)
    iterates = []
    for _ in range(5):
        bench.run()
        iterates.append(bench.weights())
    bench.state.trajectory.average(last).save(tmp_path / "t.safetensors")
    fresh = Mlp()
    Trajectory.load(tmp_path / "t.safetensors").replay(params(fresh))
    for name, param in params(fresh).items():
        mean = torch.stack([w[name] for w in iterates[-last:]]).mean(0)
        torch.testing.assert_close(param.detach(), mean, atol=1e-14, rtol=1e-12)
    with pytest.raises(BadInput, match="average 6"):
        bench.state.trajectory.average(6)


def test_a_step_costs_twelve_bytes(tmp_path):
    names = tuple(f"model.layers.{i}.{p}.weight" for i in range(30) for p in ("self_attn.q_proj", "mlp.up_proj"))
    sizes = {}
    for steps in (0, 1000):
        header = Header(
            names=names,
            start="0" * 64,
            eps=1e-3,
            scheme="keyed",
            distribution="gaussian",
            restore="exact",
            sides=2,
            combine="mean",
            device="cpu",
            dtypes="float32",
        )
        trajectory = Trajectory(header)
        for i in range(steps):
            trajectory.append([999_999_999 - i], [0.5 * i], 1e-6)
        trajectory.save(tmp_path / f"{steps}.safetensors")
        sizes[steps] = (tmp_path / f"{steps}.safetensors").stat().st_size
    assert sizes[0] <= 4096
    assert sizes[1000] <= 12 * 1000 + 4096


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 999_999_999), min_size=1, max_size=3, unique=True), max_size=6))
def test_saved_and_loaded_is_equal(tmp_path_factory, steps):
    header = Header(
        names=("a", "b"),
        start="x",
        eps=1e-2,
        scheme="sequential",
        distribution="sphere",
        restore="in_place",
        sides=1,
        combine="sum",
        device="cpu",
        dtypes="bfloat16",
        decay=0.1,
        decayed=(1,),
        averaged=2,
    )
    trajectory = Trajectory(header)
    for seeds in steps:
        trajectory.append(seeds, [0.25 * s for s in range(len(seeds))], 0.5)
    path = tmp_path_factory.mktemp("t") / "t.safetensors"
    trajectory.save(path)
    assert Trajectory.load(path) == trajectory
    assert Trajectory.from_state_dict(trajectory.state_dict()) == trajectory


def test_other_bases_are_refused():
    trajectory = trained(Mlp(), class_loss).state.trajectory
    other = Mlp()
    with torch.no_grad():
        other.first.weight[0, 0] += 1
    before = other.first.weight.detach().clone()
    with pytest.raises(WrongBase, match="start weights differ"):
        trajectory.replay(params(other))
    assert torch.equal(other.first.weight, before)
    trajectory.replay(params(other), check=False)
    with pytest.raises(WrongBase, match="dtype"):
        trajectory.replay(params(Mlp(torch.float32)))
    named = params(Mlp())
    with pytest.raises(WrongBase, match="missing here"):
        trajectory.replay({n: p for n, p in named.items() if n != "first.bias"})
    with pytest.raises(WrongBase, match="not in it"):
        trajectory.replay({**named, "more": named["first.bias"]})
    named["first.bias"] = torch.nn.Parameter(torch.zeros(9, dtype=torch.float64))
    with pytest.raises(WrongBase):
        trajectory.replay(named)


def test_a_damaged_file_is_said_to_be(tmp_path):
    trajectory = trained(Mlp(), class_loss).state.trajectory
    path = tmp_path / "t.safetensors"
    trajectory.save(path)
    data = path.read_bytes()
    for broken in (data[:-3], data[: len(data) // 2], b"", b"\x00" * 64):
        path.write_bytes(broken)
        with pytest.raises(Corrupt):
            Trajectory.load(path)
    with pytest.raises(Corrupt):
        Trajectory.load(tmp_path / "absent.safetensors")
