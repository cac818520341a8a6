#!/usr/bin/env bash
# Measures the figures that the design promises, each side by side with what one would use otherwise, and
# prints them as a table. Times are medians of several runs, taken in turns with the rival's, with everything
# warm in the page cache; the shortest run before everything else on the machine, the rival too, so that what
# else it does shows less. A figure that is missed is shown as missed; only what cannot be
# measured is an error. Needs root, because hosts are booted; nothing is left behind but built programs and
# Debian packages.
set -euo pipefail
export LC_ALL=C

top=$(dirname "$(dirname "$(readlink -f "$0")")")
lab=$top/tests/lab/lab.sh
GROUPS_OF_ROWS=(binary show store writers large push network fetch ship gigabyte idle hundred idle-500)

usage() {
  cat <<TEXT
usage: run.sh [GROUP...]        (as root)

groups: ${GROUPS_OF_ROWS[*]}; without one: all of them, which takes about three quarters of an hour after the build
The table goes to stdout, progress to stderr.

example: benches/run.sh show large >table.md
environment: CARGO_TARGET_DIR; OMNI_LAB_DIR, OMNI_LAB_NET (see tests/lab/lab.sh), here $OMNI_LAB_DIR and $OMNI_LAB_NET
TEXT
}

# Apart from hosts that somebody works with.
export OMNI_LAB_DIR=${OMNI_LAB_DIR:-/run/omni-lab-bench} OMNI_LAB_NET=${OMNI_LAB_NET:-10.242}

say() { printf 'bench: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

work=
servers=()

cleanup() {
  trap - EXIT
  local pid
  for pid in "${servers[@]}"; do
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true   # ended by our signal, which is what it says
  done
  if [[ -n $work ]]; then
    "$lab" down-all
    rm -rf "$work"
  fi
}

# --- the parts ------------------------------------------------------------------------------------------

build() {
  local crate
  export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$top/target}
  say "building for release (the first time takes minutes)"
  for crate in . tests/s3-server benches/meter; do
    (cd "$top/$crate" && cargo build --release --locked --quiet) >&2
  done
  release=$CARGO_TARGET_DIR/release
  omni=$release/omni-deploy
  meter=$release/omni-meter
}

# Nobody's configuration, credentials or proxies take part.
isolate() {
  local name
  for name in $(compgen -e); do
    case $name in
      AWS_* | OMNI_DEPLOY_* | NIX_* | XDG_* | *_proxy | *_PROXY) unset "$name" ;;
    esac
  done
  export HOME=$work/home
  mkdir -p "$HOME/.aws"
  printf '[default]\naws_access_key_id = bench\naws_secret_access_key = bench-secret\n' >"$HOME/.aws/credentials"
}

# serve ADDRESS: an S3 server with the bucket 'box'; sets $endpoint, $requests, its log, and $control, its control file.
serve() {
  local said=$work/server-$1 deadline=$((SECONDS + 20))
  requests=$work/requests-$1 control=$work/control-$1
  "$release/omni-test-s3" --root "$work/s3-$1" --listen "$1:0" --bucket box --user bench:bench-secret \
    --log "$requests" --control "$control" >"$said" &
  servers+=($!)
  until grep -qs ^listening "$said"; do
    ((SECONDS < deadline)) || die "the S3 server on $1 did not start"
    sleep 0.05
  done
  endpoint=$(sed -n 's|^listening http://||p' "$said")
}

s3() { printf 's3://box/%s?endpoint=%s&scheme=http&region=us-east-1' "$1" "$endpoint"; }

# The request that a script would make for the same object, as words.
curl_words() {
  printf '%s\n' curl --fail --silent --show-error --aws-sigv4 aws:amz:us-east-1:s3 --user bench:bench-secret \
    --header x-amz-content-sha256:UNSIGNED-PAYLOAD "http://$endpoint/box/$1"
}

# slow_down CONTROL MS: each answer of the server that looks at this file takes so long.
slow_down() { jq -n --argjson ms "$2" '{delay_ms: $ms}' >"$1.new" && mv "$1.new" "$1"; }

# A fresh host named $1 with our programs and the credentials in it.
host() {
  say "booting a host"
  "$lab" up "$1" --caddyfile "$top/benches/Caddyfile" >&2
  # shellcheck disable=SC2034  # for the rows
  gateway=$("$lab" gateway "$1")
  root=$("$lab" root "$1")
  install -m 755 "$omni" "$meter" "$root/usr/local/bin/"
  ln -sf omni-deploy "$root/usr/local/bin/deployer"
  ln -sf omni-deploy "$root/usr/local/bin/deploy-manifest"
  mkdir -p "$root/root/.aws" "$root/etc/omni-deploy"
  cp "$HOME/.aws/credentials" "$root/root/.aws/"
}

# on HOST COMMAND...
on() { "$lab" run "$@"; }

# publish HOST FILE: FILE becomes the manifest of the store that HOST is configured for.
publish() { on "$1" env EDITOR="cp $2" deploy-manifest edit 2>/dev/null; }

# --- the table --------------------------------------------------------------------------------------------

calc() { awk "BEGIN { printf \"%.${2:-2}f\", ($1) }"; }
holds() { awk "BEGIN { exit !($1) }" && echo yes || echo NO; }

# A time in milliseconds, for people.
ms() { awk -v t="$1" 'BEGIN { if (t < 10) printf "%.1f ms", t; else if (t < 1000) printf "%.0f ms", t; else printf "%.2f s", t / 1000 }'; }
mib() { awk -v k="$1" 'BEGIN { printf "%.1f MiB", k / 1024 }'; }

# row WHAT OURS RIVAL RATIO FIGURE MET
row() {
  local IFS='|'
  printf '%s\n' "$*" >>"$work/rows"
  say "$1: $2, rival $3, ratio $4, figure $5: $6"
}

table() {
  {
    printf '%s\n' 'what|omni-deploy|rival|ratio|figure to reach|met' '-|-|-|-|-|-'
    cat "$work/rows"
  } | awk -F'|' '
    { for (i = 1; i <= 6; i++) { cell[NR, i] = $i; if (length($i) > width[i]) width[i] = length($i) } }
    END {
      for (r = 1; r <= NR; r++) {
        line = "|"
        for (i = 1; i <= 6; i++) {
          text = cell[r, i]
          pad = width[i] - length(text)
          if (r == 2) text = "-"
          while (pad-- > 0 || (r == 2 && length(text) < width[i])) text = text (r == 2 ? "-" : " ")
          line = line " " text " |"
        }
        print line
      }
    }'
}

version_of() { "$@" 2>/dev/null | grep -o '[0-9][0-9.]*[0-9]' | head -n 1; }

# What it was measured on, in general terms.
machine() {
  local system
  # shellcheck source=/dev/null disable=SC2153
  system=$(. /etc/os-release && echo "$NAME ${VERSION_ID:-}")
  printf 'Measured on %s with %s cores, %s, Linux %s, systemd %s, Caddy %s, Nix %s.\n\n' "$(date -u +%F)" "$(nproc)" \
    "${system/ GNU\/Linux/}" "$(uname -r | grep -o '^[0-9]*\.[0-9]*')" "$(version_of systemctl --version)" \
    "$(version_of caddy version)" "$(version_of nix --version)"
}

main() {
  local group begun
  case ${1:-} in
    -h | --help) usage; return 0 ;;
  esac
  for group; do
    [[ " ${GROUPS_OF_ROWS[*]} " == *" $group "* ]] || { usage >&2; exit 2; }
  done
  ((EUID == 0)) || die "hosts are booted as root; use sudo"
  (($#)) || set -- "${GROUPS_OF_ROWS[@]}"
  "$lab" packages
  build
  trap cleanup EXIT
  trap 'exit 130' INT TERM
  work=$(mktemp -d)
  isolate
  : >"$work/rows"
  for group; do
    say "--- $group"
    begun=$SECONDS
    # shellcheck source=/dev/null
    . "$top/benches/rows/$group.sh"
    say "--- $group took $((SECONDS - begun)) s"
  done
  machine
  table
}

main "$@"
