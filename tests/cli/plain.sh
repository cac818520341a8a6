#!/usr/bin/env bash
# `cargo test` as somebody has it who has nothing but Rust: run by root, the test programs are an ordinary user, with a
# home of their own, and see no Nix, no Caddy and no build tool. What is marked as ignored is left out, as it is there.
#   tests/cli/plain.sh [ARGUMENT OF THE TEST PROGRAMS]...
set -euo pipefail

top=$(dirname "$(dirname "$(dirname "$(readlink -f "$0")")")")
cd "$top"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$top/target}
user=65534

((EUID == 0)) || { echo 'plain.sh: must be root, to be somebody else; as yourself, run cargo test' >&2; exit 1; }
if [[ -z ${OMNI_TEST_S3:-} ]]; then
  cargo build --quiet --locked --manifest-path tests/s3-server/Cargo.toml --target-dir tests/s3-server/target
  export OMNI_TEST_S3=$top/tests/s3-server/target/debug/omni-test-s3
fi
mapfile -t programs < <(cargo test --locked --no-run 2>&1 | tee /dev/stderr | sed -nE 's/^ *Executable .*\((.*)\)$/\1/p')
((${#programs[@]})) || { echo 'plain.sh: cargo names no test programs' >&2; exit 1; }

home=$(mktemp -d "${TMPDIR:-/tmp}/omni-plain.XXXXXX")
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
  mount -t tmpfs -o mode=755 omni-plain "$blocked"
  mkdir -p "$to"
  mount --move "$at" "$to"
}
export -f lay
export user

code=0
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
