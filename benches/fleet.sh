# A booted host that runs 200 services, each a static web server of a few hundred kilobytes behind Caddy, from
# a manifest in S3. Sourced once by the rows that need it.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

fleet=bench-fleet
host "$fleet"
serve "$gateway"
jq -n --arg store "$(s3 fleet)" '{store: $store, host: "bench-0", caddyServer: "srv0"}' >"$root/etc/omni-deploy/config.json"

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
    jq --rawfile paths "$root/tmp/paths" '($paths | split("\n") | map(select(. != "") | {key: .[44:], value: .}) | from_entries) as $path
      | .services |= map(.artifact.storePath = ($path[.name] // .artifact.storePath))' >"$root/tmp/next.json"
  publish "$fleet" /tmp/next.json
}

say 'starting 200 services'
on "$fleet" deploy-manifest init 2>/dev/null
"$top/benches/services.sh" 200 1 | jq '.services[] .health = null' >"$root/tmp/next.json"
publish "$fleet" /tmp/next.json
version 0 200
on "$fleet" deployer run >"$work/deployer" 2>&1 || die "the 200 services did not come up: $(tail -n 3 "$work/deployer")"
