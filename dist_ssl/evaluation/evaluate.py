"""`dist-ssl evaluate`: one pass through the frozen encoder, then each probe on each layer, then results.json.

The format of results.json is told in `results`.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_ssl import config as configuration
from dist_ssl import distributed
from dist_ssl.checkpoint import checkpoint_store, load_run, read_run_config, step_name
from dist_ssl.config import Config, EvaluationConfig, UserError
from dist_ssl.data.progress import Progress
from dist_ssl.evaluation import features as feature_files
from dist_ssl.evaluation import pictures, projector, sgd
from dist_ssl.evaluation.features import PIXELS, Features, Split
from dist_ssl.evaluation.few_labels import balanced, few_label_probe
from dist_ssl.evaluation.fine_tuning import fine_tune_few_labels
from dist_ssl.evaluation.frozen import Readable, frozen, load_foreign, with_batch_statistics
from dist_ssl.evaluation.geometry import geometry
from dist_ssl.evaluation.head_information import head_information
from dist_ssl.evaluation.intervals import difference, summarize
from dist_ssl.evaluation.knn import knn_predict
from dist_ssl.evaluation.linear import LinearResult, Rows, linear_probe
from dist_ssl.evaluation.results import FILE, FORMAT, Stored, accuracy_matrix, place, step_folder, versions, write_json
from dist_ssl.storage import redact

log = logging.getLogger(__name__)

Outcome = tuple[np.ndarray, dict[str, Any]]  # correct answers (S, n_test), and what else a probe's results say
CALIBRATION_IMAGES = 10_000  # at most, of the training split, for the untrained encoder's batch norm


@dataclass(frozen=True)
class Subject:
    """What is evaluated: where it came from, the models to read in one pass, and where the results go."""

    checkpoint: str
    step: int | None
    config: Config
    trained: Readable
    untrained: Readable | None
    folder: Path  # of all results of this checkpoint
    name: str | None = ""  # of the data, in that folder; None: to be derived from the data
    is_teacher: bool = False


def run_subject(
    run_dir: Path, step: int | None, overrides: list[str], name: str | None = None, other_name: str | None = None
) -> Subject:
    """A run's checkpoint (the newest by default) and its step 0.

    `name` is the data's; without it, `other_name` where the data are not what the run's own config names.
    """
    saved = read_run_config(run_dir)
    config = configuration.with_overrides(saved, overrides) if overrides else saved
    _, step, model = load_run(run_dir, step, config.evaluation.teacher)
    _, _, untrained = load_run(run_dir, 0)
    shards = [(one.evaluation.train_shards, one.evaluation.test_shards) for one in (config, saved)]
    return Subject(
        checkpoint_store(saved).url(step_name(step)),
        step,
        config,
        Readable(model.encoder, model.head),
        Readable(untrained.encoder, suffix="_untrained"),
        step_folder(run_dir, step),
        name or ("" if shards[0] == shards[1] else other_name),
        config.evaluation.teacher,
    )


def weights_subject(weights: Path, encoder: str, config: Config, output: Path | None, name: str | None) -> Subject:
    """Anybody's weights; there is no head, and a freshly initialised encoder stands for the untrained one."""
    from dist_ssl.models import build_encoder

    if config.evaluation.teacher:
        raise UserError(f"{weights}: foreign weights have no teacher; leave --teacher out")
    size = config.evaluated_size
    torch.manual_seed(config.run.seed)
    return Subject(
        str(weights),
        None,
        config,
        Readable(load_foreign(weights, encoder, size)),
        Readable(build_encoder(encoder, size), suffix="_untrained"),
        output or weights.with_suffix("").with_name(weights.with_suffix("").name + "-evaluation"),
        name or "",
    )


def evaluate(subject: Subject, device: torch.device) -> Stored:
    """Runs the probes of `evaluation.probes` and writes results.json, on whose content all ranks agree.

    Raises EncoderChangedError, and writes nothing, if the encoder is not what it was. Collective.
    """
    started, config = time.monotonic(), subject.config
    train, test = (feature_files.open_split(name, config, device) for name in ("train", "test"))
    _check_classes(train, test)
    folder = place(subject.folder, subject.name, (train.manifest.hash, test.manifest.hash), subject.is_teacher)
    folder = distributed.broadcast_object(folder)  # another rank may see an older state of a shared folder
    for readable in filter(None, (subject.trained, subject.untrained)):
        for module in readable.modules():
            module.to(device)
    if subject.untrained is not None:
        with_batch_statistics(subject.untrained.encoder, calibration_batches(train))
    readables = [readable for readable in (subject.trained, subject.untrained) if readable is not None]
    with frozen(readables) as proofs:
        digests = [proof["before"] for proof in proofs]
        cache = folder / "features"
        pixels = 3 * train.image_size**2 <= config.evaluation.raw_pixels_up_to
        train_features, test_features = feature_files.in_one_channel(
            *(feature_files.extract(part, readables, digests, cache / part.name, pixels) for part in (train, test))
        )
        num_classes = _num_classes(train_features, test_features)
        results: dict[str, Any] = {
            "format": FORMAT,
            "checkpoint": subject.checkpoint,
            "step": subject.step,
            "encoder": config.model.encoder,
            "teacher": subject.is_teacher,
            "head": config.model.head.model_dump() if subject.trained.head is not None else None,
            "encoder_digest": proofs[0],
            "layers": list(train_features.layers),
            "data": _data(train, test, num_classes, (train_features, test_features)),
            "ranks": distributed.world_size(),
        }
        results |= _probe(subject.trained, train, test, train_features, test_features, num_classes, folder)
        shown = pictures.pictures(test, test_features) if distributed.rank() == 0 else {}
    results["matrix"] = accuracy_matrix(results)
    results["config"] = configuration.dumps(config)
    results["versions"] = versions(device)
    results["seconds"] = round(time.monotonic() - started, 1)
    if distributed.rank() == 0:
        pictures.save(folder / "pictures.npz", shown)
        if config.log.tensorboard:
            projector.write(folder / "tensorboard", subject.step or 0, test, test_features, shown)
        write_json(folder / FILE, results)
        if not config.evaluation.keep_features:
            shutil.rmtree(cache)
    return Stored(subject.step, "" if folder == subject.folder else folder.name, folder, results)


def _probe(
    trained: Readable,
    train: Split,
    test: Split,
    train_features: Features,
    test_features: Features,
    num_classes: int,
    folder: Path,
) -> dict[str, Any]:
    """Every probe that works on cached features, then those that read images again."""
    settings = train.config.evaluation
    correct: dict[str, dict[str, np.ndarray]] = {}
    probes: dict[str, dict[str, Any]] = {}
    on_features: dict[str, Callable[[Rows, Rows, int, EvaluationConfig], Outcome]] = {"linear": _linear, "knn": _knn}
    on_features |= {f"few_labels_{part:g}": _few_labels(part) for part in settings.few_label_fractions}
    without_labels = ("head_information", "geometry")
    wanted = [name for name in settings.probes if num_classes or name in without_labels]
    if {"few_labels", "few_labels_fine_tuned"} & set(wanted):
        for fraction in settings.few_label_fractions:  # what can't be drawn is said before the first fit
            balanced(train_features.labels, fraction)
    chosen = [name for name in on_features if name in wanted or ("few_labels" in wanted and name.startswith("few_"))]
    with Progress("probes", len(chosen) * len(train_features.layers), distributed.rank() == 0) as progress:
        for probe in chosen:
            for layer in train_features.layers:
                progress.advance(0, f"{probe} on {layer}")
                rows, scored = (
                    Rows(part.layers[layer], part.labels, train.device) for part in (train_features, test_features)
                )
                # Of the pixels' widths a fit takes longest, and three that differ in the tenth held out say no more.
                alone = probe == "linear" and layer == PIXELS
                chosen_settings = settings.model_copy(update={"num_seeds": 1}) if alone else settings
                hits, extra = on_features[probe](rows, scored, num_classes, chosen_settings)
                correct.setdefault(probe, {})[layer] = hits
                probes.setdefault(probe, {})[layer] = summarize(hits) | extra
                if extra.get("at_edge") and distributed.rank() == 0:
                    log.info("%s on %s: the best weight decay is at the edge of the sweep", probe, layer)
                progress.advance()
    features = (train_features, test_features)
    on_images = _on_images(trained, train, test, features, num_classes) if num_classes else ()
    for name, layer, (hits, extra) in on_images:
        correct.setdefault(name, {})[layer] = hits
        probes.setdefault(name, {})[layer] = summarize(hits) | extra
    found: dict[str, Any] = {"probes": probes, "comparisons": _comparisons(correct)}
    if "head_information" in wanted:
        found["head_information"] = head_information(train, test, trained, folder)
    if "geometry" in wanted:
        found["geometry"] = geometry(test, test_features, trained)
    return found


def _on_images(
    trained: Readable, train: Split, test: Split, features: tuple[Features, Features], num_classes: int
) -> Iterator[tuple[str, str, Outcome]]:
    """(probe, layer, outcome) of the protocols that read augmented images again. Collective."""
    settings = train.config.evaluation
    layer, seeds = settings.fine_tune_from, range(settings.num_seeds)

    def run(layers: list[str], seed: int, epochs: int, tune: bool) -> dict[str, np.ndarray]:
        return sgd.train_and_score(
            trained, layers, train, test, num_classes, epochs=epochs, tune_encoder=tune, seed=seed
        )

    if "linear_augmented" in settings.probes:
        layers = list(feature_files.layer_dims(train, [trained]))
        for name, hits in run(layers, 0, settings.sgd_epochs, False).items():
            yield "linear_augmented", name, (hits[None], {})
    if "fine_tuned" in settings.probes:
        scored = [run([layer], seed, settings.fine_tune_epochs, True)[layer] for seed in seeds]
        yield "fine_tuned", layer, (np.stack(scored), {})
    if "few_labels_fine_tuned" in settings.probes:
        for fraction in settings.few_label_fractions:
            given = (train, test, features, num_classes, fraction)
            found = [fine_tune_few_labels(trained, layer, *given, seed) for seed in seeds]
            hits_sn, rates = np.stack([one.correct for one in found]), [one.rate for one in found]
            yield f"few_labels_fine_tuned_{fraction:g}", layer, (hits_sn, {"rates": rates})


def _linear(train: Rows, test: Rows, num_classes: int, settings: EvaluationConfig) -> Outcome:
    result = linear_probe(train, test, num_classes, num_seeds=settings.num_seeds)
    return result.correct_sn, _fitted(result)


def _few_labels(fraction: float) -> Callable[[Rows, Rows, int, EvaluationConfig], Outcome]:
    def probe(train: Rows, test: Rows, num_classes: int, settings: EvaluationConfig) -> Outcome:
        result = few_label_probe(train, test, num_classes, fraction, settings.num_seeds)
        classes, each = balanced(train.labels, fraction)
        return result.correct_sn, _fitted(result) | {"num_labels": each * len(classes)}

    return probe


def _fitted(result: LinearResult) -> dict[str, Any]:
    fits = [asdict(fit) for fit in result.fits]
    return {"weight_decays": result.weight_decays, "at_edge": result.at_edge, "fits": fits}


def _knn(train: Rows, test: Rows, num_classes: int, settings: EvaluationConfig) -> Outcome:
    k, temperature = settings.knn_k, settings.knn_temperature
    predicted = knn_predict(
        test.features, train.features, train.labels, num_classes, k=k, temperature=temperature, device=train.device
    )
    return predicted.cpu().numpy()[None] == test.labels[None], {"k": k, "temperature": temperature}


def _comparisons(correct: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """h against z, the untrained h and the raw pixels, on the same test images."""
    return [
        {"probe": probe, "a": "h", "b": other} | difference(layers["h"], layers[other])
        for probe, layers in correct.items()
        for other in ("z", "h_untrained", PIXELS)
        if "h" in layers and other in layers
    ]


def calibration_batches(train: Split) -> Any:
    """Pixels of this rank's share of the first training images, as many batches on every rank (shards are permuted)."""
    size, world = train.config.evaluation.batch_size_per_rank, distributed.world_size()
    each = min(CALIBRATION_IMAGES, train.manifest.num_samples) // world
    start = each * distributed.rank()
    for batch in train.batches(start, start + each):
        # A last batch of a few images would weigh as much as a full one in the average over batches.
        if len(batch.labels) * 2 >= min(size, each):
            yield train.pixels(batch.images)


def _check_classes(train: Split, test: Split) -> None:
    """Raises UserError where a number is one class in one part and another one in the other."""
    for number, (one, other) in enumerate(zip(train.manifest.classes, test.manifest.classes, strict=False)):
        if one != other:
            raise UserError(
                f"evaluation.train_shards and test_shards number classes differently: class {number} is {one!r} in "
                f"{redact(train.manifest.url)} and {other!r} in {redact(test.manifest.url)}; give both the same class "
                "folders (an empty one counts), then index or write them again"
            )


def _num_classes(train: Features, test: Features) -> int:
    """Classes of both splits; 0 where no image has a label, which leaves head information and pictures."""
    labels = {"train": train.labels, "test": test.labels}
    if all((values < 0).all() for values in labels.values()):
        log.warning("no image has a label (.cls): only what needs none is evaluated")
        return 0
    for name, values in labels.items():
        unlabelled = int((values < 0).sum())
        if unlabelled:
            raise UserError(
                f"evaluation.{name}_shards: expected labelled images, got {unlabelled} of {len(values)} "
                "without a label (.cls)"
            )
    return int(max(values.max() for values in labels.values())) + 1


def _data(train: Split, test: Split, num_classes: int, features: tuple[Features, Features]) -> dict[str, Any]:
    settings = train.config.evaluation
    return {
        "train_shards": settings.train_shards,
        "test_shards": settings.test_shards,
        "train_manifest": train.manifest.hash,
        "test_manifest": test.manifest.hash,
        "train_images": train.manifest.num_samples,
        "test_images": test.manifest.num_samples,
        "replaced_images": [int(part.replaced.sum()) for part in features],  # bad ones, of either
        "num_classes": num_classes,
        "class_names": list(train.manifest.classes or ()),
        "image_size": train.image_size,
    }
