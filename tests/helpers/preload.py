"""What the server of `helpers.commands` imports before it forks. No device is used here: a fork would lose JAX's threads."""

import warnings

import transformers

import helpers.commands
import jaxembed.evaluate
import jaxembed.hub.export
import jaxembed.runs.train

warnings.filterwarnings("ignore", r"os\.fork\(\) was called")  # by JAX, which has no threads yet
LOADED = (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast, helpers.commands, jaxembed)
