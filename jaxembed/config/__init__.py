"""The configuration tree. Every default is on its field; `load_config` reads and checks a file."""

from jaxembed.config.data import (
    BatchingConfig,
    DataConfig,
    FewShotConfig,
    Format,
    MixtureConfig,
    PairTemplate,
    SourceConfig,
)
from jaxembed.config.mining import MineConfig, MiningRule
from jaxembed.config.model import LoraConfig, ModelConfig, PoolingConfig, ProjectionConfig
from jaxembed.config.objective import ObjectiveConfig
from jaxembed.config.objectives import (
    AnglEConfig,
    CoSENTConfig,
    CosineRegressionConfig,
    DistillationConfig,
    EmbeddingMatchingConfig,
    ExitsConfig,
    GradCacheConfig,
    GradedObjectiveConfig,
    InfoNCEConfig,
    MarginMSEConfig,
    MatryoshkaConfig,
    QuantizationConfig,
    SpreadOutConfig,
)
from jaxembed.config.spec import EmbeddingSpec, FewShotExample
from jaxembed.config.stage import StageConfig
from jaxembed.config.token_objectives import CausalLMConfig, MaskedPredictionConfig, TokenObjectiveConfig
from jaxembed.config.training import DropoutConfig, EvalConfig, EvalSetConfig, MeshConfig, OptimConfig, RunConfig, TrainConfig
from jaxembed.config.tree import Config, load_config, parse_config, read_run_config

__all__ = [
    "AnglEConfig",
    "BatchingConfig",
    "CausalLMConfig",
    "CoSENTConfig",
    "Config",
    "CosineRegressionConfig",
    "DataConfig",
    "DistillationConfig",
    "DropoutConfig",
    "EmbeddingMatchingConfig",
    "EmbeddingSpec",
    "EvalConfig",
    "EvalSetConfig",
    "ExitsConfig",
    "FewShotConfig",
    "FewShotExample",
    "Format",
    "GradCacheConfig",
    "GradedObjectiveConfig",
    "InfoNCEConfig",
    "LoraConfig",
    "MarginMSEConfig",
    "MaskedPredictionConfig",
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
    "QuantizationConfig",
    "RunConfig",
    "SourceConfig",
    "SpreadOutConfig",
    "StageConfig",
    "TokenObjectiveConfig",
    "TrainConfig",
    "load_config",
    "parse_config",
    "read_run_config",
]
