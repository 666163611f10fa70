#!/bin/sh
# Makes the environments that `python -m benchmarks.peers` measures in: 6 GB, once.
#
#   PEERS=DIR sh benchmarks/peers/setup.sh [NAME...]     (all of them if none is named)
#
# One environment, "base", holds torch; each server has a small one of its own that sees base through a .pth file, because
# what they pin excludes one another. Versions are fixed: the figures in docs/performance.md are theirs.
set -eu
cd "$(dirname "$0")/../.."
PEERS=${PEERS:-.bench/peers}
PYTHON=${PYTHON:-python3}

command -v wrk > /dev/null || { echo "bench-peers needs wrk: apt-get install wrk" >&2; exit 1; }
mkdir -p "$PEERS/venvs"
PEERS=$(cd "$PEERS" && pwd)

install() { # NAME PACKAGE...: nothing, if just that was installed before
    name=$1; shift
    venv=$PEERS/venvs/$name
    [ "$(cat "$venv/.installed" 2> /dev/null)" = "$*" ] && return
    echo "setting up $name …" >&2
    { [ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"; } &&
        { [ "$name" = base ] || echo "$site" > "$(site_of "$name")/base.pth"; } &&
        "$venv/bin/pip" install --quiet --disable-pip-version-check "$@" &&
        echo "$*" > "$venv/.installed"
}

site_of() { "$PEERS/venvs/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# shellcheck disable=SC2086 - an option and its value
install base ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} torch==2.14.1 pillow numpy
site=$(site_of base)

failed=""
[ $# -gt 0 ] || set -- fastapi litserve bentoml ray torchserve mlserver triton
for name in "$@"; do
    case $name in
        fastapi) set -- fastapi==0.165.0 'uvicorn[standard]==0.54.0' python-multipart ;;
        litserve) set -- litserve==0.2.19 python-multipart ;;
        bentoml) set -- bentoml==1.4.39 ;; # 1.4.40 asks for a certifi that isn't everywhere yet
        ray) set -- 'ray[serve]==2.60.0' python-multipart ;;
        torchserve) set -- torchserve==0.12.0 torch-model-archiver==0.12.0 pyyaml ;;
        mlserver) set -- mlserver==1.7.1 'uvloop<0.22' ;; # its workers need an event loop that is made implicitly
        triton) set -- nvidia-pytriton==0.7.0 ;;
        *) echo "there is no server called $name" >&2; exit 1 ;;
    esac
    if [ "$name" = torchserve ] && ! command -v java > /dev/null; then
        echo "torchserve is left out: it needs a Java 17 runtime (apt-get install openjdk-17-jre-headless)" >&2
        continue
    fi
    install "$name" "$@" || failed="$failed $name"
done
[ -z "$failed" ] || echo "could not be installed and will be left out:$failed" >&2
