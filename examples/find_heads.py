"""Finds the heads that follow emphasis: ``python examples/find_heads.py [MODEL]``.

``vllm-pasta profile MODEL --tasks counterfact …`` does the same in a shell. Few examples are taken
here, so that it takes a minute; take 100 or more for heads that you mean to use. The profile writes
heads.json, a report heads.md, and heads.answers.jsonl, with which an interrupted run continues.
"""

import sys

from vllm_pasta import HeadSet, cli

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    status = cli.main(
        [
            "profile", MODEL, "--tasks", "counterfact", "--examples", "8", "--search", "gradient",
            "--top-k", "5", "--eager", "--out", "heads.json",
        ]
    )  # fmt: skip
    if status:
        raise SystemExit(status)
    heads = HeadSet.load("heads.json")
    print(f"\n{len(heads)} heads, by layer: {heads.to_json()}")
    print("Steer them with: vllm serve MODEL --plugin pasta --pasta-heads heads.json")
    print('or in Python:    LLM(MODEL, additional_config={"pasta": {"heads": "heads.json"}})')


if __name__ == "__main__":
    main()
