"""splitserve: preprocess/predict split serving over the Open Inference Protocol."""

__version__ = "0.1.0"
