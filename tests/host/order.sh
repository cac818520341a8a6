# shellcheck shell=bash
# What the order test looks at on its host, as sections that begin with a record separator and a title.
# Sourced, with the folder of the units.
export OMNI_DEPLOY_SETTLE_MS=250
units=$1
names=(s0 s1 s2 s3 s4)

section() { printf '\036%s\n' "$1"; }

look() {
  local name file path pid version
  section manifest; cat /var/lib/omni-deploy/manifest.json 2>/dev/null || true
  section kept; cat /var/lib/deployer/manifest.json 2>/dev/null || true
  section state; cat /var/lib/deployer/state.json 2>/dev/null || true
  section report; cat /var/lib/omni-deploy/hosts/solo.json 2>/dev/null || true
  section overrides; cat /var/lib/deployer/overrides.json 2>/dev/null || true
  section intent; cat /var/lib/deployer/intent.json 2>/dev/null || true
  for file in /var/lib/deployer/applied/*.json; do
    [[ ! -e $file ]] || { section "applied $(basename "$file" .json)"; cat "$file"; }
  done
  section facts
  [[ ! -d /var/lib/omni-deploy ]] || echo "bucket up"
  [[ ! -e /var/lib/deployer/state.json ]] || echo state
  if caddy-api /config/apps/http/servers -m 5 -o /tmp/caddy; then
    echo "caddy up"
    section caddy; cat /tmp/caddy
  fi
  section show
  systemctl show --property=Id,LoadState,ActiveState,SubState,MainPID,InvocationID,NeedDaemonReload "${names[@]}"
  for name in "${names[@]}"; do
    section "unit $name"
    if [[ -L $units/$name.service ]]; then
      printf -- '-> %s' "$(readlink "$units/$name.service")"
    elif [[ -e $units/$name.service ]]; then
      cat "$units/$name.service"
    fi
    pid=$(systemctl show --property=MainPID --value "$name")
    section "exe $name"
    [[ $pid == 0 ]] || readlink "/proc/$pid/exe" | tr -d '\n'
    file=/var/lib/deployer-secrets/$name.env
    section "secrets $name"
    if [[ -L $file || ! -e $file ]]; then
      printf bad
    else
      stat -c '%a %u %Y %s %i' "$file" | sed 's/^600 0/good/'
    fi
  done
  section wanted; (cd "$units/multi-user.target.wants" 2>/dev/null && ls) || true
  section roots; (cd /nix/var/nix/gcroots/omni-deploy 2>/dev/null && find . -mindepth 2 -printf '%P\n') || true
  section left
  find "$units" "$units/multi-user.target.wants" /var/lib/deployer /var/lib/deployer/applied \
    -maxdepth 1 -name '.omni-deploy-*' 2>/dev/null || true
  find /nix/var/nix/gcroots/omni-deploy -name '.omni-deploy-*' 2>/dev/null || true
  find "$units" -name '*-next.service' 2>/dev/null || true
  section present
  for version in /opt/v/*; do path=$(<"$version"); [[ ! -e $path ]] || echo "$path"; done
  section cached
  for version in /opt/v/*; do
    path=$(<"$version"); file=${path#/nix/store/}
    [[ ! -e /var/lib/omni-deploy/${file%%-*}.narinfo ]] || echo "$path"
  done
  section plan
  if [[ ${1-} == plan ]]; then deployer plan --json 2>/dev/null | jq .empty || true; fi
}
