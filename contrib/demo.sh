#!/usr/bin/env bash
# Shows the whole loop on a throw-away host that has everything on it: deploy, change, break, roll back.
# Needs root and Rust; installs Debian's packages, and leaves nothing behind but them, the build in target/ and the base
# tree of its host (tests/lab/lab.sh), which is made once.
set -euo pipefail

top=$(dirname "$(dirname "$(readlink -f "$0")")")
export OMNI_LAB_DIR=/run/omni-deploy-demo
lock=/run/omni-deploy-demo.lock
target=${CARGO_TARGET_DIR:-$top/target}

usage() {
  cat <<'TEXT'
usage: demo.sh [BINARY]        (as root)

  BINARY    the omni-deploy to show (default: this checkout's release build, made first if there is none)

example: sudo contrib/demo.sh
TEXT
}

die() { printf 'demo.sh: %s\n' "$*" >&2; exit 1; }

# Nothing that is started may keep the lock, or a host that outlives a killed demo would.
lab() { "$top/tests/lab/lab.sh" "$@" 8>&-; }

tell() {
  if [[ -t 1 && -z ${NO_COLOR:-} ]]; then printf '\n\e[1m# %s\e[0m\n' "$*"; else printf '\n# %s\n' "$*"; fi
}

# types CODE COMMAND: types a command on the host and shows what it answers, which must end with that exit code.
types() {
  local code=0
  printf '$ %s\n' "$2"
  lab run demo bash -c "cd /root/example; $2" 2>&1 || code=$?
  ((code == $1)) || die "that ended with exit code $code instead of $1"
}

# visits PAGE: a visitor's request from outside the host, which must be answered with that page.
visits() {
  local page
  printf "$ curl -H 'Host: hello.example.com' http://%s/\n" "$ip"
  page=$(curl -sSf -m 20 -H 'Host: hello.example.com' "http://$ip/")
  printf '%s\n' "$page"
  [[ $page == "$1" ]] || die "'$1' should have been served"
}

# Rust links with the system's C compiler.
install_compiler() {
  local -a packages=(gcc libc6-dev)
  {
    apt-get install -y --no-install-recommends "${packages[@]}" ||
      { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"; }
  } >&2 </dev/null 8>&- || die "no C compiler: install ${packages[*]}"
}

find_binary() {
  if [[ -z $binary ]]; then
    binary=$target/release/omni-deploy
    if [[ ! -x $binary ]]; then
      command -v cargo >/dev/null || die "no cargo on PATH; install Rust's toolchain or name a built omni-deploy"
      command -v cc >/dev/null || install_compiler
      tell "building omni-deploy; this is done once"
      (cd "$top" && cargo build --release --locked --target-dir "$target") 8>&-
    fi
  fi
  [[ -f $binary && -x $binary ]] || die "'$binary' is not a program; name a built omni-deploy"
}

# shellcheck disable=SC2016  # typed on the host, expanded there
show() {
  local root
  tell "a Debian host with systemd, Caddy and Nix: booted for this from a tree of its own"
  lab up demo
  ip=$(lab ip demo)
  root=$(lab root demo)
  mkdir -p "$root/opt/omni-deploy"
  cp -r "$top/contrib" "$root/opt/omni-deploy/"
  cp "$binary" "$root/opt/omni-deploy/"
  cp -r "$top/contrib/example" "$root/root/"
  types 0 '/opt/omni-deploy/contrib/install.sh /opt/omni-deploy/omni-deploy'
  types 0 "echo '{\"caddyServer\": \"srv0\"}' >/etc/omni-deploy/config.json   # Debian's server, on port 80"

  tell "a service: what it is called, where it is reached, how it shows that it is well"
  types 0 "deploy-manifest add-service '{
  \"name\": \"hello\", \"artifact\": {\"storePath\": \"/nix/store/placeholder\"}, \"env\": {\"PORT\": \"8080\"},
  \"http\": {\"domain\": \"hello.example.com\", \"internalPort\": 8080},
  \"health\": {\"path\": \"/health\", \"timeoutSec\": 10}}'"

  tell "built by Nix, cached, published, and live"
  types 0 'omni-deploy ship --service hello ./default.nix'
  visits 'Hello from version 1'

  tell "a change"
  types 0 'sed -i "s/Hello from version 1/Hello, version 2/" default.nix'
  types 0 'omni-deploy ship --service hello ./default.nix'
  visits 'Hello, version 2'

  tell "a release that does not come up: rejected, and the previous one keeps serving"
  types 0 'sed -i "s/broken ? false/broken ? true/" default.nix'
  types 3 'omni-deploy ship --service hello ./default.nix'
  visits 'Hello, version 2'
  types 3 'omni-deploy status'

  tell "back to the version before, then to the first; history only grows"
  types 0 'deploy-manifest rollback --yes && systemctl start deployer'
  types 0 'omni-deploy status'
  types 0 'deploy-manifest list'
  first=$(lab run demo deploy-manifest list --json | jq -r '.versions[] | select(.serial == 2).name')
  types 0 "deploy-manifest rollback $first && systemctl start deployer"
  visits 'Hello from version 1'

  tell "what the deployer did, in its own words"
  types 0 'omni-deploy logs deployer -n 200 | grep " deployer\[" | cut -d" " -f4-'
}

main() {
  binary=
  case ${1:-} in
    -h | --help) usage; return 0 ;;
    -*) printf "demo.sh: '%s' is not an option; see 'demo.sh --help'\n" "$1" >&2; exit 2 ;;
    *) binary=${1:-} ;;
  esac
  ((EUID == 0)) || die "must be root, because it boots a host; use sudo"
  exec 8>"$lock"
  flock --nonblock 8 || die "another demo is running on this machine"
  trap 'lab down-all; rm -f "$lock"' EXIT
  trap 'exit 130' INT TERM HUP
  lab packages
  find_binary
  show
  tell "that was all; the host goes away"
}

main "$@"
