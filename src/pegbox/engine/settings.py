"""How a stage is trained, apart from the method: length, batch, evaluation, checkpoints, precision, device.

Each value has one home. Fields of transformers' `TrainingArguments` that are not here may be given under `train`,
unless another key holds them; then the error names that key.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pegbox.errors import BadInput, did_you_mean

__all__ = ["TrainSettings"]

Positive = Annotated[int, Field(ge=1)]

# Where the values of TrainingArguments fields live instead.
HOMES = {
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.max_grad_norm",
    "lr_scheduler_type": "optim.schedule",
    "lr_scheduler_kwargs": "optim.schedule",
    "warmup_steps": "optim.warmup",
    "warmup_ratio": "optim.warmup",
    "optim": "optim.kind",
    "optim_args": "optim",
    "optim_target_modules": "optim",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "micro_batch",
    "gradient_accumulation_steps": "batch",
    "per_device_eval_batch_size": "eval_batch",
    "auto_find_batch_size": "micro_batch=auto",
    "seed": "seed",
    "data_seed": "seed",
    "bf16": "precision",
    "fp16": "precision",
    "use_cpu": "device",
    "activation_checkpointing": "gradient_checkpointing",
    "eval_strategy": "eval_every",
    "eval_steps": "eval_every",
    "save_strategy": "save_every",
    "save_steps": "save_every",
    "logging_strategy": "log_every",
    "logging_steps": "log_every",
    "logging_first_step": "log_every",
    "load_best_model_at_end": "select",
    "metric_for_best_model": "metric",
    "greater_is_better": "higher_is_better",
    "resume_from_checkpoint": "--resume",
    "output_dir": "--out",
    "fsdp": "sharding",
    "fsdp_config": "sharding",
    "label_smoothing_factor": "objective",
    "report_to": "tracker",
}
# Fields that would be ignored, with the reason.
REFUSED = {
    "hub_model_id": "publishing is done by `pegbox export --to hub`",
    "hub_token": "secrets are never written; log in with `hf auth login`",
    "hub_strategy": "publishing is done by `pegbox export --to hub`",
    "hub_private_repo": "publishing is done by `pegbox export --to hub`",
    "hub_always_push": "publishing is done by `pegbox export --to hub`",
    "hub_revision": "publishing is done by `pegbox export --to hub`",
    "push_to_hub": "publishing is done by `pegbox export --to hub`",
    "token": "secrets are never written; log in with `hf auth login`",
    "dataloader_drop_last": "every step has exactly `batch` rows",
    "train_sampling_strategy": "the order is the seed's, or a data policy's",
    "length_column_name": "the order is the seed's, or a data policy's",
    "ignore_data_skip": "resuming starts at its step and skips nothing",
    "remove_unused_columns": "pegbox's collator decides what is in a batch",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "save_only_model": "a checkpoint without the optimizer could not be resumed",
    "enable_jit_checkpoint": "SIGTERM always writes a checkpoint",
    "restore_callback_states_from_checkpoint": "callbacks with a state are always restored",
    "disable_tqdm": "the display is a callback",
    "do_train": "it has no effect",
    "do_eval": "it has no effect",
    "do_predict": "it has no effect",
    "deepspeed": "checkpoints of DeepSpeed engines can't be resumed exactly; use `sharding: full`",
    "label_names": "an objective takes what it needs from the batch",
    "include_num_input_tokens_seen": "tokens are always counted",
    "average_tokens_across_devices": "denominators are always summed over processes",
    "eval_on_start": "the bare base is evaluated before training",
    "full_determinism": "set CUBLAS_WORKSPACE_CONFIG and torch.use_deterministic_algorithms yourself",
    "prediction_loss_only": "evaluation takes what the objective and the metric need",
    "eval_do_concat_batches": "evaluation takes what the objective and the metric need",
    "eval_use_gather_object": "evaluation takes what the objective and the metric need",
    "eval_accumulation_steps": "evaluation takes what the objective and the metric need",
    "include_for_metrics": "evaluation takes what the objective and the metric need",
    "batch_eval_metrics": "evaluation takes what the objective and the metric need",
    "eval_delay": "evaluation happens every `eval_every` steps",
    "fp16_full_eval": "precision is for training and evaluation alike",
    "bf16_full_eval": "precision is for training and evaluation alike",
    "save_on_each_node": "checkpoints go to one folder that all processes see",
    "torch_compile": "objectives run the model in parts, which a compiled whole would not see",
    "torch_compile_backend": "objectives run the model in parts, which a compiled whole would not see",
    "torch_compile_mode": "objectives run the model in parts, which a compiled whole would not see",
    "torch_empty_cache_steps": "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True instead",
    "accelerator_config": "the engine has its own data loader",
    "parallelism_config": "several processes share the batch, or the weights with `sharding: full`",
    "log_on_each_node": "one process writes one log",
    "use_cache": "training never uses the key-value cache",
}


class TrainSettings(BaseModel):
    """The engine's settings.

    Args:
        epochs, steps, tokens: how long; exactly one. Epochs may be fractions; tokens are input tokens without padding.
        min_steps, max_steps: bounds on the optimizer steps that epochs or tokens come to.
        batch: rows per optimizer step over all processes and micro-batches; every step has exactly that many.
        micro_batch: rows per forward and process; "auto" takes the largest that fits, halving from `batch`.
        eval_batch: rows per evaluation forward; None: as in training.
        eval_every, save_every: steps between evaluations and checkpoints (fractions of a stage are the caller's to
            compute); None: never. With an evaluation there is one at the end too.
        save_total_limit: newest checkpoints kept, beside the best; None keeps all.
        log_every: steps between log records.
        metric: the evaluation's value that decides on best and early stopping; "loss" is the objective's on the
            evaluation set, any other name is one of the evaluator's.
        higher_is_better: its direction; None: False for names that end in loss or perplexity, else True.
        select: which weights the stage ends with.
        early_stopping: stop after this many evaluations in a row without a better value.
        gradient_checkpointing: keep block inputs only and compute the rest again in backward.
        precision: fp32, or bf16 autocast.
        sharding: none, or full: weights, gradients and optimizer state split over the processes.
        probe: before step 1, run the longest micro-batch and an evaluation batch (finds lack of memory, measures saved
            bytes), and count the FLOPs of step 1.
        tracker: names of transformers' reporting integrations ("tensorboard", "wandb", ...).
        train: further `TrainingArguments` fields.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    tokens: Positive | None = None
    min_steps: Positive | None = None
    max_steps: Positive | None = None
    batch: Positive = 8
    micro_batch: Positive | Literal["auto"] = "auto"
    eval_batch: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    eval_every: Positive | None = None
    save_every: Positive | None = None
    save_total_limit: Positive | None = 2
    log_every: Positive = 1
    metric: str = "loss"
    higher_is_better: bool | None = None
    select: Literal["last", "best"] = "last"
    early_stopping: Positive | None = None
    gradient_checkpointing: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    sharding: Literal["none", "full"] = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    probe: bool = True
    tracker: tuple[str, ...] = ()
    train: dict[str, Any] = Field(default_factory=dict)

    @field_validator("train")
    @classmethod
    def _at_home(cls, fields: dict[str, Any]) -> dict[str, Any]:
        from dataclasses import fields as fields_of

        from transformers import TrainingArguments

        known = {f.name for f in fields_of(TrainingArguments)}
        for name in fields:
            if name in HOMES:
                raise BadInput(f"train.{name} has its home elsewhere: give it as {HOMES[name]}.")
            if name in REFUSED:
                raise BadInput(f"train.{name} is not taken: {REFUSED[name]}.")
            if name in cls.model_fields:
                raise BadInput(f"train.{name} has its home elsewhere: give it as {name}.")
            if name not in known:
                free = (known - set(HOMES) - set(REFUSED)) | set(cls.model_fields)
                raise BadInput(f"Unknown key 'train.{name}'.{did_you_mean(name, free)}")
        return fields

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        given = [n for n in ("epochs", "steps", "tokens") if getattr(self, n) is not None]
        if len(given) != 1:
            raise BadInput(f"Give exactly one of epochs, steps, tokens; got {', '.join(given) or 'none'}.")
        if self.steps is not None and (self.min_steps is not None or self.max_steps is not None):
            raise BadInput("min_steps and max_steps bound what epochs or tokens come to; with steps leave them out.")
        if self.min_steps is not None and self.max_steps is not None and self.min_steps > self.max_steps:
            raise BadInput(f"min_steps is {self.min_steps}, above max_steps, which is {self.max_steps}.")
        if self.eval_every is None and (self.early_stopping is not None or self.select == "best"):
            what = "early_stopping" if self.early_stopping is not None else "select: best"
            raise BadInput(f"{what} needs evaluations: give eval_every.")
        return self

    @property
    def rising(self) -> bool:
        """True if a higher value of `metric` is better."""
        if self.higher_is_better is not None:
            return self.higher_is_better
        return not self.metric.endswith(("loss", "perplexity", "nll"))

    def bounded(self, steps: int) -> int:
        """`steps` within min_steps and max_steps."""
        return max(self.min_steps or 1, min(steps, self.max_steps or steps))

    def pinned(self) -> dict[str, Any]:
        """The settings that must be the same on resuming, as JSON (where and how it is shown may change)."""
        free = {"save_total_limit", "log_every", "tracker", "device", "save_every"}
        return self.model_dump(mode="json", exclude=free)
