"""Scoring, verification and budgets: everything between a data set and its coresets."""

__version__ = "0.1.0"
