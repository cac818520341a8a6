# Over a network: pushing, fetching and shipping at 30 ms with new connections and slow start (R30, a relay), and at
# 50 ms for every request (D50), beside `nix copy` to and from an HTTP cache over the same network, and beside a
# developer's own hands over ssh. docs/FIGURES.md says what the networks are made of.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

dev=bench-dev
net_runs=${OMNI_BENCH_NETWORK_RUNS:-3}
host "$dev"
dev_gateway=$gateway dev_root=$root
host bench-0
net_root=$root
gateway=$dev_gateway
serve "$gateway"
bucket=$endpoint

# --- the networks -----------------------------------------------------------------------------------------

# started FILE: waits for what a server says when it listens, and prints its address.
started() {
  local deadline=$((SECONDS + 20))
  until grep -q ^listening "$1"; do
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

delay() { jq -n --argjson ms "$1" '{delay_ms: $ms}' >"$work/control.new" && mv "$work/control.new" "$control"; }

cache plain 0
cache d50 50
relay s3 "$bucket" 30
relay http "${cache[plain]}" 30

# network R30|D50: what follows goes over it: $endpoint is the bucket's address, $http the cache's.
network() {
  case $1 in
    R30) delay 0; endpoint=${relay[s3]} http=${relay[http]} ;;
    D50) delay 50; endpoint=$bucket http=${cache[d50]} ;;
  esac
}

# --- the closures -----------------------------------------------------------------------------------------

# 300 paths, 13 levels deep: a change of the argument `top` changes the last alone, one of `salt` all of them.
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
    args = [ "-c" "mkdir -p $out/bin; echo $salt $top $refs >$out/refs; seq 1 1000 >$out/data; if [ $name = many ]; then printf '#!/bin/sh\n# %s %s\nexec sleep 1000000\n' $salt $top >$out/bin/many; chmod 755 $out/bin/many; fi" ];
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
  read -r time _ < <(on "$host" omni-meter --runs 1 --warmup 0 -- "$@")
  printf '%s\n' "$time"
}

connections() { wc -l <"$work/connections-$1"; }

# new_store NAME SERVICE: an empty store with the service for bench-0 in it; $store and $caches are its URLs.
new_store() {
  store=$(s3 "$1") caches=$(s3 "$1-cache")
  on "$dev" deploy-manifest init --store "$store" 2>/dev/null
  on "$dev" deploy-manifest add-service --store "$store" \
    "$(jq -nc --arg name "$2" '{name: $name, artifact: {storePath: "/nix/store/placeholder"}, hosts: ["bench-0"], exec: {command: "bin/\($name)"}}')" 2>/dev/null
}

push() { timed "$dev" omni-deploy push "$1" --service "$2" --store "$store" --cache "$caches"; }

configure() { jq -n --arg store "$store" --arg cache "$caches" '{store: $store, cache: $cache, host: "bench-0"}' >"$net_root/etc/omni-deploy/config.json"; }

# pass: what a pass takes that fetches nothing, with the start and the settle of the service in it.
pass() { timed bench-0 deployer run; }

# --- pushes at 50 ms --------------------------------------------------------------------------------------

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

# --- fetches ----------------------------------------------------------------------------------------------

# fetches WHAT SERVICE FIGURE RIVAL CACHE: what a pass takes to fetch the service's closure, and what `nix copy` takes for
# RIVAL, another of the same form, out of the plain cache. What a pass takes besides is the time in which another one
# starts the same service, and is taken off.
fetches() {
  local what=$1 service=$2 figure=$3 rival opened rest took
  opened=$(connections s3)
  took=$(pass)
  opened=$(($(connections s3) - opened))
  on bench-0 systemctl stop "$service"
  rest=$(pass)
  took=$(calc "$took > $rest ? $took - $rest : 0" 3)
  rival=$(timed bench-0 "${nix_copy[@]}" --from "http://$http/$5" "$4")
  row "host's fetch of $what, against nix copy" "$(ms "$took"), $opened connections" "$(ms "$rival")" \
    "$(calc "$took / $rival")" "$figure s" "$(holds "$took <= $figure * 1000")"
}

# into_cache NAME PATH: as fast as it goes, for the rival to fetch.
into_cache() { on "$dev" "${nix_copy[@]}" --to "http://${cache[plain]}/$1?compression=zstd" "$2" 2>/dev/null; }

network R30
for what in many large; do
  case $what in
    many) ours=$(many fetch a) rival=$(many rival a) text='300 paths, 30 ms with connections (R30)' figure=2 ;;
    large) ours=$(large fetch) rival=$(large rival) text='41 paths, 105 MiB, R30' figure=2.5 ;;
  esac
  new_store "fetch-$what" "$what"
  push "$ours" "$what" >"$work/pushed"
  into_cache "fetch-$what" "$rival"
  configure
  fetches "$text" "$what" "$figure" "$rival" "fetch-$what"
  [[ $what == large ]] || first=$store first_cache=$caches
done
network D50
new_store "fetch-one" many
push "$(many fetch a)" many >"$work/pushed"
configure
on bench-0 deployer run >"$work/deployer" 2>&1 || die "the service did not come up: $(tail -n 3 "$work/deployer")"
push "$(many fetch b)" many >"$work/pushed"
rival=$(many rival b)
into_cache fetch-one "$rival"
fetches 'one path of 300, 50 ms' many 0.3 "$rival" fetch-one

# --- shipping ---------------------------------------------------------------------------------------------

# From the developer's host to the other over ssh, which takes the long way as well.
network R30
store=$first caches=$first_cache
configure
ssh_files=$work/ssh
"$lab" ssh-setup bench-0 "$ssh_files" >"$work/ssh-setup"
relay ssh "$("$lab" ip bench-0):22" 30
mkdir -p "$dev_root/root/.ssh"
cp "$ssh_files/key" "$dev_root/root/.ssh/key"
cat >"$dev_root/root/.ssh/config" <<TEXT
Host bench-0
  HostName ${relay[ssh]%:*}
  Port ${relay[ssh]##*:}
  User admin
  IdentityFile /root/.ssh/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
TEXT
on "$dev" chown -R root:root /root/.ssh
on "$dev" chmod 700 /root/.ssh
on "$dev" chmod 600 /root/.ssh/key
printf 'trusted-users = root admin\n' | on bench-0 sh -c 'cat >>/etc/nix/nix.conf'
cat >"$dev_root/usr/local/bin/ship-by-hand" <<'SH'
#!/bin/sh
# What a developer would type: the closure over ssh, the unit to the new path, a restart, a look.
set -e
nix --extra-experimental-features nix-command copy --no-check-sigs --to 'ssh://bench-0?remote-program=sudo%20nix-store' "$1" ||
  nix-copy-closure --to bench-0 "$1"
ssh bench-0 "sudo sed -i 's|/nix/store/[a-z0-9]*-many|$1|g' /etc/systemd/system/many.service && sudo systemctl daemon-reload &&
  sudo systemctl restart many && systemctl is-active many"
SH
chmod 755 "$dev_root/usr/local/bin/ship-by-hand"

# live CLOSURE COMMAND...: the milliseconds until bench-0 runs the closure, and until the command returns.
live() {
  local closure=$1 begun pid seen=
  shift
  begun=$(date +%s%N)
  on "$dev" "$@" >"$work/shipped" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null || [[ -z $seen ]]; do
    # The process that runs shows the path it was started from.
    # shellcheck disable=SC2016  # for the host's shell
    if [[ -z $seen ]] && on bench-0 sh -c 'tr "\0" " " </proc/$(systemctl show --value -p MainPID many)/cmdline' 2>/dev/null | grep -q "$closure"; then
      seen=$((($(date +%s%N) - begun) / 1000000))
    fi
    kill -0 "$pid" 2>/dev/null || [[ -n $seen ]] || break
    sleep 0.02
  done
  wait "$pid" || die "$*: $(tail -n 3 "$work/shipped")"
  [[ -n $seen ]] || die "$closure never ran"
  printf '%s %s\n' "$seen" $((($(date +%s%N) - begun) / 1000000))
}

rm -f "$work"/ours "$work"/rival
for ((n = 1; n <= net_runs; n++)); do
  path=$(many fetch "hand-$n")
  live "$path" ship-by-hand "$path" >>"$work/rival"
  path=$(many fetch "ship-$n")
  live "$path" omni-deploy ship "$path" --service many --store "$store" --cache "$caches" >>"$work/ours"
done
ours=$(cut -d' ' -f1 "$work/ours" | median_of) back=$(cut -d' ' -f2 "$work/ours" | median_of)
rival=$(cut -d' ' -f1 "$work/rival" | median_of)
row 'ship of one changed path of 300, R30, until live, against nix copy over ssh and a restart' \
  "$(ms "$ours"), back after $(ms "$back")" "$(ms "$rival")" "$(calc "$ours / $rival")" '1.2 x' "$(holds "$ours <= 1.2 * $rival")"

# --- a path of 1 GiB --------------------------------------------------------------------------------------

# What nothing compresses, at once and over no network: how much of it is in our own memory.
cat >"$dev_root/tmp/huge.nix" <<'NIX'
derivation {
  name = "huge";
  system = builtins.currentSystem;
  builder = "/bin/sh";
  PATH = "/usr/bin:/bin";
  args = [ "-c" "mkdir -p $out/bin; head -c 1G /dev/urandom >$out/data; printf '#!/bin/sh\nexec sleep 1000000\n' >$out/bin/huge; chmod 755 $out/bin/huge" ];
}
NIX
delay 0
endpoint=$bucket
huge=$(on "$dev" nix-build --no-out-link /tmp/huge.nix 2>/dev/null)
new_store huge huge
# our_peak HOST COMMAND...: KiB of the command's own.
our_peak() {
  local host=$1 peak
  shift
  read -r _ _ _ peak _ < <(on "$host" omni-meter --alone --runs 1 --warmup 0 -- "$@")
  printf '%s\n' "$peak"
}
peak=$(our_peak "$dev" omni-deploy push "$huge" --service huge --store "$store" --cache "$caches")
row 'push of a path of 1 GiB: our own peak memory' "$(mib "$peak")" - - '32 MiB' "$(holds "$peak <= 32 * 1024")"
configure
peak=$(our_peak bench-0 deployer run)
row "host's fetch of a path of 1 GiB: our own peak memory" "$(mib "$peak")" - - '32 MiB' "$(holds "$peak <= 32 * 1024")"
"$lab" down "$dev"
"$lab" down bench-0
