"""Evaluates emphasis and searches for the heads to steer, over vLLM's public ``LLM``.

A profile ranks and selects heads (`search`) and writes what it found (`report`). An evaluation asks
the same examples by different `methods` (`evaluation`) and shows a table (`report`). Both ask the
model through `asker`, which keeps the answers in a `store`.
"""
