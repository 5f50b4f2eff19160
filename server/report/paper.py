"""Figures of the paper itself, for tables beside those that are measured.

Only such as could be checked against what its authors have published are here: the layers that
their own code removes (github.com/icip-cas/ShortGPT), and figures of the abstract, the introduction
and the main table of arXiv 2403.03853 that others quote alike.
"""

from __future__ import annotations

from server.report.blocks import Table

LAYERS_REMOVED = Table(
    ("Model", "Layers", "Removed", "Share", "Which"),
    [
        ("Llama-2-7B", "32", "9", "28.1 %", "21 to 29"),
        ("Llama-2-13B", "40", "10", "25.0 %", "26 to 35"),
        ("Baichuan2-7B", "32", "9", "28.1 %", "22 to 30"),
        ("Baichuan2-13B", "40", "10", "25.0 %", "26 to 35"),
    ],
    "The paper's layers with the least Block Influence, counted from 0",
    of_paper=True,
)
RETENTION = Table(
    ("Model", "Removed", "Measured on", "Dense", "Pruned", "Retention"),
    [
        ("Llama-2-13B", "10 of 40 layers", "MMLU", "55.0", "52.2", "94.9 %"),
        ("Llama-2-7B", "9 of 32 layers", "XSum", "19.40", "0.67", "3.5 %"),
    ],
    "The paper's figures: choosing survives, writing does not",
    of_paper=True,
)
