"""The JSON schema of recipes, for editors that check YAML as it is typed."""

from __future__ import annotations

from typing import Any

from compression.recipe import Recipe
from compression.steps import STEPS


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe, with the parameters of every registered step.

    It refuses unknown steps and parameters as `compression.planner.plan` does. It cannot say whether an order works.
    """
    schema = Recipe.model_json_schema()
    # A step inside a step's parameters is checked no deeper than that it is one.
    definitions: dict[str, Any] = {"StepSpec": schema["$defs"]["StepSpec"]}
    lines = []
    for name, step in sorted(STEPS.items()):
        params = step.model_json_schema()
        definitions |= params.pop("$defs", {})
        definitions[f"{name}_params"] = params | {"title": name}
        needed = ["step", *(["params"] if params.get("required") else [])]
        lines.append(
            {
                "type": "object",
                "properties": {"step": {"const": name}, "params": {"$ref": f"#/$defs/{name}_params"}},
                "required": needed,
                "additionalProperties": False,
            }
        )
    # By name, and not `oneOf`: an editor then says what is wrong with the step that was meant.
    schema["properties"]["steps"]["items"] = {
        "type": "object",
        "properties": {"step": {"enum": sorted(STEPS)}},
        "required": ["step"],
        "allOf": [
            {"if": {"properties": {"step": line["properties"]["step"]}}, "then": line}  # type: ignore[index]
            for line in lines
        ],
    }
    return schema | {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": definitions}
