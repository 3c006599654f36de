"""The predict service: tensors -> tensors, by ONNX Runtime. Knows nothing of scikit-learn."""
