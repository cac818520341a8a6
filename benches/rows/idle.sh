# A pass with nothing to do on a host of 200 services, against a script that asks for the same things.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

[[ -n ${fleet:-} ]] || . "$top/benches/fleet.sh"

# Every file of the host's disk with the times of its content and of its entry, but for other programs' logs.
disk_of_host() {
  find "$(dirname "$fleet_root")"/{upper,fresh} -printf '%P %s %T@ %C@\n' | grep -v '^\(var/\)\?log/\|^var/lib/caddy' | sort
}

on "$fleet" deployer run 2>/dev/null
disk_of_host >"$work/before"
before=$(wc -l <"$fleet_requests")
on "$fleet" deployer run 2>"$work/deployer"
[[ ! -s $work/deployer ]] || die "the pass was not idle: $(tail -n 1 "$work/deployer")"
asked=$(tail -n +$((before + 1)) "$fleet_requests")
disk_of_host >"$work/after"
touched=$(comm -3 "$work/before" "$work/after" | awk '{ print $1 }' | sort -u | paste -sd ' ')

idle 200
row 'idle pass: peak memory' "$(mib "$peak")" - - '< 16 MiB' "$(holds "$peak < 16 * 1024")"
count=$(printf '%s\n' "$asked" | grep -c . || true)
row "idle pass: requests to the bucket" "$count (${asked//$'\n'/, })" - - 1 "$(holds "$count == 1")"
row 'idle pass: files written' "${touched:-none}" - - none "$([[ -z $touched ]] && echo yes || echo NO)"
