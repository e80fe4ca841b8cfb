"""What the mixins know of the trainer they are mixed into, for the type checker only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["TrainerLike"]

if TYPE_CHECKING:

    class TrainerLike:
        """A transformers trainer: `model`, `args`, `state`, `control`, `optimizer`, `accelerator`, and its methods."""

        model: Any
        optimizer: Any
        lr_scheduler: Any
        log: Any
        control: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
        def get_train_dataloader(self) -> Any: ...
        def create_optimizer(self, model: Any = None) -> Any: ...
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any: ...
        def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any: ...
        def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any: ...
        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any: ...
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any: ...
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any: ...
        def evaluate(
            self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
        ) -> dict[str, float]: ...

else:
    TrainerLike = object
