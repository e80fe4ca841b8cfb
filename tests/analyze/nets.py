"""Small classifiers and their losses for tests of sharpness and paths."""

import torch
from torch import nn


class Relu(nn.Module):
    """y = W2 relu(W1 x), no biases: blind to (k W1, W2 / k)."""

    def __init__(self, seed=0, sizes=(5, 8, 3), dtype=torch.float64):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(sizes[0], sizes[1], bias=False, dtype=dtype)
        self.second = nn.Linear(sizes[1], sizes[2], bias=False, dtype=dtype)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Vision(nn.Module):
    """A convolutional classifier of 8 x 8 pictures with batch norm, dropout and an integer buffer."""

    def __init__(self, seed=0, classes=4):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Linear(4 * 16, 16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, classes)
        self.register_buffer("seen", torch.tensor([seed]))

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = nn.functional.avg_pool2d(x, 2).flatten(1)
        return self.head(self.drop(torch.relu(self.body(x))))


def rows(n=24, seed=0, width=5, classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=dtype)
    return x, torch.randint(classes, (n,), generator=generator)


def pictures(n=16, seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(classes, (n,), generator=generator)


def loss(model, batch):
    return model(batch[0]), batch[1]


def snapshot(model):
    """Everything that sharpness must leave alone."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    return state, flags, modes


def same(a, b):
    return all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1:] == b[1:]
