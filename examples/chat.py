"""Emphasises an instruction within a chat message: ``python examples/chat.py [MODEL]``."""

import sys

from vllm import LLM

from vllm_pasta import SamplingParams

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTRUCTION = "Give the name and the occupation of Elena Marchetti as a JSON object."
TEXT = (
    "Elena Marchetti was born in Trieste, the youngest of four sisters. She studied in Padua and "
    "has worked for twenty years as a marine biologist, most of them on a research ship in the "
    "Adriatic Sea. She keeps bees."
)


def main() -> None:
    llm = LLM(
        MODEL,
        max_model_len=1024,
        additional_config={"pasta": {"heads": "smollm2-135m-instruct", "alpha": 0.01}},
    )
    messages = [{"role": "user", "content": f"{TEXT}\n\n{INSTRUCTION}"}]
    # Message -1 is the last one. A mark may also be a whole message, or every message of a role.
    mark = {"message": -1, "text": INSTRUCTION}
    params = [
        SamplingParams(temperature=0, max_tokens=64),
        SamplingParams(temperature=0, max_tokens=64, extra={"emphasis": {"text": [mark]}}),
    ]
    plain, steered = llm.chat([messages] * 2, params)
    print(f"plain:\n{plain.outputs[0].text.strip()}\n")
    print(f"emphasised:\n{steered.outputs[0].text.strip()}")


if __name__ == "__main__":
    main()
