"""vLLM's own way to an attention backend on CUDA, which an engine goes at start.

Broken by: a steered backend that cannot be found by the name that vLLM's selector gives it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
CHOSEN = {
    "Ampere": "FLASH_ATTN",
    "Ada": "FLASH_ATTN",
    "Hopper": "FLASH_ATTN",
    "Blackwell": "FLASHINFER",
}
"""vLLM's own choice for each GPU generation."""
BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "TRITON_MLA")


@pytest.fixture(scope="module")
def selected():
    done = subprocess.run(
        [sys.executable, SUPPORT / "selection_job.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ["PYTHONPATH"]])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("REPORT")[2])


@pytest.mark.parametrize("generation", CHOSEN)
@pytest.mark.parametrize("asked", [None, *BACKENDS])
def test_selector_gives_the_steered_backend(selected, generation, asked):
    kind = "GPUMLASteering" if asked == "TRITON_MLA" else "GPUSteering"
    assert selected[f"{generation} {asked}"] == {
        "name": asked or CHOSEN[generation],
        "builder": f"{kind}Builder",
        "impl": f"{kind}Impl",
    }
