"""vLLM's sleep mode on a CPU: its own worker and backend, over a pool that only remembers.

vLLM allocates what may sleep within pools, each with a tag (``weights``, ``kv_cache``, ``runtime``,
``workspace``), of which its backend keeps some and discards the others. Here a pool remembers which
memory was allocated within it, and what is to be discarded is overwritten.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GARBAGE = 0x7F  # as int32 far from any index, as float32 near the largest


class Allocator(TorchDispatchMode):
    """In place of vLLM's ``CuMemAllocator``."""

    def __init__(self):
        super().__init__()
        self._tags = []
        self._allocated = {}  # address -> tag, storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()  # kept, so that no other has its address
                self._allocated.setdefault(storage.data_ptr(), (self._tags[-1], storage))
        return result

    @contextmanager
    def use_memory_pool(self, tag):
        self._tags.append(tag)
        try:
            with self if len(self._tags) == 1 else nullcontext():
                yield
        finally:
            self._tags.pop()

    def tag_of(self, tensor):
        """None where the tensor was allocated outside any pool, and so is never discarded."""
        return self._allocated.get(tensor.untyped_storage().data_ptr(), (None,))[0]

    def sleep(self, offload_tags):
        for tag, storage in self._allocated.values():
            if tag not in offload_tags:
                torch.empty(0, dtype=torch.uint8).set_(storage).fill_(GARBAGE)

    def wake_up(self, tags):
        pass


def lend():
    """Lets the workers of this process sleep; returns their allocator."""
    from vllm import device_allocator
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    allocator = Allocator()
    device_allocator.get_mem_allocator_instance = lambda: allocator
    Worker._maybe_get_memory_pool_context = lambda _, tag: (
        nullcontext() if tag == "weights" else allocator.use_memory_pool(tag)
    )
    CPUWorker.sleep, CPUWorker.wake_up = Worker.sleep, Worker.wake_up
    torch.accelerator.get_memory_info = lambda: (0, 1)
    torch.accelerator.synchronize = lambda: None
    return allocator
