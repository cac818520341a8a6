#!/usr/bin/env bash
# The long tests on booted hosts: a pass killed at every point it has, and made to fail at every write, and events
# in random orders. tests/run.sh runs them with all others; this runs them alone, and shows how far they are. As root.
#   tests/campaign.sh [TEST NAME]        for example: tests/campaign.sh kill::
#   OMNI_ORDER_SEED=random OMNI_ORDER_HOST_STEPS=2000 tests/campaign.sh order::
set -euo pipefail

cd "$(dirname "$0")/.."
if (($#)); then names=("$@"); else names=(kill:: writes:: order::); fi
exec cargo test --locked --features campaign --test host -- --nocapture "${names[@]}"
