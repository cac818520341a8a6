#!/usr/bin/env bash
# Boots throw-away Debian hosts for tests and the demo.
#
# A host is an overlay, whose changes live in memory, of a base tree: a Debian suite with what a host needs, made
# once by debootstrap and kept outside the checkout. It is booted by systemd-nspawn in a cgroup, a network namespace
# and a pid namespace of its own, with an empty Nix store, its own journal, Caddy, D-Bus and sshd. Of the machine
# below nothing shows in it but the kernel; and nothing is mounted, written, started or routed there outside
# $OMNI_LAB_CACHE, $OMNI_LAB_DIR/NAME, one cgroup and one veth device per host. `down` takes a host away whole.
set -euo pipefail
shopt -s nullglob

LAB_DIR=${OMNI_LAB_DIR:-/run/omni-deploy-lab}
NET=${OMNI_LAB_NET:-10.231}            # hosts get $NET.N.2, and reach the outside at $NET.N.1
BOOT_TIMEOUT=${OMNI_LAB_BOOT_TIMEOUT:-90}
CACHE=${OMNI_LAB_CACHE:-/var/cache/omni-deploy-lab}
INNER_PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

usage() {
  cat <<'TEXT'
usage: lab.sh COMMAND [NAME] [ARGUMENTS]        (as root)

  packages                install the Debian packages that the lab and the tests need here, if any is missing
  suites [--all]          the suites that what is built here runs on; the first is the default
  base SUITE              make the base tree of a suite unless it is there, and print where it is
  up NAME [--suite S] [--hostname H] [--caddyfile FILE]
                          boot a fresh host; a leftover of that name is removed first
  run NAME COMMAND...     run a command in the host as root; stdio and exit code pass through
  ip NAME                 the host's address, reachable from here
  gateway NAME            this side's address, reachable from the host
  leader NAME             process id of the host's systemd, seen from here
  root NAME               the host's root directory, seen from here (not its /run, /dev, /proc, /sys)
  console NAME            what its boots printed
  reboot NAME             clean shutdown, then boot the same disk; /run starts empty
  stop NAME               clean shutdown
  kill NAME               the power fails (poweroff is the same): every process dies at once
  start NAME              boot the same disk again, after stop, kill or a reboot from inside
  ssh-setup NAME [DIR]    make `ssh HOSTNAME` work with DIR/bin first on PATH, as user admin with sudo
                          (DIR: the lab directory's own ssh folder for that host)
  list                    the hosts there are, and whether they run
  down NAME | down-all    take a host away, with everything that belonged to it

example: lab.sh up biz && lab.sh run biz systemctl status caddy; lab.sh down biz
environment: OMNI_LAB_DIR (/run/omni-deploy-lab), OMNI_LAB_NET (10.231), OMNI_LAB_BOOT_TIMEOUT (90 s),
OMNI_LAB_SUITE (the default suite), OMNI_LAB_CACHE (/var/cache/omni-deploy-lab; remove it to have trees made anew)
TEXT
}

say() { printf 'lab: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# A wrong call exits 2, like the tool's own commands, so that a test can tell it from a failed host.
misuse() { say "$*; see 'lab.sh --help'"; exit 2; }

# What the lab and the tests need of this machine, by the file that proves it.
REQUIRED=(
  /usr/bin/systemd-nspawn:systemd-container
  /usr/sbin/debootstrap:debootstrap
  /bin/ip:iproute2
  /usr/bin/ssh:openssh-client
  /usr/bin/curl:curl
  /usr/bin/jq:jq
  /usr/bin/git:git
  /bin/busybox:busybox-static
  /usr/bin/shellcheck:shellcheck
  /usr/bin/nix:nix-bin
)

# Names of the packages that are not there yet, each once.
missing_packages() {
  local entry
  for entry in "${REQUIRED[@]}"; do
    [[ -e ${entry%%:*} ]] || printf '%s\n' "${entry#*:}"
  done | sort -u
}

# Installing a daemon on Debian starts it and enables it for the next boot. Neither may happen to the machine
# below, so starting is forbidden for the time of the installation and what was new is disabled after it.
cmd_packages() {
  local -a missing
  mapfile -t missing < <(missing_packages)
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null || die "missing ${missing[*]}, and there is no apt-get here; install them by hand"
  local policy=/usr/sbin/policy-rc.d package rc=0
  if [[ ! -e $policy ]]; then
    # shellcheck disable=SC2064  # this path, also when the function is long gone
    trap "rm -f '$policy'" EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
  fi
  say "installing ${missing[*]}"
  {
    apt-get install -y --no-install-recommends "${missing[@]}" ||
      { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; }
  } >&2 </dev/null || rc=$?
  if [[ " ${missing[*]} " == *' nix-bin '* ]]; then
    systemctl disable nix-daemon.socket nix-daemon.service >/dev/null 2>&1 || true
  fi
  local -a still
  mapfile -t still < <(missing_packages)
  ((${#still[@]} == 0)) ||
    die "could not install ${still[*]} (apt-get ended $rc, its words are above); mend the package sources and try again"
}

# --- base trees -------------------------------------------------------------------------------------------------

# The suites, oldest first, each with the version of its C library: what is built here runs where that is no older.
SUITES=(bookworm:2.36 trixie:2.41 forky:2.43)

# What a host consists of. A change of this list, or of how a tree is made, makes the trees anew.
PACKAGES=(
  systemd systemd-sysv libpam-systemd dbus udev sudo openssh-server iproute2 procps ca-certificates
  nix-bin nix-setup-systemd caddy
  jq curl busybox-static acl zstd python3-minimal
)
RECIPE=1

# Suites on which programs that were built here start. A machine newer than all of them has its best chance with the last.
cmd_suites() {
  local ours entry found=
  ours=$(getconf GNU_LIBC_VERSION 2>/dev/null) || ours='glibc 0'
  [[ ${1:-} != --all ]] || ours='glibc 0'
  for entry in "${SUITES[@]}"; do
    [[ $(printf '%s\n' "${ours#* }" "${entry#*:}" | sort -V | tail -n 1) == "${entry#*:}" ]] || continue
    printf '%s\n' "${entry%%:*}"
    found=yes
  done
  [[ -n $found ]] || printf '%s\n' "${entry%%:*}"
}

default_suite() {
  local suites
  suites=$(cmd_suites)
  printf '%s\n' "${OMNI_LAB_SUITE:-${suites%%$'\n'*}}"
}

# Sets $suite and $base, where its tree belongs: named for what is in it, so that a list that changed finds none.
select_base() {
  suite=$1
  [[ $suite =~ ^[a-z]{3,20}$ ]] || misuse "'$suite' is not the name of a Debian suite"
  base=$CACHE/$suite-$(printf '%s\n' "$RECIPE" "${PACKAGES[@]}" | sha256sum | head -c 12)
}

# Debian's mirrors to try: those that this machine's apt has, then Debian's own.
mirrors() {
  {
    # shellcheck source=/dev/null
    if [[ $(. /etc/os-release && printf '%s' "$ID") == debian ]]; then
      # shellcheck disable=SC2016  # apt's own variables
      apt-get indextargets --format '$(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        sed -nE 's|^main (https?://.*/debian)/?$|\1|p'
    fi
    printf 'http://deb.debian.org/debian\n'
  } 2>/dev/null | awk '!seen[$0]++'
}

# Makes the tree unless it is there. Several may ask at once: one makes it, under a lock, beside its place.
make_base() {
  local mirror old log=$CACHE/$suite.log
  [[ ! -e $base ]] || return 0
  mkdir -p "$CACHE"
  (
    flock 6
    [[ ! -e $base ]] || exit 0
    command -v debootstrap >/dev/null || die "no debootstrap: install it with 'lab.sh packages'"
    say "making the base tree of $suite in $base; this is done once"
    for mirror in $(mirrors); do
      rm -rf --one-file-system "$base.new"
      # In a mount namespace of its own, so that whatever ends it leaves nothing mounted.
      # shellcheck disable=SC2016  # the function's own words
      if unshare --mount --propagation private bash -c "$(declare -f fill_base install_in_base); fill_base \"\$@\"" - \
        "$suite" "$base.new" "$mirror" "${PACKAGES[@]}" </dev/null >"$log" 2>&1; then
        mv "$base.new" "$base"
        break
      fi
      say "not from $mirror: $(grep -aE '^(E|W): ' "$log" | tail -n 1)"
    done
    [[ -e $base ]] || die "no base tree of $suite; what was tried last is in $log"
    for old in "$CACHE/$suite"-*; do
      # Not from under a host that is booted.
      [[ $old == "$base" ]] || grep -qsF "lowerdir=$old," /proc/[0-9]*/mountinfo || rm -rf --one-file-system "$old"
    done
  ) 6>"$CACHE/$suite.lock"
}

# fill_base SUITE TREE MIRROR PACKAGE...: a minimal Debian, in which its own apt installs the rest: debootstrap knows
# no virtual packages.
fill_base() {
  local suite=$1 tree=$2 mirror=$3 script=/usr/share/debootstrap/scripts/$1
  shift 3
  set -euo pipefail
  # A proxy that apt goes through is what debootstrap's wget must go through.
  eval "$(apt-config shell http_proxy Acquire::http::Proxy https_proxy Acquire::https::Proxy)"
  export http_proxy https_proxy
  # One that does not know the suite yet.
  [[ -e $script ]] || script=/usr/share/debootstrap/scripts/sid
  debootstrap --variant=minbase "$suite" "$tree" "$mirror" "$script"
  # Nothing that is installed is to run, and how this machine's apt reaches its mirrors is how that one does.
  printf '#!/bin/sh\nexit 101\n' >"$tree/usr/sbin/policy-rc.d"
  chmod 755 "$tree/usr/sbin/policy-rc.d"
  apt-config dump | grep -E '^Acquire::(http|https|Check-|Retries|Force)' >"$tree/etc/apt/apt.conf.d/00machine" || true
  cp --remove-destination /etc/resolv.conf /etc/hosts "$tree/etc/"
  printf 'force-unsafe-io\n' >"$tree/etc/dpkg/dpkg.cfg.d/lab"
  mount -t proc proc "$tree/proc"
  mount --rbind /dev "$tree/dev"
  chroot "$tree" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
    bash -c "$(declare -f install_in_base); install_in_base \"\$@\"" - "$@"
  rm "$tree/usr/sbin/policy-rc.d" "$tree/etc/apt/apt.conf.d/00machine"
}

# install_in_base PACKAGE...: those of them that the suite has.
install_in_base() {
  local package
  local -a known=()
  set -euo pipefail
  apt-get -o Acquire::Retries=3 update
  for package in "$@"; do
    if [[ -n $(apt-cache madison "$package" 2>/dev/null) ]]; then known+=("$package"); fi
  done
  apt-get -o Acquire::Retries=3 install -y --no-install-recommends "${known[@]}"
  dpkg --audit
  apt-get clean
  rm -rf /var/lib/apt/lists/* /nix /etc/ssh/ssh_host_*
}

cmd_base() {
  (($# == 1)) || misuse "base: the SUITE is missing"
  select_base "$1"
  make_base
  printf '%s\n' "$base"
}

# --- one host's own things ------------------------------------------------------------------------------

# Everything that belongs to host $1 hangs from these; $n is its number on the network and in the cgroups.
select_host() {
  name=$1
  [[ $name =~ ^[a-z0-9][a-z0-9-]{0,39}$ ]] ||
    misuse "'$name' cannot name a host: lower-case letters, digits and '-', at most 40"
  dir=$LAB_DIR/$name
  disk=$dir/disk
  root=$disk/root
}

# The same for a host that must exist already.
existing_host() {
  (($# >= 1)) || misuse "the host's NAME is missing"
  select_host "$1"
  [[ -r $dir/number ]] || die "no host '$name'; make it with 'lab.sh up $name'"
  n=$(<"$dir/number")
  locate_cgroup
}

# On cgroup2 machines the tree is at /sys/fs/cgroup; hybrid ones have it below, beside a v1 tree for systemd
# that nspawn mirrors, so there the host owns a folder in both.
locate_cgroup() {
  local base
  legacy=
  case $(stat -fc %T /sys/fs/cgroup 2>/dev/null) in
    cgroup2fs) base=/sys/fs/cgroup ;;
    *)
      base=/sys/fs/cgroup/unified
      [[ $(stat -fc %T "$base" 2>/dev/null) == cgroup2fs ]] ||
        die "no cgroup2 below /sys/fs/cgroup; mount one at /sys/fs/cgroup/unified"
      [[ -d /sys/fs/cgroup/systemd ]] && legacy=/sys/fs/cgroup/systemd/omni-deploy-lab-$n
      ;;
  esac
  cgroup=$base/omni-deploy-lab-$n
}

# True while any process of the host lives: the kernel's word, which no stale pid file can fake.
is_alive() {
  grep -qsx 'populated 1' "$cgroup/cgroup.events"
}

# Sets $leader to the host's pid 1 as seen from here, checked against its cgroup because pids are reused.
find_leader() {
  local candidate line starter
  local -a children
  leader=
  if [[ -r $dir/leader ]]; then
    read -r candidate <"$dir/leader"
    in_our_cgroup "$candidate" && { leader=$candidate; return 0; }
  fi
  [[ -r $dir/nspawn ]] || return 1
  read -r starter <"$dir/nspawn"
  # The kernel ends this list without a newline, which read calls a failure.
  { read -ra children <"/proc/$starter/task/$starter/children" || true; } 2>/dev/null
  for candidate in "${children[@]}"; do
    in_our_cgroup "$candidate" || continue
    while read -r line; do
      [[ $line == NSpid:*[[:space:]]1 ]] || continue
      leader=$candidate
      printf '%s\n' "$leader" >"$dir/leader"
      return 0
    done 2>/dev/null <"/proc/$candidate/status"
  done
  return 1
}

in_our_cgroup() {
  [[ -n $1 ]] && grep -q "/omni-deploy-lab-$n/" "/proc/$1/cgroup" 2>/dev/null
}

# Kills every process of the host in one stroke, as a power failure does: systemd gets no chance to stop units.
power_off() {
  local deadline=$((SECONDS + 20)) pid
  rm -f "$dir/leader"
  is_alive || return 0
  if [[ -w $cgroup/cgroup.kill ]]; then
    echo 1 >"$cgroup/cgroup.kill"
  fi
  while is_alive; do
    # Kernels before 5.14 have no cgroup.kill.
    find "$cgroup" -name cgroup.procs -exec cat {} + 2>/dev/null | while read -r pid; do
      kill -KILL "$pid" 2>/dev/null || true
    done || true   # one may go while it is looked at
    ((SECONDS < deadline)) || die "host '$name': processes in $cgroup survive SIGKILL; see 'cat $cgroup/cgroup.procs'"
    sleep 0.05
  done
}

# Removes the host's (by now empty) cgroups, deepest first: nspawn and the systemd inside leave theirs behind.
remove_cgroups() {
  local top attempt
  for top in "$cgroup" ${legacy:+"$legacy"}; do
    for attempt in 1 2 3 4 5 6 7 8 9 10; do
      [[ -d $top ]] || break
      find "$top" -depth -type d -exec rmdir {} + 2>/dev/null || true
      [[ -d $top ]] || break
      ((attempt < 10)) || die "host '$name': cannot remove cgroup $top; is a process left in it?"
      sleep 0.1
    done
  done
}

# Mount points at or below $1, deepest first.
mounts_below() {
  awk -v top="$1" '{ p = $5; gsub(/\\040/, " ", p); if (p == top || index(p, top "/") == 1) print p }' \
    /proc/self/mountinfo | tac
}

# Whether number $n is still this host's: what an interrupted `down` left may name one that another folder's host
# has by now.
owns_number() {
  local owner
  owner=$(cat "/sys/class/net/olab$n/ifalias" 2>/dev/null) || return 0
  [[ -z $owner || $owner == "$dir" ]]
}

# Waits until nobody else makes or removes the host, and keeps others out until this process ends. The folder
# itself carries the lock, on descriptor 7, so that nothing is left when it goes.
lock_host() {
  while :; do
    # Its parent may be removed in between by the removal of another host.
    mkdir -p "$dir" 2>/dev/null || mkdir -p "$dir"
    { exec 7<"$dir"; } 2>/dev/null || continue
    flock 7
    [[ $dir -ef /proc/self/fd/7 ]] && return 0
  done
}

# Takes away whatever is left of the host but its folder, in whatever state an interrupted run left it.
clear_host() {
  local mountpoint
  # Nobody claims a number meanwhile: one that is nobody's yet could be another host's a moment later.
  exec 9</run
  flock 9
  if [[ -r $dir/number ]] && n=$(<"$dir/number") && owns_number; then
    locate_cgroup
    power_off
    remove_cgroups
    if [[ -e /sys/class/net/olab$n ]]; then
      ip link delete "olab$n"
    fi
  fi
  exec 9<&-
  while read -r mountpoint; do
    umount "$mountpoint" 2>/dev/null || umount --lazy "$mountpoint"
  done < <(mounts_below "$dir")
  [[ -z $(mounts_below "$dir") ]] || die "host '$name': cannot unmount $(mounts_below "$dir" | head -n 1); who uses it?"
  # Only ever below our own folder, and never into something mounted there.
  find "$dir" -xdev -mindepth 1 -delete
}

# Takes away all of the host; its lock is ours.
remove_host() {
  clear_host
  rmdir "$dir"
  # The last one; and who makes another at this moment makes it again (lock_host).
  rmdir --ignore-fail-on-non-empty "$LAB_DIR" 2>/dev/null || true
}

# --- making one ---------------------------------------------------------------------------------------------

# Claims the first free number for the host. Two labs may start at once, from different folders even, so the
# claim is made under a lock, and the veth device itself is the mark that a number is taken.
claim_number() {
  exec 9</run
  flock 9
  for ((n = 1; n < 255; n++)); do
    [[ -e /sys/class/net/olab$n ]] && continue
    printf '%s\n' "$n" >"$dir/number"
    disk_mount
    wire
    exec 9<&-
    return 0
  done
  die "all 254 networks below $NET are in use; 'lab.sh down-all' removes this folder's hosts"
}

# The host's memory disk, private so that no other mount namespace keeps a copy of what is mounted below it.
disk_mount() {
  mkdir -p "$disk"
  mount -t tmpfs -o mode=755 omni-lab "$disk"
  mount --make-private "$disk"
}

# A network of two addresses between here and the host. There is no default route and no name server: what is
# not this machine fails at once instead of timing out.
wire() {
  touch "$disk/net"
  unshare --net="$disk/net" true
  ip link add "olab$n" type veth peer name host0 netns "$disk/net"
  ip link set "olab$n" alias "$dir"
  ip address add "$NET.$n.1/30" dev "olab$n"
  ip link set "olab$n" up
  nsenter --net="$disk/net" ip link set lo up
  nsenter --net="$disk/net" ip address add "$NET.$n.2/30" dev host0
  nsenter --net="$disk/net" ip link set host0 up
}

# The overlay, with fresh memory where an overlay will not do (Nix's store) or a host is to start empty.
make_root() {
  local place
  mkdir "$disk/upper" "$disk/work" "$root"
  mount -t overlay overlay -o "lowerdir=$base,upperdir=$disk/upper,workdir=$disk/work" "$root"
  for place in nix root home tmp var/tmp var/log; do
    mkdir -p "$disk/fresh/$place" "$root/$place"
    mount --bind "$disk/fresh/$place" "$root/$place"
  done
  chmod 700 "$root/root"
  chmod 1777 "$root/tmp" "$root/var/tmp"
  mkdir -p "$root/nix/store" "$root/nix/var/nix" "$root/var/log/journal"
}

# Replaces a file of the host: removed first, because it may be a symlink that leads somewhere else.
put() {
  rm -f "$root/$1"
  mkdir -p "$(dirname "$root/$1")"
  cat >"$root/$1"
}

# Who the host is.
write_identity() {
  printf '%s\n' "$1" | put etc/hostname
  printf '127.0.0.1 localhost\n127.0.1.1 %s\n::1 localhost ip6-localhost\n%s.%s.1 outside\n' "$1" "$NET" "$n" | put etc/hosts
  tr -d - </proc/sys/kernel/random/uuid | put etc/machine-id
  rm -f "$root/var/lib/dbus/machine-id"
  ln -s /etc/machine-id "$root/var/lib/dbus/machine-id"
  printf '# no name server in the lab\n' | put etc/resolv.conf
  : | put etc/fstab
  : | put etc/environment
  put etc/nix/nix.conf <<'TEXT'
# Nothing to build as, nothing to sandbox with, nowhere to substitute from: only what a test pushes arrives.
sandbox = false
build-users-group =
substituters =
experimental-features = nix-command flakes
TEXT
  rm -f "$root"/etc/ssh/ssh_host_* "$root"/etc/ssh/sshd_config.d/*
  ssh-keygen -q -t ed25519 -N '' -C "$1" -f "$root/etc/ssh/ssh_host_ed25519_key"
  put etc/ssh/sshd_config <<'TEXT'
HostKey /etc/ssh/ssh_host_ed25519_key
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin no
UsePAM no
UseDNS no
TEXT
}

# Chooses what boots: of what the packages enabled and of the vendor's defaults only what is named here starts, so that
# the host of every suite is the same and boots in seconds.
choose_units() {
  local unit generator system=etc/systemd/system
  rm -rf "${root:?}/$system"
  mkdir -p "$root/$system/multi-user.target.wants" "$root/$system/sockets.target.wants" \
    "$root/etc/systemd/system-generators"
  for generator in "$root"/usr/lib/systemd/system-generators/*; do
    ln -sf /dev/null "$root/etc/systemd/system-generators/${generator##*/}"
  done
  for unit in "$root"/usr/lib/systemd/system/*.target.wants/*; do
    case ${unit##*/} in
      dbus.* | dev-mqueue.mount | systemd-journal* | systemd-sysctl.service | systemd-tmpfiles-setup.service | \
        systemd-user-sessions.service | systemd-initctl.socket) ;;
      # Not masked: it can still be started, by hand or over the bus.
      *) rm "$unit" ;;
    esac
  done
  ln -s /lib/systemd/system/multi-user.target "$root/$system/default.target"
  ln -s /lib/systemd/system/caddy.service "$root/$system/multi-user.target.wants/caddy.service"
  ln -s /lib/systemd/system/ssh.service "$root/$system/multi-user.target.wants/ssh.service"
  if [[ -e $root/lib/systemd/system/nix-daemon.socket ]]; then
    ln -s /lib/systemd/system/nix-daemon.socket "$root/$system/sockets.target.wants/nix-daemon.socket"
  fi
}

# What Debian ships, in the two directives it consists of.
default_caddyfile() {
  printf ':80 {\n\troot * /usr/share/caddy\n\tfile_server\n}\n'
}

# Boots the host's disk and waits until its systemd has nothing left to start.
boot() {
  local deadline=$((SECONDS + BOOT_TIMEOUT)) state starter
  is_alive && die "host '$name' runs already; 'lab.sh reboot $name' restarts it"
  rm -f "$dir/leader"
  remove_cgroups
  mkdir "$cgroup" ${legacy:+"$legacy"}
  (
    # A cgroup of its own: otherwise the systemd inside would see, and tidy up, other people's processes.
    for group in "$cgroup" ${legacy:+"$legacy"}; do
      echo "$BASHPID" >"$group/cgroup.procs"
    done
    # nspawn keeps locks and folders below /run/systemd, and leaves them when killed: let it write elsewhere.
    # shellcheck disable=SC2016  # expanded by the inner shell
    exec setsid env -i PATH="$INNER_PATH" SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 SYSTEMD_NSPAWN_TMPFS_TMP=0 \
      SYSTEMD_NSPAWN_API_VFS_WRITABLE=network \
      unshare --mount --propagation slave \
      sh -euc 'mkdir -p /run/systemd; mount -t tmpfs omni-lab /run/systemd; exec "$@"' - \
      systemd-nspawn --quiet --directory="$root" --machine="omni-lab-$n" --hostname="$(<"$dir/hostname")" --boot \
      --register=no --keep-unit --console=pipe --link-journal=no --resolv-conf=off --timezone=off \
      --network-namespace-path="$disk/net"
  ) </dev/null >>"$disk/console" 2>&1 7<&- &
  starter=$!
  printf '%s\n' "$starter" >"$dir/nspawn"
  disown
  while :; do
    if find_leader && [[ -S /proc/$leader/root/run/systemd/private ]]; then
      # 'degraded' exits 1; what it printed decides.
      state=$(in_host timeout "$((deadline - SECONDS > 0 ? deadline - SECONDS : 1))" \
        systemctl is-system-running --wait 2>/dev/null) || true
      case $state in
        running) return 0 ;;
        degraded)
          say "host '$name' is up, but degraded: $(in_host systemctl --failed --plain --no-legend | awk '{ printf "%s ", $1 }')"
          return 0
          ;;
      esac
    fi
    is_alive || kill -0 "$starter" 2>/dev/null || die "host '$name' did not boot: $(tail -n 1 "$disk/console"); all of it: 'lab.sh console $name'"
    ((SECONDS < deadline)) ||
      die "host '$name' is not up after $BOOT_TIMEOUT s (${state:-no systemd yet}); see 'lab.sh console $name'"
    sleep 0.05
  done
}

# Runs a command in the host, in place of a subshell of ours: in all its namespaces, with a login's environment
# instead of ours, and in one of the host's cgroups, so that a power failure takes it too. That cgroup is not
# below the payload's: nsenter itself has no pid in there, which systemd takes for an error when it lists it.
enter() {
  local scope=$cgroup/run
  mkdir -p "$scope"
  echo "$BASHPID" >"$scope/cgroup.procs"
  exec nsenter --target "$leader" --mount --uts --ipc --net --pid --cgroup -- \
    /usr/bin/env -i --chdir=/root PATH="$INNER_PATH" HOME=/root USER=root LOGNAME=root SHELL=/bin/bash \
    LANG=C.UTF-8 TERM="${TERM:-dumb}" "$@"
}

in_host() { (enter "$@"); }

# --- commands -----------------------------------------------------------------------------------------------

cmd_up() {
  (($# >= 1)) || misuse "up: the host's NAME is missing"
  select_host "$1"
  shift
  local hostname=$name caddyfile='' missing suite base wanted=''
  while (($#)); do
    case $1 in
      --suite) wanted=${2:?lab: --suite needs a name}; shift 2 ;;
      --hostname) hostname=${2:?lab: --hostname needs a name}; shift 2 ;;
      --caddyfile) caddyfile=${2:?lab: --caddyfile needs a file}; shift 2 ;;
      *) misuse "up: '$1' is not an option of it" ;;
    esac
  done
  [[ $hostname =~ ^[a-z0-9][a-z0-9-]{0,62}$ ]] || misuse "up: '$hostname' cannot be a host name"
  [[ -z $caddyfile || -r $caddyfile ]] || die "up: cannot read the Caddyfile '$caddyfile'"
  missing=$(missing_packages | tr '\n' ' ')
  [[ -z $missing ]] || die "missing: ${missing% }; install with 'lab.sh packages'"
  select_base "${wanted:-$(default_suite)}"
  make_base
  lock_host
  clear_host
  # From here on a failure leaves nothing behind but its message.
  trap 'abandon' EXIT
  claim_number
  locate_cgroup
  printf '%s\n' "$hostname" >"$dir/hostname"
  printf '%s\n' "$suite" >"$dir/suite"
  make_root
  write_identity "$hostname"
  choose_units
  if [[ -n $caddyfile ]]; then put etc/caddy/Caddyfile <"$caddyfile"; else default_caddyfile | put etc/caddy/Caddyfile; fi
  boot
  trap - EXIT
}

# Undoes an `up` that failed, with the boot's own words first, since they go away with the disk.
abandon() {
  trap - EXIT
  [[ ! -s $disk/console ]] || tail -n 20 "$disk/console" >&2
  remove_host
}

cmd_run() {
  existing_host "$@"
  shift
  (($#)) || misuse "run: the command to run in '$name' is missing"
  find_leader || die "host '$name' does not run; start it with 'lab.sh start $name'"
  enter "$@"
}

cmd_start() {
  existing_host "$@"
  boot
}

cmd_stop() {
  existing_host "$@"
  local deadline=$((SECONDS + BOOT_TIMEOUT))
  find_leader || { power_off; return 0; }
  # systemd's own signal for it, which needs no bus to be up.
  kill -s SIGRTMIN+4 "$leader"
  while is_alive; do
    ((SECONDS < deadline)) || die "host '$name' is still going down after $BOOT_TIMEOUT s; 'lab.sh kill $name' cuts its power"
    sleep 0.05
  done
  rm -f "$dir/leader"
}

cmd_reboot() {
  cmd_stop "$@"
  boot
}

cmd_kill() {
  existing_host "$@"
  power_off
}

cmd_list() {
  local each
  for each in "$LAB_DIR"/*/number; do
    existing_host "$(basename "$(dirname "$each")")"
    printf '%s\t%s\t%s\n' "$name" "$NET.$n.2" "$(is_alive && echo up || echo off)"
  done
}

cmd_down() {
  (($# >= 1)) || misuse "down: the host's NAME is missing"
  select_host "$1"
  [[ -d $dir ]] || return 0
  lock_host
  remove_host
}

cmd_down_all() {
  local each
  for each in "$LAB_DIR"/*/; do
    cmd_down "$(basename "$each")"
  done
}

# `ssh HOSTNAME` as people type it: an ssh first on PATH that brings its own configuration, key and known
# hosts, so that nobody's ~/.ssh is read or written. One DIR serves several hosts.
cmd_ssh_setup() {
  existing_host "$@"
  local hostname keys
  hostname=$(<"$dir/hostname")
  keys=$(realpath -m "${2:-$dir/ssh}")
  find_leader || die "host '$name' does not run; start it with 'lab.sh start $name'"
  mkdir -p "$keys/bin" "$keys/hosts"
  chmod 700 "$keys"
  [[ -e $keys/key ]] || ssh-keygen -q -t ed25519 -N '' -C omni-deploy-lab -f "$keys/key"
  # shellcheck disable=SC2016  # expanded inside the host
  in_host bash -euc '
    id admin >/dev/null 2>&1 || useradd --no-create-home --home-dir /home/admin --shell /bin/bash admin
    usermod --password "*" --expiredate "" admin
    install -d -m 755 -o admin /home/admin
    install -d -m 700 -o admin /home/admin/.ssh
    printf "%s\n" "$1" >/home/admin/.ssh/authorized_keys
    chown admin /home/admin/.ssh/authorized_keys
    printf "admin ALL=(ALL:ALL) NOPASSWD: ALL\n" >/etc/sudoers.d/omni-lab
    chmod 440 /etc/sudoers.d/omni-lab
  ' - "$(<"$keys/key.pub")" || die "host '$name': cannot make the user admin"
  printf 'Include "%s/hosts/*"\n' "$keys" >"$keys/config"
  cat >"$keys/hosts/$hostname" <<TEXT
Host $hostname
  HostName $NET.$n.2
  User admin
  IdentityFile "$keys/key"
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile "$keys/known_hosts.$hostname"
  GlobalKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 10
TEXT
  # A host that was made anew has a new key.
  rm -f "$keys/known_hosts.$hostname"
  printf '#!/bin/sh\nexec /usr/bin/ssh -F "%s/config" "$@"\n' "$keys" >"$keys/bin/ssh"
  chmod 755 "$keys/bin/ssh"
  printf '%s\n' "$keys/bin"
}

main() {
  (($#)) || { usage >&2; exit 2; }
  local command=$1
  shift
  case $command in
    -h | --help | help) usage; return 0 ;;
  esac
  if [[ $command == suites ]]; then cmd_suites "$@"; return; fi
  ((EUID == 0)) || die "$command: hosts are booted as root; use sudo"
  case $command in
    packages) cmd_packages ;;
    base) cmd_base "$@" ;;
    up) cmd_up "$@" ;;
    run) cmd_run "$@" ;;
    ip) existing_host "$@"; printf '%s\n' "$NET.$n.2" ;;
    gateway) existing_host "$@"; printf '%s\n' "$NET.$n.1" ;;
    leader)
      existing_host "$@"
      find_leader || die "host '$name' does not run; start it with 'lab.sh start $name'"
      printf '%s\n' "$leader"
      ;;
    root) existing_host "$@"; printf '%s\n' "$root" ;;
    console) existing_host "$@"; cat "$disk/console" ;;
    start) cmd_start "$@" ;;
    stop) cmd_stop "$@" ;;
    reboot) cmd_reboot "$@" ;;
    kill | poweroff) cmd_kill "$@" ;;
    list) cmd_list ;;
    ssh-setup) cmd_ssh_setup "$@" ;;
    down) cmd_down "$@" ;;
    down-all) cmd_down_all ;;
    *) misuse "'$command' is not a command" ;;
  esac
}

main "$@"
