"""Gaussian low-rank adapters: layer and PEFT model. The recipe's component is `pegbox.tuners.bayesian_lora`."""

from pegbox.tuners.bayesian.layer import GaussianLayer
from pegbox.tuners.bayesian.model import NAME, BayesianLoraConfig, BayesianLoraModel, gaussian_layers

__all__ = ["NAME", "BayesianLoraConfig", "BayesianLoraModel", "GaussianLayer", "gaussian_layers"]
