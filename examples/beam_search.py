"""Beam search with emphasis: ``python examples/beam_search.py [MODEL]``."""

import sys

from vllm import LLM

from vllm_pasta import BeamSearchParams  # vLLM's own, which also accepts extra=

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
CITIZEN = "Hermann Staudinger was a citizen of"
PROMPT = f"Previously, {CITIZEN} Germany. Currently, {CITIZEN} Brazil. {CITIZEN}"


def main() -> None:
    llm = LLM(
        MODEL,
        max_model_len=1024,
        additional_config={"pasta": {"heads": "smollm2-135m-instruct", "alpha": 0.01}},
    )
    for name, extra in (
        ("plain", None),
        ("emphasised", {"emphasis": {"text": f"{CITIZEN} Brazil"}}),
    ):
        params = BeamSearchParams(beam_width=2, max_tokens=2, extra=extra)
        (output,) = llm.beam_search([{"prompt": PROMPT}], params)
        for beam in output.sequences:
            answer = beam.text.rpartition(CITIZEN)[2].strip()
            print(f"{name}, log-probability {beam.cum_logprob:.2f}: {answer!r}")


if __name__ == "__main__":
    main()
