#!/usr/bin/env bash
# Proves what the other tests stand on: the hosts of tests/lab/lab.sh, the units, the installer and the example.
# Needs root. BINARY names a built omni-deploy to install; without it a stand-in is installed that does, from
# within the hardened unit, everything a deployer does to its host.
# shellcheck disable=SC2016  # scripts in single quotes are for the shell of the host they are run in
set -euo pipefail

top=$(dirname "$(dirname "$(dirname "$(readlink -f "$0")")")")
lab=$top/tests/lab/lab.sh
export OMNI_LAB_DIR=${OMNI_LAB_DIR:-/run/omni-deploy-lab}-selftest   # apart from hosts that somebody works with
scratch=$(mktemp -d)
failed=0
passed=0
background=()

# Whatever happens, nothing of ours stays.
cleanup() {
  local pid
  trap - EXIT
  for pid in "${background[@]}"; do kill "$pid" 2>/dev/null || true; done
  "$lab" down-all
  rm -rf "$scratch"
}
trap cleanup EXIT

# check NAME COMMAND...: the property NAME holds if COMMAND succeeds; its output is shown only if not.
check() {
  local property=$1 output
  shift
  if output=$("$@" 2>&1); then
    passed=$((passed + 1))
    printf 'ok      %s\n' "$property"
  else
    failed=$((failed + 1))
    printf 'FAILED  %s\n%s\n' "$property" "$output"
  fi
}

# --- what commands print and return --------------------------------------------------------------------------

# returns CODE COMMAND...
returns() {
  local want=$1 got=0
  shift
  "$@" || got=$?
  [[ $got == "$want" ]] || { echo "exit code $got, wanted $want"; return 1; }
}

# prints TEXT COMMAND...: exactly that on stdout.
prints() {
  local want=$1 got
  shift
  got=$("$@") || { echo "exit code $?"; return 1; }
  [[ $got == "$want" ]] || { printf 'printed: %s\nwanted:  %s\n' "$got" "$want"; return 1; }
}

# mentions TEXT COMMAND...: somewhere in what it prints, whatever it returns.
mentions() {
  local want=$1 got
  shift
  got=$("$@" 2>&1) || true
  [[ $got == *"$want"* ]] || { printf 'no "%s" in: %s\n' "$want" "$got"; return 1; }
}

# soon COMMAND...: succeeds within 60 s.
soon() {
  local deadline=$((SECONDS + 60))
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || { echo "not within 60 s: $*"; "$@"; return 1; }
    sleep 0.1
  done
}

negate() { ! "$@"; }
in_host() { local host=$1; shift; "$lab" run "$host" bash -euo pipefail -c "$@"; }

# --- properties of the lab -----------------------------------------------------------------------------------

# Remembers what must be gone after `down`: recorded while the host runs. Its network device and cgroup are known by
# their kernel's numbers, because another lab's host may get the same names at once.
belongings() {
  local host=$1 leader number device cgroups
  leader=$("$lab" leader "$host")
  number=$(<"$OMNI_LAB_DIR/$host/number")
  device=$(<"/sys/class/net/olab$number/ifindex")
  cgroups=$(cgroups_of "$number" | paste -sd,)
  # What is not found now could not be missed later.
  [[ -n $device && -n $cgroups ]] || { echo "no device or no cgroup of host '$host'" >&2; return 1; }
  printf '%s %s %s %s %s %s\n' "$host" "$number" "$device" "$cgroups" "$(stat -Lc %i "/proc/$leader/ns/net")" \
    "$(stat -Lc %i "/proc/$leader/ns/pid")"
}

# Of the host with that number, one in each hierarchy.
cgroups_of() { find /sys/fs/cgroup -maxdepth 2 -name "omni-deploy-lab-$1" -printf '%i\n'; }

# What is mounted on the machine, but for other labs' hosts, which come and go.
mounts() { mount | grep -vE ' on /run/[^ ]+/disk[/ ]' | sort; }

# nothing_is_left "HOST NUMBER DEVICE CGROUPS NETNS PIDNS"
nothing_is_left() {
  local host number device cgroups netns pidns state kept=0
  read -r host number device cgroups netns pidns <<<"$1"
  ! grep -F "$OMNI_LAB_DIR/$host/" /proc/self/mountinfo || kept=1
  ! cgroups_of "$number" | grep -xF -e "${cgroups//,/$'\n'}" || { echo "cgroup of $number"; kept=1; }
  ! grep -lx "$device" /sys/class/net/olab*/ifindex 2>/dev/null || kept=1
  [[ ! -e $OMNI_LAB_DIR/$host ]] || { echo "folder $OMNI_LAB_DIR/$host"; kept=1; }
  # Not lsns: a dead process that the machine's init has yet to reap is still in its pid namespace. And the kernel gives
  # the number of a namespace that is gone to the next one, another lab's host, whose processes are in that host's cgroup.
  # Ours, which was looked for above, could not have gone with a process in it.
  local process
  for process in /proc/[0-9]*; do
    case " $(stat -Lc %i "$process/ns/net" "$process/ns/pid" 2>/dev/null | paste -sd' ') " in
      *" $netns "* | *" $pidns "*) ;;
      *) continue ;;
    esac
    ! grep -qs /omni-deploy-lab- "$process/cgroup" || continue
    # Or has reaped it since.
    state=$(sed -n 's/^State:[[:space:]]*//p' "$process/status" 2>/dev/null) || continue
    [[ -z $state || $state == Z* ]] || { echo "process $process: $state"; kept=1; }
  done
  return "$kept"
}

interrupted_up() {
  local pid
  "$lab" up torn >/dev/null 2>&1 &
  pid=$!
  sleep "$1"
  kill -KILL "$pid" 2>/dev/null || true
  wait "$pid" 2>/dev/null || true
  "$lab" up torn
  "$lab" run torn systemctl is-system-running
  local left
  left=$(belongings torn)
  "$lab" down torn
  nothing_is_left "$left"
}

test_lab() {
  local one two left_one left_two boot_one
  mounts >"$scratch/mounts.before"

  "$lab" up one --hostname biz &
  background+=($!)
  "$lab" up two
  wait "${background[0]}"
  check two_hosts_boot_at_once prints running "$lab" run one systemctl is-system-running
  check the_second_one_too prints running "$lab" run two systemctl is-system-running
  check a_host_is_called_what_was_asked prints biz "$lab" run one hostname
  one=$("$lab" ip one) two=$("$lab" ip two)
  left_one=$(belongings one) left_two=$(belongings two)

  check exit_code_passes_through returns 7 "$lab" run one sh -c 'exit 7'
  check stdio_passes_through prints 'hello' bash -c "echo hello | '$lab' run one cat"
  check stderr_is_apart prints '' bash -c "'$lab' run one sh -c 'echo hidden >&2' 2>/dev/null"
  check arguments_are_not_split prints 'a  b|$HOME|*' "$lab" run one printf '%s|%s|%s' 'a  b' '$HOME' '*'
  check the_caller_environment_stays_outside returns 1 env SURPRISE=1 "$lab" run one printenv SURPRISE
  check unknown_host_is_a_clear_error mentions "no host 'three'; make it with" "$lab" run three true
  check a_wrong_name_is_a_usage_error returns 2 "$lab" up ../three
  check root_is_the_same_seen_from_outside bash -c "echo seen >\"\$('$lab' root one)/srv/seen\" &&
    [[ \$('$lab' run one cat /srv/seen) == seen ]]"

  check caddy_answers_from_outside curl -sSf -m 30 -o "$scratch/page" "http://$one/"
  check the_other_caddy_too curl -sSf -m 30 -o "$scratch/page" "http://$two/"
  busybox httpd -f -p "$("$lab" gateway one):18080" -h "$scratch" &
  background+=($!)
  echo outside >"$scratch/index.html"
  check the_host_reaches_a_server_outside soon "$lab" run one curl -sSf -m 5 "http://$("$lab" gateway one):18080/"
  check what_is_not_there_fails_at_once negate "$lab" run one timeout 2 curl -s http://192.0.2.200/

  check hosts_do_not_see_each_others_units in_host one 'systemctl stop caddy; ! systemctl is-active caddy'
  check so_the_other_still_serves curl -sSf -m 30 -o "$scratch/page" "http://$two/"
  check and_starts_again "$lab" run one systemctl start caddy
  check the_store_starts_empty prints '' "$lab" run one find /nix/store -mindepth 1
  check home_and_tmp_start_empty prints '' "$lab" run one find /home /tmp -mindepth 1 -maxdepth 1 \
    -not -name 'systemd-private-*' -not -name '.*-unix'
  check nothing_of_the_machine_is_enabled prints 'caddy.service nix-daemon.socket ssh.service' \
    in_host one 'systemctl list-unit-files --state=enabled --no-legend | cut -d" " -f1 | sort | paste -sd" "'
  # Whatever the machine has set for itself.
  local here
  here=$(cat /proc/sys/net/ipv4/tcp_migrate_req)
  check network_sysctls_start_as_the_kernels prints 0 "$lab" run one cat /proc/sys/net/ipv4/tcp_migrate_req
  check and_can_be_set in_host one 'echo 1 >/proc/sys/net/ipv4/tcp_migrate_req'
  check and_stay_in_the_host prints "0 $here" bash -c "echo \$('$lab' run two cat /proc/sys/net/ipv4/tcp_migrate_req) \
    \$(cat /proc/sys/net/ipv4/tcp_migrate_req)"

  # --- reboot, power failure
  boot_one=$("$lab" run one cat /proc/sys/kernel/random/boot_id)
  in_host one 'for where in etc run; do
      printf "[Service]\nExecStart=/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n" >/$where/systemd/system/in-$where.service
    done
    echo x >/run/marker; echo x >/var/lib/marker; systemctl enable --quiet in-etc.service'
  check a_host_reboots "$lab" reboot one
  check it_is_another_boot negate prints "$boot_one" "$lab" run one cat /proc/sys/kernel/random/boot_id
  check a_unit_in_etc_survives "$lab" run one systemctl is-active in-etc.service
  check a_unit_in_run_does_not mentions 'could not be found' "$lab" run one systemctl status in-run.service
  check run_is_fresh negate "$lab" run one test -e /run/marker
  check the_disk_is_not "$lab" run one test -e /var/lib/marker
  check the_address_is_kept prints "$one" "$lab" ip one
  check the_journal_has_the_boot_before in_host one 'journalctl -b -1 -u caddy --no-pager | grep Started'

  check the_power_fails "$lab" kill one
  check then_nothing_runs mentions "does not run; start it with" "$lab" run one true
  check nor_answers negate curl -sf -m 2 "http://$one/"
  check it_starts_again "$lab" start one
  check with_its_services soon "$lab" run one systemctl is-active in-etc.service caddy.service
  check starting_twice_is_refused mentions 'runs already' "$lab" start one
  check a_reboot_from_inside_ends_it in_host one 'systemctl reboot || true'
  check and_start_brings_it_back bash -c "until ! '$lab' list | grep -q '^one.*up'; do sleep 0.1; done; '$lab' start one"

  # --- ssh as the runbook has it
  local ssh_path
  ssh_path=$("$lab" ssh-setup one "$scratch/ssh"):$PATH
  check ssh_by_name prints biz env PATH="$ssh_path" ssh biz hostname
  check ssh_is_admin prints admin env PATH="$ssh_path" ssh biz whoami
  check ssh_sudo_needs_no_password prints root env PATH="$ssh_path" ssh biz sudo whoami
  check ssh_passes_the_exit_code returns 3 env PATH="$ssh_path" ssh biz 'exit 3'
  check ssh_passes_stdin prints 'SECRET_KEY=x' bash -c \
    "export PATH='$ssh_path'; echo SECRET_KEY=x | ssh biz sudo tee /var/lib/file"
  check ssh_reads_the_journal mentions 'Started caddy' env PATH="$ssh_path" ssh biz sudo journalctl -u caddy -n 50
  check ssh_survives_a_new_host bash -c "'$lab' up one --hostname biz && '$lab' ssh-setup one '$scratch/ssh' &&
    PATH='$ssh_path' ssh biz true"

  # --- and nothing stays
  # The removal has the lock, or is through, before the other begins.
  check making_waits_for_a_removal bash -c "'$lab' down one & down=\$!
    while flock --nonblock '$OMNI_LAB_DIR/one' true 2>/dev/null; do sleep 0.01; done
    '$lab' up one && wait \$down && '$lab' run one true"
  left_one=$(belongings one)
  check two_removals_at_once bash -c "'$lab' down one & '$lab' down one && wait \$!"
  check down_leaves_nothing nothing_is_left "$left_one"
  check down_of_what_is_not_there "$lab" down one
  check the_other_host_is_unharmed curl -sSf -m 30 -o "$scratch/page" "http://$two/"
  check down_all "$lab" down-all
  check it_leaves_nothing nothing_is_left "$left_two"
  check not_even_its_folder negate test -e "$OMNI_LAB_DIR"
  local delay
  for delay in 0.05 0.15 0.25 0.4; do
    check "an_up_killed_after_${delay}_s_is_cleaned_up" interrupted_up "$delay"
  done
  check the_mounts_are_as_before diff "$scratch/mounts.before" <(mounts)
}

# --- scripts and units ------------------------------------------------------------------------------------------

test_sources() {
  local script unit root
  for script in "$top"/contrib/*.sh "$top"/contrib/systemd/*.sh "$top"/contrib/example/*.sh "$top"/tests/*.sh "$top"/tests/lab/*.sh; do
    check "shellcheck ${script#"$top"/}" shellcheck "$script"
  done
  "$lab" up verify
  root=$("$lab" root verify)/opt
  mkdir "$root/tests"
  cp -r "$top/contrib" "$root/"
  cp "$top/tests/nix_module.nix" "$root/tests/"
  for script in Cargo.toml src; do
    [[ ! -e $top/$script ]] || cp -r "$top/$script" "$root/"
  done
  # In the host, because Nix makes a store wherever it is asked something.
  for script in contrib/nix/module.nix contrib/nix/package.nix contrib/example/default.nix tests/nix_module.nix; do
    check "syntax of $script" "$lab" run verify nix-instantiate --parse "/opt/$script"
  done
  check the_nixos_module_yields_what_it_should prints true \
    "$lab" run verify nix-instantiate --eval --strict /opt/tests/nix_module.nix
  in_host verify 'install -D /bin/true /usr/local/bin/deployer
    install -D /bin/true /usr/local/lib/omni-deploy/caddy-start
    cp /opt/contrib/systemd/deployer.* /etc/systemd/system/
    cp -r /opt/contrib/systemd/caddy.service.d /etc/systemd/system/'
  for unit in deployer.service deployer.timer caddy.service; do
    # It exits 0 for lines it ignores: silence is the test.
    check "systemd-analyze verify $unit says nothing" prints '' \
      in_host verify "systemd-analyze verify --man=no --recursive-errors=no /etc/systemd/system/$unit 2>&1 || true"
  done 2>/dev/null
  check the_deployer_unit_scores_under_3 in_host verify \
    'systemd-analyze security --threshold=28 --offline=true /etc/systemd/system/deployer.service'
  "$lab" down verify
}

# --- installer and example --------------------------------------------------------------------------------------

# Stands for the deployer: does from within its unit what a deployer must be able to do, and what it must not.
write_stand_in() {
  cat >"$1" <<'TEXT'
#!/bin/bash
[[ ${1-} != --version ]] || { echo "omni-deploy stand-in"; exit 0; }
failed=0
can() { local said; if said=$("${@:2}" 2>&1); then echo "<6>can $1"; else echo "<3>cannot $1: $said"; failed=1; fi; }
cannot() { if ("${@:2}") >/dev/null 2>&1; then echo "<3>can $1, and should not"; failed=1; else echo "<6>cannot $1"; fi; }
nix() { command nix --extra-experimental-features nix-command "$@"; }
silent() { local said; said=$("$@" 2>&1); [[ -z $said ]] || { echo "$said"; return 1; }; }
echo "called $0 $*; key ${AWS_ACCESS_KEY_ID:-none}"
path=$(</var/lib/omni-deploy/path)
can "make a root" ln -sfn "$path" /nix/var/nix/gcroots/hello
can "copy a closure" nix copy --from file:///var/lib/omni-deploy/cache --no-check-sigs "$path"
can "root it" nix-store --realise "$path" --add-root /nix/var/nix/gcroots/hello-2
can "ask for its size" nix path-info --json --closure-size "$path"
can "write a unit" bash -c 'printf "[Service]\nType=exec\nDynamicUser=yes\nEnvironment=PORT=8123\nExecStart=%s/bin/hello\n" "$1" \
  >/etc/systemd/system/hello.service.new && mv /etc/systemd/system/hello.service{.new,}' - "$path"
can "verify it" silent systemd-analyze verify --man=no --recursive-errors=no /etc/systemd/system/hello.service
can "write a transient unit" bash -c 'mkdir -p /run/systemd/system && echo >/run/systemd/system/hello-next.service'
can "reload systemd" systemctl daemon-reload
# As a deployer does, or a quick machine meets the start limit.
can "restart a service" bash -c '{ systemctl reset-failed hello.service || true; } 2>/dev/null; systemctl restart hello.service'
can "enable it" systemctl enable deployer.timer
can "see another user's executable" readlink "/proc/$(systemctl show --property=MainPID --value caddy)/exe"
can "probe a service" curl -sSf --retry 20 --retry-connrefused --retry-delay 1 localhost:8123
if [[ -S /run/caddy/admin.sock ]]; then
  can "talk to Caddy" curl -sSf --unix-socket /run/caddy/admin.sock -H "Host;" localhost/config/
else
  can "talk to Caddy" curl -sSf localhost:2019/config/
fi
can "read a service's journal" bash -c 'journalctl --unit hello --lines 5 | grep hello'
can "write its state" bash -c 'echo {} >/var/lib/deployer/state.json'
can "write its report" bash -c 'mkdir -p /var/lib/omni-deploy/hosts && echo {} >/var/lib/omni-deploy/hosts/biz.json'
can "see the secrets' modes" stat /var/lib/deployer-secrets
cannot "write below /etc" touch /etc/touched
cannot "write below /usr" touch /usr/local/touched
cannot "write to root's home" touch /root/touched
cannot "write a secret" touch /var/lib/deployer-secrets/touched
cannot "mount" mount -t tmpfs none /mnt
cannot "become another user" setpriv --reuid=nobody true
exit "$failed"
TEXT
  chmod 755 "$1"
}

# until_idle HOST: waits until no pass is under way there, and none is asked for.
until_idle() {
  in_host "$1" "until [[ -z \$(systemctl list-jobs --no-legend 'deployer*') ]] &&
    [[ \$(systemctl is-active deployer) != *activating ]]; do sleep 0.1; done"
}

# asks_for_a_pass HOST SCRIPT: a pass begins that was not under way before.
asks_for_a_pass() {
  in_host "$1" 'until [[ $(systemctl is-active caddy) == active ]]; do sleep 0.1; done'
  until_idle "$1"
  in_host "$1" 'invocation() { systemctl show --property=InvocationID --value deployer; }
    old=$(invocation)
    '"$2"'
    for i in $(seq 600); do [[ $(invocation) == "$old" ]] || exit 0; sleep 0.1; done; exit 1'
}

# no_pass_by_itself HOST: until the next boot none begins but those that are asked for, and none is under way.
no_pass_by_itself() {
  in_host "$1" 'mkdir -p /run/systemd/system/deployer.timer.d
    printf "[Timer]\nOnBootSec=\nOnBootSec=1000d\n" >/run/systemd/system/deployer.timer.d/zz.conf
    systemctl daemon-reload
    systemctl try-restart deployer.timer 2>/dev/null || true   # which is not there before the installer has run'
  until_idle "$1"
}

# Every file and folder below the installer's places, with mode and hash, to compare before and after.
inventory='find /usr/local /etc/systemd /etc/sysctl.d /etc/omni-deploy /var/lib/deployer /var/lib/deployer-secrets \
  -printf "%p %m %U %l\n" 2>/dev/null | sort || true; find /usr/local/bin /etc/systemd /etc/sysctl.d -type f -exec sha256sum {} + | sort'

test_install() {
  local binary=${BINARY:-} root install='/opt/omni/contrib/install.sh /opt/omni/binary'
  "$lab" up target
  root=$("$lab" root target)
  mkdir -p "$root/opt/omni"
  cp -r "$top/contrib" "$root/opt/omni/contrib"
  if [[ -n $binary ]]; then cp "$binary" "$root/opt/omni/binary"; else write_stand_in "$root/opt/omni/binary"; fi
  in_host target "$inventory" >"$scratch/before"

  # The timer may begin one at any moment of its first 25 s, and that changes what is compared here.
  no_pass_by_itself target

  check install_needs_a_real_binary mentions 'is not an executable file' in_host target '/opt/omni/contrib/install.sh /etc/passwd'
  check install_needs_root mentions 'must be root' "$lab" run target setpriv --reuid=nobody --clear-groups /opt/omni/contrib/install.sh /bin/true
  check a_wrong_option_is_a_usage_error returns 2 in_host target '/opt/omni/contrib/install.sh --frobnicate'
  check a_refused_install_changes_nothing diff "$scratch/before" <(in_host target "$inventory")

  check a_foreign_unit_is_not_replaced in_host target 'echo "[Service]" >/etc/systemd/system/deployer.service
    ! '"$install"' 2>/tmp/said && grep -q "is not omni-deploy" /tmp/said
    [[ $(cat /etc/systemd/system/deployer.service) == "[Service]" ]]; rm /etc/systemd/system/deployer.service'
  check a_foreign_caddy_dropin_is_respected in_host target 'mkdir -p /etc/systemd/system/caddy.service.d
    printf "[Service]\nExecStart=\nExecStart=/usr/bin/caddy run\n" >/etc/systemd/system/caddy.service.d/mine.conf
    '"$install"' 2>&1 | grep "caddy: left alone"; [[ ! -e /etc/systemd/system/caddy.service.d/omni-deploy.conf ]]
    rm /etc/systemd/system/caddy.service.d/mine.conf'

  check install in_host target "$install"
  in_host target "$inventory" >"$scratch/installed"
  check a_second_install_says_so prints 'nothing to change' in_host target "$install"
  check and_changes_nothing diff "$scratch/installed" <(in_host target "$inventory")
  check secrets_folder_is_private prints '700 root' in_host target 'stat -c "%a %U" /var/lib/deployer-secrets'
  check the_names_work in_host target 'deployer --version && deploy-manifest --version && omni-deploy --version'
  check the_timer_waits prints 'active enabled' in_host target 'echo $(systemctl is-active deployer.timer) $(systemctl is-enabled deployer.timer)'
  check the_sysctl_holds prints 1 "$lab" run target cat /proc/sys/net/ipv4/tcp_migrate_req

  # The example, built with nothing, put into a cache and taken out of the store again.
  cp -r "$top/contrib/example" "$root/root/example"
  check the_example_builds in_host target 'path=$(nix-build --no-out-link example) && mkdir -p /var/lib/omni-deploy &&
    echo "$path" >/var/lib/omni-deploy/path &&
    nix copy --to "file:///var/lib/omni-deploy/cache?compression=zstd" "$path" && nix-store --delete "$path" &&
    [[ ! -e $path ]]'
  check its_versions_differ in_host target '[[ $(nix-build --no-out-link example --argstr greeting two) != $(cat /var/lib/omni-deploy/path) ]]'
  check the_broken_one_exits_at_once in_host target '! $(nix-build --no-out-link example --arg broken true)/bin/hello'
  in_host target 'umask 077; echo AWS_ACCESS_KEY_ID=test >/etc/omni-deploy/deployer.env'

  if [[ -z $binary ]]; then
    check the_unit_lets_a_deployer_work "$lab" run target systemctl start deployer
    check it_is_called_as_agreed mentions 'called /usr/local/bin/deployer run --timer; key test' \
      "$lab" run target journalctl --unit deployer --output cat --no-pager
    ((failed == 0)) || in_host target 'journalctl --unit deployer --output cat --no-pager | grep -vE "^can(not)? [^:,]*$"' || true
    check starting_often_is_allowed in_host target 'for i in $(seq 8); do systemctl start deployer; done'
    check what_it_started_outlives_the_pass "$lab" run target systemctl is-active hello.service

    # Caddy: routes given over the API outlive a restart, a kill, and ask for a pass.
    check caddy_resumes_what_it_was_given in_host target 'systemctl restart caddy
      at=(localhost:2019); [[ ! -S /run/caddy/admin.sock ]] || at=(--unix-socket /run/caddy/admin.sock -H "Host;" localhost)
      curl -sSf -X PUT -H "Content-Type: application/json" "${at[@]}"/config/apps/http/servers/srv0/routes/0 \
        -d "{\"@id\":\"deployer\",\"match\":[{\"path\":[\"/given\"]}],\"handle\":[{\"handler\":\"static_response\",\"body\":\"given\"}]}"
      systemctl restart caddy; [[ $(curl -sSf localhost/given) == given ]]'
    check caddy_comes_back_when_killed in_host target 'old=$(systemctl show --property=MainPID --value caddy); kill -KILL "$old"
      for i in $(seq 600); do sleep 0.1; [[ $(curl -s localhost/given) == given ]] && exit 0; done; exit 1'
    check a_caddy_restart_asks_for_a_pass asks_for_a_pass target 'systemctl restart caddy'
    check a_reload_of_the_caddyfile_too asks_for_a_pass target 'systemctl reload caddy'
    check a_reboot_runs_a_pass bash -c "'$lab' reboot target; until '$lab' run target journalctl -b -u deployer | grep Finished; do sleep 0.2; done"

    no_pass_by_itself target
    # A failed pass is a failed unit, and the timer goes on.
    check a_failed_pass_shows in_host target 'printf "#!/bin/sh\nexit 3\n" >/usr/local/bin/omni-deploy
      ! systemctl start deployer 2>/dev/null; [[ $(systemctl show --property=ExecMainStatus --value deployer) == 3 ]]
      systemctl is-failed deployer; [[ $(systemctl show --property=SubState --value deployer.timer) == waiting ]]'
    check children_die_with_a_pass in_host target 'printf "#!/bin/sh\nsleep 12345 &\nwait\n" >/usr/local/bin/omni-deploy
      systemctl start --no-block deployer
      for i in $(seq 600); do ! pgrep -f "^sleep 12345" >/dev/null || break; sleep 0.1; done; pgrep -f "^sleep 12345" >/dev/null
      systemctl kill --kill-whom=main --signal=KILL deployer
      for i in $(seq 600); do pgrep -f "^sleep 12345" >/dev/null || exit 0; sleep 0.1; done; exit 1'
    in_host target "$install" >/dev/null
  fi

  in_host target 'echo secret >/var/lib/deployer-secrets/x.env; printf "# Managed by omni-deploy: x\n[Service]\nExecStart=/bin/true\n" >/etc/systemd/system/mine.service'
  check uninstall_says_how_services_go mentions 'systemctl disable --now mine; rm ' in_host target '/opt/omni/contrib/install.sh --uninstall'
  check it_keeps_secrets_and_state in_host target 'test -e /var/lib/deployer-secrets/x.env -a -d /var/lib/deployer -a -e /etc/omni-deploy/deployer.env'
  check it_keeps_services in_host target 'test -e /etc/systemd/system/mine.service'
  check a_second_uninstall_has_nothing_to_do mentions 'nothing to change' in_host target '/opt/omni/contrib/install.sh --uninstall'
  check purge_takes_the_rest in_host target '/opt/omni/contrib/install.sh --uninstall --purge; rm -f /etc/systemd/system/{mine,hello}.service'
  check then_the_host_is_as_before diff "$scratch/before" <(in_host target "$inventory")
  check and_systemd_knows_no_deployer mentions 'could not be found' "$lab" run target systemctl status deployer.service
  "$lab" down target
}

((EUID == 0)) || { echo "selftest.sh: must be root; use sudo" >&2; exit 1; }
"$lab" packages
"$lab" down-all
test_lab
test_sources
test_install
printf '%d passed, %d failed\n' "$passed" "$failed"
((failed == 0))
