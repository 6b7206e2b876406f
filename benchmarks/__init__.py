"""Measurements. Each module is run as `.venv/bin/python -m benchmarks.NAME`."""
