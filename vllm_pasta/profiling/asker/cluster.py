"""Several vLLM engines over a Ray cluster, one to each worker, that answer trials together."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_pasta.errors import PastaError
from vllm_pasta.profiling.asker.engine import CHUNK, Answered, Engine, Question

ROUNDS = 4
"""Least chunks for each worker, where there are enough questions: so all end about together."""

PASSED_ON = ("VLLM_", "HF_")
"""Environment variables that workers get from here, by how they begin."""


@dataclass(frozen=True)
class Ray:
    """A Ray cluster.

    Attributes:
        address: As for ``ray.init``; empty means the cluster that this machine belongs to
            (``RAY_ADDRESS``), or else one of this machine alone.
        workers: How many engines; None means one for each ``tensor_parallel_size`` GPUs, or one
            for each machine if there are none.
    """

    address: str = ""
    workers: int | None = None


class Cluster:
    """vLLM engines on Ray actors. Each machine has this package, vLLM and the model.

    Args:
        model: A model for vLLM, by a name or path that is the same on every machine.
        options: Arguments of ``vllm.LLM``.
        where: The cluster, and how many engines.

    Raises:
        PastaError: Ray is not installed, there is no such cluster, or it is too small.
    """

    def __init__(self, model: str, options: dict[str, Any], where: Ray) -> None:
        try:
            import ray
        except ImportError as e:
            raise PastaError("--ray needs Ray: pip install 'vllm-pasta[ray]'") from e
        self._ray = ray
        env = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}
        try:
            ray.init(
                where.address or None, log_to_driver=False, include_dashboard=False,
                runtime_env={"env_vars": env},
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise PastaError(f"--ray {where.address}: no cluster there: {e}") from e
        total = ray.cluster_resources()
        gpus, cores = int(total.get("GPU", 0)), int(total.get("CPU", 1))
        size = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
        most = gpus // size if gpus else cores
        usual = most if gpus else sum(node["Alive"] for node in ray.nodes())
        count = usual if where.workers is None else where.workers
        if not 1 <= count <= most:
            self.close()
            raise PastaError(
                f"--ray-workers: expected 1 to {most}, as the cluster has room for, got {count}"
            )
        needs = {"num_gpus": size} if gpus else {"num_cpus": max(1, cores // max(count, usual))}
        actor = ray.remote(**needs)(Engine)
        self._workers = [actor.remote(model, options) for _ in range(count)]

    def close(self) -> None:
        """Stops the engines, and leaves the cluster."""
        self._ray.shutdown()

    def answer_all(self, questions: Sequence[Question]) -> Iterator[Answered]:
        """Answers questions, neighbours by the same engine; chunks come as they are done."""
        size = min(CHUNK, math.ceil(len(questions) / (ROUNDS * len(self._workers))))
        left = [questions[at : at + size] for at in range(0, len(questions), size)][::-1]
        running: dict[Any, Any] = {}
        idle = list(self._workers)
        while left or running:
            while left and idle:
                worker = idle.pop()
                running[worker.answer.remote(left.pop())] = worker
            (done, *_), _ = self._ray.wait(list(running), num_returns=1)
            idle.append(running.pop(done))
            try:
                yield self._ray.get(done)
            except self._ray.exceptions.RayError as e:
                raise PastaError(
                    "a worker failed; all answers before are kept, and the same command "
                    f"continues: {str(e)[-2000:]}"
                ) from e
