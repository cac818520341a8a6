#!/bin/sh
# Part of omni-deploy, installed by contrib/install.sh. Run as Caddy's user before Caddy starts, to reload its Caddyfile
# ('reload'), and after that ('reloaded'); as root after a start and after a reload, to ask for a pass ('ask').
#
# With --resume Caddy starts with the configuration it had last, and would not see that the Caddyfile was edited
# meanwhile. So what the Caddyfile says (as Caddy understands it, imports included) is remembered, and when it says
# something else than at the last start or reload, the saved configuration is set aside: Caddy starts from the Caddyfile.
# It never keeps Caddy from starting: a Caddyfile that cannot be used leaves the saved configuration in force.
#
# Port 2019 is anybody's while Caddy is down, and Caddy does not start at all when it cannot have one of its ports. So the
# deployer's server there, which shows the configuration, resumes without an address; the next pass gives it back. So does
# one of a trial that was interrupted; the next pass removes it. Nor does Caddy start with a setting that it does not know,
# as one that was put back to before 2.7 would have to.
caddyfile=/etc/caddy/Caddyfile
dir=${XDG_CONFIG_HOME:-$HOME/.config}/caddy
record=$dir/omni-deploy.seen
saved=$dir/autosave.json

if [ "${1:-}" = reload ]; then
  # A Caddy that has no socket is still asked at its port.
  [ -S "${CADDY_ADMIN#unix/}" ] || unset CADDY_ADMIN
  exec /usr/bin/caddy reload --config "$caddyfile" --force
fi

if [ "${1:-}" = ask ]; then
  # A pass that is under way may have looked at Caddy before this, and a start would only join it. So the start is asked
  # for by a unit that systemd begins when that pass has ended (After=), and that waits for a pass made by hand as well.
  # Each has a name of its own, because it must not join one that has asked already; one that has yet to begin will do.
  case $(systemctl list-jobs --no-legend 'deployer-asked-*') in *waiting*) exit 0 ;; esac
  systemd-run --quiet --no-block --collect --unit="deployer-asked-$(cat /proc/sys/kernel/random/uuid)" \
    --description='Ask for a pass of omni-deploy' --service-type=oneshot --property=After=deployer.service /bin/sh -c \
    '[ ! -e /run/omni-deploy/lock ] || flock /run/omni-deploy/lock true; exec systemctl start --no-block deployer.service' ||
    systemctl start --no-block deployer.service
  exit
fi

if [ "${1:-}" != reloaded ] && [ -s "$saved" ]; then
  unknown=
  grep -qsF stream_close_delay /usr/bin/caddy || unknown='; s/"stream_close_delay":"24h",//g'
  (umask 077 && sed 's/\("deployer-[a-z]*":{"automatic_https":{"disable":true},"listen":\)\["127[^]]*\(\[::1\]:2019"\)\{0,1\}\]/\1[]/g'"$unknown" \
    "$saved" >"$saved.new") && mv -f "$saved.new" "$saved"
fi

if ! said=$(/usr/bin/caddy adapt --config "$caddyfile"); then
  echo "$caddyfile cannot be used; going on with the configuration that Caddy had last, if there is one" >&2
  exit 0
fi
said=$(printf '%s' "$said" | sha256sum)
if [ "$said" = "$(cat "$record" 2>/dev/null)" ]; then
  exit 0
fi
if [ "${1:-}" != reloaded ] && [ -e "$saved" ]; then
  mv -f "$saved" "$saved.before"
  echo "$caddyfile says something else than when Caddy started last: starting from it; what Caddy had is in $saved.before" >&2
fi
mkdir -p "$dir"
printf '%s\n' "$said" >"$record.new" && mv -f "$record.new" "$record"
