"""The configuration tree. Every default lives on its field; `load_config` reads and checks a file."""

from jaxembed.config.data import (
    BatchingConfig,
    DataConfig,
    FewShotConfig,
    Format,
    MixtureConfig,
    PairTemplate,
    PythonPackagesConfig,
    SourceConfig,
)
from jaxembed.config.mining import MineConfig, MiningRule
from jaxembed.config.model import LoraConfig, ModelConfig, PoolingConfig, ProjectionConfig, is_echo, is_example
from jaxembed.config.objectives import (
    DistillationConfig,
    EmbeddingMatchingConfig,
    GradCacheConfig,
    InfoNCEConfig,
    MarginMSEConfig,
    MatryoshkaConfig,
    ObjectiveConfig,
    SpreadOutConfig,
)
from jaxembed.config.training import EvalConfig, EvalSetConfig, MeshConfig, OptimConfig, RunConfig, TrainConfig
from jaxembed.config.tree import Config, load_config, parse_config

__all__ = [
    "BatchingConfig",
    "Config",
    "DataConfig",
    "DistillationConfig",
    "EmbeddingMatchingConfig",
    "EvalConfig",
    "EvalSetConfig",
    "FewShotConfig",
    "Format",
    "GradCacheConfig",
    "InfoNCEConfig",
    "LoraConfig",
    "MarginMSEConfig",
    "MatryoshkaConfig",
    "MeshConfig",
    "MineConfig",
    "MiningRule",
    "MixtureConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PairTemplate",
    "PoolingConfig",
    "ProjectionConfig",
    "PythonPackagesConfig",
    "RunConfig",
    "SourceConfig",
    "SpreadOutConfig",
    "TrainConfig",
    "is_echo",
    "is_example",
    "load_config",
    "parse_config",
]
