"""The log and the display read the same records."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from pegbox.engine.display import ProgressDisplay, describe_bytes, describe_seconds
from pegbox.engine.log import LogRecord, LogWriter, log_schema


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def step(n, **more):
    return LogRecord(
        event="step", step=n, loss=1.0 / n, tokens=100 * n, seconds=2.0 * n, total_steps=4, memory=2048, **more
    )


def test_records_are_strict_json_with_a_version(tmp_path):
    writer = LogWriter(tmp_path / "log.jsonl")
    writer.write(step(1, readings={"kl": math.nan}))
    writer.write(LogRecord(event="eval", step=1, metrics={"loss": 2.0}))
    first, second = read(tmp_path / "log.jsonl")
    assert first == {
        "version": 1, "event": "step", "step": 1, "loss": 1.0, "tokens": 100, "seconds": 2.0, "memory": 2048,
        "readings": {"kl": None}, "total_steps": 4,
    }  # fmt: skip
    assert second == {"version": 1, "event": "eval", "step": 1, "metrics": {"loss": 2.0}}
    assert LogRecord.model_validate(first).readings == {"kl": None}
    assert set(first) <= set(log_schema()["properties"])


def test_on_resuming_what_lies_beyond_the_checkpoint_is_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    writer = LogWriter(path)
    for n in (1, 2, 3):
        writer.write(step(n))
    with path.open("a") as file:
        file.write('{"version": 1, "event": "st')  # cut off by a kill
    again = LogWriter(path, resume_step=2)
    again.write(step(3))
    assert [r["step"] for r in read(path)] == [1, 2, 3]
    LogWriter(path).write(step(1))
    assert [r["step"] for r in read(path)] == [1]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_display_shows_loss_rate_time_left_and_memory(terminal):
    out = io.StringIO()
    display = ProgressDisplay(Console(file=out, force_terminal=terminal, width=140), every=0.0)
    display.record(LogRecord(event="start", step=0, total_steps=4))
    for n in (1, 2):
        display.record(step(n))
    display.record(LogRecord(event="eval", step=2, metrics={"loss": 2.0}))
    display.record(LogRecord(event="notice", step=2, text="[a notice]"))
    display.record(LogRecord(event="end", step=4, text="finished", seconds=8.0))
    text = out.getvalue()
    assert display.rate == pytest.approx(50.0)
    assert display.pace == pytest.approx(2.0)
    for part in ("loss 0.5000", "50 tokens/s", "left 0:04", "memory 2.0 KiB", "step 2: loss 2", "[a notice]", "0:08"):
        assert part in text


def test_numbers_for_people():
    assert [describe_bytes(n) for n in (None, 5, 1536, 3 << 30, 5 << 40)] == [
        "-",
        "5 B",
        "1.5 KiB",
        "3.0 GiB",
        "5.0 TiB",
    ]
    assert [describe_seconds(n) for n in (None, 5, 65, 3725)] == ["-", "0:05", "1:05", "1:02:05"]
