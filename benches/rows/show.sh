# Reading the manifest from S3, against curl reading the same object.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

serve 127.0.0.1
for count in 20 200 1000; do
  store=$(s3 "show-$count")
  "$top/benches/services.sh" "$count" 1 >"$work/manifest.json"
  "$omni" manifest init --store "$store" 2>/dev/null
  EDITOR="cp $work/manifest.json" "$omni" manifest edit --store "$store" 2>/dev/null
  mapfile -t curl < <(curl_words "show-$count/manifest.json")
  kib=$("${curl[@]}" | wc -c | awk '{ printf "%d KiB", $1 / 1024 }')
  "$meter" --runs 100 --warmup 10 --urgent -- "$omni" manifest show --store "$store" ::: "${curl[@]}" >"$work/show"
  read -r ours _ <"$work/show"
  read -r rival _ < <(tail -n 1 "$work/show")
  row "deploy-manifest show, $count services ($kib), against curl of the object" "$(ms "$ours")" "$(ms "$rival")" \
    "$(calc "$ours / $rival")" '1.5 x' "$(holds "$ours <= 1.5 * $rival")"
done
