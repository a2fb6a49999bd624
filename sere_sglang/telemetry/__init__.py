"""Counters, metrics, plots."""
