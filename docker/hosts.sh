#!/usr/bin/env bash
# Hosts that train together, each a container of compose.yaml; nothing here needs root.
#   hosts.sh serve             waits for orders by ssh
#   hosts.sh train COMMAND...  waits until HOSTS hosts answer, then runs the command on all of them: horovodrun -H
#
# Each host makes its keys when it first starts. Private keys never leave it; the public ones and its address go to a folder
# that all share, FOLDER (/run/hosts): who can write there may log in.
#
# HOSTS   how many hosts must answer (2)       SLOTS   ranks on each (1)
# WAIT    seconds to wait for them (120)       PORT    where they listen (2222)
set -euo pipefail

folder=${FOLDER:-/run/hosts} port=${PORT:-2222} slots=${SLOTS:-1}
keys=$HOME/.ssh

publish() { # LINE FILE: appends the line, once; two hosts never write at the same time
  # shellcheck disable=SC2016  # the inner shell fills these in
  flock "$folder/.lock" bash -c 'grep -qxsF -e "$1" "$2" || echo "$1" >>"$2"' publish "$1" "$folder/$2"
}

make_key() { [ -e "$keys/$1" ] || ssh-keygen -q -t ed25519 -N "" -C "$(hostname)" -f "$keys/$1"; }

make_keys() {
  umask 077
  mkdir -p "$keys"
  make_key id_ed25519
  # so that neither horovodrun nor mpirun need be told
  printf 'Host *\n  Port %s\n  UserKnownHostsFile %s\n  BatchMode yes\n' "$port" "$folder/known_hosts" >"$keys/config"
  publish "$(cat "$keys/id_ed25519.pub")" authorized_keys
}

serve() {
  local address
  address=$(hostname -I | cut -d " " -f 1)
  make_key host_ed25519
  publish "[$address]:$port $(cut -d " " -f 1,2 "$keys/host_ed25519.pub")" known_hosts
  publish "$address" addresses
  echo "hosts: $address is there"
  # by its path, which sshd insists on; /dev/null: none but these settings. PATH: a session has no profile that would find Python
  exec "$(PATH=$PATH:/usr/sbin command -v sshd)" -D -e -f /dev/null -p "$port" -h "$keys/host_ed25519" \
    -o AuthorizedKeysFile="$folder/authorized_keys" -o AuthenticationMethods=publickey -o UsePAM=no -o PidFile=none \
    -o LogLevel=ERROR -o MaxStartups=100 -o SetEnv="PATH=$PATH"
}

train() {
  local hosts=${HOSTS:-2} end=$((SECONDS + ${WAIT:-120})) address there=()
  while there=(); [ ${#there[@]} -lt "$hosts" ]; do
    while read -r address; do
      if ssh -n -o ConnectTimeout=2 "$address" true 2>/dev/null; then there+=("$address:$slots"); fi
    done < <(cat "$folder/addresses" 2>/dev/null)
    [ ${#there[@]} -lt "$hosts" ] || break
    if [ "$SECONDS" -ge "$end" ]; then
      echo "hosts: ${#there[@]} of $hosts hosts answered within ${WAIT:-120} s: ${there[*]}" >&2
      exit 1
    fi
    sleep 1
  done
  there=("${there[@]:0:hosts}")
  echo "hosts: training on ${there[*]}"
  exec horovodrun -np $((hosts * slots)) -H "$(IFS=,; echo "${there[*]}")" "$@"
}

case ${1:-} in
  serve) make_keys; serve ;;
  train) shift; make_keys; train "$@" ;;
  *) echo "hosts: serve or train COMMAND..., got ${*:-nothing}" >&2; exit 2 ;;
esac
