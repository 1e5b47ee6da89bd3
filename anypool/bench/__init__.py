"""Benchmarks: how fast a fleet serves on this machine, beside other engines where they are installed.

- `serve.run`: `anypool bench serve`;
- `transformers_generate.py`: the other engine, a script for any Python that has PyTorch and transformers.
"""
