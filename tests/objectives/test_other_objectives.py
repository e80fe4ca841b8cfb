"""Classification, and what DPO and GRPO hand to TRL."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from pegbox.errors import BadInput, Unsupported
from pegbox.objectives.base import OBJECTIVE


class Classifier:
    """A view whose logits are given."""

    def __init__(self, logits):
        self.given = logits

    def logits(self, batch):
        return self.given


def classified(block, logits, batch, totals=None):
    objective = OBJECTIVE.validate({"kind": "classification", **block})
    totals = totals or objective.count(batch)
    return dict(objective.losses(None, Classifier(logits), batch, totals, None))


def test_classification_is_cross_entropy():
    logits = torch.randn(5, 3, requires_grad=True)
    batch = {"labels": torch.tensor([0, 2, -100, 1, 1]), "sample_ids": torch.arange(5)}
    losses = classified({"label_smoothing": 0.1}, logits, batch)
    plain = F.cross_entropy(logits, batch["labels"], label_smoothing=0.1)
    assert torch.allclose(losses["classification"], plain)
    hits = (logits.argmax(-1) == batch["labels"]).sum() / 4
    assert losses["_accuracy"] == hits
    assert losses["_sample_ce"].shape == (5,)
    assert losses["_sample_ce"][2] == 0
    half = {"rows": torch.tensor(8.0, dtype=torch.float64)}  # as one of two equal micro-batches
    assert torch.allclose(classified({"label_smoothing": 0.1}, logits, batch, half)["classification"], plain / 2)


def test_classification_weights():
    logits, labels = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    each = F.cross_entropy(logits, labels, reduction="none")
    by_class = classified({"class_weights": [1.0, 3.0]}, logits, {"labels": labels})
    assert torch.allclose(by_class["classification"], (each * torch.tensor([1.0, 3.0, 3.0, 1.0])).sum() / 4)
    weights = torch.tensor([0.0, 1.0, 2.0, 1.0])
    by_row = classified({}, logits, {"labels": labels, "sample_weight": weights})
    assert torch.allclose(by_row["classification"], (each * weights).sum() / 4)


def test_classification_refuses_what_it_can_not_score():
    logits = torch.randn(2, 3)
    with pytest.raises(BadInput, match="outside the model's 3 classes"):
        classified({}, logits, {"labels": torch.tensor([0, 3])})
    with pytest.raises(BadInput, match="2 entries, the model has 3 classes"):
        classified({"class_weights": [1.0, 2.0]}, logits, {"labels": torch.tensor([0, 1])})
    with pytest.raises(BadInput, match="real numbers"):
        classified({}, logits, {"labels": torch.tensor([0.5, 1.0])})
    with pytest.raises(BadInput, match="no `labels`"):
        OBJECTIVE.validate("classification").count({})


@pytest.mark.parametrize(("kind", "config"), [("dpo", "DPOConfig"), ("grpo", "GRPOConfig")])
def test_options_are_fields_of_trls_config(kind, config, tmp_path):
    import trl

    options = OBJECTIVE.validate(kind).options()
    cls = getattr(trl, config)
    assert set(options) <= {f.name for f in dataclasses.fields(cls)}
    extra = {"per_device_train_batch_size": 8} if kind == "grpo" else {}
    built = cls(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, **options, **extra)
    assert all(getattr(built, name) == value for name, value in options.items())


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_hosted_objectives_say_who_computes_them(kind):
    objective = OBJECTIVE.validate(kind)
    assert objective.host == {"dpo": "preference", "grpo": "policy"}[kind]
    assert not objective.has_value
    assert objective.value(None, None, {}, {}) is None
    with pytest.raises(Unsupported, match="computed by TRL's trainer"):
        objective.losses(None, None, {}, {}, None)


def test_hosted_options_are_validated():
    for block, words in (
        ({"kind": "dpo", "beta": 0}, "greater than 0"),
        ({"kind": "dpo", "label_smoothing": 0.1}, "no meaning for loss_type 'sigmoid'"),
        ({"kind": "dpo", "loss_type": "exo_pair"}, "above 0"),
        ({"kind": "grpo", "num_generations": 1}, "greater than or equal to 2"),
        ({"kind": "grpo", "beta": -1}, "greater than or equal to 0"),
        ({"kind": "grpo", "rewards": "x"}, "Did you mean 'reward'"),
    ):
        with pytest.raises(BadInput, match=words):
            OBJECTIVE.validate(block)
