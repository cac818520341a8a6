#!/usr/bin/env bash
# Builds from no more than what contrib/nix/package.nix gives to Nix: a file that it forgets fails here, and not at
# the first user with nixpkgs.
set -euo pipefail

top=$(dirname "$(dirname "$(readlink -f "$0")")")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$top"

# As much of nixpkgs as the package needs to say what its source is.
# shellcheck disable=SC2016  # the expression is Nix's
expression='
  let
    package = import ./contrib/nix/package.nix {
      lib = {
        importTOML = file: builtins.fromTOML (builtins.readFile file);
        fileset = { toSource = source: source; unions = files: files; };
        optionalString = condition: text: if condition then text else "";
        licenses.mit = "mit";
        platforms.linux = [ ];
      };
      stdenv = { buildPlatform.canExecute = _: true; hostPlatform = { }; };
      rustPlatform.buildRustPackage = attributes: attributes;
      installShellFiles = null;
    };
  in map toString package.src.fileset'
mapfile -t files < <(nix-instantiate --eval --strict --json --expr "$expression" | jq -r '.[]')
((${#files[@]} > 0)) || { echo 'contrib/nix/package.nix names no files' >&2; exit 1; }

cp -r --parents -- "${files[@]#"$top"/}" "$scratch"
cd "$scratch"
cargo check --locked --bin omni-deploy
[[ -x contrib/push.sh && -x contrib/ship.sh ]]
echo "Nix builds from $(find . -type f | wc -l) files"
