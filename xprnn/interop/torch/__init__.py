"""Models from torch and to torch: modules, state_dicts, .safetensors and .pt files."""
