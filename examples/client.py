"""Requests with emphasis to a server: ``python examples/client.py [BASE_URL]``.

Start the server first:

    vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --plugin pasta \\
      --pasta-heads smollm2-135m-instruct --pasta-alpha 0.01
"""

import sys

from openai import BadRequestError, OpenAI

BASE_URL = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
CITIZEN = "Hermann Staudinger was a citizen of"


def main() -> None:
    client = OpenAI(base_url=BASE_URL, api_key="none")
    model = client.models.list().data[0].id

    def complete(**extra_body: object) -> str:
        answer = client.completions.create(
            model=model,
            prompt=f"Previously, {CITIZEN} Germany. Currently, {CITIZEN} Brazil. {CITIZEN}",
            max_tokens=8,
            temperature=0,
            extra_body=extra_body,
        )
        return answer.choices[0].text.strip()

    print("plain:     ", complete())
    print("emphasised:", complete(emphasis=f"{CITIZEN} Brazil"))
    print("weaker:    ", complete(emphasis={"text": f"{CITIZEN} Brazil", "alpha": 0.5}))

    # A chat: the part between the tags is emphasised, and the model does not see the tags.
    chat = client.chat.completions.create(
        model=model,
        messages=[
            {"role": "user", "content": "Name a colour, <emphasis>as a JSON object</emphasis>."}
        ],
        max_tokens=24,
        temperature=0,
        extra_body={"emphasis": {"markup": "tag"}},
    )
    print("chat:      ", chat.choices[0].message.content)

    try:
        complete(emphasis="a citizen of Brasil")
    except BadRequestError as e:  # what cannot be emphasised is refused, with a reason
        print("refused:   ", e.message)


if __name__ == "__main__":
    main()
