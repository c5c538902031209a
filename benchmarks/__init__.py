"""Measurements. `make bench` runs them; `benchmarks/README.md` holds what they gave, where and when."""
