"""Files of named arrays: safetensors and npz archives with checksums, atomic writes and validated reads."""
