"""Writing a report in the forms asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.files import write_json, write_text, writing
from pegbox.report.folders import report_of
from pegbox.report.model import Comparison

__all__ = ["FORMATS", "print_run", "write_report"]


def write_report(
    source: str | Path | Comparison, formats: Sequence[str] = ("html",), out: str | Path | None = None
) -> list[Path]:
    """Write the report of a run's or a comparison's folder, or of a `Comparison`; returns the files' paths.

    Args:
        formats: html (report.html), csv, latex (report.tex), json, png and svg (plots/), terminal (printed, no file).
        out: where files go; default: the folder itself.

    Raises:
        BadInput: an unknown format, nothing to report, or a `Comparison` without `out`.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise BadInput(f"Unknown report format '{unknown[0]}'.{did_you_mean(unknown[0], FORMATS)}")
    if isinstance(source, Comparison):
        if out is None and set(formats) - {"terminal"}:
            raise BadInput("Say where the report's files go: write_report(comparison, formats, out=...).")
        found, folder = source, Path(out or ".")
    else:
        found, folder = report_of(Path(source)), Path(out if out is not None else source)
    return [path for name in dict.fromkeys(formats) for path in FORMATS[name](found, folder)]


def print_run(folder: str | Path) -> None:
    """Print a run's or a comparison's table to the terminal."""
    _terminal(report_of(Path(folder)), Path(folder))


def _html(c: Comparison, folder: Path) -> list[Path]:
    from pegbox.report.page import page

    return _text(folder / "report.html", page(c))


def _csv(c: Comparison, folder: Path) -> list[Path]:
    from pegbox.report.table import to_csv

    return _text(folder / "report.csv", to_csv(c))


def _latex(c: Comparison, folder: Path) -> list[Path]:
    from pegbox.report.table import to_latex

    return _text(folder / "report.tex", to_latex(c))


def _json(c: Comparison, folder: Path) -> list[Path]:
    write_json(folder / "report.json", c.plain())
    return [folder / "report.json"]


def _png(c: Comparison, folder: Path) -> list[Path]:
    return _plots(c, folder, "png")


def _svg(c: Comparison, folder: Path) -> list[Path]:
    return _plots(c, folder, "svg")


def _plots(c: Comparison, folder: Path, form: str) -> list[Path]:
    from pegbox.report.plots import save_plots

    with writing(folder / "plots"):
        return save_plots(c, folder / "plots", form)


def _terminal(c: Comparison, folder: Path) -> list[Path]:
    from rich.console import Console

    Console().print(c)
    return []


def _text(path: Path, text: str) -> list[Path]:
    write_text(path, text)
    return [path]


FORMATS: dict[str, Callable[[Comparison, Path], list[Path]]] = {
    "terminal": _terminal,
    "html": _html,
    "csv": _csv,
    "latex": _latex,
    "json": _json,
    "png": _png,
    "svg": _svg,
}
