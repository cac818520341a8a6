# omni-deploy from this checkout: nix-build -E 'with import <nixpkgs> { }; callPackage ./contrib/nix/package.nix { }'
{ lib, stdenv, rustPlatform, installShellFiles }:
let
  manifest = (lib.importTOML ../../Cargo.toml).package;
in
rustPlatform.buildRustPackage {
  pname = manifest.name;
  inherit (manifest) version;

  # Only what cargo wants to see, so that an edited page or test does not rebuild it.
  src = lib.fileset.toSource {
    root = ../..;
    fileset =
      lib.fileset.unions [ ../../Cargo.toml ../../Cargo.lock ../../src ../../examples ../../docs/man ../push.sh ../ship.sh ];
  };
  cargoLock.lockFile = ../../Cargo.lock;

  nativeBuildInputs = [ installShellFiles ];

  # They need systemd, Nix, Caddy and root at hand: tests/run.sh runs them.
  doCheck = false;

  postInstall = ''
    ln -s omni-deploy $out/bin/deploy-manifest
    ln -s omni-deploy $out/bin/deployer
    install -m 755 contrib/push.sh contrib/ship.sh $out/bin/
  '' + lib.optionalString (stdenv.buildPlatform.canExecute stdenv.hostPlatform) ''
    for page in omni-deploy.1 deploy-manifest.1 deployer.8; do
      $out/bin/omni-deploy man "$page" >"$page"
      installManPage "$page"
    done
    installShellCompletion --cmd omni-deploy \
      --bash <($out/bin/omni-deploy completions bash) \
      --zsh <($out/bin/omni-deploy completions zsh) \
      --fish <($out/bin/omni-deploy completions fish)
  '';

  meta = {
    inherit (manifest) description;
    license = lib.licenses.mit;
    mainProgram = "omni-deploy";
    platforms = lib.platforms.linux;
  };
}
