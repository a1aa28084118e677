"""Evaluates emphasis and searches for the heads to steer, over vLLM's public ``LLM``.

A profile goes `search` -> `ranking` -> `selection` (and `sizes`) -> `report`; an evaluation goes
`methods` -> `evaluation` -> `tables`. Both ask the model through `asker`,
which keeps the answers in a `store`.
"""
