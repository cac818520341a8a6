#!/usr/bin/env bash
# Prints a manifest of $1 services, as many as $2 hosts share, the first of them named HOST-0.
set -euo pipefail
exec jq -n --argjson count "$1" --argjson hosts "$2" '
  def padded(n): tostring | ("0" * (n - length)) + .;
  {version: 1, serial: 0, generation: "2026-11-22T00:00:00Z", change: {action: "bench", by: "bench"},
   services: [range(1; $count + 1) | padded(5) as $n | {
     name: "web-\($n)", artifact: {type: "nix-closure", storePath: "/nix/store/\(. | padded(32))-web-\($n)"},
     hosts: ["bench-\(. % $hosts)"], exec: {command: null, user: "root", group: "root"},
     env: {PORT: "\(20000 + .)", LOG_LEVEL: "info"}, envFile: null,
     http: {domain: "web-\($n).example.com", path: "/", internalPort: (20000 + .)},
     health: {path: "/health", timeoutSec: 30}, rollout: "restart",
     systemd: {after: ["network-online.target"], requires: [], restart: "on-failure", restartSec: 5},
     hardening: {dynamicUser: false, privateTmp: true, protectSystem: "strict", protectHome: true},
     revision: "4f2a9c1"}]}'
