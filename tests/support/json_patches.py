"""The two patches of JSON that Kubernetes takes."""

from __future__ import annotations

import copy
from typing import Any

Json = dict[str, Any]


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def json_patch(target: Json, operations: list[Json]) -> Json:
    """RFC 6902, add and replace and remove of what is there."""
    changed = copy.deepcopy(target)
    for operation in operations:
        *way, last = operation["path"].strip("/").split("/")
        holder: Any = changed
        for key in way:
            holder = holder[int(key)] if isinstance(holder, list) else holder[key]
        place: Any = int(last) if isinstance(holder, list) else last
        if operation["op"] == "remove":
            del holder[place]
        else:
            holder[place] = operation["value"]
    return changed
