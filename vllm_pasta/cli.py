"""``vllm-pasta``."""


def main() -> None: ...
