#!/usr/bin/env bash
# Builds the fuzzers and runs them from the seeds that are committed; exit 0 only if nothing was found. Needs
# stable Rust and g++ (libFuzzer is compiled) and nothing else; cargo-fuzz works here too.
set -euo pipefail

fuzz=$(dirname "$(readlink -f "$0")")
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$fuzz/target}
targets=(manifest unit keys narinfo walk unpack answers)
runs=20000
seed=1
keep=

usage() {
  cat <<'TEXT'
usage: run.sh [--runs N] [--seed N] [--keep DIR] [TARGET]
       run.sh TARGET FILE...

Gives each target (manifest, unit, keys, narinfo, walk, unpack, answers; or the one named) its seeds, and then
N inputs made from them (20,000); the same --seed (1) makes the same ones. What is found is a file below
fuzz/artifacts/, and `run.sh TARGET FILE` runs that alone.

The seeds, fuzz/corpus/TARGET/, are few, and each is named for what it shows; what was found once is among them. New
inputs that reach new code are thrown away, unless DIR is to keep them: a long run makes a large corpus there, and
the next one with the same DIR goes on from it. fuzz/kept is ignored by git.

example: run.sh --runs 10000000 --seed 7 --keep fuzz/kept unit
TEXT
}

die() { printf 'run.sh: %s\n' "$*" >&2; exit 1; }
misuse() { printf "run.sh: %s; see 'run.sh --help'\n" "$*" >&2; exit 2; }

# What makes a program one that libFuzzer can steer: counters on the edges of its code. cargo-fuzz gives the same.
# Comparisons are not traced: that is most of the time, and the dictionaries know the words.
flags() {
  printf '%s ' --cfg fuzzing -Cpasses=sancov-module
  printf -- '-Cllvm-args=-%s ' sanitizer-coverage-level=4 sanitizer-coverage-inline-8bit-counters \
    sanitizer-coverage-pc-table simplifycfg-branch-fold-threshold=0
}

build() {
  command -v c++ >/dev/null || apt-get install -y --no-install-recommends g++ || die "no C++ compiler: install g++"
  triple=$(rustc --version --verbose | sed -n 's/^host: //p')
  # With --target, build scripts and macros are left as they are.
  RUSTFLAGS="$(flags)${RUSTFLAGS:-}" cargo build --locked --release --target "$triple" --manifest-path "$fuzz/Cargo.toml"
}

# fuzz TARGET: its seeds, and inputs made from them.
fuzz_one() {
  local target=$1 found=$fuzz/artifacts/$1 log=$scratch/$1.log code=0 kept=$scratch/$1
  if [[ -n $keep ]]; then kept=$keep/$target; fi
  mkdir -p "$found" "$kept"
  "$CARGO_TARGET_DIR/$triple/release/$target" "$kept" "$fuzz/corpus/$target" -runs="$runs" -seed="$seed" -timeout=5 \
    -rss_limit_mb=2048 -max_len=512 -dict="$fuzz/dict/$target.dict" -artifact_prefix="$found/" -print_final_stats=1 \
    >"$log" 2>&1 || code=$?
  if ((code == 0)); then
    sed -nE "s/^#([0-9]+)\s+DONE +cov: ([0-9]+) .*corp: ([0-9]+).*/$target: \1 runs, \2 edges, \3 inputs, nothing found/p" "$log"
    return
  fi
  grep -aE 'panicked at|^assertion|left:|right:|libFuzzer:|Test unit written' -A 1 "$log" || tail -n 30 "$log"
  printf '%s: exit code %d; what did it: fuzz/run.sh %s %s\n' "$target" "$code" "$target" \
    "$(sed -nE 's/.*Test unit written to (.*)$/\1/p' "$log" | tail -n 1)"
  return 1
}

main() {
  local target passed=0 failed=0
  local -a words=()
  while (($#)); do
    case $1 in
      -h | --help) usage; exit 0 ;;
      --runs | --seed | --keep)
        (($# > 1)) || misuse "$1 needs a value"
        printf -v "${1#--}" '%s' "$2"
        shift
        ;;
      -*) misuse "'$1' is no option" ;;
      *) words+=("$1") ;;
    esac
    shift
  done
  [[ $runs =~ ^[0-9]+$ && $seed =~ ^[0-9]+$ ]] || misuse "--runs and --seed take a number"
  if ((${#words[@]})); then
    [[ " ${targets[*]} " == *" ${words[0]} "* ]] || misuse "'${words[0]}' is no target (${targets[*]})"
    targets=("${words[0]}")
  fi
  build
  if ((${#words[@]} > 1)); then exec "$CARGO_TARGET_DIR/$triple/release/${targets[0]}" "${words[@]:1}"; fi
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  for target in "${targets[@]}"; do
    if fuzz_one "$target"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
  done
  printf '%d passed, %d failed\n' "$passed" "$failed"
  ((failed == 0))
}

main "$@"
