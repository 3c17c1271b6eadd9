"""Conversion of torch modules, state_dicts, .safetensors and .pt files to models, and of models to state_dicts."""
