#!/usr/bin/env bash
# The main job from nothing: bash launch/quickstart.sh [DIR of images]
# Makes .venv, writes shards, pretrains on 2 ranks (all GPUs where there are any), evaluates, writes a report.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

images="${1:-}"
run="${DIST_SSL_RUN:-runs/quickstart}"
if [ -n "$images" ]; then
    [ -d "$images" ] || { echo "error: $images: no such directory" >&2; exit 2; }
    images="$(cd "$images" && pwd)"
    data="runs/data/$(basename "$images")-$(printf %s "$images" | cksum | cut -d' ' -f1)"
    source="folder:$images"
else
    data="runs/data/shapes"
    source="shapes:8000"
fi
make_environment ""

write() { $python -m dist_ssl.cli shards write "$@" --seed 0; }
if [ -n "$images" ] && [ -d "$images/train" ]; then
    test=test; [ -d "$images/test" ] || test=val
    write "folder:$images/train" "$data/train"
    write "folder:$images/$test" "$data/test"
else
    write "$source" "$data" --test-fraction 0.2
fi
$python -m launch.local pretrain configs/quickstart.toml \
    --set "run.dir=\"$run\"" --set "data.shards=\"$data/train\"" \
    --set "evaluation.train_shards=\"$data/train\"" --set "evaluation.test_shards=\"$data/test\""
$python -m dist_ssl.cli evaluate "$run"
$python -m dist_ssl.cli report "$run"
