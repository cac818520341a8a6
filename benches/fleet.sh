# A booted host that runs 200 services, or more, each a static web server of a few hundred kilobytes behind Caddy, from
# a manifest in S3. Sourced once by the rows that need it.
# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034  # set by run.sh; for the rows

fleet=bench-fleet
host "$fleet"
fleet_root=$root
serve "$gateway"
fleet_requests=$requests
jq -n --arg store "$(s3 fleet)" '{store: $store, host: "bench-0", caddyServer: "srv0"}' >"$fleet_root/etc/omni-deploy/config.json"

# version N COUNT: makes version N of the first COUNT services in the host's Nix store and publishes it.
version() {
  # shellcheck disable=SC2016  # for the host's shell
  on "$fleet" bash -euc '
    rm -rf /tmp/version
    for ((i = 1; i <= $2; i++)); do
      printf -v name "web-%05d" "$i"
      mkdir -p "/tmp/version/$name/bin"
      printf "#!/bin/sh\n# version %s\nexec /bin/busybox httpd -f -p 127.0.0.1:\$PORT -h /usr/share/caddy\n" "$1" \
        >"/tmp/version/$name/bin/$name"
      chmod 755 "/tmp/version/$name/bin/$name"
    done
    nix-store --add /tmp/version/* >/tmp/paths
  ' - "$1" "$2"
  on "$fleet" deploy-manifest show |
    jq --rawfile paths "$fleet_root/tmp/paths" '($paths | split("\n") | map(select(. != "") | {key: .[44:], value: .}) | from_entries) as $path
      | .services |= map(.artifact.storePath = ($path[.name] // .artifact.storePath))' >"$fleet_root/tmp/next.json"
  publish "$fleet" /tmp/next.json
}

# grow COUNT: so many services, which run.
grow() {
  say "starting $1 services"
  "$top/benches/services.sh" "$1" 1 | jq '.services[] .health = null' >"$fleet_root/tmp/next.json"
  publish "$fleet" /tmp/next.json
  version 0 "$1"
  on "$fleet" deployer run >"$work/deployer" 2>&1 || die "the $1 services did not come up: $(tail -n 3 "$work/deployer")"
}

on "$fleet" deploy-manifest init 2>/dev/null
grow 200

# By hand, what an idle pass does: ask systemd, the bucket and Caddy.
{
  printf '#!/bin/sh\nset -e\n'
  printf 'systemctl list-units --type=service --all --full --plain --no-legend >/dev/null\n'
  printf '%s -o /dev/null\n' "$(curl_words fleet/manifest.json | paste -sd ' ')"
  # Where the deployer asks it.
  printf 'if [ -S /run/caddy/admin.sock ]; then set -- --unix-socket /run/caddy/admin.sock -H "Host;"; fi\n'
  printf 'curl --fail --silent --show-error -o /dev/null "$@" http://127.0.0.1:2019/config/\n'
} >"$fleet_root/usr/local/bin/ask-by-hand"
chmod 755 "$fleet_root/usr/local/bin/ask-by-hand"

# idle COUNT: the row of a pass with nothing to do on a host of so many services.
idle() {
  on "$fleet" omni-meter --runs 41 --warmup 3 --urgent -- deployer run ::: ask-by-hand >"$work/idle"
  read -r ours _ _ peak _ <"$work/idle"
  read -r rival _ < <(tail -n 1 "$work/idle")
  row "idle pass, $1 services, against systemctl list-units and two curls" "$(ms "$ours")" "$(ms "$rival")" \
    "$(calc "$ours / $rival")" '1.3 x' "$(holds "$ours <= 1.3 * $rival")"
}
