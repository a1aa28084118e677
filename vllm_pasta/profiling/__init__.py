"""Evaluation of emphasis and the search for heads, over vLLM's public ``LLM``."""
