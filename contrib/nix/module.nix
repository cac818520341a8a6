# Makes a NixOS machine a target of deployments:
#
#   imports = [ ./omni-deploy/contrib/nix/module.nix ];
#   services.omni-deploy = { enable = true; store = "s3://releases?region=eu-central-1"; };
#   services.caddy.enable = true;
#
# Units of deployed services go to a mutable folder that systemd reads besides NixOS's own, so that they survive
# reboots and `nixos-rebuild` knows nothing of them.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.services.omni-deploy;

  setting = type: example: description: mkOption {
    type = types.nullOr type;
    default = null;
    inherit example description;
  };

  # The keys of config.json; null leaves a key to omni-deploy's own default.
  keys = {
    store = setting types.str "s3://releases?region=eu-central-1"
      "Bucket of the manifest: `s3://BUCKET[/PREFIX]?region=&endpoint=&scheme=&profile=` or `file:///DIR`.";
    cache = setting types.str "https://cache.example.com"
      "Binary cache: like the store, or any URL that `nix copy` takes; the store if null.";
    host = setting types.str "biz"
      "Which `hosts` entries of the manifest are this machine; its short host name if null.";
    secretKeyFile = setting types.str "/root/.config/omni-deploy/keys/ann.secret"
      "File of the key that signs closures and manifests; a target needs none. A path outside the Nix store.";
    trustedPublicKeys = setting (types.listOf types.str) [ "ann:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=" ]
      "Keys that are believed; when set, nothing unsigned is accepted.";
    build = setting types.str "bild" "Command that builds a namespace.";
    ssh = setting types.str "ssh -F /etc/omni-deploy/ssh_config" "How a host is reached for logs and live status.";
    defaultHosts = setting (types.listOf types.str) [ "biz" ] "`hosts` of a service that names none.";
    caddyAdmin = setting types.str "unix//run/caddy/admin.sock"
      "Caddy's admin endpoint; that socket where it is there, else `http://127.0.0.1:2019`, if null.";
    caddyServer = setting types.str "srv0" "Which of Caddy's servers gets the route.";
    reportLines = setting types.bool true
      "Whether the report in the bucket has the last journal lines of what failed, without the values of secrets files.";
    unitDir = mkOption {
      type = types.str;
      # Where /etc is immutable, nothing can be made there.
      default =
        if config.system.etc.overlay.mutable or true then "/etc/systemd-mutable/system"
        else "/var/lib/omni-deploy-units";
      defaultText = lib.literalExpression ''"/etc/systemd-mutable/system", or "/var/lib/omni-deploy-units" where /etc is immutable'';
      example = "/run/systemd/system";
      description = "Where units of deployed services are written. Below /run they are made anew at every boot.";
    };
  };

  settings = lib.filterAttrs (_: value: value != null) (builtins.intersectAttrs keys cfg);

  # systemd reads its folder below /run in any case.
  mutable = cfg.unitDir != "/run/systemd/system";

  # Asks for a pass, with root's rights (+) because Caddy's user may not, and never fails Caddy (-). Why not by a plain
  # start is in contrib/systemd/caddy-start.sh.
  ask = "-+" + pkgs.writeShellScript "omni-deploy-ask" ''
    systemd=${config.systemd.package}/bin
    case $($systemd/systemctl list-jobs --no-legend 'deployer-asked-*') in *waiting*) exit 0 ;; esac
    $systemd/systemd-run --quiet --no-block --collect --unit="deployer-asked-$(cat /proc/sys/kernel/random/uuid)" \
      --description='Ask for a pass of omni-deploy' --service-type=oneshot --property=After=deployer.service /bin/sh -c \
      "[ ! -e /run/omni-deploy/lock ] || ${pkgs.util-linux}/bin/flock /run/omni-deploy/lock ${pkgs.coreutils}/bin/true
       exec $systemd/systemctl start --no-block deployer.service" ||
      $systemd/systemctl start --no-block deployer.service
  '';

  # With --resume Caddy starts with the configuration it had last, and a rebuild or a boot would not apply what the
  # system's configuration says of Caddy now. So where that is another file of the store than at the last start or
  # reload, what Caddy saved is set aside: it starts from the file, and the pass that is asked for brings our route back.
  # Why the server on port 2019 loses its address is in contrib/systemd/caddy-start.sh.
  caddyConfig =
    if config.services.caddy.enableReload then "$(readlink -f /etc/caddy/caddy_config)"
    else "${config.services.caddy.configFile}";
  caddyStart = pkgs.writeShellScript "omni-deploy-caddy-start" ''
    dir=''${XDG_CONFIG_HOME:-$HOME/.config}/caddy
    saved=$dir/autosave.json
    if [ "''${1:-}" != reloaded ] && [ -s "$saved" ]; then
      unknown=
      grep -qsF stream_close_delay ${config.services.caddy.package}/bin/caddy || unknown='; s/"stream_close_delay":"24h",//g'
      (umask 077 && sed 's/\("deployer-[a-z]*":{"automatic_https":{"disable":true},"listen":\)\["127[^]]*\(\[::1\]:2019"\)\{0,1\}\]/\1[]/g'"$unknown" \
        "$saved" >"$saved.new") && mv -f "$saved.new" "$saved"
    fi
    now=${caddyConfig}
    [ "$now" != "$(cat "$dir/omni-deploy.seen" 2>/dev/null)" ] || exit 0
    if [ "''${1:-}" != reloaded ] && [ -e "$saved" ]; then
      mv -f "$saved" "$saved.before"
    fi
    mkdir -p "$dir"
    echo "$now" >"$dir/omni-deploy.seen.new" && mv -f "$dir/omni-deploy.seen.new" "$dir/omni-deploy.seen"
  '';
in
{
  options.services.omni-deploy = keys // {
    enable = lib.mkEnableOption "the deployer of omni-deploy";
    package = mkOption {
      type = types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The omni-deploy to run.";
    };
    environmentFile = mkOption {
      type = types.str;
      default = "/etc/omni-deploy/deployer.env";
      description = "Credentials for the bucket (`AWS_ACCESS_KEY_ID=…`), mode 0600; need not exist.";
    };
    interval = mkOption {
      type = types.str;
      default = "5min";
      description = "How long after a pass the next one begins.";
    };
    jitter = mkOption {
      type = types.str;
      default = "20s";
      description = "At most how much later than that, so that many hosts spread out.";
    };
    caddy = mkOption {
      type = types.bool;
      default = config.services.caddy.enable;
      defaultText = lib.literalExpression "config.services.caddy.enable";
      description = "Whether this machine's Caddy keeps its configuration over restarts and asks for a pass after one.";
    };
  };

  config = lib.mkIf cfg.enable (lib.mkMerge [
    {
      environment.systemPackages = [ cfg.package ];
      environment.etc."omni-deploy/config.json".text = builtins.toJSON settings;

      boot.extraSystemdUnitPaths = lib.optional mutable cfg.unitDir;
      # A connection just made must not be reset when Caddy opens a new listening socket, which it does at
      # every change of its configuration.
      boot.kernel.sysctl."net.ipv4.tcp_migrate_req" = 1;

      systemd.tmpfiles.rules = [
        "d /var/lib/deployer 0755 root root -"
        "d /var/lib/deployer-secrets 0700 root root -"
        # Why is in contrib/systemd/tmpfiles.d/omni-deploy.conf.
        "d /var/lib/deployer/ports 0755 root root -"
        "C /run/omni-deploy/ports 0755 root root - /var/lib/deployer/ports"
      ] ++ lib.optional mutable "d ${cfg.unitDir} 0755 root root -";

      systemd.services.deployer = {
        description = "Bring this host to what the manifest says";
        wants = [ "network-online.target" ];
        after = [ "network-online.target" "nix-daemon.socket" "nix-daemon.service" "caddy.service" ];
        path = [ config.nix.package config.systemd.package pkgs.openssh ];
        environment = {
          HOME = "/root";
          XDG_CACHE_HOME = "/var/cache/deployer";
          # The store is mounted read-only here; the daemon writes it.
          NIX_REMOTE = "daemon";
        };
        # A rebuild that changes this unit must not wait for a pass; the timer comes soon enough.
        restartIfChanged = false;
        startLimitIntervalSec = 0;
        # The reasons are in contrib/systemd/deployer.service, which this mirrors.
        serviceConfig = {
          Type = "oneshot";
          ExecStart = "${cfg.package}/bin/deployer run --timer";
          EnvironmentFile = "-${cfg.environmentFile}";
          TimeoutStartSec = "30min";
          TimeoutStopSec = "30s";
          KillMode = "control-group";
          UMask = "0022";
          LimitCORE = 0;
          MemoryMax = "1G";
          OOMPolicy = "continue";
          StateDirectory = "deployer";
          CacheDirectory = "deployer";
          RuntimeDirectory = "omni-deploy";
          RuntimeDirectoryPreserve = true;
          ProtectSystem = "strict";
          ReadWritePaths = [ "-${cfg.unitDir}" "-/run/systemd" "-/nix/var" "-/var/lib/omni-deploy" ];
          ProtectHome = "read-only";
          TemporaryFileSystem = "/tmp:mode=1777 /var/tmp:mode=1777";
          PrivateDevices = true;
          PrivateMounts = true;
          CapabilityBoundingSet = [ "CAP_CHOWN" "CAP_DAC_OVERRIDE" "CAP_FOWNER" "CAP_SYS_PTRACE" ];
          NoNewPrivileges = true;
          RestrictAddressFamilies = [ "AF_UNIX" "AF_INET" "AF_INET6" "AF_NETLINK" ];
          RestrictNamespaces = true;
          RestrictRealtime = true;
          RestrictSUIDSGID = true;
          LockPersonality = true;
          MemoryDenyWriteExecute = true;
          ProtectClock = true;
          ProtectControlGroups = true;
          ProtectHostname = true;
          ProtectKernelLogs = true;
          ProtectKernelModules = true;
          ProtectKernelTunables = true;
          SystemCallArchitectures = "native";
          SystemCallFilter = [ "@system-service" "~@resources" ];
          SystemCallErrorNumber = "EPERM";
        };
      };

      systemd.timers.deployer = {
        description = "Look for a new manifest at boot and every ${cfg.interval}";
        wantedBy = [ "timers.target" ];
        timerConfig = {
          OnBootSec = "5s";
          OnUnitInactiveSec = cfg.interval;
          RandomizedDelaySec = cfg.jitter;
          AccuracySec = "1s";
        };
      };
    }
    (lib.mkIf cfg.caddy {
      services.caddy.resume = lib.mkDefault true;
      systemd.services.caddy = {
        startLimitIntervalSec = lib.mkForce 0;
        # Anybody may connect to Caddy's own port and change what it serves; a socket is its user's alone. Where the
        # Caddyfile has an `admin` of its own, that decides.
        environment.CADDY_ADMIN = lib.mkDefault "unix//run/caddy/admin.sock";
        serviceConfig = {
          RuntimeDirectory = lib.mkDefault "caddy";
          RuntimeDirectoryMode = lib.mkDefault "0750";
          Restart = lib.mkForce "always";
          RestartPreventExitStatus = lib.mkForce "";
          RestartSec = lib.mkForce "1s";
          ExecStartPre = [
            "-${caddyStart}"
            # When the rules of systemd-tmpfiles first came, there was nothing to copy.
            "-+${config.systemd.package}/bin/systemd-tmpfiles --create --prefix=/run/omni-deploy/ports"
          ];
          ExecStartPost = [ ask ];
          # Without enableReload the unit has no reload, and a rebuild restarts Caddy instead.
          ExecReload = lib.mkIf config.services.caddy.enableReload
            (lib.mkAfter [ "-${caddyStart} reloaded" ask ]);
        };
      };
    })
  ]);
}
