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

environment: OMNI_TEST_SEED, the order of the tests (default: another one at every run; it is told at the end);
OMNI_LAB_CACHE, where the hosts' base trees are (see tests/lab/lab.sh), made when missing, a minute or two each
TEXT
}

die() { printf 'run.sh: %s\n' "$*" >&2; exit 1; }

# --- stages, one after the other or beside each other ----------------------------------------------------------------

passed=0
failed=0
summary=()
# The output of what failed, told again at the end, where people and CI look.
failures=()
# Of those that are under way: process group, when it began, number of its log, name.
under_way=()
begun=0

# begin NAME COMMAND...: starts it in the background, in a process group of its own, so that all of it can be ended.
begin() {
  local name=$1 group log=$scratch/log.$((++begun))
  shift
  : >"$log"
  setsid --wait "$@" >"$log" 2>&1 </dev/null 8>&- &
  group=$!
  under_way+=("$group $SECONDS $begun $name")
  printf '%s %s\n' "$group" "$(started "$group")" >>"$group_file"
}

# finish_stages: waits for all that were begun, shows the output of one after the other, and counts the tests that each
# reports, or itself as one. This shell waits interruptibly.
finish_stages() {
  local entry group since number name code good bad verdict log
  for entry in "${under_way[@]}"; do
    read -r group since number name <<<"$entry"
    log=$scratch/log.$number
    printf '\n=== %s\n' "$name"
    tail --pid="$group" -n +1 -F "$log" 2>/dev/null 8>&- &
    code=0
    wait "$group" || code=$?
    wait $! || true
    # Of cargo: `test result: ok. 3 passed; 0 failed; 0 ignored; …`. Of scripts: `3 passed, 0 failed`.
    read -r good bad < <(sed -nE \
      -e 's/^test result: .* ([0-9]+) passed; ([0-9]+) failed;.*/\1 \2/p' \
      -e 's/^([0-9]+) passed, ([0-9]+) failed$/\1 \2/p' "$log" | awk '{ g += $1; b += $2 } END { print g + 0, b + 0 }')
    if ((good + bad == 0)); then good=$((code == 0)); fi
    # A program that died has not said how many of its tests it took with it.
    if ((code != 0 && bad == 0)); then bad=1; fi
    passed=$((passed + good)) failed=$((failed + bad))
    if ((code == 0 && bad == 0)); then
      verdict=ok
    else
      verdict="FAILED (exit code $code)"
      failures+=("$(printf -- '--- %s\n' "$name"; what_failed "$log")")
    fi
    summary+=("$(printf '%-40s %4d passed %3d failed %5d s   %s' "$name" "$good" "$bad" $((SECONDS - since)) "$verdict")")
    under_way=("${under_way[@]:1}")
    rm -f "$log"
  done
  : >"$group_file"
}

# what_failed LOG: what cargo tells of its failures, a script's checks that failed, or else the end of it.
what_failed() {
  local told
  told=$(awk '/^failures:$/ { f = 1 } /^test result:/ { f = 0 }
    /^FAILED  / { s = 1 } /^ok  / || /^[0-9]+ passed, / { s = 0 } f || s' "$1" | cut -c 1-1000 | head -n 60)
  if [[ -n $told ]]; then printf '%s\n' "$told"; else tail -n 30 "$1"; fi
}

# stage NAME COMMAND...: by itself.
stage() {
  begin "$@"
  finish_stages
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
  local entry dir
  for entry in "${under_way[@]}"; do end_group "${entry%% *}"; done
  for dir in "$OMNI_LAB_DIR" "$OMNI_LAB_DIR"-*; do
    OMNI_LAB_DIR=${dir%.lock} "$lab" down-all 8>&- || true
    rm -f "${dir%.lock}.lock"
  done
  rm -rf "$scratch" "$group_file"
}

# What a killed run has left: a stage under way, hosts, files.
take_leftovers_away() {
  local group began
  if [[ -r $group_file ]]; then
    while read -r group began; do
      if [[ -n ${began:-} && $(started "$group") == "$began" ]]; then end_group "$group"; fi
    done <"$group_file"
  fi
  : >"$group_file"
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

# host_tests SUITE campaigns|others|stories: the storey of booted hosts on that suite, or a part of it. The campaigns kill
# and hinder passes at every point that they have, on hosts of their own, and take longest.
host_tests() {
  local suite=$1 part=$2 built program unknown
  local -a stories which
  built=$(cargo test --locked --features campaign --test host --no-run 2>&1) || die "$built"
  program=$(sed -nE 's/^ *Executable .*\((.*)\)$/\1/p' <<<"$built")
  [[ -x $program ]] || die "cargo names no program of the host storey: $built"
  mapfile -t stories < <(grep -vE '^(#|$)' tests/host/stories)
  unknown=$("$program" --list | sed -n 's/: test$//p' | sort | comm -13 - <(printf '%s\n' "${stories[@]}" | sort))
  [[ -z $unknown ]] || die "tests/host/stories names tests that are not there: $unknown"
  case $part in
    campaigns) which=(kill:: order:: writes::) ;;
    others) which=(--skip kill:: --skip order:: --skip writes::) ;;
    stories) which=(--exact "${stories[@]}") ;;
    *) die "no part of the host storey is called '$part'" ;;
  esac
  # Booted hosts mostly wait, and many tests for one host: more at a time than there are cores.
  OMNI_LAB_SUITE=$suite OMNI_LAB_DIR=$OMNI_LAB_DIR-$suite-$part RUSTC_BOOTSTRAP=1 \
    "$program" "${which[@]}" --test-threads 4 -Z unstable-options --shuffle-seed "$OMNI_TEST_SEED"
}
export -f host_tests die

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

  local -a files crates suites
  local crate suite
  mapfile -t files < <(scripts)
  mapfile -t crates < <(find tests benches -mindepth 2 -maxdepth 2 -name Cargo.toml | sort)
  mapfile -t suites < <("$lab" suites)
  export OMNI_TEST_SEED=${OMNI_TEST_SEED:-$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}

  for suite in "${suites[@]}"; do begin "base tree: $suite" "$lab" base "$suite"; done
  begin 'build: what ships' cargo build --locked --release
  finish_stages
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
  stage 'tests: as an ordinary user' tests/cli/run.sh user
  stage 'tests: as root, and with Nix' tests/cli/run.sh root
  # These mostly wait.
  for suite in "${suites[@]}"; do
    begin "lab, units, installer: $suite" env OMNI_LAB_SUITE="$suite" OMNI_LAB_DIR="$OMNI_LAB_DIR-$suite" tests/lab/selftest.sh
  done
  finish_stages
  begin "booted hosts, campaigns: ${suites[0]}" bash -euo pipefail -c 'host_tests "$@"' - "${suites[0]}" campaigns
  begin "booted hosts, the other tests: ${suites[0]}" bash -euo pipefail -c 'host_tests "$@"' - "${suites[0]}" others
  for suite in "${suites[@]:1}"; do
    begin "booted hosts, stories: $suite" bash -euo pipefail -c 'host_tests "$@"' - "$suite" stories
  done
  finish_stages
  finish
}

finish() {
  printf '\n=== %d min %d s, on %d cores\n' $((SECONDS / 60)) $((SECONDS % 60)) "$(nproc)"
  printf '%s\n' "${summary[@]}"
  printf 'hosts of %s; order of tests: OMNI_TEST_SEED=%s\n' "${suites[*]}" "$OMNI_TEST_SEED"
  comm -23 <("$lab" suites --all | sort) <(printf '%s\n' "${suites[@]}" | sort) |
    sed 's/.*/no host of &: its C library is older than the one that things are built with here/'
  if ((${#failures[@]})); then printf '%s\n' "${failures[@]}"; fi
  printf '%d passed, %d failed\n' "$passed" "$failed"
  ((failed == 0))
}

main "$@"
