"""The paper's own figures, which trends.py sets beside its small ones (arXiv 2406.07550).

ImageNet at 256 px, 256 proxy codes; the curves are of its preliminary setting: stage 1 alone, 1024
codes of 16 channels, 8 steps. rFID, gFID: lower is better; probe: top-1 accuracy in percent.
"""

# K, by the tokens of the small models with the same share of their 64 proxy codes
PAPER_TOKENS = {4: 16, 8: 32, 16: 64, 32: 128, 64: 256}

# table 4, the data of figure 4(a-c): by size of the tokenizer, over _K
_K = (16, 32, 64, 96, 128, 192, 256)
_TABLE_4 = {
    "rFID": {
        "S": (25.3, 16.2, 9.6, 6.9, 5.6, 4.3, 3.7),
        "B": (16.8, 9.7, 5.9, 4.7, 3.8, 3.2, 2.9),
        "L": (13.0, 6.6, 4.0, 3.4, 3.0, 2.6, 2.5),
    },
    "gFID": {
        "S": (16.1, 8.7, 4.4, 3.6, 3.5, 3.0, 3.2),
        "B": (10.9, 7.5, 4.1, 3.4, 3.2, 3.1, 3.5),
        "L": (9.0, 6.3, 4.3, 3.9, 3.7, 3.7, 3.7),
    },
    "probe %": {
        "S": (50.46, 48.01, 48.40, 48.12, 46.55, 47.05, 44.88),
        "B": (57.70, 54.79, 53.92, 53.72, 53.59, 51.75, 52.11),
        "L": (62.10, 60.03, 58.85, 56.12, 54.35, 53.95, 54.36),
    },
}

# figure 4(d): samples/s of one A100, TiTok-B and MaskGIT-ViT, de-tokenisation included; the label
# at 192 is unreadable
SAMPLES_PER_S = {
    "training": {16: 5746.3, 32: 2815.2, 64: 1268.3, 96: 824.8, 128: 555.1, 256: 219.7},
    "sampling": {16: 130.0, 32: 123.1, 64: 89.8, 96: 70.9, 128: 54.1, 256: 27.5},
}

# table 3b: gFID of L-32 by the masking schedule of its generator
SCHEDULES_GFID = {"cosine": 5.17, "arccos": 4.94, "linear": 4.95, "sqrt": 5.63}

# table 3c: rFID of B-64 by how it was trained
TRAINING_RFID = {"two-stage": 1.70, "single-stage": 5.15, "2d": 15.58}


def table_4(metric: str, size: str, tokens: int) -> float:
    """A figure of table 4: "rFID", "gFID" or "probe %" of a size; K is that of a small model."""
    return _TABLE_4[metric][size][_K.index(PAPER_TOKENS[tokens])]
