"""Every Python process that the tests start imports this first: conftest puts it on PYTHONPATH."""

import gc
import os
import sys
import time

# Importing vLLM makes a million objects, none of which is garbage, and Python looks through them
# again and again: 1.4 of 10 seconds.
gc.set_threshold(200_000, 20, 100)

# vLLM's processes wait for each other by looking again and again, and yield their core in between.
# Linux gives it back at once, so half of a core that others need goes into looking.
os.sched_yield = lambda: time.sleep(0.0002)


class PatientNixl:
    """NIXL's thread looks for events without a pause, so two servers leave no core to anything
    else. This has it wait for them, at most a millisecond; NIXL takes that from its own setting,
    which its Python module sets to none."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "nixl_cu12._api":
            from nixl_cu12 import _bindings

            class Config(_bindings.nixlAgentConfig):
                def __setattr__(self, name, value):
                    super().__setattr__(name, 1000 if name == "pthrDelay" else value)  # µs

            _bindings.nixlAgentConfig = Config


sys.meta_path.insert(0, PatientNixl)
