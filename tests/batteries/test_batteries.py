"""Every built-in part through its axis's battery."""

import pytest
import torch

from pegbox.analyze.base import ANALYZE
from pegbox.data.base import DATA
from pegbox.decode.base import DECODE
from pegbox.errors import Unsupported
from pegbox.objectives.base import OBJECTIVE
from pegbox.optim.base import OPTIM
from pegbox.parts.allocation import Allocation, Entries, PerTensor, Units, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.prepare.base import PREPARE
from pegbox.select.base import SELECT
from pegbox.testing import (
    AnalysisBattery,
    DecoderBattery,
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


def units():
    names = {"mlp.up_proj": 0, "mlp.down_proj": 1, "self_attn.v_proj": 0, "self_attn.o_proj": 1}
    index = torch.arange(8, 16, dtype=torch.int32)  # a head, or eight channels
    return Allocation({f"model.layers.{b}.{n}.weight": Units(a, index) for b in range(2) for n, a in names.items()})


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


class TestSensitivity(battery(SelectorBattery, {"kind": "sensitivity", "rank": 2, "tolerance": 0.5})):
    def stats(self, model):
        import pegbox
        from pegbox.testing import tiny_batch

        def loss(m, b):
            return m(**{k: b[k] for k in ("input_ids", "attention_mask", "labels")}).loss

        return pegbox.collect(model, self.make().statistics(), [tiny_batch()], loss=loss)

    def test_count_from_shapes_is_the_count(self):
        """From shapes alone only the budget is known; what is reached lies within the tolerance of it."""
        model, allocation = self.allocate()
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        wanted = sum(self.make().count(Anatomy.of(model), shapes).values())
        assert abs(sum(allocation.trained(shapes).values()) - wanted) <= 0.5 * wanted


class TestHalf(battery(SelectorBattery, {"kind": "half"})):
    pass


class TestRegrow(battery(SelectorBattery, {"kind": "regrow", **DENSITY})):
    pass


class TestUnits(battery(SelectorBattery, {"kind": "units", "ratios": {"v": 0.5, "o": 0.5, "u": 0.1, "d": 0.2}})):
    pass


class TestUnitsByWeight(battery(SelectorBattery, {"kind": "units", "ratios": {"d": 0.2}, "strategy": "weight"})):
    pass


class TestDecomposed(battery(SelectorBattery, {"kind": "decomposed", "budget": {"count": 9}, "rank_cap": 6})):
    pass


class TestKnapsack(battery(SelectorBattery, {"kind": "knapsack", "rho": 0.6, "importance": "random"})):
    """Statistics as a stage gathers them; how many weights train can't be known from shapes."""

    def stats(self, model):
        from pegbox.testing import tiny_batch

        batch = {k: v for k, v in tiny_batch().items() if k in {"input_ids", "labels"}}
        return self.make().statistics().gather(model, [batch], lambda m, b: m(**b).loss, lambda: None)

    def test_count_from_shapes_is_the_count(self):
        with pytest.raises(Unsupported):
            super().test_count_from_shapes_is_the_count()


class TestSmallest(battery(SelectorBattery, {"kind": "smallest", "density": 0.1})):
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


class TestSparseSites(
    battery(
        TunerBattery,
        {"kind": "sparse"},
        allocation=Allocation(
            {
                "model.layers.0.mlp.up_proj.weight": PerTensor("tuner", {"sites": [{"kind": "lora", "r": 2}]}),
                "model.layers.1.mlp.up_proj.weight": Entries(torch.arange(0, 60, 3, dtype=torch.int32)),
                "model.norm.weight": Whole(),
            }
        ),
    )
):
    pass


class TestSparseAbsolute(battery(TunerBattery, {"kind": "sparse", "coordinates": "absolute"}, allocation=entries())):
    pass


class TestBayesianLora(battery(TunerBattery, {"kind": "bayesian_lora", "r": 4})):
    pass


class TestSlices(battery(TunerBattery, {"kind": "slices"}, allocation=units())):
    pass


class TestSlicesContiguous(battery(TunerBattery, {"kind": "slices", "layout": "contiguous"}, allocation=units())):
    tolerance = 1e-5


class TestSlicesBypass(battery(TunerBattery, {"kind": "slices", "execution": "bypass"}, allocation=units())):
    pass


class TestSlicesAbsolute(battery(TunerBattery, {"kind": "slices", "coordinates": "absolute"}, allocation=units())):
    pass


class TestLowRankSparse(
    battery(
        TunerBattery,
        {"kind": "lowrank_sparse", "r": 4, "alpha": 8, "target_modules": ["all-linear"]},
        allocation=entries(),
    )
):
    tolerance = 1e-5


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


class TestTaskBalanced(battery(ObjectiveBattery, {"kind": "task_balanced"})):
    pass


class TestTaskBalancedBySample(battery(ObjectiveBattery, {"kind": "task_balanced", "mode": "case4"})):
    pass


class TestTaskBalancedFocal(battery(ObjectiveBattery, {"kind": "task_balanced", "mode": "focal_sample"})):
    pass


class TestTaskBalancedAsft(battery(ObjectiveBattery, {"kind": "task_balanced", "inner": {"kind": "asft"}})):
    pass


class TestMultiView(battery(ObjectiveBattery, {"kind": "multi_view", "views": {}})):
    pass


class TestKlTerm(
    battery(ObjectiveBattery, {"token": {"kind": "sft"}, "terms": [{"kind": "kl_to_reference", "weight": 0.1}]})
):
    pass


class TestNuclearNorm(
    battery(ObjectiveBattery, {"token": {"kind": "sft"}, "terms": [{"kind": "nuclear_norm", "min_side": 8}]})
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


class TestViews(battery(PolicyBattery, {"kind": "views", "eos_as_pad": True})):
    pass


class TestCorruption(battery(PolicyBattery, {"kind": "corruption", "rate": 0.5, "form": "existing", "token": 3})):
    pass


class TestLayout(battery(PolicyBattery, {"kind": "layout", "seq_length": 32})):
    pass


class TestMixture(battery(PolicyBattery, {"kind": "mixture"})):
    pass


class TestInterpolateByBlock(
    battery(WeightOpBattery, {"kind": "interpolate", "blocks": [0.2, 0.8], "groups": {"head": 1.0}})
):
    pass


class TestSparsify(battery(WeightOpBattery, {"kind": "sparsify", "layers": ["block 0", "lm_head"]})):
    pass


class TestSparsifyRank(battery(WeightOpBattery, {"kind": "sparsify", "layers": ["mlp"], "rank": 2})):
    pass


class TestTuco(battery(AnalysisBattery, {"kind": "tuco", "tokens": True, "output": True})):
    pass


class TestTuningScale(battery(AnalysisBattery, {"kind": "tuning_scale", "grid": [0.5, 1.0], "folds": 2})):
    pass


class TestPath(battery(AnalysisBattery, {"kind": "path", "grid": [0, 0.5, 1], "shifted": {"other": "any"}})):
    pass


class TestStragglers(battery(AnalysisBattery, {"kind": "sharpness", "steps": 2, "profile": [0, 0.5, 1]})):
    pass


BOXES = {"boxes": 3, "form": "compact", "objects": list("abcdefghijk"), "labels": list("ABCDEFGH")}
FEW = {"samples": 4, "evaluation": 6, "means": 6, "minimal_samples": 4, "draws": 2, "halves": 2}
MASKS = {"desiderata": ["positional"], "samples": 8, "epochs": 1}
CIRCUITS = {"kind": "circuits", "find": "prune", "task": BOXES, **FEW, "masks": MASKS}


class TestCircuits(battery(AnalysisBattery, CIRCUITS)):
    pass


class TestInterpolate(battery(WeightOpBattery, {"kind": "interpolate", "amount": 0.5})):
    pass


class TestLines(battery(WeightOpBattery, {"kind": "lines", "alpha": 0.5})):
    pass


class TestTaskArithmetic(battery(WeightOpBattery, {"kind": "task_arithmetic"}, tuned_inputs=2)):
    pass


class TestDare(battery(WeightOpBattery, {"kind": "dare", "drop": 0.5}, tuned_inputs=2)):
    pass


class TestTies(battery(WeightOpBattery, {"kind": "ties"}, tuned_inputs=2)):
    pass


class TestCorda(battery(PreparationBattery, {"kind": "corda", "mode": "ipm", "rank": 4})):
    pass


class TestPermute(battery(PreparationBattery, {"kind": "permute"})):
    pass


class TestPrune(battery(PreparationBattery, {"kind": "prune", "mode": "W", "ratio": 0.2, "heads": 2, "neurons": 0.25})):
    pass


class TestAddToken(battery(PreparationBattery, {"kind": "add_token", "token": "<mask>"})):
    pass


PAIR = {"deltas": [{"tuned": "tuned", "reference": "reference", "weight": 0.7}]}


class TestEmulated(battery(DecoderBattery, {"kind": "emulated", **PAIR})):
    pass


class TestEmulatedFiltered(battery(DecoderBattery, {"kind": "emulated", **PAIR, "top_p": 0.8})):
    pass


class TestEmulatedInBlocks(battery(DecoderBattery, {"kind": "emulated", **PAIR, "block_size": 3})):
    pass


class TestTransferQ(battery(DecoderBattery, {"kind": "transfer_q", "k": 3, "horizon": 2, "alpha": 0.2})):
    pass


class TestPartialReward(battery(DecoderBattery, {"kind": "transfer_q", "value": "partial", "k": 3})):
    pass


class TestBestOf(battery(DecoderBattery, {"kind": "best_of", "n": 3}, greedy=False)):
    pass


class TestScaled(battery(DecoderBattery, {"kind": "scaled", "alpha": 0.5})):
    pass


def test_the_tables_are_open():
    for axis in (ANALYZE, DATA, DECODE, OBJECTIVE, OPTIM, PREPARE, SELECT, TUNER, WEIGHTS):
        assert axis.kinds(), axis.name
