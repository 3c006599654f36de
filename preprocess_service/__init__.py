"""The preprocess service: rows -> tensors by scikit-learn, on to predict, and back. Knows nothing of ONNX Runtime."""

import splitserve.server.lean_logging  # noqa: F401, first
