"""numpy arrays or lists in, numpy arrays out; over REST as over gRPC."""

import sys

import numpy as np

from splitserve import Client

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

with Client(url, timeout_s=5, compression="gzip") as client:
    print("what it takes:", *client.metadata("digits").inputs)
    image = np.zeros((1, 8, 8))
    image[:, 1:7, 3:5] = 16
    answer = client.infer("digits", image, outputs=["label"])

print("a one is read as", answer["label"][0])
