"""Recipes beside torch, ONNX Runtime's one-line quantization and nncf."""
