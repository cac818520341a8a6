# shellcheck shell=bash
# Sourced in the host by kill.rs: a start state that can be had again and again, and what the host is like after.
# Services that a campaign works on are called web*; all others are neighbours that nobody may touch.

start=/root/start
trees=(var/lib/deployer var/lib/omni-deploy etc/systemd/system nix/var/nix/gcroots/omni-deploy)

# Takes the present state down as the start state. ABSENT: closures that the host has to fetch.
save() {
  rm -rf "$start"
  mkdir "$start"
  tar -C / -cf "$start/files.tar" --exclude=var/lib/omni-deploy/nar "${trees[@]}"
  caddy-api /config/ >"$start/caddy.json"
  systemctl list-units --plain --no-legend --state=active 'web*.service' | awk '{ print $1 }' >"$start/units"
  printf '%s\n' "$@" >"$start/absent"
}

# Makes the host what it was, and begins to count.
restore() {
  local path unit port
  systemctl stop 'web*.service'
  rm -rf /var/lib/deployer/* /var/lib/deployer/.omni* /var/lib/omni-deploy/hosts /var/lib/omni-deploy/.omni-deploy-* \
    /etc/systemd/system/web* /etc/systemd/system/.omni* /etc/systemd/system/multi-user.target.wants/{web,.omni}* \
    /nix/var/nix/gcroots/omni-deploy/{*,.fetch} /run/omni-deploy/* /tmp/omni-deploy-* /var/cache/deployer/omni-deploy
  tar -C / -xf "$start/files.tar"
  # As at boot.
  systemd-tmpfiles --create /etc/tmpfiles.d/omni-deploy.conf
  systemctl daemon-reload
  systemctl reset-failed
  if [[ -s $start/units ]]; then xargs systemctl start <"$start/units"; fi
  # Started is not yet running: what a service says when it begins to listen must not be counted as another start.
  while read -r unit; do
    port=$(systemctl show --property=Environment --value "$unit" | grep -oE '\bPORT=[0-9]+' | tail -n 1) || continue
    # shellcheck disable=SC2016  # the inner shell's
    timeout 60 bash -c 'until curl -s --output /dev/null "localhost:$1/"; do sleep 0.02; done' - "${port#PORT=}"
  done <"$start/units"
  if ! caddy-api /config/ | cmp -s "$start/caddy.json"; then
    caddy-api /load -H 'Content-Type: application/json' --data-binary @"$start/caddy.json"
  fi
  while read -r path; do
    if [[ -e $path ]]; then nix-store --quiet --delete "$path" >/dev/null 2>&1; fi
  done <"$start/absent"
  journalctl --sync
  journalctl --lines 0 --show-cursor --quiet | sed -n 's/^-- cursor: //p' >"$start/cursor"
}

# What the host is like, without times and what systemd makes up at every start.
facts() {
  local unit pid times
  # shellcheck disable=SC2016
  times='del(.checkedAt, .changedAt) | .services[] |= (del(.since, .invocation) | .pinnedSince |= (. != null)
    | .failure |= if . then {attempted, remembered: (.inputs != null)} else . end)'
  cd /etc/systemd/system || return
  find . -type f -exec sha256sum {} + -o -type l -printf '%p -> %l\n' | sort
  cd /nix/var/nix/gcroots/omni-deploy || return
  find . -printf 'root %P %l\n' | sort
  cd /var/lib/deployer || return
  find . -printf 'state %P %m\n' | sort
  # What systemd says besides, and how often, depends on the moment; what the version itself has written does not.
  if [[ -e lines.json ]]; then
    jq -r '.services | to_entries[] | .key as $name | .value.lines
      | map(capture("^page: .*version (?<version>[a-z]+)").version) | unique[] | "lines of \($name) by \(.)"' lines.json
  fi
  cat applied/* manifest.json
  if [[ -e overrides.json ]]; then jq 'del(.. | .since?)' overrides.json; fi
  # The state, and then the report, which is to say the same.
  jq -S "$times" state.json /var/lib/omni-deploy/hosts/*.json
  systemctl list-units --all --plain --no-legend --type=service 'web*' 'other*' | awk '{ print $1, $2, $3, $4 }'
  { grep -r . /run/omni-deploy/ports || true; } | sort
  # Of several units, one block each, with the properties in whatever order this systemd has.
  { systemctl show --property=Id,MainPID,NeedDaemonReload 'web*.service' other.service; echo; } |
    awk -F= '/=/ { is[$1] = $2 } /^$/ && is["Id"] { print is["MainPID"], "Id=" is["Id"], "NeedDaemonReload=" is["NeedDaemonReload"]; delete is }' |
    while read -r pid unit reload; do
      if [[ $pid != 0 ]]; then echo "$unit $reload runs $(readlink "/proc/$pid/exe")"; fi
    done
  ss -Hltn 'sport >= :20000 and sport < :32000' | awk '{ print "spare port", $4 }'
  caddy-api /config/ | jq -S .
  for unit in web web2 web3 other; do
    printf 'url = "localhost/"\nheader = "Host: %s.example.com"\nmax-time = 3\nsilent\nwrite-out = "\\n=%s\\n"\nnext\n' \
      "$unit" "$unit"
  done | sed '$d' | curl --config - | awk '/^=/ { print substr($0, 2) " serves " page; page = ""; next } /^[a-z]+$/ { page = $0 }'
  find /etc /var /nix/var /tmp /run/omni-deploy -name '*omni-deploy-*' -printf 'left over: %p\n'
  deployer plan 2>&1 | tail -n 1
  cd /
}

# After a pass whose writes failed: whatever is on the disk is whole, and what was served is served.
between() {
  jq -e . /var/lib/deployer/*.json /var/lib/deployer/applied/*.json /var/lib/omni-deploy/hosts/*.json >/dev/null || echo "TORN"
  find /etc /var /nix/var /run/omni-deploy -name '*omni-deploy-*' -printf 'LEFT OVER %p\n'
  # Caddy's own page is nobody's.
  echo "web serves $(curl -s -m 3 -H "Host: web.example.com" localhost/ | grep -xE '[a-z]+' || true)"
}

# Which version was started how often on a service's own port since the start.
starts() {
  journalctl --sync
  journalctl --quiet --output cat --after-cursor "$(<"$start/cursor")" |
    sed -nE 's/^page: version ([a-z]+) on port ([0-9]{4})$/\1@\2/p' | sort | uniq -c
}
