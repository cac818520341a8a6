# Sixteen writers at once: nothing is lost, and how long that takes.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

# writer STORE NUMBER: 25 updates of a service of its own, each to another path.
writer() {
  local i
  for i in {1..25}; do
    "$omni" manifest update --store "$1" "$(printf 'web-%05d' "$2")" \
      "$(printf '/nix/store/%032d-web' $((1000 + $2 * 100 + i)))" 2>>"$work/writer-$2" || return 1
  done
}

serve 127.0.0.1
"$top/benches/services.sh" 16 1 >"$work/manifest.json"
for kind in S3 directory; do
  if [[ $kind == S3 ]]; then store=$(s3 writers); else store=file://$work/writers; fi
  "$omni" manifest init --store "$store" 2>/dev/null
  EDITOR="cp $work/manifest.json" "$omni" manifest edit --store "$store" 2>/dev/null
  before=$("$omni" manifest show --store "$store" | jq .serial)
  kept_before=$("$omni" manifest list --all --json --store "$store" | jq '[.versions[] | select(.current | not)] | length')
  start=$(date +%s%N)
  writers=()
  for i in {1..16}; do writer "$store" "$i" & writers+=($!); done
  errors=0
  for pid in "${writers[@]}"; do wait "$pid" || errors=$((errors + 1)); done
  took=$((($(date +%s%N) - start) / 1000000))
  ((errors == 0)) || cat "$work"/writer-* >&2
  grew=$(($("$omni" manifest show --store "$store" | jq .serial) - before))
  kept=$(($("$omni" manifest list --all --json --store "$store" | jq '[.versions[] | select(.current | not)] | length') - kept_before))
  row "16 writers x 25 updates at once, $kind" "$grew updates, $kept archived, $errors errors, $(ms "$took")" - - \
    '400, none lost' "$(holds "$grew == 400 && $kept == 400 && $errors == 0")"
done
