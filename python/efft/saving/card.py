"""Write the model card of an adapter."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from efft.adapting.inject import adapted_layers, adapter_of
from efft.params import count_parameters

#: Maps the names of metadata on the Hugging Face hub to the keys of ``info`` that may hold the values.
_FACTS = {"license": ("license",), "datasets": ("datasets", "dataset"), "metrics": ("metrics", "metric")}


def model_card(model: nn.Module, description: dict[str, Any]) -> str:
    """Return the text of an adapter's ``README.md``: the known metadata for the hub, then a description."""
    base = description["base"]
    facts = "\n".join(f"- {key}: {value}" for key, value in description["info"].items())
    layers = len(adapted_layers(model))
    metadata = {"library_name": "efft-kernels", **_metadata(model, description["info"])}
    # JSON is valid YAML for names with any characters.
    header = "\n".join(f"{key}: {_to_yaml(value)}" for key, value in metadata.items())
    return f"""---
{header}
tags: [efft, tensor-train, parameter-efficient-fine-tuning]
---
# EFFT adapter for {base["architecture"]}

Method: {adapter_of(model).config.summary()}; {layers} layers adapted. Written by
{description["library"]}.

```
{count_parameters(model)}
```

{facts}

Load it onto the same pretrained base:

```python
import efft

efft.load_adapter(model, "path/to/this/folder")
```
"""


def _metadata(model: nn.Module, info: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata for the hub from ``info``. The base model can also be found from ``model``."""
    found = {"base_model": info.get("base_model") or _loaded_from(model)}
    for name, keys in _FACTS.items():
        value = next((info[key] for key in keys if info.get(key)), None)
        value = [*value] if isinstance(value, (list, dict)) else value  # ``info`` may map metrics to their values
        found[name] = [value] if isinstance(value, str) and name != "license" else value
    return {name: value for name, value in found.items() if _is_text(value)}


def _loaded_from(model: nn.Module) -> str | None:
    """Return the source of a model of transformers or timm, or None if the source is a local folder or unknown."""
    pretrained: Any = getattr(model, "pretrained_cfg", None) or {}
    names = (
        getattr(model, "name_or_path", None),
        pretrained.get("hf_hub_id") if isinstance(pretrained, dict) else None,
    )
    return next(
        (n for n in names if isinstance(n, str) and n and not n.startswith((".", "/", "~")) and "\\" not in n), None
    )


def _is_text(value: object) -> bool:
    return bool(value) and all(isinstance(part, str) for part in (value if isinstance(value, list) else [value]))


def _to_yaml(value: Any) -> str:
    plain = (
        isinstance(value, str) and value.replace("-", "").replace("_", "").replace("/", "").replace(".", "").isalnum()
    )
    return str(value) if plain and not value[0].isdigit() else json.dumps(value)
