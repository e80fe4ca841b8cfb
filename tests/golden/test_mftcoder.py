"""MFTCoder, CoBa and FAMO against their official code: losses and gradients, weights, tokenisation, collation."""

import json
import math

import numpy as np
import pytest
import torch

from conftest import GOLDEN, golden_cases
from pegbox.data.collate import PaddingCollator
from pegbox.data.encode import encode_rows
from pegbox.data.formats import convert, detect
from pegbox.data.layouts import arranged
from pegbox.objectives.base import OBJECTIVE
from pegbox.parts.balance import Convergence, famo_slope, famo_value, famo_weights
from pegbox.parts.context import Context

ROOT = GOLDEN / "mftcoder"
LOSSES = golden_cases("mftcoder", "loss_case*.npz")

pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason=f"no golden vectors in {ROOT}")


def read(name):
    file = ROOT / name
    return json.loads(file.read_text()) if file.is_file() else {}


# ---- losses ----


class LogitsView:
    """Given logits as a model: its hidden rows are the logits, its head does nothing."""

    def __init__(self, logits):
        self.logits_given, self.model = logits, torch.nn.Module()
        self.vocabulary, self.head_parameters = logits.shape[-1], []

    def hidden(self, batch):
        return torch.nn.functional.pad(self.logits_given, (0, 0, 0, 1))

    def head(self, hidden):
        return hidden

    def targets(self, batch):
        from pegbox.parts.tokens import shift

        return shift(batch["labels"])


def batch_of(data, chosen=None):
    """The stored labels lie beside their logits; a batch's labels lie one position later."""
    labels = torch.from_numpy(data["labels"]).masked_fill(torch.from_numpy(data["loss_mask"]) == 0, -100)
    labels = torch.nn.functional.pad(labels, (1, 0), value=-100)
    rows = torch.arange(labels.shape[0]) if chosen is None else chosen
    return {"labels": labels[rows], "task_ids": torch.from_numpy(data["task_id"])[rows], "sample_ids": rows}


def loss_of(data, parts=None, **options):
    """(loss, gradient of all logits) with the step cut into micro-batches of the given rows."""
    weights = tuple(float(w) for w in data["task_weights"])
    if options["mode"] in ("case3", "case4"):
        options["balance"] = {"kind": "static", "weights": weights}
    objective = OBJECTIVE.validate({"kind": "task_balanced", "inner": {"chunk": 3}, **options})
    logits = torch.from_numpy(data["logits"]).requires_grad_()
    ctx = Context(torch.nn.Module(), tasks=tuple(str(k) for k in range(len(weights))))
    state = objective.setup(ctx)
    chosen = parts or [torch.arange(logits.shape[0])]
    batches = [batch_of(data, rows) for rows in chosen]
    totals = {}
    for b in batches:
        for name, n in objective.count(b).items():
            totals[name] = totals.get(name, 0) + n
    total = torch.zeros((), dtype=logits.dtype)
    for b, rows in zip(batches, chosen):
        view = LogitsView(logits[rows])
        total = total + dict(objective.losses(state, view, b, totals, None))["tokens"]
    total.backward()
    return total.item(), logits.grad


@pytest.mark.parametrize("path", LOSSES, ids=lambda p: p.stem)
@pytest.mark.parametrize("mode", ["case1", "case2", "case3", "case4"])
def test_losses_and_their_gradients(path, mode):
    data, expected = np.load(path), read("losses.json")[path.stem]
    tolerance = 1e-10 if data["logits"].dtype == np.float64 else 1e-6
    loss, grad = loss_of(data, mode=mode)
    assert loss == pytest.approx(expected[mode], abs=tolerance)
    assert torch.allclose(grad, torch.from_numpy(data[f"grad_{mode}"]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("path", LOSSES, ids=lambda p: p.stem)
def test_micro_scope_is_the_official_mean_of_micro_batches(path):
    data = np.load(path)
    rows = torch.arange(data["logits"].shape[0])
    parts = [rows[:2], rows[2:]]
    alone = [loss_of({k: data[k] if k == "task_weights" else data[k][p] for k in data.files}, mode="case3")[0]
             for p in parts]  # fmt: skip
    assert loss_of(data, parts, mode="case3", scope="micro")[0] == pytest.approx(sum(alone) / 2, abs=1e-9)


@pytest.mark.parametrize("path", LOSSES, ids=lambda p: p.stem)
@pytest.mark.parametrize("level", ["sample", "task"])
def test_focal_losses(path, level):
    data, expected = np.load(path), read("losses.json")[path.stem]
    loss, _ = loss_of(data, mode=f"focal_{level}")
    assert loss == pytest.approx(expected[f"focal_{level}_ours"], abs=1e-10)


@pytest.mark.parametrize("path", LOSSES, ids=lambda p: p.stem)
def test_task_means_in_the_log(path):
    data, expected = np.load(path), read("losses.json")[path.stem]
    tasks = len(data["task_weights"])
    objective = OBJECTIVE.validate({"kind": "task_balanced"})
    state = objective.setup(Context(torch.nn.Module(), tasks=tuple(str(k) for k in range(tasks))))
    batch = batch_of(data)
    parts = dict(
        objective.losses(state, LogitsView(torch.from_numpy(data["logits"])), batch, objective.count(batch), None)
    )
    for k, value in enumerate(expected["per_task_token_mean"]):
        assert float(parts.get(f"_loss/{k}", 0.0)) == pytest.approx(value, abs=1e-10)


# ---- CoBa ----


@pytest.mark.parametrize("name", list(read("coba.json")))
def test_coba_replays_the_official_weights(name):
    case = read("coba.json")[name]
    balancer = Convergence(
        case["K"], case["warmup"], case["history_length"], case["tau"], case["minimum_weight"], strict_window=False
    )
    history = torch.tensor(case["history"], dtype=torch.float64)
    for s in range(1, history.shape[1] + 1):
        weights = balancer.measure(history[:, s - 1])
        i = s - case["first_step"]
        if i < 0:
            assert torch.equal(weights, balancer.uniform())
        elif i < len(case["weights"]):
            assert weights.tolist() == pytest.approx(case["weights"][i], abs=1e-9)
            found = [*balancer.slopes[-1], balancer.worst[-1]]
            assert found == pytest.approx(case["slopes_per_task_then_max"][i], abs=1e-9)


# ---- FAMO ----


def famo_problem(name):
    file = ROOT / ("famo.npz" if (ROOT / "famo.npz").is_file() and len(read("famo.json")) == 1 else f"famo_{name}.npz")
    data = np.load(file if file.is_file() else ROOT / "famo.npz")
    return {k: torch.from_numpy(data[k]) for k in data.files}


@pytest.mark.parametrize("name", list(read("famo.json")))
def test_famo_trace(name):
    case, data = read("famo.json")[name], famo_problem(name)
    shared, w = (data[n].clone().requires_grad_() for n in ("shared0", "W0"))
    minimum = torch.tensor(case["min_losses"], dtype=torch.float64)
    logits = torch.zeros(case["K"], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=case["w_lr"], weight_decay=case["gamma"])

    def losses():
        return (data["Y"] - data["X"] @ shared @ w).square().mean(0)

    for step, row in enumerate(case["trace"]):
        before = losses()
        assert before.tolist() == pytest.approx(row["losses"], abs=1e-10)
        assert float(famo_value(logits, before, minimum)) == pytest.approx(row["weighted"], abs=1e-10)
        weights = famo_weights(logits.detach(), before.detach(), minimum)
        grads = torch.autograd.grad((weights * before).sum(), [shared, w])
        if step == 0:
            assert torch.allclose(grads[0], data["grad_shared_step0"], rtol=0, atol=1e-10)
        with torch.no_grad():
            for p, g in zip((shared, w), grads):
                p -= case["lr"] * g
            after = losses()
        assert after.tolist() == pytest.approx(row["new_losses"], abs=1e-10)
        logits.grad = famo_slope(logits.detach(), before.detach(), after, minimum)
        optimizer.step()
        assert logits.tolist() == pytest.approx(row["logits_after"], abs=1e-10)


# ---- tokenisation ----


def tokenizer_of(case):
    """The stored vocabulary as a tokenizer: pieces between blanks, a newline is a piece."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": case["pad_id"], "</s>": case["eos_id"], **case["vocab"]}
    inner = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[ ]+"), "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


PAIRS = [("prompt", "answer"), ("prompt", "response"), ("input", "output"), ("instruction", "output"),
         ("instruction", "response"), ("question", "response"), ("question", "answer")]  # fmt: skip


def messages_of(sample):
    """A stored sample as a chat record, whatever its keys."""
    if "chat_rounds" in sample:
        return {"chat_rounds": sample["chat_rounds"]}
    for question, answer in PAIRS:
        if question in sample and answer in sample:
            said = [{"role": "user", "content": sample[question]}, {"role": "assistant", "content": sample[answer]}]
            system = [{"role": "system", "content": sample["system"]}] if sample.get("system") else []
            return {"messages": [*system, *said]}
    return sample


def encoded(case):
    """Through the library's own rows, template and masks. Behind the last answer of rounds the official code puts one
    more newline, which no loss sees."""
    tokenizer, out = tokenizer_of(case), []
    for i, sample in enumerate(case["samples"]):
        record = messages_of(sample)
        row = convert(record, detect(set(record), f"sample {i}"), f"sample {i}")
        example = encode_rows([row], tokenizer, template="markers")[0]
        if "chat_rounds" in sample:
            example["input_ids"] += tokenizer("\n")["input_ids"]
            example["labels"] += [-100]
        out.append(example)
    return out


def shown(example, case):
    """A row as the official code stores it: padded, with a mask of trained tokens."""
    width = case["seq_length"] + 1
    mask = [int(v != -100) for v in example["labels"]]
    missing = width - len(mask)
    return {"input_ids": example["input_ids"] + [case["pad_id"]] * missing, "loss_mask": mask + [0] * missing}


@pytest.mark.parametrize("name", [n for n in read("tokenization.json") if not n.startswith("collator")])
def test_rows_of_a_mode(name):
    """Official rows first; what the official code leaves in its buffer is our last row."""
    case = read("tokenization.json")[name]
    done = arranged(encoded(case), case["mode"], case["seq_length"], report=False)
    rows = [shown(row, case) for row in done]
    expected = list(case["rows"])
    if case["left_in_buffer"]:
        left = {"input_ids": case["left_in_buffer"], "labels": [0 if m else -100 for m in case["left_mask"]]}
        expected.append(shown(left, case))
    if case["mode"] == "concat":
        # every window begins with the last token of the one before, which is trained there
        expected = [{**row, "loss_mask": [0, *row["loss_mask"][1:]]} for row in expected]
    assert rows == expected


@pytest.mark.parametrize("name", [n for n in read("tokenization.json") if n.startswith("collator")])
def test_collated_batches(name):
    """Inputs, labels and mask after the shift."""
    cases = read("tokenization.json")
    expected, case = cases[name], cases["padding"]
    mode = "dynamic" if name.endswith("dynamic") else "padding"
    batch = PaddingCollator(case["pad_id"])(list(arranged(encoded(case), mode, case["seq_length"], report=False)))
    assert batch["input_ids"][:, :-1].tolist() == expected["input_ids"]
    assert batch["input_ids"][:, 1:].tolist() == expected["labels"]
    mask = (batch["labels"][:, 1:] != -100).float()
    assert mask.tolist() == expected["loss_mask"]
    assert math.isclose(float(mask.sum()), float(np.sum(expected["loss_mask"])))
