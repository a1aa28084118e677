"""Many engines in one process: spares all but the first what vLLM does anew for each."""

import functools
import gc


@functools.cache
def in_one_process():
    """To be called before the first. Nothing changes where there is a GPU."""
    import torch
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    if torch.cuda.is_available():
        return
    # What a model class can do is read in a process of its own, which imports all of vLLM, once
    # for every architecture: "to avoid initializing CUDA", of which there is none to initialise.
    registry._run_in_subprocess = lambda inspect: inspect()
    # A second of looking at every name of every module, for what the first engine has replaced.
    # Over some of numba's, which drafting by n-grams brings, a second search would trip, too.
    current_platform.register_triton_kernel_overrides = functools.cache(
        current_platform.register_triton_kernel_overrides
    )
    # A second of looking for garbage among all that was imported, when an engine starts or ends.
    # vLLM freezes it, too, and takes that back then.
    gc.freeze()
    gc.unfreeze = lambda: None
    import uncompiled as uncompiled  # before the functions that it is about
