"""The specification of every operator in plain PyTorch: slow, obvious, tested against by all."""
