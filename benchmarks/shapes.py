"""The shapes of all parameters of published models, in the order of their modules.

They follow from the configurations that are published with the weights, named at each model. Weights that the model
ties are there once.
"""

from __future__ import annotations

Shape = tuple[int, ...]


def gpt2(layers: int, hidden: int, vocabulary: int, context: int) -> list[Shape]:
    """Return the shapes of a GPT-2, whose linear layers lie as (in, out) and whose head is the embedding."""
    block: list[Shape] = [
        *[(hidden,)] * 2,  # first norm
        (hidden, 3 * hidden),
        (3 * hidden,),
        (hidden, hidden),
        (hidden,),
        *[(hidden,)] * 2,  # second norm
        (hidden, 4 * hidden),
        (4 * hidden,),
        (4 * hidden, hidden),
        (hidden,),
    ]
    return [(vocabulary, hidden), (context, hidden), *block * layers, *[(hidden,)] * 2]


def llama(layers: int, hidden: int, intermediate: int, key_value: int, vocabulary: int, tied_head: bool) -> list[Shape]:
    """Return the shapes of a Llama; ``key_value`` is the number of its key-value heads times the size of a head."""
    block: list[Shape] = [
        (hidden, hidden),  # query
        (key_value, hidden),
        (key_value, hidden),
        (hidden, hidden),  # output
        (intermediate, hidden),  # gate
        (intermediate, hidden),  # up
        (hidden, intermediate),  # down
        *[(hidden,)] * 2,  # norms
    ]
    head: list[Shape] = [] if tied_head else [(vocabulary, hidden)]
    return [(vocabulary, hidden), *block * layers, (hidden,), *head]


MODELS: dict[str, list[Shape]] = {
    # https://huggingface.co/openai-community/gpt2/blob/main/config.json
    "GPT-2": gpt2(layers=12, hidden=768, vocabulary=50257, context=1024),
    # https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
    "Llama-1B": llama(16, hidden=2048, intermediate=8192, key_value=8 * 64, vocabulary=128256, tied_head=True),
    # https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
    "Llama-8B": llama(32, hidden=4096, intermediate=14336, key_value=8 * 128, vocabulary=128256, tied_head=False),
}
