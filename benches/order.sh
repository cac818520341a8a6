#!/usr/bin/env bash
# The whole order campaign on booted hosts (tests/host/order.rs): STEPS random edits, faults, hand edits, reboots
# and passes for each folder that units may be in, with fresh seeds unless SEED is given. As root.
#   benches/order.sh [STEPS [SEED]]
set -euo pipefail

cd "$(dirname "$0")/.."
export OMNI_ORDER_HOST_STEPS=${1:-2000}
seed=${2:-$(date +%s)}
for units in etc run; do
  OMNI_ORDER_SEED=$seed OMNI_ORDER_UNITS=$units cargo test --locked --test host -- \
    order::any_order_of_events_ends_as_the_manifest_says --exact --nocapture
done
