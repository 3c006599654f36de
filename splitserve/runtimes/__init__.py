"""What runs a loaded bundle. Each library that this takes is known to one module: skops and scikit-learn to `sklearn_pipeline`,
pandas to `rows`, ONNX Runtime to `predictor`.
"""
