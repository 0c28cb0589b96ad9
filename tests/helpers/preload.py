"""What the server of `helpers.commands` imports before it forks. No device is used here: a fork would lose JAX's threads."""

import logging
import warnings

import mteb
import scipy.stats
import sentence_transformers
import transformers

import helpers.commands
import jaxembed.evaluate
import jaxembed.hub.export
import jaxembed.hub.torch_model
import jaxembed.merge
import jaxembed.planning.plan
import jaxembed.runs.train

warnings.filterwarnings("ignore", r"os\.fork\(\) was called")  # by JAX, which has no threads yet
logging.getLogger().handlers.clear()  # a library adds one, and commands then would not configure their own
LOADED = (
    transformers.Qwen3Model,  # the model of most commands; an attribute imports its module
    transformers.AutoTokenizer,
    transformers.PreTrainedTokenizerFast,
    sentence_transformers.SentenceTransformer,
    scipy.stats,
    mteb,
    helpers.commands,
    jaxembed,
)
