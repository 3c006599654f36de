#!/usr/bin/env bash
# Installs Prometheus with promtool, and Alertmanager, which tests start by themselves. Safe to run again.
set -euo pipefail

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

if ! { command -v prometheus && command -v promtool && command -v prometheus-alertmanager; } >/dev/null; then
  as_root apt-get update -qq
  # RUNLEVEL=1: the packages start no daemon.
  as_root env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus prometheus-alertmanager >/dev/null
fi
command -v promtool >/dev/null || { echo "promtool is missing: Debian 12 has it in the package prometheus" >&2; exit 1; }
