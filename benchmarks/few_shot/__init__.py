"""Benchmarks: commands that compare within one run and write their record under records/."""
