"""The input side: plan, shards, decoding, augmentation, streaming."""
