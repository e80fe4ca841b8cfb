"""Every built-in part through its axis's battery."""

import torch

from pegbox.data.base import DATA
from pegbox.objectives.base import OBJECTIVE
from pegbox.optim.base import OPTIM
from pegbox.parts.allocation import Allocation, Entries, Whole
from pegbox.prepare.base import PREPARE
from pegbox.select.base import SELECT
from pegbox.testing import (
    ObjectiveBattery,
    PolicyBattery,
    PreparationBattery,
    SelectorBattery,
    StepBattery,
    TunerBattery,
    WeightOpBattery,
    tiny_llama,
)
from pegbox.tuners import TUNER
from pegbox.weights.base import WEIGHTS

DENSITY = {"budget": {"density": 0.1}}


def entries():
    names = [n for n, p in tiny_llama().named_parameters() if "proj" in n]
    return Allocation({n: Entries(torch.arange(0, 60, 3, dtype=torch.int32)) for n in names})


class LateComponent:
    """The component is built when a test asks for it, so that collecting tests imports nothing heavy."""

    block: dict

    def make(self):
        from pegbox.parts.component import AXES

        return AXES[self.axis].validate(self.block)


def battery(base, block, **attributes):
    return type(base.__name__, (LateComponent, base), {"block": block, **attributes})


class TestRandom(battery(SelectorBattery, {"kind": "random", **DENSITY})):
    pass


class TestMagnitude(battery(SelectorBattery, {"kind": "magnitude", **DENSITY})):
    pass


class TestLowRankMagnitude(battery(SelectorBattery, {"kind": "low_rank_magnitude", "filter_rank": 4, **DENSITY})):
    pass


class TestPerNeuron(battery(SelectorBattery, {"kind": "per_neuron", "k": 3})):
    pass


class TestPerNeuronShared(battery(SelectorBattery, {"kind": "per_neuron", "k": 3, "shared_columns": True})):
    pass


class TestPerNeuronAnywhere(battery(SelectorBattery, {"kind": "per_neuron", "criterion": "random_block"})):
    pass


class TestHalf(battery(SelectorBattery, {"kind": "half"})):
    pass


class TestRegrow(battery(SelectorBattery, {"kind": "regrow", **DENSITY})):
    pass


class TestWhole(battery(SelectorBattery, {"kind": "whole"})):
    pass


class TestLora(battery(TunerBattery, {"kind": "lora", "r": 4, "target_modules": "all-linear"})):
    pass


class TestDora(battery(TunerBattery, {"kind": "lora", "r": 4, "use_dora": True, "target_modules": "all-linear"})):
    tolerance = 1e-5


class TestIa3(
    battery(
        TunerBattery,
        {"kind": "ia3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    )
):
    pass


class TestSparseInPlace(battery(TunerBattery, {"kind": "sparse", "execution": "in_place"}, allocation=entries())):
    pass


class TestSparseScatter(battery(TunerBattery, {"kind": "sparse", "execution": "scatter"}, allocation=entries())):
    pass


class TestSparseBypass(battery(TunerBattery, {"kind": "sparse", "execution": "bypass"}, allocation=entries())):
    pass


class TestSparseLean(battery(TunerBattery, {"kind": "sparse", "execution": "lean"}, allocation=entries())):
    pass


class TestSparseAbsolute(battery(TunerBattery, {"kind": "sparse", "coordinates": "absolute"}, allocation=entries())):
    pass


class TestFull(battery(TunerBattery, {"kind": "full"})):
    pass


class TestFullEntries(battery(TunerBattery, {"kind": "full"}, allocation=entries())):
    pass


class TestFullSomeTensors(
    battery(TunerBattery, {"kind": "full"}, allocation=Allocation({"model.layers.0.mlp.up_proj.weight": Whole()}))
):
    pass


class TestSft(battery(ObjectiveBattery, {"token": {"kind": "sft"}})):
    pass


class TestDft(battery(ObjectiveBattery, {"token": {"kind": "dft"}})):
    pass


class TestAsft(battery(ObjectiveBattery, {"kind": "asft", "mode": "asft", "lam": 0.1})):
    pass


class TestKlTerm(
    battery(ObjectiveBattery, {"token": {"kind": "sft"}, "terms": [{"kind": "kl_to_reference", "weight": 0.1}]})
):
    pass


class TestAdamW(battery(StepBattery, {"kind": "adamw", "lr": 0.05})):
    pass


class TestSgd(battery(StepBattery, {"kind": "sgd", "lr": 0.05})):
    pass


class TestAdafactor(battery(StepBattery, {"kind": "adafactor", "lr": 0.05})):
    pass


class TestAgedAdamW(battery(StepBattery, {"kind": "aged_adamw", "lr": 0.05})):
    pass


class TestSm3(battery(StepBattery, {"kind": "sm3", "lr": 0.05})):
    pass


class TestMezo(battery(StepBattery, {"kind": "mezo", "lr": 0.01})):
    pass


class TestCorruption(battery(PolicyBattery, {"kind": "corruption", "rate": 0.5, "form": "existing", "token": 3})):
    pass


class TestInterpolate(battery(WeightOpBattery, {"kind": "interpolate", "amount": 0.5})):
    pass


class TestLines(battery(WeightOpBattery, {"kind": "lines", "alpha": 0.5})):
    pass


class TestTaskArithmetic(battery(WeightOpBattery, {"kind": "task_arithmetic"}, tuned_inputs=2)):
    pass


class TestTies(battery(WeightOpBattery, {"kind": "ties"}, tuned_inputs=2)):
    pass


class TestCorda(battery(PreparationBattery, {"kind": "corda", "mode": "ipm", "rank": 4})):
    pass


class TestAddToken(battery(PreparationBattery, {"kind": "add_token", "token": "<mask>"})):
    pass


def test_the_tables_are_open():
    for axis in (DATA, OBJECTIVE, OPTIM, PREPARE, SELECT, TUNER, WEIGHTS):
        assert axis.kinds(), axis.name
