# A hundred of 200 services change in one pass, against a script that knows beforehand what to do: it writes
# the same units, reloads, and restarts them all in one call. The script does not look whether they came up.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

[[ -n ${fleet:-} ]] || . "$top/benches/fleet.sh"
settle=3000
cat >"$fleet_root/usr/local/bin/change-by-hand" <<'SH'
#!/bin/sh
set -e
cd /tmp/units
cp -- *.service /etc/systemd/system/
systemctl daemon-reload
systemctl reset-failed -- *.service
systemctl restart -- *.service
SH
chmod 755 "$fleet_root/usr/local/bin/change-by-hand"

: >"$work/hundred"
for round in 1 2 3 4 5; do
  say "100 changes, round $round of 5"
  version "$round-pass" 100
  read -r ours _ < <(on "$fleet" omni-meter --runs 1 --warmup 0 -- deployer run)
  version "$round-hand" 100
  # The units that the pass would write, made beforehand.
  # shellcheck disable=SC2016  # for the host's shell
  on "$fleet" bash -euc '
    rm -rf /tmp/units && mkdir /tmp/units
    while read -r path; do
      name=${path:44}
      sed "s|/nix/store/[a-z0-9]*-$name|$path|g" "/etc/systemd/system/$name.service" >"/tmp/units/$name.service"
    done </tmp/paths'
  read -r rival _ < <(on "$fleet" omni-meter --runs 1 --warmup 0 -- change-by-hand)
  # The next pass proves what the script started. What it writes must be what the script wrote.
  on "$fleet" deployer run 2>"$work/deployer"
  # shellcheck disable=SC2016  # for the host's shell
  on "$fleet" sh -euc 'cd /tmp/units; for unit in *; do cmp "$unit" "/etc/systemd/system/$unit"; done'
  printf '%s %s\n' "$ours" "$rival" >>"$work/hundred"
done
median() { cut -d' ' -f"$1" "$work/hundred" | sort -n | sed -n 3p; }
ours=$(median 1) rival=$(median 2)
row "100 of 200 services changed in one pass, against a script with one reload and one restart" "$(ms "$ours")" "$(ms "$rival")" \
  "$(calc "($ours - $settle) / $rival") + 3 s" '1.2 x + 3 s to settle' "$(holds "$ours <= 1.2 * $rival + $settle")"

# The same on a disk whose every flush takes 3 ms: what is flushed together is not waited for file by file.
cc -shared -fPIC -O2 -o "$fleet_root/usr/local/lib/slow-flush.so" "$top/benches/meter/slow-flush.c"
: >"$work/flushed"
for round in 1 2 3; do
  version "$round-flush" 100
  rm -f "$fleet_root/tmp/flushes"
  read -r slow _ < <(on "$fleet" env LD_PRELOAD=/usr/local/lib/slow-flush.so OMNI_FLUSH_MS=3 OMNI_FLUSHES=/tmp/flushes \
    omni-meter --runs 1 --warmup 0 -- deployer run)
  printf '%s %s\n' "$slow" "$(wc -l <"$fleet_root/tmp/flushes")" >>"$work/flushed"
done
slow=$(cut -d' ' -f1 "$work/flushed" | sort -n | sed -n 2p) flushes=$(cut -d' ' -f2 "$work/flushed" | sort -n | sed -n 2p)
# One by one they take their number times 3 ms.
row "the same where each of its $flushes flushes takes 3 ms, against where none does" "$(ms "$slow")" "$(ms "$ours")" \
  "$(calc "$slow - $ours" 0) ms more" "a quarter of one by one: $(calc "$flushes * 3 / 4" 0) ms more" "$(holds "$slow - $ours <= $flushes * 3 / 4")"
