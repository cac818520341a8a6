# What people ask of a store that has grown: of a thousand hosts, of ten thousand versions, of a service that never changed;
# and what a hostile one costs them.
# shellcheck shell=bash
# shellcheck disable=SC2154  # set by run.sh

serve 127.0.0.1
folder=$work/s3-127.0.0.1/box

# times MS COMMAND...: what a command takes where each request takes so long.
times() {
  local time
  slow_down "$control" "$1"
  shift
  read -r time _ < <("$meter" --runs 5 --warmup 1 -- "$@") || die "$* failed"
  slow_down "$control" 0
  printf '%s\n' "$time"
}

# rounds COMMAND...: how many requests it makes one after the other, by what a delay of each adds.
rounds() { calc "($(times 200 "$@") - $(times 0 "$@")) / 200" 1; }

# --- a thousand hosts -------------------------------------------------------------------------------------

store=$(s3 hosts)
"$omni" manifest init --store "$store" 2>/dev/null
"$top/benches/services.sh" 1000 1000 >"$work/manifest.json"
EDITOR="cp $work/manifest.json" "$omni" manifest edit --store "$store" 2>/dev/null
mkdir -p "$folder/hosts/hosts"
"$omni" manifest show --store "$store" | jq -c '.serial as $serial | .generation as $generation | .services[]
  | {version: 1, host: .hosts[0], deployer: "bench", $serial, $generation, checkedAt: (now | todate), changedAt: null,
     reported: true, route: {status: "current", reason: null},
     services: {(.name): {name, storePath: .artifact.storePath, status: "running", since: $generation, previous: []}}}' |
  while IFS= read -r report; do
    host=${report#*'"host":"'}
    printf '%s\n' "$report" >"$folder/hosts/hosts/${host%%'"'*}.json"
  done
count=$(find "$folder/hosts/hosts" -name '*.json' | wc -l)
took=$(rounds "$omni" status --store "$store")
row "status of $count hosts: round trips" "$took" - - '20' "$(holds "$took > 0 && $took <= 20 && $count == 1000")"

# --- ten thousand versions, fifty a day -------------------------------------------------------------------

store=$(s3 versions)
mkdir -p "$folder/versions/manifests"
jq -ncr 'range(1; 10001) as $n | (1700000000 + 1728 * $n) as $time
  | "manifest-\($time | strftime("%Y%m%dT%H%M%SZ"))-\($n | tostring | "0" * (8 - length) + .).json "
    + ({version: 1, serial: $n, generation: ($time | todate), change: {action: "update web", by: "bench"},
        services: [{name: "web", artifact: {type: "nix-closure", storePath: "/nix/store/\($n | tostring | "0" * (32 - length) + .)-web"}}]}
      | tojson)' |
  while read -r name text; do
    printf '%s\n' "$text" >"$folder/versions/manifests/$name"
  done
newest=$(find "$folder/versions/manifests" -name '*-00010000.json')
mv "$newest" "$folder/versions/manifest.json"
count=$(($(find "$folder/versions/manifests" -name '*.json' | wc -l) + 1))
before=$(wc -l <"$requests")
shown=$("$omni" manifest list --store "$store" --json | jq '.versions | length')
lists=$(tail -n +$((before + 1)) "$requests" | grep -c '^GET /box [0-9]' || true)
took=$(rounds "$omni" manifest list --store "$store")
row "list with $count versions: LISTs" "$lists, $took round trips for the newest $shown" - - '1 or 2' \
  "$(holds "$lists >= 1 && $lists <= 2 && $count == 10000 && $shown > 1")"

# --- a service that never differed ------------------------------------------------------------------------

store=$(s3 rollback)
"$omni" manifest init --store "$store" 2>/dev/null
"$top/benches/services.sh" 2 1 >"$work/manifest.json"
EDITOR="cp $work/manifest.json" "$omni" manifest edit --store "$store" 2>/dev/null
for i in {1..200}; do
  "$omni" manifest update --store "$store" web-00001 "$(printf '/nix/store/%032d-web' $((1000 + i)))" 2>/dev/null
done
# It finds nothing to go back to, and says so.
"$omni" manifest rollback --service web-00002 --store "$store" >"$work/rollback" 2>&1 && die "rollback found something: $(cat "$work/rollback")"
took=$(times 30 sh -c '! "$@"' - "$omni" manifest rollback --service web-00002 --store "$store")
row 'rollback --service of one that never differed in 200 versions, 30 ms a request' "$(ms "$took")" - - '1 s' "$(holds "$took <= 1000")"

# --- a hostile one ----------------------------------------------------------------------------------------

mkdir -p "$folder/hostile"
{
  printf '{"version":1,"serial":1,"generation":"2026-11-22T00:00:00Z","services":[],"unknown":['
  yes '{"":0},' | tr -d '\n' | head -c 33000000 || true
  printf '0]}'
} >"$folder/hostile/manifest.json"
"$omni" manifest show --store "$(s3 hostile)" >"$work/hostile" 2>&1 && die "a hostile manifest was read"
read -r took _ _ peak _ < <("$meter" --runs 3 --warmup 0 -- sh -c '! "$@"' - "$omni" manifest show --store "$(s3 hostile)") ||
  die "a hostile manifest was read"
row "a manifest of 32 MiB with millions of values is rejected" "$(mib "$peak"), $(ms "$took")" - - '< 200 MiB' "$(holds "$peak < 200 * 1024")"
