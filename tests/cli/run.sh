#!/usr/bin/env bash
# The tests of the modules and of the built program, in two halves that `cargo test` knows as well.
#   tests/cli/run.sh user [ARGUMENT OF THE TEST PROGRAMS]...
#     what `cargo test` runs, as somebody has it who has nothing but Rust: an ordinary user with a home of their own, who
#     sees no Nix, no Caddy and no build tool
#   tests/cli/run.sh root [ARGUMENT OF THE TEST PROGRAMS]...
#     what `cargo test -- --ignored` runs: as root, with Nix; and the campaign of pushes and fetches that are cut off
# As root. OMNI_TEST_SEED is a number that gives the order of the tests.
set -euo pipefail

top=$(dirname "$(dirname "$(dirname "$(readlink -f "$0")")")")
cd "$top"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$top/target}
user=65534

die() { printf 'run.sh: %s\n' "$*" >&2; exit 1; }
((EUID == 0)) || die 'must be root, to be somebody else; as yourself, run cargo test'
who=${1:-}
[[ $who == user || $who == root ]] || die "say 'user' or 'root'"
shift
if [[ -z ${OMNI_TEST_S3:-} ]]; then
  cargo build --quiet --locked --manifest-path tests/s3-server/Cargo.toml --target-dir tests/s3-server/target
  export OMNI_TEST_S3=$top/tests/s3-server/target/debug/omni-test-s3
fi
built=$(cargo test --locked --no-run 2>&1) || die "$built"
if [[ $who == root ]]; then
  campaign=$(cargo test --locked --no-run --features campaign --test cut 2>&1) || die "$campaign"
  built+=$'\n'$campaign
fi
mapfile -t programs < <(sed -nE 's/^ *Executable .*\((.*)\)$/\1/p' <<<"$built")
((${#programs[@]})) || die "cargo names no test programs: $built"
# Libtest shuffles for whoever says that they know this for an unstable option. Cargo must not see it: some crates are
# built otherwise then.
if [[ -n ${OMNI_TEST_SEED:-} ]]; then
  export RUSTC_BOOTSTRAP=1
  set -- -Z unstable-options --shuffle-seed "$OMNI_TEST_SEED" "$@"
fi
code=0
if [[ $who == root ]]; then
  for program in "${programs[@]}"; do "$program" --ignored "$@" || code=101; done
  exit "$code"
fi

home=$(mktemp -d "${TMPDIR:-/tmp}/omni-user.XXXXXX")
trap 'rm -rf "$home"' EXIT
mkdir "$home/bin" "$home/tmp" "$home/top" "$home/target"
chown "$user:$user" "$home" "$home/tmp"
for tool in /bin/* /usr/bin/* /sbin/* /usr/sbin/*; do
  case ${tool##*/} in
    nix* | caddy | cargo | rustc | cc | gcc* | g++*) ;;
    *) ln -sf "$tool" "$home/bin/" ;;
  esac
done

# Where the user cannot go (a checkout below /root), a way there is laid for the test programs alone.
# shellcheck disable=SC2317  # called by the inner shell
lay() {
  local to=$1 at=$2 blocked=$1
  setpriv --reuid="$user" --regid="$user" --clear-groups test -r "$to" && return
  mount --bind "$to" "$at"
  while ! setpriv --reuid="$user" --regid="$user" --clear-groups test -x "$(dirname "$blocked")"; do
    blocked=$(dirname "$blocked")
  done
  mount -t tmpfs -o mode=755 omni-user "$blocked"
  mkdir -p "$to"
  mount --move "$at" "$to"
}
export -f lay
export user

for program in "${programs[@]}"; do
  # shellcheck disable=SC2016  # expanded by the inner shell
  unshare --mount --propagation private bash -euc '
    lay "$1" "$2/top"
    case $CARGO_TARGET_DIR/ in "$1"/*) ;; *) lay "$CARGO_TARGET_DIR" "$2/target" ;; esac
    cd "$1"; home=$2; shift 2
    exec setpriv --reuid="$user" --regid="$user" --clear-groups env -i PATH="$home/bin" HOME="$home" USER=nobody LANG=C.UTF-8 \
      TMPDIR="$home/tmp" OMNI_TEST_S3="$OMNI_TEST_S3" RUST_BACKTRACE="${RUST_BACKTRACE:-0}" ${RUSTC_BOOTSTRAP:+RUSTC_BOOTSTRAP=1} "$@"
  ' - "$top" "$home" "$program" "$@" || code=101
done
exit "$code"
