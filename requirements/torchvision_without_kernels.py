"""Lets torchvision be imported beside a torch build that its compiled kernels do not fit.

vLLM's multimodal models import torchvision. PyPI's build of it is for CUDA, and beside the CPU
build of torch its import ends with "operator torchvision::nms does not exist". The set-up puts
this file into the virtual environment, where a ``.pth`` file imports it at every start: it declares
those operators, which nothing here calls, when torchvision is first imported.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from types import ModuleType

OPERATORS = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")


class Declare(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is looked for, once."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                self.library.define(f"{operator}(Tensor x) -> Tensor")
                self.library.define(f"_{operator}_backward(Tensor x) -> Tensor")


finder = Declare()
sys.meta_path.insert(0, finder)
