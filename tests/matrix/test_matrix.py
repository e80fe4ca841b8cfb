"""The composition matrix: each cell trains two steps through a whole run, is loaded again and gives the same logits, or
is refused with a reason known here.

Cells cover every pair of choices on any two axes (a pairwise design), so that no two parts have never met.
"""

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from pegbox.capabilities import refusals
from pegbox.errors import Unsupported
from pegbox.recipe import load_recipe
from pegbox.run import build_spec, execute
from pegbox.runner import check_spec, facts_of
from pegbox.testing import tiny_batch, tiny_llama, tiny_tokenizer


def part_of_its_own():
    """A file with a sparse difference over the tiny model's embedding."""
    from pegbox.parts.deltas import Delta, Piece, save

    path = Path(tempfile.mkdtemp()) / "part.safetensors"
    shape = tuple(tiny_llama().get_input_embeddings().weight.shape)
    index = torch.arange(0, 900, 9, dtype=torch.int32)
    save(Delta({"model.embed_tokens.weight": Piece(shape, torch.full((100,), 0.1), index)}), path)
    return str(path)


AXES = {
    "tuner": {
        "lora": {"kind": "lora", "r": 4, "target_modules": "all-linear"},
        "ia3": {
            "kind": "ia3",
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        "sparse": {"kind": "sparse"},
        "scatter": {"kind": "sparse", "execution": "scatter"},
        "bypass": {"kind": "sparse", "execution": "bypass", "coordinates": "absolute"},
        "lean": {"kind": "sparse", "execution": "lean"},
        "slices": {"kind": "slices", "select": {"kind": "units", "ratios": {"d": 0.2}}},
        "low rank + sparse": {"kind": "lowrank_sparse", "r": 4, "alpha": 8, "target_modules": ["all-linear"]},
        "gaussian": {"kind": "bayesian_lora", "r": 4},
        "full": {"kind": "full"},
    },
    "select": {
        "none": None,
        "random": {"kind": "random", "budget": {"density": 0.05}},
        "principal": {
            "kind": "low_rank_magnitude",
            "filter_rank": 4,
            "budget": {"density": 0.05},
            "schedule": {"every": 1},
        },
        "half": {"kind": "half"},
        "units": {"kind": "units", "ratios": {"v": 0.5, "o": 0.25, "u": 0.1, "d": 0.1}},
        "regrow": {
            "kind": "regrow",
            "budget": {"density": 0.02},
            "schedule": {"every": 2, "accumulate": 1},
        },
        "smallest": {"kind": "smallest", "density": 0.05},
        "neurons": {"kind": "per_neuron", "k": 2},
        "sensitive": {"kind": "sensitivity", "rank": 2, "tolerance": 0.9, "batches": 1},
        "decomposed": {"kind": "decomposed", "budget": {"count": 8}, "rank_cap": 6},
        "knapsack": {"kind": "knapsack", "rho": 0.6, "schedule": {"every": 1}},
    },
    "objective": {
        "sft": {"token": {"kind": "sft"}},
        "dft": {"token": {"kind": "dft"}},
        "asft": {"kind": "asft", "mode": "asft", "lam": 0.1},
        "views": {"kind": "multi_view", "views": {"again": 0.5}, "neftune": 1.0},
        "low rank": {"token": {"kind": "sft"}, "terms": [{"kind": "nuclear_norm", "min_side": 0}]},
        "tasks": {"kind": "task_balanced", "balance": "famo"},
        "focal": {"kind": "task_balanced", "mode": "focal_task", "inner": {"chunk": 64}},
        "pull": {"token": {"kind": "sft"}, "terms": [{"kind": "l1_to_start", "weight": 0.1}]},
    },
    "optim": {
        "adamw": {"kind": "adamw", "lr": 1e-3},
        "sgd": {"kind": "sgd", "lr": 1e-2},
        "aged": {"kind": "aged_adamw", "lr": 1e-3},
        "sm3": {"kind": "sm3", "lr": 1e-3},
        "mezo": {"kind": "mezo", "lr": 1e-4, "eps": 1e-3},
    },
    "data": {
        "plain": [],
        "corrupted": [{"kind": "corruption", "rate": 0.3, "form": "existing", "token": 3}],
        "weighed": [{"kind": "bayesian_scheduler", "safe": {"path": "network", "split": "validation", "limit": 4}}],
        "mixed": [{"kind": "mixture"}, {"kind": "layout", "mode": "pack", "seq_length": 900}],
        "sources": [{"kind": "multi_source", "parts": {"subnet": part_of_its_own()}}],
        "again": [{"kind": "views", "templates": {"again": "{answer} {answer}"}}],
    },
    "prepare": {
        "as it is": [],
        "corda": [{"kind": "corda", "mode": "ipm", "rank": 4}],
        "nf4": [{"kind": "nf4"}],
        "permute": [{"kind": "permute"}],
        "prune": [{"kind": "prune", "mode": "W", "ratio": 0.02, "heads": 2, "neurons": 0.25}],
    },
    "analyze": {
        "nothing": [],
        "tuco": [{"kind": "tuco"}],
        "path": [{"kind": "path", "grid": [0, 0.5, 1]}],
        "interference": [{"kind": "interference", "others": {"part": part_of_its_own()}, "measure": False}],
    },
}

# (choice, choice) -> a word of the reason. Everything else must work.
REFUSED = {
    ("objective=views", "data=plain"): "no data policy makes",
    ("objective=views", "data=corrupted"): "no data policy makes",
    ("objective=views", "data=sources"): "no data policy makes",
    ("objective=views", "data=mixed"): "no data policy makes",
    ("objective=views", "data=weighed"): "no data policy makes",
    ("prepare=nf4", "analyze=path"): "are quantized",
    ("prepare=nf4", "analyze=interference"): "are quantized",
    ("prepare=corda", "data=sources"): "rewrites it first",
    ("prepare=nf4", "data=sources"): "rewrites it first",
    ("prepare=permute", "data=sources"): "rewrites it first",
    ("prepare=prune", "data=sources"): "rewrites it first",
    ("tuner=full", "objective=pull", "data=sources"): "would see the differences",
    ("tuner=lora", "select=random"): "takes no selection",
    ("tuner=gaussian", "select=random"): "takes no selection",
    ("tuner=gaussian", "select=principal"): "takes no selection",
    ("tuner=gaussian", "select=half"): "takes no selection",
    ("tuner=gaussian", "select=units"): "takes no selection",
    ("tuner=gaussian", "select=regrow"): "takes no selection",
    ("tuner=gaussian", "select=smallest"): "takes no selection",
    ("tuner=gaussian", "select=neurons"): "takes no selection",
    ("tuner=gaussian", "select=decomposed"): "takes no selection",
    ("tuner=gaussian", "select=knapsack"): "takes no selection",
    ("tuner=gaussian", "select=sensitive"): "tuner of their own",
    ("tuner=gaussian", "prepare=corda"): "takes none up",
    ("tuner=lora", "select=principal"): "takes no selection",
    ("tuner=lora", "select=half"): "takes no selection",
    ("tuner=lora", "select=sensitive"): "tuner of their own",
    ("tuner=ia3", "select=sensitive"): "tuner of their own",
    ("tuner=full", "select=sensitive"): "tuner of their own",
    ("tuner=slices", "select=sensitive"): "tuner of their own",
    ("tuner=bypass", "select=sensitive"): "norms and biases",
    ("select=sensitive", "prepare=nf4"): "gradients of the weights",
    ("prepare=corda", "select=sensitive"): "tuner of their own",
    ("tuner=lora", "select=neurons"): "takes no selection",
    ("tuner=lora", "select=decomposed"): "takes no selection",
    ("tuner=ia3", "select=decomposed"): "takes no selection",
    ("tuner=slices", "select=decomposed"): "takes units",
    ("prepare=corda", "select=decomposed"): "take",
    ("tuner=low rank + sparse", "select=principal"): "moves slots",
    ("tuner=low rank + sparse", "select=regrow"): "moves slots",
    ("tuner=low rank + sparse", "select=half"): "takes entries",
    ("tuner=low rank + sparse", "select=sensitive"): "a tuner of their own",
    ("tuner=low rank + sparse", "select=units"): "takes entries",
    ("tuner=low rank + sparse", "select=knapsack"): "takes entries",
    ("tuner=low rank + sparse", "prepare=corda"): "takes none up",
    ("tuner=lora", "select=knapsack"): "takes no selection",
    ("tuner=ia3", "select=knapsack"): "takes no selection",
    ("tuner=sparse", "select=knapsack"): "moves set",
    ("tuner=scatter", "select=knapsack"): "moves set",
    ("tuner=lean", "select=knapsack"): "moves set",
    ("tuner=bypass", "select=knapsack"): "norms",
    ("select=knapsack", "prepare=nf4"): "can't train themselves",
    ("select=knapsack", "prepare=corda"): "take",
    ("optim=mezo", "select=knapsack"): "back-propagation",
    ("tuner=ia3", "select=neurons"): "takes no selection",
    ("tuner=ia3", "select=random"): "takes no selection",
    ("tuner=ia3", "select=principal"): "takes no selection",
    ("tuner=ia3", "select=half"): "takes no selection",
    ("tuner=full", "prepare=nf4"): "quantized",
    ("tuner=scatter", "prepare=nf4"): "quantized",
    ("tuner=bypass", "prepare=nf4"): "quantized",  # for its absolute coordinates
    ("tuner=full", "select=principal"): "moves slots",
    ("tuner=bypass", "select=half"): "norms",
    ("select=half", "prepare=nf4"): "can't train themselves",
    ("optim=mezo", "select=principal"): "move",
    ("objective=tasks", "optim=mezo"): "anew",
    ("optim=mezo", "data=weighed"): "each row's loss",
    ("tuner=lora", "select=regrow"): "takes no selection",
    ("tuner=lora", "select=smallest"): "takes no selection",
    ("tuner=ia3", "select=smallest"): "takes no selection",
    ("tuner=full", "select=smallest"): "moves slots",
    ("tuner=bypass", "select=smallest"): "norms",
    ("tuner=low rank + sparse", "select=smallest"): "norms",
    ("optim=mezo", "select=smallest"): "move",
    ("prepare=corda", "select=smallest"): "take",
    ("tuner=ia3", "select=regrow"): "takes no selection",
    ("tuner=full", "select=regrow"): "moves slots",
    ("optim=mezo", "select=regrow"): "move",
    ("optim=sgd", "select=regrow"): "moments",
    ("optim=sm3", "select=regrow"): "moments",
    ("prepare=corda", "select=regrow"): "take",
    ("tuner=ia3", "prepare=corda"): "takes none up",
    ("tuner=sparse", "prepare=corda"): "takes none up",
    ("tuner=scatter", "prepare=corda"): "takes none up",
    ("tuner=bypass", "prepare=corda"): "takes none up",
    ("tuner=lean", "prepare=corda"): "takes none up",
    ("tuner=full", "prepare=corda"): "takes none up",
    ("prepare=corda", "select=random"): "take",  # only lora takes factors, and it takes no selection
    ("prepare=corda", "select=principal"): "take",
    ("prepare=corda", "select=half"): "take",
    ("tuner=slices", "select=random"): "takes units",
    ("tuner=slices", "select=principal"): "takes units",
    ("tuner=slices", "select=half"): "takes units",
    ("tuner=slices", "select=knapsack"): "takes units",
    ("tuner=slices", "select=neurons"): "takes units",
    ("tuner=slices", "select=regrow"): "takes units",
    ("tuner=slices", "select=smallest"): "takes units",
    ("tuner=slices", "prepare=corda"): "takes none up",
    ("tuner=lora", "select=units"): "takes no selection",
    ("tuner=ia3", "select=units"): "takes no selection",
    ("prepare=corda", "select=units"): "take",
    ("prepare=corda", "select=neurons"): "take",
}


def is_refused(cell):
    choices = {f"{axis}={choice}" for axis, choice in cell.items()}
    return any(set(pair) <= choices for pair in REFUSED)


def pairwise(axes):
    """Few cells that hold every pair of choices on two different axes: greedy, deterministic.

    A pair that is not refused is covered by a cell that runs; every refused pair has a cell of its own.
    """
    names = list(axes)
    pairs = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]}
    refused = sorted(pair for pair in pairs if is_refused(dict(pair)))
    cells, missing = [], pairs - set(refused)
    while missing:
        cell = dict(min(missing))
        for pair in sorted(missing):
            wider = cell | dict(pair)
            if all(cell.get(axis, choice) == choice for axis, choice in pair) and not is_refused(wider):
                cell = wider
        for name in names:
            if name not in cell:
                cell[name] = next(c for c in axes[name] if not is_refused(cell | {name: c}))
        cells.append({name: cell[name] for name in names})
        missing -= {((a, cell[a]), (b, cell[b])) for a, b in itertools.combinations(names, 2)}
    first = {name: next(iter(axes[name])) for name in names}
    return cells + [first | dict(pair) for pair in refused]


CELLS = pairwise(AXES)


def label(cell):
    return " ".join(f"{axis}={choice}" for axis, choice in cell.items())


def expected_refusals(cell):
    choices = {f"{axis}={choice}" for axis, choice in cell.items()}
    return [word for pair, word in REFUSED.items() if set(pair) <= choices]


class LastLogits(TrainerCallback):
    """Keeps the model's logits at the end of training."""

    logits = None

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.logits = logits_of(model)


@torch.no_grad()
def logits_of(model):
    model.eval()
    return model(input_ids=tiny_batch(rows=2, pad=0)["input_ids"] % 256).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def recipe_of(cell):
    block = {"title": label(cell)} | {axis: AXES[axis][choice] for axis, choice in cell.items()}
    return load_recipe(block)


@pytest.mark.parametrize("cell", CELLS, ids=label)
def test_cell(cell, base, tmp_path, monkeypatch):
    monkeypatch.setenv("PEGBOX_CACHE", str(base / "cache"))
    spec = build_spec(
        recipe_of(cell),
        model=str(base),
        data={"path": "network", "limit": 6, "families": ["subnet"]},
        test_data={"path": "network", "limit": 2, "families": ["subnet"], "split": "test"},
        suites=[],
        steps=2,
        batch=2,
        micro_batch=2,
        max_length=400,
        eval_split=0.0,
    )
    words = expected_refusals(cell)
    reasons = refusals(spec.recipe, facts_of(spec))
    if words:
        assert len(reasons) >= 1
        for word in words:
            assert any(word in reason for reason in reasons), (word, reasons)
        with pytest.raises(Unsupported):
            check_spec(spec)
        return
    assert reasons == []
    kept = LastLogits()
    run = execute(spec, tmp_path / "run", callbacks=[kept])
    assert run.status == "finished"
    model, _ = run.model()
    assert torch.allclose(logits_of(model), kept.logits, atol=2e-5), label(cell)


def test_every_pair_is_covered():
    pairs = {((a, c[a]), (b, c[b])) for c in CELLS for a, b in itertools.combinations(AXES, 2)}
    wanted = sum(len(AXES[a]) * len(AXES[b]) for a, b in itertools.combinations(AXES, 2))
    assert len(pairs) == wanted
