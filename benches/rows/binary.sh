# The binary itself: its size, what it needs, how fast it is there.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

size=$(stat -c %s "$omni")
[[ $(file -b "$omni" 2>/dev/null || echo stripped) != *"not stripped"* ]] || die "$omni is not stripped"
needs=$(ldd "$omni" | awk '$1 ~ /^lib/ { sub(/\.so.*/, "", $1); printf "%s%s", sep, $1; sep = ", " }')
row "the binary: one file, stripped (needs ${needs:-nothing})" "$(calc "$size / 1e6") MB" - - '< 6 MB' "$(holds "$size < 6e6")"

read -r ours _ < <("$meter" --runs 200 --warmup 20 --urgent -- "$omni" --version ::: true | tee "$work/version")
read -r rival _ < <(tail -n 1 "$work/version")
row "start: omni-deploy --version, against true(1)" "$(ms "$ours")" "$(ms "$rival")" "$(calc "$ours / $rival")" '< 5 ms' "$(holds "$ours < 5")"
