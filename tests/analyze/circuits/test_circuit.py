"""Circuits under mean ablation: closed forms, faithfulness, completeness, minimality, pruning."""

import itertools
import math

import pytest
import torch

from analyze.circuits.casts import llama, prompts
from pegbox.analyze.circuits import (
    Ablation,
    Circuit,
    Head,
    HeadView,
    Patch,
    accuracy,
    capture,
    completeness,
    faithfulness,
    head_means,
    minimality,
    prune,
    random_circuits,
)  # fmt: skip
from pegbox.analyze.circuits.activations import last_logits, taken
from pegbox.analyze.circuits.circuit import Score
from pegbox.errors import BadInput


@pytest.fixture(scope="module")
def view():
    return HeadView(llama())


def answered(view, rows=12):
    """Prompts whose answers are what the model says, but for every third."""
    given = prompts(rows)
    said = last_logits(view, given).detach().argmax(-1)
    said[::3] = (said[::3] + 1) % 60
    return given.asking(said)


@pytest.fixture(scope="module")
def ablation(view):
    return Ablation(view, answered(view), head_means(view, prompts(20, seed=3)))


CIRCUIT = {"a": ("last", [(0, 1), (2, 2)]), "b": ("mid", [(1, 0), (0, 3)]), "c": ("last", [(1, 1)])}


@torch.no_grad()
def test_means_stream(view):
    """Of any batches, padding left out, columns counted from the end."""
    given = prompts(lengths=[10, 7, 9, 10, 8])
    means = head_means(view, given, batch=2)
    rows = [capture(view, given.take(slice(i, i + 1))) for i in range(5)]
    for back in range(1, 11):
        there = [r["o", 1][0, -back] for r, n in zip(rows, [10, 7, 9, 10, 8]) if n >= back]
        assert int(means.counts[-back]) == len(there)
        torch.testing.assert_close(means.values[1, -back], torch.stack(there).mean(0), rtol=0, atol=1e-6)
    with pytest.raises(BadInput, match="11 tokens"):
        means.at(11)
    assert head_means(HeadView(llama(dtype=torch.float16).half()), prompts(3)).values.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("vital", [True, False])
def test_a_circuit_is_its_patches(view, resume, vital):
    """The same logits as mean values written head by head through plain hooks, on prompts of several lengths."""
    given, means = prompts(lengths=[10, 9, 10]), head_means(view, prompts(20, seed=3))
    circuit = Circuit.of(view, CIRCUIT)
    inside = set(circuit.members())
    patches = []
    for head in view.all():
        site = view.site("o", *head)
        mean = taken(means.at(10)[head.layer], site)
        for name in ("last", "mid"):
            if (name, head) not in inside:
                at = given.at(name)
                patches.append(Patch(site, mean[at], at))
    if vital:
        for row_column in itertools.product(range(3), range(10)):
            row, column = row_column
            if column in (int(given.at("last")[row]), int(given.at("mid")[row])):
                continue
            for layer in range(3):
                patches.append((view.site("o", layer), _cell(row, column, means.at(10)[layer, column])))
    found = Ablation(view, given, means, resume=resume, batch=2).logits(circuit, vital)
    torch.testing.assert_close(found, last_logits(view, given, patches), rtol=0, atol=1e-5)


def _cell(row, column, value):
    def act(x):
        y = x.clone()
        y[row, column] = value.to(x.dtype)
        return y

    return act


def test_the_whole_circuit_is_the_model(view, ablation):
    """Nothing ablated: the model's accuracy exactly, which is that of plain forwards."""
    whole = Circuit.whole(view, ["last", "mid"])
    assert ablation.circuits([whole], False)[0] == ablation.model
    assert ablation.model.accuracy == accuracy(view, ablation.prompts) == 8 / 12
    assert ablation.removed([[]])[0] == ablation.model


@torch.no_grad()
def test_the_empty_circuit_has_constant_heads(view, ablation):
    """All heads at their means: a model whose o_proj inputs are constants."""
    empty = Circuit.of(view, {"none": ("last", [])})
    constant = [Patch(view.site("o", n), ablation.means.values[n].expand(12, -1, -1)) for n in range(3)]
    wanted = last_logits(view, ablation.prompts, constant)
    torch.testing.assert_close(ablation.logits(empty), wanted, rtol=0, atol=1e-5)


def test_circuits_together_are_circuits_alone(view, ablation):
    circuit = Circuit.of(view, CIRCUIT)
    several = [circuit, circuit.without([("mid", Head(1, 0))]), Circuit.whole(view, ["last", "mid"])]
    together = ablation.circuits(several)
    for one, found in zip(several, together):
        alone = Ablation(view, ablation.prompts, ablation.means, resume=False, batch=5).circuits([one])[0]
        assert alone.accuracy == found.accuracy
        assert alone.logprob == pytest.approx(found.logprob, abs=1e-5)


def test_circuits_are_plain(view, tmp_path):
    circuit = Circuit.of(view, CIRCUIT)
    circuit.save(tmp_path / "c.json")
    assert Circuit.load(view, tmp_path / "c.json") == circuit
    assert len(circuit) == 5
    assert circuit.positions == ("last", "mid")
    smaller = circuit.without([("last", Head(1, 1))])
    assert smaller.groups["c"].heads == ()
    assert smaller.overlap(circuit) == 1
    assert circuit.overlap(smaller) == 0.8
    with pytest.raises(BadInput, match="no group 'd'"):
        circuit.group("d")
    with pytest.raises(BadInput, match="two groups at position 'last'"):
        Circuit.of(view, {"a": ("last", [(0, 0)]), "b": ("last", [(0, 0)])})
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(BadInput, match="holds no circuit"):
        Circuit.load(view, tmp_path / "c.json")


def test_random_circuits_have_the_sizes(view, ablation):
    """Groups of equal sizes, heads drawn without replacement over the whole model, the same for a seed."""
    circuit = Circuit.of(view, {"a": ("last", view.all()[:7]), "b": ("last", view.all()[7:]), "c": ("mid", [(0, 0)])})
    seen = set()
    for seed in range(20):
        drawn = circuit.random(view, torch.Generator().manual_seed(seed))
        assert [len(g.heads) for g in drawn.groups.values()] == [7, 5, 1]
        assert len({*drawn.groups["a"].heads, *drawn.groups["b"].heads}) == 12
        seen |= {*drawn.groups["c"].heads}
    assert len(seen) > 6
    small = Circuit.of(view, CIRCUIT)
    draws = [random_circuits(ablation, small, 3, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(draws[0]) == 3


# ---- judging, against a table in place of a model


class Table:
    """F of circuits from a function of their heads; `removed` from another."""

    def __init__(self, view, value, other=None, whole=1.0):
        self.view, self.value, self.other = view, value, other
        self.model = Score(whole, 0.0)

    def check(self):
        return self.model.accuracy

    def circuits(self, circuits, _=True):
        return [Score(self.value({h for _, h in c.members()}), 0.0) for c in circuits]

    def removed(self, subsets):
        return [Score(self.other({h for _, h in s}), 0.0) for s in subsets]


A, B, C, D = Head(0, 0), Head(0, 1), Head(1, 0), Head(1, 1)


def test_minimality_sees_redundant_partners(view):
    """A and B back each other up, C counts alone, D for nothing: D goes, A and B stay, though either is dispensable.

    A and B share a layer, A and C a head: partners are told apart by (layer, head)."""
    f = lambda heads: 0.5 * bool(heads & {A, B}) + 0.4 * (C in heads)  # noqa: E731
    circuit = Circuit.of(view, {"g": ("last", [A, B, C, D])})
    found = minimality(Table(view, f), circuit, share=1.0)
    assert found.partners["last", A] == (B, C)
    assert found.scores["last", A] == math.inf  # without B and C nothing is left but A
    assert found.scores["last", D] == 0
    assert set(found.circuit.members()) == {("last", h) for h in (A, B, C)}
    narrow = minimality(Table(view, f), circuit, share=0.3)
    assert narrow.partners["last", A] == (B,)
    assert narrow.scores["last", A] == pytest.approx(0.9 / 0.4 - 1)


def test_faithfulness_is_a_share(view, ablation):
    circuit = Circuit.of(view, CIRCUIT)
    assert faithfulness(Table(view, lambda h: 0.3, whole=0.6), circuit) == pytest.approx(0.5)
    assert faithfulness(ablation, Circuit.whole(view, ["last", "mid"]), False) == 1


def test_completeness_compares_what_is_left(view):
    circuit = Circuit.of(view, {"g": ("last", [A, B]), "h": ("mid", [C])})
    table = Table(view, lambda h: len(h) / 10, lambda t: 1 - len(t) / 10)
    gaps = completeness(table, circuit, draws=3, generator=torch.Generator().manual_seed(0),
                        subsets={"own": [("mid", C)]})  # fmt: skip
    assert [(g.name, g.size) for g in gaps] == [
        ("half 0", 1),
        ("half 1", 1),
        ("half 2", 1),
        ("g", 2),
        ("h", 1),
        ("own", 1),
    ]
    assert gaps[3].gap == pytest.approx(0.7)
    assert gaps[4].circuit == pytest.approx(0.2)


def test_pruning_keeps_what_is_needed(view):
    """Greedy backward pruning keeps one of two redundant heads and the needed one, and stops in time."""
    f = lambda heads: 0.5 * bool(heads & {A, B}) + 0.4 * (C in heads) + 0.05 * (D in heads)  # noqa: E731
    circuit = Circuit.of(view, {"g": ("last", [A, B, C, D])})
    found = prune(Table(view, f), circuit, stop=0.85)
    assert len(found.circuit) == 2
    assert ("last", C) in found.circuit.members()
    assert found.accuracy == pytest.approx(0.9)
    assert [a for _, a in found.gone] == sorted((a for _, a in found.gone), reverse=True)
    quick = prune(Table(view, f), circuit, stop=0.85, at_once=2)
    assert quick.accuracy >= 0.85 * quick.whole
    assert len(quick.circuit) == 2


# ---- bad input


def test_a_model_that_answers_nothing(view):
    """Accuracy 0: no share of it exists."""
    given = prompts(3)
    said = last_logits(view, given).detach().argmax(-1)
    ablation = Ablation(view, given.asking((said + 1) % 60), head_means(view, prompts(20, seed=3)))
    with pytest.raises(BadInput, match="accuracy 0"):
        faithfulness(ablation, Circuit.of(view, CIRCUIT))
    with pytest.raises(BadInput, match="nothing is right"):
        prune(Table(view, lambda h: 0.0), Circuit.of(view, CIRCUIT))


def test_subsets_that_are_none(view):
    """An empty subset, or one outside the circuit."""
    table = Table(view, lambda h: 1.0, lambda t: 1.0)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(BadInput, match="'h', which is empty"):
        completeness(table, Circuit.of(view, {"g": ("last", [A]), "h": ("mid", [])}), draws=0, generator=generator)
    with pytest.raises(BadInput, match="heads that the circuit has not"):
        completeness(table, Circuit.of(view, {"g": ("last", [A])}), draws=0, generator=generator,
                     subsets={"x": [("last", B)]})  # fmt: skip
    with pytest.raises(BadInput, match="'half 0', which is empty"):
        completeness(table, Circuit.of(view, {"g": ("last", [A])}), draws=1, generator=generator)


def test_prompts_longer_than_the_means(view):
    with pytest.raises(BadInput, match="take the means over prompts that are as long"):
        Ablation(view, prompts(3), head_means(view, prompts(3, width=8)))
    with pytest.raises(BadInput, match="stops at a share"):
        prune(Table(view, lambda h: 1.0), Circuit.of(view, CIRCUIT), stop=0.0)
