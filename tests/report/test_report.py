"""Reports from a comparison made by hand: every form says the same, and a run's folder reads as it was written."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from rich.console import Console

from pegbox.errors import BadInput, Corrupt
from pegbox.evaluate.run import write_examples
from pegbox.parts.results import Cost, Example, Measurement, Metrics, Score
from pegbox.report import Comparison, by_suite, changes, curve_of, mean_cost, report_of, samples, verdicts, write_report
from pegbox.report.axes import scale
from pegbox.report.charts import scatter_chart
from pegbox.report.page import page
from pegbox.report.points import Point, Points, curve_plots, scatter_plots
from pegbox.report.table import cost_table, group_table, main_table
from pegbox.report.words import count, in_points, rate_text, seconds, size

# --- building ---


def measured(values, **score):
    rows = [Example(row_id=str(i), values={"m": v, "tokens": 1.0 + i}) for i, v in enumerate(values)]
    return Measurement(suite="s", scores={"m": Score(name="m", value=0, n=len(rows), **score)}, examples=rows)


def test_verdicts_are_paired_oriented_and_adjusted():
    good, bad = measured([1.0] * 40 + [0.0] * 10), measured([0.0] * 40 + [1.0] * 10)
    told = verdicts({"ref": {"s": [bad] * 3}, "a": {"s": [good] * 3}, "same": {"s": [bad] * 3}}, "ref", 0.02)
    assert told["a"]["s"]["m"].verdict == "better"
    assert told["a"]["s"]["m"].value == pytest.approx(0.6)
    assert told["a"]["s"]["m"].adjusted >= told["a"]["s"]["m"].p
    assert told["same"]["s"]["m"].verdict == "equal within the margin"
    lower = {"ref": {"s": [measured([2.0] * 9 + [3.0], higher_is_better=False)]}, "a": {"s": [measured([1.0] * 10)]}}
    lower["a"]["s"][0].scores["m"].higher_is_better = False
    assert verdicts(lower, "ref", None)["a"]["s"]["m"].verdict == "better"
    with pytest.raises(BadInput, match="reference 'x'"):
        verdicts({"a": {}}, "x", None)


def test_changes_pair_every_seed_with_the_one_base():
    told = changes({"s": [measured([1.0, 1.0]), measured([1.0, 0.0])]}, {"s": [measured([0.0, 0.0])]})
    assert told["s"]["m"].value == 0.75
    assert told["s"]["m"].verdict is None


def test_mean_cost_keeps_what_is_unknown_unknown():
    mean = mean_cost([Cost(steps=10, seconds=2.0, peak_saved_bytes=5), Cost(steps=11, seconds=3.0, machine="m")])
    assert (mean.steps, mean.seconds, mean.peak_saved_bytes) == (10, 2.5, None)
    assert mean_cost([]) is None


def test_samples_show_what_was_broken_and_fixed_first():
    base = measured([1.0, 0.0, 0.0, 0.0])
    tuned = measured([0.0, 1.0, 0.0, 0.0])
    shown = samples(base, {"a": tuned}, "m", limit=3)
    assert [s.row_id for s in shown] == ["0", "1", "2"]
    assert shown[0].values == {"base": 1.0, "a": 0.0}
    assert len(samples(None, {"a": tuned}, "m", limit=99)) == 4


def test_a_curve_is_thinned_keeps_its_end_and_survives_a_cut_line(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"event": "step", "step": s, "loss": 1 / s, "lr": 0.1}) for s in range(1, 1001)]
    lines.insert(500, json.dumps({"event": "eval", "step": 500, "metrics": {"loss": 0.4}}))
    log.write_text("\n".join(lines) + '\n{"event": "step", "st')
    curve = curve_of(log, seed=3)
    assert len(curve.steps) <= 241
    assert (curve.steps[0], curve.steps[-1], curve.seed) == (1, 1000, 3)
    assert (curve.eval_steps, curve.eval_values, curve.eval_name) == ([500], [0.4], "loss")
    assert curve_of(tmp_path / "none").steps == []


# --- words and axes ---


def test_numbers_as_people_read_them():
    assert [count(n) for n in (None, 999, 12_345, 4_884_480, 135_000_000)] == ["–", "999", "12.3 k", "4.9 M", "135 M"]
    assert [size(n) for n in (None, 512, 1536, 310 << 20)] == ["–", "512 B", "1.5 KiB", "310 MiB"]
    assert [seconds(s) for s in (None, 3.21, 45, 600, 7200)] == ["–", "3.2 s", "45 s", "10 min", "2.0 h"]
    assert rate_text(3.2e-4) == "0.00032"
    assert in_points(Score(name="x", value=0.5, n=1))
    assert not in_points(Score(name="loss/a", value=0.5, n=1, unit="nats"))


@pytest.mark.parametrize(
    ("values", "log"), [([0.1, 97.3], False), ([5, 5], False), ([1e-5, 1e-3], True), ([2, 3], True)]
)
def test_scales_hold_their_values_and_ticks(values, log):
    s = scale(values, log=log)
    assert all(0 <= s(v) <= 1 for v in [*values, *s.ticks])
    assert 2 <= len(s.ticks) <= 9
    assert len({s.label(t) for t in s.ticks}) == len(s.ticks)


# --- tables and files ---


def test_the_main_table(made):
    table = main_table(made)
    heads = [k.key for k in table.columns]
    assert heads[:3] == ["name", "target", "verdict"]
    assert "retention/perplexity" in heads
    rows = {e.name: dict(zip(heads, cells)) for e, cells in table.rows}
    assert rows["mezo"]["target"].text == "failed"
    assert "NaN at step 12" in rows["mezo"]["target"].note
    assert rows["lora"]["verdict"].text == "reference"
    assert rows["full"]["rate"].note == "5 tried, edge"
    assert rows["lift"]["target"].tone == "good"
    assert rows["full"]["retention/knowledge"].tone == "bad"
    assert rows["base"]["trainable"].text == "–"
    assert [k.key for k in group_table(made).columns] == ["name", "intent", "lpm", "subnet"]
    assert [e.name for e, _ in cost_table(made).rows] == ["lora", "lift", "full"]


def test_every_form_is_written_and_says_the_same(made, tmp_path):
    paths = write_report(made, ["html", "csv", "latex", "json", "svg"], tmp_path)
    assert all(p.is_file() and p.stat().st_size for p in paths)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text())))
    lift = next(r for r in rows if (r["recipe"], r["score"]) == ("lift", "verified"))
    assert float(lift["value"]) == made.entry("lift").scores["target"]["verified"].value
    assert next(r for r in rows if r["recipe"] == "mezo")["reason"] == "the loss became NaN at step 12"
    assert Comparison.load(tmp_path / "report.json") == made
    latex = (tmp_path / "report.tex").read_text()
    assert latex.count(r"\\") == 6
    assert not re.search(r"(?<!\\)%", latex.split("\n", 1)[1])
    html = (tmp_path / "report.html").read_text()
    assert f"{100 * made.entry('lift').scores['target']['verified'].value:.1f} %" in html


def test_the_page_fetches_nothing_and_escapes_what_models_say(made):
    html = page(made)
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert "<b>port" not in html
    assert "&lt;gateway&gt;" in html
    hostile = made.model_copy(update={"title": "</title><script>alert(1)</script>"})
    assert "<script>alert" not in page(hostile)


def test_a_page_of_almost_nothing():
    html = page(Comparison(title="empty"))
    assert "<h1>empty</h1>" in html


def test_terminal_fits_80_columns(made):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(made)
    text = console.export_text()
    for part in ("not told apart", "5 tried", "can't be told apart on these 90 rows", "NaN at step 12"):
        assert part in text
    assert "…" not in text


def test_write_report_refuses(made, tmp_path):
    with pytest.raises(BadInput, match="Did you mean 'html'"):
        write_report(made, ["htm"], tmp_path)
    with pytest.raises(BadInput, match="out="):
        write_report(made, ["html"])
    with pytest.raises(BadInput, match="holds no report"):
        write_report(tmp_path)
    (tmp_path / "comparison.json").write_text('{"entries": 3}')
    with pytest.raises(Corrupt, match="not a readable comparison"):
        report_of(tmp_path)


# --- plots ---


def test_plots_are_in_points_better_up_and_right(made):
    plots = {p.key: p for p in scatter_plots(made)}
    assert set(plots) == {"gain-knowledge", "gain-perplexity", "gain-memory"}
    full = next(p for p in plots["gain-knowledge"].points if p.name == "full")
    change = made.entry("full").changes["retention"]["knowledge"]
    assert full.x == pytest.approx(100 * change.value)
    assert full.x < 0
    worse = next(p for p in plots["gain-perplexity"].points if p.name == "full")
    assert -40 < worse.x < -25  # perplexity rose by a third: e^0.3
    assert {p.name for p in plots["gain-memory"].points} == {"lora", "lift", "full"}
    assert [p.key for p in curve_plots(made)] == ["loss", "eval", "rate", "trials"]


def test_cpu_and_gpu_memory_never_share_a_plot(made):
    mixed = made.model_copy(deep=True)
    mixed.entry("lora").cost = mixed.entry("lora").cost.model_copy(update={"peak_device_bytes": 1 << 30})
    assert "gain-memory" not in {p.key for p in scatter_plots(mixed)}


def test_chart_marks_lie_inside():
    points = [Point(f"p{i}", i, x, y, (x - 1, x + 2), (y - 3, y + 3)) for i, (x, y) in enumerate([(0, 0), (50, 90)])]
    svg = scatter_chart(Points("k", "<t>", "x", "y", points, True, True))
    assert "&lt;t&gt;" in svg
    xs = [float(v) for v in re.findall(r'cx="([\d.]+)"', svg)]
    assert all(52 <= x <= 444 for x in xs)


# --- a run's folder ---


def test_a_runs_folder(tmp_path):
    before, after = measured([0.0, 0.0, 1.0, 0.0]), measured([1.0, 1.0, 1.0, 0.0])
    named = {w: m.model_copy(update={"suite": "target"}) for w, m in (("before", before), ("after", after))}
    metrics = Metrics(before={"target": named["before"]}, after={"target": named["after"]}, cost=Cost(steps=7))
    run = tmp_path / "run-a"
    (run / "examples").mkdir(parents=True)
    (run / "metrics.json").write_text(metrics.model_dump_json())
    for when, m in named.items():
        write_examples(m, run / "examples" / f"target.{when}.jsonl")
    (run / "recipe.yaml").write_text(
        "versions: {torch: '2.13'}\nrecipe: {title: T, optim: {kind: adamw, lr: 1.0e-4}}\n"
    )
    (run / "log.jsonl").write_text(
        '{"event": "step", "step": 1, "loss": 2.0}\n{"event": "step", "step": 2, "loss": 1.0}\n'
    )
    found = report_of(run)
    tuned = found.entry("run-a")
    assert (found.title, found.primary, found.versions) == ("T", "m", {"torch": "2.13"})
    assert tuned.changes["target"]["m"].value == 0.5
    assert tuned.rate.value == 1e-4
    assert tuned.curves[0].loss == [2.0, 1.0]
    assert any("One run with one seed" in note for note in found.notes)
    assert write_report(run) == [run / "report.html"]
    assert by_suite([metrics])["target"][0].suite == "target"


def test_a_run_without_evaluation_still_reports(tmp_path):
    (tmp_path / "metrics.json").write_text(Metrics(cost=Cost(steps=3)).model_dump_json())
    assert "metrics" not in page(report_of(tmp_path)).split("<main>")[0]
