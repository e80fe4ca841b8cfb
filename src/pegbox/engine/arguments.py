"""What a host's trainer is given: its arguments from the settings, and its further inputs.

A supervised host gets pegbox's loader, so its arguments hold no batch or length; they are set once the steps are known.
A host of TRL has its own loader and loss: rows, steps and the objective's `options()` go in as arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from pegbox.engine.distributed import world
from pegbox.engine.hosts import arguments_class
from pegbox.engine.settings import TrainSettings
from pegbox.errors import BadInput, Unsupported
from pegbox.objectives.base import Objective
from pegbox.optim.base import Step

__all__ = ["as_bad_input", "enable_checkpointing", "host_arguments", "host_inputs", "no_progress_bars"]


def host_arguments(objective: Objective, step: Step, settings: TrainSettings, folder: Path) -> Any:
    """The host's arguments. Raises `BadInput` where the host refuses a combination, or there is no such device."""
    fields = {"ddp_broadcast_buffers": False, **settings.train}
    own_data = objective.host == "supervised"
    if not own_data:
        fields |= _own_loader(objective, settings)
    with as_bad_input(objective):
        arguments = arguments_class(objective.host)(
            output_dir=str(folder),
            learning_rate=step.lr,
            max_grad_norm=step.max_grad_norm,
            use_cpu=settings.device == "cpu",
            seed=settings.seed % 2**32,
            report_to=list(settings.tracker),
            disable_tqdm=True,
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            ignore_data_skip=own_data,
            **fields,
        )
    if settings.device == "cuda" and arguments.device.type != "cuda":
        raise BadInput("device 'cuda' was asked for and no GPU is visible. Use --device cpu, or see `pegbox doctor`.")
    return arguments


def _own_loader(objective: Objective, settings: TrainSettings) -> dict[str, Any]:
    """Length and batch for a trainer with a loader of its own; `auto` is the whole batch at once there."""
    if settings.tokens is not None:
        raise Unsupported(f"Objective '{objective.kind}' counts steps or epochs, not tokens.")
    if settings.min_steps is not None or settings.max_steps is not None:
        raise Unsupported(f"Objective '{objective.kind}' takes no min_steps or max_steps; give steps.")
    if settings.sharding == "full":
        raise Unsupported(f"Objective '{objective.kind}' can't be used with sharding 'full'.")
    micro = settings.batch // world() if settings.micro_batch == "auto" else int(settings.micro_batch)
    if micro == 0 or settings.batch % (micro * world()):
        raise BadInput(
            f"batch {settings.batch} is no multiple of {max(1, micro)} rows x {world()} processes; choose another "
            "batch or micro_batch."
        )
    own: dict[str, Any] = getattr(objective, "options", dict)()
    return {
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": settings.eval_batch or micro,
        "gradient_accumulation_steps": settings.batch // (micro * world()),
        "max_steps": settings.steps or -1,
        "num_train_epochs": settings.epochs or 1.0,
        "bf16": settings.precision == "bf16",
        **own,
    }


def host_inputs(objective: Objective, tokenizer: Any, rewards: Sequence[Callable[..., Any]]) -> dict[str, Any]:
    """What the host's trainer takes beside model, arguments and data. Raises `BadInput` for a policy without reward."""
    if objective.host == "supervised":
        return {}
    inputs: dict[str, Any] = {"processing_class": tokenizer}
    if objective.host == "policy":
        if not rewards:
            raise BadInput(f"Objective '{objective.kind}' needs a reward; none was given for this data.")
        inputs["reward_funcs"] = list(rewards)
    return inputs


@contextmanager
def as_bad_input(objective: Objective) -> Iterator[None]:
    """transformers and TRL refuse combinations of arguments with ValueErrors that say what is wrong."""
    try:
        yield
    except ValueError as error:
        raise BadInput(f"The trainer of objective '{objective.kind}' refuses these settings: {error}") from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep the data sets' own progress bars off the terminal while a trainer prepares its rows."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def enable_checkpointing(model: nn.Module, settings: TrainSettings) -> None:
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise Unsupported(f"{type(model).__name__} has no gradient checkpointing; train without it.")
    enable(
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            **settings.train.get("gradient_checkpointing_kwargs", {}),
        }
    )
    release = getattr(model, "disable_input_require_grads", None)
    reentrant = settings.train.get("gradient_checkpointing_kwargs", {}).get("use_reentrant", False)
    if release is not None and not reentrant:
        release()  # only reentrant checkpoints need inputs with a gradient; it would run down through frozen blocks
