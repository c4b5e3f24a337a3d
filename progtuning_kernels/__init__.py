"""Progressive fine-tuning of Transformers, with the cost of the frozen rest removed.

`patch_model(model, schedule)` makes a Hugging Face model train only the blocks that its schedule
says; see README.md for the manual.
"""

__version__ = "0.1.0"
