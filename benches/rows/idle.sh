# A pass with nothing to do on a host of 200 services, against a script that asks for the same things.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

[[ -n ${fleet:-} ]] || . "$top/benches/fleet.sh"
{
  printf '#!/bin/sh\nset -e\n'
  printf 'systemctl list-units --type=service --all --full --plain --no-legend >/dev/null\n'
  printf '%s -o /dev/null\n' "$(curl_words fleet/manifest.json | paste -sd ' ')"
  # Where the deployer asks it.
  printf 'if [ -S /run/caddy/admin.sock ]; then set -- --unix-socket /run/caddy/admin.sock -H "Host;"; fi\n'
  printf 'curl --fail --silent --show-error -o /dev/null "$@" http://127.0.0.1:2019/config/\n'
} >"$root/usr/local/bin/ask-by-hand"
chmod 755 "$root/usr/local/bin/ask-by-hand"

# Every file of the host's disk with the times of its content and of its entry, but for other programs' logs.
disk_of_host() {
  find "$(dirname "$root")"/{upper,fresh} -printf '%P %s %T@ %C@\n' | grep -v '^\(var/\)\?log/\|^var/lib/caddy' | sort
}

on "$fleet" deployer run 2>/dev/null
disk_of_host >"$work/before"
before=$(wc -l <"$requests")
on "$fleet" deployer run 2>"$work/deployer"
[[ ! -s $work/deployer ]] || die "the pass was not idle: $(tail -n 1 "$work/deployer")"
asked=$(tail -n +$((before + 1)) "$requests")
disk_of_host >"$work/after"
touched=$(comm -3 "$work/before" "$work/after" | awk '{ print $1 }' | sort -u | paste -sd ' ')

on "$fleet" omni-meter --runs 41 --warmup 3 --urgent -- deployer run ::: ask-by-hand >"$work/idle"
read -r ours _ _ peak _ <"$work/idle"
read -r rival _ < <(tail -n 1 "$work/idle")
row 'idle pass, 200 services, against systemctl list-units and two curls' "$(ms "$ours")" "$(ms "$rival")" \
  "$(calc "$ours / $rival")" '1.3 x' "$(holds "$ours <= 1.3 * $rival")"
row 'idle pass: peak memory' "$(mib "$peak")" - - '< 16 MiB' "$(holds "$peak < 16 * 1024")"
count=$(printf '%s\n' "$asked" | grep -c . || true)
row "idle pass: requests to the bucket" "$count (${asked//$'\n'/, })" - - 1 "$(holds "$count == 1")"
row 'idle pass: files written' "${touched:-none}" - - none "$([[ -z $touched ]] && echo yes || echo NO)"
