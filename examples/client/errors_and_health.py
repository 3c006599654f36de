"""Health, metadata and errors: each error has a class, the same over REST and gRPC."""

import sys

from splitserve import Client
from splitserve.errors import DeadlineExceeded, InvalidInput, NotFound, Unavailable

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

with Client(url, token=lambda: "read-it-anew-for-every-request", max_attempts=3) as client:
    print("ready:", client.is_ready(), "digits ready:", client.is_model_ready("digits"))
    for state in client.models():
        print(state.name, state.version, state.state, state.reason)

    try:
        client.infer("no-such-model", {"x": [1.0]})
    except NotFound as error:
        print("not found:", error.message)

    try:
        client.infer("digits", {"image": "seven"})
    except InvalidInput as error:
        print("invalid:", error.message)

    try:
        client.infer("digits", [[[0] * 8] * 8], timeout_s=0.000001)
    except (DeadlineExceeded, Unavailable) as error:
        print("too late:", error.message)
