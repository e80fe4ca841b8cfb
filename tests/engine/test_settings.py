"""One home for each value; nothing ignored."""

from __future__ import annotations

from dataclasses import fields

import pytest

from pegbox.engine.settings import HOMES, REFUSED, TrainSettings
from pegbox.errors import BadInput


@pytest.mark.parametrize(
    ("name", "home"),
    [("learning_rate", "optim.lr"), ("output_dir", "--out"), ("max_steps", "steps"), ("num_train_epochs", "epochs")],
)
def test_a_second_home_is_refused_with_the_right_key(name, home):
    with pytest.raises(BadInput, match=f"train.{name} has its home elsewhere: give it as {home}"):
        TrainSettings(steps=1, train={name: 1})


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub", "token", "torch_compile", "deepspeed"])
def test_what_would_be_ignored_is_refused_with_the_reason(name):
    with pytest.raises(BadInput, match=f"train.{name} is not taken: "):
        TrainSettings(steps=1, train={name: True})


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(BadInput, match=r"Unknown key 'train.tf23'.*Did you mean 'tf32'"):
        TrainSettings(steps=1, train={"tf23": True})


@pytest.mark.parametrize("given", [{}, {"steps": 1, "epochs": 1}, {"steps": 1, "tokens": 5}])
def test_exactly_one_length(given):
    with pytest.raises(BadInput, match="exactly one of epochs, steps, tokens"):
        TrainSettings(**given)


def test_every_training_argument_is_passed_on_or_has_a_home_or_a_reason():
    from transformers import TrainingArguments

    names = {f.name for f in fields(TrainingArguments)}
    passed = {
        "tf32", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "use_liger_kernel",
        "liger_kernel_config", "neftune_noise_alpha", "log_level", "log_level_replica", "run_name", "project",
        "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "dataloader_num_workers",
        "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context", "dataloader_in_order", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "debug", "skip_memory_metrics",
        "local_rank",
    }  # fmt: skip
    unknown = names - set(HOMES) - set(REFUSED) - set(TrainSettings.model_fields) - passed
    assert not unknown, f"decide what becomes of {sorted(unknown)}"


def test_directions_follow_names_unless_given():
    assert not TrainSettings(steps=1).rising
    assert not TrainSettings(steps=1, metric="wiki_perplexity").rising
    assert TrainSettings(steps=1, metric="exact_match").rising
    assert not TrainSettings(steps=1, metric="exact_match", higher_is_better=False).rising


def test_what_may_change_on_resuming_is_not_pinned():
    a = TrainSettings(steps=4, save_every=2, tracker=("wandb",)).pinned()
    assert a == TrainSettings(steps=4, save_every=3, log_every=5, device="cpu").pinned()
    assert a != TrainSettings(steps=4, seed=1).pinned()


def test_epochs_come_to_steps_within_bounds():
    """Clipped to the upper bound, raised to the lower one; neither with steps, and not the wrong way round."""
    settings = TrainSettings(epochs=3, min_steps=10, max_steps=20)
    assert [settings.bounded(n) for n in (4, 15, 30)] == [10, 15, 20]
    assert TrainSettings(epochs=3).bounded(7) == 7
    with pytest.raises(BadInput, match="min_steps is 5, above max_steps, which is 4"):
        TrainSettings(epochs=1, min_steps=5, max_steps=4)
    with pytest.raises(BadInput, match="with steps leave them out"):
        TrainSettings(steps=1, max_steps=4)
    with pytest.raises(BadInput, match="exactly one of epochs, steps, tokens"):
        TrainSettings(min_steps=5, max_steps=10)
