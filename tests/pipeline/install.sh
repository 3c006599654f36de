#!/usr/bin/env bash
# Installs Debian's Fashion-MNIST, 30 MB of images. Safe to run again.
set -euo pipefail

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

if [ ! -d "${FASHION_MNIST:-/usr/share/datasets/fashion-mnist}" ]; then
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends dataset-fashion-mnist >/dev/null
fi
