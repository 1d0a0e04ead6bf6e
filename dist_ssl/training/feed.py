"""The feed: this rank's batches, on its device before they are asked for, and what went wrong with them."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

from dist_ssl.data.quarantine import Quarantine
from dist_ssl.data.stream import Batch, Batches


class Feed:
    """Hands out batches whose copy to the device was queued, on a stream of its own, when the one before was asked for.

    An error is kept in `error`, since the other ranks must hear of it first: the batches before it are still handed
    out. What ranks agree on is heard one step late, so the feed is one batch further ahead than the loop.
    """

    def __init__(self, batches: Batches, quarantine: Quarantine, device: torch.device):
        self._batches, self._quarantine, self._device = batches, quarantine, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: Any = None  # the event after the next batch's copy
        self._over = False
        self.error: Exception | None = None
        self.waited_seconds = 0.0  # in which this rank had no batch
        self._upcoming = self._fetch()

    def next(self) -> Batch | None:
        """The next batch; None past the run's last step, or past an error."""
        batch = self._upcoming
        if batch is not None and self._stream is not None:
            current = torch.cuda.current_stream()
            current.wait_event(self._copied)
            for tensor in batch.on_device():
                tensor.record_stream(current)  # its memory is the copying stream's
        self._upcoming = self._fetch()
        return batch

    def _fetch(self) -> Batch | None:
        if self._over:
            return None
        started = time.monotonic()
        try:
            batch: Batch | None = next(self._batches, None)
            if batch is not None:
                self._quarantine.record(len(batch.keys), batch.quarantined)
                with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
                    batch = batch.to(self._device)
                    self._copied = self._stream.record_event() if self._stream is not None else None
        except Exception as error:
            self.error, batch = error, None
        self.waited_seconds += time.monotonic() - started
        self._over = batch is None
        return batch
