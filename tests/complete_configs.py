"""Write every key that a file in configs/ leaves out into it, header kept: `python -m tests.complete_configs`."""

from pathlib import Path

from dist_ssl import config

CONFIGS = sorted(Path(__file__).parent.parent.glob("configs/*.toml"))


def header(text: str) -> str:
    """The comment lines at the top."""
    lines = text.splitlines()
    length = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(lines[:length])


def completed(path: Path) -> str:
    return f"{header(path.read_text())}\n\n{config.dumps(config.load(path))}"


if __name__ == "__main__":
    for path in CONFIGS:
        path.write_text(completed(path))
