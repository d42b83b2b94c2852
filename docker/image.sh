#!/usr/bin/env bash
# image.sh build                  builds docker/Dockerfile
# image.sh run [COMMAND...]       runs the command in the image (else what the image says)
# image.sh privileged COMMAND...  the same as root of a container that may make networks of its own
# image.sh able                   whether there is an engine: if not, says why and fails
#
# By Docker or Podman where an engine answers; elsewhere, as root on Debian, by buildah, on a base that debootstrap makes from
# this machine's own package mirror (about 8 GB below WORK).
#
# IMAGE             its name (hvd-accordion)
# DOCKERFILE        another one than docker/Dockerfile
# ENGINE            docker, podman or buildah (else the first of them that works)
# BASE_IMAGE        what to build on (else the Dockerfile's own; with buildah debootstrap's)
# TORCH_INDEX_URL   where pip looks for torch (docker/setup.sh)
# WORK              buildah's folder (~/.cache/hvd-accordion-image)
# Podman and buildah see pip's settings on this machine, its certificates and its folders of wheels, for the time of the build.
set -euo pipefail
shopt -s inherit_errexit

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
image=${IMAGE:-hvd-accordion}
dockerfile=${DOCKERFILE:-$root/docker/Dockerfile}
work=${WORK:-$HOME/.cache/hvd-accordion-image}

engine=${ENGINE:-}
for name in docker podman; do
  if [ -z "$engine" ] && "$name" info >/dev/null 2>&1; then engine=$name; fi
done
engine=${engine:-buildah}

able() {
  [ "$engine" = buildah ] || return 0
  if [ "$(id -u)" != 0 ]; then
    echo "image: neither docker nor podman answers, and buildah needs root"
  elif ! command -v buildah >/dev/null && ! grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release; then
    echo "image: neither docker nor podman answers, and there is no buildah, nor a Debian 12 to install it on"
  elif ! unshare --mount true 2>/dev/null; then
    echo "image: neither docker nor podman answers, and buildah may not mount here"
  else
    return 0
  fi
  return 1
}

# a name of its own: `command -v buildah` would find a function of that name, whether or not there is a buildah
builder() { TMPDIR=$work/tmp buildah --storage-driver overlay --root "$work/root" --runroot "$work/run" "$@"; }
isolation=(--isolation=chroot --network=host) # needs no more than root: no engine, no network of its own, no cgroups

# who can tell pip's settings on this machine: Debian's own Python has no pip, the environment that `make` made has
pip_config() {
  local python
  for python in "$root/.venv/bin/python" python3; do
    if "$python" -m pip --version >/dev/null 2>&1; then "$python" -m pip config list; return; fi
  done
  return 1
}

prepare_buildah() {
  local missing=()
  mkdir -p "$work/tmp"
  command -v buildah >/dev/null || missing+=(buildah runc)
  [ -n "${BASE_IMAGE:-}" ] || command -v debootstrap >/dev/null || missing+=(debootstrap)
  pip_config >/dev/null || missing+=(python3-pip)
  if [ ${#missing[@]} -gt 0 ]; then
    echo "image: installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  fi
}

# Debian 12 at its smallest, as an image; the mirror that it came from stays out of it
base_image() {
  local base=localhost/debian:bookworm container mirror
  builder inspect --type image "$base" >/dev/null 2>&1 && { echo "$base"; return; }
  mirror=$(sed -n 's/^deb \(\S*\) bookworm main$/\1/p' "$work/sources.list")
  rm -rf "$work/base"
  debootstrap --variant=minbase bookworm "$work/base" "$mirror" >"$work/debootstrap.log"
  for suite in debian:bookworm debian:bookworm-updates debian-security:bookworm-security; do
    echo "deb http://deb.debian.org/${suite%:*} ${suite#*:} main"
  done >"$work/base/etc/apt/sources.list"
  # as in Debian's own image: packages don't stay behind once they are unpacked
  echo 'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };' \
    >"$work/base/etc/apt/apt.conf.d/docker-clean"
  rm -rf "$work"/base/etc/{resolv.conf,hostname} "$work"/base/var/{cache/apt/archives/*.deb,cache/apt/*.bin,lib/apt/lists/*,log/*.log}
  container=$(builder from scratch)
  builder add -q "$container" "$work/base" / >/dev/null
  builder config --cmd bash --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
  builder commit -q --rm "$container" "$base" >/dev/null
  rm -rf "$work/base"
  echo "$base"
}

# sources.list, pip.conf and `mounts` from the settings of this machine: what they name is mounted below /run/host
host_settings() {
  local line key value part path folder target
  mkdir -p "$work"
  # shellcheck disable=SC2016  # apt fills these in
  apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 2>/dev/null |
    sed -n 's|/ bookworm| bookworm|; / bookworm\S* main$/p' | sort -u >"$work/sources.list"
  [ -s "$work/sources.list" ] || echo "deb http://deb.debian.org/debian bookworm main" >"$work/sources.list"
  mounts=(-v "$work/pip.conf:/run/host/pip.conf:ro")
  echo "[global]" >"$work/pip.conf"
  while IFS= read -r line; do
    [[ $line =~ ^(global|:env:)\.(cert|index-url|extra-index-url|find-links|constraint|default-timeout)=\'(.*)\'$ ]] || continue
    key=${BASH_REMATCH[2]} value=
    for part in ${BASH_REMATCH[3]}; do
      path=${part#file://}
      if [ "${path:0:1}" = / ]; then
        folder=$path
        # the pages of an index point to its files by paths that leave their own folder
        [ "$path" = "$part" ] || folder=$(dirname "$path")
        [ -e "$folder" ] || continue
        target=/run/host/$((${#mounts[@]} / 2)) # what is mounted leaves an empty folder in the image: let its name tell nothing
        mounts+=(-v "$(realpath "$folder"):$target:ro")
        part=${part/"$folder"/"$target"}
      fi
      value="$value $part"
    done
    grep -q "^$key =" "$work/pip.conf" || [ -z "$value" ] || echo "$key =$value" >>"$work/pip.conf"
  done < <(pip_config)
}

build() {
  local arguments=(-f "$dockerfile" -t "$image") base=${BASE_IMAGE:-}
  arguments+=(--label "org.opencontainers.image.version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/hvd_accordion/__init__.py")")
  [ -z "${TORCH_INDEX_URL:-}" ] || arguments+=(--build-arg "TORCH_INDEX_URL=$TORCH_INDEX_URL")
  if [ "$engine" = buildah ]; then prepare_buildah; fi
  if [ "$engine" != docker ]; then
    host_settings
    arguments+=(--format docker "${mounts[@]}" --build-arg PIP_CONFIG_FILE=/run/host/pip.conf) # OCI's format has no health check
  fi
  if [ "$engine" = buildah ] && [ -z "$base" ]; then
    base=$(base_image)
    arguments+=(-v "$work/sources.list:/etc/apt/sources.list:ro")
  fi
  [ -z "$base" ] || arguments+=(--build-arg "BASE_IMAGE=$base")
  case $engine in
    buildah) builder bud "${isolation[@]}" --layers "${arguments[@]}" "$root" ;;
    *) "$engine" build "${arguments[@]}" "$root" ;;
  esac
}

run() { # `options` are for the engine
  if [ "$engine" != buildah ]; then
    exec "$engine" run --rm --shm-size=1g "${options[@]}" "$image" "$@"
  fi
  local container status=0 command=("$@")
  [ $# -gt 0 ] || command=(make demo) # buildah runs no entry point and no default command
  container=$(builder from "localhost/$image")
  builder run "${isolation[@]}" --hostname localhost "${options[@]}" "$container" -- "${command[@]}" || status=$?
  builder rm "$container" >/dev/null
  return "$status"
}

options=()
case ${1:-} in
  able) able ;;
  build) able >&2; build ;;
  run) shift; able >&2; run "$@" ;;
  privileged)
    shift
    able >&2
    if [ "$engine" = buildah ]; then
      options=(--user root --cap-add CAP_NET_ADMIN --cap-add CAP_SYS_ADMIN)
      # shellcheck disable=SC2016  # for the shell in there
      run bash -c 'mount -o remount,rw,bind /proc/sys && exec "$@"' privileged "$@"
    else
      options=(--user root --privileged)
      run "$@"
    fi
    ;;
  *) sed -n '2,5p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
