"""Evaluation of a frozen encoder: features, probes, head information, the laboratory. Never imports DeepSpeed."""
