#!/usr/bin/env bash
# Measures what deploys do to requests that come on a schedule all the while: the tests of tests/host/load.rs at
# full size, as a table. A promise that is broken fails the run after the table. Needs root, because a host is
# booted; nothing is left behind but built programs.
set -euo pipefail
export LC_ALL=C

top=$(dirname "$(dirname "$(readlink -f "$0")")")

usage() {
  cat <<'TEXT'
usage: load.sh        (as root)

Takes about ten minutes. The table goes to stdout, what was sent again and what failed to stderr after it.

example: benches/load.sh >table.md
environment: CARGO_TARGET_DIR; OMNI_LAB_SUITE, OMNI_LAB_DIR, OMNI_LAB_NET (see tests/lab/lab.sh)
TEXT
}

say() { printf 'bench: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

case ${1-} in
  '') ;;
  -h | --help) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac
((EUID == 0)) || die "a host is booted, which takes root; use sudo"
"$top/tests/lab/lab.sh" packages

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$top/target}
say "building"
(cd "$top/tests/load" && cargo build --locked --quiet) >&2
(cd "$top" && cargo build --locked --quiet --release && cargo test --locked --quiet --test host --no-run) >&2
export OMNI_TEST_LOAD=$CARGO_TARGET_DIR/debug/omni-test-load OMNI_LOAD_FULL=1
export OMNI_TEST_BINARY=$CARGO_TARGET_DIR/release/omni-deploy

said=$(mktemp) OMNI_LOAD_LOG=$(mktemp)
export OMNI_LOAD_LOG
trap 'rm -f "$said" "$OMNI_LOAD_LOG"' EXIT
say "deploying under load"
rc=0
(cd "$top" && cargo test --locked --quiet --test host load:: -- --nocapture --test-threads 1) >"$said" || rc=$?

echo "| under load | requests | failed GET | failed POST | sent again GET, POST | GET p50 / p99 / worst | POST p50 / p99 / worst |"
echo "|---|---|---|---|---|---|---|"
grep -oE '[0-9]+ (overlap|restart|broken) [^:]*: \{.*\}$' "$said" | while IFS= read -r line; do
  jq -r --arg what "${line%%: *}" '
    def failed(method): [.kinds | to_entries[] | select(.key | startswith(method)) | .value] | add // 0;
    def ms: "\(.p50Ms) / \(.p99Ms) / \(.worstMs) ms";
    "| \($what) | \(.sent) | \(failed("GET")) | \(failed("POST")) | \(.resent.GET // 0), \(.resent.POST // 0) | \(.GET | ms) | \(.POST | ms) |"
  ' <<<"${line#*: }"
done
echo
grep -oE 'WebSockets of .*' "$said" || true
grep -E '^[0-9.]+ (GET|POST) ' "$OMNI_LOAD_LOG" | sort -n >&2 || true
((rc == 0)) || { grep -A 12 'panicked' "$said" >&2 || true; die "a promise is broken (cargo test ended $rc)"; }
