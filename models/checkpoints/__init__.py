"""Safetensors checkpoints in bounded memory: header, reader, writer; hostile input is refused."""
