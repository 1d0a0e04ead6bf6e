"""A run's encoder as a folder that timm loads, and with it the Hub: config.json, weights, a model card, its config.

    timm.create_model("local-dir:FOLDER", pretrained=True)      # images -> h

The card says what the run measured, and how to make the weights again. Nothing is uploaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_ssl import config as configuration
from dist_ssl.checkpoint import NormStatistics, export_encoder, read_run_config
from dist_ssl.config import TIMM, CheckpointConfig, Config, LogConfig, RunConfig, StorageConfig, UserError
from dist_ssl.evaluation.results import Stored, newest, probe_name, stored, told
from dist_ssl.models.from_timm import build_timm
from dist_ssl.models.weights import read_tensors
from dist_ssl.storage import write_bytes

TWINS = ("resnet18", "resnet34", "resnet50", "resnet101")  # torchvision's that timm has under the same parameter names
WEIGHTS, CONFIG, CARD, RUN = "model.safetensors", "config.json", "README.md", "pretrain.toml"


def export_for_timm(
    run_dir: Path,
    folder: Path,
    step: int | None = None,
    teacher: bool = False,
    norms: NormStatistics | None = None,
) -> int:
    """Write the folder, as `export_encoder`; returns the step that it is of. UserError where timm can't hold it."""
    config = read_run_config(run_dir)
    name = _architecture(config.model.encoder)
    size = config.augment.image_size
    encoder: Any = build_timm(name, size)
    step = export_encoder(run_dir, folder / WEIGHTS, step=step, teacher=teacher, norms=norms)
    (folder / WEIGHTS).with_suffix(".json").unlink()  # the card and the config say it
    encoder.load_state_dict(read_tensors(str(folder / WEIGHTS), config.storage))
    described = {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.output_dim,
        "model_args": encoder.timm_options,
        "pretrained_cfg": _inputs(config, encoder),
    }
    results = [one for one in stored(run_dir) if one.step == step and bool(one.values.get("teacher")) == teacher]
    card = _card(config, name, step, list(newest(results)), teacher)
    if norms is not None:
        card += f"\nBatch norm's statistics were then taken anew, of whole images of `{norms.source}`.\n"
    for file, text in ((CONFIG, json.dumps(described, indent=2)), (CARD, card), (RUN, _reproducing(config))):
        write_bytes(str(folder / file), text.encode(), config.storage)
    return step


def _architecture(encoder: str) -> str:
    if encoder.startswith(TIMM):
        return encoder.removeprefix(TIMM)
    if encoder in TWINS:
        return encoder
    raise UserError(
        f"--format timm: expected a run of {TIMM}NAME or of {', '.join(TWINS)}; timm has no model with the parameter "
        f"names of {encoder}: export it without --format"
    )


def _inputs(config: Config, encoder: Any) -> dict[str, Any]:
    """What timm calls the pretrained config: how images are prepared, and which layers it may exchange."""
    size = config.evaluated_size
    of_timm, sized = encoder.pretrained_cfg, {"dynamic_img_size", "strict_img_size"} & encoder.timm_options.keys()
    return {
        "input_size": [3, size, size],
        "fixed_input_size": of_timm.get("fixed_input_size", False) and not sized,
        "interpolation": "bilinear",
        "crop_pct": 1 / config.evaluation.resize_ratio,
        "mean": config.augment.mean,
        "std": config.augment.std,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": of_timm.get("first_conv"),
        "classifier": of_timm.get("classifier"),
        "custom_load": False,
    }


def _reproducing(config: Config) -> str:
    """The run's config as TOML, without what is this machine's only."""
    here: dict[str, Any] = {
        "run": RunConfig(seed=config.run.seed),
        "data": config.data.model_copy(update={"shards": "", "cache_dir": None}),
        "evaluation": config.evaluation.model_copy(update={"train_shards": None, "test_shards": None}),
        "storage": StorageConfig(),
        "checkpoint": CheckpointConfig(),
        "log": LogConfig(),
    }
    return configuration.dumps(config.model_copy(update=here))


def _card(config: Config, name: str, step: int, results: list[Stored], teacher: bool) -> str:
    images = config.train.global_batch_size
    role = "teacher (momentum encoder)" if teacher else "encoder"
    measured = "\n\n".join(map(_table, results)) or f"Not evaluated: `dist-ssl evaluate RUN --checkpoint {step}` does."
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- self-supervised
- {config.objective.name}
---

# {name}, pretrained without labels by {config.objective.name}

The {role} of step {step:,}, at {images:,} images a step, of a run of `dist_ssl` {_version()}. There is no classifier:
it gives h, the vector before the projection head.

```python
import timm

encoder = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # this folder; or hf-hub:USER/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
h = encoder(transform(image)[None])
```

## Measured

{measured}

## To make it again

`{RUN}` is the run's whole config; give `run.dir` and where the data are.

```bash
dist-ssl pretrain {RUN} --set run.dir=RUN --set data.shards=SHARDS
dist-ssl export RUN FOLDER --format timm{" --teacher" if teacher else ""}
```
"""


def _version() -> str:
    import dist_ssl

    return dist_ssl.__version__


def _table(result: Stored) -> str:
    """A row a layer, a column a probe: top-1 and its 95% interval over test images."""
    values = result.values
    data, probes = values["data"], values["probes"]
    if not probes:
        return "The images that it was evaluated on have no labels."
    rows = [["layer", *map(probe_name, probes)], ["---", *("---:" for _ in probes)]]
    for layer in values["layers"]:
        rows.append([layer, *(told(probes[probe][layer]) if layer in probes[probe] else "" for probe in probes)])
    about = (
        f"Top-1 in % of the frozen encoder on {result.name or 'its own data'}: {data['test_images']:,} test images, "
        f"{data['num_classes']} classes, with 95% intervals over them. h is what this folder gives, z what the loss "
        "saw, h_untrained the encoder before the first step, pixels the images without any."
    )
    return about + "\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)
