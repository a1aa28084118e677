"""Hook of the documentation site: puts pages and pictures from outside ``docs/`` into it.

The documents link to each other as files of the repository, which is right for an editor and a
code host. On the site, README.md becomes the home page, and a link to another file of the
repository leads to a copy of that file. A link to a folder becomes plain text. A link to nothing is
left as it is, and the strict build refuses it.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from properdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md", "patches/README.md", "examples/README.md", "CHANGELOG.md", "CONTRIBUTING.md",
    "SECURITY.md",
)  # fmt: skip

LINK = re.compile(
    r'(?P<before>\]\(|src="|href=")(?P<target>[^)"\s#]+)(?P<after>#[^)"\s]*)?(?=[)"])'
)
TEXT_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)\s#]+)\)")


def site_path(path: str) -> str:
    """Where a file of the repository is on the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def repository_path(uri: str) -> str:
    """Where a page of the site is in the repository."""
    if uri == "index.md":
        return "README.md"
    return f"docs/{uri}" if (ROOT / "docs" / uri).exists() else uri


def linked(page: str, target: str) -> str | None:
    """The file of the repository that a page's relative link leads to; None for any other link."""
    if re.match(r"[a-z]+:|/", target):
        return None
    path = normpath(str(PurePosixPath(page).parent / target))
    return path if (ROOT / path).exists() and not path.startswith("..") else None


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages outside ``docs/``, and every other file that a page links to."""
    for path in PAGES:
        if (ROOT / path).exists():
            _add(files, config, path)
    for page in [file.src_uri for file in files if file.src_uri.endswith(".md")]:
        source = repository_path(page)
        for match in LINK.finditer((ROOT / source).read_text(encoding="utf-8")):
            path = linked(source, match["target"])
            if path is not None and (ROOT / path).is_file():
                _add(files, config, path)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links between files of the repository into links between files of the site."""
    source = repository_path(page.file.src_uri)

    def without_folder(match: re.Match[str]) -> str:
        path = linked(source, match["target"])
        return match["text"] if path is not None and (ROOT / path).is_dir() else match[0]

    def moved(match: re.Match[str]) -> str:
        path = linked(source, match["target"])
        if path is None:
            return match[0]
        target = relpath(site_path(path), str(PurePosixPath(page.file.src_uri).parent))
        return f"{match['before']}{target}{match['after'] or ''}"

    return LINK.sub(moved, TEXT_LINK.sub(without_folder, markdown))


def _add(files: Files, config: Any, path: str) -> None:
    uri = site_path(path)
    if files.get_file_from_path(uri) is None:
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
