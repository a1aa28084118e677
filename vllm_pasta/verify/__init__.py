"""Checks of an installation: whether steered requests are exact on this machine, and how fast.

``vllm-pasta verify`` and the project's own tests run the same code. `oracle` imports nothing of
this package: its independence is its worth.
"""
