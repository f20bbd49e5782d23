"""GTPO: turn-level reinforcement learning for tool-using language models (arXiv 2511.14846)."""

__version__ = "0.1.0"
