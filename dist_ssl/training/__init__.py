"""Training: the one loop (`train.pretrain`), one step of it, the run directory, signals, metrics."""
