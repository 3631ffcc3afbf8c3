"""Encoder and decoder as graphs that run without this package: ONNX, or programs of torch.export."""

from dasheng_tokenizer.export.folder import export_model
from dasheng_tokenizer.export.graphs import DecoderGraph, EncoderGraph

__all__ = ["DecoderGraph", "EncoderGraph", "export_model"]
