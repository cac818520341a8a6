# A pass with nothing to do on a host of 500 services.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

[[ -n ${fleet:-} ]] || . "$top/benches/fleet.sh"
grow 500
on "$fleet" deployer run 2>/dev/null
idle 500
