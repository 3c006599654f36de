#!/usr/bin/env bash
# curl: V1 with a row by column name, V2 with tensors; over HTTP/1.1, or over HTTP/2 where a proxy in front speaks it.
set -euo pipefail
url=${1:-http://127.0.0.1:8000}

curl -sS --fail-with-body "$url/v1/models/penguins:predict" -H 'content-type: application/json' -d '{"instances": [
  {"island": "Dream", "bill_length_mm": 50.0, "sex": null}]}'
echo

curl -sS --fail-with-body --http2 "$url/v2/models/penguins/infer" -H 'content-type: application/json' -d '{"inputs": [
  {"name": "island", "datatype": "BYTES", "shape": [1, 1], "data": ["Dream"]},
  {"name": "bill_length_mm", "datatype": "FP64", "shape": [1, 1], "data": [50.0]},
  {"name": "sex", "datatype": "BYTES", "shape": [1, 1], "data": [""]}]}'
echo
