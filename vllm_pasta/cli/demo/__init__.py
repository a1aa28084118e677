"""``vllm-pasta demo``: emphasis on real prompts, plain and emphasised side by side."""
