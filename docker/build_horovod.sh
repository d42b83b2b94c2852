#!/usr/bin/env bash
# build_horovod.sh PYTHON: builds a Horovod wheel for what is installed in PYTHON's environment, torch, TensorFlow or both,
# and prints its path as the last line. Built once: kept in a cache folder keyed by everything its binary depends on.
#
# Horovod 0.28.1 does not build against torch >= 2.1 or TensorFlow >= 2.16 as released; two edits of its sources mend that.
# HVD_ACCORDION_CACHE names another cache folder; HOROVOD_* variables (HOROVOD_GPU_OPERATIONS=NCCL, ...) reach the build.
set -euo pipefail

python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${HVD_ACCORDION_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hvd-accordion}
version=$(sed -n 's/^horovod==//p' "$here/constraints.txt")

key=$("$python" - <<'PY'
import importlib.metadata as metadata
import importlib.util
import platform
import sys

def version(*names):
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass

found = []
if importlib.util.find_spec("torch"):
    import torch  # its own version tells a CPU build from a CUDA one, the package's does not always
    found.append(f"torch{torch.__version__}")
if version("tensorflow-cpu", "tensorflow"):
    found.append(f"tf{version('tensorflow-cpu', 'tensorflow')}")
if not found:
    sys.exit(f"build_horovod: neither torch nor tensorflow is installed in {sys.prefix}")
print("-".join([f"cp{sys.version_info[0]}{sys.version_info[1]}", platform.machine(), *found]))
PY
)
with_torch=HOROVOD_WITHOUT_PYTORCH=1 with_tensorflow=HOROVOD_WITHOUT_TENSORFLOW=1
case $key in *-torch*) with_torch=HOROVOD_WITH_PYTORCH=1 ;; esac
case $key in *-tf*) with_tensorflow=HOROVOD_WITH_TENSORFLOW=1 ;; esac
options=$({ env | grep -E '^HOROVOD_(GPU|CUDA|NCCL|WITH|CPU)' || true; } | sort | sha256sum | cut -c1-8)
out=$cache/horovod-$version-$key-$options

if ! ls "$out"/horovod-*.whl >/dev/null 2>&1; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  echo "build_horovod: building horovod $version for $key (about 3 minutes on two cores)" >&2
  "$python" -m pip download -q --no-deps --no-build-isolation --no-binary horovod -d "$work" "horovod==$version" >&2
  tar -xzf "$work"/horovod-*.tar.gz -C "$work"
  cd "$work/horovod-$version"
  # today's torch and TensorFlow headers are C++17
  sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 17)/' CMakeLists.txt horovod/torch/CMakeLists.txt
  # XLA-compiled graphs on GPU only; includes headers that TensorFlow no longer ships
  sed -i '/xla_mpi_ops\.cc/d' horovod/tensorflow/CMakeLists.txt
  if ! env PATH="$(dirname "$python"):$PATH" MAKEFLAGS="-j$(nproc)" \
    $with_torch $with_tensorflow HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 \
    "$python" -m pip wheel --no-build-isolation --no-deps -w "$work/wheel" . >"$work/log" 2>&1; then
    tail -n 60 "$work/log" >&2
    echo "build_horovod: the build failed; its last lines stand above" >&2
    exit 1
  fi
  mkdir -p "$out"
  mv "$work"/wheel/horovod-*.whl "$out/"     # only a whole wheel ever enters the cache
fi
ls "$out"/horovod-*.whl
