"""The playground: a page on which a user marks words and sees both answers.

The page is static (``page/``: HTML, CSS and ES modules, as they are) and talks to the server that
it came from, through the same API as any client. So the API key guards what it guards, and a server
on which nobody opens the page does nothing for it.
"""

from functools import cache
from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response

PATH = "/playground"
"""Where the page is. vLLM's check of API keys guards ``/v1`` and the like, and not this: the page
holds nothing of anybody's, and asks for the key itself."""

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

HEADERS = {
    # Nothing but the page's own files and this server's API; no inline code; in no other page.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def attach(app: FastAPI) -> None:
    """Adds the page's routes, which are no part of the server's API."""
    app.add_api_route(PATH, _index, methods=["GET"], include_in_schema=False)
    app.add_api_route(PATH + "/{name}", _file, methods=["GET"], include_in_schema=False)


def _index() -> Response:
    return _file("index.html")


def _file(name: str) -> Response:
    content = _page().get(name)
    if content is None:
        return Response("There is no such file.\n", status_code=404, media_type="text/plain")
    return Response(content, headers=HEADERS, media_type=MEDIA_TYPES[name.rpartition(".")[2]])


@cache
def _page() -> dict[str, bytes]:
    """The page's files by name, read when first asked for."""
    folder = files(__package__) / "page"
    return {file.name: file.read_bytes() for file in folder.iterdir()}
