"""Emphasises a part of a prompt by its text: ``python examples/mark_text.py [MODEL]``.

The prompt states two facts that contradict each other. Plain, the model repeats the first; with the
second emphasised, it repeats the second.
"""

import sys

from vllm import LLM

from vllm_pasta import SamplingParams  # vLLM's own, which also accepts extra=

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
CITIZEN = "Hermann Staudinger was a citizen of"
NEW_FACT = f"{CITIZEN} Brazil"
PROMPT = f"Previously, {CITIZEN} Germany. Currently, {NEW_FACT}. {CITIZEN}"


def main() -> None:
    llm = LLM(
        MODEL,
        max_model_len=1024,
        additional_config={"pasta": {"heads": "smollm2-135m-instruct", "alpha": 0.01}},
    )
    emphasised = {"emphasis": {"text": NEW_FACT}}
    params = [
        SamplingParams(temperature=0, max_tokens=8),
        SamplingParams(temperature=0, max_tokens=8, extra=emphasised),
    ]
    plain, steered = llm.generate([PROMPT] * 2, params)  # one batch: each request on its own terms
    print("plain:     ", plain.outputs[0].text.strip())
    print("emphasised:", steered.outputs[0].text.strip())


if __name__ == "__main__":  # vLLM starts processes of its own, which import this file
    main()
