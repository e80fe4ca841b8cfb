"""Evaluation: metrics, suites, measuring."""
