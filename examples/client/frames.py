"""A DataFrame in, a DataFrame out: the penguins, with missing values."""

import sys

from palmerpenguins import load_penguins

from splitserve import Client

url = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"

penguins = load_penguins().drop(columns="species")

with Client(url) as client:
    answer = client.infer("penguins", penguins)

species = answer.to_frame(names={"probabilities": ["Adelie", "Chinstrap", "Gentoo"]})
print(f"answered by pair {answer.version}")
print(penguins.join(species).head())
