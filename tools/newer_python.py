"""The Python of a vLLM that has no CPU build yet, over the installed build's compiled files.

``python -m tools.newer_python 0.33.0 build/vllm-0.33``, then ``PYTHONPATH=build/vllm-0.33 pytest``.
Whether that runs depends on what the release changed in its compiled parts: it proves what it runs,
and no more. Installs nothing into the environment.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tools.check_upstream import download, installed

COMPILED = ("*.so", "*.so.*")
ALSO = ("orjson==3.13.0",)
"""What vLLM 0.33 imports and 0.32 did not."""


def make(wheel: Path, folder: Path) -> None:
    """Makes ``folder`` one that Python finds a vLLM in.

    Args:
        wheel: The release's, for whatever device; its compiled files are left out.
        folder: Must not exist.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.namelist() if m.startswith("vllm/") and ".so" not in m]
        archive.extractall(folder, members)
    source = installed() / "vllm"
    for file in (file for pattern in COMPILED for file in source.rglob(pattern)):
        target = folder / "vllm" / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    version = wheel.name.split("-")[1]
    # vLLM takes the platform from the version of its distribution.
    info = folder / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    lines = ("Metadata-Version: 2.4", "Name: vllm", f"Version: {version}+cpu", "")
    (info / "METADATA").write_text("\n".join(lines))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, *ALSO], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", help="a version of vLLM (0.33.0), or the path of a wheel")
    parser.add_argument("folder", type=Path, help="a new folder")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists; remove it, or name another")
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(args.release)
        wheel = given if given.is_file() else download(f"vllm=={given}", Path(scratch))
        make(wheel, args.folder)


if __name__ == "__main__":
    main()
