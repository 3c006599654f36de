"""A frame of many rows: split into requests of about a mebibyte, eight in flight at once, with a progress bar."""

import sys

import pandas as pd
from palmerpenguins import load_penguins

from splitserve import Client

url = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"

penguins = load_penguins().drop(columns="species")
many = pd.concat([penguins] * 60, ignore_index=True)

with Client(url) as client:
    answer = client.infer("penguins", many, concurrency=8, progress=True)

print(answer.to_frame()["label"].value_counts())
