"""DeepSpeed, and all that knows it: its config from ours, its start, which rank holds which range of which parameter,
and optimizers that are right when they are handed ranges.

`initialize` gives an Engine (forward, backward, step, fragments); `prepare` sets up the process. LARS, AdamW and the
learning rate are in `optimizers`.
"""

from dist_ssl.engine.engine import Engine, deepspeed_config, initialize, prepare

__all__ = ["Engine", "deepspeed_config", "initialize", "prepare"]
