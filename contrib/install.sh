#!/usr/bin/env bash
# Makes this Debian host a target of deployments, or undoes that: binary, names, units, folders.
# Running it again changes only what differs. It never replaces or removes a file that it did not write.
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
# In the first line of every file of ours under /etc: what lacks it belongs to somebody else.
MARK='# Part of omni-deploy, installed by contrib/install.sh'
# The start of the first line of every unit that the deployer writes.
SERVICE_MARK='# Managed by omni-deploy'
BIN=/usr/local/bin
# Where sudo looks on every system.
SUDO_BIN=/usr/bin
NAMES=(omni-deploy deploy-manifest deployer)
UNITS=/etc/systemd/system
DROPIN=$UNITS/caddy.service.d/omni-deploy.conf
CADDY_START=/usr/local/lib/omni-deploy/caddy-start
ADMIN=/run/caddy/admin.sock
SYSCTL=/etc/sysctl.d/90-omni-deploy.conf
TMPFILES=/etc/tmpfiles.d/omni-deploy.conf
MIGRATE=/proc/sys/net/ipv4/tcp_migrate_req
changes=0

usage() {
  cat <<'TEXT'
usage: install.sh [--with-wrappers] [BINARY]
       install.sh --uninstall [--purge]

  BINARY            the omni-deploy to install (default: the release build of this checkout, or the one
                    beside this script)
  --with-wrappers   also push.sh and ship.sh
  --uninstall       remove what was installed; keeps configuration, state, secrets and deployed services
  --purge           with --uninstall: configuration, state and secrets as well

example: sudo contrib/install.sh target/release/omni-deploy
TEXT
}

die() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }
misuse() { printf "install.sh: %s; see 'install.sh --help'\n" "$*" >&2; exit 2; }
warn() { printf 'install.sh: %s\n' "$*" >&2; }
changed() { printf '%s\n' "$*"; changes=$((changes + 1)); }

# True while systemd runs this machine; false when an image is being built, where files are all there is to do.
systemd_runs() { [[ -d /run/systemd/system ]]; }

is_ours() { [[ -f $1 && ! -L $1 ]] && head -n 1 "$1" | grep -qF "$MARK"; }

# Installs file $1 as $2 with mode $3 if bytes or mode differ, by rename, because a running binary cannot be
# written to and a unit must never be seen half.
place() {
  local from=$1 to=$2 mode=$3
  if [[ -f $to && ! -L $to ]] && cmp -s "$from" "$to" && [[ $(stat -c %a "$to") == "$mode" ]]; then
    return 0
  fi
  mkdir -p "$(dirname "$to")"
  install -m "$mode" "$from" "$to.omni-new"
  mv -fT "$to.omni-new" "$to"
  changed "installed $to"
}

# The same for files under /etc, where a foreign one of that name stays.
place_marked() {
  if [[ -e $2 || -L $2 ]] && ! is_ours "$2"; then
    die "$2 exists and is not omni-deploy's; move it away (or rename yours) and run this again"
  fi
  place "$1" "$2" 644
}

folder() {
  local path=$1 mode=$2
  [[ ! -L $path ]] || die "$path is a symlink; a folder is wanted there, root's, mode $mode"
  if [[ -d $path && $(stat -c %a:%u:%g "$path") == "$mode:0:0" ]]; then
    return 0
  fi
  install -d -m "$mode" -o root -g root "$path"
  changed "folder $path, mode $mode"
}

name_for_binary() {
  local link=$BIN/$1
  if [[ -L $link && $(readlink "$link") == omni-deploy ]]; then
    return 0
  fi
  [[ ! -e $link && ! -L $link ]] || die "$link exists and is not omni-deploy's; move it away and run this again"
  ln -s omni-deploy "$link"
  changed "installed $link -> omni-deploy"
}

# sudo of some systems (Debian 14) does not look into /usr/local/bin, and 'ssh HOST sudo deployer' would end with
# "command not found". There, and only there, the names are also in /usr/bin.
name_for_sudo() {
  local name link missing
  command -v sudo >/dev/null || return 0
  # A sudo that does not let root do this tells nothing.
  # shellcheck disable=SC2016  # the inner shell's
  missing=$(PATH=$BIN:/usr/bin:/bin sudo -n -- sh -c \
    'for name; do command -v "$name" >/dev/null || echo "$name"; done' - "${NAMES[@]}" 2>/dev/null) || return 0
  for name in $missing; do
    link=$SUDO_BIN/$name
    if [[ -e $link || -L $link ]]; then
      warn "sudo does not find $BIN/$name, and $link is not omni-deploy's; add $BIN to secure_path in /etc/sudoers (visudo)"
      continue
    fi
    ln -s "$BIN/$name" "$link"
    changed "installed $link -> $BIN/$name, as sudo does not look into $BIN"
  done
}

find_binary() {
  local candidate
  for candidate in "$here/../target/release/omni-deploy" "$here/omni-deploy"; do
    if [[ -x $candidate ]]; then
      printf '%s\n' "$candidate"
      return 0
    fi
  done
  die "no omni-deploy beside this script or in target/release; build it ('cargo build --release') or name it"
}

# Caddy's drop-in replaces its command line, so it only goes where that line is the packages' own.
install_dropin() {
  local other vendor=/lib/systemd/system/caddy.service
  local advice="add --resume to its 'caddy run', and see contrib/systemd/caddy.service.d for the rest"
  if [[ -e $UNITS/caddy.service ]]; then
    warn "caddy: left alone, because $UNITS/caddy.service is yours; $advice"
    return 0
  fi
  for other in "$UNITS"/caddy.service.d/*.conf; do
    if [[ $other != "$DROPIN" && -e $other ]] && grep -q '^ExecStart=' "$other"; then
      warn "caddy: left alone, because $other sets its command; $advice"
      return 0
    fi
  done
  if [[ -e $vendor ]] && ! grep -qx 'ExecStart=/usr/bin/caddy run --environ --config /etc/caddy/Caddyfile' "$vendor"; then
    warn "caddy: left alone, because $vendor starts it in an unknown way; $advice"
    return 0
  fi
  if [[ -e $vendor ]] && ! grep -qx 'ExecReload=/usr/bin/caddy reload --config /etc/caddy/Caddyfile --force' "$vendor"; then
    warn "caddy: left alone, because $vendor reloads it in an unknown way; $advice"
    return 0
  fi
  place "$here/systemd/caddy-start.sh" "$CADDY_START" 755
  place_marked "$here/systemd/caddy.service.d/omni-deploy.conf" "$DROPIN"
}

# Every user of this host can change a Caddy that listens on its port. It has its socket from its next start on, which
# cuts its visitors' connections: that is for a person to choose.
say_admin() {
  local caddy
  [[ -e $DROPIN && ! -S $ADMIN ]] && caddy=$(command -v caddy) || return 0
  if ! grep -qF CADDY_ADMIN "$caddy"; then
    warn "caddy: this version has a socket for its changes only if the Caddyfile begins with { admin unix/$ADMIN }"
    warn "caddy: until then every user of this host can change it; afterwards run: systemctl restart caddy"
  elif systemd_runs && systemctl is-active --quiet caddy; then
    warn "caddy: until its next start every user of this host can change it; run: systemctl restart caddy"
  fi
}

# Says which of the packages that a pass needs are not here. A Nix of its own installer is not on root's PATH.
packages_missing() {
  local -a missing=()
  if ! command -v nix >/dev/null && [[ ! -x /nix/var/nix/profiles/default/bin/nix ]]; then
    missing+=(nix-bin)
  fi
  if ! command -v caddy >/dev/null; then
    missing+=(caddy)
  fi
  ((${#missing[@]})) || return 0
  warn "not here yet: ${missing[*]//-bin/}; run: apt-get install ${missing[*]}"
  if [[ " ${missing[*]} " == *' nix-bin '* ]]; then warn "without nix nothing can be fetched, and no service deployed"; fi
  if [[ " ${missing[*]} " == *' caddy '* ]]; then warn "without caddy services run, and no domain leads to them"; fi
}

do_install() {
  local binary=$1 wrappers=$2 before kind
  [[ -f $binary && -x $binary ]] || die "$binary is not an executable file; name the omni-deploy to install"
  "$binary" --version >/dev/null || die "$binary does not run here ('$binary --version' failed); is it built for this machine?"

  place "$binary" "$BIN/omni-deploy" 755
  name_for_binary deploy-manifest
  name_for_binary deployer
  name_for_sudo
  if ((wrappers)); then
    for kind in push ship; do place "$here/$kind.sh" "$BIN/$kind.sh" 755; done
  fi

  folder /etc/omni-deploy 755
  folder /var/lib/deployer 755
  folder /var/lib/deployer-secrets 700
  # Where it is not there yet, systemd-tmpfiles skips the line that copies it.
  folder /var/lib/deployer/ports 755

  before=$changes
  place_marked "$here/systemd/deployer.service" "$UNITS/deployer.service"
  place_marked "$here/systemd/deployer.timer" "$UNITS/deployer.timer"
  install_dropin
  place_marked "$here/systemd/tmpfiles.d/omni-deploy.conf" "$TMPFILES"
  if systemd_runs && [[ ! -d /run/omni-deploy/ports ]]; then
    systemd-tmpfiles --create "$TMPFILES"
    changed "folder /run/omni-deploy/ports"
  fi
  place_marked "$here/systemd/sysctl.d/90-omni-deploy.conf" "$SYSCTL"
  if [[ -w $MIGRATE && $(<"$MIGRATE") != 1 ]]; then
    echo 1 >"$MIGRATE"
    changed "set net.ipv4.tcp_migrate_req = 1"
  fi

  # A new line, so that the drop-in's settings hold for the Caddy that runs; its --resume from its next start on.
  if systemd_runs && ((changes > before)); then
    systemctl daemon-reload
  fi
  if [[ ! -L $UNITS/timers.target.wants/deployer.timer ]]; then
    systemctl enable --quiet deployer.timer
    changed "enabled deployer.timer"
  fi
  if systemd_runs && ! systemctl is-active --quiet deployer.timer; then
    systemctl start deployer.timer
    changed "started deployer.timer"
  fi

  packages_missing
  say_admin
  if ((changes == 0)); then
    echo "nothing to change"
  elif [[ ! -e /etc/omni-deploy/config.json && ! -e /etc/omni-deploy/deployer.env ]]; then
    echo "next: say where the manifest is in /etc/omni-deploy/config.json, for example {\"store\": \"s3://BUCKET\"},"
    echo "      and put credentials into /root/.aws/credentials (mode 0600); 'omni-deploy doctor' checks both"
  fi
}

# Removes file $1 of ours; says when something else stands in its place.
drop_marked() {
  if is_ours "$1"; then
    rm "$1"
    changed "removed $1"
  elif [[ -e $1 || -L $1 ]]; then
    warn "$1 is not omni-deploy's; left alone"
  fi
}

# The units of the services that were deployed.
services() {
  local unit
  for unit in "$UNITS"/*.service; do
    if head -n 1 "$unit" 2>/dev/null | grep -qF "$SERVICE_MARK"; then printf '%s\n' "$unit"; fi
  done
}

# Names the services that were deployed and stay, and how each is removed: that is for a person to decide.
services_left() {
  local unit name
  for unit in $(services); do
    name=$(basename "$unit" .service)
    echo "kept service $name, which goes on running; to remove it:"
    echo "  systemctl disable --now $name; rm $unit; rm -rf /nix/var/nix/gcroots/omni-deploy/$name; systemctl daemon-reload"
  done
}

do_uninstall() {
  local purge=$1 name path before
  if [[ -L $UNITS/timers.target.wants/deployer.timer ]]; then
    if systemd_runs; then
      # What Caddy has asked for and has yet to begin would start it again.
      systemctl stop 'deployer-asked-*'
      systemctl stop deployer.timer deployer.service
      # A unit that failed stays in systemd's list after its file is gone.
      if systemctl is-failed --quiet deployer.service; then systemctl reset-failed deployer.service; fi
    fi
    systemctl disable --quiet deployer.timer
    changed "stopped and disabled deployer.timer"
  fi
  before=$changes
  drop_marked "$UNITS/deployer.timer"
  drop_marked "$UNITS/deployer.service"
  drop_marked "$DROPIN"
  drop_marked "$SYSCTL"
  # What goes on running is reached through it after a boot.
  if [[ -z $(services) ]]; then drop_marked "$TMPFILES"; else echo "kept $TMPFILES: Caddy needs it after a boot to reach the services that stay"; fi
  if [[ -e $CADDY_START ]]; then
    rm "$CADDY_START"
    changed "removed $CADDY_START"
    rmdir --ignore-fail-on-non-empty "${CADDY_START%/*}"
  fi
  if [[ -d ${DROPIN%/*} ]]; then rmdir --ignore-fail-on-non-empty "${DROPIN%/*}"; fi
  if systemd_runs && ((changes > before)); then systemctl daemon-reload; fi
  if systemd_runs && [[ -S $ADMIN ]]; then
    warn "caddy: has its changes at $ADMIN until its next start, so 'systemctl reload caddy' fails; run: systemctl restart caddy"
  fi
  for name in "${NAMES[@]}"; do
    if [[ -L $SUDO_BIN/$name && $(readlink "$SUDO_BIN/$name") == "$BIN/$name" ]]; then
      rm "$SUDO_BIN/$name"
      changed "removed $SUDO_BIN/$name"
    fi
  done
  for name in deploy-manifest deployer; do
    if [[ -L $BIN/$name && $(readlink "$BIN/$name") == omni-deploy ]]; then
      rm "$BIN/$name"
      changed "removed $BIN/$name"
    fi
  done
  for name in push ship; do
    if cmp -s "$here/$name.sh" "$BIN/$name.sh"; then
      rm "$BIN/$name.sh"
      changed "removed $BIN/$name.sh"
    fi
  done
  if [[ -e $BIN/omni-deploy ]]; then
    rm "$BIN/omni-deploy"
    changed "removed $BIN/omni-deploy"
  fi
  if [[ -d /var/cache/deployer ]]; then
    rm -rf /var/cache/deployer
    changed "removed /var/cache/deployer"
  fi
  for path in /etc/omni-deploy /var/lib/deployer /var/lib/deployer-secrets; do
    [[ -d $path ]] || continue
    if ((purge)); then
      rm -rf --one-file-system "$path"
      changed "removed $path"
    else
      echo "kept $path (--uninstall --purge removes it)"
    fi
  done
  if ((changes == 0)); then
    echo "nothing to change"
  else
    services_left
  fi
}

main() {
  local binary='' wrappers=0 uninstall=0 purge=0
  while (($#)); do
    case $1 in
      -h | --help) usage; return 0 ;;
      --with-wrappers) wrappers=1 ;;
      --uninstall) uninstall=1 ;;
      --purge) purge=1 ;;
      -*) misuse "'$1' is not an option" ;;
      *)
        [[ -z $binary ]] || misuse "more than one BINARY: '$binary' and '$1'"
        binary=$1
        ;;
    esac
    shift
  done
  ((uninstall || !purge)) || misuse "--purge goes with --uninstall"
  ((!uninstall)) || [[ -z $binary ]] || misuse "--uninstall takes no BINARY"
  ((!uninstall || !wrappers)) || misuse "--with-wrappers does not go with --uninstall"
  ((EUID == 0)) || die "must be root: it writes to $BIN and $UNITS; use sudo"
  command -v systemctl >/dev/null || die "no systemctl here: omni-deploy runs services with systemd; apt-get install systemd"
  if ((uninstall)); then
    do_uninstall "$purge"
  else
    [[ -n $binary ]] || binary=$(find_binary)
    do_install "$binary" "$wrappers"
  fi
}

main "$@"
