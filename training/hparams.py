"""The options of a run as the HParams tab of TensorBoard shows them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cli.commands import flags_of
from config import Config, TaskOptions
from lora import LoRAConfig
from tasks import DEFAULT_TASKS, Task

FIRST_COLUMNS = ("lr", "arch", "batch_size", "optim", "lora")
BEST_SCORE = "dev/score_best"  # the tag of a scalar whose last point is the score of best.pt


def hparams_of(config: Config) -> dict[str, Any]:
    """Return the options that can change a result, by their flags, and the kind, mode and rank of adapters as `lora`.

    Options that say where a run's files are, or only how fast it is, are not among them.
    """
    adapters = LoRAConfig.from_options(config.lora)
    lora = "none" if adapters is None else f"{'DoRA' if adapters.dora else 'LoRA'} {adapters.mode} r{adapters.rank}"
    return {"lora": lora, **flags_of(config, without=("run.", "compute."))}


def hparams_summaries(config: Config, tasks: Mapping[str, Task]) -> list[Any]:
    """Return two summaries for the event file: the columns of the HParams tab, and the row of this run.

    The metrics are tags of scalars that the run writes anyway. TensorBoard takes the columns from one of the runs that
    it shows. Therefore they have the options of all tasks that runs usually train, and not only of this run's. It
    sorts columns by name, those first that are marked as different between runs.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    def summary(tag: str, **content: Any) -> Any:
        about = metadata.create_summary_metadata(HParamsPluginData(**content))
        return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])

    tasks = {**DEFAULT_TASKS, **tasks}
    columns = hparams_of(replace(config, tasks={name: config.tasks.get(name, TaskOptions()) for name in tasks}))
    metrics = [BEST_SCORE, *(f"dev/{name}_{task.metric}" for name, task in tasks.items())]
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(name=name, type=data_type(value), differs=name in FIRST_COLUMNS)
            for name, value in columns.items()
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics],
    )
    row = SessionStartInfo()
    for name, value in hparams_of(config).items():
        if isinstance(value, bool):
            row.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            row.hparams[name].number_value = value
        elif value is not None:
            row.hparams[name].string_value = ",".join(value) if isinstance(value, tuple) else str(value)
    return [
        summary(metadata.EXPERIMENT_TAG, experiment=experiment),
        summary(metadata.SESSION_START_INFO_TAG, session_start_info=row),
    ]


def data_type(value: Any) -> Any:
    """Return the type that TensorBoard has for the values of an option."""
    from tensorboard.plugins.hparams import api_pb2

    if isinstance(value, bool):
        return api_pb2.DATA_TYPE_BOOL
    return api_pb2.DATA_TYPE_FLOAT64 if isinstance(value, int | float) else api_pb2.DATA_TYPE_STRING
