# Pushing a closure of 41 paths and 105 MiB to S3, against Nix's own copy of it to a directory.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

host bench-push
serve "$gateway"

# Programs and libraries of this machine, cut in 41 parts of growing size; each part refers to the one before
# it and to one further back, so that the last one's closure is all of them.
cat >"$root/tmp/closure.nix" <<'NIX'
let
  unit = 105 * 1024 * 1024 / 861; # 1 + 2 + … + 41
  part = i: derivation {
    name = "part-${toString i}";
    system = builtins.currentSystem;
    builder = "/bin/sh";
    PATH = "/usr/bin:/bin";
    size = unit * i;
    skip = unit * i * (i - 1) / 2;
    refs = if i == 1 then [ ] else [ (part (i - 1)) (part ((i + 1) / 2)) ];
    args = [ "-c" "mkdir -p $out/bin; echo $refs >$out/refs; tail -c +$((skip + 1)) /tmp/material | head -c $size >$out/bin/part" ];
  };
in part 41
NIX
# shellcheck disable=SC2016  # for the host's shell
closure=$(on bench-push bash -euc '
  find /usr/bin /usr/lib -xdev -type f -size +64k \( -perm -u+x -o -name "*.so*" \) -print0 | sort -z |
    { xargs -0 cat 2>/dev/null || true; } | head -c 105M >/tmp/material
  nix-build --no-out-link /tmp/closure.nix 2>/dev/null')
on bench-push rm /tmp/material
paths=$(on bench-push nix-store --query --requisites "$closure" | wc -l)
bytes=$(on bench-push nix-store --query --requisites "$closure" | on bench-push xargs nix-store --query --size | awk '{ s += $1 } END { print s }')

runs=5 warmup=1
for ((i = 1; i <= runs + warmup; i++)); do
  store=$(s3 "manifest-$(printf '%04d' "$i")")
  on bench-push deploy-manifest init --store "$store" 2>/dev/null
  on bench-push deploy-manifest add-service '{"name":"part","artifact":{"storePath":"/nix/store/placeholder"},"hosts":["biz"]}' \
    --store "$store" 2>/dev/null
done
push=(omni-deploy push "$closure" --service part --store "$(s3 'manifest-{}')" --cache "$(s3 'cache-{}')")
copy=(nix --extra-experimental-features nix-command copy --to 'file:///tmp/cache-{}?compression=zstd' "$closure")
on bench-push omni-meter --runs $runs --warmup $warmup -- "${push[@]}" ::: "${copy[@]}" >"$work/push"
read -r ours _ _ peak _ <"$work/push"
read -r rival _ < <(tail -n 1 "$work/push")
row "push of $paths paths, $(calc "$bytes / 1048576" 0) MiB to S3 on loopback, against nix copy --to file://" "$(ms "$ours"), $(mib "$peak")" "$(ms "$rival")" \
  "$(calc "$ours / $rival")" '1.4 x' "$(holds "$ours <= 1.4 * $rival")"

read -r ours _ < <(on bench-push omni-meter --runs 15 --warmup 1 -- "${push[@]//'{}'/0001}")
row 'the same again, nothing to copy' "$(ms "$ours")" - - '< 0.5 s' "$(holds "$ours < 500")"
"$lab" down bench-push
