"""Scores a Parquet file by scikit-learn and ONNX Runtime alone, as people write it.

``python -m benchmarks.peers.direct_batch REPOSITORY MODEL INPUT OUTPUT``
"""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.peers import halves


def main(repository: str, model: str, source: str, target: str) -> None:
    pa.set_cpu_count(1)
    transforms, session = halves.transformer(repository, model), halves.session(repository, model)
    names = [output.name for output in session.get_outputs()]
    writer = None
    for batch in pq.ParquetFile(source).iter_batches(8192):
        frame = batch.to_pandas()
        rows = frame if model == "penguins" else frame.to_numpy(np.float64)
        found = dict(zip(names, session.run(names, {"features": halves.features(transforms, rows)}), strict=True))
        columns = {"label": pa.array(found["label"].reshape(-1))}
        columns |= {f"probabilities_{number}": pa.array(column) for number, column in enumerate(found["probabilities"].T)}
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(target, table.schema)
        writer.write_table(table)
    assert writer is not None, "the file has rows"
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
