"""QuantKit: INT8, INT4 and FP8 quantization of Hugging Face language models."""

__version__ = "0.1.0"
