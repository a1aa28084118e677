"""The oracle's answers, each worked out once."""


class Answers:
    """One model's.

    Args:
        oracle: The model under the oracle.
    """

    def __init__(self, oracle):
        self.oracle, self._known = oracle, {}

    def to(self, case, output=None):
        """Tokens and log-probabilities of a `Case`.

        Args:
            case: What is asked.
            output: vLLM's answer. The oracle is quicker where it need only judge one.
        """
        key = repr(case)
        if key not in self._known:
            guess = () if output is None else output.token_ids
            self._known[key] = self.oracle.generate(
                case.prompt, case.max_tokens, case.steering, guess=guess
            )
        return self._known[key]
