"""Anypool: one language model served from every accelerator pool a team can get, behind one endpoint."""

__version__ = "0.1.0"
