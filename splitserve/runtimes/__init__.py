"""Runtimes for loaded bundles. Each library is used by one module only.

skops and scikit-learn by `sklearn_pipeline`, pandas by `rows`, ONNX Runtime by `predictor`.
"""
