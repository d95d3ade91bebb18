"""Reading PyTorch checkpoints of HGRN2 and writing MLX folders."""
