#!/usr/bin/env bash
# Holds the review of dependencies (docs/adr/0009) against the tree and against the binary that ships: the list is the
# tree's, and nothing of what is listed as not in the binary is in it. Needs a release build.
set -euo pipefail

top=$(dirname "$(dirname "$(readlink -f "$0")")")
cd "$top"
review=docs/adr/0009-dependencies-reviewed.md
binary=${OMNI_TEST_BINARY:-${CARGO_TARGET_DIR:-target}/release/omni-deploy}
symbols=
passed=0
failed=0

usage() {
  cat <<'TEXT'
usage: dependencies.sh [--symbols]

Holds docs/adr/0009 against `cargo tree` and the release binary (OMNI_TEST_BINARY, else that of the target folder).
With --symbols, also against the symbols of a release build that keeps them, which is made first: minutes.
TEXT
}

case ${1:-} in
  '') ;;
  --symbols) symbols=yes ;;
  -h | --help) usage; exit 0 ;;
  *) printf "dependencies.sh: '%s': --symbols is all it takes; see --help\n" "$1" >&2; exit 2 ;;
esac

# holds NAME TEXT: the property NAME holds if TEXT, what speaks against it, is empty.
holds() {
  if [[ -z $2 ]]; then
    passed=$((passed + 1))
    printf 'ok      %s\n' "$1"
  else
    failed=$((failed + 1))
    printf 'FAILED  %s\n%s\n' "$1" "$2"
  fi
}

# The crates of the list, `NAME-VERSION`; with a word, those that are said to be in the binary to that degree.
listed() {
  awk -F ' *[|] *' -v degree="${1:-}" \
    '/^## The list/ { on = 1 } on && $3 ~ /^[0-9]/ && (degree == "" || $7 == degree) { print $2 "-" $3 }' "$review" | sort
}

# What the binary tells of itself: the files in which its code could panic, as NAME-VERSION/src/FILE.
locations() {
  { grep -aoE '/[A-Za-z0-9_-]+-[0-9]+\.[0-9]+\.[0-9]+/src/[A-Za-z0-9_/-]+\.rs' "$1" || true; } | sed 's|^/||' | sort -u
}

[[ -x $binary ]] || { printf "dependencies.sh: no %s: run 'cargo build --locked --release'\n" "$binary" >&2; exit 1; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

listed >"$scratch/listed"
cargo tree --locked --edges normal --prefix none | awk '$1 != "omni-deploy" { sub(/^v/, "", $2); print $1 "-" $2 }' |
  sort -u >"$scratch/tree"
holds 'the list of the review is the tree (< listed, > in the tree)' \
  "$(diff "$scratch/listed" "$scratch/tree" | grep '^[<>]' || true)"

locations "$binary" >"$scratch/locations"
cut -d / -f 1 "$scratch/locations" | sort -u >"$scratch/linked"
{ listed yes; listed part; } | sort >"$scratch/allowed"
holds 'the binary has code of nothing but what the review has in it' \
  "$(grep -Fxf "$scratch/listed" "$scratch/linked" | comm -23 - "$scratch/allowed")"
# Were the locations not there, the check before would see nothing.
holds 'the binary tells of the crates that it must have' \
  "$(grep -E '^(ring-0\.17|rustls-0\.23|ureq-3|rusoto_signature-)' "$scratch/listed" | comm -23 - "$scratch/linked")"
holds 'no runtime is in it' \
  "$(grep -E '^tokio-[0-9.]+/src/(runtime/(builder|blocking|runtime|io/registration)|net|process|signal|fs)' "$scratch/locations" || true)"
holds 'it needs libc and libgcc_s, and no other library' \
  "$(ldd "$binary" | awk '{ print $1 }' | grep -vE '^(linux-vdso\.so\.1|libc\.so\.6|libgcc_s\.so\.1|/lib.*/ld-linux.*)$' || true)"

holds 'every test program is known to cargo, which finds none in tests/cli by itself' \
  "$(for file in tests/cli/*.rs; do grep -qF "path = \"$file\"" Cargo.toml || printf '%s\n' "$file"; done)"

if [[ -n $symbols ]]; then
  CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/symbols cargo build --locked --release --config profile.release.strip=false
  nm -C "${CARGO_TARGET_DIR:-target}/symbols/release/omni-deploy" >"$scratch/symbols"
  printf '%s symbols: %s of rustls, %s of ring, %s of ureq, %s of tokio\n' "$(wc -l <"$scratch/symbols")" \
    "$(grep -c '\brustls::' "$scratch/symbols")" "$(grep -cE '\bring(::|_core_)' "$scratch/symbols")" \
    "$(grep -c '\bureq::' "$scratch/symbols")" "$(grep -c '\btokio::' "$scratch/symbols")"
  holds 'no symbol of the old TLS stack, or of ring 0.16' \
    "$(grep -E '\b(hyper|h2|hyper_rustls|tokio_rustls|native_tls|openssl|sct|rustls_native_certs|rustls_pemfile)::|\bGFp_|\bSSL_' "$scratch/symbols" || true)"
  holds 'no symbol that starts a runtime' \
    "$(grep -E '\btokio::runtime::(builder|Builder|Runtime|blocking)|\btokio::(net|process)::' "$scratch/symbols" || true)"
fi

printf '%d passed, %d failed\n' "$passed" "$failed"
((failed == 0))
