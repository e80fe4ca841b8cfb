"""MeZO under the engine's trainer: same steps as alone, resumed in the middle, on LoRA and on the sparse tuner."""

from __future__ import annotations

import pytest
import torch

from engine.helpers import model, stage, weights
from pegbox.engine.callbacks import Listener
from pegbox.optim import OPTIM


def mezo(**options):
    return OPTIM.validate({"kind": "mezo", "lr": 1e-3, "eps": 1e-3, **options})


def run(folder, net, **options):
    step = mezo(**options.pop("optim", {}))
    return stage(folder, net=net, step=step, **options)


@pytest.mark.parametrize("restore", ["in_place", "exact"])
def test_training_moves_the_weights_and_leaves_a_trajectory_that_replays(tmp_path, restore):
    net = model()
    before = weights(net)
    outcome, net = run(tmp_path, net, optim={"restore": restore}, steps=4)
    after = weights(net)
    assert any(not torch.equal(after[n], w) for n, w in before.items())
    trajectory = outcome.states["step"].trajectory
    assert len(trajectory) == 4
    fresh = model()
    trajectory.replay(dict(fresh.named_parameters()))
    assert all(torch.equal(p.detach(), after[n]) for n, p in fresh.named_parameters())


def test_micro_batches_are_one_larger_batch(tmp_path):
    ends = []
    for i, micro in enumerate((4, 2)):
        _, net = run(tmp_path / str(i), model(), steps=2, batch=4, micro_batch=micro)
        ends.append(weights(net))
    for n, w in ends[0].items():
        torch.testing.assert_close(w, ends[1][n], atol=1e-5, rtol=0)


def test_lora_parameters_alone_move(tmp_path):
    net = model(lora=True)
    frozen = {n: p.detach().clone() for n, p in net.named_parameters() if not p.requires_grad}
    trained = weights(net)
    run(tmp_path, net, steps=2, optim={"eps": 1e-2, "lr": 1e-2})
    assert all(torch.equal(dict(net.named_parameters())[n], w) for n, w in frozen.items())
    assert any(not torch.equal(w, trained[n]) for n, w in weights(net).items())


def test_the_estimate_goes_through_an_optimizer_with_state(tmp_path):
    net = model(lora=True)
    before = weights(net)
    outcome, _ = run(tmp_path, net, steps=3, optim={"then": "adamw", "lr": 1e-3, "max_grad_norm": 1.0})
    assert any(not torch.equal(w, before[n]) for n, w in weights(net).items())
    assert outcome.states["step"].trajectory is None


def test_a_run_that_stopped_goes_on_to_the_same_weights(tmp_path):
    whole, net = run(tmp_path / "whole", model(), steps=6)

    class Halt(Exception):
        pass

    class Stop(Listener):
        def record(self, record):
            if record.step == 3:
                raise Halt

    with pytest.raises(Halt):
        run(tmp_path / "cut", model(), steps=6, save_every=2, callbacks=[Stop()])
    resumed, other = run(tmp_path / "cut", model(), steps=6, save_every=2, resume=True)
    assert resumed.states["step"].trajectory == whole.states["step"].trajectory
    assert all(torch.equal(w, weights(other)[n]) for n, w in weights(net).items())
