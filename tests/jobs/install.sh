#!/usr/bin/env bash
# Installs PostgreSQL's and pgbouncer's programs, which tests start by themselves. Safe to run again.
set -euo pipefail

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

if ! { compgen -G "/usr/lib/postgresql/*/bin/initdb" && [ -x /usr/sbin/pgbouncer ]; } >/dev/null; then
  as_root apt-get update -qq
  # RUNLEVEL=1: the packages start no daemon.
  as_root env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql pgbouncer >/dev/null
fi
