# One path of a gigabyte, pushed and fetched: what memory of ours that takes, without Nix's own. OMNI_BENCH_LARGE_MIB is
# another size. It is several times in the memory of this machine, where the hosts' disks are.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

[[ -n ${dev:-} ]] || . "$top/benches/pair.sh"

mib_of_path=${OMNI_BENCH_LARGE_MIB:-1024}
# Half of it as hard to pack as it gets.
# shellcheck disable=SC2016  # for the host's shell
path=$(on "$dev" bash -euc '
  rm -rf /tmp/giga && mkdir -p /tmp/giga/giga/bin
  printf "#!/bin/sh\nexec sleep 1000000\n" >/tmp/giga/giga/bin/giga
  chmod 755 /tmp/giga/giga/bin/giga
  head -c "$(($1 / 2))M" /dev/urandom >/tmp/giga/giga/random
  yes "a line that is easy to pack" | head -c "$(($1 / 2))M" >/tmp/giga/giga/lines || true
  nix-store --add /tmp/giga/giga
  rm -rf /tmp/giga' - "$mib_of_path")
network none
new_store giga giga
configure
alone=(omni-meter --alone --runs 1 --warmup 0 --)
read -r took _ _ peak _ < <(on "$dev" "${alone[@]}" omni-deploy push "$path" --service giga --store "$store" --cache "$caches") ||
  die "the push failed"
row "push of one path of $mib_of_path MiB, loopback: memory of ours" "$(mib "$peak"), $(ms "$took")" - - '32 MiB' "$(holds "$peak <= 32 * 1024")"
read -r took _ _ peak _ < <(on bench-0 "${alone[@]}" deployer run) || die "the pass failed"
row "host's fetch of it: memory of ours" "$(mib "$peak"), $(ms "$took")" - - '32 MiB' "$(holds "$peak <= 32 * 1024")"
