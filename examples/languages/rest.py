"""Python without a client of the protocol: for V1 the standard library is enough."""

import json
import sys
import urllib.request

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

rows = [{"island": "Dream", "bill_length_mm": 50.0, "sex": None}]
request = urllib.request.Request(
    f"{url}/v1/models/penguins:predict",
    json.dumps({"instances": rows}).encode(),
    {"content-type": "application/json"},
)
with urllib.request.urlopen(request) as response:
    print(json.load(response)["predictions"][0]["label"])
