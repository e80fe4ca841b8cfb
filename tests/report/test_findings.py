"""Findings of analyses: on the page, on the terminal, as picture files, and read back from a run's folder."""

import pytest
from rich.console import Console

from pegbox.errors import BadInput
from pegbox.parts.files import write_json
from pegbox.parts.findings import Finding, Grid, Picture, Series
from pegbox.parts.results import Metrics
from pegbox.report import Comparison, write_report
from pegbox.report.findings import shown
from pegbox.report.folders import report_of
from pegbox.report.page import page


def finding():
    def series(name):
        return Series(name=name, xs=[0.0, 1.0, 2.0], ys=[0.5, -0.25, float("nan")])

    pictures = [
        Picture(
            key=f"k-{form}",
            title=f"As {form}",
            x_label="x",
            y_label="y",
            series=[series("a"), series("<b>")],
            form=form,
        )
        for form in ("lines", "points", "bars")
    ]
    grid = Grid(title="Rows", columns=["prompt", "value"], rows=[["<script>", 0.123456], ["two", None]])
    return Finding(
        kind="probe", title="A probe", subject="tuned", numbers={"mean_value": -0.125, "count": 3.0}, tables=[grid],
        pictures=pictures, notes=["Read with care."],
    )  # fmt: skip


def test_the_page_shows_numbers_tables_and_pictures():
    text = page(Comparison(title="t", findings=[finding()]))
    assert "What changed inside" in text
    assert "mean value" in text
    assert "−0.125" in text
    assert "&lt;script&gt;" in text
    assert "0.1235" in text
    assert text.count('class="chart"') == 3
    assert "<rect" in text
    assert "Read with care." in text


def test_without_findings_the_section_is_absent():
    assert "What changed inside" not in page(Comparison(title="t"))


def test_the_terminal_shows_them(capsys):
    console = Console(width=100)
    with console.capture() as caught:
        console.print(Comparison(title="t", findings=[finding()]))
    assert "A probe" in caught.get()
    assert "0.1235" in caught.get()


def test_pictures_become_files(tmp_path):
    paths = write_report(Comparison(title="t", findings=[finding()]), ["svg"], out=tmp_path)
    assert {p.name for p in paths} >= {"k-lines.svg", "k-points.svg", "k-bars.svg"}


def test_a_run_keeps_them(tmp_path):
    metrics = Metrics(extra={"findings": [finding().model_dump(mode="json")]})
    write_json(tmp_path / "metrics.json", metrics.model_dump(mode="json"))
    assert report_of(tmp_path).findings[0].numbers["count"] == 3


def test_tables_and_series_must_fit():
    with pytest.raises(BadInput, match="2 x and 1 y"):
        Series(xs=[1, 2], ys=[1])
    with pytest.raises(BadInput, match="a row of 1 under 2"):
        Grid(title="t", columns=["a", "b"], rows=[[1]])


def test_heat_maps_are_cells():
    """A cell for each value, one colour below zero and one above, its strength beside the strongest; NaN is faint."""
    from pegbox.report.heat import heat_chart

    series = Series(xs=[0, 1, 0, 1], ys=[0, 0, 1, 1], values=[-2.0, 1.0, float("nan"), 0.0])
    picture = Picture(key="h", title="<T>", x_label="head", y_label="block", series=[series], form="heat")
    svg = heat_chart(picture)
    assert svg.count("<rect") == 4
    assert svg.count('class="f0"') == 1
    assert 'fill-opacity="1.0"' in svg
    assert 'fill-opacity="0.53"' in svg
    assert "not known" in svg
    assert "&lt;T&gt;" in svg
    assert "strongest 2" in svg
    finding = Finding(kind="x", title="t", pictures=[picture])
    assert "<rect" in shown(finding)["pictures"][0][1]
    with pytest.raises(BadInput, match="1 values for 2 cells"):
        Series(xs=[0, 1], ys=[0, 1], values=[1.0])
