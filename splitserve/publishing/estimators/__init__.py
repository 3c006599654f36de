"""Fitted estimators as ONNX graphs, a module for each family."""
