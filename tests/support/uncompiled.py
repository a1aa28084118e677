"""Has vLLM run small functions as they are written, in the process that imports this.

On a CPU vLLM has PyTorch make C++ of each, as of the one that counts the tokens that are likelier
than the chosen one: four seconds in every process that gives log-probabilities, and more where
nothing is cached. The plugin changes none of them, and what vLLM compiles of a model it still does.
"""

from vllm.platforms import current_platform

type(current_platform).simple_compile_backend = "eager"
