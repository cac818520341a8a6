# Evaluates contrib/nix with just enough of nixpkgs' library to see what comes out, where no nixpkgs is at hand.
# Prints true, or fails with the property that does not hold.
#
#   nix-instantiate --eval --strict tests/nix_module.nix
let
  lib = {
    mkOption = option: option;
    mkEnableOption = _: { default = false; };
    mkIf = condition: content: { inherit condition content; };
    mkMerge = contents: { inherit contents; };
    mkDefault = value: value;
    mkForce = value: value;
    mkAfter = value: value;
    literalExpression = text: text;
    optional = condition: value: if condition then [ value ] else [ ];
    optionalString = condition: text: if condition then text else "";
    filterAttrs = keep: set: removeAttrs set
      (builtins.filter (name: !keep name set.${name}) (builtins.attrNames set));
    importTOML = file: builtins.fromTOML (builtins.readFile file);
    fileset = { toSource = source: source; unions = files: files; };
    licenses.mit = "mit";
    platforms.linux = [ "x86_64-linux" ];
    types = {
      str = "str";
      bool = "bool";
      package = "package";
      listOf = type: [ type ];
      nullOr = type: { inherit type; };
    };
  };

  # Merges plain attribute sets and the conditions and lists of them that the module is made of.
  flatten = value:
    if value ? condition then (if value.condition then flatten value.content else { })
    else if value ? contents then builtins.foldl' merge { } (map flatten value.contents)
    else value;
  merge = a: b:
    if builtins.isAttrs a && builtins.isAttrs b then
      a // builtins.mapAttrs (name: value: if a ? ${name} then merge a.${name} value else value) b
    else b;

  evaluate = { caddy ? false, enableReload ? true, overlay ? { }, ... }@values:
    let
      module = import ../contrib/nix/module.nix {
        inherit lib;
        pkgs = {
          callPackage = _: _: "/nix/store/omni-deploy";
          openssh = "/nix/store/openssh";
          util-linux = "/nix/store/util-linux";
          coreutils = "/nix/store/coreutils";
          # The text itself, so that it can be looked into and run.
          writeShellScript = _: text: text;
        };
        config = {
          system.etc = { inherit overlay; };
          services.caddy = { enable = caddy; package = "/nix/store/caddy"; inherit enableReload; configFile = "/nix/store/caddyfile"; };
          services.omni-deploy = builtins.mapAttrs (_: option: option.default) module.options.services.omni-deploy
            // { enable = true; } // removeAttrs values [ "caddy" "enableReload" "overlay" ];
          nix.package = "/nix/store/nix";
          systemd.package = "/nix/store/systemd";
        };
      };
    in
    { options = module.options.services.omni-deploy; config = flatten module.config; };

  file = result: builtins.fromJSON result.config.environment.etc."omni-deploy/config.json".text;
  plain = evaluate { };
  full = evaluate {
    caddy = true;
    store = "s3://releases";
    trustedPublicKeys = [ "ann:key" ];
    unitDir = "/run/systemd/system";
  };

  restarted = evaluate { caddy = true; enableReload = false; };
  caddyOf = result: result.config.systemd.services.caddy.serviceConfig;
  has = part: text: builtins.length (builtins.split part text) > 1;

  package = import ../contrib/nix/package.nix {
    inherit lib;
    stdenv = { buildPlatform.canExecute = _: true; hostPlatform = { }; };
    rustPlatform.buildRustPackage = arguments: arguments;
    installShellFiles = "installShellFiles";
  };

  properties = {
    "by default the file only says where units go" = file plain == { unitDir = "/etc/systemd-mutable/system"; };
    "what is set is in the file" = file full == {
      store = "s3://releases";
      trustedPublicKeys = [ "ann:key" ];
      unitDir = "/run/systemd/system";
    };
    "systemd is told of a mutable folder" =
      plain.config.boot.extraSystemdUnitPaths == [ "/etc/systemd-mutable/system" ];
    "which is elsewhere where /etc is immutable" =
      (evaluate { overlay.mutable = false; }).config.boot.extraSystemdUnitPaths == [ "/var/lib/omni-deploy-units" ];
    "but not of its own" = full.config.boot.extraSystemdUnitPaths == [ ];
    "the service runs the package" =
      plain.config.systemd.services.deployer.serviceConfig.ExecStart == "/nix/store/omni-deploy/bin/deployer run --timer";
    "secrets are root's alone" =
      builtins.elem "d /var/lib/deployer-secrets 0700 root root -" plain.config.systemd.tmpfiles.rules;
    "Caddy is left alone where there is none" = !(plain.config.systemd.services ? caddy);
    "and resumes where there is one" = full.config.services.caddy.resume
      && full.config.systemd.services.caddy.serviceConfig.Restart == "always";
    "and is changed through a socket of its own" =
      full.config.systemd.services.caddy.environment.CADDY_ADMIN == "unix/" + "/run/${(caddyOf full).RuntimeDirectory}/admin.sock"
      && (caddyOf full).RuntimeDirectoryMode == "0750";
    "and starts from a configuration that is another one" =
      has "readlink -f /etc/caddy/caddy_config" (builtins.head (caddyOf full).ExecStartPre)
      && has "now=/nix/store/caddyfile" (builtins.head (caddyOf restarted).ExecStartPre);
    "a pass is asked for after a reload, where there is one" =
      builtins.length (flatten (caddyOf full).ExecReload) == 2 && flatten (caddyOf restarted).ExecReload == { };
    "and begins after the one that is under way" =
      has "--property=After=deployer.service" (builtins.head (caddyOf full).ExecStartPost);
    "every option says what it is for" = builtins.all (name: name == "enable" || plain.options.${name} ? description)
      (builtins.attrNames plain.options);
    "the package has both names" = builtins.match ".*deploy-manifest.*deployer.*" package.postInstall != null;
    # Where there is source to compare with: an option for each key that omni-deploy knows.
    "every key of the configuration is an option" =
      !(builtins.pathExists ../src/config.rs) || builtins.all (key: plain.options ? ${key}) keysOfSource;
  };
  keysOfSource = map builtins.head (builtins.filter builtins.isList
    (builtins.split "Key *\\{[ \n]*name: \"([a-zA-Z]+)\"" (builtins.readFile ../src/config.rs)));
  broken = builtins.filter (name: !properties.${name}) (builtins.attrNames properties);
in
if broken == [ ] then true else throw "does not hold: ${builtins.concatStringsSep "; " broken}"
