#!/usr/bin/env bash
# The long tests on booted hosts, which take longer than a change should wait: a pass killed at every point it has,
# and made to fail at every write, and events in random orders. As root; tests/run.sh runs all others.
#   tests/campaign.sh [TEST NAME]        for example: tests/campaign.sh kill::
set -euo pipefail

cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-$PWD/target}
export CARGO_TARGET_DIR=$target
export OMNI_TEST_S3=${OMNI_TEST_S3:-$target/debug/omni-test-s3}
if [[ ! -x $OMNI_TEST_S3 ]]; then cargo build --locked --manifest-path tests/s3-server/Cargo.toml; fi
if (($#)); then names=("$@"); else names=(kill:: writes:: order::); fi
exec cargo test --locked --features campaign --test host -- --nocapture "${names[@]}"
