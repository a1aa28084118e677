"""Benchmarks: each checks equality first, then times; figures are ratios of alternating runs."""
