#!/usr/bin/env bash
# Every check there is, from formatting to booted hosts, and a summary; exit 0 only if all of it was run and
# holds. Needs root and Rust; installs the Debian packages that are missing. What it starts ends with it; what a
# run that was killed has left is taken away by the next one.
set -euo pipefail

top=$(dirname "$(dirname "$(readlink -f "$0")")")
cd "$top"
lab=$top/tests/lab/lab.sh
group_file=/run/omni-deploy-tests.group
scratch_prefix=/tmp/omni-deploy-tests
export OMNI_LAB_DIR=/run/omni-deploy-lab-tests
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$top/target}
export CARGO_TERM_COLOR=never RUST_BACKTRACE=${RUST_BACKTRACE:-0}
# What is installed on the hosts is what ships; the S3 server and the load are the tests' own.
export OMNI_TEST_BINARY=$CARGO_TARGET_DIR/release/omni-deploy
export OMNI_TEST_S3=$CARGO_TARGET_DIR/debug/omni-test-s3
export OMNI_TEST_LOAD=$CARGO_TARGET_DIR/debug/omni-test-load

usage() {
  cat <<'TEXT'
usage: run.sh        (as root)

Builds everything, checks formatting, lints, scripts and units, runs the tests of all three storeys (tables in
the modules, the built program against directories and servers, booted hosts), and prints a summary. Takes no
arguments: CONTRIBUTING.md has how to run a part.
TEXT
}

die() { printf 'run.sh: %s\n' "$*" >&2; exit 1; }

# --- one stage after the other -----------------------------------------------------------------------------------

passed=0
failed=0
ignored=0
summary=()
running=

# stage NAME COMMAND...: runs it, shows its output, and counts the tests it reports, or itself as one. It has a
# process group of its own, so that all of it can be ended, and this shell waits for it interruptibly.
stage() {
  local name=$1 log=$scratch/log begun=$SECONDS code=0 good bad skipped verdict
  shift
  printf '\n=== %s\n' "$name"
  : >"$log"
  setsid --wait "$@" >"$log" 2>&1 </dev/null 8>&- &
  running=$!
  printf '%s %s\n' "$running" "$(started "$running")" >"$group_file"
  tail --pid="$running" -n +1 -F "$log" 2>/dev/null 8>&- &
  wait "$running" || code=$?
  wait $! || true
  running=
  # Of cargo: `test result: ok. 3 passed; 0 failed; 0 ignored; …`. Of scripts: `3 passed, 0 failed`.
  read -r good bad skipped < <(sed -nE \
    -e 's/^test result: .* ([0-9]+) passed; ([0-9]+) failed; ([0-9]+) ignored;.*/\1 \2 \3/p' \
    -e 's/^([0-9]+) passed, ([0-9]+) failed$/\1 \2 0/p' "$log" | awk '{ g += $1; b += $2; s += $3 } END { print g + 0, b + 0, s + 0 }')
  if ((good + bad == 0)); then good=$((code == 0)); fi
  # A program that died has not said how many of its tests it took with it.
  if ((code != 0 && bad == 0)); then bad=1; fi
  passed=$((passed + good)) failed=$((failed + bad)) ignored=$((ignored + skipped))
  if ((code == 0 && bad == 0)); then verdict=ok; else verdict="FAILED (exit code $code)"; fi
  summary+=("$(printf '%-34s %4d passed %3d failed %5d s   %s' "$name" "$good" "$bad" $((SECONDS - begun)) "$verdict")")
  return 0
}

# When a process began, in the kernel's ticks: with its id, that names it for good.
started() { awk '{ sub(/.*\) /, ""); print $20 }' "/proc/$1/stat" 2>/dev/null || true; }

# Ends a process group, and returns when nothing of it is left.
end_group() {
  local deadline=$((SECONDS + 10))
  kill -TERM -- "-$1" 2>/dev/null || return 0
  while kill -0 -- "-$1" 2>/dev/null; do
    ((SECONDS < deadline)) || kill -KILL -- "-$1" 2>/dev/null || true
    sleep 0.1
  done
}

cleanup() {
  trap - EXIT
  trap '' INT TERM HUP
  if [[ -n $running ]]; then end_group "$running"; fi
  "$lab" down-all 8>&- || true
  OMNI_LAB_DIR=$OMNI_LAB_DIR-selftest "$lab" down-all 8>&- || true
  rm -rf "$scratch" "$OMNI_LAB_DIR.lock" "$group_file"
}

# What a killed run has left: a stage under way, hosts, files.
take_leftovers_away() {
  local group began
  if [[ -r $group_file ]]; then
    read -r group began <"$group_file" || true
    if [[ -n ${began:-} && $(started "$group") == "$began" ]]; then end_group "$group"; fi
  fi
  rm -rf "$scratch_prefix".*
}

# --- what has to be there ----------------------------------------------------------------------------------------

# Rust links with the system's C compiler, and libFuzzer is C++.
install_compiler() {
  local -a packages=(gcc g++ libc6-dev)
  apt-get install -y --no-install-recommends "${packages[@]}" ||
    { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"; } ||
    die "no C compiler: install ${packages[*]}"
}

prepare() {
  local component
  command -v cargo >/dev/null || die "no cargo on PATH: install Rust's toolchain"
  "$lab" packages
  { command -v cc && command -v c++; } >/dev/null || install_compiler
  for component in fmt clippy; do
    cargo "$component" --version >/dev/null 2>&1 ||
      rustup component add "${component/fmt/rustfmt}" ||
      die "no cargo $component: install it with 'rustup component add ${component/fmt/rustfmt}'"
  done
}

# Every file that a shell runs.
scripts() {
  find . \( -name target -o -name .git \) -prune -o -type f -print |
    while read -r file; do
      if [[ $file == *.sh ]] || head -c 64 "$file" | head -n 1 | grep -aqE '^#!.*\b(ba)?sh\b'; then
        printf '%s\n' "$file"
      fi
    done
}

main() {
  case ${1:-} in
    '') ;;
    -h | --help) usage; exit 0 ;;
    *) printf "run.sh: '%s': it takes no arguments; see 'run.sh --help'\n" "$1" >&2; exit 2 ;;
  esac
  ((EUID == 0)) || die "must be root, because it boots hosts; use sudo"
  exec 8>/run/omni-deploy-tests.lock
  flock --nonblock 8 || die "another run is under way on this machine"
  take_leftovers_away
  scratch=$(mktemp -d "$scratch_prefix.XXXXXX")
  # Some tests are another user for a moment, who must reach what is theirs below.
  chmod 711 "$scratch"
  export TMPDIR=$scratch
  trap cleanup EXIT
  trap 'exit 130' INT TERM HUP
  prepare 8>&-

  local -a files crates
  local crate
  mapfile -t files < <(scripts)
  mapfile -t crates < <(find tests benches -mindepth 2 -maxdepth 2 -name Cargo.toml | sort)
  stage 'build: what ships' cargo build --locked --release
  for crate in "${crates[@]}"; do stage "build: $crate" cargo build --locked --manifest-path "$crate"; done
  if ((failed)); then finish; return; fi
  for crate in Cargo.toml "${crates[@]}" fuzz/Cargo.toml; do
    stage "format: $crate" cargo fmt --check --manifest-path "$crate"
    stage "lint: $crate" cargo clippy --locked --all-targets --all-features --manifest-path "$crate" -- -D warnings
  done
  stage 'lint: scripts' shellcheck "${files[@]}"
  for crate in "${crates[@]}"; do
    stage "tests: $crate" cargo test --locked --no-fail-fast --manifest-path "$crate"
  done
  stage 'tests: dependencies' tests/dependencies.sh
  stage 'fuzz: short run' fuzz/run.sh
  stage 'tests: what Nix builds from' tests/nix_package.sh
  stage 'tests: lab, units, installer' tests/lab/selftest.sh
  # Booted hosts mostly wait, and many tests for one host: more at a time than there are cores.
  stage 'tests: modules, and the built program' cargo test --locked --no-fail-fast -- --include-ignored
  stage 'tests: booted hosts' cargo test --locked --no-fail-fast --features campaign --test host -- --test-threads 4
  finish
}

finish() {
  printf '\n=== %d min %d s, on %d cores\n' $((SECONDS / 60)) $((SECONDS % 60)) "$(nproc)"
  printf '%s\n' "${summary[@]}"
  if ((ignored)); then printf '%d tests are marked as ignored and were not run\n' "$ignored"; fi
  printf '%d passed, %d failed\n' "$passed" "$failed"
  ((failed == 0))
}

main "$@"
