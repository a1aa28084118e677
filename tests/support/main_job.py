"""What most users do, once through; for runs that must not differ. As a program: on the vLLM that
is imported, offline and as a server, with a report in JSON (see test_patches.py).
"""

import asyncio
import inspect
import json
import sys
from pathlib import Path
from types import FunctionType

TEXT = "Anna moved from Rome to Oslo in May. She works there as a carpenter and sings in a choir. "
QUESTION = "Where does Anna live? Answer with one word."
ALL_HEADS = {str(layer): [0, 1, 2, 3] for layer in range(4)}
SOME_HEADS = {"1": [0, 1], "2": [3]}
EMPHASES = [
    None,
    {"text": "Oslo"},
    {"text": [QUESTION], "heads": SOME_HEADS, "alpha": 0.1},
    {"spans": [[20, 30], [40, 44]], "heads": ALL_HEADS, "alpha": 0.001},
    None,
    {"text": "Answer with one word", "heads": {"3": [2]}, "alpha": 20.0},
]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT + "Why?"}]
CHAT = {"text": [{"message": 0}, {"message": -1, "text": "sings in a choir"}]}
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 2**27,
    "max_model_len": 1024,
    "block_size": 32,
    "max_num_seqs": 4,  # fewer than there are requests: rows come, go and move
    "max_num_batched_tokens": 64,  # every prompt is cut
    "disable_log_stats": True,
}
CONFIG = {"pasta": {"heads": SOME_HEADS}}


def prompt(i):
    """Prompts of one beginning, of several blocks, so that they share what they may."""
    return TEXT * 2 + "And so on. " * i + QUESTION


def offline(llm):
    """Tokens, and how many prompt tokens were cached, of every request."""
    from vllm_pasta import SamplingParams

    def params(i, emphasis):
        return SamplingParams(
            temperature=0,
            max_tokens=8 + 5 * i,
            ignore_eos=True,
            extra=emphasis and {"emphasis": emphasis},
        )

    def outcome(requests):
        return [[list(r.outputs[0].token_ids), r.num_cached_tokens] for r in requests]

    prompts = [prompt(i) for i in range(len(EMPHASES))]
    mixed = [params(i, emphasis) for i, emphasis in enumerate(EMPHASES)]
    plain = [params(i, None) for i in range(len(EMPHASES))]
    report = {}
    report["mixed"] = outcome(llm.generate(prompts, mixed, use_tqdm=False))
    report["again"] = outcome(llm.generate(prompts, mixed, use_tqdm=False))
    report["plain"] = outcome(llm.generate(prompts, plain, use_tqdm=False))
    report["chat"] = outcome(
        llm.chat([MESSAGES] * 2, [params(0, CHAT), params(0, None)], use_tqdm=False)
    )
    for emphasis in ({"text": "not there"}, {"text": "Oslo", "heads": {"9": [0]}}):
        try:
            llm.generate(prompts[0], params(0, emphasis), use_tqdm=False)
        except ValueError as e:
            report.setdefault("refused", []).append(str(e))
    return report


def wrapped_functions():
    """Every function in any module of vllm whose code is ours: ``module.qualified.name``."""
    import vllm_pasta

    ours = str(Path(vllm_pasta.__file__).parent)
    found = set()
    for name, module in list(sys.modules.items()):
        if module is None or name.partition(".")[0] != "vllm":
            continue
        for owner in [module, *(v for v in vars(module).values() if isinstance(v, type))]:
            if not getattr(owner, "__module__", name).startswith("vllm."):
                continue  # a class of someone else's, imported there
            for attribute, value in list(vars(owner).items()):
                if isinstance(value, staticmethod | classmethod):
                    value = value.__func__
                if isinstance(value, FunctionType) and value.__code__.co_filename.startswith(ours):
                    found.add(f"{owner.__name__}.{attribute}")
    return sorted(found)


async def server(model, heads_file):
    """The same over HTTP: the server's own app, without a socket. Status, tokens and header."""
    import httpx
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.run_batch import run_batch
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    flags = []
    for name, value in {**OPTIONS, "disable_log_stats": ()}.items():
        if value != ():
            flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    flags += ["--served-model-name", "m", "--plugin", "pasta", "--pasta-heads", heads_file]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, *flags])
    completion = {"prompt": prompt(1), "max_tokens": 13, "emphasis": EMPHASES[1]}
    chat = {"messages": MESSAGES, "max_tokens": 8, "emphasis": CHAT}
    options = {"model": "m", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    bad = {"text": "not there"}
    response = {"input": "Hello", "max_output_tokens": 4}
    bodies = {
        "completion": ("completions", {**completion, "return_emphasis": True}),
        "beam search": ("completions", {**completion, "use_beam_search": True}),
        "chat": ("chat/completions", chat),
        "bad completion": ("completions", {**completion, "emphasis": bad, "stream": True}),
        "bad chat": ("chat/completions", {**chat, "emphasis": bad, "stream": True}),
        "bad response": ("responses", {**response, "emphasis": bad, "stream": True}),
    }
    report, folder = {}, Path(heads_file).parent
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions"}
    (folder / "in.jsonl").write_text(json.dumps({**line, "body": {**options, **chat}}))
    async with build_async_engine_client(args) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://m") as client:
            for name, (path, body) in bodies.items():
                answer = await client.post(f"/v1/{path}", json={**options, **body}, timeout=60)
                entry = report[name] = {"status": answer.status_code}
                if answer.status_code == 200 and not body.get("stream"):
                    choice = answer.json()["choices"][0]
                    entry["tokens"], entry["text"] = choice["token_ids"], choice.get("text")
                    entry["header"] = answer.headers.get("x-emphasis")
                elif not body.get("stream") or answer.status_code != 200:
                    entry["message"] = answer.json()["error"]["message"]
            report["metrics"] = (await client.get("/metrics")).text
        args.input_file, args.output_file = str(folder / "in.jsonl"), str(folder / "out.jsonl")
        args.output_tmp_dir, args.enable_metrics = None, False
        if "input_file" in inspect.signature(run_batch).parameters:
            args.max_inflight = None
            with (folder / "in.jsonl").open() as file:
                await run_batch(engine, args, file, 1)
        else:  # vLLM 0.32
            await run_batch(engine, args)
    (choice,) = json.loads((folder / "out.jsonl").read_text())["response"]["body"]["choices"]
    report["batch"] = {"tokens": choice["token_ids"]}
    return report


def beams(llm):
    """Tokens of a beam search."""
    from vllm_pasta import BeamSearchParams

    extra = {"emphasis": EMPHASES[1]}
    params = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True, extra=extra)
    (output,) = llm.beam_search([{"prompt": prompt(1)}], params)
    return [list(beam.tokens) for beam in output.sequences]


def connector_bases():
    """Of what class a KV connector becomes, the names of it and its bases."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    config = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    return [cls.__qualname__ for cls in KVConnectorFactory.get_connector_class(config).__mro__]


def main(model, heads_file, *own_tests):
    import pytest
    import vllm
    from many_engines import in_one_process
    from vllm import LLM

    in_one_process()
    report = {"http": asyncio.run(server(model, heads_file))}
    llm = LLM(model, **OPTIONS, additional_config=CONFIG)
    report["offline"] = offline(llm)
    report["beams"] = beams(llm)
    report["connector"] = connector_bases()
    del llm
    draft = {"method": "draft_model", "model": model, "num_speculative_tokens": 3}
    llm = LLM(model, **OPTIONS, additional_config=CONFIG, speculative_config=draft)
    report["speculative"] = offline(llm)
    report["wrapped"] = wrapped_functions()
    report["vllm"] = vllm.__file__
    report["own_tests"] = pytest.main(["-q", "-p", "no:cacheprovider", *own_tests])
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
