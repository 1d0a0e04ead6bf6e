"""Debian's chromium, headless, driven over its debugging pipe: real pages at a phone's and a desktop's size."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


def installed() -> bool:
    return shutil.which("chromium") is not None


class Browser:
    """One tab. Everything that the page logs or asks the network for is kept in `requests` and `errors`."""

    def __init__(self) -> None:
        self.profile = tempfile.mkdtemp()
        child_reads, self.write_end = os.pipe()
        self.read_end, child_writes = os.pipe()
        redirect = f'exec "$@" 3<&{child_reads} 4>&{child_writes}'
        self.process = subprocess.Popen(
            ["bash", "-c", redirect, "chromium", "chromium", *FLAGS, f"--user-data-dir={self.profile}"],
            pass_fds=(child_reads, child_writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(child_reads)
        os.close(child_writes)
        self.number, self.buffer = 0, b""
        self.events: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, None)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        """Loads a file from disk in a window of that size."""
        mobile = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if mobile else 1, "mobile": mobile}
        self._call("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.events.clear()
        self._call("Page.navigate", {"url": path.resolve().as_uri()})
        self._until("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        found = self._call("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        return found["result"].get("value")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        options = {"captureBeyondViewport": whole}
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", options)["data"]))

    def close(self) -> None:
        os.close(self.write_end)
        os.close(self.read_end)
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def _call(self, method: str, parameters: dict[str, Any] | None = None, session: str | None = "") -> Any:
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters or {}}
        if session == "":
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _until(self, event: str) -> None:
        while True:
            for one in self.events:
                if one.get("method") == event:
                    self.events.remove(one)
                    return
            self.events.append(self._next())

    def _next(self, timeout: float = 60.0) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_end], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError("chromium did not answer")
            part = os.read(self.read_end, 1 << 20)
            if not part:
                raise RuntimeError("chromium ended")
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            case "Runtime.exceptionThrown" | "Log.entryAdded":
                self.errors.append(json.dumps(message["params"]))
        return message
