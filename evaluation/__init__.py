"""What a trained model is for. From Python: `load("best.pt").predict("sst", ["a fine film"])`."""

from evaluation.trained import load

__all__ = ["load"]
