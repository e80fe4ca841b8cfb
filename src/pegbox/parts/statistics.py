"""Statistics of a model on calibration batches, gathered in one streaming pass.

Of each linear layer y = W x, from its input X (tokens x n) and, where asked, the gradient G (tokens x m) of its output:

    input_mean  mean x          input_covariance  mean x x^T (not centred)       gradient_sum     mean of g
    input_abs   mean |x|        input_norm        sqrt(mean x^2)                 gradient_abs     mean of |g|
                                input_unit_norm   mean of ||x_u||                gradient_square  mean of g^2

with x_u a head's part of an attention output's input (elsewhere a single feature: mean |x|), and g = G_u^T X_u over
each unit u: a batch, a sample or a token. Everything comes from hooks on inputs and output
gradients and not from `.grad`, so it exists over frozen and packed weights. Padding doesn't count. Layers that get the
very same input (q, k, v; gate, up) share one tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput, Corrupt, did_you_mean
from pegbox.parts.anatomy import Anatomy, Piece
from pegbox.parts.files import write_tensors
from pegbox.parts.statistics_parameters import ParameterSpec, sensitivity
from pegbox.parts.statistics_pass import GRADIENT_KINDS, INPUT_KINDS, Collector

__all__ = ["StageWeights", "StatSpec", "Statistics", "collect", "fingerprint"]

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
_SIDE = frozenset({"sample_ids", "sample_weight", "task_ids", "corrupted_ids", "sequence_ids"})  # not for a forward


@dataclass(frozen=True)
class StatSpec:
    """What to gather, over which layers.

    Args:
        kinds: names as in this file's header.
        targets: words for modules as `Anatomy.resolve` takes them; empty: all linears in the blocks.
        per: the unit whose gradient is squared or made absolute.
        batches: how many calibration batches are used at most; None: all that there are.
        batch_size: rows of a calibration batch, where a recipe's runner makes them.
        weigh: "token": every token counts alike; "sequence": covariances are summed over a sequence's tokens and
            averaged over sequences, means are averaged within a sequence first.
        normalize: divide each sequence's inputs by their largest absolute entry ("abs_max"), by the absolute value of
            their largest entry ("signed_max"), or not.
        dtype: what is accumulated in.
    """

    kinds: tuple[str, ...]
    targets: tuple[str, ...] = ()
    per: Literal["batch", "sample", "token"] = "batch"
    batches: int | None = 32
    batch_size: int = 8
    weigh: Literal["token", "sequence"] = "token"
    normalize: Literal["none", "abs_max", "signed_max"] = "none"
    dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in INPUT_KINDS | GRADIENT_KINDS:
                raise BadInput(f"Unknown statistic '{kind}'.{did_you_mean(kind, INPUT_KINDS | GRADIENT_KINDS)}")
        if not self.kinds or (self.batches is not None and self.batches < 1):
            raise BadInput("A statistic needs at least one kind and one batch.")

    @property
    def needs_loss(self) -> bool:
        """Whether anything is asked of gradients."""
        return bool(GRADIENT_KINDS & set(self.kinds))


@dataclass(frozen=True)
class StageWeights:
    """Asks the protocol's runner for what other stages left.

    Args:
        weights_of: key -> (stage, "start" | "end"): the model's weights there.
        allocations_of: key -> stage: what that stage selected.
    """

    weights_of: Mapping[str, tuple[str, str]]
    allocations_of: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Statistics(Mapping[str, Mapping[str, Tensor]]):
    """kind -> name -> tensor: input statistics by module, gradient statistics by parameter.

    Args:
        tensors: the values. Layers that share an input hold the same tensor object.
        sequences, tokens: how many counted. missing: targets that were never run (an expert that was never chosen).
        fingerprint: of the model's targets, names, shapes and weights; see `fingerprint`.
    """

    tensors: dict[str, dict[str, Tensor]]
    sequences: int = 0
    tokens: int = 0
    missing: tuple[str, ...] = ()
    fingerprint: str = ""

    def __getitem__(self, kind: str) -> Mapping[str, Tensor]:
        if kind not in self.tensors:
            raise KeyError(f"no statistic '{kind}' was gathered; there are {', '.join(self.tensors)}")
        return self.tensors[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def nbytes(self) -> int:
        """Bytes held, shared tensors once."""
        held = {id(t): t for group in self.tensors.values() for t in group.values()}
        return sum(t.numel() * t.element_size() for t in held.values())

    def save(self, path: Path) -> None:
        """One safetensors file; shared tensors are written once."""
        written: dict[int, str] = {}
        tensors, alias = {}, {}
        for kind, group in self.tensors.items():
            for name, tensor in group.items():
                key = f"{kind}/{name}"
                first = written.setdefault(id(tensor), key)
                if first == key:
                    tensors[key] = tensor
                alias[key] = first
        facts = {"sequences": self.sequences, "tokens": self.tokens, "missing": list(self.missing)}
        meta = {"alias": json.dumps(alias), "facts": json.dumps(facts), "fingerprint": self.fingerprint}
        write_tensors(path, tensors, metadata=meta)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote. Raises `Corrupt`."""
        from safetensors import safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            tensors: dict[str, dict[str, Tensor]] = {}
            for key, first in json.loads(meta["alias"]).items():
                kind, _, name = key.partition("/")
                tensors.setdefault(kind, {})[name] = held[first]
            facts = json.loads(meta["facts"])
            return cls(tensors, facts["sequences"], facts["tokens"], tuple(facts["missing"]), meta["fingerprint"])
        except Exception as error:
            raise Corrupt(f"{path} is not a readable statistics file ({error}).") from error


def collect(
    model: nn.Module,
    spec: StatSpec | ParameterSpec,
    batches: Iterable[Mapping[str, Any]],
    loss: Loss | None = None,
    per: Literal["batch", "sample", "token"] | None = None,
) -> Statistics:
    """Run `model` over calibration batches and gather what `spec` asks for.

    Args:
        batches: mappings of model inputs; `attention_mask` says what is padding.
        loss: (model, batch) -> scalar, for gradient statistics; default: the model's own loss on the batch's labels.
            It is used as it is: for per-sample gradients give a sum over samples, not their mean.
        per: overrides `spec.per`.

    Raises `BadInput` for no batch, for inputs or gradients that are not finite (the layer is named), and for targets
    that are no linear layers. The model comes back as it was, modes and flags included.
    """
    anatomy = Anatomy.of(model)
    if isinstance(spec, ParameterSpec):
        return _of_parameters(model, spec, batches, loss, anatomy)
    pieces = _targets(anatomy, spec)
    collector = Collector(spec, per or spec.per, anatomy, pieces)
    modes = {module: module.training for module in model.modules()}
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)  # nobody needs the weights' own gradients
    try:
        with collector.attached(model):
            _run(model, spec, batches, loss, collector, anatomy)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode
    if not collector.sequences:
        raise BadInput("No calibration batch was given. Calibration needs at least one row.")
    tensors, missing = collector.results()
    mark = fingerprint(model, anatomy, [piece.module for piece in pieces])
    return Statistics(tensors, collector.sequences, collector.tokens, tuple(missing), mark)


def _of_parameters(
    model: nn.Module, spec: ParameterSpec, batches: Iterable[Any], loss: Loss | None, anatomy: Anatomy
) -> Statistics:
    """{"sensitivity": sums by parameter}; see `statistics_parameters`."""
    device = next(model.parameters()).device

    def own(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k not in _SIDE}
        return _own_loss(model, inputs)

    names = spec.names(anatomy) if callable(spec.names) else spec.names
    sums = sensitivity(
        model,
        batches,
        loss or own,
        spec.reduce,
        names=names,
        limit=spec.batches,
        deterministic=spec.deterministic,
        head_std=spec.head_std,
    )
    return Statistics({"sensitivity": sums}, fingerprint=fingerprint(model, anatomy))


def _targets(anatomy: Anatomy, spec: StatSpec) -> list[Piece]:
    names = set(anatomy.resolve(spec.targets or ("all-linear",)))
    pieces = [piece for piece in anatomy.pieces if piece.module in names]
    other = [piece.module for piece in pieces if piece.kind != "linear"]
    if other:
        raise BadInput(f"Statistics are gathered on linear layers; '{other[0]}' is none. Leave it out of the targets.")
    return pieces


def _run(
    model: nn.Module,
    spec: StatSpec,
    batches: Iterable[Mapping[str, Any]],
    loss: Loss | None,
    collector: Collector,
    anatomy: Anatomy,
) -> None:
    device = next(model.parameters()).device
    for number, batch in enumerate(batches):
        if spec.batches is not None and number >= spec.batches:
            break
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k not in _SIDE}
        collector.begin(inputs)
        if spec.needs_loss:
            with torch.enable_grad(), _gradients_from(model, anatomy):
                value = loss(model, batch) if loss is not None else _own_loss(model, inputs)
                value.backward()
        else:
            with torch.no_grad():
                model(**{k: v for k, v in inputs.items() if k != "labels"})
        collector.end()


def _own_loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    value = getattr(model(**inputs), "loss", None)
    if value is None:
        raise BadInput("Gradient statistics need a loss: give batches with labels, or loss=...")
    return value


class _gradients_from:
    """While active, the graph begins at the embeddings' output, though no weight requires a gradient."""

    def __init__(self, model: nn.Module, anatomy: Anatomy):
        names = [p.module for p in anatomy.pieces if p.category == "embedding" and p.kind in ("embedding", "conv")]
        first = [anatomy.pieces[0].module] if not names else []
        self.modules = [model.get_submodule(anatomy.actual(name)) for name in [*names, *first]]

    def __enter__(self) -> None:
        self.handles = [m.register_forward_hook(_require_gradient, prepend=True) for m in self.modules]

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def _require_gradient(module: nn.Module, args: Any, out: Tensor) -> None:
    out.requires_grad_(True)


def fingerprint(model: nn.Module, anatomy: Anatomy | None = None, modules: Iterable[str] | None = None) -> str:
    """12 hex digits over the names, shapes and some entries of the modules' weights: whose statistics these are."""
    anatomy = anatomy or Anatomy.of(model)
    total = hashlib.sha256()
    for name in sorted(modules if modules is not None else (piece.module for piece in anatomy.linears())):
        weight = getattr(model.get_submodule(anatomy.actual(name)), "weight", None)
        total.update(f"{name}{anatomy.piece(name).shape}".encode())
        if isinstance(weight, Tensor) and not weight.is_meta:
            flat = weight.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float64)
            total.update(some.numpy().tobytes())
    return total.hexdigest()[:12]
