"""The targets that a GPU has to meet."""

from benchmarks.tables import target_lines


def test_targets() -> None:
    train = {"mode": "train", "task": "para", "comparison": "full-model", "square_peak": 1e15}
    train |= {"seconds": {"transformers": [1.0, 1.0], "minbert": [0.5, 0.2]}, "examples": [2560, 2560]}
    train |= {"flops": [1e14, 1e14]}  # 0.2e15 and 0.5e15 a second
    recipe = {"mode": "recipe", "train": {"sst": 100.0, "para": 150.0}, "evaluation": 49.0}
    assert target_lines([train, recipe], 256) == [
        "met     times transformers at batch 256: 3.50, at least 2.5",
        "met     share of the device's peak at batch 256: 0.350, at least 0.35",
        "MISSED  seconds for 283,003 pairs at batch 256: 31.6, at most 25",
        "met     seconds of the Yin Yang recipe: 299, at most 300",
    ]
    assert target_lines([train], 64)[0] == "MISSED  times transformers at batch 64: 3.50, at least 5"
    on_cpu = target_lines([{**train, "square_peak": None}], 256)  # its peak is not measured
    assert [line[8:].split(":")[0] for line in on_cpu] == [
        "times transformers at batch 256",
        "seconds for 283,003 pairs at batch 256",
    ]
