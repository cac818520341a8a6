# A web service small enough to read, which plain `nix-build` makes with no nixpkgs, compiler or network: a
# static busybox from this machine, a page, and a program bin/hello that serves it on 127.0.0.1:$PORT.
#
#   nix-build contrib/example --argstr greeting "Hello, version 2"
#   nix-build contrib/example --arg broken true        # a release that exits at once
#   nix-build contrib/example --arg megabytes 100      # one that takes a while to copy
{ greeting ? "Hello from version 1"
, name ? "hello"
, broken ? false
, megabytes ? 0
  # A string and not a path, because busybox wants to be called by its own name; needs `sandbox = false`.
, busybox ? "/bin/busybox"
}:
derivation {
  inherit name greeting megabytes busybox;
  broken = if broken then "yes" else "";
  system = builtins.currentSystem;
  builder = busybox;
  args = [ "sh" ./build.sh ];
}
