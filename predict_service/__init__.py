"""The predict service: tensors -> tensors, by ONNX Runtime. Knows nothing of scikit-learn."""

import splitserve.server.lean_logging  # noqa: F401, first
