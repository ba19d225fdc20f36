"""Loads a checkpoint's weights: the one entrance to this folder.

A safetensors folder is mapped as it is. A GGUF file is dequantized once per dtype
into the cache, as a Hugging Face folder of its own, which is then mapped too: all
workers of a machine share its pages. Dummy weights are drawn anew in each process.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from baton.checkpoint.cache import build_once
from baton.checkpoint.checkpoint import Checkpoint, derived_folder, require_unchanged
from baton.checkpoint.gguf_metadata import TEXT_FILES, read_tensor_index
from baton.checkpoint.hf_files import SINGLE_WEIGHTS, weight_files
from baton.errors import CheckpointError
from engine.weights.dummy import dummy_tensors
from engine.weights.gguf_weights import check_tensors, dequantized_tensors
from engine.weights.safetensors_files import read_tensors, write_tensors
from engine.weights.tensor_shapes import expected_shapes

_COPIED_FILES = ("config.json", *TEXT_FILES)


def load_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | None = None
) -> Mapping[str, torch.Tensor]:
    """All tensors of the model by their Hugging Face names, in ``dtype`` (a few always in
    float32: ``dtype_of``), on the CPU; dummy ones are drawn on ``device``, if that is given.

    Where ``tie_word_embeddings`` is set there is no ``lm_head.weight``. Tensors stored
    in ``dtype`` are views of the mapped files: reading them shares their pages with
    other processes, writing to one changes this process's copy alone. Others are cast,
    and dummy ones drawn, one by one as they are asked for.

    Raises:
        CheckpointError: a tensor is missing, surplus or misshapen, or a file is
            truncated, damaged or not supported.
    """
    if checkpoint.load_format == "dummy":
        return dummy_tensors(checkpoint.config, dtype, device=device)
    folder = hf_folder(checkpoint, dtype)
    return read_tensors(weight_files(folder), checkpoint.config, dtype)


def hf_folder(checkpoint: Checkpoint, dtype: torch.dtype) -> Path:
    """A complete Hugging Face folder of the checkpoint, that ``transformers`` loads too.

    For a GGUF file its weights are in ``dtype``, dequantized now unless they were before;
    a Hugging Face folder is itself, whatever its dtype.
    """
    if checkpoint.weights_source == checkpoint.folder:
        return checkpoint.folder
    return build_once(
        derived_folder(checkpoint.revision, str(dtype).removeprefix("torch.")),
        (*_COPIED_FILES, SINGLE_WEIGHTS),
        partial(_convert, checkpoint, dtype),
    )


def _convert(checkpoint: Checkpoint, dtype: torch.dtype, folder: Path) -> None:
    path, config = checkpoint.weights_source, checkpoint.config
    tensors = read_tensor_index(checkpoint.folder)
    try:
        check_tensors(path, tensors, config)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    for name in _COPIED_FILES:
        shutil.copyfile(checkpoint.folder / name, folder / name)
    write_tensors(
        folder / SINGLE_WEIGHTS,
        expected_shapes(config),
        dtype,
        dequantized_tensors(path, tensors, config),
    )
    require_unchanged(path, checkpoint.revision)
