# Shipping from the developer's host to the other, whose ssh takes the same way as the bucket: one changed path of 300 at
# 30 ms with new connections and slow start (R30), beside a developer's own hands; and on loopback, when the first answer
# of a service's first deploy is there, and when a ship that proves the new version beside the old returns.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

[[ -n ${dev:-} ]] || . "$top/benches/pair.sh"

# ssh_over RELAY: where the developer's ssh finds the other host from now on.
ssh_over() {
  cat >"$dev_root/root/.ssh/config" <<TEXT
Host bench-0
  HostName ${relay[$1]%:*}
  Port ${relay[$1]##*:}
  User admin
  IdentityFile /root/.ssh/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
TEXT
}

ssh_files=$work/ssh
"$lab" ssh-setup bench-0 "$ssh_files" >"$work/ssh-setup"
mkdir -p "$dev_root/root/.ssh"
host_ip=$("$lab" ip bench-0)
relay ssh "$host_ip:22" 30
relay ssh-near "$host_ip:22" 0
cp "$ssh_files/key" "$dev_root/root/.ssh/key"
on "$dev" chown -R root:root /root/.ssh
on "$dev" chmod 700 /root/.ssh
on "$dev" chmod 600 /root/.ssh/key
cp "$top/contrib/systemd/deployer.service" "$net_root/etc/systemd/system/"
on bench-0 systemctl daemon-reload
printf 'trusted-users = root admin\n' | on bench-0 sh -c 'cat >>/etc/nix/nix.conf'
ssh_over ssh
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
  local closure=$1 begun watch returned
  shift
  # The process that runs shows the path it was started from. Both hosts and this one have one clock.
  # shellcheck disable=SC2016  # for the host's shell
  on bench-0 timeout 600 sh -c '
    until tr "\0" " " <"/proc/$(systemctl show --value -p MainPID many)/cmdline" | grep -q "$1"; do sleep 0.01; done 2>/dev/null
    date +%s%N' - "$closure" >"$work/seen" &
  watch=$!
  begun=$(date +%s%N)
  on "$dev" "$@" >"$work/shipped" 2>&1 || die "$*: $(tail -n 3 "$work/shipped")"
  returned=$(date +%s%N)
  wait "$watch" || die "$closure never ran"
  printf '%s %s\n' $((($(cat "$work/seen") - begun) / 1000000)) $(((returned - begun) / 1000000))
}

network R30
new_store ship many
configure
path=$(many ship a)
push "$path" many >"$work/pushed"
on bench-0 deployer run >"$work/deployer" 2>&1 || die "the service did not come up: $(tail -n 3 "$work/deployer")"
rm -f "$work"/ours "$work"/rival
for ((n = 1; n <= net_runs; n++)); do
  path=$(many ship "hand-$n")
  live "$path" ship-by-hand "$path" >>"$work/rival"
  path=$(many ship "ship-$n")
  live "$path" omni-deploy ship "$path" --service many --store "$store" --cache "$caches" >>"$work/ours"
done
ours=$(cut -d' ' -f1 "$work/ours" | median_of) back=$(cut -d' ' -f2 "$work/ours" | median_of)
rival=$(cut -d' ' -f1 "$work/rival" | median_of)
row 'ship of one changed path of 300, R30, until live, against nix copy over ssh and a restart' \
  "$(ms "$ours"), back after $(ms "$back")" "$(ms "$rival")" "$(calc "$ours / $rival")" '1.2 x' "$(holds "$ours <= 1.2 * $rival")"

# --- on loopback ------------------------------------------------------------------------------------------

# web VERSION: a static web server, small.
web() {
  # shellcheck disable=SC2016  # for the host's shell
  on "$dev" bash -euc '
    rm -rf /tmp/web && mkdir -p /tmp/web/web/bin /tmp/web/web/www
    printf "%s" "$1" >/tmp/web/web/www/index.html
    printf "#!/bin/sh\nexec /bin/busybox httpd -f -p 127.0.0.1:\$PORT -h \"\${0%%/bin/*}/www\"\n" >/tmp/web/web/bin/web
    chmod 755 /tmp/web/web/bin/web
    nix-store --add /tmp/web/web' - "$1"
}

# answers NAME VERSION: waits until visitors of a service get this version.
answers() {
  local deadline=$((SECONDS + 120))
  until [[ $(curl --silent --max-time 1 --header "Host: $1.example.com" "http://$host_ip:8080/") == "$2" ]]; do
    ((SECONDS < deadline)) || return 1
    sleep 0.01
  done
}

# shipped NAME VERSION: the milliseconds until visitors get what is shipped, and until the command returns.
shipped() {
  local path begun pid answered returned
  path=$(web "$2")
  begun=$(date +%s%N)
  on "$dev" omni-deploy ship "$path" --service "$1" --store "$store" --cache "$caches" >"$work/shipped" 2>&1 &
  pid=$!
  answers "$1" "$2" || die "$1: nobody got version $2: $(tail -n 3 "$work/shipped")"
  answered=$((($(date +%s%N) - begun) / 1000000))
  wait "$pid" || die "$1: $(tail -n 3 "$work/shipped")"
  returned=$((($(date +%s%N) - begun) / 1000000))
  printf '%s %s\n' "$answered" "$returned"
}

# web_service NAME PORT: its entry.
web_service() {
  jq -nc --arg name "$1" --argjson port "$2" '{name: $name, artifact: {storePath: "/nix/store/placeholder"}, hosts: ["bench-0"],
    exec: {command: "bin/web"}, env: {PORT: "\($port)"}, http: {domain: "\($name).example.com", internalPort: $port},
    rollout: "overlap"}'
}

network none
ssh_over ssh-near
store=$(s3 near) caches=$(s3 near-cache)
edit_manifest init
configure
rm -f "$work"/first "$work"/overlap
for ((n = 1; n <= net_runs; n++)); do
  edit_manifest add-service "$(web_service "web-$n" $((15000 + n)))"
  shipped "web-$n" "first-$n" >>"$work/first"
done
for ((n = 1; n <= net_runs; n++)); do
  shipped web-1 "next-$n" >>"$work/overlap"
done
ours=$(cut -d' ' -f1 "$work/first" | median_of)
row "first deploy of a service, loopback: its first answer" "$(ms "$ours")" - - '1.5 s' "$(holds "$ours <= 1500")"
ours=$(cut -d' ' -f2 "$work/overlap" | median_of)
row "ship with overlap, loopback: returns" "$(ms "$ours"), live after $(cut -d' ' -f1 "$work/overlap" | median_of | { read -r t; ms "$t"; })" \
  - - '6 s' "$(holds "$ours <= 6000")"
