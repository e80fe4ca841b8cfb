"""Reports: what ways of tuning gained, forgot and cost, as a table, files, plots and one page."""

from pegbox.report.build import by_suite, changes, curve_of, mean_cost, pooled_scores, samples, verdicts
from pegbox.report.folders import comparison_of_run, read_metrics, report_of
from pegbox.report.model import Comparison, Curve, Entry, Rate, Sample, Told, Trial
from pegbox.report.write import FORMATS, print_run, write_report

__all__ = [
    "FORMATS",
    "Comparison",
    "Curve",
    "Entry",
    "Rate",
    "Sample",
    "Told",
    "Trial",
    "by_suite",
    "changes",
    "comparison_of_run",
    "curve_of",
    "mean_cost",
    "pooled_scores",
    "print_run",
    "read_metrics",
    "report_of",
    "samples",
    "verdicts",
    "write_report",
]
