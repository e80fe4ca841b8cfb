"""What holds the weights of examples: a logit each, or a network that reads the example.

    scalar   s in R^N, one logit per training row; costs 3 numbers per row with AdamW
    neural   s_i = a . mean over tokens of the last hidden state of z_i + b, through a small language model; it can be
             saved, frozen and asked about rows it never saw

Both give (B,) weights for a batch and learn from its (B,) losses. The neural one needs a normaliser that does not
depend on who else is in the batch: log mean exp over the training rows' last known logits ("dataset", the default);
"batch" is the released code's. From arXiv:2510.27172, whose released code never trains the network; this does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput, Corrupt
from pegbox.parts.sampleweights import Activation, effective_samples, energy, weights_of
from pegbox.parts.view import SIDE_KEYS, Batch

__all__ = ["NeuralScheduler", "Posterior", "ScalarScheduler", "fingerprint_of", "mean_pooled"]

Prior = Callable[[Tensor, Tensor], Tensor]  # (logits, weights) of all rows -> what is added to the energy
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Posterior:
    """Running mean and standard deviation of samples of (N,) weights (Welford)."""

    def __init__(self, count: int):
        self.samples, self.mean, self.square = 0, torch.zeros(count), torch.zeros(count)

    def add(self, weights: Tensor) -> None:
        self.samples += 1
        values = weights.detach().float().cpu()
        gap = values - self.mean
        self.mean += gap / self.samples
        self.square += gap * (values - self.mean)

    @property
    def std(self) -> Tensor:
        return (self.square / max(1, self.samples - 1)).sqrt()

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "mean": self.mean.clone(), "square": self.square.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.samples, self.mean, self.square = state["samples"], state["mean"].clone(), state["square"].clone()


class ScalarScheduler:
    """A logit per training row.

    Args:
        count: N. activation, start: of the logits. make_optimizer: over the logits. prior: added to the energy.
    """

    def __init__(
        self,
        count: int,
        activation: Activation,
        start: float,
        make_optimizer: MakeOptimizer,
        prior: Prior | None = None,
        frozen: bool = False,
    ):
        if activation == "softmax" and count < 2:
            raise BadInput("Softmax weights need at least 2 training rows: one row alone always has weight 1.")
        self.activation, self.prior, self.frozen = activation, prior, frozen
        self.logits = nn.Parameter(torch.full((count,), start))
        self.optimizer = make_optimizer([self.logits])

    @torch.no_grad()
    def weights(self, rows: Tensor, batch: Batch | None = None) -> Tensor:
        """(B,) weights of rows, without graph."""
        return self.all_weights()[rows]

    @torch.no_grad()
    def all_weights(self) -> Tensor:
        return weights_of(self.logits, self.activation)

    def update(self, rows: Tensor, losses: Tensor, batch: Batch | None = None) -> None:
        """One step on mean_b w_b l_b + prior, the losses being constants."""
        if self.frozen:
            return
        with torch.enable_grad():
            weights = weights_of(self.logits, self.activation)
            loss = energy(weights[rows], losses.to(weights))
            if self.prior is not None:
                loss = loss + self.prior(self.logits, weights)
            (self.logits.grad,) = torch.autograd.grad(loss, [self.logits])
        self.optimizer.step()
        self.logits.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"logits": self.logits.detach().clone(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        self.optimizer.load_state_dict(state["optimizer"])

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps."""
        return {"logits": self.logits.detach()}

    def take(self, tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> None:
        """Go on from a file. Raises `BadInput` for another kind or number of rows."""
        found = tensors.get("logits")
        if words.get("scheduler") != "scalar" or found is None:
            raise BadInput("This scheduler file is not a scalar one; set scheduler to what it was made by.")
        if found.shape != self.logits.shape:
            raise BadInput(
                f"The scheduler file holds weights of {found.numel()} rows, the training set has {self.logits.numel()}."
                " A scalar scheduler belongs to its rows; to score other rows use scheduler: neural."
            )
        with torch.no_grad():
            self.logits.copy_(found)


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, D) mean of (B, T, D) over the positions where (B, T) mask is 1."""
    wide = mask.to(hidden)[..., None]
    return (hidden * wide).sum(1) / wide.sum(1).clamp(min=1)


def fingerprint_of(encoder: nn.Module) -> str:
    """16 hex digits over the names, shapes and dtypes of a network's parameters: which kind of encoder it is."""
    import hashlib

    text = "\n".join(f"{n} {tuple(p.shape)}" for n, p in sorted(encoder.named_parameters()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class NeuralScheduler(nn.Module):
    """A small language model with a linear head on the mean of its last hidden states.

    Args:
        encoder: gives hidden states through `output_hidden_states`; it trains unless frozen.
        count: training rows. activation: softmax (over the whole set or the batch), sigmoid or linear.
        normalise: "dataset": the softmax's denominator is the mean of exp(s) over all training rows, each at its last
            known logit; "batch": over the batch times its size, as the released code.
    """

    known: Tensor
    level: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        count: int,
        activation: Activation,
        normalise: str,
        make_optimizer: MakeOptimizer,
        frozen: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.encoder, self.activation, self.normalise, self.frozen = encoder, activation, normalise, frozen
        weight = torch.empty(1, width).normal_(0, 1 / math.sqrt(width), generator=generator) * 0.1
        self.head = nn.Linear(width, 1)
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.zero_()
        self.register_buffer("known", torch.zeros(count))  # each training row's last logit
        self.register_buffer("level", torch.zeros(()))  # log mean exp over them; kept with a frozen scheduler
        self.optimizer = make_optimizer(list(self.parameters()))
        self.requires_grad_(False)  # the run's own optimizer owns none of these

    def logits(self, batch: Batch) -> Tensor:
        """(B,) one per row of a padded batch."""
        inputs = {k: v for k, v in batch.items() if k not in SIDE_KEYS and k in ("input_ids", "attention_mask")}
        mask = inputs.get("attention_mask")
        if mask is None:
            raise BadInput("A neural scheduler reads padded rows with an attention mask; packed rows have none.")
        hidden = self.encoder(**inputs, output_hidden_states=True).hidden_states[-1]
        return self.head(mean_pooled(hidden.to(self.head.weight.dtype), mask))[:, 0]

    def activated(self, logits: Tensor) -> Tensor:
        """(B,) weights of (B,) logits."""
        if self.activation != "softmax":
            return logits.sigmoid() if self.activation == "sigmoid" else logits
        if self.normalise == "batch":
            if logits.shape[0] < 2:
                raise BadInput(
                    "normalise: batch gives a row alone in its batch weight 1 always. Use micro-batches of 2 rows and "
                    "more, or normalise: dataset."
                )
            return weights_of(logits)
        return (logits - self.level).exp()

    @torch.no_grad()
    def weights(self, rows: Tensor, batch: Batch | None = None) -> Tensor:
        """(B,) weights of a batch, without graph."""
        assert batch is not None
        self.eval()
        return self.activated(self.logits(batch))

    @torch.no_grad()
    def all_weights(self) -> Tensor:
        """(N,) weights of all training rows, at their last known logits."""
        return (self.known - self.level).exp() if self.activation == "softmax" else self.activated(self.known)

    @torch.no_grad()
    def refresh(self, rows: Tensor, batch: Batch) -> None:
        """Take in the logits of these rows."""
        self.eval()
        self.known[rows] = self.logits(batch).to(self.known)

    @torch.no_grad()
    def settle(self) -> None:
        """Make the level that of the known logits."""
        self.level.copy_(self.known.logsumexp(0) - math.log(self.known.shape[0]))

    def update(self, rows: Tensor, losses: Tensor, batch: Batch | None = None) -> None:
        """One step on mean_b w_b l_b through the network.

        With normalise dataset the level's value is that of all known logits and its gradient that of the batch's: a
        shift of all logits then changes nothing, as it should. (The others' logits held fixed, the head's bias would
        chase the rows of each batch.)
        """
        if self.frozen:
            return
        assert batch is not None
        trained = [*self.encoder.parameters(), *self.head.parameters()]
        for p in trained:
            p.requires_grad_(p.is_floating_point())
        try:
            with torch.enable_grad():
                logits = self.logits(batch)
                if self.activation == "softmax" and self.normalise == "dataset":
                    here = logits.logsumexp(0)
                    weights = (logits - (self.level + here - here.detach())).exp()
                else:
                    weights = self.activated(logits)
                energy(weights, losses.to(weights)).backward()
            self.optimizer.step()
        finally:
            for p in trained:
                p.grad = None
                p.requires_grad_(False)
        self.refresh(rows, batch)
        self.settle()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return super().state_dict(*args, **kwargs)
        return {"network": dict(super().state_dict()), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        super().load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps: the network, and the level that its weights are relative to."""
        return {k: v.detach() for k, v in super().state_dict().items() if k != "known"}

    def take(self, tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> None:
        """Go on from a file. Raises `BadInput` for another kind of encoder, `Corrupt` for missing tensors."""
        if words.get("scheduler") != "neural":
            raise BadInput("This scheduler file is not a neural one; set scheduler to what it was made by.")
        if words.get("encoder") != fingerprint_of(self.encoder):
            raise BadInput(
                "The scheduler file was made with another encoder. Name the same model as models: {scheduler: ...}."
            )
        missing, _ = super().load_state_dict(dict(tensors), strict=False)
        if set(missing) - {"known"}:
            raise Corrupt(f"The scheduler file lacks {sorted(missing)[0]}.")


def summary(weights: Tensor, posterior: Posterior) -> dict[str, float]:
    """A few numbers on all weights."""
    return {
        "effective_samples": effective_samples(weights.double()),
        "least": float(weights.min()),
        "most": float(weights.max()),
        "posterior_samples": float(posterior.samples),
    }
