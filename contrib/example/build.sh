# Run by the busybox that default.nix names, as `busybox sh`; $out and the arguments are in the environment.
# shellcheck shell=sh disable=SC2154
set -eu
b() { "$busybox" "$@"; }

b mkdir -p "$out/bin" "$out/www"
b cp "$busybox" "$out/bin/busybox"
b chmod 755 "$out/bin/busybox"
b ln -s busybox "$out/bin/sh"

b printf '%s\n' "$greeting" >"$out/www/index.html"
# What a health check asks for; a file, because this server is one of files.
b printf 'ok\n' >"$out/www/health"
if [ "$megabytes" -gt 0 ]; then
  b dd if=/dev/urandom of="$out/www/ballast" bs=1M count="$megabytes"
fi

{
  b printf '#!%s/bin/sh\n' "$out"
  if [ -n "$broken" ]; then
    b printf 'echo "hello: cannot open the database" >&2\nexit 1\n'
  else
    # shellcheck disable=SC2016  # expanded when the service starts
    b printf 'echo "serving on port ${PORT:=8080}: $(%s/bin/busybox cat %s/www/index.html)"\n' "$out" "$out"
    # shellcheck disable=SC2016
    b printf 'exec %s/bin/busybox httpd -f -p "127.0.0.1:$PORT" -h %s/www\n' "$out" "$out"
  fi
} >"$out/bin/$name"
b chmod 755 "$out/bin/$name"
