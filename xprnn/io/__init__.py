"""Archives of named arrays: safetensors and npz files, atomic, checksummed, read back without trust."""
