#!/usr/bin/env bash
# omni-deploy ship under the name that people link, such as Omni/Ide/ship.sh: the one beside this file, else on PATH.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
omni=$(PATH=$here:$PATH:$here/../target/release command -v omni-deploy) || {
  echo "ship.sh: no omni-deploy in $here or on PATH; build it with 'cargo build --release', or install it" >&2
  exit 127
}
exec "$omni" ship "$@"
