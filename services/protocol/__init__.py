"""The Open Inference Protocol v2 over HTTP, with JSON and binary tensors."""

from services.protocol.rest import OpenInference

__all__ = ["OpenInference"]
