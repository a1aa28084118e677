"""A small proxy in front of a prefill server and a decode server.

    python proxy.py --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200 --port 8000

Each POST goes to the prefill server first, for one token, and then to the decode server with the
``kv_transfer_params`` that the first one returned. Both get the same body otherwise, emphasis
included, and the parameters are passed on as they are: the decode server checks that its request's
emphasis is the one that the KV was computed with. A prefill server's error is the client's answer.
Where a server does not answer, the client gets 502 and its name.

For trying things out: no authentication, no balancing. Needs aiohttp, which vLLM brings along.
"""

import argparse
import json
from collections.abc import AsyncIterator

from aiohttp import ClientError, ClientSession, ClientTimeout, web

TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
HOP_BY_HOP = ("connection", "content-length", "date", "server", "transfer-encoding")
ONE_TOKEN = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def for_prefill(body: dict) -> dict:
    """The same request, for one token and without streaming."""
    drop = ("stream_options", "min_tokens", "min_completion_tokens")
    first = {name: value for name, value in body.items() if name not in drop}
    limit = "max_output_tokens" if "input" in body else "max_tokens"
    ones = dict.fromkeys([name for name in ONE_TOKEN if name in body] or [limit], 1)
    return {**first, **ones, "stream": False, "kv_transfer_params": TO_PREFILL}


def gone(name: str, url: str, error: Exception) -> web.Response:
    """What a client is told where a server does not answer, in the shape of vLLM's own errors."""
    message = f"the {name} server {url} does not answer: {error or type(error).__name__}"
    detail = {"message": message, "type": "BadGateway", "param": None, "code": 502}
    return web.json_response({"error": detail}, status=502)


class Proxy:
    """Handles every path.

    Args:
        prefill: Base URL of the prefill server.
        decode: Base URL of the decode server.
    """

    def __init__(self, prefill: str, decode: str) -> None:
        self.prefill, self.decode = prefill, decode

    async def session(self, app: web.Application) -> AsyncIterator[None]:
        async with ClientSession(timeout=ClientTimeout(total=None)) as self.client:
            yield

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.method == "POST":
            try:
                asked = json.loads(body)
            except ValueError:
                asked = None  # the decode server says what is wrong with it
            if isinstance(asked, dict):
                first = for_prefill(asked)
                try:
                    async with self.client.post(self.prefill + request.path, json=first) as answer:
                        if answer.status != 200:
                            return web.Response(
                                body=await answer.read(),
                                status=answer.status,
                                content_type=answer.content_type,
                            )
                        params = (await answer.json()).get("kv_transfer_params")
                except ClientError as e:
                    return gone("prefill", self.prefill, e)
                if params:
                    body = json.dumps({**asked, "kv_transfer_params": params}).encode()
        response = None
        try:
            async with self.client.request(
                request.method,
                self.decode + request.path_qs,
                data=body,
                headers={"content-type": "application/json"},
            ) as answer:
                headers = {k: v for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP}
                response = web.StreamResponse(status=answer.status, headers=headers)
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response
        except ClientError as e:
            if response is None:
                return gone("decode", self.decode, e)
            raise  # amid an answer: the client's connection is cut, so that it does not look whole


def main() -> None:
    parser = argparse.ArgumentParser(description="Proxy for a prefill and a decode server.")
    parser.add_argument("--prefill", required=True, help="base URL of the prefill server")
    parser.add_argument("--decode", required=True, help="base URL of the decode server")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    proxy = Proxy(args.prefill, args.decode)
    app = web.Application(client_max_size=64 * 1024**2)
    app.cleanup_ctx.append(proxy.session)
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    web.run_app(app, host=args.host, port=args.port, print=None)


if __name__ == "__main__":
    main()
