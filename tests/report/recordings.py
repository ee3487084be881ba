"""Recordings for tests: made up, with the texts that break pages."""

import torch

from mixhead.recording import Call, Recording, RecordingWriter
from mixhead.routing import Routing

HOSTILE = [
    "<script>document.title='taken'</script>", "</script><img src=x onerror=document.title='taken'>", "&amp;", '"\'',
    " مرحبا", " שלום", " 😀", "👩\u200d👩\u200d👧", "\n", "\t", " ", "",
    "x" * 300, "\u2028", "{{data}}", "<!--", " the", ",",
]  # fmt: skip


def text_recording(path, *, texts=2, tokens=40, layers=3, heads=4, active=2, shared=1, weighted=False, words=HOSTILE):
    """Texts of random words whose heads depend on the word and, in each layer, on the text."""
    generator = torch.Generator().manual_seed(0)
    writer = RecordingWriter(path.parent)
    for text in range(texts):
        # Every word once, the others by chance.
        ids_1N = torch.cat([torch.arange(len(words)), torch.randint(len(words), (tokens,), generator=generator)])[None]
        ids_1N = ids_1N[:, :tokens]
        for layer in range(layers):
            taste_WH = torch.randn(len(words), heads, generator=torch.Generator().manual_seed(layer))
            scores_1NH = taste_WH[ids_1N] + 0.5 * text * torch.arange(heads)
            scores_1NH[..., :shared] = torch.inf
            chosen = scores_1NH.topk(active, -1).indices
            selected_1NH = torch.zeros(1, tokens, heads, dtype=torch.bool).scatter(-1, chosen, True)
            gates_1NH = selected_1NH * (0.5 + torch.rand(1, tokens, heads, generator=generator) if weighted else 1.0)
            probs_1NH = torch.full((1, tokens, heads), 1.0 / heads)
            probs_1NH[..., :shared] = 0.0
            routing = Routing(gates_1NH, selected_1NH, probs_BNH=probs_1NH, num_routed_heads=heads - shared)
            labels = {"token": ids_1N, **({"text": torch.tensor([text])} if texts > 1 else {})}
            writer.add(f"model.layers.{layer}.attn", routing, Call(text, text, 0, labels))
    writer.names = {"token": dict(enumerate(words)), "text": {n: f"text <{n}>" for n in range(texts)}}
    writer.save(path, {"model": "made up"})
    return Recording(path)


def picture_recording(path, *, steps=(), sizes=((4, 6), (2, 3)), heads=(2, 4)):
    """Two pictures seen by two layers at different sizes; with `steps`, at several time steps."""
    generator = torch.Generator().manual_seed(0)
    writer = RecordingWriter(path.parent)
    for call, step in enumerate(steps or (None,)):
        for layer, ((rows, columns), count) in enumerate(zip(sizes, heads, strict=True)):
            index_1N = torch.arange(rows * columns)[None]
            selected_BNH = torch.rand(2, rows * columns, count, generator=generator) < 0.5
            labels = {"y": index_1N // columns, "x": index_1N % columns, "class": torch.tensor([0, 1])}
            if step is not None:
                labels["time_step"] = torch.tensor([step, step])
            writer.add(
                f"stages.{layer}.attn", Routing(selected_BNH.float(), selected_BNH), Call(call, 2 * call, 0, labels)
            )
    writer.names = {"class": {0: "boat", 1: "bag"}}
    writer.save(path)
    return Recording(path)
