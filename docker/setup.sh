#!/usr/bin/env bash
# setup.sh VENV [UPTO]: all that the project needs on Debian 12, in the order in which it is needed: system packages, a virtual
# environment, torch, TensorFlow, Horovod built for them, MLflow and the tools, the project itself (editable). Safe to run
# again. UPTO ends it early, so that an image can keep what seldom changes in layers of their own: `frameworks` after Horovod,
# `dependencies` before the project, of which it needs no more than setup.cfg.
#
# TORCH_INDEX_URL          where pip looks for torch (else: PyTorch's CPU wheels on a machine without a GPU, if they can be reached)
# HOROVOD_GPU_OPERATIONS   such as NCCL: a set-up for GPUs, whether or not there is one where it is made
# PYTHON                   the interpreter to build the environment from (python3)
set -euo pipefail

venv=$1
upto=${2:-project}
case $upto in
  frameworks | dependencies | project) ;;
  *) echo "setup: UPTO must be frameworks, dependencies or project, got $upto" >&2; exit 2 ;;
esac
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
constraints=$here/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# system packages: an MPI, a compiler, the network of benchmarks and tests (iproute2, openssh-server), and python3-venv where the interpreter is Debian's own
packages=(build-essential cmake openmpi-bin libopenmpi-dev openssh-client openssh-server iproute2)
interpreter=$(readlink -f "$(command -v "${PYTHON:-python3}")")
if dpkg-query -S "$interpreter" >/dev/null 2>&1; then # Debian's own
  version=$(basename "$interpreter")
  packages+=("$version-venv" "$version-dev")
fi
missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "setup: installing ${missing[*]}"
  sudo=""
  if [ "$(id -u)" != 0 ]; then
    sudo=$(command -v sudo) || { echo "setup: this needs root: run it as root, or install sudo" >&2; exit 1; }
  fi
  $sudo apt-get update -qq
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

[ -x "$venv/bin/python" ] || "$interpreter" -m venv "$venv"
python=$(cd "$venv/bin" && pwd)/python
pip() { "$python" -m pip install -q -c "$constraints" "$@"; }
pip --upgrade "setuptools<81" wheel

# torch: its wheel first and alone, so that an index with nothing but torch in it is enough
torch=$(grep '^torch==' "$constraints")
index=${TORCH_INDEX_URL:-}
if [ -z "$index" ] && [ -z "${HOROVOD_GPU_OPERATIONS:-}" ] && ! command -v nvidia-smi >/dev/null; then
  index=$("$python" - <<'PY'
import urllib.request
url = "https://download.pytorch.org/whl/cpu"
try:
    urllib.request.urlopen(url + "/torch/", timeout=5).close()
    print(url)
except OSError:
    pass
PY
)
fi
if ! "$python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '${torch#torch==}')" 2>/dev/null; then
  pip --no-deps ${index:+--index-url "$index"} "$torch"
fi
# TensorFlow: the CPU build unless a GPU is there; an image has no CUDA for it but what comes with it
tensorflow="tensorflow-cpu"
if [ -n "${HOROVOD_GPU_OPERATIONS:-}" ]; then
  tensorflow="tensorflow[and-cuda]"
elif command -v nvidia-smi >/dev/null; then
  tensorflow=tensorflow
fi
pip torch "$tensorflow" "cmake<4" cffi cloudpickle psutil pyyaml packaging

wheel=$("$here/build_horovod.sh" "$python" | tail -n 1)
"$python" -c "import horovod" 2>/dev/null || "$python" -m pip install -q --no-deps "$wheel"
[ "$upto" != frameworks ] || exit 0

extras=(mlflow transformers lightning test docs examples)
if [ "$upto" = dependencies ]; then
  "$python" - "$root/setup.cfg" "${extras[@]}" >"$venv/dependencies.txt" <<'PY'
import configparser
import sys

file, *extras = sys.argv[1:]
config = configparser.ConfigParser()
config.read(file)
for extra in extras:
    print(config["options.extras_require"][extra])
PY
  pip -r "$venv/dependencies.txt"
  exit 0
fi
pip --no-build-isolation -e "${root}[$(IFS=,; echo "${extras[*]}")]"
