"""A base and its tuned version as one thing: two models of one architecture, or one model with its adapters off and on.

    step:  x -> (block_base(x), block_tuned(x))          the same input and arguments for both, block by block

The walk runs on the tuned model's stream: embedding, masks, positions, final norm and head are the tuned model's. An
adapter's blocks run twice, off and on, so that one copy of the weights is enough; switching a block's adapters touches
that block only. Two models may stand on two devices.

What this file does not know: what is computed of the two outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput, Unsupported
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.blocks import BlockWalk, Walk

__all__ = ["ModelPair", "switched_off"]


class ModelPair:
    """Base and tuned model, block by block.

    Args:
        tuned: the tuned model (plain, or with adapters attached).
        base: the base, or None where `tuned` with its adapters off is the base.
        tokenizers: both tokenizers, to be compared, if known.

    Raises:
        BadInput: other numbers of blocks, widths, kinds of blocks or vocabularies; no adapter and no base.
        Unsupported: an encoder-decoder, whose residual streams are two.
    """

    def __init__(self, tuned: nn.Module, base: nn.Module | None = None, tokenizers: tuple[Any, Any] | None = None):
        if getattr(getattr(tuned, "config", None), "is_encoder_decoder", False):
            raise Unsupported("A pair is walked along one residual stream; an encoder-decoder has two.")
        if base is not None and hasattr(base, "peft_config"):
            raise BadInput("The base of a pair has an adapter attached. Give the bare model, or leave it out.")
        if any(c.is_prompt_learning or c.is_adaption_prompt for c in getattr(tuned, "peft_config", {}).values()):
            raise Unsupported("A prompt adapter adds positions, so base and tuned model have no stream in common.")
        self.tuned, self.base = tuned, base
        self.walk = BlockWalk(tuned)
        anatomy = Anatomy.of(tuned)
        if base is None:
            self._switches = [_adapters_in(block) for block in self.walk.blocks]
            self.everywhere = _adapters_in(tuned)
            if not self.everywhere:
                raise BadInput("The tuned model has no adapter to switch off. Give its base as a second model.")
            self.base_blocks = self.walk.blocks
            changed = any(_adapters_in(tuned.get_submodule(anatomy.actual(n))) for n in anatomy.resolve("embedding"))
        else:
            self._base_walk = BlockWalk(base)
            self._switches, self.everywhere = [], []
            _check_alike(self.walk, self._base_walk)
            self.base_blocks = self._base_walk.blocks
            changed = not _same_embeddings(tuned, base)
        if tokenizers is not None:
            _check_tokenizers(*tokenizers)
        if changed:
            warnings.warn(
                "The embeddings of base and tuned model differ. Both are walked from the tuned model's; the difference "
                "of the embeddings counts as neither's.",
                stacklevel=2,
            )
        self._warn_quantized()

    def __len__(self) -> int:
        return len(self.walk)

    @property
    def shared(self) -> bool:
        """One copy of the weights, the base being the tuned model with its adapters off."""
        return self.base is None

    @contextmanager
    def as_evaluated(self) -> Iterator[None]:
        """Both in evaluation mode for a while; afterwards every module is in the mode it was in."""
        models = [self.tuned, *([self.base] if self.base is not None else [])]
        modes = [(module, module.training) for model in models for module in model.modules()]
        try:
            for model in models:
                model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def as_base(self) -> Iterator[nn.Module]:
        """The base as a model that can be called; a shared one has its adapters off meanwhile."""
        if self.base is not None:
            yield self.base
            return
        with switched_off(self.everywhere):
            yield self.tuned

    def begin(self, inputs: Mapping[str, Any]) -> Walk:
        """Run what lies before the tuned model's blocks."""
        return self.walk.begin(inputs)

    def step(self, walk: Walk) -> tuple[Tensor, Tensor, Tensor]:
        """(x, base block's output, tuned block's output), each (B, T, D); the walk goes on with the tuned one."""
        x = walk.hidden
        args, kwargs = walk.calls[walk.at]
        args, kwargs = ((x, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": x})
        below = self.base_step(walk.at, args, kwargs)
        return x, below[0] if isinstance(below, tuple | list) else below, self.walk.step(walk)

    def base_step(self, index: int, args: Sequence[Any], kwargs: Mapping[str, Any], call: Any = None) -> Any:
        """One block of the base on given arguments; the result comes back to the arguments' device.

        `call`: what is called instead of the block (its own forward, where that is replaced for a while).
        """
        block = self.base_blocks[index]
        call = call or block
        if self.base is None:
            with switched_off(self._switches[index]):
                return call(*args, **kwargs)
        place = next(block.parameters()).device
        here = next((t.device for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), place)
        if place == here:
            return call(*args, **kwargs)
        return _moved(call(*_moved(tuple(args), place), **_moved(dict(kwargs), place)), here)

    def base_end(self, inputs: Mapping[str, Any]) -> Tensor:
        """(B, T, D) the plain base's own state after its last block."""
        with self.as_base() as base:
            walker = self.walk if self.base is None else self._base_walk
            place = next(base.parameters()).device
            walk = walker.begin(_moved(dict(inputs), place))
            for _ in range(len(walker)):
                walker.step(walk)
        return walk.hidden

    def _warn_quantized(self) -> None:
        if self.base is not None and _is_packed(self.base) != _is_packed(self.tuned):
            warnings.warn(
                "One model of the pair is quantized and the other is not: the rounding counts as tuning. Load both "
                "from the same quantized weights.",
                stacklevel=3,
            )


@contextmanager
def switched_off(modules: Sequence[Any]) -> Iterator[None]:
    """Adapters off for a while; afterwards all is as before, also on exceptions: activity, merging, gradients' flags.

    Layers whose flag is all there is to switch have it set; others (merged, copied, written in place) are switched by
    their own methods.
    """
    on = [m for m in modules if not m._disable_adapters]
    quick = [m for m in on if _is_quick(m)]
    slow = [(m, [(p, p.requires_grad) for p in m.parameters()], _merged(m)) for m in on if not _is_quick(m)]
    try:
        for module in quick:
            module._disable_adapters = True
        for module, _, _ in slow:
            module.enable_adapters(False)
        yield
    finally:
        for module in quick:
            module._disable_adapters = False
        for module, flags, merged in slow:
            module.enable_adapters(True)
            if merged and not module.merged:
                module.merge(adapter_names=merged)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def _is_quick(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return getattr(type(module), "enable_adapters", None) is BaseTunerLayer.enable_adapters and not module.merged


def _merged(module: Any) -> list[str]:
    return list(getattr(module, "merged_adapters", ()) or ())


def _adapters_in(module: nn.Module) -> list[Any]:
    """Modules below that hold adapters which can be switched."""
    if not hasattr(module, "modules"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [m for m in module.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _check_alike(tuned: BlockWalk, base: BlockWalk) -> None:
    if len(tuned) != len(base):
        raise BadInput(f"The tuned model has {len(tuned)} blocks and the base {len(base)}. Give two of one model.")
    for index, (a, b) in enumerate(zip(tuned.blocks, base.blocks)):
        if type(a) is not type(b):
            raise BadInput(
                f"Block {index} is a {type(a).__name__} in the tuned model and a {type(b).__name__} in the base."
            )
    sizes = [_width(walk.model) for walk in (tuned, base)]
    if sizes[0] != sizes[1]:
        raise BadInput(f"The tuned model is {sizes[0]} wide and the base {sizes[1]}. Give two versions of one model.")


def _width(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", None)


def _embedding(model: nn.Module) -> Tensor | None:
    get = getattr(model, "get_input_embeddings", None)
    try:
        module = get() if get is not None else None
    except NotImplementedError:
        return None
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _same_embeddings(tuned: nn.Module, base: nn.Module) -> bool:
    a, b = _embedding(tuned), _embedding(base)
    if a is None or b is None:
        return True
    return a.shape == b.shape and torch.equal(a, b.to(a.device, a.dtype))


def _check_tokenizers(tuned: Any, base: Any) -> None:
    vocabularies = [t.get_vocab() if hasattr(t, "get_vocab") else None for t in (tuned, base)]
    if vocabularies[0] != vocabularies[1]:
        raise BadInput(
            "The tuned model and the base have different tokenizers, so their streams hold different tokens."
        )


def _is_packed(model: nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None)


def _moved(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, tuple | list):
        return type(tree)(_moved(x, device) for x in tree)
    if isinstance(tree, dict):
        return {k: _moved(v, device) for k, v in tree.items()}
    return tree
