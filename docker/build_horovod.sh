#!/usr/bin/env bash
# build_horovod.sh PYTHON: builds a Horovod wheel for the torch and TensorFlow installed in PYTHON's environment and
# prints its path as the last line. Built once: kept in a cache folder keyed by everything its binary depends on.
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
import platform
import sys

def version(*names):
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    sys.exit(f"build_horovod: {names[0]} is not installed in {sys.prefix}")

import torch  # its own version tells a CPU build from a CUDA one, the package's does not always
print(f"cp{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}"
      f"-torch{torch.__version__}-tf{version('tensorflow-cpu', 'tensorflow')}")
PY
)
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
  if ! PATH="$(dirname "$python"):$PATH" MAKEFLAGS="-j$(nproc)" \
    HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 \
    "$python" -m pip wheel --no-build-isolation --no-deps -w "$work/wheel" . >"$work/log" 2>&1; then
    tail -n 60 "$work/log" >&2
    echo "build_horovod: the build failed; its last lines stand above" >&2
    exit 1
  fi
  mkdir -p "$out"
  mv "$work"/wheel/horovod-*.whl "$out/"     # only a whole wheel ever enters the cache
fi
ls "$out"/horovod-*.whl
