# omni-deploy from this checkout: nix-build -E 'with import <nixpkgs> { }; callPackage ./contrib/nix/package.nix { }'
{ lib, stdenv, rustPlatform, installShellFiles }:
let
  manifest = (lib.importTOML ../../Cargo.toml).package;
in
rustPlatform.buildRustPackage {
  pname = manifest.name;
  inherit (manifest) version;

  # Only what is compiled, so that an edited page or test does not rebuild it.
  src = lib.fileset.toSource {
    root = ../..;
    fileset = lib.fileset.unions [ ../../Cargo.toml ../../Cargo.lock ../../src ../push.sh ../ship.sh ];
  };
  cargoLock.lockFile = ../../Cargo.lock;

  nativeBuildInputs = [ installShellFiles ];

  # The tables in the modules; the other storeys need systemd, Nix and Caddy at hand.
  cargoTestFlags = [ "--lib" ];

  postInstall = ''
    ln -s omni-deploy $out/bin/deploy-manifest
    ln -s omni-deploy $out/bin/deployer
    install -m 755 contrib/push.sh contrib/ship.sh $out/bin/
  '' + lib.optionalString (stdenv.buildPlatform.canExecute stdenv.hostPlatform) ''
    $out/bin/omni-deploy man >omni-deploy.1
    installManPage omni-deploy.1
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
