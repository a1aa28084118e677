"""Benchmarks: each checks equality first, then times; figures are ratios of alternated runs."""
