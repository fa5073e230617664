"""The server: a scorer in plain torch, one read of the online store, and the BentoML service around both.

Files of the model folder, beside those of a checkpoint (models/checkpoint.py):

    item_state.safetensors   NAME -> int64 [I]: per catalog row, the index of each impression feature of origin "item"
    serving.json             version, max_candidates
"""

MODEL = "ranker"  # the model's name in BentoML's model store; its version is the Bento's
ITEM_STATE, SERVING = "item_state.safetensors", "serving.json"
MAX_HISTORY = 1000
MAX_CANDIDATES = 10_000
MAX_BODY_BYTES = 2**18  # holds MAX_CANDIDATES and MAX_HISTORY ids of 20 digits, and some context
