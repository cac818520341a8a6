# Manifests of 1,000 to 20,000 services in the directory store: time, and whether memory grows no faster than
# the manifest. No service is there yet when a host plans, so that there is most to plan.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

host bench-large
declare -A peak_of
large() { # WHAT COUNT COMMAND...
  local what=$1 count=$2 median peak
  shift 2
  read -r median _ _ peak _ < <(on bench-large omni-meter --runs 11 --warmup 1 --urgent -- "$@")
  peak_of["$what $count"]=$peak
  if ((count == 10000)); then
    row "manifest of 10,000 services: $what" "$(ms "$median")" - - '< 0.3 s' "$(holds "$median < 300")"
  fi
}
for count in 1000 10000 20000; do
  store=file:///var/lib/large-$count
  "$top/benches/services.sh" "$count" 100 >"$root/tmp/manifest.json"
  on bench-large deploy-manifest init --store "$store" 2>/dev/null
  on bench-large env EDITOR='cp /tmp/manifest.json' deploy-manifest edit --store "$store" 2>/dev/null
  large show "$count" deploy-manifest show --store "$store"
  large update "$count" deploy-manifest update web-00500 "/nix/store/$(printf '%028d' 1){}-web" --store "$store"
  large 'plan of one of its hundred hosts' "$count" deployer plan --store "$store" --this-host bench-0 --caddy-server srv0
done
for count in 1000 10000 20000; do
  store=file:///var/lib/large-$count-on-one
  "$top/benches/services.sh" "$count" 1 >"$root/tmp/manifest.json"
  on bench-large deploy-manifest init --store "$store" 2>/dev/null
  on bench-large env EDITOR='cp /tmp/manifest.json' deploy-manifest edit --store "$store" 2>/dev/null
  large 'plan, all of them on one host' "$count" deployer plan --store "$store" --this-host bench-0 --caddy-server srv0
done
for what in show update 'plan of one of its hundred hosts' 'plan, all of them on one host'; do
  small=${peak_of["$what 1000"]} middle=${peak_of["$what 10000"]} large=${peak_of["$what 20000"]}
  first=$(calc "($middle - $small) / 9000") then=$(calc "($large - $middle) / 10000")
  row "peak memory of $what: 1,000, 10,000, 20,000 services" "$(mib "$small"), $(mib "$middle"), $(mib "$large")" - \
    "$(calc "$then / $first")" 'linear' "$(holds "$then <= 1.1 * $first")"
done
"$lab" down bench-large
