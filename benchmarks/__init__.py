"""Measured bars of speed, memory and agreement; ``python -m benchmarks`` prints the table (see ``__main__.py``)."""
