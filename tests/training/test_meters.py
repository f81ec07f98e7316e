"""The figures of a task over an epoch."""

import torch

from tasks import SST
from training.meters import BatchResult, TaskMeter


def test_the_loss_of_an_epoch_is_the_mean_over_its_examples() -> None:
    meter = TaskMeter(scored=True)
    for number, (loss, size) in enumerate([(1.0, 8), (4.0, 2)]):
        labels = torch.zeros(size, dtype=torch.int64)
        result = BatchResult(torch.tensor(loss), torch.zeros(size, 5), labels)
        meter.add(number, result, size, 1e-3, 0.5, 100 - number)
    again = TaskMeter.from_state(meter.state_dict(), True, torch.device("cpu"))
    for found in (meter.epoch_figures(SST), again.epoch_figures(SST)):
        assert (found.steps, found.examples, found.loss, found.seconds, found.peak_memory) == (2, 10, 1.6, 1.0, 100)
        assert found.train["accuracy"] == 1
