# Pushes over a network, at 50 ms a request (D50), beside `nix copy` to an HTTP cache over the same.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

[[ -n ${dev:-} ]] || . "$top/benches/pair.sh"

# pushes WHAT CLOSURE SERVICE FIGURE
pushes() {
  local n
  rm -f "$work"/ours "$work"/rival "$work"/again "$work"/rival-again
  for ((n = 1; n <= net_runs; n++)); do
    new_store "push-$3-$n" "$3"
    push "$2" "$3" >>"$work/ours"
    push "$2" "$3" >>"$work/again"
    timed "$dev" "${nix_copy[@]}" --to "http://$http/push-$3-$n?compression=zstd" "$2" >>"$work/rival"
    timed "$dev" "${nix_copy[@]}" --to "http://$http/push-$3-$n?compression=zstd" "$2" >>"$work/rival-again"
  done
  local ours rival
  ours=$(median_of <"$work/ours") rival=$(median_of <"$work/rival")
  row "first push of $1, 50 ms, against nix copy" "$(ms "$ours")" "$(ms "$rival")" "$(calc "$ours / $rival")" "$4 s" \
    "$(holds "$ours <= $4 * 1000")"
}

network D50
pushes '300 paths' "$(many push a)" many 2.5
ours=$(median_of <"$work/again") rival=$(median_of <"$work/rival-again")
row 'push of 300 paths again, nothing new, 50 ms, against nix copy' "$(ms "$ours")" "$(ms "$rival")" "$(calc "$ours / $rival")" \
  '0.8 s' "$(holds "$ours <= 800")"
pushes '41 paths, 105 MiB' "$(large push)" large 4
