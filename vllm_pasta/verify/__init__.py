"""Checks of an installation: whether steered requests are exact on this machine, and how fast.

``vllm-pasta verify``, the project's GPU tests and its engine benchmark run the same code.

- `oracle`: PASTA on transformers. It imports nothing of this package: that is its worth.
- `models`: small random models, and configurations of public ones for random weights.
- `requests`: the requests that are checked, as plain data.
- `worker`: vLLM in a process of its own; `engine`: the parent's handle of such a process.
- `exactness`: what an engine answered, held against the oracle.
- `throughput`: plain, idle and steered runs on two engines that take turns.
- `run`: the whole check, and its `Report`.
"""
