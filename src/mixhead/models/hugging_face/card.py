"""The README.md of a saved model: what it is, and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CARD = """---
library_name: transformers
tags:
- mixhead
- mixture-of-head
---

# {architecture} with mixture-of-head attention

A model of type `{model_type}` whose attention layers choose heads for every token (`{router}` router): {active} of
{heads} heads of all layers are active. It was made with mixhead, and is loaded with it:

```python
import mixhead

model = mixhead.load("FOLDER")
```

After `import mixhead` the classes of transformers load it too: `{architecture}.from_pretrained("FOLDER")`, the Auto
classes and `pipeline`. Without that import they refuse it, since they would run all heads in silence. The tokenizer or
processor and the configuration open without it. `mixhead.revert(model)` gives the original class back.
"""


def write_card(folder: Path, config: Any) -> None:
    """Writes the card of a converted model into its folder, unless something stands there already."""
    file = folder / "README.md"
    if file.exists():
        return
    layers = config.moh["layers"]
    text = CARD.format(
        architecture=(config.architectures or [type(config).__name__.removesuffix("Config")])[0],
        model_type=config.model_type,
        router=config.moh["router"],
        active=sum(layer["active_heads"] for layer in layers),
        heads=sum(layer["num_heads"] for layer in layers),
    )
    file.write_text(text, encoding="utf-8")
