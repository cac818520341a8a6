# What a host takes to fetch a closure over a network, beside `nix copy` from an HTTP cache over the same: a first closure
# at 30 ms with new connections and slow start (R30), and one changed path at 50 ms a request (D50).
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

[[ -n ${dev:-} ]] || . "$top/benches/pair.sh"

# fetch CLOSURE SERVICE RIVAL CACHE: appends what a pass takes to fetch the service's closure to $work/ours, the connections
# that it opens to $work/opened, and to $work/rival what `nix copy` takes for RIVAL, another closure of the same form, out
# of the plain cache. What a pass takes besides is the time in which another one starts the same service, and is taken off.
fetch() {
  local opened rest took
  push "$1" "$2" >"$work/pushed"
  on "$dev" "${nix_copy[@]}" --to "http://${cache[plain]}/$4?compression=zstd" "$3" 2>/dev/null
  opened=$(connections s3)
  took=$(pass)
  printf '%s\n' $(($(connections s3) - opened)) >>"$work/opened"
  on bench-0 systemctl stop "$2"
  rest=$(pass)
  calc "$took > $rest ? $took - $rest : 0" 3 >>"$work/ours"
  printf '\n' >>"$work/ours"
  timed bench-0 "${nix_copy[@]}" --from "http://$http/$4" "$3" >>"$work/rival"
}

# fetched WHAT FIGURE: the row of what was appended.
fetched() {
  local ours rival
  ours=$(median_of <"$work/ours") rival=$(median_of <"$work/rival") opened=$(median_of <"$work/opened")
  row "host's fetch of $1, against nix copy" "$(ms "$ours")" "$(ms "$rival")" "$(calc "$ours / $rival")" "$2 s" \
    "$(holds "$ours <= $2 * 1000")"
  rm "$work"/ours "$work"/rival "$work"/opened
}

rm -f "$work"/ours "$work"/rival "$work"/opened
network R30
new_store fetch-many many
configure
for ((n = 1; n <= net_runs; n++)); do
  fetch "$(many "fetch-$n" a)" many "$(many "rival-$n" a)" fetch-many
done
fetched '300 paths, 30 ms with connections (R30)' 2
row 'the same: connections to the bucket' "$opened" - - '64' "$(holds "$opened <= 64")"

new_store fetch-large large
configure
for ((n = 1; n <= net_runs; n++)); do
  fetch "$(large "fetch-$n")" large "$(large "rival-$n")" fetch-large
done
fetched '41 paths, 105 MiB, R30' 2.5

network D50
new_store fetch-one many
configure
push "$(many one a)" many >"$work/pushed"
on bench-0 deployer run >"$work/deployer" 2>&1 || die "the service did not come up: $(tail -n 3 "$work/deployer")"
on "$dev" "${nix_copy[@]}" --to "http://${cache[plain]}/fetch-one?compression=zstd" "$(many one-rival a)" 2>/dev/null
on bench-0 "${nix_copy[@]}" --from "http://${cache[plain]}/fetch-one" "$(many one-rival a)" 2>/dev/null
for ((n = 1; n <= net_runs; n++)); do
  fetch "$(many one "b-$n")" many "$(many one-rival "b-$n")" fetch-one
done
fetched 'one path of 300, 50 ms' 0.3
