"""A chat with an image over HTTP.

Broken by: a refused request, or one that is only resolved, whose image vLLM's front end believes to
have sent to the engine.
"""

import json

import pytest
from models import tiny_multimodal
from pictures import data_url, picture, save_processor
from servers import SERVE, VLLM, http, running

from vllm_pasta.verify.oracle import Oracle, Steering

HEADS = {"1": [0, 1, 2, 3], "2": [1, 3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_multimodal(tmp_path_factory.mktemp("images"), "qwen2_5_vl")


def test_image(folder, tmp_path):
    processor = save_processor(folder, "qwen2_5_vl")
    command = [
        VLLM, "serve", folder, *SERVE, "--max-num-batched-tokens", "64",
        "--limit-mm-per-prompt", json.dumps({"image": 2, "video": 0}),
    ]  # fmt: skip
    shown = {"type": "image_url", "image_url": {"url": data_url(picture(1))}}
    parts = [{"type": "text", "text": "Look at "}, shown, {"type": "text", "text": " closely."}]
    body = {
        "model": "m", "messages": [{"role": "user", "content": parts}], "max_tokens": 8,
        "temperature": 0, "ignore_eos": True, "return_token_ids": True, "return_emphasis": True,
    }  # fmt: skip

    def emphasis(*marks):
        return {"text": list(marks), "heads": HEADS, "alpha": 0.01}

    plain = [{"type": "text", "text": "Look at "}, {"type": "image"}, parts[2]]
    messages = [{"role": "user", "content": plain}]
    text = processor.apply_chat_template(messages, tokenize=False)
    made = dict(
        processor(
            text=text, images=[picture(1)], return_tensors="pt", return_mm_token_type_ids=True
        )
    )
    ids = made.pop("input_ids")[0].tolist()
    made.pop("attention_mask")
    start, end = ids.index(5), len(ids) - ids[::-1].index(5)
    steering = Steering([(start, end)], {1: [0, 1, 2, 3], 2: [1, 3]}, 0.01, len(ids))
    expected, _ = Oracle(folder).generate(ids, 8, steering, images=made)

    report = [{"tokens": [start, end], "text": "<|image_pad|>", "images": [0]}]
    with running([(command, {"VLLM_PLUGINS": "pasta"})], tmp_path, are_prepared=True) as (url,):
        refused = http.post(
            f"{url}/v1/chat/completions", json={**body, "emphasis": emphasis({"image": 3})}
        )
        assert refused.status_code == 400, refused.text
        assert "the prompt holds 1 images (0 to 0), got 3" in refused.text

        marked = {**body, "emphasis": emphasis({"message": 0, "image": 0})}
        resolved = http.post(f"{url}/v1/emphasis/resolve", json=marked).json()
        assert resolved["prompts"][0]["emphasised"] == report

        for _ in range(2):  # the second time, the front end sends the image's hash alone
            answer = http.post(f"{url}/v1/chat/completions", json=marked)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["token_ids"] == expected
            assert json.loads(answer.headers["x-emphasis"])[0]["emphasised"] == report
