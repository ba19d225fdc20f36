"""The machine-readable description of the API, ``/openapi.json``.

The routes read their bodies themselves, so their schemas are put in here.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from router.gateway.schema import ChatRequest, CompletionRequest

_REFERENCE = "#/components/schemas/{model}"


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` of a route that takes this model as its JSON body."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe_bodies(app: FastAPI) -> None:
    """Makes ``app.openapi()`` define the schemas that the routes refer to."""
    generate = app.openapi
    _, definitions = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation")],
        ref_template=_REFERENCE,
    )

    def openapi() -> dict[str, Any]:
        schema = generate()
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        components.update(definitions["$defs"])
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
