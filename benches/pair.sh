# Two booted hosts, a developer's and the one that is deployed to, an S3 server between them, and networks to reach it
# over: at 30 ms with new connections and slow start (R30, a relay), and at 50 ms for every request (D50); docs/FIGURES.md
# says what they are made of. Sourced once by the rows that need it.
# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034  # set by run.sh; for the rows

dev=bench-dev
net_runs=${OMNI_BENCH_NETWORK_RUNS:-3}
host "$dev"
dev_gateway=$gateway dev_root=$root
host bench-0
net_root=$root
# Each host reaches its own end of the wire alone; the servers are at the developer's.
on bench-0 ip route add "$dev_gateway/32" via "$gateway"
gateway=$dev_gateway
serve "$gateway"
bucket=$endpoint control_of_bucket=$control
# As everybody should have it: what is pushed is signed, and the host takes nothing else.
key=$(on "$dev" omni-deploy keygen bench-1 2>/dev/null)
jq -n --arg key "$key" '{secretKeyFile: "/root/.config/omni-deploy/keys/bench-1.secret", trustedPublicKeys: [$key]}' \
  >"$dev_root/etc/omni-deploy/config.json"

# --- the networks -----------------------------------------------------------------------------------------

# started FILE: waits for what a server says when it listens, and prints its address.
started() {
  local deadline=$((SECONDS + 20))
  until grep -qs ^listening "$1"; do
    ((SECONDS < deadline)) || die "nothing listens: $1"
    sleep 0.05
  done
  sed -n 's|^listening ||p' "$1"
}

# relay NAME ADDRESS MS: a way to ADDRESS that is so long; its address is in ${relay[NAME]}, its connections in a file.
declare -A relay
relay() {
  "$release/omni-relay" --listen "$gateway:0" --to "$2" --rtt-ms "$3" --connections "$work/connections-$1" >"$work/relay-$1" &
  servers+=($!)
  relay[$1]=$(started "$work/relay-$1")
  : >"$work/connections-$1"
}

# cache NAME MS: a plain HTTP cache whose answers take so long; its address is in ${cache[NAME]}.
declare -A cache
cache() {
  "$release/omni-cache" --listen "$gateway:0" --root "$work/cache" --delay-ms "$2" >"$work/cache-$1" &
  servers+=($!)
  cache[$1]=$(started "$work/cache-$1")
}

delay() { slow_down "$control_of_bucket" "$1"; }

cache plain 0
cache d50 50
relay s3 "$bucket" 30
relay http "${cache[plain]}" 30

# network R30|D50|none: what follows goes over it: $endpoint is the bucket's address, $http the cache's.
network() {
  case $1 in
    none) delay 0; endpoint=$bucket http=${cache[plain]} ;;
    R30) delay 0; endpoint=${relay[s3]} http=${relay[http]} ;;
    D50) delay 50; endpoint=$bucket http=${cache[d50]} ;;
  esac
}

# --- the closures -----------------------------------------------------------------------------------------

# 300 paths, 13 levels deep: a change of the argument `top` changes the last alone, one of `salt` all of them. What runs
# stays the shell, whose command line shows the path.
cat >"$dev_root/tmp/many.nix" <<'NIX'
{ salt, top }:
let
  # A list, so that each is made once.
  parts = builtins.genList part 300;
  named = map (builtins.elemAt parts);
  part = i: derivation {
    name = if i == 299 then "many" else "part-${toString i}";
    system = builtins.currentSystem;
    builder = "/bin/sh";
    PATH = "/usr/bin:/bin";
    inherit salt;
    top = if i == 299 then top else "";
    refs = if i == 299 then named (builtins.genList (n: n) 299)
      else if i < 25 then [ ] else named [ (i - 24) (i - 24 - i / 25) ];
    args = [ "-c" "mkdir -p $out/bin; echo $salt $top $refs >$out/refs; seq 1 1000 >$out/data; if [ $name = many ]; then printf '#!/bin/sh\n# %s %s\nsleep 1000000\nexit\n' $salt $top >$out/bin/many; chmod 755 $out/bin/many; fi" ];
  };
in builtins.elemAt parts 299
NIX
cat >"$dev_root/tmp/large.nix" <<'NIX'
{ salt }:
let
  unit = 105 * 1024 * 1024 / 861; # 1 + 2 + … + 41
  part = i: derivation {
    name = if i == 41 then "large" else "piece-${toString i}";
    system = builtins.currentSystem;
    builder = "/bin/sh";
    PATH = "/usr/bin:/bin";
    inherit salt;
    size = unit * i;
    skip = unit * i * (i - 1) / 2;
    refs = if i == 1 then [ ] else [ (part (i - 1)) (part ((i + 1) / 2)) ];
    args = [ "-c" "mkdir -p $out/bin; echo $salt $refs >$out/refs; tail -c +$((skip + 1)) /tmp/material | head -c $size >$out/data; printf '#!/bin/sh\nexec sleep 1000000\n' >$out/bin/large; chmod 755 $out/bin/large" ];
  };
in part 41
NIX
# shellcheck disable=SC2016  # for the host's shell
on "$dev" bash -euc '
  find /usr/bin /usr/lib -xdev -type f -size +64k \( -perm -u+x -o -name "*.so*" \) -print0 | sort -z |
    { xargs -0 cat 2>/dev/null || true; } | head -c 105M >/tmp/material'

many() { on "$dev" nix-build --no-out-link /tmp/many.nix --argstr salt "$1" --argstr top "$2" 2>/dev/null; }
large() { on "$dev" nix-build --no-out-link /tmp/large.nix --argstr salt "$1" 2>/dev/null; }

# --- the parts of a measurement ---------------------------------------------------------------------------

median_of() { sort -n | awk '{ v[NR] = $1 } END { print (NR % 2) ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }
nix_copy=(nix --extra-experimental-features nix-command copy --no-check-sigs)

# timed HOST COMMAND...: its milliseconds.
timed() {
  local host=$1 time
  shift
  read -r time _ < <(on "$host" omni-meter --runs 1 --warmup 0 -- "$@") || die "$host: $* failed"
  printf '%s\n' "$time"
}

connections() { wc -l <"$work/connections-$1"; }

# edit_manifest COMMAND...: on the developer's host, of $store.
edit_manifest() { on "$dev" deploy-manifest "$@" --store "$store" 2>"$work/said" || die "deploy-manifest $1: $(tail -n 3 "$work/said")"; }

# new_store NAME SERVICE: an empty store with the service for bench-0 in it; $store and $caches are its URLs.
new_store() {
  store=$(s3 "$1") caches=$(s3 "$1-cache")
  edit_manifest init
  edit_manifest add-service \
    "$(jq -nc --arg name "$2" '{name: $name, artifact: {storePath: "/nix/store/placeholder"}, hosts: ["bench-0"], exec: {command: "bin/\($name)"}}')"
}

push() { timed "$dev" omni-deploy push "$1" --service "$2" --store "$store" --cache "$caches"; }

# configure: the host obeys $store, in which nothing is to run yet, and lets go of what it ran before.
configure() {
  jq -n --arg store "$store" --arg cache "$caches" --arg key "$key" \
    '{store: $store, cache: $cache, host: "bench-0", caddyServer: "srv0", trustedPublicKeys: [$key]}' \
    >"$net_root/etc/omni-deploy/config.json"
  on bench-0 deployer run --allow-empty >"$work/said" 2>&1 || die "the host: $(tail -n 3 "$work/said")"
}

# pass: what a pass takes that fetches nothing, with the start and the settle of the service in it.
pass() { timed bench-0 deployer run; }
