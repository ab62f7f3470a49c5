"""The configuration as a JSON schema, for editors: ``python -m pipelines.config.json_schema`` writes it anew."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.config.files import NAMED_KINDS, PROJECT_ROOT
from pipelines.config.resolve import Config

SCHEMA_FILE = PROJECT_ROOT / "workflow" / "schemas" / "config.schema.json"


def schema_text() -> str:
    """The schema of a configuration file, whose entries may be named or written out."""
    schema = Config.model_json_schema()
    for kind, (*sections, key) in NAMED_KINDS.items():
        properties = schema["$defs"]["Data"]["properties"] if sections else schema["properties"]
        written_out = properties[key]
        completed = {"type": "object", "required": ["from"], "properties": {"from": {"type": "string"}}}
        completed["description"] = f"the file configs/{kind}/FROM.yaml with the other keys laid over it"
        written_out["patternProperties"] = {
            name: {"anyOf": [completed, entry]} for name, entry in written_out["patternProperties"].items()
        }
        names = {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True}
        names["description"] = f"names of files in configs/{kind}"
        properties[key] = {"anyOf": [names, written_out]}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main(path: Path = SCHEMA_FILE) -> None:
    path.write_text(schema_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
